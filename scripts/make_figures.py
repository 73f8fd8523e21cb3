#!/usr/bin/env python
"""Make the README's figures from what lies in the repository.

    framework               drawn by code
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

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from benchmark import magi1, skyreels_v2
from figures.distances import draw_distances
from figures.framework import draw_framework
from figures.growth import draw_growth
from figures.reuse import draw_reuse
from figures.strips import Strip, draw_strips
from figures.tradeoff import draw_tradeoff

from flowcache.errors import UserError
from flowcache.runtime.cli import Parser, run_command
from flowcache.runtime.files import check_writable

ASSETS = Path(__file__).resolve().parents[1] / "assets"
RECORDS, TABLES = ASSETS / "records", ASSETS / "bench"
MAX_FIGURE_BYTES = 500_000
MEDIAN_CLIPS = {"skyreels_v2": 4, "magi1": 2}
"""Of the 16 clips of a model's table, the one whose PSNR with FlowCache-fast is the median."""
EXAMPLES = """examples:
  python scripts/make_figures.py
  python scripts/make_figures.py framework tradeoff_skyreels_v2 --out result/figures
"""


def skyreels_v2_frames() -> bytes:
    """Make SkyReels-V2's frames: causal attention in all rows."""
    strips = [
        Strip("every step", "vanilla-causal"),
        Strip("TeaCache", "TeaCache, causal (FlowCache-fast's FLOPs), residual"),
        Strip("FlowCache", "FlowCache-fast, residual"),
    ]
    return draw_strips(
        skyreels_v2.FAMILY, strips, settings=["num_frames=77"], index=MEDIAN_CLIPS["skyreels_v2"]
    )


def magi1_frames() -> bytes:
    """Make MAGI-1's frames: neither a clean nor a nearly-clean pass in any row."""
    strips = [
        Strip("every step", magi1.NEITHER),
        Strip("TeaCache", "TeaCache, neither pass (FlowCache-fast's FLOPs), latent update"),
        Strip("FlowCache", "FlowCache-fast, latent update"),
    ]
    return draw_strips(magi1.FAMILY, strips, settings=[], index=MEDIAN_CLIPS["magi1"])


FIGURES: Mapping[str, Callable[[], str | bytes]] = {
    "framework.svg": draw_framework,
    "distances_skyreels_v2.svg": lambda: draw_distances(
        RECORDS / "skyreels_v2.record.json", model="SkyReels-V2"
    ),
    "tradeoff_skyreels_v2.svg": lambda: draw_tradeoff(
        TABLES / "skyreels_v2_demo.json", model="SkyReels-V2"
    ),
    "reuse_skyreels_v2.svg": lambda: draw_reuse(
        TABLES / "skyreels_v2_reuse.json", model="SkyReels-V2"
    ),
    "frames_skyreels_v2.png": skyreels_v2_frames,
    "distances_magi1.svg": lambda: draw_distances(RECORDS / "magi1.record.json", model="MAGI-1"),
    "tradeoff_magi1.svg": lambda: draw_tradeoff(TABLES / "magi1_demo.json", model="MAGI-1"),
    "reuse_magi1.svg": lambda: draw_reuse(TABLES / "magi1_reuse.json", model="MAGI-1"),
    "frames_magi1.png": magi1_frames,
    "growth.svg": lambda: draw_growth(TABLES / "growth.json"),
}
"""File name -> what makes its content."""


def make(name: str, out: Path) -> Path:
    """Make a figure and return its path.

    Raises:
        UserError: what it is made from is missing or broken, it is too large, or it can't be
            written.
    """
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
    """Return the files of figures that are named without their suffix; no name means all.

    Raises:
        UserError: a name is unknown.
    """
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
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="figures to make (default: all)",
    )
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
