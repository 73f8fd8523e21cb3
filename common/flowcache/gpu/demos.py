"""What the demos cost: against the length of a video, and in time against FLOPs; needs no GPU.

Growth is planned for the released sizes and measured on the demos. Every step is computed, so that
only the length and the KV cache make a difference.

Overhead is what everything around the matrix products costs. A demo's chunk has 80 or 96 tokens, a
real one 10,200 or 12,150, and an operation has a fixed cost. So the comparison is made at the
demo's own size and at a larger picture, where products dominate.
"""

import cProfile
import pstats
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flowcache.errors import UserError
from flowcache.gpu.benchmark import Benchmark, Line, NoVAE, Picture
from flowcache.runtime.files import check_writable, write_json
from flowcache.runtime.model import Request
from flowcache.runtime.run import encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats, environment
from flowcache.runtime.text_files import escaped

GROWTH, OVERHEAD = "growth.json", "overhead.json"
PROMPT = "a red circle moving right on a black background"
GROWTH_NOTE = (
    "planned: by arithmetic, at the released sizes; measured: the transformer of the demo, seconds "
    "of processor time. Every step is computed; the demos take 10 (SkyReels-V2) and 16 (MAGI-1) "
    "steps."
)
OVERHEAD_NOTE = "least seconds of processor time of the demos' transformer, without VAE and text"
PARTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "transformer blocks": (("dit.py", "run_blocks"),),
    "embedding and head": (("dit.py", "embed"), ("dit.py", "velocity")),
    "decisions": (("policies.py", "plan"),),
    "stored results": (("predict.py", "put"), ("predict.py", "predict")),
    "solver": (("unipc.py", "advance_"), ("unipc.py", "skip")),
}
"""Functions of which each part's time is, inner calls included; none calls another."""
WHOLE = (("demos.py", "make_video"),)
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


def measure_demos(
    out: Path,
    name: str,
    one: Callable[[Benchmark], dict[str, Any]],
    *,
    overwrite: bool,
    benchmarks: Mapping[str, Benchmark],
) -> dict[str, Any]:
    """Measure all models in one way, write the result, return it by model."""
    path = out / name
    check_writable(out)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists and is kept: give another --out, or --overwrite")
    found = {model: one(benchmark) for model, benchmark in benchmarks.items()}
    document = {
        "note": GROWTH_NOTE if name == GROWTH else OVERHEAD_NOTE,
        "command": f"python scripts/bench_gpu.py --{path.stem}",
        "environment": environment(torch.device("cpu")),
        "models": found,
    }
    write_json(path, document)
    if name == OVERHEAD:
        print(table(found))
    print(f"wrote {path}")
    return found


# Growth -------------------------------------------------------------------------------------------


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


# Overhead -----------------------------------------------------------------------------------------


def weigh(benchmark: Benchmark) -> dict[str, Any]:
    """Measure a demo at all picture sizes."""
    make = open_demo(benchmark)
    lines, pictures = benchmark.overhead
    return {picture.name: _compare(lines, picture, make) for picture in pictures}


def _compare(given: Sequence[Line], picture: Picture, make: Make) -> dict[str, Any]:
    lines = [line.plus(picture.settings) for line in given]
    num_frames = picture.num_frames
    make(lines[-1], num_frames)
    rounds = [{line.name: make(line, num_frames) for line in lines} for _ in range(picture.rounds)]
    rows = {
        line.name: min((rows[line.name] for rows in rounds), key=lambda row: row[TIME])
        for line in lines
    }
    first = rows[lines[0].name]
    for row in rows.values():
        row["fewer_flops"] = first["flops"] / row["flops"]
        row["speedup"] = first[TIME] / row[TIME]
    fast = next(line for line in lines if line.name == "FlowCache-fast")
    # profiling makes Python look dearer
    profiler = cProfile.Profile()
    profiler.runcall(make, fast, num_frames)
    return {"rows": rows, "profile_of_flowcache_fast": shares(pstats.Stats(profiler))}


def shares(stats: pstats.Stats) -> dict[str, float]:
    """Return the share of each part in the time in which a video was made, and of all else."""
    times: Mapping[Any, Any] = stats.stats  # type: ignore[attr-defined]

    def seconds(functions: Collection[tuple[str, str]]) -> float:
        return sum(
            cumulative
            for (file, _, name), (_, _, _, cumulative, _) in times.items()
            if (Path(file).name, name) in functions
        )

    total = seconds(WHOLE)
    found = {part: seconds(functions) / total for part, functions in PARTS.items()}
    return found | {"the rest": 1 - sum(found.values())}


def table(found: Mapping[str, Any]) -> str:
    """Return all rows and profiles as Markdown."""
    lines = [
        "| demo | size | method | fewer FLOPs | less time | time / FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    profiles = ["| demo | size | part of FlowCache-fast's time | share |", "|---|---|---|---|"]
    for name, sizes in found.items():
        for size, one in sizes.items():
            lines += [
                f"| {escaped(name)} | {size} | {escaped(method)} | {row['fewer_flops']:.2f}x "
                f"| {row['speedup']:.2f}x | {row['speedup'] / row['fewer_flops']:.2f} |"
                for method, row in one["rows"].items()
            ]
            profiles += [
                f"| {escaped(name)} | {size} | {escaped(part)} | {100 * share:.1f} % |"
                for part, share in one["profile_of_flowcache_fast"].items()
            ]
    return "\n".join([*lines, "", *profiles])
