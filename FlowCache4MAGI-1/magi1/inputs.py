"""The image or video that a clip starts from: read, brought to rate and size, as pixels."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.model import Source
from flowcache.runtime.video import Pixels, read_image, read_video, to_pixels
from magi1.checkpoint import find_path
from magi1.config import RunConfig, RuntimeConfig
from magi1.text import SpecialTokens, load_special_tokens
from magi1.vae import check_encoding
from magi1.work import tiling_of

MAX_PREFIX_SECONDS = 5
"""Longest prefix where no number of frames is set. Source: the code published with FlowCache."""


@dataclass(frozen=True)
class Media:
    """What is given in addition to the prompt."""

    prefix: Tensor | None = None
    """Given frames, `[3, T, H, W]` in -1..1."""
    tokens: SpecialTokens | None = None
    """Learned tokens that go before the prompt; None: none do."""

    @classmethod
    def read(cls, config: RunConfig, source: Source) -> "Media":
        """Read the pictures and the special tokens that the settings name."""
        tokens = None
        if config.special_tokens is not None:
            path = find_path(config.special_tokens, source)
            tokens = load_special_tokens(path, channels=config.model_config.caption_channels)
        return cls(read_prefix(config), tokens)


def read_prefix(config: RunConfig) -> Tensor | None:
    """Read the given image or the given frames of the video.

    They are scaled to the size of the run, whatever their own aspect is, as in the release.

    Returns: `[3, T, H, W]` float32 in -1..1, T = 1 for an image; None: nothing is given.
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
    size = (run.video_size_h, run.video_size_w)
    if wanted is None:
        most = MAX_PREFIX_SECONDS * run.fps
        frames, _ = read_video(path, fps=run.fps, last=most, size=size)
        return _last_seconds(frames, path, run)
    frames, _ = read_video(path, fps=run.fps, max_frames=wanted, size=size)
    if len(frames) < wanted:
        raise UserError(
            f"{path} has {len(frames)} frames at {run.fps} fps, fewer than prefix_frames {wanted}: "
            "give a longer video, or lower prefix_frames"
        )
    check_encoding(
        tiling_of(config), num_frames=wanted, temporal_stride=run.temporal_downsample_factor
    )
    return frames


def _last_seconds(frames: Pixels, path: Path, run: RuntimeConfig) -> Pixels:
    """Return the last whole seconds; of less than a second the last frame."""
    if len(frames) < run.fps:
        return frames[-1:]
    count = len(frames) // run.fps * run.fps
    stride = run.temporal_downsample_factor
    if count % stride:
        raise UserError(
            f"{path}: {count} frames, whole seconds at {run.fps} fps, are no multiple of "
            f"{stride}: set prefix_frames"
        )
    return frames[-count:]
