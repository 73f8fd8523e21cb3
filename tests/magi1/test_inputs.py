"""Given images and videos: size, rate, and which frames."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.config import load_config
from flowcache.runtime.video import VideoWriter
from magi1.config import RunConfig
from magi1.inputs import num_latents, read_prefix


@pytest.fixture
def config(distilled: Path, clip: Path) -> RunConfig:
    """Settings of a run that continues a video of 40 frames."""
    config = load_config(RunConfig, [distilled / "config.json"], overrides=["prompt=a cat"])
    return replace(config, video=str(clip))


def prefix_of(config: RunConfig, **changes: Any) -> Tensor:
    prefix = read_prefix(replace(config, **changes))
    assert prefix is not None
    return prefix


def test_an_image_is_scaled_to_the_size_whatever_its_aspect(config: RunConfig, picture: Path):
    prefix = prefix_of(config, video=None, image=str(picture))
    assert prefix.shape == (3, 1, 32, 48)
    # the gradient runs from top to bottom, black to white, over the whole height
    assert prefix[:, 0, 0].max() < -0.9
    assert prefix[:, 0, -1].min() > 0.9
    assert num_latents(prefix, temporal_stride=4) == 1
    assert read_prefix(replace(config, video=None)) is None
    assert num_latents(None, temporal_stride=4) == 0


def test_the_first_frames_of_a_video_are_given_or_whole_seconds_at_its_end(config: RunConfig):
    prefix = prefix_of(config)
    assert prefix.shape == (3, 32, 32, 48)
    assert num_latents(prefix, temporal_stride=4) == 8
    assert torch.equal(prefix_of(config, prefix_frames=8), prefix[:, :8])
    # of 40 frames one whole second of 24, the last one
    last, whole = prefix_of(config, prefix_frames=None), prefix_of(config, prefix_frames=40)
    assert torch.equal(last, whole[:, 16:])


def test_of_a_long_video_the_last_seconds_alone_are_kept_in_memory(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "long.mp4"
    with VideoWriter(path, fps=24, size=(32, 48)) as writer:
        writer.append(np.zeros((8 * 24, 32, 48, 3), np.uint8))
    stacks: list[int] = []
    stack = np.stack
    monkeypatch.setattr(np, "stack", lambda frames: stacks.append(len(frames)) or stack(frames))
    assert prefix_of(config, video=str(path), prefix_frames=None).shape[1] == 5 * 24
    assert stacks == [5 * 24]


def test_of_less_than_a_second_the_last_frame_is_given(config: RunConfig, tmp_path: Path):
    path = tmp_path / "short.mp4"
    frames = np.full((5, 32, 48, 3), np.arange(5, dtype=np.uint8)[:, None, None, None] * 50)
    with VideoWriter(path, fps=24, size=(32, 48)) as writer:
        writer.append(frames)
    prefix = prefix_of(config, video=str(path), prefix_frames=None)
    assert prefix.shape[1] == 1
    assert float(prefix.mean()) == pytest.approx(200 / 127.5 - 1, abs=0.05)


@pytest.mark.parametrize(
    ("fps", "prefix_frames", "message"),
    [
        (24, 44, "has 40 frames at 24 fps, fewer than prefix_frames 44"),
        (30, None, "no multiple of 4: set prefix_frames"),
        (30, 32, r"fps // 2 = 15 frames and drops the last 3 of each"),
    ],
)
def test_a_video_that_does_not_fit_is_refused(
    config: RunConfig, fps: int, prefix_frames: int | None, message: str
):
    run = replace(config.runtime_config, fps=fps)
    with pytest.raises(UserError, match=message):
        prefix_of(config, runtime_config=run, prefix_frames=prefix_frames)
    assert prefix_of(config, runtime_config=run, prefix_frames=12).shape[1] == 12
