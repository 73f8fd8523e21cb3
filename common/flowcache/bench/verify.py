"""The result folder of a table: written, and checked again later."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowcache.bench.figures import Judge, damaged_figures, rows_of
from flowcache.bench.protocol import COPY, VIDEOS, Protocol, contradiction, read_protocol
from flowcache.bench.render import describe_gpus
from flowcache.bench.table import SCHEMA_VERSION, csv_text, markdown, plain_rows, without_times
from flowcache.bench.tasks import Task, alarms_of, flaw, flaws, read_receipt, sha256_of
from flowcache.errors import UserError
from flowcache.runtime.files import read_json, write_json, write_text
from flowcache.runtime.stats import environment

JSON_FILE, CSV_FILE, MARKDOWN_FILE = "table.json", "table.csv", "table.md"
DEVICE_TOLERANCE = 1e-3
"""Share by which a metric may differ between devices, which round differently."""


@dataclass(frozen=True)
class Inputs:
    """What a table is made from."""

    protocol: Protocol
    tasks: Sequence[Task]
    out: Path
    judge: Judge
    notes: Sequence[str] = ()
    model: str | None = None
    """As the command line named it; None: the protocol's own."""
    num_prompts: int | None = None
    """The first so many prompts; None: all."""


def write_table(inputs: Inputs) -> dict[str, Any]:
    """Measure all videos and write the table in its three forms; return the JSON's content.

    Raises:
        UserError: a video is missing or damaged, or made with other settings than pinned.
    """
    videos, out = inputs.out / VIDEOS, inputs.out
    missing = flaws(inputs.tasks, videos)
    if missing:
        label, reason = next(iter(missing.items()))
        raise UserError(
            f"{len(missing)} of {len(inputs.tasks)} videos are not complete ({label}: {reason}): "
            "start the command again, it makes only those"
        )
    protocol = inputs.protocol
    unpinned = unpinned_videos(protocol, inputs.tasks, videos)
    if unpinned:
        raise UserError(f"{unpinned[0]}: remove it and start the command again")
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "title": protocol.title,
        "published_setting": protocol.published_setting,
        "protocol_sha256": sha256_of(out / COPY),
        "model": inputs.model,
        "num_prompts": inputs.num_prompts,
        "rows": plain_rows(rows_of(protocol, inputs.tasks, out, judge=inputs.judge)),
        "metrics": list(inputs.judge.metrics),
        "lpips_sha256": dict(inputs.judge.digests),
        "notes": [*inputs.notes, *_few_prompts(inputs), *alarm_notes(inputs.tasks, videos)],
        "environment": environment(inputs.judge.device),
        "gpus": describe_gpus(),
        "made_by": made_by(inputs.tasks, videos),
        "receipts": {
            task.label: {
                "video": read_receipt(task, videos)["sha256"],
                "receipt": sha256_of(task.path(videos, ".json")),
            }
            for task in inputs.tasks
        },
    }
    write_json(out / JSON_FILE, report)
    write_text(out / CSV_FILE, csv_text(report["rows"]))
    write_text(out / MARKDOWN_FILE, markdown(report))
    return report


def _few_prompts(inputs: Inputs) -> list[str]:
    count, whole = inputs.num_prompts, len(inputs.protocol.prompts)
    if count is None or count == whole:
        return []
    return [f"made of the first {count} of {whole} prompts only"]


def alarm_notes(tasks: Sequence[Task], videos: Path) -> list[str]:
    """Name the videos that are of one colour or frozen: their figures mean nothing."""
    return [f"ALARM {task.label}: {alarm}" for task in tasks for alarm in alarms_of(task, videos)]


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
    counts: dict[str, int] = {}
    for task in tasks:
        text = json.dumps(read_receipt(task, videos)["environment"], sort_keys=True)
        counts[text] = counts.get(text, 0) + 1
    return [{"num_videos": count, **json.loads(text)} for text, count in counts.items()]


def read_table(out: Path) -> dict[str, Any]:
    """Return the JSON of a result folder.

    Raises:
        UserError: there is none, or it is of another version.
    """
    path = out / JSON_FILE
    try:
        report = read_json(path)
        version = report["schema_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no table: {out} is not the result folder of a table") from None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version is {version}, this version reads {SCHEMA_VERSION}")
    return report


def verify(out: Path, report: Mapping[str, Any], *, judge: Judge) -> list[str]:
    """Check a result folder against its receipts, and its table against its videos.

    Args:
        report: without gaps, see `table.gaps`.

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
    for name, text in (
        (CSV_FILE, csv_text(report["rows"])),
        (MARKDOWN_FILE, markdown(report)),
    ):
        path = out / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            found.append(f"{path}: not what {JSON_FILE} says")
    found += damaged_figures(tasks, out)
    if found:
        return found
    found = unpinned_videos(protocol, tasks, videos)
    if found:
        return found
    try:
        rows = plain_rows(rows_of(protocol, tasks, out, judge=judge, is_fresh=True))
    except UserError as error:  # of a video or a receipt
        return [str(error)]
    is_same_device = report["environment"].get("device") == environment(judge.device)["device"]
    return _contradictions(
        without_times(report["rows"]),
        without_times(rows),
        tolerance=0.0 if is_same_device else DEVICE_TOLERANCE,
    )


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
    labels = {task.label for task in tasks}
    found = [
        f"{JSON_FILE}: {label} is no video of the protocol"
        for label in stored
        if label not in labels
    ]
    for task in tasks:
        path = task.path(videos, ".json")
        wanted = stored.get(task.label, {}).get("receipt")
        if path.is_file() and sha256_of(path) != wanted:
            found.append(f"{path}: not the receipt that the table was made from")
    return found


def _contradictions(
    stored: Sequence[Mapping[str, Any]],
    computed: Sequence[Mapping[str, Any]],
    *,
    tolerance: float,
) -> list[str]:
    """Name every figure that differs by more than a share of it."""
    if [row["folder"] for row in stored] != [row["folder"] for row in computed]:
        return [f"{JSON_FILE}: its rows are not the protocol's methods"]
    return [
        f"{JSON_FILE}: {key} of {row['method']} is {row.get(key)}, computed anew {again.get(key)}"
        for row, again in zip(stored, computed, strict=True)
        for key in {**row, **again}
        if not _agree(row.get(key), again.get(key), tolerance=tolerance)
    ]


def _agree(one: Any, other: Any, *, tolerance: float) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            _agree(one[key], other[key], tolerance=tolerance) for key in one
        )
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=tolerance)
    return one == other
