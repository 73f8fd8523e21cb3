"""Train a demo's VAE on drawn clips, whatever its architecture, and measure it.

Axes: B batch, T frames, H rows, W columns, C latent channels, F latent frames.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flowcache.demo.clips import Attributes, draw, draw_scene
from flowcache.demo.trainer import Loss, StepRandomness

_KL_WEIGHT = 1e-4
_SQUARE_WEIGHT = 3.0
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


def to_signed(frames: np.ndarray) -> Tensor:
    """Turn uint8 `[T, H, W, 3]` into float `[3, T, H, W]` in -1..1."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def autoencoder_loss(
    codec: Codec,
    pool: list[Attributes],
    *,
    shapes: tuple[BatchShape, ...],
    scene_share: float,
) -> Loss:
    """Make the loss of a training step: absolute and squared error, and a little KL divergence.

    Args:
        codec: model to train.
        pool: attributes that clips are drawn from.
        shapes: the batches, in turn.
        scene_share: share of `draw_scene` among the clips.
    """

    def loss(step: int, randomness: StepRandomness) -> Tensor:
        shape = shapes[step % len(shapes)]
        rng = randomness.numpy
        clips = [
            draw_scene(rng, num_frames=shape.num_frames)
            if rng.random() < scene_share
            else draw(rng, pool, num_frames=shape.num_frames)[1]
            for _ in range(shape.num_clips)
        ]
        video_B3THW = torch.stack([to_signed(clip) for clip in clips])
        video_B3THW[: shape.num_still] = video_B3THW[: shape.num_still, :, :1]
        mean_BCFhw = codec.encode(video_B3THW)
        noise = torch.randn(mean_BCFhw.shape, generator=randomness.torch)
        decoded_B3THW = codec.decode(mean_BCFhw + _POSTERIOR_STD * noise)
        error = decoded_B3THW - video_B3THW
        kl = mean_BCFhw.square().mean() / 2
        return error.abs().mean() + _SQUARE_WEIGHT * error.square().mean() + _KL_WEIGHT * kl

    return loss


def autoencoder_psnr(
    codec: Codec, pool: list[Attributes], *, num_clips: int, num_frames: int
) -> float:
    """Measure the mean PSNR in dB of drawn clips that were encoded (posterior mean) and decoded."""
    values = []
    for index in range(num_clips):
        rng = np.random.default_rng((_TEST_SEED, index))
        video_B3THW = to_signed(draw(rng, pool, num_frames=num_frames)[1])[None]
        with torch.inference_mode():
            decoded_B3THW = codec.decode(codec.encode(video_B3THW))
        # the range -1..1 is 2 wide: a peak's square is 4
        values.append(10 * np.log10(4 / float((decoded_B3THW - video_B3THW).square().mean())))
    return float(np.mean(values))
