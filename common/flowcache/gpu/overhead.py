"""What everything around the matrix products costs: time against FLOPs, on the demos.

A demo's chunk has 80 or 96 tokens, a real one 10,200 or 12,150, and an operation has a fixed cost.
So the comparison is made at the demo's own size and at a larger picture, where products dominate.
"""

import cProfile
import pstats
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowcache.gpu.benchmark import Benchmark, Line, Picture
from flowcache.gpu.growth import Make, open_demo, result_path
from flowcache.runtime.files import write_json
from flowcache.runtime.stats import environment
from flowcache.runtime.text_files import escaped

NAME = "overhead.json"
PARTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "transformer blocks": (("dit.py", "run_blocks"),),
    "embedding and head": (("dit.py", "embed"), ("dit.py", "velocity")),
    "decisions": (("policies.py", "plan"),),
    "stored results": (("predict.py", "put"), ("predict.py", "predict")),
    "solver": (("unipc.py", "advance_"), ("unipc.py", "skip")),
}
"""Functions of which each part's time is, inner calls included; none calls another."""
TIME = "seconds_per_chunk"
WHOLE = (("growth.py", "make_video"),)


def weigh(out: Path, *, overwrite: bool, benchmarks: Mapping[str, Benchmark]) -> None:
    """Measure the demos, write `overhead.json`, print the table."""
    path = result_path(out, NAME, overwrite=overwrite)
    found: dict[str, Any] = {}
    for name, benchmark in benchmarks.items():
        make = open_demo(benchmark)
        lines, pictures = benchmark.overhead
        found[name] = {picture.name: _compare(lines, picture, make) for picture in pictures}
    document = {
        "note": "least seconds of processor time of the demos' transformer, without VAE and text",
        "command": "python scripts/bench_gpu.py --overhead",
        "environment": environment(torch.device("cpu")),
        "models": found,
    }
    write_json(path, document)
    print(table(found))
    print(f"wrote {path}")


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
    return {"rows": rows, "profile_of_flowcache_fast": _profile(fast, make, num_frames)}


def _profile(line: Line, make: Make, num_frames: int) -> dict[str, float]:
    """Return the share of each part in a run's time; profiling makes Python look dearer."""
    profiler = cProfile.Profile()
    profiler.runcall(make, line, num_frames)
    return shares(pstats.Stats(profiler))


def shares(stats: pstats.Stats) -> dict[str, float]:
    """Return the share of each part in a profile's time, and that of all else.

    All is what was spent while the video was made; reading settings before it is left out.
    """
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
