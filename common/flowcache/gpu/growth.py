"""Cost against the length of a video: planned for the released sizes, measured on the demos.

Every step is computed in all rows, so that only the length and the KV cache make a difference.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flowcache.errors import UserError
from flowcache.gpu.benchmark import Benchmark, Line
from flowcache.runtime.files import check_writable, write_json
from flowcache.runtime.model import Request
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats, environment

NAME = "growth.json"
PROMPT = "a red circle moving right on a black background"
NOTE = (
    "planned: by arithmetic, at the released sizes; measured: the transformer of the demo, seconds "
    "of processor time. Every step is computed; the demos take 10 (SkyReels-V2) and 16 (MAGI-1) "
    "steps."
)
Make = Callable[[Line, int], dict[str, Any]]
"""Makes or plans a video of so many frames and returns what that takes."""


def plan_video(benchmark: Benchmark, line: Line, num_frames: int) -> dict[str, Any]:
    """Plan a video at the released size."""
    settings = (*benchmark.settings["paper"], *line.settings(num_frames))
    _, _, work = benchmark.read(line.preset, "paper", settings)
    return {
        "frames": num_frames,
        "chunks": work.num_chunks,
        "flops_per_chunk": work.flops / work.num_chunks,
        "kv_bytes": work.kv_bytes,
    }


def open_demo(benchmark: Benchmark) -> Make:
    """Load the demo and return what makes a video with it."""
    model, growth = benchmark.model, benchmark.growth

    def request(line: Line, num_frames: int) -> Request:
        return Request(line.preset, "demo", (*line.settings(num_frames), f"prompt={PROMPT}"))

    first = prepare(model, request(growth.lines[0], growth.measured[0]))
    loaded = load_networks(first, stats=RunStats(first.device))
    inputs = encode_inputs(first, stats=RunStats(first.device))

    def make(line: Line, num_frames: int) -> dict[str, Any]:
        job, stats = prepare(model, request(line, num_frames)), RunStats(first.device)
        shown = model.generate(loaded.dit, NoVideo(), job.config, inputs, stats=stats)
        row = make_video(num_frames, job.work.num_chunks, shown, stats)
        return row | {"kv_bytes": job.work.kv_bytes}

    return make


class NoVideo:
    """Stands in for a VAE where only the transformer is measured: its pixels are black."""

    def encode(self, pixels_B3THW: Tensor, /) -> Tensor:
        """Refuse: a video from a prompt alone has nothing to encode."""
        raise AssertionError(f"nothing is given, but {tuple(pixels_B3THW.shape)} is encoded")

    def decode(self, latents_BCFhw: Tensor, ranks: Ranks | None = None, /) -> Tensor:
        """Return a pixel per latent."""
        return torch.zeros(1, 3, *latents_BCFhw.shape[2:])

    def stream(self, ranks: Ranks, /) -> "NoVideo":
        """Begin a segment."""
        return self

    def to(self, device: torch.device | str, /) -> "NoVideo":
        """Stay."""
        return self


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
        "seconds_per_chunk": (time.process_time() - start) / num_chunks,
        "flops": stats.computed_flops,
    }


def grow(out: Path, *, overwrite: bool, benchmarks: Mapping[str, Benchmark]) -> None:
    """Plan and measure all models and write `growth.json`."""
    path = result_path(out, NAME, overwrite=overwrite)
    found = {name: _rows(benchmark) for name, benchmark in benchmarks.items()}
    document = {
        "note": NOTE,
        "command": "python scripts/bench_gpu.py --growth",
        "environment": environment(torch.device("cpu")),
        "models": found,
    }
    write_json(path, document)
    print(f"wrote {path}")


def result_path(out: Path, name: str, *, overwrite: bool) -> Path:
    """Return the path of a result that may be written there."""
    path = out / name
    check_writable(out)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists and is kept: give another --out, or --overwrite")
    return path


def _rows(benchmark: Benchmark) -> dict[str, Any]:
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
