"""Compare clips with their references, one pair or two folders, and write what was measured."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flowcache.errors import UserError
from flowcache.report.run import NOTHING, dotted
from flowcache.runtime.files import read_json, write_json, write_text
from flowcache.runtime.lpips import BACKBONE_DIGEST, LPIPS, find_weights, load_lpips
from flowcache.runtime.metrics import (
    CONFIDENCE,
    ClipFigures,
    average,
    compare_clips,
    is_clip,
    list_clips,
    worst_frames,
)
from flowcache.runtime.stats import environment
from flowcache.runtime.text_files import csv_of, escaped, table_row

FILES = ("compare.json", "compare.csv", "compare.md")
NUM_WORST = 3
"""Frames that are named of each metric."""
UNITS = {"psnr": "PSNR dB", "ssim": "SSIM", "lpips": "LPIPS"}
DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4}


CACHE = ("reuse.", "kv.")
"""Settings that two runs may differ in when the cache is judged."""
WHERE = re.compile(
    r"(.+\.)?(device|offload|text_on_host|kv_on_host|kv_offload|memory_limit|blocks_on_device"
    r"|vae_strips|embedding_cache|attention_kernel|compile|overlap|batch_branches"
    r"|together_tokens|enable_cuda_graph|load|t5_device|\w+_pretrained|distributed_\w+"
    r"|[cp]p_size|cp_strategy|ulysses_\w+)|parallel\..*"
)
"""Settings that say where and how fast a run computes, not what."""
LONGEST_VALUE = 40
NO_REUSE = "reuse.policy=vanilla kv.compress=none"


@dataclass(frozen=True)
class Network:
    """What computes LPIPS, or why there is none: a note of one line, or empty."""

    network: LPIPS | None = None
    digests: Mapping[str, str] = field(default_factory=dict[str, str])
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All results."""

    metrics: tuple[str, ...]
    clips: list[ClipFigures]
    failures: dict[str, str]
    """Clip -> why it could not be compared."""
    network: Network
    unlike: dict[str, list[str]]
    """What two runs differ in apart from the cache -> the clips of which that is so."""

    @property
    def measured(self) -> list[str]:
        """The metrics that have values."""
        return [m for m in self.metrics if self.clips and m in self.clips[0].clip]


def compare(
    ours: Path,
    reference: Path,
    *,
    metrics: tuple[str, ...],
    weights: Path | None,
    device: torch.device,
) -> Comparison:
    """Compare two clips, or the clips of two folders by name, where some may fail.

    Args:
        weights: of AlexNet; None: where torch keeps them, and LPIPS is left out without them.
    """
    pairs, failures = match(ours, reference)
    network = make_network(metrics, weights, device=device)
    computed = [m for m in metrics if m != "lpips" or network.network is not None]
    clips: list[ClipFigures] = []
    unlike: dict[str, list[str]] = {}
    for name, paths in tqdm(pairs.items(), unit="clip", disable=None):
        try:
            found = compare_clips(
                *paths, name=name, metrics=computed, network=network.network, device=device
            )
            clips.append(found)
            for difference in differences(*paths):
                unlike.setdefault(difference, []).append(name)
        except UserError as error:
            if not ours.is_dir() or is_clip(ours):
                raise
            failures[name] = str(error)
    return Comparison(metrics, clips, failures, network, unlike)


def differences(ours: Path, reference: Path) -> list[str]:
    """Name each setting apart from the cache's in which the runs of two clips differ.

    None where a clip has no report next to it, as NAME.json of NAME.mp4: nothing is known then.
    """
    first, second = settings_of(ours), settings_of(reference)
    if not first or not second:
        return []
    return [
        f"{name} {_short(first.get(name, NOTHING))}, not {_short(second.get(name, NOTHING))}"
        for name in first | second
        if not name.startswith(CACHE)
        and not WHERE.fullmatch(name)
        and first.get(name) != second.get(name)
    ]


def settings_of(clip: Path) -> dict[str, str]:
    """Return the model and the settings of a clip's run; {} without a report of it."""
    try:
        report = read_json(clip.with_suffix(".json"))
        return {"model": str(report["model"]), **dotted(report["config"])}
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _short(value: str) -> str:
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."


def match(ours: Path, reference: Path) -> tuple[dict[str, tuple[Path, Path]], dict[str, str]]:
    """Return the pairs to compare by name, and why others have none."""
    for path in (ours, reference):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    is_single = [not path.is_dir() or is_clip(path) for path in (ours, reference)]
    if all(is_single):
        return {ours.stem if ours.is_file() else ours.name: (ours, reference)}, {}
    if any(is_single):
        raise UserError(f"{ours} and {reference}: compare two clips or two folders of clips")
    first, second = list_clips(ours), list_clips(reference)
    pairs = {name: (path, second[name]) for name, path in first.items() if name in second}
    failures = {name: f"{name}: not in {reference}" for name in first if name not in second}
    failures |= {name: f"{name}: not in {ours}" for name in second if name not in first}
    return pairs, failures


def make_network(metrics: Sequence[str], weights: Path | None, *, device: torch.device) -> Network:
    """Load what computes LPIPS; without weights it is left out, unless LPIPS alone is wanted."""
    if "lpips" not in metrics:
        return Network()
    try:
        found = find_weights(weights)
    except UserError as error:
        if weights is not None or len(metrics) == 1:
            raise
        return Network(note=f"LPIPS is empty: {error}")
    digests = found.digests()
    note = ""
    if not digests["backbone"].startswith(BACKBONE_DIGEST):
        note = (
            f"LPIPS is not comparable with published values: {found.backbone} is not the released "
            f"AlexNet, whose SHA-256 starts with {BACKBONE_DIGEST}"
        )
    return Network(load_lpips(found, device=device), digests, note)


def table(found: Comparison) -> list[list[str]]:
    """Return the head and the rows of the table: every clip, the mean, its confidence interval."""
    head = ["clip", "frames", *(UNITS[metric] for metric in found.metrics)]
    rows = [
        [clip.name, str(clip.num_frames), *(_cell(clip.clip.get(m), m) for m in found.metrics)]
        for clip in found.clips
    ]
    means, intervals = ["mean", ""], [f"{CONFIDENCE:.0%} interval", ""]
    for metric in found.metrics:
        over = average(clip.clip[metric] for clip in found.clips if metric in clip.clip)
        means.append(_cell(over.mean, metric))
        width = over.half_width
        intervals.append("-" if width is None else "± " + _cell(width, metric))
    return [head, *rows, means, intervals]


def _cell(value: float | None, metric: str) -> str:
    return "-" if value is None else f"{value:.{DIGITS[metric]}f}"


def notes(found: Comparison) -> list[str]:
    """Return what people should know about the table."""
    lines = [f"note: {found.network.note}"] if found.network.note else []
    for difference, clips in found.unlike.items():
        of = "" if len(found.clips) == 1 else f" (in {len(clips)} of {len(found.clips)} clips)"
        lines.append(f"WARNING the runs differ in more than the cache: {difference}{of}")
    if found.unlike:
        name = found.clips[0].name if len(found.clips) == 1 else "each"
        lines.append(f"to see the cache alone, compare {name} with its own command and {NO_REUSE}")
    if "psnr" in found.metrics:
        num_equal = average(clip.clip["psnr"] for clip in found.clips).num_infinite
        if num_equal:
            lines.append(
                f"note: {num_equal} of {len(found.clips)} clips equal their references: their PSNR "
                "is infinite and left out of the mean"
            )
    lines += dict.fromkeys(f"ALARM {alarm}" for clip in found.clips for alarm in clip.alarms)
    for metric in found.measured:
        worst = worst_frames(found.clips, metric, count=NUM_WORST)
        frames = ", ".join(f"{f.clip} #{f.index} {_cell(f.value, metric)}" for f in worst)
        lines.append(f"worst {UNITS[metric]}: {frames}")
    return lines


def text_table(found: Comparison) -> str:
    """Return the table and the notes for a terminal."""
    rows = table(found)
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([name.ljust(first), *right]))
    return "\n".join([*lines, *notes(found)])


def write_files(
    found: Comparison, folder: Path, inputs: Sequence[Path], *, device: torch.device
) -> None:
    """Write everything as JSON, the values as CSV, the table as Markdown."""
    write_json(folder / FILES[0], to_dict(found, inputs, device=device))
    write_text(folder / FILES[1], csv_text(found))
    write_text(folder / FILES[2], markdown(found))


def markdown(found: Comparison) -> str:
    """Return the table and the notes as Markdown."""
    head, *rows = table(found)
    ruler = ["---", *["---:"] * (len(head) - 1)]
    lines = [table_row(map(escaped, row)) for row in (head, ruler, *rows)]
    bullets = [f"- {escaped(line)}" for line in notes(found)]
    bullets += [f"- not compared: {escaped(reason)}" for reason in found.failures.values()]
    return "\n".join([*lines, "", *bullets]) + "\n"


def csv_text(found: Comparison) -> str:
    """Return a row per frame, and one per clip whose frame is "all"."""
    rows: list[list[object]] = [["clip", "frame", *found.metrics]]
    for clip in found.clips:
        for index in range(clip.num_frames):
            values = [clip.frames[m][index] if m in clip.frames else None for m in found.metrics]
            rows.append([clip.name, index, *values])
        rows.append([clip.name, "all", *(clip.clip.get(m) for m in found.metrics)])
    return csv_of(rows)


def to_dict(found: Comparison, inputs: Sequence[Path], *, device: torch.device) -> dict[str, Any]:
    """Return everything as plain values for JSON; an infinite PSNR is the text `inf`."""
    averages: dict[str, Any] = {}
    worst: dict[str, Any] = {}
    for metric in found.measured:
        over = average(clip.clip[metric] for clip in found.clips)
        averages[metric] = {**vars(over), "method": f"Student's t, {CONFIDENCE:.0%}"}
        frames = worst_frames(found.clips, metric, count=NUM_WORST)
        worst[metric] = [[frame.clip, frame.index, _finite(frame.value)] for frame in frames]
    return {
        "schema_version": 1,
        "inputs": [str(path) for path in inputs],
        "metrics": list(found.metrics),
        "averages": averages,
        "worst": worst,
        "clips": {
            clip.name: {
                "num_frames": clip.num_frames,
                "alarms": list(clip.alarms),
                "clip": {metric: _finite(value) for metric, value in clip.clip.items()},
                "frames": {m: [_finite(value) for value in v] for m, v in clip.frames.items()},
            }
            for clip in found.clips
        },
        "failures": found.failures,
        "unlike": found.unlike,
        "lpips": {"sha256": found.network.digests, "note": found.network.note},
        "environment": environment(device),
    }


def _finite(value: float) -> float | str:
    """Return a number that JSON can hold; an infinite one as text."""
    return str(value) if math.isinf(value) else value
