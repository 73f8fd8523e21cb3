"""Read from decoded pixels what a demo clip shows, and compare it with its caption.

Nothing here is learned: the background is the colour most pixels have, the shape is what stands
out from it, its place is a circular mean (the picture is a torus), its direction is how that place
moves, its form is the best of a few templates. Axes: T frames, H rows, W columns.
"""

from dataclasses import dataclass, fields

import numpy as np

from flowcache.demo.clips import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SIZE,
    Attributes,
    coverage,
)

ATTRIBUTE_NAMES = tuple(field.name for field in fields(Attributes))
UNREADABLE = "unreadable"
# A pixel belongs to the shape when its colour is this far from the background's (of at most 441).
_MASK_DISTANCE = 60.0
# Shares of the picture a shape may cover; the drawn ones cover 9 to 16 %.
_AREA_RANGE = (0.045, 0.28)
# Largest distance of a colour from the one it is named after.
_COLOR_DISTANCE = 90.0
# The shape is the template it overlaps most (intersection over union), if that is enough to speak
# of a shape. Drawn ones reach 0.9 with their own template, 0.84 or less with another.
_SMALLEST_OVERLAP = 0.6
# A clip moves when it covers at least this many pixels per frame, mostly along one axis.
_SLOWEST = 0.2
_LARGEST_DRIFT = 0.4
_RADII = np.arange(9.0, 16.6, 0.5)
# Frames the shape is averaged over.
_NUM_SHAPE_FRAMES = 8


@dataclass(frozen=True)
class Verdict:
    """What the judge reads from a clip; an attribute it cannot read is "unreadable"."""

    color: str
    shape: str
    direction: str
    background: str

    def agrees(self, attributes: Attributes) -> dict[str, bool]:
        """Tell for each attribute whether the clip shows what the caption says."""
        return {name: getattr(self, name) == getattr(attributes, name) for name in ATTRIBUTE_NAMES}


def judge(frames: np.ndarray) -> Verdict:
    """Read colour, shape, direction and background from a clip.

    Args:
        frames: uint8 `[T, 64, 64, 3]`, at least two frames.
    """
    if frames.ndim != 4 or frames.shape[1:] != (SIZE, SIZE, 3) or frames.dtype != np.uint8:
        raise ValueError(
            f"the judge reads uint8 frames [T, {SIZE}, {SIZE}, 3], "
            f"not {frames.dtype} {frames.shape}"
        )
    if len(frames) < 2:
        raise ValueError("the judge needs at least 2 frames to see a direction, not 1")
    pixels_THW3 = frames.astype(np.float32)
    background_3 = _commonest_color(frames)
    background = _nearest(background_3, BACKGROUNDS)
    mask_THW = np.linalg.norm(pixels_THW3 - background_3, axis=-1) > _MASK_DISTANCE
    area_T = mask_THW.mean(axis=(1, 2))
    is_one_shape = (area_T > _AREA_RANGE[0]) & (area_T < _AREA_RANGE[1])
    if is_one_shape.mean() < 0.9:
        return Verdict(UNREADABLE, UNREADABLE, UNREADABLE, background)
    color = _nearest(np.median(pixels_THW3[mask_THW], axis=0), COLORS)
    x_T, y_T = _circular_mean(mask_THW.sum(axis=1)), _circular_mean(mask_THW.sum(axis=2))
    return Verdict(color, _shape(mask_THW, x_T, y_T), _direction(x_T, y_T), background)


def _commonest_color(frames: np.ndarray) -> np.ndarray:
    """Give the median colour of the pixels in the fullest cell of a coarse colour histogram."""
    cells = (frames.reshape(-1, 3) // 32).astype(np.int32)
    index = cells[:, 0] * 64 + cells[:, 1] * 8 + cells[:, 2]
    fullest = np.bincount(index).argmax()
    return np.median(frames.reshape(-1, 3)[index == fullest], axis=0).astype(np.float32)


def _nearest(color_3: np.ndarray, named: dict[str, tuple[int, int, int]]) -> str:
    distances = {name: float(np.linalg.norm(color_3 - rgb)) for name, rgb in named.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < _COLOR_DISTANCE else UNREADABLE


def _circular_mean(mass_TL: np.ndarray) -> np.ndarray:
    """Give the place of the mass along a circular axis of length L, per frame, 0 to L.

    The phase of the first Fourier component. Example: mass 1 at 62 and 1 at 2 on a circle of 64
    has its mean at 0, not at 32.
    """
    angle_L = 2 * np.pi * np.arange(mass_TL.shape[1]) / mass_TL.shape[1]
    phase_T = np.angle(mass_TL @ np.exp(1j * angle_L))
    return (phase_T / (2 * np.pi) * mass_TL.shape[1]) % mass_TL.shape[1]


def _direction(x_T: np.ndarray, y_T: np.ndarray) -> str:
    """Name the direction of a path on the torus, from the median of its moves over four frames."""
    span = min(4, len(x_T) - 1)
    moves = []
    for place_T in (x_T, y_T):
        move = (place_T[span:] - place_T[:-span] + SIZE / 2) % SIZE - SIZE / 2
        moves.append(float(np.median(move)) / span)
    along, across = sorted((abs(move) for move in moves), reverse=True)
    if along < _SLOWEST or across > _LARGEST_DRIFT * along:
        return UNREADABLE
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], moves)))


def _shape(mask_THW: np.ndarray, x_T: np.ndarray, y_T: np.ndarray) -> str:
    """Centre the mask of a few frames, average it, and name the template it overlaps most."""
    times = np.unique(np.linspace(0, len(mask_THW) - 1, _NUM_SHAPE_FRAMES).round().astype(int))
    centred = [
        np.roll(
            mask_THW[t],
            (SIZE // 2 - round(float(y_T[t])), SIZE // 2 - round(float(x_T[t]))),
            axis=(0, 1),
        )
        for t in times
    ]
    mean_HW = np.mean(centred, axis=0)
    overlaps = {}
    for shape in SHAPES:
        templates_NHW = _templates(shape)
        both_N = np.minimum(templates_NHW, mean_HW).sum(axis=(1, 2))
        either_N = np.maximum(templates_NHW, mean_HW).sum(axis=(1, 2))
        overlaps[shape] = float((both_N / either_N).max())
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] > _SMALLEST_OVERLAP else UNREADABLE


def _templates(shape: str) -> np.ndarray:
    """Draw a shape at each radius, its circular mean in the middle of the picture: `[N, H, W]`."""
    grid = np.arange(SIZE) - SIZE // 2
    drawn = []
    for radius in _RADII:
        template = coverage(shape, grid[None, :], grid[:, None], radius=float(radius))
        shift = SIZE // 2 - round(float(_circular_mean(template.sum(axis=1)[None])[0]))
        drawn.append(np.roll(template, shift, axis=0))
    return np.stack(drawn)
