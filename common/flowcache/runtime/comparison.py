"""Compare clips with their references, frame by frame in bounded memory, and sum up over clips."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.degenerate import DegenerateCheck
from flowcache.runtime.frames import FrameStream, open_clip
from flowcache.runtime.lpips import LPIPS, lpips_per_frame
from flowcache.runtime.metrics import decibel, mse_per_frame, ssim_per_frame
from flowcache.runtime.video import Pixels

METRICS = ("psnr", "ssim", "lpips")
BATCH_FRAMES = 4
"""Frames that are in memory at once, of either clip."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ClipFigures:
    """What was measured of one clip; a metric that was not asked for is missing."""

    name: str
    num_frames: int
    frames: Mapping[str, tuple[float, ...]]
    """Metric -> its value of every frame."""
    clip: Mapping[str, float]
    """Metric -> its value of the clip: PSNR of one mean squared error, else the frames' mean."""
    alarms: tuple[str, ...] = ()
    """Of the clip and of its reference: they show nothing, or do not move."""


@dataclass(frozen=True)
class Average:
    """A mean over clips and its 95 % confidence interval."""

    mean: float | None
    """None: there is no finite value."""
    half_width: float | None
    """The interval is mean -+ half_width; None with fewer than two clips."""
    num_clips: int
    num_infinite: int
    """Clips equal to their reference, whose PSNR is infinite; they are left out of the mean."""


@dataclass(frozen=True)
class Frame:
    """One frame and its value of some metric."""

    clip: str
    index: int
    value: float


def compare_clips(
    path: Path,
    reference: Path,
    *,
    name: str,
    metrics: Sequence[str] = METRICS,
    network: LPIPS | None = None,
    device: torch.device,
) -> ClipFigures:
    """Measure one clip against its reference.

    Args:
        path: the clip to judge, see `flowcache.runtime.frames.open_clip`.
        reference: what it is compared with.
        name: what the clip is called in the result.
        metrics: some of `METRICS`.
        network: what computes LPIPS; needed only for that.
        device: where the other metrics are computed.

    Raises:
        UserError: a clip can't be read, or the two differ in length or size.
    """
    per_frame: dict[str, list[Tensor]] = {metric: [] for metric in ("mse", *metrics)}
    ours, theirs = open_clip(path), open_clip(reference)
    checks = {path: DegenerateCheck(), reference: DegenerateCheck()}
    with closing(ours.frames), closing(theirs.frames):
        if ours.size != theirs.size:
            raise UserError(
                f"{path} is {_size(ours)} pixels and {reference} {_size(theirs)}: compare clips of "
                "one size"
            )
        for clip_THW3, reference_THW3 in _batches(ours, theirs, device=device, checks=checks):
            if "psnr" in metrics:
                per_frame["mse"].append(mse_per_frame(clip_THW3, reference_THW3))
                per_frame["psnr"].append(decibel(per_frame["mse"][-1]))
            if "ssim" in metrics:
                per_frame["ssim"].append(ssim_per_frame(clip_THW3, reference_THW3))
            if "lpips" in metrics:
                assert network is not None
                per_frame["lpips"].append(lpips_per_frame(network, clip_THW3, reference_THW3))
    joined = {key: torch.cat(parts) for key, parts in per_frame.items() if parts}
    clip = {metric: joined[metric].mean().item() for metric in metrics}
    if "psnr" in metrics:
        clip["psnr"] = decibel(joined["mse"].mean()).item()
    frames = {metric: tuple(joined[metric].tolist()) for metric in metrics}
    alarms = tuple(f"{file}: {line}" for file, check in checks.items() for line in check.alarms())
    return ClipFigures(name, len(frames[metrics[0]]), frames, clip, alarms)


def _batches(
    ours: FrameStream,
    theirs: FrameStream,
    *,
    device: torch.device,
    checks: Mapping[Path, DegenerateCheck],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a few frames of both clips at a time, uint8 `[T, H, W, 3]`.

    Args:
        checks: see the frames of each file, too.

    Raises:
        UserError: one clip ends before the other.
    """
    batch: list[tuple[Pixels, Pixels]] = []
    count = 0

    def tensors() -> tuple[Tensor, Tensor]:
        first, second = (
            torch.from_numpy(np.stack(frames)).to(device) for frames in zip(*batch, strict=True)
        )
        return first, second

    for frame, reference in zip_longest(ours.frames, theirs.frames):
        if frame is None or reference is None:
            longer = ours if reference is None else theirs
            total = count + 1 + sum(1 for _ in longer.frames)
            lengths = (total, count) if longer is ours else (count, total)
            raise UserError(
                f"{ours.path} has {lengths[0]} frames and {theirs.path} {lengths[1]}: compare "
                "clips of one length"
            )
        count += 1
        batch.append((frame, reference))
        for stream, shown in ((ours, frame), (theirs, reference)):
            checks[stream.path].see([shown])
        if len(batch) == BATCH_FRAMES:
            yield tensors()
            batch.clear()
    if count == 0:
        raise UserError(f"{ours.path}: holds no frame")
    if batch:
        yield tensors()


def _size(stream: FrameStream) -> str:
    return f"{stream.size[1]}x{stream.size[0]}"


def average(values: Iterable[float]) -> Average:
    """Return the mean over clips and its 95 % confidence interval by Student's t.

    Example: 1, 2, 3 have the mean 2, the deviation 1 and, as t is 4.303 with 2 degrees of freedom,
    the half width 4.303 * 1 / sqrt(3) = 2.484.
    """
    every = list(values)
    finite = [value for value in every if math.isfinite(value)]
    num_infinite = len(every) - len(finite)
    if not finite:
        return Average(None, None, 0, num_infinite)
    half_width = None
    if len(finite) > 1:
        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(finite) - 1))
        half_width = quantile * statistics.stdev(finite) / math.sqrt(len(finite))
    return Average(statistics.fmean(finite), half_width, len(finite), num_infinite)


def worst_frames(clips: Iterable[ClipFigures], metric: str, *, count: int) -> list[Frame]:
    """Return the frames that differ most from their references by a metric, worst first."""
    frames = [
        Frame(clip.name, index, value)
        for clip in clips
        for index, value in enumerate(clip.frames[metric])
    ]
    sign = -1 if metric == "lpips" else 1  # a distance; the others are likenesses
    return sorted(frames, key=lambda frame: sign * frame.value)[:count]
