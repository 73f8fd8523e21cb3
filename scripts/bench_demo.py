#!/usr/bin/env python
"""Compare every caching method of a model on its demo checkpoint: cost, speed, quality, in one run.

Each prompt is rendered with every method before the next prompt, so that a machine whose speed
drifts slows all methods alike. Results are kept row by row; a second start with the same --out goes
on where the first one stopped. Every method is compared with vanilla; the last two columns compare
it with a second method, so that what reuse does is not mixed with what else differs:

    skyreels_v2   vanilla with causal attention
    magi1         the same passes and the same KV cache with every step computed
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from benchmark import magi1, skyreels_v2
from benchmark.family import Family, Source
from benchmark.figures import markdown, summarize
from benchmark.work import parse_part, read_rows, render_missing, unseen_prompts

from flowcache.cli import run_command
from flowcache.errors import UserError
from flowcache.files import check_writable, write_json, write_text
from flowcache.stats import environment

FAMILIES: Mapping[str, Family[Any, Any]] = {
    "magi1": magi1.FAMILY,
    "skyreels_v2": skyreels_v2.FAMILY,
}
EXAMPLES = """examples:
  python scripts/bench_demo.py --model skyreels_v2 --out result/bench num_frames=77
  python scripts/bench_demo.py --model magi1 --part 1/2 --out result/bench
  python scripts/bench_demo.py --model magi1 --prompts 64 --out result/judge --methods vanilla
  python scripts/bench_demo.py --model magi1 --list-methods
"""


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES
    )
    parser.add_argument("--model", choices=sorted(FAMILIES), required=True, help="whose methods")
    parser.add_argument(
        "--checkpoint", default="demo", help="as the model's own --model takes it (default: demo)"
    )
    parser.add_argument("--prompts", type=int, default=16, help="clips per method (default: 16)")
    parser.add_argument("--out", type=Path, default=Path("result/bench_demo"), help="result folder")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows of the table (all)")
    parser.add_argument("--list-methods", action="store_true", help="print their names and stop")
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="render every N-th clip only, from the I-th: several processes share the work, the "
        "last one to finish writes the table",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all methods")
    return parser.parse_args()


def compare(options: argparse.Namespace) -> None:
    """Render what is missing, and write the table if nothing is missing any more.

    Raises:
        UserError: something given is wrong.
    """
    family = FAMILIES[options.model]
    names = [method.name for method in family.methods]
    if options.list_methods:
        print("\n".join(names))
        return
    if options.prompts < 1:
        raise UserError(f"--prompts must be 1 or more, not {options.prompts}")
    unknown = set(options.methods or ()) - set(names)
    if unknown:
        raise UserError(f"--methods: {unknown.pop()!r} is no row of the table: see --list-methods")
    part, num_parts = parse_part(options.part)
    check_writable(options.out)
    methods = family.chosen(options.methods or names)
    prompts = unseen_prompts(options.prompts)
    render_missing(
        family,
        methods,
        {i: prompt for i, prompt in prompts.items() if i % num_parts == part - 1},
        source=Source(options.checkpoint, tuple(options.settings), options.out),
        log=options.out / f"rows-{part}.jsonl",
    )
    chosen = {(method.name, index) for method in methods for index in prompts}
    rows = [row for row in read_rows(options.out) if (row["method"], row["index"]) in chosen]
    if len(rows) < len(chosen):
        print(f"{len(rows)} of {len(chosen)} clips are there: other parts are still at work")
        return
    table = summarize(rows, methods)
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(torch.device("cpu")),
        "table": table,
    }
    write_json(options.out / "table.json", report)
    text = markdown(table, base_label=family.base_label)
    write_text(options.out / "table.md", text)
    print(text)


def main() -> int:
    """Run the command line."""
    options = parse_options()
    return run_command(lambda: compare(options))


if __name__ == "__main__":
    sys.exit(main())
