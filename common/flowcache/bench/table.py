"""The table of a protocol: measured from videos and receipts, written, and verified again later.

table.json holds everything, table.csv plain numbers, table.md is for people.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from flowcache.bench.protocol import (
    COPY,
    METRICS_FOLDER,
    VIDEOS,
    Protocol,
    contradiction,
    read_protocol,
)
from flowcache.bench.render import describe_gpus
from flowcache.bench.tasks import Task, alarms, flaw, read_receipt, sha256_of
from flowcache.errors import UserError
from flowcache.runtime.files import read_json, write_json, write_text
from flowcache.runtime.lpips import LPIPS
from flowcache.runtime.metrics import METRICS, average, compare_clips
from flowcache.runtime.stats import environment, scaled
from flowcache.runtime.text_files import csv_of, escaped, table_row

SCHEMA_VERSION = 2
JSON_FILE, CSV_FILE, MARKDOWN_FILE = "table.json", "table.csv", "table.md"
VBENCH_FILE = "vbench.json"
"""Written by scripts/vbench/evaluate.sh into the folder of a method's videos."""
TOLERANCES = {"psnr": 0.01, "ssim": 1e-4, "lpips": 1e-3}
"""By how much a metric may differ where another machine computes it, which rounds differently: dB
for PSNR. On a machine of the same kind all figures but times are the same to the last digit."""
MACHINE = ("device", "cpu", "num_threads", "packages.torch")
"""What of an environment decides how sums are rounded."""
INFINITE = "inf"
MISSING = "-"


@dataclass(frozen=True)
class Column:
    """One figure of every row."""

    key: str
    head: str
    spec: str
    """How Python's `format` writes it."""
    scale: float = 1.0
    """What the number is multiplied by before it is written."""
    is_published: bool = False
    """Whether the paper has it, too: then a column with its figures follows."""
    is_time: bool = False
    """Whether it differs from run to run."""
    published_spec: str = ""
    """How the paper writes it; empty: as `spec`."""

    def written(self, value: float | None, *, is_published: bool = False) -> str:
        """Return a figure for people; a published one as the paper has it."""
        if value is None:
            return MISSING
        if self.key == "pflops":  # of a demo they are GFLOP
            return scaled(value * 1e15, "FLOP")
        spec = self.published_spec if is_published and self.published_spec else self.spec
        return format(value if is_published else value * self.scale, spec)


COLUMNS = (
    Column("pflops", "FLOPs", "", is_published=True),
    Column("speedup", "latency speed-up", ".2f", is_published=True, is_time=True),
    Column(
        "latency_seconds",
        "latency s",
        ".2f",
        is_published=True,
        is_time=True,
        published_spec=".0f",
    ),
    Column("vbench", "VBench", ".2f", is_published=True),
    Column("lpips", "LPIPS", ".4f", is_published=True),
    Column("ssim", "SSIM", ".4f", is_published=True),
    Column("psnr", "PSNR dB", ".2f", is_published=True),
    Column("reused_share", "reused %", ".1f", scale=100),
    Column("dit_seconds", "DiT s", ".2f", is_time=True),
    Column("dit_speedup", "DiT speed-up", ".2f", is_time=True),
    Column("vae_seconds", "VAE s", ".2f", is_time=True),
    Column("text_seconds", "text s", ".2f", is_time=True),
    Column("compression_seconds", "compression s", ".3f", is_time=True),
    Column("first_frames_seconds", "first chunk s", ".2f", is_time=True),
    Column("kv_cache_bytes", "KV cache, bytes", ".0f"),
    Column("peak_memory_bytes", "peak memory, bytes", ".0f"),
)
PARTS = {
    "paper": "Rows of the paper",
    "ingredient": "One ingredient after the other",
    "baseline": "Baselines",
}
TABLES = {
    "Cost": ("pflops", "latency_seconds", "speedup", "dit_speedup", "reused_share"),
    "Quality": ("vbench", "lpips", "ssim", "psnr"),
}
"""Heading -> its columns; the others are in the CSV file."""
NOTES = (
    "published: figures of the paper, of another model, size and machine than ours wherever the "
    "protocol differs from",
    "FLOPs: counted by closed forms while the run decides; the published count takes "
    "SkyReels-V2's full attention as if it were causal",
    "latency: texts, denoising, decoding and writing of one video with loaded models; times are "
    "medians over videos; speed-up: the reference's latency by the row's",
    "LPIPS, SSIM, PSNR: of the mp4 files against the reference's, mean over videos",
    f"{CSV_FILE} has all figures, with seconds of each stage, KV cache and memory in bytes",
    "KV cache: what is reserved for all layers and branches; peak: tensors on the GPU, the "
    "text encoder included where it stays there (without offload), which one run frees after the "
    "prompt; empty on a CPU",
    "VBench: mean over dimensions as scripts/vbench/evaluate.sh wrote it, empty without that",
)


@dataclass(frozen=True)
class Judge:
    """What compares videos."""

    metrics: tuple[str, ...]
    network: LPIPS | None
    digests: Mapping[str, str]
    """SHA-256 of the weights of LPIPS."""
    device: torch.device


# Figures ------------------------------------------------------------------------------------------


def rows_of(
    protocol: Protocol, tasks: Sequence[Task], out: Path, *, judge: Judge, is_fresh: bool = False
) -> list[dict[str, Any]]:
    """Return the table's rows: means over the videos of a method, medians of times.

    Args:
        tasks: all of the protocol, complete.
        is_fresh: compare all videos anew, and leave the kept figures alone.
    """
    references = {task.name: task for task in tasks if task.folder == protocol.reference}
    rows: list[dict[str, Any]] = []
    for method in protocol.methods:
        own = [task for task in tasks if task.folder == method.folder]
        figures = costs([read_receipt(task, out / VIDEOS) for task in own])
        figures["vbench"] = read_vbench(out / VIDEOS / method.folder / VBENCH_FILE)
        half_widths: dict[str, float | None] = {}  # of 95 % confidence intervals
        if method.folder != protocol.reference:
            clips = [
                compared(task, references[task.name], out, judge=judge, is_fresh=is_fresh)
                for task in own
            ]
            for metric in judge.metrics:
                over = average(clip[metric] for clip in clips)
                figures[metric], half_widths[metric] = over.mean, over.half_width
        row = {"method": method.name, "folder": method.folder, "part": method.part}
        row |= {"num_videos": len(own), "figures": figures, "half_widths": half_widths}
        rows.append({**row, "published": asdict(method.published)})
    base = next(row["figures"] for row in rows if row["folder"] == protocol.reference)
    for row in rows:
        own = row["figures"]
        for key, seconds in (("speedup", "latency_seconds"), ("dit_speedup", "dit_seconds")):
            own[key] = base[seconds] / own[seconds] if base[seconds] and own[seconds] else None
        row["figures"] = {column.key: own.get(column.key) for column in COLUMNS}
    return rows


def costs(receipts: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the means of what receipts say, and the medians of times.

    A process's first video takes longer than the others, and it is always the reference's.
    """

    def figures(receipt: Mapping[str, Any]) -> dict[str, float | None]:
        stats = receipt["stats"]
        stages = {name: stage.get("seconds", 0.0) for name, stage in stats["stages"].items()}
        peak = stats["peak_memory"]
        return {
            "pflops": stats["flops"]["computed"] / 1e15,
            "latency_seconds": stats["total_seconds"] - stages.get("load", 0.0),
            "dit_seconds": stages.get("dit", 0.0),
            "vae_seconds": stages.get("vae", 0.0),
            "text_seconds": stages.get("text", 0.0),
            "compression_seconds": stages.get("kv_compression", 0.0),
            "reused_share": 1 - stats["passes"]["computed_share"],
            # a process's own peak would be that of all methods it has made so far
            "peak_memory_bytes": peak["bytes"] if peak["of"] == "CUDA tensors" else None,
            "first_frames_seconds": receipt["first_frames_seconds"],
            "kv_cache_bytes": receipt["kv_cache_bytes"],
        }

    try:
        values = [figures(receipt) for receipt in receipts]
    except (KeyError, TypeError, AttributeError) as error:
        names = ", ".join(f"{receipt.get('video')}" for receipt in receipts)
        raise UserError(
            f"a receipt of {names} is damaged ({type(error).__name__}: {error}): remove it and "
            "make the video again"
        ) from None
    return {key: middle(key, [each[key] for each in values]) for key in values[0]}


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
    clip = compare_clips(
        task.path(videos, ".mp4"),
        reference.path(videos, ".mp4"),
        name=task.label,
        metrics=judge.metrics,
        network=judge.network,
        device=judge.device,
    )
    if not is_fresh:
        kept.parent.mkdir(parents=True, exist_ok=True)
        values = {k: INFINITE if v == math.inf else v for k, v in clip.clip.items()}
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


def read_vbench(path: Path) -> float | None:
    """Return the mean over VBench's dimensions in percent; None if it was not evaluated."""
    if not path.is_file():
        return None
    try:
        return float(read_json(path)["mean_percent"])
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(
            f"{path}: holds no mean_percent: remove it, or run scripts/vbench/evaluate.sh again"
        ) from None


# Three forms --------------------------------------------------------------------------------------


def without_times(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of JSON without what differs from run to run."""
    times = {column.key for column in COLUMNS if column.is_time}
    return [
        {**row, "figures": {k: v for k, v in row["figures"].items() if k not in times}}
        for row in rows
    ]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a line per row of JSON, numbers in full."""
    published = [column.key for column in COLUMNS if column.is_published]
    metrics = sorted({metric for row in rows for metric in row["half_widths"]})
    head = [
        *("method", "part", "num_videos"),
        *(column.key for column in COLUMNS),
        *(f"{metric}_half_width" for metric in metrics),
        *(f"published_{key}" for key in published),
    ]
    lines = [
        [
            *(row["method"], row["part"], row["num_videos"]),
            *(row["figures"][column.key] for column in COLUMNS),
            *(row["half_widths"].get(metric) for metric in metrics),
            *(row["published"][key] for key in published),
        ]
        for row in rows
    ]
    return csv_of([head, *lines])


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of a JSON report as Markdown, with notes for its readers."""
    lines = [f"# {escaped(report['title'])}", ""]
    for heading, keys in TABLES.items():
        lines += [f"## {heading}", "", *table_lines(report["rows"], keys), ""]
    notes = [f"{NOTES[0]} {report['published_setting']}", *NOTES[1:], *report["notes"]]
    lines += [f"- {escaped(note)}" for note in notes]
    lines.append(
        f"- protocol {report['protocol_sha256']}, commit {report['environment']['commit']}"
    )
    return "\n".join(lines) + "\n"


def table_lines(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return columns of the rows as a Markdown table, each with the published figures if any."""
    columns = [next(column for column in COLUMNS if column.key == key) for key in keys]
    heads = ["method"]
    for column in columns:
        heads += [column.head, "published"] if column.is_published else [column.head]
    lines = [table_row(heads), table_row(["---"] + ["---:"] * (len(heads) - 1))]
    for part, title in PARTS.items():
        own = [row for row in rows if row["part"] == part]
        if own:
            lines.append(table_row([f"*{title}*", *[""] * (len(heads) - 1)]))
            lines += [table_row(_cells(row, columns)) for row in own]
    return lines


def _cells(row: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    cells = [escaped(row["method"])]
    for column in columns:
        cells.append(column.written(row["figures"][column.key]))
        if column.is_published:
            cells.append(column.written(row["published"][column.key], is_published=True))
    return cells


# Writing ------------------------------------------------------------------------------------------


def write_table(
    protocol: Protocol,
    out: Path,
    *,
    judge: Judge,
    notes: Sequence[str] = (),
    model: str | None = None,
    num_prompts: int | None = None,
) -> dict[str, Any]:
    """Measure all videos and write the table in its three forms; return the JSON's content.

    Args:
        model: as the command line named it; None: the protocol's own.
        num_prompts: the first so many prompts; None: all.
    """
    tasks, videos = protocol.tasks(model, num_prompts=num_prompts), out / VIDEOS
    found = {task.label: flaw(task, videos) for task in tasks}
    missing = [f"{label}: {reason}" for label, reason in found.items() if reason is not None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(tasks)} videos are not complete ({missing[0]}): "
            "start the command again, it makes only those"
        )
    unpinned = unpinned_videos(protocol, tasks, videos)
    if unpinned:
        raise UserError(f"{unpinned[0]}: remove it and start the command again")
    whole = len(protocol.prompts)
    if num_prompts is not None and num_prompts != whole:
        notes = [*notes, f"made of the first {num_prompts} of {whole} prompts only"]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "title": protocol.title,
        "published_setting": protocol.published_setting,
        "protocol_sha256": sha256_of(out / COPY),
        "model": model,
        "num_prompts": num_prompts,
        "rows": rows_of(protocol, tasks, out, judge=judge),
        "metrics": list(judge.metrics),
        "lpips_sha256": dict(judge.digests),
        "notes": [*notes, *alarms(tasks, videos)],
        "environment": environment(judge.device),
        "gpus": describe_gpus(),
        "made_by": made_by(tasks, videos),
        "receipts": {
            task.label: {
                "video": read_receipt(task, videos)["sha256"],
                "receipt": sha256_of(task.path(videos, ".json")),
            }
            for task in tasks
        },
    }
    write_json(out / JSON_FILE, report)
    write_text(out / CSV_FILE, csv_text(report["rows"]))
    write_text(out / MARKDOWN_FILE, markdown(report))
    return report


def unpinned_videos(protocol: Protocol, tasks: Sequence[Task], videos: Path) -> list[str]:
    """Name the receipts whose settings are not those that the protocol pins."""
    found: list[str] = []
    for task in tasks:
        config = read_receipt(task, videos).get("config", {})
        wrong = contradiction(protocol.pins(task.folder), config)
        if wrong is not None:
            found.append(f"{task.path(videos, '.json')}: {wrong} by the protocol")
    return found


def made_by(tasks: Sequence[Task], videos: Path) -> list[dict[str, Any]]:
    """Return the different environments in which the videos were made, and how many in each."""
    counts = Counter(
        json.dumps(read_receipt(task, videos)["environment"], sort_keys=True) for task in tasks
    )
    return [{"num_videos": count, **json.loads(text)} for text, count in counts.items()]


# Verifying ----------------------------------------------------------------------------------------

_NUMBER = (int, float, NoneType)
EACH = "*"
"""As the only key of a shape: what every value must be."""
SHAPE: dict[str, Any] = {
    **dict.fromkeys(("title", "published_setting", "protocol_sha256"), str),
    "lpips_sha256": dict,
    "environment": {"commit": (str, NoneType)},
    "receipts": {EACH: dict},
    "rows": [
        {
            **dict.fromkeys(("method", "folder", "part"), str),
            "figures": {column.key: _NUMBER for column in COLUMNS},
            "half_widths": {EACH: _NUMBER},
            "published": {column.key: _NUMBER for column in COLUMNS if column.is_published},
            "num_videos": int,
        }
    ],
    "metrics": list,
    "notes": list,
    "model": (str, NoneType),
    "num_prompts": (int, NoneType),
}
"""Key -> type, types, or the shape of what it holds; in a list, the shape of every item."""


def read_report(out: Path) -> dict[str, Any]:
    """Return the JSON of a result folder; what it holds is not checked, see `gaps`."""
    path = out / JSON_FILE
    try:
        report = read_json(path)
        version = report["schema_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no table: {out} is not the result folder of a table") from None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version is {version}, this version reads {SCHEMA_VERSION}")
    return report


def gaps(report: Mapping[str, Any]) -> list[str]:
    """Name what is missing in the JSON of a table, or is of the wrong type, a line each."""
    found = _gaps(report, SHAPE, place="")
    if found:
        return found
    found = [f"metrics holds {item!r}" for item in report["metrics"] if item not in METRICS]
    return found + [
        f"notes holds {item!r}" for item in report["notes"] if not isinstance(item, str)
    ]


def _gaps(value: Any, shape: Any, *, place: str) -> list[str]:
    kind = type(shape) if isinstance(shape, (dict, list)) else shape
    if not isinstance(value, kind):
        return [f"{place} is {value!r}"]
    inner: dict[Any, Any] = {}
    if isinstance(shape, list):
        inner = dict.fromkeys(range(len(value)), shape[0])
    elif isinstance(shape, dict):
        inner = dict.fromkeys(value, shape[EACH]) if EACH in shape else shape
    found: list[str] = []
    for key, wanted in inner.items():
        at = f"{place}.{key}" if place else f"{key}"
        is_there = isinstance(shape, list) or key in value
        found += _gaps(value[key], wanted, place=at) if is_there else [f"{at} is missing"]
    return found


def verify(out: Path, report: Mapping[str, Any], *, judge: Judge) -> list[str]:
    """Check a result folder against its receipts, and its table against its videos.

    Args:
        report: without `gaps`.

    Returns: one line per contradiction; empty: everything fits.
    """
    copy, videos = out / COPY, out / VIDEOS
    if not copy.is_file() or sha256_of(copy) != report["protocol_sha256"]:
        return [f"{copy}: not the protocol of the table (SHA-256 differs)"]
    protocol = read_protocol(copy)
    try:
        tasks = protocol.tasks(report["model"], num_prompts=report["num_prompts"])
    except UserError as error:
        return [f"{JSON_FILE}: {error}"]
    found = _incomplete(tasks, videos)
    found += _changed_receipts(tasks, videos, report["receipts"])
    for name, text in ((CSV_FILE, csv_text(report["rows"])), (MARKDOWN_FILE, markdown(report))):
        path = out / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            found.append(f"{path}: not what {JSON_FILE} says")
    for task in tasks:
        path = task.path(out / METRICS_FOLDER, ".json")
        if path.exists() and read_figures(path) is None:  # a missing one is computed anew
            found.append(f"{path}: damaged: remove it")
    found = found or unpinned_videos(protocol, tasks, videos)
    if found:
        return found
    try:
        rows = rows_of(protocol, tasks, out, judge=judge, is_fresh=True)
    except UserError as error:  # of a video or a receipt
        return [str(error)]
    return _contradictions(
        without_times(report["rows"]),
        without_times(rows),
        tolerances={} if is_same_machine(report, judge) else TOLERANCES,
    )


def is_same_machine(report: Mapping[str, Any], judge: Judge) -> bool:
    """Tell whether a table was computed on a machine of the kind of this one."""
    kinds = (report["environment"], environment(judge.device))
    first, second = (
        {**kind, "packages.torch": (kind.get("packages") or {}).get("torch")} for kind in kinds
    )
    return all(first.get(key) == second.get(key) for key in MACHINE)


def _incomplete(tasks: Sequence[Task], videos: Path) -> list[str]:
    found: list[str] = []
    for task in tasks:
        try:
            reason = flaw(task, videos)
        except UserError as error:
            reason = str(error)
        if reason is not None:
            found.append(f"{task.label}: {reason}")
    return found


def _changed_receipts(
    tasks: Sequence[Task], videos: Path, stored: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """Compare every receipt with the one that the table was made from."""
    others = stored.keys() - {task.label for task in tasks}
    found = [f"{JSON_FILE}: {label} is no video of the protocol" for label in sorted(others)]
    for task in tasks:
        path = task.path(videos, ".json")
        if path.is_file() and sha256_of(path) != stored.get(task.label, {}).get("receipt"):
            found.append(f"{path}: not the receipt that the table was made from")
    return found


def _contradictions(
    stored: Sequence[Mapping[str, Any]],
    computed: Sequence[Mapping[str, Any]],
    *,
    tolerances: Mapping[str, float],
) -> list[str]:
    """Name every figure that differs by more than its tolerance, 0 where none is given."""
    if [row["folder"] for row in stored] != [row["folder"] for row in computed]:
        return [f"{JSON_FILE}: its rows are not the protocol's methods"]
    return [
        f"{JSON_FILE}: {key} of {row['method']} is {row.get(key)}, computed anew {again.get(key)}"
        for row, again in zip(stored, computed, strict=True)
        for key in {**row, **again}
        if not _agree(row.get(key), again.get(key), tolerances=tolerances)
    ]


def _agree(
    one: Any, other: Any, *, tolerances: Mapping[str, float], tolerance: float = 0.0
) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            _agree(one[key], other[key], tolerances=tolerances, tolerance=tolerances.get(key, 0.0))
            for key in one
        )
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=0.0, abs_tol=tolerance)
    return one == other
