"""What a video of a Wan model is made from: encoded prompts, images, the end of a video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.video import read_image, read_video, to_pixels

if TYPE_CHECKING:
    from PIL import Image

BILINEAR = 2
"""Of Pillow's filters; antialiased."""


@dataclass(frozen=True)
class Media:
    """The given pictures, as pixels of the final size."""

    image: Tensor | None = None
    """`[3, 1, H, W]` in -1..1."""
    end_image: Tensor | None = None
    """`[3, 1, H, W]` in -1..1."""
    video: Tensor | None = None
    """The whole video to extend, uint8 `[T, H, W, 3]`."""


@dataclass(frozen=True)
class Conditioning:
    """What the video is made from, encoded or as pixels in -1..1 of the final size."""

    text: Mapping[str, Tensor]
    """Branch name -> text encoder output `[1, L, D]`; "uncond" only where guidance is on."""
    image_features: Tensor | None = None
    """CLIP features `[1, 257, 1280]`, I2V models only."""
    image: Tensor | None = None
    """Start image, `[3, 1, H, W]`."""
    end_image: Tensor | None = None
    """End image, `[3, 1, H, W]`."""
    video: Tensor | None = None
    """Last frames of the video to extend, `[3, T, H, W]`."""
    scenes: Sequence[Tensor] = ()
    """Text encoder output of the prompts that follow the first one."""

    @property
    def given(self) -> Tensor | None:
        """What the first chunks show: the start image, or the end of a video."""
        return self.video if self.image is None else self.image


class Fit(Protocol):
    """Brings an image to a size: `[3, 1, height, width]` float32 in -1..1."""

    def __call__(self, image: Image.Image, *, height: int, width: int) -> Tensor:
        """Crop or scale."""
        ...


def stretched(image: Image.Image, *, height: int, width: int) -> Tensor:
    """Scale an image without regard to its shape; see `Fit`."""
    scaled = image.resize((width, height), resample=BILINEAR)
    return to_pixels(torch.from_numpy(np.array(scaled)).unsqueeze(0))


def read_media(config: Any, *, fit: Fit = stretched, end_image: str | None = None) -> Media:
    """Read the pictures that `image`, `video` with `overlap_history`, and `end_image` name."""
    size = (config.height, config.width)

    def read(path: str | None) -> Tensor | None:
        if path is None:
            return None
        return fit(read_image(Path(path)), height=size[0], width=size[1])

    video = None
    if config.video is not None:
        # it goes on playing at the rate of the new frames
        frames, _ = read_video(Path(config.video), fps=config.fps, size=size)
        needed = config.overlap_history or 0
        if len(frames) < needed:
            raise UserError(
                f"{config.video} has {len(frames)} frames at {config.fps} fps, fewer than "
                f"overlap_history {needed}, which the new frames continue: give a longer video"
            )
        video = torch.from_numpy(frames)
    return Media(read(config.image), read(end_image), video)
