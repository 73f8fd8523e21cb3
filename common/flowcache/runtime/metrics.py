"""Compare a clip with a reference clip of the same prompt and seed: PSNR and SSIM.

Axes: T frames, H rows, W columns, 3 colours. Clips are uint8 pixels; one frame at a time is turned
into float, so a long clip needs no more memory than a short one.

Source: the published FlowCache numbers use PSNR from one mean squared error over the whole clip,
and SSIM with data range 1.
"""

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from flowcache.errors import UserError

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

    Args:
        clip_THW3: uint8 pixels to judge.
        reference_THW3: uint8 pixels to compare with.

    Raises:
        UserError: The clips differ in shape, are empty, or are not uint8 [T, H, W, 3].
    """
    return decibel(mse_per_frame(clip_THW3, reference_THW3).mean()).item()


def psnr_per_frame(clip_THW3: Tensor, reference_THW3: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of every frame in dB, float64 [T]; see `psnr`."""
    return decibel(mse_per_frame(clip_THW3, reference_THW3))


def mse_per_frame(clip_THW3: Tensor, reference_THW3: Tensor) -> Tensor:
    """Return the mean squared error of every frame in squared pixel levels, float64 [T].

    Raises:
        UserError: As `psnr`.
    """
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

    Args:
        clip_THW3: uint8 pixels to judge.
        reference_THW3: uint8 pixels to compare with.

    Raises:
        UserError: As `psnr`, or the frames are smaller than the window.

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
        (pixels.movedim(-1, 0).unsqueeze(0).float() / PIXEL_MAX)
        for pixels in (frame_HW3, reference_HW3)
    )
    # the library's own mean counts the mirrored border too
    _, map_13HW = structural_similarity_index_measure(
        image, reference, data_range=1.0, sigma=SSIM_SIGMA, return_full_image=True
    )
    inner = slice(SSIM_BORDER, -SSIM_BORDER)
    return map_13HW[..., inner, inner].double().mean()


def check_comparable(clip_THW3: Tensor, reference_THW3: Tensor) -> None:
    """Refuse clips that differ in shape, are empty, or are not uint8 [T, H, W, 3].

    Raises:
        UserError: One of these.
    """
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
