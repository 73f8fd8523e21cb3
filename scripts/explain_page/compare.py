"""What differs between two runs: figures, settings, pixels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from explain_page.frames import Clip
from explain_page.run import Run
from explain_page.units import percent, seconds_text
from flowcache.errors import UserError
from flowcache.runtime.metrics import psnr, psnr_per_frame, ssim_per_frame
from flowcache.runtime.stats import scaled

NOTHING = "–"


@dataclass(frozen=True)
class Metrics:
    """How near video B is to video A."""

    psnr: float
    """Of the whole clip, in dB."""
    ssim: float
    """Mean over frames."""
    psnr_T: Sequence[float]
    ssim_T: Sequence[float]


def measure(clips: Sequence[Clip]) -> Metrics | str:
    """Compare video B with video A, or say why that can't be done."""
    pixels = [clip.frames_THW3 for clip in clips]
    reference, clip = pixels
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


def figure_rows(runs: Sequence[Run], metrics: Metrics | str | None) -> list[tuple[str, ...]]:
    """Return rows of a table: a figure, its value in every run, and B / A if there are two."""
    columns = [_figures(run) for run in runs]
    rows: list[tuple[str, ...]] = []
    for name, (_, shown) in columns[0].items():
        cells = [shown, *(column[name][1] for column in columns[1:])]
        if len(columns) == 2:
            cells.append(_ratio(columns[1][name][0], columns[0][name][0]))
        rows.append((name, *cells))
    if isinstance(metrics, Metrics):
        rows.append(("PSNR of B against A", NOTHING, decibel(metrics.psnr), NOTHING))
        rows.append(("SSIM of B against A", NOTHING, f"{metrics.ssim:.4f}", NOTHING))
    return rows


def setting_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return the settings that differ between two runs: name, value in A, value in B."""
    flat = [_flat(_settings(run)) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [(name, *(settings.get(name, NOTHING) for settings in flat)) for name in names]
    return [row for row in rows if row[1] != row[2]]


def all_settings(run: Run) -> list[tuple[str, str]]:
    """Return every setting and the environment of a run by dotted names."""
    return list(_flat(_settings(run)).items())


def decibel(value: float) -> str:
    """Write a ratio in dB."""
    return "∞ (equal pixels)" if math.isinf(value) else f"{value:.2f} dB"


def _settings(run: Run) -> dict[str, Any]:
    named = {name: run.record[name] for name in ("model", "preset")}
    return named | {"config": run.record["config"], "environment": run.record["environment"]}


def _figures(run: Run) -> dict[str, tuple[float | None, str]]:
    """Return figures by name, as a number and as people read it."""
    distances = run.distances()
    spread = f"{min(distances):.3g} to {max(distances):.3g}" if distances else NOTHING
    tokens = run.peak_tokens
    return {
        "chunk passes": (len(run.rows), str(len(run.rows))),
        "computed": (run.num_computed, f"{run.num_computed} ({percent(run.computed_share)})"),
        "FLOPs spent on chunk passes": (run.flops, scaled(run.flops, "FLOP")),
        "FLOPs saved by reuse": (run.flops_saved, scaled(run.flops_saved, "FLOP")),
        "seconds of all stages": (
            run.seconds,
            NOTHING if run.seconds is None else seconds_text(run.seconds),
        ),
        "distances": (None, spread),
        "most clean tokens in the cache": (tokens, NOTHING if tokens is None else f"{tokens:.1f}"),
    }


def _ratio(value: float | None, reference: float | None) -> str:
    return f"{value / reference:.3f}" if value is not None and reference else NOTHING


def _flat(settings: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, prefix=f"{prefix}{name}.")
        else:
            found[prefix + name] = NOTHING if value is None else str(value)
    return found
