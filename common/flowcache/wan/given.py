"""What a video of a Wan model is made from: encoded prompts, and an image or the end of a video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.video import read_image, read_video, to_pixels

BILINEAR = 2
"""Of Pillow's filters; antialiased."""


@dataclass(frozen=True)
class Media:
    """The given pictures, in the final size."""

    given: Tensor | None = None
    """What the first chunks show, `[3, T, H, W]` in -1..1: an image, or the end of a video."""
    video: Tensor | None = None
    """The whole video to extend, uint8 `[T, H, W, 3]`."""


@dataclass(frozen=True)
class Conditioning:
    """What a video is made from."""

    text: Mapping[str, Tensor]
    """Branch name -> text encoder output `[1, L, D]`."""
    given: Tensor | None = None
    """See `Media`."""
    scenes: Sequence[Tensor] = ()
    """Text encoder output of the prompts that follow the first one."""


def read_media(config: Any) -> Media:
    """Read the pictures that `image`, or `video` with `overlap_history`, name.

    An image is scaled to the final size without regard to its shape.
    """
    if config.image is not None:
        image = read_image(Path(config.image))
        scaled = image.resize((config.width, config.height), resample=BILINEAR)
        return Media(to_pixels(torch.from_numpy(np.array(scaled)).unsqueeze(0)))
    if config.video is None:
        return Media()
    size = (config.height, config.width)
    frames, _ = read_video(Path(config.video), fps=config.fps, size=size)
    history = config.overlap_history or 0
    if len(frames) < history:
        raise UserError(
            f"{config.video} has {len(frames)} frames at {config.fps} fps, fewer than "
            f"overlap_history {history}, which the new frames continue: give a longer video"
        )
    video = torch.from_numpy(frames)
    return Media(to_pixels(video[-history:]), video)
