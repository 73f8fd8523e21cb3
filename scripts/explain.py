#!/usr/bin/env python
"""Show what the cache did in one run, or in two runs side by side.

A run is named by its record, or by the video or the report beside it; a record is written when the
run is started with --record. Prints a summary and writes one HTML page that needs no network:
decisions per chunk and tick, distances against the threshold, tokens in the KV cache, times, key
frames; of two runs also how the figures, the settings and the pixels differ. The time line of the
stages comes from the report NAME.json, if that is there.

It raises an alarm where the cache is on but never used, or always, where a distance is not a
number or never changes, where no distance reaches the threshold, and where the video is of one
colour or frozen.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.errors import UserError
from flowcache.report.page import measure, read_clip, summary, with_video_alarms, write_page
from flowcache.report.run import SUFFIX, find_record, load_run
from flowcache.runtime.cli import Parser, run_command
from flowcache.runtime.files import check_free, fresh_path, made_folder, write_text

EXIT_ALARM = 1
MAX_PAGE_BYTES = 5_000_000
EXAMPLES = """examples:
  python scripts/explain.py result/clip.mp4
  python scripts/explain.py result/clip.record.json --out clip.html --strict
  python scripts/explain.py result/vanilla.mp4 result/flowcache.mp4 --out both.html

exit code: 0; 1 with --strict if there is an alarm; 2 if something given is wrong
"""


def choose_page(out: Path | None, records: Sequence[Path], *, overwrite: bool) -> Path:
    """Return where the page goes: `out`, or a fresh name in the folder of the first record."""
    names = [path.name.removesuffix(SUFFIX) for path in records]
    if out is None:
        return fresh_path(records[0].parent, "-and-".join(names), ".html")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: the page is written as .html: change the name")
    check_free(out, overwrite=overwrite and not out.is_dir())
    return out


def write_whole(path: Path, content: str) -> None:
    """Write a page in one step, unless it is too large."""
    num_bytes = len(content.encode("utf-8"))
    if num_bytes > MAX_PAGE_BYTES:
        raise UserError(
            f"{path}: the page would have {num_bytes} bytes, more than {MAX_PAGE_BYTES}; "
            "explain a shorter run, or one run instead of two"
        )
    write_text(path, content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(
        prog="explain.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="NAME.record.json, or the NAME.mp4 or NAME.json beside it; one or two",
    )
    parser.add_argument("--out", type=Path, help="page to write; without it a new one beside RUN")
    parser.add_argument("--overwrite", action="store_true", help="replace the page of --out")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if there is an alarm")
    options = parser.parse_args(arguments)
    alarms: list[str] = []

    def command() -> None:
        if len(options.runs) > 2:
            raise UserError(f"one run or two can be explained, {len(options.runs)} were given")
        records = [find_record(path) for path in options.runs]
        path = choose_page(options.out, records, overwrite=options.overwrite)
        with made_folder(path.parent):
            runs = [load_run(record, letter) for record, letter in zip(records, "AB", strict=False)]
            clips = [read_clip(run.video) for run in runs]
            runs = [with_video_alarms(run, clip) for run, clip in zip(runs, clips, strict=True)]
            metrics = measure(clips) if len(runs) == 2 else None
            write_whole(path, write_page(runs, clips, metrics))
        print(summary(runs, metrics))
        print(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB")
        alarms.extend(alarm for run in runs for alarm in run.alarms)

    code = run_command(command)
    return EXIT_ALARM if code == 0 and options.strict and alarms else code


if __name__ == "__main__":
    sys.exit(main())
