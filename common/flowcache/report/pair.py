"""What is measured of the runs of a page, and how two runs differ: figures, settings, pixels."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flowcache.errors import UserError
from flowcache.report.drawing import percent, seconds_text
from flowcache.report.run import Run
from flowcache.runtime.degenerate import DegenerateCheck
from flowcache.runtime.metrics import psnr, psnr_per_frame, ssim_per_frame
from flowcache.runtime.units import scaled
from flowcache.runtime.video import Pixels, read_video

NOTHING = "–"
WIDTHS = (320, 240, 160, 112, 80)
"""Pixels; the widest is taken whose pictures all fit into the page."""
JPEG_QUALITY = 82
MAX_BYTES = 2_500_000
"""Of all pictures of a page, as text."""


@dataclass(frozen=True)
class Clip:
    """A decoded video, or why there is none."""

    frames_THW3: Pixels | None
    problem: str | None


@dataclass(frozen=True)
class Metrics:
    """How near video B is to video A."""

    psnr: float
    """Of the whole clip, in dB."""
    ssim: float
    """Mean over frames."""
    psnr_T: Sequence[float]
    ssim_T: Sequence[float]


def read_clip(path: Path) -> Clip:
    """Read the video of a run; a missing or broken one is a problem to report, not an error."""
    try:
        return Clip(read_video(path)[0], None)
    except UserError as error:
        return Clip(None, str(error).replace(str(path), path.name))


def with_video_alarms(run: Run, clip: Clip) -> Run:
    """Add the alarms of the frames that a run made; those before its first chunk were given."""
    if clip.frames_THW3 is None:
        return run
    check = DegenerateCheck()
    check.see(clip.frames_THW3[min((shown.first for shown in run.shown), default=0) :])
    return replace(run, alarms=[*run.alarms, *check.alarms()])


def measure(clips: Sequence[Clip]) -> Metrics | str:
    """Compare video B with video A, or say why that can't be done."""
    reference, clip = (clip.frames_THW3 for clip in clips)
    if reference is None or clip is None:
        problems = (clip.problem for clip in clips if clip.problem is not None)
        return f"No metrics: {'; '.join(problems)}."
    pair = torch.from_numpy(clip), torch.from_numpy(reference)
    try:
        ssim_T = ssim_per_frame(*pair)
        return Metrics(
            psnr(*pair), ssim_T.mean().item(), psnr_per_frame(*pair).tolist(), ssim_T.tolist()
        )
    except UserError as error:
        return f"No metrics: {error}."


def decibel(value: float) -> str:
    """Write a ratio in dB."""
    return "∞ (equal pixels)" if math.isinf(value) else f"{value:.2f} dB"


def headline(run: Run) -> str:
    """Say which run it is in one line."""
    record = run.record
    threshold = "" if run.threshold is None else f", threshold {run.threshold:g}"
    preset = f", preset {record['preset']}" if record["preset"] else ""
    return (
        f"model {record['model']}{preset}, policy {record['policy']}{threshold}, "
        f"{record['num_steps']} steps"
    )


def summary(runs: Sequence[Run], metrics: Metrics | str | None) -> str:
    """Return what the page says in a few lines: settings, figures, alarms."""
    is_pair = len(runs) == 2
    lines = [f"{run.letter + ': ' if is_pair else ''}{run.name}: {headline(run)}" for run in runs]
    rows = figure_rows(runs, metrics)
    if is_pair:
        rows = [("", "A", "B", "B / A"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    if isinstance(metrics, str):
        lines.append(metrics)
    alarms = [f"ALARM {run.name}: {alarm}" for run in runs for alarm in run.alarms]
    return "\n".join([*lines, *(alarms or ["no alarm"])])


def figure_rows(runs: Sequence[Run], metrics: Metrics | str | None) -> list[tuple[str, ...]]:
    """Return rows of a table: a figure, its value in every run, and B / A if there are two."""
    columns = [_figures(run) for run in runs]
    rows: list[tuple[str, ...]] = []
    for name in columns[0]:
        values, cells = zip(*(column[name] for column in columns), strict=True)
        rows.append((name, *cells, *([_ratio(*values)] if len(runs) == 2 else [])))
    if isinstance(metrics, Metrics):
        rows.append(("PSNR of B against A", NOTHING, decibel(metrics.psnr), NOTHING))
        rows.append(("SSIM of B against A", NOTHING, f"{metrics.ssim:.4f}", NOTHING))
    return rows


def _figures(run: Run) -> dict[str, tuple[float | None, str]]:
    """Return figures by name, as a number and as people read it."""
    found, tokens, seconds = run.distances, run.peak_tokens, run.seconds
    spread = f"{min(found):.3g} to {max(found):.3g}" if found else NOTHING
    return {
        "chunk passes": (len(run.rows), str(len(run.rows))),
        "computed": (run.num_computed, f"{run.num_computed} ({percent(run.computed_share)})"),
        "FLOPs spent on chunk passes": (run.flops, scaled(run.flops, "FLOP")),
        "FLOPs saved by reuse": (run.flops_saved, scaled(run.flops_saved, "FLOP")),
        "seconds of all stages": (seconds, NOTHING if seconds is None else seconds_text(seconds)),
        "distances": (None, spread),
        "most clean tokens in the cache": (tokens, NOTHING if tokens is None else f"{tokens:.1f}"),
    }


def _ratio(reference: float | None, value: float | None) -> str:
    return f"{value / reference:.3f}" if value is not None and reference else NOTHING


def settings_of(run: Run) -> dict[str, str]:
    """Return every setting and the environment of a run by dotted names."""
    return _flat({name: run.record[name] for name in ("model", "preset", "config", "environment")})


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return the settings that differ between two runs: name, value in A, value in B."""
    first, second = (settings_of(run) for run in runs)
    rows = [(name, first.get(name, NOTHING), second.get(name, NOTHING)) for name in first | second]
    return [row for row in rows if row[1] != row[2]]


def _flat(settings: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, prefix=f"{prefix}{name}.")
        else:
            found[prefix + name] = NOTHING if value is None else str(value)
    return found


def pictures(clips: Sequence[Pixels], wanted: Sequence[int]) -> list[dict[int, str]]:
    """Return for every clip the wanted frames as JPEG data URIs, as wide as fits into the page."""
    numbers = sorted(set(wanted))
    for width in WIDTHS:
        found = [
            {at: _data_uri(clip[at], width=width) for at in numbers if at < len(clip)}
            for clip in clips
        ]
        if sum(len(uri) for uris in found for uri in uris.values()) <= MAX_BYTES:
            return found
    raise UserError(
        f"{len(numbers)} key frames do not fit into a page of 5 MB: explain a shorter video"
    )


def _data_uri(frame_HW3: Pixels, *, width: int) -> str:
    image = Image.fromarray(frame_HW3)
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
