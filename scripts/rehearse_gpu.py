#!/usr/bin/env python
"""Count what the CUDA paths do at the released sizes, without a GPU: a table of each model.

Tensors are fake: they have a device, a shape and a dtype, no values (see gpu/fake_cuda.py). Nothing
is timed. A method runs with a fraction of the steps, as the benchmark's shortened rows do, with two
layers and with three; layers are alike, so that the difference gives the counts of all.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flowcache.errors import UserError
from flowcache.gpu.benchmark import load_benchmark
from flowcache.gpu.rehearsal import Case, Rehearsed, rehearse
from flowcache.runtime.cli import Parser, run_command
from flowcache.runtime.model import models_with

EXAMPLES = """examples:
  python scripts/rehearse_gpu.py
  python scripts/rehearse_gpu.py --architecture magi1 --methods vanilla
"""
HEAD = (
    "| method | ticks | host reads per tick, at most | launches per tick | moved, TB | PFLOPs "
    "| of KV compression | our count | peak, GB | planned, GB |"
)


@dataclass(frozen=True)
class Row:
    """What one method does in all layers and ticks; decoding counts in memory alone."""

    num_ticks: int
    reads: int
    """Times that the host waits for a value in a tick, at most."""
    launches: float
    """Operations of the transformer that start kernels, uncompiled."""
    moved_bytes: float
    """That they read and write."""
    flops: float
    """Of their products, counted by PyTorch's formulas."""
    compression_flops: float
    """Of these, of KV compression."""
    own_flops: float
    """What the run's own statistics say; compression is no part of them."""
    peak_bytes: float
    planned_bytes: float


def row_of(case: Case) -> Row:
    """Rehearse a case with two layers and with three, and return the counts of all layers.

    Not with one: what goes into it is held while the second one's input is made.
    """
    num_layers = case.benchmark.num_layers(case.job)
    few, more = (rehearse(case.with_layers(number)) for number in (2, 3))

    def all_layers(figure: Callable[[Rehearsed], float]) -> float:
        return figure(few) + (num_layers - 2) * (figure(more) - figure(few))

    return Row(
        num_ticks=len(few.steps),
        reads=max(step.reads for step in few.steps),
        launches=all_layers(lambda run: run.dit.launches),
        moved_bytes=all_layers(lambda run: run.dit.num_bytes),
        flops=all_layers(lambda run: run.dit.flops),
        compression_flops=all_layers(lambda run: run.ledger.costs["kv_compression"].flops),
        own_flops=all_layers(lambda run: run.stats.computed_flops),
        peak_bytes=all_layers(lambda run: run.ledger.peak_bytes),
        planned_bytes=all_layers(lambda run: run.planned_bytes),
    )


def line(name: str, row: Row) -> str:
    """Return a row of the table."""
    cells = (
        f"{row.num_ticks}",
        f"{row.reads}",
        f"{row.launches / row.num_ticks:,.0f}",
        f"{row.moved_bytes / 1e12:.1f}",
        f"{row.flops / 1e15:.2f}",
        f"{row.compression_flops / 1e15:.2f}",
        f"{row.own_flops / 1e15:.2f}",
        f"{row.peak_bytes / 1e9:.1f}",
        f"{row.planned_bytes / 1e9:.1f}",
    )
    return f"| {name} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(
        prog="python scripts/rehearse_gpu.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--architecture", choices=models_with("gpu"), help="one model (default: both)"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows (default: all)")
    options = parser.parse_args(arguments)

    def command() -> None:
        models = [options.architecture] if options.architecture else models_with("gpu")
        known = {method.name for model in models for method in load_benchmark(model).methods}
        wanted = known if options.methods is None else set(options.methods)
        if unknown := wanted - known:
            raise UserError(
                f"--methods {sorted(unknown)[0]!r} is unknown: use {', '.join(sorted(known))}"
            )
        for model in models:
            benchmark = load_benchmark(model)
            thin = benchmark.thin["paper"][-1]
            print(f"\n{benchmark.title}; 1 of {thin} steps\n")
            print(f"{HEAD}\n|---|{'---:|' * 9}", flush=True)
            for method in benchmark.methods:
                if method.name in wanted:
                    print(line(method.name, row_of(Case(model, method, thin))), flush=True)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
