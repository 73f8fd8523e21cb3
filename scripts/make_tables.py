#!/usr/bin/env python
"""Write the tables of the pages anew, from the figures that are kept in assets/bench.

A table stands between <!-- table: NAME MODEL --> and <!-- end -->. assets/bench holds what
bench_demo.py and reproduce_MODEL.sh wrote (table.json, under the names that the pages use), and
gets the same figures as CSV, all columns and rows.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.bench.methods import csv_text
from flowcache.report.tables import BENCH, TITLES, fill
from flowcache.runtime.cli import Parser, run_command
from flowcache.runtime.files import read_json, write_text

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "FlowCache4*/README.md", "docs/*.md")
KEPT = tuple(f"{model}_{kind}" for model in TITLES for kind in ("demo", "reuse"))


def contents() -> dict[Path, str]:
    """Return every page and CSV file as it is to be."""
    pages = [path for pattern in PAGES for path in sorted(REPOSITORY.glob(pattern))]
    made = {path: fill(path.read_text(encoding="utf-8")) for path in pages}
    for name in KEPT:
        table = read_json(BENCH / f"{name}.json", advice="make it with bench_demo.py")["table"]
        made[BENCH / f"{name}.csv"] = csv_text(table)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(
        prog="python scripts/make_tables.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)

    def command() -> None:
        for path, text in contents().items():
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)
                print(f"wrote {path.relative_to(REPOSITORY)}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
