"""What videos cost against their length; needs no GPU.

It is planned for the released sizes and measured on the demos. Every step is computed, so that only
the length and the KV cache make a difference.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flowcache.gpu.benchmark import Benchmark, Line, NoVAE
from flowcache.runtime.files import check_free, check_writable, write_json
from flowcache.runtime.model import Request
from flowcache.runtime.run import encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats, environment

GROWTH = "growth.json"
PROMPT = "a red circle moving right on a black background"
GROWTH_NOTE = (
    "planned: by arithmetic, at the released sizes; measured: the transformer of the demo, seconds "
    "of processor time. Every step is computed; the demos take 10 (SkyReels-V2) and 16 (MAGI-1) "
    "steps."
)
TIME = "seconds_per_chunk"
Make = Callable[[Line, int], dict[str, Any]]
"""Makes a video of so many frames and returns what that takes."""


def open_demo(benchmark: Benchmark) -> Make:
    """Load the demo and return what makes a video with it."""
    model, growth = benchmark.model, benchmark.growth

    def request(line: Line, num_frames: int) -> Request:
        return Request(line.preset, "demo", (*line.settings(num_frames), f"prompt={PROMPT}"))

    first = prepare(model, request(growth.lines[0], growth.measured[0]))
    dit = load_networks(first, stats=RunStats(first.device)).dit
    inputs = encode_inputs(first, stats=RunStats(first.device))

    def make(line: Line, num_frames: int) -> dict[str, Any]:
        job, stats = prepare(model, request(line, num_frames)), RunStats(first.device)
        shown = model.generate(dit, NoVAE(), job.config, inputs, stats=stats, work=job.work)
        row = make_video(num_frames, job.work.num_chunks, shown, stats)
        return row | {"kv_bytes": job.work.kv_bytes}

    return make


def make_video(
    num_frames: int, num_chunks: int, shown: Iterable[object], stats: RunStats
) -> dict[str, Any]:
    """Make a video and return what it took of the processor's time, whoever else wants it."""
    start = time.process_time()
    for _ in shown:
        pass
    return {
        "frames": num_frames,
        "chunks": num_chunks,
        TIME: (time.process_time() - start) / num_chunks,
        "flops": stats.computed_flops,
    }


def measure_growth(
    out: Path, *, overwrite: bool, benchmarks: Mapping[str, Benchmark]
) -> dict[str, Any]:
    """Measure all models, write the result, return it by model."""
    path = out / GROWTH
    check_writable(out)
    check_free(path, overwrite=overwrite, advice="give another --out, or --overwrite")
    found = {model: grow(benchmark) for model, benchmark in benchmarks.items()}
    document = {
        "note": GROWTH_NOTE,
        "command": "python scripts/bench_gpu.py --growth",
        "environment": environment(torch.device("cpu")),
        "models": found,
    }
    write_json(path, document)
    print(f"wrote {path}")
    return found


def grow(benchmark: Benchmark) -> dict[str, Any]:
    """Plan and measure a model at all lengths."""
    growth, make = benchmark.growth, open_demo(benchmark)
    lines = [line.plus(growth.fewer_steps) for line in growth.lines if line.is_measured]
    # one short video first: what is allocated once must not be on the account of the first length
    make(lines[0], growth.measured[0])
    measured: dict[str, list[dict[str, Any]]] = {line.name: [] for line in lines}
    # all lines at one length before the next, so that a drifting machine slows them alike
    for num_frames in tqdm(growth.measured, desc=growth.title, disable=not sys.stderr.isatty()):
        for line in lines:
            measured[line.name].append(make(line, num_frames))
    return {
        "title": growth.title,
        "planned": {
            line.name: [plan_video(benchmark, line, frames) for frames in growth.planned]
            for line in growth.lines
        },
        "measured": measured,
    }


def plan_video(benchmark: Benchmark, line: Line, num_frames: int) -> dict[str, Any]:
    """Plan a video at the released size."""
    settings = (*benchmark.settings["paper"], *line.settings(num_frames))
    work = benchmark.plan(line.preset, "paper", settings).work
    return {
        "frames": num_frames,
        "chunks": work.num_chunks,
        "flops_per_chunk": work.flops / work.num_chunks,
        "kv_bytes": work.kv_bytes,
    }
