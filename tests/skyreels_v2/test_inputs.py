import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowcache.errors import UserError
from flowcache.runtime.video import VideoWriter, to_pixels
from flowcache.wan.dit import DiTConfig
from flowcache.wan.given import read_media
from skyreels_v2.config import RunConfig
from skyreels_v2.inputs import check_mode, fit_image, turn_to_fit

CONFIG = RunConfig(prompt="a red circle", height=16, width=32, num_frames=17, base_num_frames=17)
DF = DiTConfig()
I2V = DiTConfig(model_type="i2v", in_dim=36, image_dim=32)


def picture_of(height: int, width: int) -> Image.Image:
    """An image whose red value is its column and whose green value is its row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def test_an_image_of_the_right_size_is_taken_as_it_is():
    pixels = fit_image(picture_of(16, 32), height=16, width=32)
    assert pixels.shape == (3, 1, 16, 32)
    assert torch.equal(pixels[0, 0, 0], torch.arange(32) / 127.5 - 1)
    assert torch.equal(pixels[1, 0, :, 0], torch.arange(16) / 127.5 - 1)
    assert torch.equal(pixels[2], torch.full((1, 16, 32), -1.0))


@pytest.mark.parametrize(
    ("height", "width", "first_column", "first_row"),
    [(16, 64, 16, 0), (16, 48, 8, 0), (32, 32, 0, 8)],
)
def test_the_middle_of_an_image_of_another_aspect_is_used(
    height: int, width: int, first_column: int, first_row: int
):
    pixels = fit_image(picture_of(height, width), height=16, width=32)
    columns = torch.arange(first_column, first_column + 32) / 127.5 - 1
    rows = torch.arange(first_row, first_row + 16) / 127.5 - 1
    assert torch.equal(pixels[0, 0, 0], columns)
    assert torch.equal(pixels[1, 0, :, 0], rows)


def test_pixels_run_from_minus_one_to_one():
    frames = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 4, 4, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (3, 2, 4, 4)
    assert pixels[:, 0].unique().tolist() == [-1]
    assert pixels[:, 1].unique().tolist() == [1]


TURNS = [
    ({}, 16),
    ({"image": "picture"}, 16),
    ({"image": "portrait"}, 32),
    ({"image": "portrait", "height": 32, "width": 16}, 32),
    ({"video": "clip"}, 16),
    ({"end_image": "portrait"}, 32),
    ({"image": "picture", "end_image": "portrait"}, 16),  # a start image goes first
    ({"end_image": "picture"}, 16),
]
"""Settings, their files by fixture, and the height that comes of them."""


@pytest.mark.parametrize(("changes", "height"), TURNS)
def test_size_turns_only_for_a_portrait_picture_in_a_landscape_video(
    request: pytest.FixtureRequest, changes: dict[str, Any], height: int
):
    given = {
        name: str(request.getfixturevalue(value)) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    config = replace(CONFIG, **given)
    turned = turn_to_fit(config)
    assert turned == replace(config, height=height, width=48 - height)


@pytest.mark.parametrize("size", [(1, 900), (900, 1), (1, 1), (320, 160)])
def test_an_image_of_one_row_or_column_fills_the_frame(size: tuple[int, int]):
    pixels = fit_image(Image.new("RGB", size, "red"), height=16, width=32)
    assert pixels.shape == (3, 1, 16, 32)
    assert pixels[0].unique().tolist() == [1]


def test_a_given_video_is_read_at_the_rate_of_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    frames = np.repeat(np.arange(60, dtype=np.uint8) * 4, 16 * 32 * 3).reshape(60, 16, 32, 3)
    with VideoWriter(tmp_path / "a.mp4", fps=60, size=(16, 32)) as writer:
        writer.append(frames)
    config = replace(CONFIG, video=str(tmp_path / "a.mp4"), overlap_history=9)
    with caplog.at_level(logging.INFO):
        video = read_media(config, fit=fit_image).video
    assert video is not None
    # 1 s; every 2.5th frame, as ffmpeg -vf fps=24 counts them
    assert video.shape[0] == 24
    assert ((video[:6, 0, 0, 0] + 2) // 4).tolist() == [1, 3, 6, 8, 11, 13]
    assert caplog.messages == [f"{tmp_path / 'a.mp4'}: 60 frames per second are read as 24"]


def test_the_whole_video_is_read_at_the_size_of_the_run(clip: Path):
    config = replace(CONFIG, video=str(clip), overlap_history=9, height=32, width=48)
    video = read_media(config, fit=fit_image).video
    assert video is not None
    assert video.dtype == torch.uint8
    assert video.shape == (20, 32, 48, 3)


def test_a_video_shorter_than_the_overlap_is_refused(clip: Path):
    with pytest.raises(UserError, match=r"has 20 frames at 24 fps, fewer than overlap_history 21"):
        read_media(replace(CONFIG, video=str(clip), overlap_history=21), fit=fit_image)


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"video": "a.mp4", "image": "b.png"}, DF, "cannot be combined"),
        ({"video": "a.mp4", "end_image": "b.png"}, DF, "cannot be combined"),
        ({}, I2V, "give image"),
        ({"image": "b.png", "end_image": "c.png"}, I2V, "starts from image alone"),
        ({"image": "b.png", "num_frames": 21}, I2V, "makes one window"),
    ],
)
def test_pictures_that_the_model_cannot_use_are_refused(
    changes: dict[str, str], model: DiTConfig, message: str
):
    with pytest.raises(UserError, match=message):
        check_mode(replace(CONFIG, **changes), model)


def test_a_forcing_model_takes_images_and_an_i2v_model_one():
    check_mode(replace(CONFIG, image="a.png", end_image="b.png"), DF)
    check_mode(replace(CONFIG, end_image="b.png"), DF)
    check_mode(replace(CONFIG, image="a.png"), I2V)
