#!/usr/bin/env python
"""Compare every caching method of a model on its demo checkpoint: cost, speed, quality, in one run.

Each prompt is rendered with every method before the next prompt, so that a machine whose speed
drifts slows all methods alike. Results are kept row by row; a second start with the same --out goes
on where the first one stopped. Every method is compared with vanilla; the last two columns compare
it with a second method, so that what reuse does is not mixed with what else differs:

    skyreels_v2   vanilla with causal attention
    magi1         the same passes and the same KV cache with every step computed
    self_forcing  vanilla, for many steps; few steps as published, for few steps

`--table methods` has the published methods. `--table reuse` has every reuse policy with the
predictors that make sense at three budgets, from what scripts/tune_budgets.py made, and says
whether a tuned plan keeps what is claimed of it. `--table rivals` has every rule at the FLOPs of
FlowCache-slow, FlowCache-fast and half of the latter (scripts/rivals.sh makes all that it needs),
with intervals, drift, seams, published figures, and a drawing. `--table quantized` has KV caches in
8, 4 and 2 bits, whole and compressed, compared with the same caches in the dtype of the model.
`--table long` has ways to bound the KV cache of long videos (self_forcing) at several lengths,
without references.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

import torch

from flowcache.bench.long import (
    EXPLAINED,
    LENGTHS,
    LongProbe,
    long_markdown,
    long_methods,
    summarize_long,
)
from flowcache.bench.methods import (
    Comparison,
    Source,
    comparison_of,
    csv_text,
    markdown,
    parse_part,
    prepare_method,
    read_rows,
    render_missing,
    reuse_markdown,
    summarize,
    unseen_prompts,
)
from flowcache.bench.quantized import quantized_markdown, quantized_methods
from flowcache.bench.reuse import LEVELS, claims, read_budgets, reuse_methods
from flowcache.bench.rivals import (
    PUBLISHED,
    RIVAL_LEVELS,
    figure_rows,
    frontier,
    rival_claims,
    rival_markdown,
    rival_methods,
    rival_rules,
    rival_table,
)
from flowcache.errors import UserError
from flowcache.report.figures import draw_rivals
from flowcache.runtime.cli import Parser, add_checkpoint, run_command, settle_checkpoint
from flowcache.runtime.files import made_folder, write_json, write_text
from flowcache.runtime.model import load_model
from flowcache.runtime.stats import environment

EXAMPLES = """examples:
  python scripts/bench_demo.py --out result/bench num_frames=77
  python scripts/bench_demo.py --architecture magi1 --part 1/2 --out result/bench
  python scripts/bench_demo.py --model demo-base --out result/bench_base
  python scripts/bench_demo.py --table reuse \\
      --profiles result/reuse_skyreels_v2 --prompts 64 --out result/bench_reuse num_frames=37
  python scripts/bench_demo.py --architecture self_forcing --table long --out result/bench_long
"""


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--table",
        choices=("methods", "reuse", "quantized", "rivals", "long"),
        default="methods",
        help="which (default: methods)",
    )
    parser.add_argument(
        "--profiles",
        type=Path,
        metavar="DIR",
        help="of --table reuse and rivals: tune_budgets.py's folder",
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="N",
        help=f"of --table long: latent frames (default: {' '.join(map(str, LENGTHS))})",
    )
    parser.add_argument("--prompts", type=int, default=16, help="clips per method (default: 16)")
    parser.add_argument("--out", type=Path, default=Path("result/bench_demo"), help="result folder")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows of the table (all)")
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
    """Render what is missing, and write the table if nothing is missing any more."""
    settle_checkpoint(options)
    prompts, (part, num_parts) = unseen_prompts(options.prompts), parse_part(options.part)
    for name, tables in (("lengths", ("long",)), ("profiles", ("reuse", "rivals"))):
        if getattr(options, name) is not None and options.table not in tables:
            raise UserError(
                f"--{name} is of --table {' and '.join(tables)}, not {options.table}: leave it out"
            )
    comparison = chosen_comparison(options)
    names = [method.name for method in comparison.methods]
    unknown = set(options.methods or ()) - set(names)
    if unknown:
        raise UserError(
            f"--methods: {min(unknown)!r} is no row of the table: use some of {', '.join(names)}"
        )
    methods = comparison.chosen(options.methods or names)
    source = Source(
        load_model(options.architecture), options.model, tuple(options.settings), options.out
    )
    render_missing(
        comparison,
        methods,
        {i: prompt for i, prompt in prompts.items() if i % num_parts == part - 1},
        source=source,
        log=options.out / f"rows-{part}.jsonl",
        probe_of=LongProbe if options.table == "long" else None,
    )
    chosen = {(method.name, index) for method in methods for index in prompts}
    rows = [row for row in read_rows(options.out) if (row["method"], row["index"]) in chosen]
    if len(rows) < len(chosen):
        print(f"{len(rows)} of {len(chosen)} clips are there: other parts are still at work")
        return
    if options.table == "long":
        table = summarize_long(rows, methods)
        write_table(options, table, text=long_markdown(table) + EXPLAINED)
        return
    table = summarize(rows, methods)
    if options.table == "quantized":
        kv_bytes = {m.name: prepare_method(m, source).work.kv_bytes for m in methods}
        write_table(options, table, text=quantized_markdown(table, kv_bytes), kv_bytes=kv_bytes)
    elif options.table == "rivals":
        write_rivals(options, rival_table(rows, methods))
    elif options.table == "reuse":
        lines = claims(table)
        text = "\n".join([reuse_markdown(table), *(f"- {line}" for line in lines)])
        write_table(options, table, text=text, claims=lines)
    else:
        write_table(options, table, text=markdown(table, base_label=comparison.base_label))


def chosen_comparison(options: argparse.Namespace) -> Comparison:
    """Return the model's comparison with the rows of the table that is asked for."""
    comparison = comparison_of(options.architecture)
    if options.table == "methods":
        return comparison
    if options.table == "quantized":
        return replace(comparison, methods=quantized_methods(comparison), base_label="16 bits")
    if options.table == "long":
        key = load_model(options.architecture).keys["num_frames"]
        methods = long_methods(comparison, options.lengths or LENGTHS, key=key)
        return replace(comparison, methods=methods)
    model, is_rivals = options.architecture, options.table == "rivals"
    levels = RIVAL_LEVELS if is_rivals else tuple(LEVELS)
    budgets = read_budgets(options.profiles, model=model, checkpoint=options.model, levels=levels)
    if not is_rivals:
        return replace(comparison, methods=reuse_methods(comparison, budgets, options.profiles))
    rules = rival_rules(comparison, load_model(model).presets)
    methods = rival_methods(comparison, budgets, options.profiles, rules=rules)
    return replace(comparison, methods=methods)


def write_rivals(options: argparse.Namespace, table: Sequence[dict[str, Any]]) -> None:
    """Write the table of rivals and its drawing."""
    lines = rival_claims(table)
    published = PUBLISHED.get(options.architecture, ())
    said = "".join(f"- {line}\n" for line in lines)
    text = f"{rival_markdown(table, published)}\n{said}"
    write_table(options, table, text=text, claims=lines)
    name = f"{options.architecture} {options.model}"
    figure = draw_rivals(figure_rows(table), frontier(table), model=name)
    write_text(options.out / "rivals.svg", figure)
    print(f"wrote {options.out / 'rivals.svg'}")


def write_table(
    options: argparse.Namespace, table: Sequence[Mapping[str, Any]], *, text: str, **more: Any
) -> None:
    """Write the table as JSON, CSV and Markdown, and print it with what follows from it."""
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(torch.device("cpu")),
        "table": table,
        **more,
    }
    write_json(options.out / "table.json", report)
    write_text(options.out / "table.csv", csv_text(table))
    write_text(options.out / "table.md", text.rstrip("\n") + "\n")
    print(text)


def main() -> int:
    """Run the command line."""
    options = parse_options()

    def command() -> None:
        with made_folder(options.out):
            compare(options)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
