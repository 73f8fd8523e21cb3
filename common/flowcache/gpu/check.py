"""Say whether this machine's CUDA paths are right, and how fast they are.

First each path (attention kernels, 8 bits, demos in both precisions, compiled blocks, keys on the
host, decoding in a thread of its own, ...) is compared with the CPU in float32. Then both models
are measured at the released sizes with random weights: two FlowCache rows and a vanilla one each,
few steps, scaled up. Every row is printed and written when it is done; what no longer fits into
the time is named. The exit code is 0 if every path that this machine has is right.

Without a CUDA device the same command rehearses: tiny models, on the CPU.
"""

import argparse
import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from flowcache.errors import first_line
from flowcache.gpu import bench, paths
from flowcache.gpu.benchmark import (
    Benchmark,
    Method,
    Models,
    Size,
    compilation_of,
    load_benchmarks,
    random_weights,
)
from flowcache.gpu.measure import Trial, matrix_rate, shares_of_kinds
from flowcache.gpu.report import markdown
from flowcache.runtime.cli import EXIT_INTERRUPTED, Parser, choose_device, run_command
from flowcache.runtime.files import check_writable, fresh_path, write_json, write_text
from flowcache.runtime.run import choose_attention

MINUTES = 8.0
GRACE_SECONDS = 60
"""After the end of the time a row that is still running is given up, with the process."""
ROW_SECONDS = 20
"""What a row of the second part takes apart from its passes: probe, warm-up, decoding."""
REHEARSAL = "REHEARSAL ON A CPU: it shows that the command works, and nothing about a GPU."
EXAMPLES = """examples:
  bash scripts/gpu_check.sh
  bash scripts/gpu_check.sh --out result/check --minutes 5
  bash scripts/gpu_check.sh --only paths
"""


@dataclass
class Report:
    """What was found so far, in a file after every row."""

    path: Path
    document: dict[str, Any]
    start: float = field(default_factory=time.monotonic)
    now: str = "start"
    """What is being done."""

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.document["budget_seconds"] - (time.monotonic() - self.start)

    def write(self) -> None:
        """Write both files; a reader never sees half of one."""
        self.document["seconds"] = time.monotonic() - self.start
        write_json(self.path, self.document)
        write_text(self.path.with_suffix(".md"), page(self.document))

    def end(self, state: str) -> None:
        """Write why it ended."""
        self.document["state"] = state
        self.write()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="bash scripts/gpu_check.sh",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("result/gpu_check"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        default=MINUTES,
        help="for all rows (default: %(default)g)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--only", choices=("paths", "speed"), help="one of the two parts")
    return parser.parse_args(arguments)


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1440, not {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 right, 1 something is wrong or was left out."""
    options = parse(arguments)
    codes: list[int] = []
    failed = run_command(lambda: codes.append(check(options)))
    return failed or codes[0]


def check(options: argparse.Namespace) -> int:
    """Run both parts; return the exit code."""
    device = choose_device(options.device)
    is_rehearsal = device.type != "cuda"
    if is_rehearsal:
        torch.set_num_threads(1)  # tiny models spend their time on handing work between threads
    check_writable(options.out)
    facts = bench.machine(device)
    report = Report(
        fresh_path(options.out, "gpu_check", ".json"),
        {
            "state": "running, or ended without a word",
            "is_rehearsal": is_rehearsal,
            "budget_seconds": 60 * options.minutes,
            "environment": facts,
            "paths": [],
            "before": {},
            "speed": {"models": {}, "skipped": {}},
        },
    )
    print(REHEARSAL if is_rehearsal else f"{facts['device']}, torch {torch.__version__}")
    print(f"{60 * options.minutes:.0f} s at most; rows are written to {report.path}", flush=True)
    signal.signal(signal.SIGTERM, _interrupt)
    ended = threading.Event()
    threading.Thread(target=_give_up_in_time, args=(report, ended), daemon=True).start()
    try:
        report.write()
        if options.only != "speed":
            check_paths(report, device)
        if options.only != "paths":
            measure_speed(report, device)
        report.end("complete")
    except KeyboardInterrupt:
        report.end(f"interrupted during: {report.now}")
        print(f"interrupted during: {report.now}; what was found is in {report.path}")
        return EXIT_INTERRUPTED
    finally:
        ended.set()
    print(conclusion(report.document))
    print(f"wrote {report.path} and {report.path.with_suffix('.md').name}")
    return 0 if is_right(report.document) else 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _give_up_in_time(report: Report, ended: threading.Event) -> None:
    """End the process if a row hangs on the device, where no signal reaches it."""
    if not ended.wait(max(report.left(), 0) + GRACE_SECONDS):
        report.end(f"out of time during: {report.now}")
        sys.stderr.write(f"error: out of time during: {report.now}\n")
        os._exit(1)


# Right or wrong -----------------------------------------------------------------------------------


def check_paths(report: Report, device: torch.device) -> None:
    """Compare every path with the CPU; one that fails is named, and the others go on."""
    for each in paths.all_checks(device):
        report.now, start = each.name, time.monotonic()
        row = {"path": each.name, **_outcome(each, has_time=report.left() > 0)}
        row["seconds"] = time.monotonic() - start
        report.document["paths"].append(row)
        report.write()
        print(path_line(row), flush=True)


def _outcome(check: paths.Check, *, has_time: bool) -> dict[str, Any]:
    if not has_time:
        return {"state": "skipped", "note": "no time left"}
    try:
        found = check.run()
    except paths.AbsentError as error:
        return {"state": "absent", "note": str(error)}
    # whatever a device or a library raises is this row's result
    except Exception as error:  # noqa: BLE001
        return {"state": "error", "note": first_line(error)}
    return {
        "state": "right" if found.is_right else "wrong",
        "error": found.error if math.isfinite(found.error) else str(found.error),
        "tolerance": found.tolerance,
        "note": found.note,
    }


def path_line(row: dict[str, Any]) -> str:
    """Say what was found of a path."""
    figures = ""
    if "error" in row:
        figures = f"error {float(row['error']):.1e}, at most {row['tolerance']:.1e}"
    state = row["state"].upper() if row["state"] in ("wrong", "error") else row["state"]
    text = f"{state:7} {row['path']:44} {figures:32} {row['seconds']:5.1f} s"
    return text + (f"  ({row['note']})" if row["note"] else "")


def is_right(document: dict[str, Any]) -> bool:
    """Tell whether every path that this machine has was checked and is right."""
    return all(row["state"] in ("right", "absent") for row in document["paths"])


# Speed --------------------------------------------------------------------------------------------


def measure_speed(report: Report, device: torch.device) -> None:
    """Measure the rows of both models; what goes wrong, or no longer fits, is named."""
    size: Size = "paper" if device.type == "cuda" else "tiny"
    choice = bench.Choice(
        size,
        is_quick=True,
        is_whole=False,
        settings=(bench.DECODED_APART,),
        trace=None,
        trace_name=None,
    )
    report.now = "matrix product"
    rate = matrix_rate(device)
    report.document["before"]["matrix_rate"] = rate
    report.write()
    print(f"matrix product: {rate / 1e12:.3g} TFLOP/s", flush=True)
    for name, benchmark in load_benchmarks().items():
        report.now = f"{name}: weights"
        methods = {method.name: method for method in benchmark.methods}
        try:
            trials = {
                row: bench.make_trial(benchmark, methods[row], choice, device, rate=rate)
                for row in benchmark.checked
            }
            _measure_model(report, benchmark, size, methods, trials, rate=rate)
        # whatever a device or a library raises ends this model, not the other
        except Exception as error:  # noqa: BLE001
            report.document["speed"]["skipped"][name] = first_line(error)
            report.write()
            print(f"ERROR   {report.now}: {first_line(error)}", flush=True)
        gc.collect()


def _measure_model(
    report: Report,
    benchmark: Benchmark,
    size: Size,
    methods: Mapping[str, Method],
    trials: Mapping[str, Trial],
    *,
    rate: float,
) -> None:
    name, first = benchmark.model.name, next(iter(trials.values()))
    if not benchmark.has_vae:
        package = benchmark.vae_package
        print(f"{name}: the VAE is left out: {package} is not installed", flush=True)
    models = benchmark.build(first.job, size, random_weights(first.job.device))
    _look_first(report, benchmark, models, first)
    speed, share = report.document["speed"], bench.ASSUMED_SHARE
    rows = speed["models"].setdefault(name, {})
    for each, trial in trials.items():
        report.now = f"{name}: {each}"
        part = benchmark.shares[trial.speed] if trial.speed else 1.0
        expected = trial.job.work.flops * part / (share * rate)
        expected += ROW_SECONDS * (size == "paper")
        if expected > report.left():
            reason = f"no time left: it takes about {expected:.0f} s of {report.left():.0f}"
            speed["skipped"][f"{name}: {each}"] = reason
            print(f"skipped {name}: {each} ({reason})", flush=True)
        else:
            row = bench.row_of(benchmark, models, methods[each], trial, is_profiled=False)
            rows[each] = row
            share = row.get("rate_share", share)
            print(speed_line(name, each, row), flush=True)
        report.write()
        gc.collect()


def _look_first(report: Report, benchmark: Benchmark, models: Models, trial: Trial) -> None:
    """Write what is known before any row: the probes of attention, the kinds of kernels."""
    name = benchmark.model.name
    report.now = f"{name}: probe and profile"
    kernels = own, cross = choose_attention(models.dit, trial.job)
    found: dict[str, Any] = {
        "attention": [{"kernel": kernel.name, "probe": dict(kernel.probed)} for kernel in kernels]
    }
    report.document["before"][name] = found
    report.write()
    start = time.monotonic()
    with torch.no_grad():
        found["kinds"] = shares_of_kinds(benchmark, models, trial.glance)
    compilation = compilation_of(models)
    found["seconds"] = time.monotonic() - start
    found["compilation"] = None if compilation is None else compilation.to_dict()
    report.write()
    failure = "" if compilation is None else compilation.failure or ""
    print(
        f"{name}: {own.name}; to the prompt {cross.name}; compiled: "
        f"{compilation is not None and not failure} {failure}; {found['seconds']:.0f} s",
        flush=True,
    )


def speed_line(model: str, method: str, row: dict[str, Any]) -> str:
    """Say what was measured in a row."""
    head = f"{model}: {method}"
    if "error" in row:
        return f"ERROR   {head}: {row['error']}"
    return (
        f"        {head:52} {row['total_seconds']:8.3g} s  {row['rate'] / 1e12:6.3g} TFLOP/s  "
        f"{100 * row['rate_share']:3.0f} % of a matrix product  "
        f"{row['peak_bytes'] / 1e9:.1f} GB"
    )


# Files --------------------------------------------------------------------------------------------


def conclusion(document: dict[str, Any]) -> str:
    """Count the paths by what was found."""
    counts = {
        state: sum(row["state"] == state for row in document["paths"])
        for state in ("right", "wrong", "error", "skipped", "absent")
    }
    return "paths: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def page(document: dict[str, Any]) -> str:
    """Return everything as Markdown."""
    facts = document["environment"]
    lines = [
        "# GPU check",
        "",
        *([REHEARSAL, ""] if document["is_rehearsal"] else []),
        f"{facts['device']} ({facts['memory']}), driver {facts['driver']}, torch "
        f"{facts['packages']['torch']}, CUDA {facts['cuda']}, commit {facts['commit']}. "
        f"State: {document['state']}, after {document['seconds']:.0f} s of "
        f"{document['budget_seconds']:.0f}.",
        "",
        "## Paths against the CPU in float32",
        "",
        "| path | found | error | at most | s | note |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in document["paths"]:
        error = f"{float(row['error']):.1e}" if "error" in row else "-"
        most = f"{row['tolerance']:.1e}" if "error" in row else "-"
        note = row["note"].replace("|", "\\|")
        cells = (row["path"], row["state"], error, most, f"{row['seconds']:.1f}", note)
        lines.append(f"| {' | '.join(cells)} |")
    before = document["before"]
    if "matrix_rate" in before:
        lines += ["", f"Matrix product: {before['matrix_rate'] / 1e12:.3g} TFLOP/s."]
    for name in [name for name in before if name != "matrix_rate"]:
        for kind, found in zip(("itself", "the prompt"), before[name]["attention"], strict=True):
            probed = ", ".join(f"{k} {1000 * s:.3g} ms" for k, s in found["probe"].items())
            tried = probed or "no probe"
            lines.append(f"- {name}, attention to {kind}: {found['kernel']} ({tried})")
    skipped = document["speed"]["skipped"]
    lines += [f"- not measured: {what}: {why}" for what, why in skipped.items()]
    if document["speed"]["models"]:
        lines += ["", *_speed_table(document)]
    return "\n".join(lines) + "\n"


def _speed_table(document: dict[str, Any]) -> list[str]:
    """Return the tables and judged targets of the benchmark, as it writes them."""
    shown = {
        "name": "Speed",
        "note": "Few steps, scaled up; decoded apart.",
        "command": "bash scripts/gpu_check.sh",
        "environment": document["environment"],
        "is_judged": not document["is_rehearsal"],
        "models": document["speed"]["models"],
    }
    text = markdown(shown)
    return text[text.index("\n## ") + 1 :].splitlines()


if __name__ == "__main__":
    sys.exit(main())
