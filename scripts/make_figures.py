#!/usr/bin/env python
"""Make the pages' figures and what they are drawn from, all by this one command.

    records/MODEL_NAME      of runs that the demo checkpoint makes now (seconds each)
    mark, framework         drawn by code
    architecture            from the repository's own files
    distances_MODEL         from the record of a run that measures every chunk's change
    decisions_MODEL         from the record of a run that reuses and compresses
    tradeoff_MODEL          from assets/bench/MODEL_demo.json, written by bench_demo.py
    reuse_MODEL             from assets/bench/MODEL_reuse.json, by bench_demo.py --table reuse
    changes_MODEL           from assets/bench/MODEL_judge.json, by judge_demo.py --make
    growth                  from assets/bench/growth.json, by bench_gpu.py --growth
    moving_MODEL            from clips that the demo makes now (minutes), with their times
    frames_MODEL            from the same clips

MODEL is skyreels_v2 or magi1. SVG files have colours for light and for dark mode; frames are PNG,
the moving picture is an animated WebP. Without a name all are made, from the assets folder.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.bench.methods import (
    Method,
    Source,
    comparison_of,
    load,
    prepare_method,
    render,
    unseen_prompts,
)
from flowcache.errors import UserError
from flowcache.report.architecture import draw_architecture
from flowcache.report.changes import draw_changes
from flowcache.report.clips import Strip, draw_moving, draw_strips, strip_of
from flowcache.report.decisions import draw_decisions, draw_mark
from flowcache.report.figures import draw_distances, draw_growth, draw_reuse, draw_tradeoff
from flowcache.report.framework import draw_framework
from flowcache.runtime.cli import Parser, run_command
from flowcache.runtime.files import check_writable
from flowcache.runtime.metrics import psnr
from flowcache.runtime.model import load_model
from flowcache.runtime.run import Clip

ASSETS = Path(__file__).resolve().parents[1] / "assets"
TABLES = ASSETS / "bench"
MAX_FIGURE_BYTES = 500_000
MAX_MOVING_BYTES = 3_000_000
NUM_CANDIDATES = 5
"""Clips of which the one is shown whose PSNR with FlowCache-fast is the median."""
MOVING_FPS = 24
RECORDED_PROMPT = "a red circle moving right on a black background"
NUM_TIMED = 3
"""Runs of each method whose median time is shown."""
EXAMPLES = """examples:
  python scripts/make_figures.py
  python scripts/make_figures.py framework tradeoff_skyreels_v2 --out result/figures
"""


@dataclass(frozen=True)
class Demo:
    """What the pictures of a demo's clips show, and the records of which its figures are drawn."""

    title: str
    methods: Mapping[str, Method]
    """Name in the picture -> how it is made; all have one attention and the same passes."""
    settings: tuple[str, ...]
    """Of all methods, as in `num_frames=97`."""
    folder: str
    """Where its records are made: paths in a checkpoint's JSON stay as they are there."""
    records: Mapping[str, tuple[str, ...]]
    """Name of a record -> preset and settings of its run."""


def rows_of(model: str, base: str, teacache: str, flowcache: str) -> dict[str, Method]:
    """Return the rows by their names in the table of `bench_demo.py`, and the demo's own plan."""
    known = {method.name: method for method in comparison_of(model).methods}
    tuned = Method("tuned", "flowcache_tuned", ("kv.compress=none",), base)
    found = [known[base], known[teacache], known[flowcache], tuned]
    return dict(zip(("every step", "TeaCache", "FlowCache", "tuned"), found, strict=True))


MEASURED = ("reuse.threshold=0", "reuse.warmup_steps=1")
"""Every step is computed, and every chunk's change measured at every tick."""
DEMOS: Mapping[str, Callable[[], Demo]] = {
    "skyreels_v2": lambda: Demo(
        "SkyReels-V2",
        rows_of(
            "skyreels_v2",
            "vanilla-causal",
            "TeaCache, causal (FlowCache-fast's FLOPs), residual",
            "FlowCache-fast, residual",
        ),
        ("num_frames=77",),
        "FlowCache4SkyReels-V2",
        {
            "distances": ("flowcache_fast", "num_frames=97", "reuse.signal=content", *MEASURED),
            "decisions": ("flowcache_kvcompress", "num_frames=97"),
        },
    ),
    "magi1": lambda: Demo(
        "MAGI-1",
        rows_of(
            "magi1",
            "vanilla, neither pass",
            "TeaCache, neither pass (FlowCache-fast's FLOPs), latent update",
            "FlowCache-fast, latent update",
        ),
        (),
        "FlowCache4MAGI-1/demo",
        {
            "distances": ("flowcache_fast_nocompress", *MEASURED),
            "decisions": ("flowcache_fast", "runtime_config.num_frames=192"),
        },
    ),
}


@cache
def strips_of(model: str) -> tuple[Sequence[Strip], str]:
    """Make a clip with every method; return them with a title.

    The clip is, of some unseen prompts, the one whose PSNR with FlowCache is the median.
    """
    demo, prompts = DEMOS[model](), unseen_prompts(NUM_CANDIDATES)
    with TemporaryDirectory() as folder:
        source = Source(load_model(model), "demo", demo.settings, Path(folder))
        jobs = {name: prepare_method(method, source) for name, method in demo.methods.items()}
        networks = load(next(iter(jobs.values())))

        def make(name: str, index: int) -> Clip:
            attributes, seed = prompts[index]
            return render(jobs[name], networks, attributes.caption, seed)

        def decibel(index: int) -> float:
            return psnr(make("FlowCache", index).frames, make("every step", index).frames)

        index = sorted(prompts, key=decibel)[len(prompts) // 2]
        # one after the other, so that a slow minute slows all methods alike
        rounds = [{name: make(name, index) for name in jobs} for _ in range(NUM_TIMED)]
    clips = rounds[0]
    strips = [
        strip_of(
            name,
            clip,
            clips["every step"],
            seconds=median(each[name].stats.stage_times()["dit"].seconds for each in rounds),
        )
        for name, clip in clips.items()
    ]
    attributes, seed = prompts[index]
    return strips, f"{demo.title} demo: {attributes.caption}, seed {seed}"


def frames_of(model: str) -> bytes:
    """Draw rows of frames of one clip with every method."""
    strips, title = strips_of(model)
    return draw_strips(strips, title=title)


def moving_of(model: str) -> bytes:
    """Draw the clips of all methods side by side, moving."""
    strips, title = strips_of(model)
    return draw_moving(strips, title=title, fps=MOVING_FPS)


def make_record(model: str, name: str) -> str:
    """Run the demo and return its record."""
    demo = DEMOS[model]()
    preset, *settings = demo.records[name]
    with TemporaryDirectory() as folder:
        video = Path(folder) / f"{model}_{name}.mp4"
        command = [sys.executable, "-m", model, "--model", "demo", "--preset", preset, "--record"]
        command += ["--prompt", RECORDED_PROMPT, "--out", str(video), *settings]
        folder = ASSETS.parent / demo.folder
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise UserError(f"{model} {preset}: {(run.stderr.splitlines() or ['failed'])[-1]}")
        return video.with_suffix(".record.json").read_text(encoding="utf-8")


def drawn_figures(key: str, model: str) -> dict[str, Callable[[], str]]:
    """Return a model's figures that are drawn from files."""

    def record(name: str) -> Path:
        return ASSETS / "records" / f"{key}_{name}.record.json"

    return {
        f"distances_{key}.svg": lambda: draw_distances(record("distances"), model=model),
        f"decisions_{key}.svg": lambda: draw_decisions(record("decisions"), model=model),
        f"tradeoff_{key}.svg": lambda: draw_tradeoff(TABLES / f"{key}_demo.json", model=model),
        f"reuse_{key}.svg": lambda: draw_reuse(TABLES / f"{key}_reuse.json", model=model),
        f"changes_{key}.svg": lambda: draw_changes(TABLES / f"{key}_judge.json", model=model),
    }


RECORDS: Mapping[str, Callable[[], str]] = {
    f"records/{model}_{name}.record.json": partial(make_record, model, name)
    for model, name in product(("skyreels_v2", "magi1"), ("distances", "decisions"))
}
"""Of runs from which figures are drawn."""
FIGURES: Mapping[str, Callable[[], str | bytes]] = {
    "mark.svg": draw_mark,
    "framework.svg": draw_framework,
    "architecture.svg": draw_architecture,
    **drawn_figures("skyreels_v2", "SkyReels-V2"),
    "moving_skyreels_v2.webp": lambda: moving_of("skyreels_v2"),
    "frames_skyreels_v2.png": lambda: frames_of("skyreels_v2"),
    **drawn_figures("magi1", "MAGI-1"),
    "frames_magi1.png": lambda: frames_of("magi1"),
    "growth.svg": lambda: draw_growth(TABLES / "growth.json"),
}
"""File name -> what makes its content."""


def make(name: str, out: Path) -> Path:
    """Make a figure in one step and return its path."""
    content = (RECORDS | FIGURES)[name]()
    data = content.encode("utf-8") if isinstance(content, str) else content
    path = out / name
    most = MAX_MOVING_BYTES if path.suffix == ".webp" else MAX_FIGURE_BYTES
    if len(data) > most:
        raise UserError(f"{path}: would have {len(data)} bytes, more than {most}")
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def choose(names: Sequence[str]) -> list[str]:
    """Return the files of figures that are named without their suffix; no name means all."""
    known = {name.partition(".")[0]: name for name in (*RECORDS, *FIGURES)}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"{unknown[0]!r} is no figure; there are {', '.join(known)}")
    return [known[name] for name in names] or [*RECORDS, *FIGURES]


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
