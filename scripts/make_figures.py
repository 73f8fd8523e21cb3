#!/usr/bin/env python
"""Make the README's figures from what lies in the repository.

    framework               drawn by code
    architecture            from the repository's own files
    distances_MODEL         from assets/records/MODEL.record.json
    tradeoff_MODEL          from assets/bench/MODEL_demo.json, written by bench_demo.py
    reuse_MODEL             from assets/bench/MODEL_reuse.json, by bench_demo.py --table reuse
    growth                  from assets/bench/growth.json, by bench_gpu.py --growth
    frames_MODEL            from clips that the demo checkpoint makes now (a minute)

MODEL is skyreels_v2 or magi1. SVG files have colours for light and for dark mode; frames are PNG.
The records are of runs in which every step is computed and the change of the picture is measured:

    cd FlowCache4SkyReels-V2
    python -m skyreels_v2 --model demo --preset flowcache_fast --record \\
        --prompt "a red circle moving right on a black background" \\
        --out ../assets/records/skyreels_v2.mp4 num_frames=97 \\
        reuse.signal=content reuse.threshold=0 reuse.warmup_steps=1
    cd ../FlowCache4MAGI-1/demo     # the paths of its JSON hold here and stay as they are
    python -m magi1 --model demo --preset flowcache_fast_nocompress --record \\
        --prompt "a red circle moving right on a black background" \\
        --out ../../assets/records/magi1.mp4 reuse.threshold=0 reuse.warmup_steps=1
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.bench.methods import (
    Source,
    comparison_of,
    load,
    prepare_method,
    render,
    unseen_prompts,
)
from flowcache.errors import UserError
from flowcache.report.architecture import draw_architecture
from flowcache.report.figures import (
    draw_distances,
    draw_growth,
    draw_reuse,
    draw_strips,
    draw_tradeoff,
    strip_of,
)
from flowcache.report.framework import draw_framework
from flowcache.runtime.cli import Parser, run_command
from flowcache.runtime.files import check_writable
from flowcache.runtime.model import load_model

ASSETS = Path(__file__).resolve().parents[1] / "assets"
RECORDS, TABLES = ASSETS / "records", ASSETS / "bench"
MAX_FIGURE_BYTES = 500_000
MEDIAN_CLIPS = {"skyreels_v2": 4, "magi1": 2}
"""Of the 16 clips of a model's table, the one whose PSNR with FlowCache-fast is the median."""
EXAMPLES = """examples:
  python scripts/make_figures.py
  python scripts/make_figures.py framework tradeoff_skyreels_v2 --out result/figures
"""


def draw_frames(
    model: str, methods: Mapping[str, str], *, settings: Sequence[str], index: int
) -> bytes:
    """Make clips of an unseen prompt, and return a PNG of their frames.

    Args:
        methods: rows from top to bottom, with the method's name in the table of `bench_demo.py`;
            the others are compared with the first one.
        settings: of all methods, as in `num_frames=97`.
        index: of the prompt in that table.
    """
    attributes, seed = unseen_prompts(index + 1)[index]
    comparison = comparison_of(model)
    known = {method.name: method for method in comparison.methods}
    with TemporaryDirectory() as folder:
        source = Source(load_model(model), "demo", tuple(settings), Path(folder))
        jobs = [
            prepare_method(known[name], source, longer=comparison.longer)
            for name in methods.values()
        ]
        models = load(jobs[0])
        clips = [render(job, models, attributes.caption, seed) for job in jobs]
    strips = [strip_of(name, clip, clips[0]) for name, clip in zip(methods, clips, strict=True)]
    return draw_strips(strips, title=f"{attributes.caption}, seed {seed}")


def skyreels_v2_frames() -> bytes:
    """Make SkyReels-V2's frames: causal attention in all rows."""
    methods = {
        "every step": "vanilla-causal",
        "TeaCache": "TeaCache, causal (FlowCache-fast's FLOPs), residual",
        "FlowCache": "FlowCache-fast, residual",
    }
    index = MEDIAN_CLIPS["skyreels_v2"]
    return draw_frames("skyreels_v2", methods, settings=["num_frames=77"], index=index)


def magi1_frames() -> bytes:
    """Make MAGI-1's frames: neither a clean nor a nearly-clean pass in any row."""
    methods = {
        "every step": "vanilla, neither pass",
        "TeaCache": "TeaCache, neither pass (FlowCache-fast's FLOPs), latent update",
        "FlowCache": "FlowCache-fast, latent update",
    }
    return draw_frames("magi1", methods, settings=[], index=MEDIAN_CLIPS["magi1"])


def drawn_figures(key: str, model: str) -> dict[str, Callable[[], str]]:
    """Return a model's figures that are drawn from files."""
    return {
        f"distances_{key}.svg": lambda: draw_distances(RECORDS / f"{key}.record.json", model=model),
        f"tradeoff_{key}.svg": lambda: draw_tradeoff(TABLES / f"{key}_demo.json", model=model),
        f"reuse_{key}.svg": lambda: draw_reuse(TABLES / f"{key}_reuse.json", model=model),
    }


FIGURES: Mapping[str, Callable[[], str | bytes]] = {
    "framework.svg": draw_framework,
    "architecture.svg": draw_architecture,
    **drawn_figures("skyreels_v2", "SkyReels-V2"),
    "frames_skyreels_v2.png": skyreels_v2_frames,
    **drawn_figures("magi1", "MAGI-1"),
    "frames_magi1.png": magi1_frames,
    "growth.svg": lambda: draw_growth(TABLES / "growth.json"),
}
"""File name -> what makes its content."""


def make(name: str, out: Path) -> Path:
    """Make a figure in one step and return its path."""
    content = FIGURES[name]()
    data = content.encode("utf-8") if isinstance(content, str) else content
    path = out / name
    if len(data) > MAX_FIGURE_BYTES:
        raise UserError(f"{path}: would have {len(data)} bytes, more than {MAX_FIGURE_BYTES}")
    part = path.with_name(f".{name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def choose(names: Sequence[str]) -> list[str]:
    """Return the files of figures that are named without their suffix; no name means all."""
    known = {name.partition(".")[0]: name for name in FIGURES}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"{unknown[0]!r} is no figure; there are {', '.join(known)}")
    return [known[name] for name in names] or list(FIGURES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(
        prog="make_figures.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to make (default: all)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder (default: assets)")
    options = parser.parse_args(arguments)

    def command() -> None:
        files = choose(options.names)
        check_writable(options.out)
        for name in files:
            path = make(name, options.out)
            print(f"wrote {path}: {path.stat().st_size / 1e3:.1f} kB")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
