"""Images and videos that a run starts from: what fits a model, and how an image is cropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.video import image_size, probe, to_pixels
from flowcache.wan.dit import DiTConfig
from skyreels_v2.config import RunConfig

if TYPE_CHECKING:
    from PIL import Image


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
