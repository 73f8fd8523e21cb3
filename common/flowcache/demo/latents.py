"""The training set of the transformer: clips drawn once, encoded once, kept on disk in shards.

Axes: N clips, C latent channels, F latent frames, h/w latent rows/columns.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowcache.demo.clips import PAIR_SHARE, caption_of, draw, split_attributes
from flowcache.demo.trainer import save_atomically
from flowcache.demo.vae import to_signed

logger = logging.getLogger(__name__)
SHARD_CLIPS = 50
# Clips the latent statistics are measured on: the first shards.
STATISTICS_CLIPS = 200
CAPTION_DROP = 0.1
LATE_SHARE = 0.3
"""Share of the clips that begin after their shapes set out, as what follows given frames does."""
_BATCH_CLIPS = 10
_BANK_SEED = 1


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of every latent channel."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class LatentBank:
    """Normalised latents `[N, C, F, h, w]` (float16) with the caption of each.

    `is_beginning` says of each whether its caption names how it begins.
    """

    latents: Tensor
    captions: list[str]
    is_beginning: Tensor

    def batch(
        self, rng: np.random.Generator, needs_beginning: npt.NDArray[np.bool_]
    ) -> tuple[Tensor, list[str]]:
        """Draw clips: latents in float32 and captions.

        Args:
            needs_beginning: of each clip wanted, whether its caption must name how it begins.
        """
        beginnings = np.flatnonzero(self.is_beginning.numpy())
        chosen = [
            int(
                beginnings[rng.integers(len(beginnings))]
                if needs
                else rng.integers(len(self.captions))
            )
            for needs in needs_beginning
        ]
        return self.latents[chosen].float(), [self.captions[index] for index in chosen]


def drop_some(rng: np.random.Generator, captions: list[str]) -> list[str]:
    """Leave out some captions, for guidance."""
    is_dropped = rng.random(len(captions)) < CAPTION_DROP
    return ["" if drop else text for text, drop in zip(captions, is_dropped, strict=True)]


def encode_bank(
    encode: Callable[[Tensor], Tensor],
    *,
    num_clips: int,
    num_frames: int,
    folder: Path,
    known: Statistics | None = None,
) -> None:
    """Encode the shards that `folder` lacks, and measure the latents of the first ones.

    Args:
        encode: pixels `[B, 3, T, H, W]` to latents `[B, C, F, h, w]`, not normalised.
        num_clips: clips wanted in all, rounded up to whole shards.
        num_frames: length of each clip in pixel frames.
        folder: of the training; its `latents` holds the shards.
        known: statistics of a VAE that was trained before; None: they are measured.
    """
    shards = folder / "latents"
    shards.mkdir(parents=True, exist_ok=True)
    statistics = folder / "statistics.json"
    for wanted in (STATISTICS_CLIPS, num_clips):
        for index in range(-(-wanted // SHARD_CLIPS)):
            path = shards / f"latents-{index:04d}.pt"
            if not path.exists():
                _write_shard(encode, path, index=index, num_frames=num_frames)
        if not statistics.exists():
            statistics.write_text(json.dumps(asdict(known or _measured(folder))))


def _measured(folder: Path) -> Statistics:
    first_NCFhw = torch.cat([shard["latents"].float() for shard in _shards(folder)])
    values = first_NCFhw.half()[:STATISTICS_CLIPS].double()
    mean, std = (measure((0, 2, 3, 4)).tolist() for measure in (values.mean, values.std))
    return Statistics(mean, std)


def _write_shard(
    encode: Callable[[Tensor], Tensor], path: Path, *, index: int, num_frames: int
) -> None:
    seen, _ = split_attributes()
    rng = np.random.default_rng((_BANK_SEED, index))
    clips = [
        draw(rng, seen, num_frames=num_frames, pair_share=PAIR_SHARE, late_share=LATE_SHARE)
        for _ in range(SHARD_CLIPS)
    ]
    latents: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, SHARD_CLIPS, _BATCH_CLIPS):
            portion = clips[start : start + _BATCH_CLIPS]
            latents.append(encode(torch.stack([to_signed(clip.frames) for clip in portion])))
    shard = {
        "latents": torch.cat(latents).half(),
        "captions": [caption_of(clip.scene) for clip in clips],
        "is_beginning": torch.tensor([clip.is_beginning for clip in clips]),
    }
    save_atomically(shard, path)
    logger.info("encoded %s", path.name)


def read_statistics(folder: Path) -> Statistics:
    """Return the mean and the standard deviation of every latent channel."""
    return Statistics(**json.loads((folder / "statistics.json").read_text()))


def read_bank(folder: Path) -> LatentBank:
    """Load all shards of a training and normalise them per channel."""
    statistics, shards = read_statistics(folder), _shards(folder)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (statistics.mean, statistics.std)
    )
    latents = [((shard["latents"].float() - mean) / std).half() for shard in shards]
    captions = [caption for shard in shards for caption in shard["captions"]]
    logger.info("%d clips", len(captions))
    is_beginning = torch.cat([shard["is_beginning"] for shard in shards])
    return LatentBank(torch.cat(latents), captions, is_beginning)


def _shards(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "latents").glob("latents-*.pt"))
    return [torch.load(path, weights_only=True) for path in paths]
