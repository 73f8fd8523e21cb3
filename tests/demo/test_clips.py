"""The drawn clips show what their captions say, and the held-out ones are really unseen."""

import numpy as np
import pytest

from flowcache.demo.clips import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    OPENING_FRAMES,
    SHAPES,
    SIZE,
    Attributes,
    Motion,
    all_attributes,
    bounce,
    caption_of,
    draw,
    draw_crowd,
    parse_caption,
    parse_scene,
    random_motion,
    render,
    render_scene,
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
    middle, light, dark = (clip[0, y, x].astype(int) for y, x in ((30, 20), (22, 12), (38, 28)))
    assert np.abs(middle - 0.9 * np.array(COLORS["red"])).max() <= 1
    assert light[0] > middle[0] > dark[0], "lit from the upper left"
    assert tuple(clip[0, 30, 20 + SIZE // 2]) == BACKGROUNDS["gray"]


@pytest.mark.parametrize(
    ("direction", "shift"),
    [("right", (0, 8)), ("left", (0, -8)), ("up", (-8, 0)), ("down", (8, 0))],
)
def test_a_shape_moves_its_way(direction: str, shift: tuple[int, int]):
    motion = Motion(x=32.0, y=34.0, radius=12.0, speed=0.5)
    clip = render(Attributes("blue", "triangle", direction, "black"), motion, num_frames=129)
    assert np.array_equal(clip[16], np.roll(clip[0], shift, axis=(0, 1)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_shape_bounces_off_the_edge_and_stays_whole(shape: str, direction: str):
    attributes = Attributes("white", shape, direction, "black")
    motion = random_motion(np.random.default_rng(3), attributes)
    clip = render(attributes, motion, num_frames=400)
    areas = clip[..., 0].astype(float).sum(axis=(1, 2))
    assert areas.max() / areas.min() < 1.05
    way = {"right": -1, "left": 0, "down": -1, "up": 0}[direction]
    edge = clip[:, way] if direction in ("up", "down") else clip[:, :, way]
    assert edge.max() > 40, "it comes to the edge"
    opening = render(attributes, motion, num_frames=OPENING_FRAMES + 1)
    x, y = (opening[..., 0].astype(float).sum(axis=axis) @ np.arange(SIZE) for axis in (1, 2))
    step_x, step_y = DIRECTIONS[direction]
    moved = step_x * np.diff(x) + step_y * np.diff(y)
    assert np.all(moved > 0), "it keeps its direction in the opening"


def test_a_way_is_folded_into_a_range():
    way = np.array([8.0, 10.0, 12.0, 22.0, -3.0])
    assert bounce(way, low=0, high=10).tolist() == [8, 10, 8, 2, 3]


def test_of_two_shapes_the_first_is_in_front():
    red, blue = (Attributes(color, "square", "up", "gray") for color in ("red", "blue"))
    frame = render_scene([(red, MOTION), (blue, MOTION)], num_frames=1)
    alone = render(red, MOTION, num_frames=1)
    inside = (0, slice(22, 38), slice(12, 28))
    assert np.array_equal(frame[inside], alone[inside])


def test_a_caption_of_two_shapes_can_be_read_back_and_is_no_caption_of_one():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = draw(rng, all_attributes(), num_frames=1, pair_share=1.0).scene
        assert len({attributes.color for attributes in scene}) == 2
        assert parse_scene(caption_of(scene)) == scene
    with pytest.raises(ValueError, match="one shape, not 2"):
        parse_caption(caption_of(scene))


def test_a_later_part_goes_on_where_the_beginning_stops():
    red = Attributes("red", "circle", "right", "black")
    whole = render(red, MOTION, num_frames=90)
    assert np.array_equal(render(red, MOTION, num_frames=30, first_frame=60), whole[60:])
    late = draw(np.random.default_rng(0), [red], num_frames=5, late_share=1.0)
    assert not late.is_beginning
    assert draw(np.random.default_rng(0), [red], num_frames=5).is_beginning


def test_the_shapes_cover_about_the_same_area():
    areas = [
        (render(Attributes("white", shape, "up", "black"), MOTION, num_frames=1) > 128).mean()
        for shape in SHAPES
    ]
    assert max(areas) / min(areas) < 1.25


def test_a_crowd_is_drawn_from_its_generator_alone():
    scenes = [draw_crowd(np.random.default_rng(seed), num_frames=5) for seed in (1, 1, 2)]
    assert scenes[0].shape == (5, SIZE, SIZE, 3)
    assert np.array_equal(scenes[0], scenes[1])
    assert not np.array_equal(scenes[0], scenes[2])
