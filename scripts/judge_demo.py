#!/usr/bin/env python
"""Judge the demo's videos: does each show what its prompt says?

Reads every NAME.mp4 of a folder that has a NAME.json beside it (as `python -m skyreels_v2` and
`python -m magi1` write them), reads colour, shape, direction and background from the pixels, and
compares them with the prompt in the JSON. Prints a row per video and the share of agreement per
attribute.
"""

import argparse
import sys
from pathlib import Path

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.demo.clips import Attributes, parse_caption
from flowcache.demo.judge import ATTRIBUTE_NAMES, judge
from flowcache.errors import UserError
from flowcache.runtime.cli import run_command
from flowcache.runtime.files import read_json
from flowcache.runtime.video import read_video


def judged(video: Path) -> tuple[Attributes, dict[str, bool]]:
    """Return what a video's prompt says, and for each attribute whether the video shows it."""
    report = video.with_suffix(".json")
    try:
        prompt = read_json(report)["config"]["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report}: holds no config.prompt ({error!r})") from error
    frames, _ = read_video(video)
    try:
        attributes = parse_caption(prompt)
        return attributes, judge(frames).agrees(attributes)
    except ValueError as error:
        raise UserError(f"{video}: {error}") from error


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with NAME.mp4 and NAME.json")
    options = parser.parse_args()

    def command() -> None:
        videos = [
            path
            for path in sorted(options.folder.glob("*.mp4"))
            if path.with_suffix(".json").is_file()
        ]
        if not videos:
            raise UserError(f"{options.folder}: no NAME.mp4 with a NAME.json beside it")
        rows = []
        for video in videos:
            attributes, agrees = judged(video)
            rows.append(agrees)
            wrong = [name for name in ATTRIBUTE_NAMES if not agrees[name]]
            verdict = f"wrong: {', '.join(wrong)}" if wrong else "agrees"
            print(f"{video.name}  {attributes.caption}  {verdict}")
        for name in ATTRIBUTE_NAMES:
            print(f"{name:12} {sum(row[name] for row in rows)} of {len(rows)}")
        print(f"{'all':12} {sum(all(row.values()) for row in rows)} of {len(rows)}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
