"""Measure speed and memory at the released sizes on one GPU, all methods in one run.

Weights don't change speed, so they are random and made on the device; nothing is downloaded. Which
steps are computed comes from the published curve of distances, with the threshold at which
FlowCache's rule computes the published share of the FLOPs, or from a record (--trace). Results go
to assets/bench/gpu_NAME.json and .md after each method; a second start goes on with the methods
that are missing.

Another measurement needs no GPU and uses the demos: --growth plans (for the released sizes) and
measures time and memory against the length of the video.
"""

import argparse
import gc
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flowcache.errors import UserError, first_line
from flowcache.gpu import demos
from flowcache.gpu.benchmark import (
    Benchmark,
    Method,
    Models,
    Size,
    load_benchmark,
    load_benchmarks,
    random_weights,
)
from flowcache.gpu.measure import Trial, matrix_rate, measure
from flowcache.gpu.report import csv_text, judged, markdown
from flowcache.runtime import files
from flowcache.runtime.cli import Parser, choose_device, run_command
from flowcache.runtime.files import check_writable, write_json, write_text
from flowcache.runtime.model import Job, models_with
from flowcache.runtime.record import Record, read_record
from flowcache.runtime.stats import environment

TABLES = Path(__file__).resolve().parents[3] / "assets" / "bench"
WHOLE_SECONDS = 240
"""A method that will take longer is measured with fewer steps and scaled up."""
DECODED_APART = "overlap=false"
"""Setting of shortened runs, see `Trial`."""
ASSUMED_SHARE = 0.4
"""Of the matrix product's rate, to guess how long a method will take."""
ANEW = "measure anew with --overwrite"
SAME = ("device", "torch", "commit", "size", "is_quick", "settings", "without")
"""What all rows of one file have in common."""
EXAMPLES = """examples:
  python scripts/bench_gpu.py
  python scripts/bench_gpu.py --quick --name try
  python scripts/bench_gpu.py --architecture magi1 --methods vanilla "FlowCache-fast"
  python scripts/bench_gpu.py --device cpu --size tiny --out result/bench
  python scripts/bench_gpu.py --growth
"""


@dataclass(frozen=True)
class Choice:
    """What is measured, and how."""

    size: Size
    is_quick: bool
    is_whole: bool
    settings: tuple[str, ...]
    trace: Record | None
    trace_name: str | None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="python scripts/bench_gpu.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models = sorted(models_with("gpu"))
    parser.add_argument("--architecture", choices=models, help="one model (default: both)")
    # as it was named before
    parser.add_argument("--model", dest="architecture", choices=models, help=argparse.SUPPRESS)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows of the table (all)")
    parser.add_argument(
        "--quick", action="store_true", help="few steps per method, scaled up: a look, no result"
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help=f"all steps of every method, also where that takes over {WHOLE_SECONDS} s",
    )
    parser.add_argument(
        "--trace", type=Path, help="a NAME.record.json whose decisions FlowCache follows; one model"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (default: cuda)")
    parser.add_argument(
        "--size", choices=("paper", "tiny"), default="paper", help="tiny: tries the code in seconds"
    )
    parser.add_argument("--name", help="of the files, gpu_NAME (default: that of the device)")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder (default: assets/bench)")
    parser.add_argument(
        "--overwrite", action="store_true", help="measure anew what the file holds already"
    )
    parser.add_argument(
        "--growth", action="store_true", help="cost against length instead; needs no GPU"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all methods")
    return parser.parse_intermixed_args(arguments)


# What is asked for --------------------------------------------------------------------------------


def find_device(name: str, size: Size) -> torch.device:
    """Return the device to measure."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "PyTorch sees no CUDA device here: run this on a machine with a GPU, or try the code "
            "with --device cpu --size tiny"
        )
    device = choose_device(name)
    if device.type == "cpu" and size == "paper":
        raise UserError("--device cpu would take days at the paper's sizes: give --size tiny")
    return device


def asked_models(options: argparse.Namespace) -> dict[str, Benchmark]:
    """Return the models that are measured."""
    names = [options.architecture] if options.architecture else models_with("gpu")
    return {name: load_benchmark(name) for name in names}


def chosen(
    options: argparse.Namespace, benchmarks: Mapping[str, Benchmark]
) -> dict[str, list[Method]]:
    """Return the methods of each model; the one that all are compared with is always among them."""
    wanted = set[str](options.methods or ())
    known = {method.name for benchmark in benchmarks.values() for method in benchmark.methods}
    if wanted - known:
        raise UserError(
            f"--methods: {min(wanted - known)!r} is no row of the table: use some of "
            f"{', '.join(sorted(known))}"
        )
    return {
        model: [
            method
            for place, method in enumerate(benchmark.methods)
            if not wanted or place == 0 or method.name in wanted
        ]
        for model, benchmark in benchmarks.items()
    }


def read_choice(options: argparse.Namespace) -> Choice:
    """Return how the methods are measured."""
    if options.quick and options.whole:
        raise UserError("--quick and --whole contradict each other: give one of them")
    trace = None
    if options.trace is not None:
        if options.architecture is None or options.quick:
            raise UserError(
                "--trace is of one model and all its steps: give --architecture, no --quick"
            )
        trace = read_record(options.trace)
    return Choice(
        options.size,
        options.quick,
        options.whole or options.trace is not None,
        tuple(options.settings),
        trace,
        None if options.trace is None else options.trace.name,
    )


def make_trial(
    benchmark: Benchmark, method: Method, choice: Choice, device: torch.device, *, rate: float
) -> Trial:
    """Decide how much of a method is run.

    Args:
        rate: FLOP/s of a matrix product.
    """

    def plan(factor: int, *settings: str) -> Job:
        changes = (*choice.settings, *settings)
        return benchmark.plan_method(method, choice.size, factor, changes, device=device)

    whole = plan(1)
    factors, factor = benchmark.thin[choice.size], 1
    share = benchmark.shares[method.speed] if method.speed else 1.0
    is_long = whole.work.flops * share / (ASSUMED_SHARE * rate) > WHOLE_SECONDS
    if factors and choice.is_quick:
        factor = factors[-1]
    elif factors and is_long and not choice.is_whole:
        factor = factors[0]
    short, glance = (
        whole if each == 1 else plan(each, DECODED_APART)
        for each in (factor, factors[-1] if factors else 1)
    )
    return Trial(short, whole, glance, factor, method.speed, choice.trace)


# Measuring ----------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """Return versions, device, driver and commit."""
    facts = environment(device) | {"driver": None, "memory": "memory shared with the system"}
    if device.type == "cuda":
        facts["memory"] = f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB"
        facts["driver"] = _driver()
    return facts


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.splitlines()[0].strip()


def row_of(
    benchmark: Benchmark, models: Models, method: Method, trial: Trial, *, is_profiled: bool = True
) -> dict[str, Any]:
    """Measure a method; one that does not fit into memory, or that PyTorch can't run, says so."""
    facts = {"preset": method.preset, "settings": list(method.settings)}
    try:
        return measure(benchmark, models, trial, is_profiled=is_profiled) | facts
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        return {"error": f"out of memory: {reason}", **facts}
    except RuntimeError as error:  # all errors of kernels are one
        return {"error": first_line(error), **facts}


def measure_model(
    model: str,
    methods: Sequence[Method],
    choice: Choice,
    device: torch.device,
    document: dict[str, Any],
    path: Path,
) -> None:
    """Measure the methods of a model that the file lacks; write it after each."""
    benchmark, rows = load_benchmark(model), document["models"].setdefault(model, {})
    missing = [m for m in methods if m.name not in rows or "error" in rows[m.name]]
    if not missing:
        return
    if not benchmark.has_vae:
        package = benchmark.vae_package
        print(f"{model}: the VAE is left out of all rows: {package} is not installed")
    rate = matrix_rate(device)
    trials = {m.name: make_trial(benchmark, m, choice, device, rate=rate) for m in missing}
    fill = random_weights(device)
    models = benchmark.build(trials[missing[0].name].job, choice.size, fill)
    for method in tqdm(missing, desc=model, unit="method", disable=not sys.stderr.isatty()):
        row = row_of(benchmark, models, method, trials[method.name])
        if choice.trace_name is not None and method.speed is not None:
            row["trace"] = choice.trace_name
        rows[method.name] = row
        document["targets"][model] = judged(benchmark, rows)
        write_json(path, document)
        write_text(path.with_suffix(".csv"), csv_text(document))
        write_text(path.with_suffix(".md"), markdown(document))
        gc.collect()


def open_document(path: Path, fresh: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
    """Return what is in the file already, to go on with, or a document without rows."""
    if overwrite or not path.exists():
        return fresh
    old = files.read_json(path, advice=ANEW)
    if not isinstance(old, dict):
        raise UserError(f"{path}: no JSON object: {ANEW}")
    wrong = [key for key in SAME if old.get("same", {}).get(key) != fresh["same"][key]]
    if wrong:
        raise UserError(
            f"{path} was measured with another {wrong[0]} and is kept: give another --name, or "
            "--overwrite"
        )
    return old


def bench(options: argparse.Namespace) -> None:
    """Measure, write the files, print the table and the targets."""
    benchmarks = asked_models(options)
    methods = chosen(options, benchmarks)
    choice = read_choice(options)
    device = find_device(options.device, options.size)
    facts = machine(device)
    name = options.name or re.sub(r"\W+", "-", f"{facts['device']}").strip("-").lower()
    path = options.out / f"gpu_{name}.json"
    is_cuda = device.type == "cuda"
    note = "" if is_cuda else "Figures of a CPU and a tiny model: they only show that it works."
    fresh: dict[str, Any] = {
        "name": name,
        "note": note + (" A quick look: few steps, scaled up." if choice.is_quick else ""),
        "command": " ".join(["python", *sys.argv]),
        "environment": facts,
        "same": {
            "device": facts["device"],
            "torch": facts["packages"]["torch"],
            "commit": facts["commit"],
            "size": choice.size,
            "is_quick": choice.is_quick,
            "settings": list(choice.settings),
            "without": [name for name in methods if not benchmarks[name].has_vae],
        },
        "is_judged": is_cuda and choice.size == "paper",
        "models": {},
        "targets": {},
    }
    check_writable(options.out)
    document = open_document(path, fresh, overwrite=options.overwrite)
    for model, own in methods.items():
        measure_model(model, own, choice, device, document, path)
        gc.collect()
    print(markdown(document))
    print(f"wrote {path} and {path.with_suffix('.md').name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = parse(arguments)

    def command() -> None:
        if options.growth:
            benchmarks = load_benchmarks()
            demos.measure_growth(options.out, overwrite=options.overwrite, benchmarks=benchmarks)
        else:
            bench(options)

    return run_command(command)
