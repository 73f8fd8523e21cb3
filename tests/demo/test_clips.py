"""The drawn clips show what their captions say, and the held-out ones are really unseen."""

import numpy as np
import pytest

from flowcache.demo.clips import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SIZE,
    Attributes,
    Motion,
    all_attributes,
    draw_scene,
    parse_caption,
    render,
    split_attributes,
)

MOTION = Motion(x=20.0, y=30.0, radius=12.0, speed=0.5)


def test_split_keeps_every_value_of_every_attribute_in_training():
    seen, unseen = split_attributes()
    assert (len(seen), len(unseen)) == (96, 24)
    assert set(seen).isdisjoint(unseen)
    for values in (COLORS, SHAPES, DIRECTIONS, BACKGROUNDS):
        for value in values:
            assert any(value in entry.caption.split() for entry in seen)
            assert any(value in entry.caption.split() for entry in unseen)


def test_every_caption_can_be_read_back():
    assert [parse_caption(entry.caption) for entry in all_attributes()] == all_attributes()
    with pytest.raises(ValueError, match="purple"):
        parse_caption("a purple circle moving right on a black background")


def test_a_shape_has_its_color_in_the_middle_and_leaves_the_rest_plain():
    clip = render(Attributes("red", "square", "right", "gray"), MOTION, num_frames=1)
    assert tuple(clip[0, 30, 20]) == COLORS["red"]
    assert tuple(clip[0, 30, 20 + SIZE // 2]) == BACKGROUNDS["gray"]


@pytest.mark.parametrize(
    ("direction", "shift"),
    [("right", (0, 8)), ("left", (0, -8)), ("up", (-8, 0)), ("down", (8, 0))],
)
def test_a_shape_moves_its_way_and_comes_back_on_the_other_side(
    direction: str, shift: tuple[int, int]
):
    clip = render(Attributes("blue", "triangle", direction, "black"), MOTION, num_frames=129)
    assert np.array_equal(clip[16], np.roll(clip[0], shift, axis=(0, 1)))
    assert np.array_equal(clip[128], clip[0])


def test_the_shapes_cover_about_the_same_area():
    areas = [
        (render(Attributes("white", shape, "up", "black"), MOTION, num_frames=1) > 128).mean()
        for shape in SHAPES
    ]
    assert max(areas) / min(areas) < 1.25


def test_a_scene_is_drawn_from_its_generator_alone():
    scenes = [draw_scene(np.random.default_rng(seed), num_frames=5) for seed in (1, 1, 2)]
    assert scenes[0].shape == (5, SIZE, SIZE, 3)
    assert np.array_equal(scenes[0], scenes[1])
    assert not np.array_equal(scenes[0], scenes[2])
