"""The judge reads what was drawn, also through blur and noise, and nothing out of nothing."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from flowcache.demo.clips import Attributes, all_attributes, random_motion, render
from flowcache.demo.judge import judge

WANTED = 0.98


def _clips(seed: int) -> list[tuple[Attributes, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(a, render(a, random_motion(rng), num_frames=97)) for a in all_attributes()]


def _agreement(clips: list[tuple[Attributes, np.ndarray]]) -> float:
    """Return the share of clips that show all of their attributes."""
    return sum(all(judge(frames).agrees(a).values()) for a, frames in clips) / len(clips)


def test_judge_reads_rendered_clips():
    clips = _clips(0)
    assert len(clips) == 120
    assert _agreement(clips) >= WANTED


def test_judge_reads_blurred_and_noisy_clips():
    rng = np.random.default_rng(1)
    spoiled = []
    for attributes, frames in _clips(2):
        blurred = gaussian_filter(frames.astype(np.float32), (0, 1.2, 1.2, 0), mode="wrap")
        noisy = blurred + rng.normal(0, 6, frames.shape)
        spoiled.append((attributes, np.clip(noisy, 0, 255).astype(np.uint8)))
    assert _agreement(spoiled) >= WANTED


def test_short_clips_are_readable():
    clips = [(a, frames[40:57]) for a, frames in _clips(3)]
    assert _agreement(clips) >= WANTED


@pytest.mark.parametrize("kind", ["blank", "noise", "still", "two shapes"])
def test_a_clip_that_shows_no_moving_shape_never_agrees(kind: str):
    attributes, frames = _clips(4)[0]
    rng = np.random.default_rng(5)
    spoiled = {
        "blank": np.full_like(frames, 12),
        "noise": rng.integers(0, 256, frames.shape, dtype=np.uint8),
        "still": np.repeat(frames[:1], 97, axis=0),
        "two shapes": np.maximum(frames, np.roll(frames, (32, 32), axis=(1, 2))),
    }[kind]
    assert not all(judge(spoiled).agrees(attributes).values())


def test_each_wrong_attribute_is_noticed():
    drawn = Attributes("red", "circle", "right", "black")
    verdict = judge(render(drawn, random_motion(np.random.default_rng(6)), num_frames=33))
    assert all(verdict.agrees(drawn).values())
    said = Attributes("blue", "square", "up", "gray")
    assert not any(verdict.agrees(said).values())


def test_the_judge_refuses_frames_of_another_form():
    with pytest.raises(ValueError, match="64"):
        judge(np.zeros((9, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="2 frames"):
        judge(np.zeros((1, 64, 64, 3), np.uint8))
