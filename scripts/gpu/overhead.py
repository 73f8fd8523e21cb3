"""What everything around the matrix products costs: time against FLOPs, on the demos.

A demo's chunk has 80 or 96 tokens, a real one 10,200 or 12,150, and an operation has a fixed cost.
So the comparison is made at the demo's own size and at a larger picture, where products dominate.
"""

import cProfile
import pstats
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowcache.errors import UserError
from flowcache.runtime.files import check_writable, write_json
from flowcache.runtime.markdown import escaped
from flowcache.runtime.stats import environment
from gpu.growth import Line, Make, open_magi1, open_skyreels, shortened

NAME = "overhead.json"
PARTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "transformer blocks": (("dit.py", "run_blocks"),),
    "embedding and head": (("dit.py", "embed"), ("dit.py", "velocity")),
    "decisions": (("reuse.py", "plan"),),
    "stored results": (("reuse.py", "put"), ("reuse.py", "predict")),
    "solver": (("unipc.py", "advance_"), ("unipc.py", "skip")),
}
"""Functions of which each part's time is, inner calls included; none calls another."""
TIME = "seconds_per_chunk"
WHOLE = (("growth.py", "make_video"),)


@dataclass(frozen=True)
class Size:
    """A picture size at which all methods are run, and the settings for it."""

    name: str
    num_frames: int
    settings: tuple[str, ...]
    rounds: int
    """How often all methods are run, in turn; the least time of each counts."""


@dataclass(frozen=True)
class Model:
    """A model's part; all lines are compared with the first."""

    lines: tuple[Line, ...]
    sizes: tuple[Size, ...]


def _one_window(num_frames: int) -> tuple[str, ...]:
    return (
        *("prompt=-", f"num_frames={num_frames}", f"base_num_frames={num_frames}"),
        "overlap_history=null",
    )


def _clip(num_frames: int) -> tuple[str, ...]:
    return ("prompt=-", f"runtime_config.num_frames={num_frames}")


MODELS: Mapping[str, Model] = {
    "skyreels_v2": Model(
        (
            Line("vanilla", "vanilla", _one_window),
            Line("vanilla causal", "vanilla_causal", _one_window),
            Line("FlowCache-slow", "flowcache_slow", _one_window),
            Line("FlowCache-fast", "flowcache_fast", _one_window),
            Line("FlowCache-slow + KV compression", "flowcache_kvcompress", _one_window),
        ),
        (
            Size("64x64", 77, (), rounds=5),
            Size("128x128", 77, ("height=128", "width=128"), rounds=3),
            Size("256x256", 77, ("height=256", "width=256"), rounds=1),
        ),
    ),
    "magi1": Model(
        (
            Line("vanilla", "vanilla", _clip),
            Line("FlowCache-slow", "flowcache_slow_nocompress", _clip),
            Line("FlowCache-fast", "flowcache_fast_nocompress", _clip),
        ),
        (
            Size("64x64", 144, (), rounds=3),
            Size(
                "128x128",
                144,
                ("runtime_config.video_size_h=128", "runtime_config.video_size_w=128"),
                rounds=1,
            ),
            Size(
                "256x256",
                72,
                ("runtime_config.video_size_h=256", "runtime_config.video_size_w=256"),
                rounds=1,
            ),
        ),
    ),
}


def weigh(out: Path, *, overwrite: bool, names: Sequence[str]) -> None:
    """Measure the demos, write `overhead.json`, print the table.

    Args:
        names: of the models.

    Raises:
        UserError: the file is there already, or can't be written.
    """
    path = out / NAME
    check_writable(out)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists and is kept: give another --out, or --overwrite")
    openers = {"skyreels_v2": open_skyreels, "magi1": open_magi1}
    found: dict[str, Any] = {}
    for name in names:
        make = openers[name]()
        found[name] = {size.name: _compare(MODELS[name], size, make) for size in MODELS[name].sizes}
    document = {
        "note": "least seconds of processor time of the demos' transformer, without VAE and text",
        "command": "python scripts/bench_gpu.py --overhead",
        "environment": environment(torch.device("cpu")),
        "models": found,
    }
    write_json(path, document)
    print(table(found))
    print(f"wrote {path}")


def _compare(model: Model, size: Size, make: Make) -> dict[str, Any]:
    lines = [shortened(line, size.settings) for line in model.lines]
    num_frames = size.num_frames
    make(lines[-1], num_frames)
    rounds = [{line.name: make(line, num_frames) for line in lines} for _ in range(size.rounds)]
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
