"""Figures of the videos of a protocol: from their receipts, and by comparison with a reference."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowcache.bench.protocol import METRICS_FOLDER, VIDEOS, Method, Protocol
from flowcache.bench.tasks import Task, read_receipt
from flowcache.errors import UserError
from flowcache.runtime.files import read_json, write_json
from flowcache.runtime.lpips import LPIPS
from flowcache.runtime.metrics import ClipFigures, average, compare_clips

VBENCH_FILE = "vbench.json"
"""Written by scripts/vbench/evaluate.sh beside the videos of a method."""
INFINITE = "inf"


@dataclass(frozen=True)
class Judge:
    """What compares videos."""

    metrics: tuple[str, ...]
    network: LPIPS | None
    digests: Mapping[str, str]
    """SHA-256 of the weights of LPIPS."""
    device: torch.device


@dataclass(frozen=True)
class Row:
    """What the table says of a method: means over its videos, medians of times."""

    method: Method
    num_videos: int
    figures: dict[str, float | None]
    half_widths: dict[str, float | None]
    """Metric -> half the width of its 95 % confidence interval."""


def rows_of(
    protocol: Protocol, tasks: Sequence[Task], out: Path, *, judge: Judge, is_fresh: bool = False
) -> list[Row]:
    """Return the table's rows.

    Args:
        tasks: all of the protocol, complete.
        is_fresh: compare all videos anew, and leave the kept figures alone.

    Raises:
        UserError: two videos that belong together differ in length or size, or can't be read.
    """
    references = {task.name: task for task in tasks if task.folder == protocol.reference}
    rows: list[Row] = []
    for method in protocol.methods:
        own = [task for task in tasks if task.folder == method.folder]
        receipts = [read_receipt(task, out / VIDEOS) for task in own]
        figures = costs(receipts)
        figures["vbench"] = read_vbench(out / VIDEOS / method.folder / VBENCH_FILE)
        half_widths: dict[str, float | None] = {}
        if method.folder != protocol.reference:
            clips = [
                compared(task, references[task.name], out, judge=judge, is_fresh=is_fresh)
                for task in own
            ]
            for metric in judge.metrics:
                over = average(clip[metric] for clip in clips)
                figures[metric], half_widths[metric] = over.mean, over.half_width
        rows.append(Row(method, len(own), figures, half_widths))
    base = next(row for row in rows if row.method.folder == protocol.reference)
    for row in rows:
        row.figures["speedup"] = ratio(base, row, "latency_seconds")
        row.figures["dit_speedup"] = ratio(base, row, "dit_seconds")
    return rows


def ratio(base: Row, row: Row, key: str) -> float | None:
    """Return how many times less a row needs than the reference."""
    whole, part = base.figures[key], row.figures[key]
    return whole / part if whole and part else None


def costs(receipts: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the means of what receipts say, and the medians of times.

    A process's first video takes longer than the others, and it is always the reference's.
    """

    def stage(name: str) -> Callable[[Mapping[str, Any]], float]:
        return lambda stats: stats["stages"].get(name, {}).get("seconds", 0.0)

    reads: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
        "pflops": lambda stats: stats["flops"]["computed"] / 1e15,
        "latency_seconds": lambda stats: stats["total_seconds"] - stage("load")(stats),
        "dit_seconds": stage("dit"),
        "vae_seconds": stage("vae"),
        "text_seconds": stage("text"),
        "compression_seconds": stage("kv_compression"),
        "reused_share": lambda stats: 1 - stats["passes"]["computed_share"],
        # a process's own peak would be that of all methods it has made so far
        "peak_memory_bytes": lambda stats: (
            stats["peak_memory"]["bytes"] if stats["peak_memory"]["of"] == "CUDA tensors" else None
        ),
    }
    try:
        values = {
            key: [read(receipt["stats"]) for receipt in receipts] for key, read in reads.items()
        }
        for key in ("first_frames_seconds", "kv_cache_bytes"):
            values[key] = [receipt[key] for receipt in receipts]
    except (KeyError, TypeError, AttributeError) as error:
        names = ", ".join(f"{receipt.get('video')}" for receipt in receipts)
        raise UserError(
            f"a receipt of {names} is damaged ({type(error).__name__}: {error}): remove it and "
            "make the video again"
        ) from None
    return {key: middle(key, found) for key, found in values.items()}


def middle(key: str, values: Sequence[float | None]) -> float | None:
    """Return the median of times, else the mean; None if a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return statistics.median(known) if key.endswith("_seconds") else statistics.fmean(known)


def compared(
    task: Task, reference: Task, out: Path, *, judge: Judge, is_fresh: bool
) -> dict[str, float]:
    """Return the metrics of one video, from an earlier start if neither video has changed."""
    videos = out / VIDEOS
    key = {
        "videos": [read_receipt(one, videos)["sha256"] for one in (task, reference)],
        "metrics": list(judge.metrics),
        "lpips": dict(judge.digests),
    }
    kept = task.path(out / METRICS_FOLDER, ".json")
    stored = None if is_fresh else read_figures(kept)
    if stored is not None and stored[0] == key:
        return stored[1]
    clip: ClipFigures = compare_clips(
        task.path(videos, ".mp4"),
        reference.path(videos, ".mp4"),
        name=task.label,
        metrics=judge.metrics,
        network=judge.network,
        device=judge.device,
    )
    if not is_fresh:
        kept.parent.mkdir(parents=True, exist_ok=True)
        values = {name: _finite(value) for name, value in clip.clip.items()}
        write_json(kept, {"key": key, "num_frames": clip.num_frames, "clip": values})
    return dict(clip.clip)


def read_figures(path: Path) -> tuple[dict[str, Any], dict[str, float]] | None:
    """Return what an earlier start compared, and its metrics; None: nothing, or it is damaged."""
    try:
        stored = read_json(path)
        clip = {metric: float(value) for metric, value in stored["clip"].items()}
        return dict(stored["key"]), clip
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def damaged_figures(tasks: Sequence[Task], out: Path) -> list[str]:
    """Name the files of kept metrics that can't be read; a missing one is computed anew."""
    paths = [task.path(out / METRICS_FOLDER, ".json") for task in tasks]
    return [
        f"{path}: damaged: remove it"
        for path in paths
        if path.exists() and read_figures(path) is None
    ]


def _finite(value: float) -> float | str:
    return INFINITE if value == float("inf") else value


def read_vbench(path: Path) -> float | None:
    """Return the mean over VBench's dimensions in percent; None if it was not evaluated.

    Raises:
        UserError: the file is not what scripts/vbench/evaluate.sh writes.
    """
    if not path.is_file():
        return None
    try:
        return float(read_json(path)["mean_percent"])
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(
            f"{path}: holds no mean_percent: remove it, or run scripts/vbench/evaluate.sh again"
        ) from None
