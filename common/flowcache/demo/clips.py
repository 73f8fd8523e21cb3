"""Draw the demo's clips: one coloured shape that moves over a plain background, with its caption.

The picture is a torus: a shape that leaves on one side comes back on the other, so a clip may have
any length and every moment of it looks like any other. Axes: T frames, H rows, W columns.
"""

import itertools
import math
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
RADIUS_RANGE = (11.0, 14.0)
SPEED_RANGE = (0.4, 0.7)
HELD_OUT_EVERY = 5
_MOST_SHAPES = 6


@dataclass(frozen=True)
class Attributes:
    """What a caption says about a clip."""

    color: str
    shape: str
    direction: str
    background: str

    @property
    def caption(self) -> str:
        """Say the attributes in a sentence."""
        return (
            f"a {self.color} {self.shape} moving {self.direction} on a {self.background} background"
        )


@dataclass(frozen=True)
class Motion:
    """Where a shape is and how fast it goes: centre and radius in pixels, speed in pixels/frame."""

    x: float
    y: float
    radius: float
    speed: float


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


def parse_caption(caption: str) -> Attributes:
    """Read the attributes back from a caption.

    Raises:
        ValueError: the caption is not one that `Attributes.caption` writes.
    """
    words = caption.lower().replace(".", "").split()
    if len(words) == 9:
        attributes = Attributes(words[1], words[2], words[4], words[7])
        if attributes in all_attributes() and attributes.caption == " ".join(words):
            return attributes
    raise ValueError(
        "caption must read 'a COLOR SHAPE moving DIRECTION on a BACKGROUND background', "
        f"not {caption!r}"
    )


def random_motion(rng: np.random.Generator) -> Motion:
    """Draw a start, a radius and a speed."""
    x, y = rng.uniform(0, SIZE, 2)
    return Motion(x, y, rng.uniform(*RADIUS_RANGE), rng.uniform(*SPEED_RANGE))


def render(attributes: Attributes, motion: Motion, *, num_frames: int) -> np.ndarray:
    """Draw a clip, edges smoothed over one pixel.

    Returns:
        uint8 `[T, H, W, 3]`.
    """
    cover_THW1 = _moving_coverage(attributes, motion, num_frames=num_frames)
    color = np.array(COLORS[attributes.color], dtype=np.float64)
    background = np.array(BACKGROUNDS[attributes.background], dtype=np.float64)
    return np.rint(background + cover_THW1 * (color - background)).astype(np.uint8)


def draw_scene(rng: np.random.Generator, *, num_frames: int) -> np.ndarray:
    """Draw several shapes of any colour over each other, for training an autoencoder.

    Far more of the picture changes than in a clip, so that far fewer steps teach the same.

    Returns:
        uint8 `[T, H, W, 3]`.
    """
    pool = all_attributes()
    frames = np.broadcast_to(rng.uniform(0, 255, 3), (num_frames, SIZE, SIZE, 3))
    for _ in range(rng.integers(2, _MOST_SHAPES + 1)):
        attributes = pool[rng.integers(len(pool))]
        color = rng.uniform(0, 255, 3) if rng.random() < 0.5 else COLORS[attributes.color]
        cover_THW1 = _moving_coverage(attributes, random_motion(rng), num_frames=num_frames)
        frames = frames + cover_THW1 * (np.array(color) - frames)
    return np.rint(frames).astype(np.uint8)


def _moving_coverage(attributes: Attributes, motion: Motion, *, num_frames: int) -> np.ndarray:
    """Tell how much of each pixel the moving shape covers: `[T, H, W, 1]`, 0 to 1."""
    step_x, step_y = DIRECTIONS[attributes.direction]
    time_T = np.arange(num_frames) * motion.speed
    grid = np.arange(SIZE)
    dx_TW = _wrap(grid[None] - (motion.x + step_x * time_T)[:, None])
    dy_TH = _wrap(grid[None] - (motion.y + step_y * time_T)[:, None])
    shape, radius = attributes.shape, motion.radius
    return coverage(shape, dx_TW[:, None, :], dy_TH[:, :, None], radius=radius)[..., None]


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


def draw(
    rng: np.random.Generator, pool: list[Attributes], *, num_frames: int
) -> tuple[Attributes, np.ndarray]:
    """Draw a random clip of a random entry of `pool`: its attributes and uint8 `[T, H, W, 3]`."""
    attributes = pool[rng.integers(len(pool))]
    return attributes, render(attributes, random_motion(rng), num_frames=num_frames)


def _wrap(offset: np.ndarray) -> np.ndarray:
    """Map an offset on the torus to its nearest copy, -SIZE/2 to SIZE/2."""
    return (offset + SIZE / 2) % SIZE - SIZE / 2
