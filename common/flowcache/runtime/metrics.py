"""Compare clips with references of the same prompt and seed: PSNR, SSIM, LPIPS, means over clips.

Axes: T frames, H rows, W columns, 3 colours. Clips are uint8 pixels, read a few frames at a time
and turned into float one by one: a long clip needs no more memory than a short one.

Source: the published FlowCache numbers use PSNR from one mean squared error over the whole clip,
and SSIM with data range 1.
"""

import math
import re
import statistics
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from scipy.stats import t as student_t
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from flowcache.errors import UserError, one_line
from flowcache.runtime.checks import DegenerateCheck
from flowcache.runtime.files import ARRAY_ERRORS
from flowcache.runtime.lpips import LPIPS, MIN_SIDE
from flowcache.runtime.video import Pixels, read_image, stream_video

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
ARRAY_SUFFIXES = (".npy", ".npz")
METRICS = ("psnr", "ssim", "lpips")
BATCH_FRAMES = 4
"""Frames that are in memory at once, of either clip."""
CONFIDENCE = 0.95
PIXEL_MAX = 255
SSIM_SIGMA = 1.5
"""Standard deviation of the window in pixels. Source: Wang et al. 2004, section III.B."""
SSIM_BORDER = 5
"""Pixels at each edge whose 11 x 11 window would leave the frame; they are left out."""


def psnr(clip_THW3: Tensor, reference_THW3: Tensor) -> float:
    """Return the peak signal-to-noise ratio of the whole clip in dB, `inf` for equal clips.

    ``10 log10(255^2 / mse)`` with one mean squared error over all frames, pixels and colours. It
    is not the mean of the frames' ratios: with frames of error 0 and 1 it is 51.1 dB, while that
    mean is infinite.
    """
    return decibel(mse_per_frame(clip_THW3, reference_THW3).mean()).item()


def psnr_per_frame(clip_THW3: Tensor, reference_THW3: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of every frame in dB, float64 [T]; see `psnr`."""
    return decibel(mse_per_frame(clip_THW3, reference_THW3))


def mse_per_frame(clip_THW3: Tensor, reference_THW3: Tensor) -> Tensor:
    """Return the mean squared error of every frame in squared pixel levels, float64 [T]."""
    check_comparable(clip_THW3, reference_THW3)
    sums = [
        (frame.int() - reference.int()).square().sum()
        for frame, reference in zip(clip_THW3, reference_THW3, strict=True)
    ]
    return torch.stack(sums).double().cpu() / math.prod(clip_THW3.shape[1:])


def decibel(mse: Tensor) -> Tensor:
    """Return the signal-to-noise ratio in dB of mean squared errors in squared pixel levels."""
    return 10 * torch.log10(PIXEL_MAX**2 / mse)


def ssim(clip_THW3: Tensor, reference_THW3: Tensor) -> float:
    """Return the mean structural similarity of the frames, -1 to 1; see `ssim_per_frame`."""
    return ssim_per_frame(clip_THW3, reference_THW3).mean().item()


def ssim_per_frame(clip_THW3: Tensor, reference_THW3: Tensor) -> Tensor:
    """Return the structural similarity of every frame, float64 [T], -1 to 1, 1 for equal frames.

    Gaussian window of 11 x 11 pixels, data range 1, mean over colours and over the pixels whose
    window lies inside the frame.

    Source: Wang et al. 2004, Image Quality Assessment: From Error Visibility to Structural
    Similarity.
    """
    check_comparable(clip_THW3, reference_THW3)
    window = 2 * SSIM_BORDER + 1
    if min(clip_THW3.shape[1:3]) < window:
        height, width = clip_THW3.shape[1:3]
        raise UserError(
            f"SSIM needs frames of at least {window} x {window} pixels, got {width} x {height}; "
            "compare larger clips or use PSNR"
        )
    with exact_convolutions():
        frames = [_frame_ssim(*pair) for pair in zip(clip_THW3, reference_THW3, strict=True)]
    return torch.stack(frames).cpu()


def exact_convolutions() -> AbstractContextManager[None]:
    """Keep CUDA from rounding the inputs of convolutions to 10 bits (TF32), its default."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _frame_ssim(frame_HW3: Tensor, reference_HW3: Tensor) -> Tensor:
    image, reference = (
        rearrange(pixels, "h w c -> 1 c h w").float() / PIXEL_MAX
        for pixels in (frame_HW3, reference_HW3)
    )
    # the library's own mean counts the mirrored border too
    _, map_13HW = structural_similarity_index_measure(
        image, reference, data_range=1.0, sigma=SSIM_SIGMA, return_full_image=True
    )
    inner = slice(SSIM_BORDER, -SSIM_BORDER)
    return map_13HW[..., inner, inner].double().mean()


def lpips_per_frame(network: LPIPS, clip_THW3: Tensor, reference_THW3: Tensor) -> Tensor:
    """Return the mean distance of every frame, float64 [T], 0 for equal frames."""
    check_comparable(clip_THW3, reference_THW3)
    height, width = clip_THW3.shape[1:3]
    if min(height, width) < MIN_SIDE:
        raise UserError(
            f"LPIPS needs frames of at least {MIN_SIDE} x {MIN_SIDE} pixels, got {width} x "
            f"{height}; compare larger clips or use other metrics"
        )
    device = network.shift_311.device
    frames: list[Tensor] = []
    with torch.inference_mode(), exact_convolutions():
        for pair in zip(clip_THW3, reference_THW3, strict=True):
            image, reference = (
                rearrange(frame.to(device), "h w c -> 1 c h w").float() / PIXEL_MAX * 2 - 1
                for frame in pair
            )
            frames.append(network(image, reference).double().mean())
    return torch.stack(frames).cpu()


def check_comparable(clip_THW3: Tensor, reference_THW3: Tensor) -> None:
    """Refuse clips that differ in shape, are empty, or are not uint8 [T, H, W, 3]."""
    for name, pixels in (("clip", clip_THW3), ("reference", reference_THW3)):
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise UserError(
                f"the {name} must be uint8 pixels [T, H, W, 3], got {pixels.dtype} "
                f"{list(pixels.shape)}; convert it first"
            )
    if clip_THW3.shape != reference_THW3.shape:
        raise UserError(
            f"clips of one shape are needed, got {list(clip_THW3.shape)} and reference "
            f"{list(reference_THW3.shape)} [T, H, W, 3]; compare runs of equal length and size"
        )
    if clip_THW3.numel() == 0:
        raise UserError(f"the clips hold no pixels: shape {list(clip_THW3.shape)} [T, H, W, 3]")


# Clips --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrameStream:
    """The frames of a clip, read as they are asked for."""

    path: Path
    size: tuple[int, int]
    """Height and width in pixels."""
    frames: Generator[Pixels, None, None]
    """Each uint8 `[H, W, 3]`."""


def is_clip(path: Path) -> bool:
    """Tell whether a path is one clip: a video, an array, or a folder of PNG files."""
    if path.is_dir():
        return bool(_png_files(path))
    return path.suffix.lower() in VIDEO_SUFFIXES + ARRAY_SUFFIXES


def list_clips(folder: Path) -> dict[str, Path]:
    """Return the clips of a folder by name without suffix; hidden files are left out."""
    clips: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not is_clip(path):
            continue
        name = path.name if path.is_dir() else path.stem
        if name in clips:
            raise UserError(
                f"{folder}: {clips[name].name} and {path.name} are two clips of one name: keep one"
            )
        clips[name] = path
    if not clips:
        kinds = ", ".join(VIDEO_SUFFIXES + ARRAY_SUFFIXES)
        raise UserError(f"{folder}: holds no clip ({kinds}, or folders of PNG files)")
    return clips


def open_clip(path: Path) -> FrameStream:
    """Open a clip; what kind it is shows in the suffix.

    Args:
        path: a video; an `.npy` or `.npz` that holds one uint8 array `[T, H, W, 3]`; or a folder
            of PNG files, in the order of the numbers in their names.
    """
    if path.is_dir():
        return _open_images(path)
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return _open_array(path)
    size, frames = stream_video(path)
    return FrameStream(path, size, frames)


def _open_images(folder: Path) -> FrameStream:
    paths = _png_files(folder)
    if not paths:
        raise UserError(f"{folder}: a folder without PNG files, so no clip")
    first = read_image(paths[0])
    size = (first.height, first.width)

    def frames() -> Generator[Pixels, None, None]:
        for path in paths:
            frame = np.asarray(read_image(path))
            if frame.shape[:2] != size:
                raise UserError(
                    f"{path}: {frame.shape[1]}x{frame.shape[0]} pixels, but the first frame has "
                    f"{size[1]}x{size[0]}"
                )
            yield frame

    return FrameStream(folder, size, frames())


def _png_files(folder: Path) -> list[Path]:
    """Return the PNG files of a folder, `frame_2` before `frame_10`."""

    def order(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.stem)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    found = (path for path in folder.iterdir() if path.suffix.lower() == ".png")
    return sorted((path for path in found if not path.name.startswith(".")), key=order)


def _open_array(path: Path) -> FrameStream:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = list(content.values()) if isinstance(content, np.lib.npyio.NpzFile) else [content]
    except ARRAY_ERRORS as error:
        reason = one_line(error) or type(error).__name__
        raise UserError(f"{path}: not an array file of numpy ({reason[:200]})") from None
    if len(arrays) != 1:
        raise UserError(f"{path}: must hold one array, not {len(arrays)}")
    pixels = arrays[0]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or not pixels.size:
        raise UserError(
            f"{path}: must hold uint8 pixels [T, H, W, 3], found {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    _, height, width, _ = pixels.shape
    return FrameStream(path, (height, width), (np.array(frame) for frame in pixels))


# Comparison ---------------------------------------------------------------------------------------


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
    """Measure one clip against its reference."""
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
    """Yield a few frames of both clips at a time, uint8 `[T, H, W, 3]`; `checks` see them, too."""
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
