"""The judge reads what was drawn, also through blur and noise, and nothing out of nothing."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from flowcache.demo.clips import Attributes, Motion, all_attributes, draw, random_motion, render
from flowcache.demo.judge import judge, judge_scene, judge_steadiness

WANTED = 0.98


def _clips(seed: int) -> list[tuple[Attributes, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(a, render(a, random_motion(rng, a), num_frames=97)) for a in all_attributes()]


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
        blurred = gaussian_filter(frames.astype(np.float32), (0, 1.2, 1.2, 0), mode="nearest")
        noisy = blurred + rng.normal(0, 6, frames.shape)
        spoiled.append((attributes, np.clip(noisy, 0, 255).astype(np.uint8)))
    assert _agreement(spoiled) >= WANTED


def test_short_clips_are_readable():
    clips = [(a, frames[:17]) for a, frames in _clips(3)]
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


def test_after_a_bounce_a_clip_agrees_either_way_only():
    red = Attributes("red", "circle", "right", "black")
    frames = render(red, Motion(40, 30, 12, 0.5), num_frames=97)[30:50]
    verdict = judge(frames)
    assert verdict.direction == "left"
    assert not verdict.agrees(red)["direction"]
    assert all(verdict.agrees(red, either_way=True).values())
    across = Attributes("red", "circle", "up", "black")
    assert not verdict.agrees(across, either_way=True)["direction"]


def test_each_of_two_shapes_is_read_and_a_shape_with_the_others_colour_is_not():
    rng, wrong = np.random.default_rng(9), 0
    for _ in range(12):
        clip = draw(rng, all_attributes(), num_frames=49, pair_share=1.0)
        front, back = judge_scene(clip.frames, clip.scene)
        assert all(front.agrees(clip.scene[0]).values())
        # the one behind may set out while it is hidden
        wrong += not all(back.agrees(clip.scene[1]).values())
        swapped = tuple(
            replace(attributes, color=other.color)
            for attributes, other in zip(clip.scene, reversed(clip.scene), strict=True)
        )
        if len({attributes.shape for attributes in clip.scene}) == 2:
            verdicts = judge_scene(clip.frames, swapped)
            agrees = [v.agrees(a)["shape"] for v, a in zip(verdicts, swapped, strict=True)]
            assert not all(agrees)
    assert wrong <= 4


def test_each_wrong_attribute_is_noticed():
    drawn = Attributes("red", "circle", "right", "black")
    verdict = judge(render(drawn, random_motion(np.random.default_rng(6), drawn), num_frames=33))
    assert all(verdict.agrees(drawn).values())
    said = Attributes("blue", "square", "up", "gray")
    assert not any(verdict.agrees(said).values())


def test_the_judge_refuses_frames_of_another_form():
    with pytest.raises(ValueError, match="64"):
        judge(np.zeros((9, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="2 frames"):
        judge(np.zeros((1, 64, 64, 3), np.uint8))


def test_rendered_clips_are_steady_also_blurred_and_noisy():
    rng = np.random.default_rng(7)
    for index, (_, frames) in enumerate(_clips(8)[::7]):
        blurred = gaussian_filter(frames.astype(np.float32), (0, 0.8, 0.8, 0), mode="nearest")
        noisy = np.clip(blurred + rng.normal(0, 3, frames.shape), 0, 255).astype(np.uint8)
        for clip in (frames, noisy):
            assert all(judge_steadiness(clip).passes.values()), index


@pytest.mark.parametrize(
    ("kind", "fails"),
    [
        pytest.param("held", {"smooth"}, id="frames in groups of four"),
        pytest.param("cut", {"whole"}, id="a border between two places"),
        pytest.param("shrinking", {"kept"}, id="a shape that becomes smaller"),
        pytest.param("split", {"kept", "whole"}, id="a shape in two pieces"),
    ],
)
def test_what_is_not_steady_is_named(kind: str, fails: set[str]):
    drawn = Attributes("red", "circle", "right", "black")
    frames = render(drawn, Motion(30.0, 30.0, 12.0, 0.5), num_frames=96)
    other = render(drawn, Motion(45.0, 36.0, 12.0, 0.5), num_frames=96)
    shrinking = [
        render(
            drawn, Motion(30.0 + t / 2, 30.0, 12.0 - 4.0 * max(0, t - 48) / 48, 0.0), num_frames=1
        )
        for t in range(96)
    ]
    split = frames.copy()
    split[:, 28:33] = 12
    spoiled = {
        "held": np.repeat(frames[::4], 4, axis=0),
        "cut": np.concatenate([frames[:48], other[48:]]),
        "shrinking": np.concatenate(shrinking),
        "split": np.concatenate([frames[:60], split[60:]]),
    }[kind]
    passes = judge_steadiness(spoiled).passes
    assert {name for name, holds in passes.items() if not holds} == fails


def test_the_rhythm_of_a_change_at_every_fourth_frame():
    assert judge_steadiness(_pulsing([16, 2, 2, 2])).rhythm == pytest.approx(14 / 11, abs=0.01)
    assert judge_steadiness(_pulsing([8, 0, 8, 0])).rhythm == pytest.approx(1.0, abs=0.01)
    assert judge_steadiness(_pulsing([6, 6, 6, 6])).rhythm == pytest.approx(0.0, abs=0.01)


def _pulsing(steps: list[int]) -> np.ndarray:
    """Draw a picture that becomes brighter by these steps, darker by the same, and so on."""
    steps = [sign * step for sign in (1, -1) for step in steps] * 6
    level_T = 100 + np.cumsum([0, *steps])
    return np.broadcast_to(level_T[:, None, None, None], (49, 64, 64, 3)).astype(np.uint8)
