"""Draw the demo's clips: one or two shaded shapes over a plain background, with their caption.

A shape moves along one axis and bounces off the picture's edges; of two, the one the caption names
first is in front. The caption names the direction in which a shape sets out. Axes: T frames,
H rows, W columns.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIZE = 64
FPS = 24
COLORS = {
    "red": (225, 40, 40),
    "green": (40, 185, 65),
    "blue": (50, 85, 235),
    "yellow": (240, 215, 45),
    "white": (245, 245, 245),
}
BACKGROUNDS = {"black": (12, 12, 12), "gray": (116, 116, 116)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
# Radii at which the shapes cover about the same area, in units of the circle's radius.
SQUARE_HALF_SIDE = 0.89
TRIANGLE_INRADIUS = 0.72
RADIUS_RANGE = (9.5, 12.5)
SPEED_RANGE = (0.4, 0.7)
OPENING_FRAMES = 16
"""Frames for which every shape keeps the direction that its caption names."""
PAIR_SHARE = 0.2
"""Share of the clips with two shapes."""
HELD_OUT_EVERY = 5
_MOST_SHAPES = 6
# Light from the upper left: brightness at that side of a shape and at the other.
_LIGHT, _SHADE = 1.12, 0.68
# How far a shape reaches from its centre to the left and right, up, and down, in radii.
_REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (SQUARE_HALF_SIDE,) * 3,
    "triangle": (math.sqrt(3) * TRIANGLE_INRADIUS, 2 * TRIANGLE_INRADIUS, TRIANGLE_INRADIUS),
}


@dataclass(frozen=True)
class Attributes:
    """What a caption says about a shape and the background."""

    color: str
    shape: str
    direction: str
    background: str

    @property
    def phrase(self) -> str:
        """Say what moves where."""
        return f"a {self.color} {self.shape} moving {self.direction}"

    @property
    def caption(self) -> str:
        """Say the attributes in a sentence."""
        return caption_of([self])


@dataclass(frozen=True)
class Motion:
    """How a shape sets out: centre and radius in pixels, speed in pixels/frame."""

    x: float
    y: float
    radius: float
    speed: float


@dataclass(frozen=True)
class Clip:
    """A drawn clip.

    Attributes:
        scene: the shapes, the one in front first.
        frames: uint8 `[T, H, W, 3]`.
        is_beginning: whether the shapes set out in its first frame; else it is a later part.
    """

    scene: tuple[Attributes, ...]
    frames: np.ndarray
    is_beginning: bool


def caption_of(scene: Sequence[Attributes]) -> str:
    """Say in a sentence what a scene of one or two shapes shows."""
    phrases = " and ".join(attributes.phrase for attributes in scene)
    return f"{phrases} on a {scene[0].background} background"


def all_attributes() -> list[Attributes]:
    """List every combination of attributes in a fixed order (120 of them)."""
    return [
        Attributes(*values) for values in itertools.product(COLORS, SHAPES, DIRECTIONS, BACKGROUNDS)
    ]


def split_attributes() -> tuple[list[Attributes], list[Attributes]]:
    """Split the combinations into seen ones (for training) and unseen ones (every fifth, held out).

    A combination is held out when the sum of its four positions is a multiple of five. So each
    value of each attribute still occurs in training, with most values of the others.
    """
    seen, unseen = [], []
    colors, directions, backgrounds = list(COLORS), list(DIRECTIONS), list(BACKGROUNDS)
    for attributes in all_attributes():
        position = (
            colors.index(attributes.color)
            + SHAPES.index(attributes.shape)
            + directions.index(attributes.direction)
            + 2 * backgrounds.index(attributes.background)
        )
        (unseen if position % HELD_OUT_EVERY == 0 else seen).append(attributes)
    return seen, unseen


def parse_scene(caption: str) -> tuple[Attributes, ...]:
    """Read the shapes back from a caption.

    Raises:
        ValueError: the caption is not one that `caption_of` writes.
    """
    words = caption.lower().replace(".", "").split()
    if len(words) in (9, 15):
        starts = range(0, len(words) - 4, 6)
        scene = tuple(
            Attributes(words[i + 1], words[i + 2], words[i + 4], words[-2]) for i in starts
        )
        if set(scene) <= set(all_attributes()) and caption_of(scene) == " ".join(words):
            return scene
    raise ValueError(
        "caption must read 'a COLOR SHAPE moving DIRECTION on a BACKGROUND background', or name "
        f"two shapes with 'and' between them, not {caption!r}"
    )


def parse_caption(caption: str) -> Attributes:
    """Read the attributes back from a caption of one shape.

    Raises:
        ValueError: the caption is not one that `Attributes.caption` writes.
    """
    scene = parse_scene(caption)
    if len(scene) > 1:
        raise ValueError(f"caption must name one shape, not {len(scene)}: {caption!r}")
    return scene[0]


def random_motion(rng: np.random.Generator, attributes: Attributes) -> Motion:
    """Draw a start, a radius and a speed, so that the first bounce is after the opening."""
    radius, speed = rng.uniform(*RADIUS_RANGE), rng.uniform(*SPEED_RANGE)
    centre: list[float] = []
    ranges = _centre_ranges(attributes.shape, radius)
    for (low, high), step in zip(ranges, DIRECTIONS[attributes.direction], strict=True):
        way = step * OPENING_FRAMES * speed
        centre.append(rng.uniform(low - min(way, 0.0), high - max(way, 0.0)))
    return Motion(*centre, radius, speed)


def render(
    attributes: Attributes, motion: Motion, *, num_frames: int, first_frame: int = 0
) -> np.ndarray:
    """Draw a clip of one shape, its edge smoothed over one pixel.

    Args:
        first_frame: frames since the shape set out.

    Returns:
        uint8 `[T, H, W, 3]`.
    """
    return render_scene([(attributes, motion)], num_frames=num_frames, first_frame=first_frame)


def render_scene(
    moving: Sequence[tuple[Attributes, Motion]], *, num_frames: int, first_frame: int = 0
) -> np.ndarray:
    """Draw a clip of shapes, the first of them in front; see `render`."""
    shade = np.array(BACKGROUNDS[moving[0][0].background], dtype=np.float64)
    frames_THW3 = np.broadcast_to(shade, (num_frames, SIZE, SIZE, 3))
    for attributes, motion in reversed(moving):
        cover, light = _moving(attributes, motion, num_frames=num_frames, first_frame=first_frame)
        frames_THW3 = _paint(frames_THW3, cover, light * np.array(COLORS[attributes.color]))
    return np.rint(frames_THW3).astype(np.uint8)


def draw_crowd(rng: np.random.Generator, *, num_frames: int) -> np.ndarray:
    """Draw several shapes of any colour over each other, for training an autoencoder.

    Far more of the picture changes than in a clip, so that far fewer steps teach the same.

    Returns:
        uint8 `[T, H, W, 3]`.
    """
    pool = all_attributes()
    frames_THW3 = np.broadcast_to(rng.uniform(0, 255, 3), (num_frames, SIZE, SIZE, 3))
    for _ in range(rng.integers(2, _MOST_SHAPES + 1)):
        attributes = pool[rng.integers(len(pool))]
        color = rng.uniform(0, 255, 3) if rng.random() < 0.5 else COLORS[attributes.color]
        motion = random_motion(rng, attributes)
        cover, light = _moving(attributes, motion, num_frames=num_frames)
        frames_THW3 = _paint(frames_THW3, cover, light * np.array(color))
    return np.rint(frames_THW3).astype(np.uint8)


def draw(
    rng: np.random.Generator,
    pool: list[Attributes],
    *,
    num_frames: int,
    pair_share: float = 0.0,
    late_share: float = 0.0,
) -> Clip:
    """Draw a random clip.

    Args:
        pool: what its shapes are drawn from.
        pair_share: chance of two shapes, of two colours.
        late_share: chance of a part that does not begin where the shapes set out.
    """
    scene = [pool[rng.integers(len(pool))]]
    if rng.random() < pair_share:
        first = scene[0]
        others = [
            each
            for each in pool
            if each.background == first.background and each.color != first.color
        ]
        scene.append(others[rng.integers(len(others))])
    moving = [(attributes, random_motion(rng, attributes)) for attributes in scene]
    is_late = rng.random() < late_share
    first_frame = int(rng.integers(1, 4 * SIZE)) if is_late else 0
    frames = render_scene(moving, num_frames=num_frames, first_frame=first_frame)
    return Clip(tuple(scene), frames, is_beginning=not is_late)


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, *, radius: float) -> np.ndarray:
    """Tell how much of each pixel a shape covers, 0 to 1.

    Args:
        shape: one of `SHAPES`.
        dx: pixels to the right of the shape's centre.
        dy: pixels below the shape's centre; broadcasts with `dx`.
        radius: radius of the circle of about the same area, pixels.
    """
    if shape == "circle":
        distance = np.sqrt(dx**2 + dy**2) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - SQUARE_HALF_SIDE * radius
    else:
        slope = math.cos(math.pi / 6) * np.abs(dx) - math.sin(math.pi / 6) * dy
        distance = np.maximum(slope, dy) - TRIANGLE_INRADIUS * radius
    return np.clip(0.5 - distance, 0.0, 1.0)


def _moving(
    attributes: Attributes, motion: Motion, *, num_frames: int, first_frame: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tell how much of each pixel a moving shape covers, and how it is lit: `[T, H, W, 1]` each."""
    time_T = first_frame + np.arange(num_frames)
    ranges = _centre_ranges(attributes.shape, motion.radius)
    x_T, y_T = (
        bounce(start + step * motion.speed * time_T, low=low, high=high)
        for start, step, (low, high) in zip(
            (motion.x, motion.y), DIRECTIONS[attributes.direction], ranges, strict=True
        )
    )
    grid = np.arange(SIZE)
    dx_T1W = (grid[None] - x_T[:, None])[:, None, :]
    dy_TH1 = (grid[None] - y_T[:, None])[:, :, None]
    cover_THW = coverage(attributes.shape, dx_T1W, dy_TH1, radius=motion.radius)
    across_THW = ((dx_T1W + dy_TH1) / (2 * motion.radius)).clip(-1, 1)
    light_THW = (_LIGHT + _SHADE) / 2 - across_THW * (_LIGHT - _SHADE) / 2
    return cover_THW[..., None], light_THW[..., None]


def _paint(frames_THW3: np.ndarray, cover_THW1: np.ndarray, color: np.ndarray) -> np.ndarray:
    return frames_THW3 + cover_THW1 * (np.minimum(color, 255) - frames_THW3)


def _centre_ranges(shape: str, radius: float) -> list[tuple[float, float]]:
    """Return where a shape's centre may be across and down, so that all of it is in the picture."""
    side, above, below = (reach * radius for reach in _REACH[shape])
    first, last = -0.5, SIZE - 0.5
    return [(first + side, last - side), (first + above, last - below)]


def bounce(way: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """Fold a straight way into a range, as something goes that bounces off both of its ends.

    Example: on the range 0 to 10, the way 8, 10, 12, 22 becomes 8, 10, 8, 2.
    """
    length = high - low
    return low + length - np.abs((way - low) % (2 * length) - length)
