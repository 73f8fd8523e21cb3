#!/usr/bin/env python
"""Judge the demo's videos: does each show what its prompt says, and how steadily?

Reads every NAME.mp4 of a folder that has a NAME.json beside it (as `python -m skyreels_v2` and
`python -m magi1` write them), reads colour, shape, direction and background from the pixels, and
compares them with the prompt in the JSON. Prints a row per video and the share of agreement per
attribute; then how many keep their shape, move smoothly (without a rhythm of the VAE's stride) and
are whole (no jump, no shape in pieces).

With --by-mode it takes the videos of all folders below, too, and prints one row per mode and
preset.
--sheet FILE.png draws a row of frames per video.

With --make N it first makes N clips of unseen captions by mode and preset with a demo, in the
folder, and goes on where an earlier start stopped. Modes: t2v (from text), i2v (from a drawn
picture), v2v (from the drawn beginning of a clip), pair (from text about two shapes). Writes
judge.json and a sheet of 8 clips per mode and preset. Rows named "drawn" are of the clips that the
captions mean: what the judge itself misses.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from PIL import Image

from flowcache import api
from flowcache.demo.clips import caption_of, parse_scene
from flowcache.demo.judge import ATTRIBUTE_NAMES
from flowcache.demo.modes import (
    MODES,
    STEADY_NAMES,
    drawn_rows,
    judge_clip,
    make_rows,
    stacked,
    strip,
    strip_path,
    summarized,
)
from flowcache.errors import UserError
from flowcache.runtime.cli import Parser, add_checkpoint, run_command, settle_checkpoint
from flowcache.runtime.files import read_json, write_json
from flowcache.runtime.video import read_video

SHEET_CLIPS = 8
EXAMPLE = """example:
  python scripts/judge_demo.py out --make 64 --presets vanilla vanilla_causal flowcache_fast
"""


@dataclass(frozen=True)
class Row:
    """What one video says and shows.

    Attributes:
        judged: see `flowcache.demo.modes.judge_clip`.
    """

    path: Path
    mode: str
    preset: str
    caption: str
    judged: Mapping[str, Any]
    few_frames: Image.Image

    @property
    def verdict(self) -> str:
        """Say what is wrong."""
        wrong = [name for name in ATTRIBUTE_NAMES if not self.judged["agrees"][name]]
        return f"wrong: {', '.join(wrong)}" if wrong else "agrees"


def judged(video: Path) -> Row:
    """Judge one video by the prompt of its report."""
    report = video.with_suffix(".json")
    try:
        written = read_json(report)
        config = written["config"]
        prompt = config["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report}: holds no config.prompt ({error!r})") from error
    given = [mode for key, mode in (("image", "i2v"), ("video", "v2v")) if config.get(key)]
    frames = read_video(video)[0]
    try:
        scene = parse_scene(prompt)
        return Row(
            path=video,
            mode=given[0] if given else "t2v",
            preset=str(written.get("preset", "")),
            caption=caption_of(scene),
            judged=judge_clip(frames, scene),
            few_frames=strip(frames),
        )
    except ValueError as error:
        raise UserError(f"{video}: {error}") from error


def print_rows(rows: Sequence[Row]) -> None:
    """Print a row per video, then how many agree and are steady."""
    for row in rows:
        print(f"{row.path.name}  {row.caption}  {row.verdict}")
    agrees, passes = ([row.judged[part] for row in rows] for part in ("agrees", "passes"))
    for name in ATTRIBUTE_NAMES:
        print(f"{name:12} {sum(each[name] for each in agrees)} of {len(rows)}")
    print(f"{'all':12} {sum(all(each.values()) for each in agrees)} of {len(rows)}")
    for name in STEADY_NAMES:
        print(f"{name:12} {sum(each[name] for each in passes)} of {len(rows)}")


def print_modes(groups: Sequence[Mapping[str, Any]]) -> None:
    """Print a Markdown table with one row per mode and preset, in percent of the clips."""
    names = (*ATTRIBUTE_NAMES, *STEADY_NAMES)
    print("| " + " | ".join(("mode", "preset", "clips", *names)) + " |")
    print("|" + "---|" * (3 + len(names)))
    for group in groups:
        shares = [f"{group[name]:.0%}" for name in names]
        print(
            "| " + " | ".join((group["mode"], group["preset"], str(group["clips"]), *shares)) + " |"
        )


def judge_folder(options: argparse.Namespace) -> None:
    """Judge the videos of a folder."""
    find = options.folder.rglob if options.by_mode else options.folder.glob
    videos = [path for path in sorted(find("*.mp4")) if path.with_suffix(".json").is_file()]
    if not videos:
        raise UserError(f"{options.folder}: no NAME.mp4 with a NAME.json beside it")
    rows = [judged(video) for video in videos]
    if options.by_mode:
        ordered = sorted(rows, key=lambda row: (row.mode, row.preset))
        print_modes(
            summarized([{"mode": row.mode, "preset": row.preset, **row.judged} for row in ordered])
        )
    else:
        print_rows(rows)
    if options.sheet is not None:
        stacked([row.few_frames for row in rows]).save(options.sheet)


def make_and_judge(options: argparse.Namespace) -> None:
    """Make clips by mode and preset, and judge them."""
    settle_checkpoint(options)
    folder: Path = options.folder
    length = {} if options.num_frames is None else {"num_frames": options.num_frames}
    pipeline = api.load(
        options.model,
        preset=options.presets[0],
        architecture=options.architecture,
        progress_bar=False,
        **length,
    )
    count, modes = options.make, options.modes
    made = make_rows(pipeline, presets=options.presets, modes=modes, count=count, folder=folder)
    groups = summarized([*drawn_rows(modes, count=count), *made])
    print_modes(groups)
    write_json(folder / "judge.json", {"architecture": options.architecture, "groups": groups})
    for preset, mode in itertools.product(options.presets, modes):
        paths = [
            strip_path(folder, preset, mode, index) for index in range(min(SHEET_CLIPS, count))
        ]
        stacked([Image.open(path) for path in paths]).save(folder / f"sheet-{preset}-{mode}.png")


def main() -> int:
    """Run the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLE
    )
    parser.add_argument("folder", type=Path, help="folder with NAME.mp4 and NAME.json")
    parser.add_argument(
        "--by-mode", action="store_true", help="all folders below, one row per mode and preset"
    )
    parser.add_argument("--sheet", type=Path, help="picture to write, a row of frames per video")
    making = parser.add_argument_group("clips to make")
    making.add_argument("--make", type=int, metavar="N", help="clips per mode and preset")
    making.add_argument(
        "--presets", nargs="+", default=["vanilla"], metavar="NAME", help="default: vanilla"
    )
    making.add_argument(
        "--modes", nargs="+", choices=MODES, default=[*MODES], help="default: all of them"
    )
    making.add_argument("--num-frames", type=int, metavar="N", help="default: the preset's")
    add_checkpoint(parser)
    options = parser.parse_args()
    if options.make is not None and options.make < 1:
        parser.error(f"--make must be at least 1, not {options.make}")
    return run_command(
        lambda: judge_folder(options) if options.make is None else make_and_judge(options)
    )


if __name__ == "__main__":
    sys.exit(main())
