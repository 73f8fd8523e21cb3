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
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

import numpy as np
from PIL import Image

from flowcache.demo.clips import parse_caption
from flowcache.demo.judge import ATTRIBUTE_NAMES, Steadiness, judge, judge_steadiness
from flowcache.errors import UserError
from flowcache.runtime.cli import run_command
from flowcache.runtime.files import read_json
from flowcache.runtime.video import read_video

STEADY_NAMES = ("kept", "smooth", "whole")
SHEET_FRAMES = 12
SHEET_GAP = 2


@dataclass(frozen=True)
class Row:
    """What one video says and shows."""

    path: Path
    mode: str
    preset: str
    caption: str
    agrees: dict[str, bool]
    steadiness: Steadiness
    few_frames: np.ndarray

    @property
    def verdict(self) -> str:
        """Say what is wrong."""
        wrong = [name for name in ATTRIBUTE_NAMES if not self.agrees[name]]
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
        attributes = parse_caption(prompt)
        return Row(
            path=video,
            mode=given[0] if given else "t2v",
            preset=str(written.get("preset", "")),
            caption=attributes.caption,
            agrees=judge(frames).agrees(attributes),
            steadiness=judge_steadiness(frames),
            few_frames=frames[np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int)],
        )
    except ValueError as error:
        raise UserError(f"{video}: {error}") from error


def print_rows(rows: list[Row]) -> None:
    """Print a row per video, then how many agree and are steady."""
    for row in rows:
        print(f"{row.path.name}  {row.caption}  {row.verdict}")
    for name in ATTRIBUTE_NAMES:
        print(f"{name:12} {sum(row.agrees[name] for row in rows)} of {len(rows)}")
    print(f"{'all':12} {sum(all(row.agrees.values()) for row in rows)} of {len(rows)}")
    for name in STEADY_NAMES:
        print(f"{name:12} {sum(row.steadiness.passes[name] for row in rows)} of {len(rows)}")


def print_modes(rows: list[Row]) -> None:
    """Print a Markdown table with one row per mode and preset, in percent of the clips."""
    names = (*ATTRIBUTE_NAMES, *STEADY_NAMES)
    print("| " + " | ".join(("mode", "preset", "clips", *names)) + " |")
    print("|" + "---|" * (3 + len(names)))
    groups: dict[tuple[str, str], list[dict[str, bool]]] = defaultdict(list)
    for row in rows:
        groups[row.mode, row.preset].append({**row.agrees, **row.steadiness.passes})
    for (mode, preset), group in sorted(groups.items()):
        shares = [f"{sum(each[name] for each in group) / len(group):.0%}" for name in names]
        print("| " + " | ".join((mode, preset, str(len(group)), *shares)) + " |")


def write_sheet(rows: list[Row], path: Path) -> None:
    """Draw a picture with a row of evenly spaced frames per video."""
    gap = ((0, 0), (0, SHEET_GAP), (0, SHEET_GAP), (0, 0))
    lines = [np.concatenate(np.pad(row.few_frames, gap, constant_values=255), 1) for row in rows]
    Image.fromarray(np.concatenate(lines)).save(path)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with NAME.mp4 and NAME.json")
    parser.add_argument(
        "--by-mode", action="store_true", help="all folders below, one row per mode and preset"
    )
    parser.add_argument("--sheet", type=Path, help="picture to write, a row of frames per video")
    options = parser.parse_args()

    def command() -> None:
        find = options.folder.rglob if options.by_mode else options.folder.glob
        videos = [path for path in sorted(find("*.mp4")) if path.with_suffix(".json").is_file()]
        if not videos:
            raise UserError(f"{options.folder}: no NAME.mp4 with a NAME.json beside it")
        rows = [judged(video) for video in videos]
        (print_modes if options.by_mode else print_rows)(rows)
        if options.sheet is not None:
            write_sheet(rows, options.sheet)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
