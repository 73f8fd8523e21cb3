"""A video that shows nothing, or does not move, is an alarm; an ordinary one is none."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowcache.demo.clips import all_attributes, random_motion, render
from flowcache.errors import UserError
from flowcache.runtime.checks import Decoded, DegenerateCheck, Pixels, broken_weight, check_finite
from flowcache.runtime.run import finished_frames
from flowcache.runtime.video import VideoWriter, read_video


def alarms(frames_THW3: Pixels | Sequence[Pixels]) -> list[str]:
    check = DegenerateCheck()
    check.see(frames_THW3)
    return check.alarms()


def noise(num_frames: int, *, levels: int, around: int = 100, size: int = 64) -> Pixels:
    random = np.random.default_rng(0)
    return (around + random.integers(0, levels, (num_frames, size, size, 3))).astype(np.uint8)


def test_black_frames_and_frames_of_one_colour_are_named():
    black = np.zeros((9, 20, 30, 3), np.uint8)
    assert alarms(black) == ["constant: all 9 frames are of one colour (black)"]
    assert alarms(black + np.uint8([255, 127, 0])) == [
        "constant: all 9 frames are of one colour (#ff7f00)"
    ]
    assert alarms(black[:1]) == ["constant: all 1 frames are of one colour (black)"]
    fading = np.arange(9, dtype=np.uint8)[:, None, None, None] * 10 + black
    assert alarms(fading) == ["constant: all 9 frames are of one colour (#282828, which changes)"]
    # rounding by a level hides nothing
    assert "constant" in alarms(noise(9, levels=2))[0]


def test_equal_frames_are_frozen_and_a_single_one_is_not():
    picture = noise(1, levels=100)
    assert alarms(np.repeat(picture, 5, axis=0)) == ["frozen: all 5 frames are equal"]
    assert alarms(picture) == []
    # the same picture with other noise of a level on top
    assert alarms(np.repeat(picture, 5, axis=0) + noise(5, levels=2, around=0)) == [
        "frozen: all 5 frames are equal"
    ]


def test_a_small_thing_that_shows_or_moves_is_enough():
    frames = np.full((5, 64, 64, 3), 90, np.uint8)
    frames[:, 30:36, 30:36] = 190  # 1 % of the frame
    assert alarms(frames) == ["frozen: all 5 frames are equal"]
    frames[4] = np.roll(frames[4], 1, axis=0)  # one pixel, in the last frame alone
    assert alarms(frames) == []


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (9, 17)])
def test_sizes_that_are_no_multiple_of_a_square_are_seen_up_to_the_edge(size: tuple[int, int]):
    frames = np.repeat(noise(1, levels=100)[:, : size[0], : size[1]], 3, axis=0)
    frames[2, -1, -1] += 60
    said = alarms(frames)
    assert said == [] if size != (1, 1) else "which changes" in said[0]


def test_the_codec_hides_no_degenerate_video_and_makes_none(tmp_path: Path):
    picture = noise(1, levels=100)
    for name, frames, said in (
        ("flat", np.full((30, 64, 64, 3), (200, 30, 90), np.uint8), "constant"),
        ("frozen", np.repeat(picture, 30, axis=0), "frozen"),
        ("moving", np.stack([np.roll(picture[0], n, axis=1) for n in range(30)]), ""),
    ):
        with VideoWriter(tmp_path / f"{name}.mp4", fps=24, size=(64, 64)) as writer:
            writer.append(frames)
        found = alarms(read_video(tmp_path / f"{name}.mp4")[0])
        assert [line.split(":")[0] for line in found] == ([said] if said else [])


def test_no_clip_that_the_demos_were_trained_on_is_degenerate():
    random = np.random.default_rng(0)
    for attributes in all_attributes()[::7]:
        assert alarms(render(attributes, random_motion(random, attributes), num_frames=9)) == []


# Finite -------------------------------------------------------------------------------------------


"""What is not finite is found and named; nothing else is."""


BROKEN = [float("nan"), float("inf"), float("-inf")]


def decoded(latents: Tensor, frames: Tensor) -> Decoded:
    return Decoded(frames, latents.isfinite().all())


def test_finite_frames_come_to_the_host_as_bytes():
    frames = torch.linspace(-1, 1, 3 * 2 * 4 * 4).view(3, 2, 4, 4)
    read = finished_frames(decoded(torch.zeros(2), frames), chunks=[0], tick=3)
    assert read.dtype == torch.uint8
    assert read.shape == (2, 4, 4, 3)
    assert (read.min(), read.max()) == (0, 255)


@pytest.mark.parametrize("value", BROKEN)
def test_the_stage_the_chunks_and_the_tick_are_named(value: float):
    good, bad = torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 4, 4)
    bad[1, 0, 2, 3] = value
    with pytest.raises(UserError, match=r"^the latents of chunk 2 \(clean after tick 7\) hold val"):
        finished_frames(decoded(bad, bad), chunks=(2,), tick=7)
    # even where the decoder hides it
    with pytest.raises(UserError, match=r"^the latents of chunks 0 to 4 \(clean after tick 7\)"):
        finished_frames(decoded(bad, good), chunks=range(5), tick=7)
    with pytest.raises(UserError, match=r"^the decoded frames of chunk 2 \(clean after tick 7\)"):
        finished_frames(decoded(good, bad), chunks=(2,), tick=7)


def test_joined_parts_are_finite_if_all_are():
    good, bad = torch.zeros(3, 1, 4, 4), torch.full((3, 2, 4, 4), float("nan"))
    parts = [decoded(good, good), decoded(bad, bad), decoded(good, good)]
    assert Decoded.concatenated(parts).frames.shape == (3, 4, 4, 4)
    assert not Decoded.concatenated(parts).is_latent_finite
    assert Decoded.concatenated([parts[0], parts[2]]).is_latent_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_first_broken_weight_is_named(dtype: torch.dtype):
    first, second = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    modules = {"transformer": first, "VAE": second}
    for parameter in (*first.parameters(), *second.parameters()):
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    assert broken_weight(modules) is None
    second[1].bias.data[1:] = float("nan")
    assert broken_weight(modules) == "1.bias of the VAE"


@pytest.mark.parametrize("value", BROKEN)
def test_a_result_is_returned_or_its_cause_is_said(value: float):
    x = torch.ones(2, 2)
    model = nn.Linear(2, 2)
    assert check_finite(x, "the embeddings", modules={"text encoder": model}) is x
    x[1, 1] = value
    with pytest.raises(UserError, match="though all weights of text encoder are finite: a number"):
        check_finite(x, "the embeddings", modules={"text encoder": model})
    model.weight.data[0, 0] = value
    with pytest.raises(UserError, match=r"^the embeddings .* so does its weight weight of"):
        check_finite(x, "the embeddings", modules={"text encoder": model})
