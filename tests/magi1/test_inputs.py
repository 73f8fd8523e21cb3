"""Given images and videos: size, rate, and which frames."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowcache.errors import UserError
from flowcache.runtime.config import load_config
from flowcache.runtime.video import VideoWriter
from magi1.config import RunConfig
from magi1.inputs import num_latents, read_prefix


@pytest.fixture
def config(distilled: Path) -> RunConfig:
    return load_config(RunConfig, [distilled / "config.json"], overrides=["prompt=a cat"])


def test_an_image_is_scaled_to_the_size_whatever_its_aspect(config: RunConfig, picture: Path):
    prefix = read_prefix(replace(config, image=str(picture)))
    assert prefix is not None
    assert prefix.shape == (3, 1, 32, 48)
    # the gradient runs from top to bottom, black to white, over the whole height
    assert prefix[:, 0, 0].max() < -0.9
    assert prefix[:, 0, -1].min() > 0.9
    assert num_latents(prefix, temporal_stride=4) == 1


def test_the_first_frames_of_a_video_are_given(config: RunConfig, clip: Path):
    prefix = read_prefix(replace(config, video=str(clip)))
    assert prefix is not None
    assert prefix.shape == (3, 32, 32, 48)
    assert num_latents(prefix, temporal_stride=4) == 8
    shorter = read_prefix(replace(config, video=str(clip), prefix_frames=8))
    assert shorter is not None
    assert torch.equal(shorter, prefix[:, :8])


def test_nothing_given_is_no_prefix(config: RunConfig):
    assert read_prefix(config) is None
    assert num_latents(None, temporal_stride=4) == 0


def test_whole_seconds_at_the_end_are_given_where_no_number_is_set(config: RunConfig, clip: Path):
    last = replace(config, video=str(clip), prefix_frames=None)
    # 40 frames: one whole second of 24, the last one
    prefix = read_prefix(last)
    assert prefix is not None
    assert prefix.shape[1] == 24
    whole = read_prefix(replace(config, video=str(clip), prefix_frames=40))
    assert whole is not None
    assert torch.equal(prefix, whole[:, 16:])


def test_of_a_long_video_the_last_seconds_alone_are_kept_in_memory(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "long.mp4"
    with VideoWriter(path, fps=24, size=(32, 48)) as writer:
        writer.append(np.zeros((8 * 24, 32, 48, 3), np.uint8))
    stacks: list[int] = []
    stack = np.stack
    monkeypatch.setattr(np, "stack", lambda frames: stacks.append(len(frames)) or stack(frames))
    prefix = read_prefix(replace(config, video=str(path), prefix_frames=None))
    assert prefix is not None
    assert prefix.shape[1] == 5 * 24
    assert stacks == [5 * 24]


def test_of_less_than_a_second_the_last_frame_is_given(config: RunConfig, tmp_path: Path):
    path = tmp_path / "short.mp4"
    frames = np.full((5, 32, 48, 3), np.arange(5, dtype=np.uint8)[:, None, None, None] * 50)
    with VideoWriter(path, fps=24, size=(32, 48)) as writer:
        writer.append(frames)
    prefix = read_prefix(replace(config, video=str(path), prefix_frames=None))
    assert prefix is not None
    assert prefix.shape[1] == 1
    assert float(prefix.mean()) == pytest.approx(200 / 127.5 - 1, abs=0.05)


def test_a_video_that_is_too_short_is_refused(config: RunConfig, clip: Path):
    with pytest.raises(UserError, match="has 40 frames at 24 fps, fewer than prefix_frames 44"):
        read_prefix(replace(config, video=str(clip), prefix_frames=44))


def test_seconds_that_are_no_whole_latents_are_refused(config: RunConfig, clip: Path):
    slower = replace(config.runtime_config, fps=30)
    with pytest.raises(UserError, match="no multiple of 4: set prefix_frames"):
        read_prefix(replace(config, video=str(clip), prefix_frames=None, runtime_config=slower))


def test_a_clip_that_the_tiles_of_its_rate_would_shorten_is_refused(config: RunConfig, clip: Path):
    faster = replace(config.runtime_config, fps=30)
    run = replace(config, video=str(clip), runtime_config=faster)
    with pytest.raises(UserError, match=r"fps // 2 = 15 frames and drops the last 3 of each"):
        read_prefix(run)
    prefix = read_prefix(replace(run, prefix_frames=12))
    assert prefix is not None
    assert prefix.shape[1] == 12
