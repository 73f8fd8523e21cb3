"""The table of long videos: what each way to bound the KV cache costs and keeps, by length.

A way is a method; each is a row at every length. Nothing is compared with a reference, since no two
of them make the same video: a clip is judged by its caption, and its end by its beginning.

Axes: T frames, H rows, W columns.
"""

import itertools
import statistics
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowcache.bench.continuity import EDGE_SHARE
from flowcache.bench.methods import Comparison, Method, shown
from flowcache.demo.clips import Attributes
from flowcache.demo.judge import judge, judge_steadiness
from flowcache.errors import UserError
from flowcache.runtime.model import Job, Progress
from flowcache.runtime.run import Clip
from flowcache.runtime.stats import RunStats
from flowcache.runtime.text_files import escaped, table_row
from flowcache.wan.vae import TEMPORAL_STRIDE, pixel_frames

LENGTHS = (21, 120, 480)
"""Latent frames."""
FILLED_SHARE = 0.25
"""Of a clip's chunks, after which the cache is full."""
MIN_CHUNKS = 3
"""At an end, from which on it is said how time and memory grow."""


def long_methods(comparison: Comparison, lengths: Sequence[int], *, key: str) -> tuple[Method, ...]:
    """Return a row for each way and length.

    Args:
        lengths: latent frames.
        key: setting of the number of pixel frames.
    """
    if not comparison.long:
        raise UserError("--table long: this model has no video without an end")
    if min(lengths) < 2 or len({*lengths}) < len(lengths):
        raise UserError(f"--lengths must be different numbers of 2 or more, not {[*lengths]}")
    return tuple(
        replace(
            method,
            name=f"{method.name}, {length}",
            overrides=(*method.overrides, f"{key}={pixel_frames(length)}"),
        )
        for length in lengths
        for method in comparison.long
    )


class LongProbe:
    """Follows one run of the table: what it took chunk by chunk, and what its clip shows."""

    def __init__(self, job: Job, attributes: Attributes) -> None:
        self.job, self.attributes = job, attributes
        self.moments = [time.process_time()]
        """Processor time at the start and whenever chunks were finished, in seconds."""
        self.kv_bytes = list[int]()
        """Of all caches, after each chunk."""

    def follow(self, progress: Iterable[Progress], stats: RunStats) -> Iterator[Progress]:
        """Pass on what a run shows."""
        self.moments = [time.process_time()]
        for each in progress:
            if each.tick.finishing:
                self.moments.append(time.process_time())
                self.kv_bytes.append(stats.kv_bytes)
            yield each

    def figures(self, clip: Clip) -> dict[str, Any]:
        """Return the figures of the clip, in addition to those of every table."""
        frames = clip.frames.numpy()
        (part,) = self.job.work.segments
        starts = [chunk.start for chunk in part.cut[1:]]
        window = getattr(self.job.config, "window", None)
        at_windows = [start for start in starts if window and start % window == 0]
        inside = {*range(1, part.cut[-1].stop)} - {*starts}
        seconds = [after - before for before, after in itertools.pairwise(self.moments)]
        steady = judge_steadiness(frames)
        return {
            "num_latents": part.cut[-1].stop,
            "seconds": self.moments[-1] - self.moments[0],
            "kv_bytes": max(self.kv_bytes),
            "kv_growth": growth(self.kv_bytes),
            "seconds_growth": growth(seconds),
            "steady": steady.passes,
            "kept_share": steady.kept_share,
            **drift(frames, self.attributes),
            "flicker_chunks": flicker(frames, starts, inside),
            "flicker_windows": flicker(frames, at_windows, {*starts} - {*at_windows}),
        }


def growth(values: Sequence[float]) -> float | None:
    """Return how the last values compare with those once the cache is full; None: too few.

    The last 15 % are divided by the 15 % from a quarter on; of each the lowest tenth is left out
    and the next value taken, which other work on the machine disturbs least. Example: of 160
    chunks the third lowest of chunks 136 to 159 over that of chunks 40 to 63.
    """
    count, first = round(EDGE_SHARE * len(values)), round(FILLED_SHARE * len(values))
    if count < MIN_CHUNKS:
        return None
    last, full = (sorted(part)[count // 10] for part in (values[-count:], values[first:][:count]))
    return last / full


def drift(frames_THW3: NDArray[np.uint8], attributes: Attributes) -> dict[str, Any]:
    """Compare the last 15 % of a clip with the first.

    Returns:
        drift_kept: the share of frames that keep the shape, less at the end by so much.
        drift_levels: the change of the mean colour, in grey levels.
        judge_end: whether the end alone agrees with the caption, in either direction.
    """
    count = max(round(EDGE_SHARE * len(frames_THW3)), TEMPORAL_STRIDE + 1)
    first, last = frames_THW3[:count], frames_THW3[-count:]
    kept = [judge_steadiness(part).kept_share for part in (first, last)]
    colors = [part.mean(axis=(0, 1, 2), dtype=np.float64) for part in (first, last)]
    return {
        "drift_kept": kept[0] - kept[1],
        "drift_levels": float(np.abs(colors[0] - colors[1]).mean()),
        "judge_end": all(judge(last).agrees(attributes, either_way=True).values()),
    }


def flicker(
    frames_THW3: NDArray[np.uint8], borders: Collection[int], others: Collection[int]
) -> float | None:
    """Return how much more the picture changes where something begins than elsewhere.

    Only changes between the frames of two latents count, as these differ from others: the mean at
    the borders is divided by the mean at the other latents. None: there are not both.

    Args:
        borders: latents with which something begins.
        others: latents to compare with.
    """
    change_T = np.abs(np.diff(frames_THW3.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    # latent n begins with frame 4 n - 3
    means = [
        float(np.mean([change_T[TEMPORAL_STRIDE * (latent - 1)] for latent in latents]))
        for latents in (borders, others)
        if latents
    ]
    return means[0] / means[1] if len(means) == 2 and means[1] else None


# Averages and table -------------------------------------------------------------------------------


def summarize_long(
    rows: Sequence[Mapping[str, Any]], methods: Sequence[Method]
) -> list[dict[str, Any]]:
    """Average the figures of each row of the table over the prompts."""
    return [_average(m, [row for row in rows if row["method"] == m.name]) for m in methods]


def _average(method: Method, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def mean(key: str) -> float | None:
        known = [float(row[key]) for row in rows if row[key] is not None]
        return statistics.fmean(known) if known else None

    means = ("seconds", "dit_seconds", "kv_growth", "seconds_growth", "kept_share", "drift_kept")
    means += ("drift_levels", "judge_end", "flicker_chunks", "flicker_windows", "judge_all")
    return {
        "method": method.name,
        "num_latents": rows[0]["num_latents"],
        "preset": method.preset,
        "overrides": list(method.overrides),
        "num_clips": len(rows),
        "gflops": statistics.fmean(row["flops"] for row in rows) / 1e9,
        "kv_bytes": max(row["kv_bytes"] for row in rows),
        **{key: mean(key) for key in means},
        "judge": {
            key: statistics.fmean(row["judge"][key] for row in rows) for key in rows[0]["judge"]
        },
        **{
            f"steady_{key}": statistics.fmean(row["steady"][key] for row in rows)
            for key in rows[0]["steady"]
        },
    }


def long_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the averages as a Markdown table."""
    head = ["method, latent frames", "GFLOP", "s", "KV MB", "judge", "at the end", "smooth"]
    head += ["whole", "shape kept", "lost", "colour", "chunks", "windows", "time", "KV"]
    lines = [table_row(head), "|" + "---|" * len(head)]
    for row in table:
        cells = [
            escaped(row["method"]),
            f"{row['gflops']:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['kv_bytes'] / 1e6:.2f}",
            f"{100 * row['judge_all']:.0f} %",
            f"{100 * row['judge_end']:.0f} %",
            *(f"{100 * row[f'steady_{name}']:.0f} %" for name in ("smooth", "whole")),
            f"{100 * row['kept_share']:.0f} %",
            f"{100 * row['drift_kept']:+.0f} %",
            f"{row['drift_levels']:.1f}",
            *(shown(row[f"flicker_{at}"], ".2f") for at in ("chunks", "windows")),
            *(shown(row[f"{what}_growth"], ".2f") for what in ("seconds", "kv")),
        ]
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


EXPLAINED = """
- s: processor time, text and VAE included; KV MB: measured, at most.
- judge: the caption is shown; at the end: by the last 15 % alone; smooth, whole: no rhythm of the
  VAE's stride, no jump and no shape in pieces.
- shape kept: share of frames; lost: how much less of the last 15 % than the first; colour: change
  of the mean colour between these, grey levels.
- chunks, windows: change of the picture where a chunk or window begins over that at other latents.
- time, KV: of a chunk in the last 15 % over one once the cache is full.
"""
"""What the columns are."""
