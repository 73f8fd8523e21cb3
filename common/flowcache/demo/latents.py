"""The training set of the transformer: clips drawn once, encoded once, kept on disk in shards.

Axes: N clips, C latent channels, F latent frames, h/w latent rows/columns.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowcache.demo.clips import Attributes, draw
from flowcache.demo.trainer import save_atomically

logger = logging.getLogger(__name__)
SHARD_CLIPS = 50
_BATCH_CLIPS = 10
_BANK_SEED = 1


@dataclass(frozen=True)
class LatentBank:
    """Normalised latents `[N, C, F, h, w]` (float16) with the caption of each."""

    latents: Tensor
    captions: list[str]

    def batch(self, rng: np.random.Generator, size: int) -> tuple[Tensor, list[str]]:
        """Draw `size` clips: latents in float32 and captions."""
        chosen = rng.integers(len(self.captions), size=size)
        return self.latents[torch.from_numpy(chosen)].float(), [self.captions[i] for i in chosen]


def encode_shards(
    encode: Callable[[np.ndarray], Tensor],
    pool: list[Attributes],
    *,
    num_clips: int,
    num_frames: int,
    folder: Path,
) -> None:
    """Draw and encode the shards that `folder` lacks.

    Args:
        encode: maps clips, uint8 `[N, T, H, W, 3]`, to latents `[N, C, F, h, w]`, not normalised.
        pool: attributes to draw from.
        num_clips: clips wanted in all, rounded up to whole shards.
        num_frames: length of each clip in pixel frames.
        folder: where the shards lie.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(-(-num_clips // SHARD_CLIPS)):
        path = folder / f"latents-{index:04d}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng((_BANK_SEED, index))
        clips = [draw(rng, pool, num_frames=num_frames) for _ in range(SHARD_CLIPS)]
        frames = np.stack([frames for _, frames in clips])
        portions = np.split(frames, SHARD_CLIPS // _BATCH_CLIPS)
        latents = torch.cat([encode(portion) for portion in portions]).half()
        captions = [attributes.caption for attributes, _ in clips]
        save_atomically({"latents": latents, "captions": captions}, path)
        logger.info("encoded %s", path.name)


def measure_channels(latents_NCFhw: Tensor) -> tuple[list[float], list[float]]:
    """Measure the mean and the standard deviation of each latent channel."""
    values = latents_NCFhw.double()
    axes = (0, 2, 3, 4)
    return values.mean(axes).tolist(), values.std(axes).tolist()


def load_bank(folder: Path, *, mean: list[float], std: list[float]) -> LatentBank:
    """Load all shards and normalise them per channel."""
    shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("latents-*.pt"))]
    shape = (1, -1, 1, 1, 1)
    latents = torch.cat([shard["latents"].float() for shard in shards])
    latents = (latents - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    return LatentBank(latents.half(), [name for shard in shards for name in shard["captions"]])
