"""Train a demo's VAE on drawn clips, of any architecture, and measure it.

Axes: B batch, T frames, H rows, W columns, C latent channels, F latent frames.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flowcache.demo.clips import PAIR_SHARE, draw, draw_crowd, split_attributes
from flowcache.demo.trainer import StepRandomness, Trainer, TrainPlan

logger = logging.getLogger(__name__)
VAE_TEST_CLIPS = 24
_KL_WEIGHT = 1e-4
_SQUARE_WEIGHT = 3.0
# What changes from frame to frame is little of a picture and all of a motion: without a weight of
# its own, the frames of one latent stand still and the next latent jumps.
_CHANGE_WEIGHT = 60.0
# The spread of the posterior is fixed: a learned one starts at 1 and drowns the picture for long.
# Generation uses the posterior's mean only.
_POSTERIOR_STD = 0.05
_TEST_SEED = 2


class Codec(Protocol):
    """A VAE's two directions."""

    def encode(self, video_B3THW: Tensor, /) -> Tensor:
        """Encode pixels in -1..1 to the posterior's mean, `[B, C, F, h, w]`."""
        ...

    def decode(self, latents_BCFhw: Tensor, /) -> Tensor:
        """Decode latents to pixels `[B, 3, T, H, W]` in -1..1."""
        ...


@dataclass(frozen=True)
class BatchShape:
    """Clips of a training step, frames of a clip, and how many of the clips stand still."""

    num_clips: int
    num_frames: int
    num_still: int = 0


@dataclass(frozen=True)
class ClipMixture:
    """What a VAE learns from: batches of these shapes in turn, some of crowds of shapes."""

    shapes: Sequence[BatchShape]
    crowd_share: float
    """Share of `draw_crowd` among the clips; the others have seen attributes."""

    def draw(self, step: int, rng: np.random.Generator) -> Tensor:
        """Draw the clips of a step, `[B, 3, T, H, W]` in -1..1."""
        shape = self.shapes[step % len(self.shapes)]
        seen, _ = split_attributes()
        clips = [
            draw_crowd(rng, num_frames=shape.num_frames)
            if rng.random() < self.crowd_share
            else draw(
                rng, seen, num_frames=shape.num_frames, pair_share=PAIR_SHARE, late_share=0.5
            ).frames
            for _ in range(shape.num_clips)
        ]
        video_B3THW = torch.stack([to_signed(clip) for clip in clips])
        video_B3THW[: shape.num_still] = video_B3THW[: shape.num_still, :, :1]
        return video_B3THW


def to_signed(frames: npt.NDArray[np.uint8]) -> Tensor:
    """Turn uint8 `[T, H, W, 3]` into float `[3, T, H, W]` in -1..1."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def train_autoencoder(
    module: nn.Module,
    codec: Codec,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    plan: TrainPlan,
    checkpoint: Path,
    clips: ClipMixture,
) -> None:
    """Train a VAE, or the part of it that `module` is; or load it if that is done.

    The loss is the absolute and the squared error of frames, the squared error of their changes,
    and a little KL divergence.
    """

    def loss(step: int, randomness: StepRandomness) -> Tensor:
        video_B3THW = clips.draw(step, randomness.numpy)
        mean_BCFhw = codec.encode(video_B3THW)
        noise = torch.randn(mean_BCFhw.shape, generator=randomness.torch)
        error = codec.decode(mean_BCFhw + _POSTERIOR_STD * noise) - video_B3THW
        kl = mean_BCFhw.square().mean() / 2
        changes = error.diff(dim=2).square().mean() if error.shape[2] > 1 else 0.0
        distance = error.abs().mean() + _SQUARE_WEIGHT * error.square().mean()
        return distance + _CHANGE_WEIGHT * changes + _KL_WEIGHT * kl

    Trainer(module, optimizers, plan=plan, checkpoint=checkpoint).run(loss)
    module.eval().requires_grad_(False)


def measured_psnr(codec: Codec, *, num_frames: int) -> float:
    """Return the mean PSNR in dB of clips of unseen attributes, encoded and decoded."""
    _, unseen = split_attributes()
    values: list[float] = []
    for index in range(VAE_TEST_CLIPS):
        rng = np.random.default_rng((_TEST_SEED, index))
        video_B3THW = to_signed(draw(rng, unseen, num_frames=num_frames).frames)[None]
        with torch.inference_mode():
            decoded_B3THW = codec.decode(codec.encode(video_B3THW))
        # the range -1..1 is 2 wide: a peak's square is 4
        values.append(10 * np.log10(4 / float((decoded_B3THW - video_B3THW).square().mean())))
    psnr = float(np.mean(values))
    logger.info("VAE: %.2f dB PSNR on %d unseen clips", psnr, VAE_TEST_CLIPS)
    return round(psnr, 2)
