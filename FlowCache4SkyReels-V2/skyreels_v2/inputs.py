"""Images and videos that a run starts from: read, cropped, scaled, as pixels in -1..1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.video import image_size, probe, read_image, read_video, to_pixels
from flowcache.wan.dit import DiTConfig
from skyreels_v2.config import RunConfig

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Media:
    """The given pictures, as pixels of the final size."""

    image: Tensor | None = None
    """`[3, 1, H, W]` in -1..1."""
    end_image: Tensor | None = None
    """`[3, 1, H, W]` in -1..1."""
    video: Tensor | None = None
    """The whole video to extend, uint8 `[T, H, W, 3]`."""


def read_media(config: RunConfig) -> Media:
    """Read the pictures that the settings name."""
    size = (config.height, config.width)
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
    return Media(_read_fitted(config.image, size), _read_fitted(config.end_image, size), video)


def turn_to_fit(config: RunConfig) -> RunConfig:
    """Swap height and width if the given picture is portrait and they are landscape.

    The picture is the start image, else the end image, else the video.
    """
    picture = config.end_image if config.image is None else config.image
    if picture is not None:
        height, width = image_size(Path(picture))
    elif config.video is not None:
        found = probe(Path(config.video))
        height, width = found.height, found.width
    else:
        return config
    if height > width and config.height < config.width:
        return replace(config, height=config.width, width=config.height)
    return config


def check_mode(config: RunConfig, model: DiTConfig) -> None:
    """Check that the model can make what the given pictures ask for."""
    if config.video is not None and (config.image is not None or config.end_image is not None):
        raise UserError(
            "video cannot be combined with image or end_image: its last frames are the start"
        )
    if model.model_type != "i2v":
        return
    if config.image is None:
        raise UserError("this is an image-to-video model: give image, the path of a start image")
    if config.end_image is not None or config.video is not None:
        raise UserError(
            "an image-to-video model starts from image alone: leave out end_image and video, or "
            "use a diffusion forcing (DF) model"
        )
    if config.num_frames > config.base_num_frames:
        raise UserError(
            f"an image-to-video model makes one window: num_frames {config.num_frames} must not "
            f"be above base_num_frames {config.base_num_frames}"
        )


def fit_image(image: Image.Image, *, height: int, width: int) -> Tensor:
    """Crop the middle of an image to the target's aspect and scale it (bicubic).

    At least one row and column of the image are left.

    Returns: `[3, 1, height, width]` float32 in -1..1.
    """
    from PIL import Image

    if image.width * height > image.height * width:
        cut_width, cut_height = max(int(image.height * width / height), 1), image.height
    else:
        cut_width, cut_height = image.width, max(int(image.width * height / width), 1)
    left, top = (image.width - cut_width) // 2, (image.height - cut_height) // 2
    cut = image.crop((left, top, left + cut_width, top + cut_height))
    scaled = cut.resize((width, height), Image.Resampling.BICUBIC)
    return to_pixels(torch.from_numpy(np.array(scaled)).unsqueeze(0))


def _read_fitted(path: str | None, size: tuple[int, int]) -> Tensor | None:
    if path is None:
        return None
    return fit_image(read_image(Path(path)), height=size[0], width=size[1])
