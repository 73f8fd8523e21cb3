"""PSNR and SSIM of clips against scikit-image and against numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
from closeness import assert_close
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.metrics import psnr, psnr_per_frame, ssim, ssim_per_frame

pytestmark = pytest.mark.numeric


def textured_clip(seed: int, *, num_frames: int = 3, height: int = 24, width: int = 37) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    generator = torch.Generator().manual_seed(seed)
    phase = torch.rand(num_frames, 1, 1, 3, generator=generator) * 6
    waves = torch.sin(rows[..., None] / 3 + phase) + torch.cos(columns[..., None] / 5 - phase)
    noise = torch.randn(num_frames, height, width, 3, generator=generator) * 12
    return (128 + 50 * waves + noise).clamp(0, 255).to(torch.uint8)


def noisy(clip: Tensor, *, level: float) -> Tensor:
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(9)) * level
    return (clip.float() + noise).clamp(0, 255).to(torch.uint8)


def test_ssim_of_every_frame_equals_that_of_scikit_image() -> None:
    reference = textured_clip(0)
    clip = noisy(reference, level=25)
    clip[2] = 0
    expected = [
        structural_similarity(
            frame,
            other,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        for frame, other in zip(clip.numpy(), reference.numpy(), strict=True)
    ]
    assert expected[0] < 0.95
    # ours adds windows up in float32, and takes small differences of large squares
    assert_close(ssim_per_frame(clip, reference), expected, ulps=256, dtype=torch.float32)
    assert_close(ssim(clip, reference), np.mean(expected), ulps=256, dtype=torch.float32)


def test_psnr_of_clip_and_frames_equals_that_of_scikit_image() -> None:
    reference = textured_clip(1)
    clip = noisy(reference, level=10)
    whole = peak_signal_noise_ratio(reference.numpy(), clip.numpy(), data_range=255)
    assert_close(psnr(clip, reference), whole, ulps=64)
    frames = [
        peak_signal_noise_ratio(other, frame, data_range=255)
        for frame, other in zip(clip.numpy(), reference.numpy(), strict=True)
    ]
    assert_close(psnr_per_frame(clip, reference), frames, ulps=64)


def test_psnr_takes_one_mean_squared_error_over_the_clip() -> None:
    reference = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    clip = reference.clone()
    clip[1] -= 1
    assert psnr(clip, reference) == pytest.approx(10 * math.log10(255**2 / 0.5))
    assert psnr_per_frame(clip, reference).tolist() == [
        math.inf,
        pytest.approx(10 * math.log10(255**2)),
    ]


def test_the_largest_error_does_not_overflow() -> None:
    black, white = (torch.full((1, 600, 600, 3), level, dtype=torch.uint8) for level in (0, 255))
    assert psnr(black, white) == psnr(white, black) == 0


def test_equal_clips_have_infinite_psnr_and_similarity_one() -> None:
    clip = textured_clip(2)
    assert psnr(clip, clip.clone()) == math.inf
    assert torch.equal(ssim_per_frame(clip, clip.clone()), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("metric", [psnr, psnr_per_frame, ssim, ssim_per_frame])
def test_clips_that_cannot_be_compared_are_named_in_one_line(metric: object) -> None:
    assert callable(metric)
    clip = textured_clip(3)
    for other, words in (
        (clip[:2], r"got \[3, 24, 37, 3\] and reference \[2, 24, 37, 3\]"),
        (clip.float(), r"the reference must be uint8 .* got torch.float32 \[3, 24, 37, 3\]"),
        (clip[0], r"the reference must be uint8 .* got torch.uint8 \[24, 37, 3\]"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            metric(clip, other)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="hold no pixels"):
        metric(clip[:0], clip[:0])


def test_frames_below_the_window_of_ssim_are_refused() -> None:
    tiny = textured_clip(4, height=10)
    with pytest.raises(UserError, match="at least 11 x 11 pixels, got 37 x 10"):
        ssim(tiny, tiny)
    smallest = textured_clip(4, height=11)
    assert ssim(smallest, smallest) == 1
