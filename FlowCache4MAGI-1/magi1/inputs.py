"""The image or video that a clip starts from: read, brought to rate and size, as pixels."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.video import Pixels, probe, read_image, read_video, to_pixels
from magi1.build import tiling_of
from magi1.settings import RunConfig
from magi1.vae import check_encoding

MAX_PREFIX_SECONDS = 5
"""Longest prefix where no number of frames is set. Source: the code published with FlowCache."""


def read_prefix(config: RunConfig) -> Tensor | None:
    """Read the given image or the given frames of the video.

    They are scaled to the size of the run, whatever their own aspect is, as in the release.

    Returns: `[3, T, H, W]` float32 in -1..1, T = 1 for an image; None: nothing is given.

    Raises:
        UserError: a file is missing, is not what it should be, or is too short.
    """
    run = config.runtime_config
    if config.image is not None:
        from PIL import Image

        size = (run.video_size_w, run.video_size_h)
        image = read_image(Path(config.image)).resize(size, Image.Resampling.BICUBIC)
        return to_pixels(torch.from_numpy(np.array(image)).unsqueeze(0))
    if config.video is not None:
        return to_pixels(torch.from_numpy(_read_frames(config, Path(config.video))))
    return None


def num_latents(prefix_3THW: Tensor | None, *, temporal_stride: int) -> int:
    """Return how many latents a prefix makes; a single frame makes one."""
    return 0 if prefix_3THW is None else math.ceil(prefix_3THW.shape[1] / temporal_stride)


def _read_frames(config: RunConfig, path: Path) -> Pixels:
    """Read the first `prefix_frames` at the run's rate, or the last seconds where it is null."""
    run, wanted = config.runtime_config, config.prefix_frames
    found = probe(path)
    places = resampled(found.num_frames, fps=found.fps, target_fps=run.fps)
    if wanted is None:
        places = _last_seconds(places, fps=run.fps)
        wanted = len(places)
        stride = run.temporal_downsample_factor
        if wanted != 1 and wanted % stride:
            raise UserError(
                f"{path}: {wanted} frames, whole seconds at {run.fps} fps, are no multiple of "
                f"{stride}: set prefix_frames"
            )
    elif len(places) < wanted:
        raise UserError(
            f"{path} has {len(places)} frames at {run.fps} fps, fewer than prefix_frames {wanted}: "
            "give a longer video, or lower prefix_frames"
        )
    check_encoding(
        tiling_of(config), num_frames=wanted, temporal_stride=run.temporal_downsample_factor
    )
    places = places[:wanted]
    size = (run.video_size_h, run.video_size_w)
    first = places[0]
    frames, _ = read_video(path, first=first, max_frames=places[-1] + 1, size=size)
    return frames[[place - first for place in places]]


def resampled(num_frames: int, *, fps: float, target_fps: float) -> list[int]:
    """Return which frames make a video of another rate, none made up.

    Frame n of the new video is the last one whose time, rounded to frames of the new rate, is not
    after n. From 30 to 24 frames per second: 0, 1, 3, 4, 5, 6, 8, ...

    Source: the filter `fps` of ffmpeg, which the release uses.
    """
    ratio = fps / target_fps
    count = max(math.floor(num_frames / ratio + 0.5), 1)
    return [min(max(math.ceil((n + 0.5) * ratio) - 1, 0), num_frames - 1) for n in range(count)]


def _last_seconds(places: list[int], *, fps: int) -> list[int]:
    """Return the last whole seconds, at most five; of less than a second the last frame."""
    if len(places) < fps:
        return places[-1:]
    return places[-min(len(places) // fps, MAX_PREFIX_SECONDS) * fps :]
