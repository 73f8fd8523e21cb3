"""Read from decoded pixels what a demo clip shows, and compare it with its caption.

Nothing here is learned: the background is the colour most pixels have, the shape is what stands
out from it, its direction is how its place moves at first, its form is the best of a few templates.
How steady the clip is follows from the same pixels: whether the form stays in every frame, whether
the picture changes evenly, whether it is torn. Of two shapes, each is read with the other painted
over. Places are circular means, so that what leaves on one side and comes back on the other can be
read, too. Axes: T frames, H rows, W columns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.ndimage import label

from flowcache.demo.clips import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    OPENING_FRAMES,
    SHAPES,
    SIZE,
    Attributes,
    coverage,
)

ATTRIBUTE_NAMES = tuple(field.name for field in fields(Attributes))
UNREADABLE = "unreadable"
# A pixel belongs to the shape when its colour is this far from the background's (of at most 441).
_MASK_DISTANCE = 60.0
# Shares of the picture a shape may cover; the drawn ones cover 6 to 13 %.
_AREA_RANGE = (0.045, 0.28)
# Largest distance of a colour from the one it is named after.
_COLOR_DISTANCE = 90.0
# The shape is the template it overlaps most (intersection over union), if that is enough to speak
# of a shape. Drawn ones reach 0.9 with their own template, 0.84 or less with another.
_SMALLEST_OVERLAP = 0.6
# A clip moves when it covers at least this many pixels per frame, mostly along one axis.
_SLOWEST = 0.2
_LARGEST_DRIFT = 0.4
_RADII = np.arange(8.5, 16.6, 0.5)
# Frames the shape is averaged over.
_NUM_SHAPE_FRAMES = 8
# Share of the frames that must show about as much of a shape as is drawn; of two shapes, which hide
# each other, fewer.
_SHOWN_SHARE, _PAIR_SHOWN_SHARE = 0.9, 0.4
# Brightest and darkest a shape's colour is shaded.
_SHADES = np.linspace(0.6, 1.15, 7)
# A frame keeps the shape if it overlaps the template this much, and a clip if so many frames do.
_KEPT_OVERLAP = 0.7
_KEPT_SHARE = 0.95
# Frames that video VAEs make from one latent.
_STRIDE = 4
# Largest amplitude of a rhythm in the changes from frame to frame, as a share of the mean change.
# Drawn clips stay below 0.1 behind a codec; one change in four makes 2.
_LARGEST_RHYTHM = 0.3
# A clip is torn where the picture changes this many times as much as usual (and by a visible
# amount, in grey levels), where the shape leaps by so many pixels, and where less than this share
# of it hangs together.
_LARGEST_CHANGE = 3.0
_VISIBLE_CHANGE = 1.0
_LARGEST_LEAP = 3.0
_SMALLEST_PIECE = 0.9
# Frames with a shape in pieces that a clip may hold.
_PIECES_SHARE = 0.02


@dataclass(frozen=True)
class Verdict:
    """What the judge reads from a clip; an attribute it cannot read is "unreadable"."""

    color: str
    shape: str
    direction: str
    background: str

    def agrees(self, attributes: Attributes, *, either_way: bool = False) -> dict[str, bool]:
        """Tell for each attribute whether the clip shows what the caption says.

        Args:
            either_way: whether the opposite direction is right, too, as after a bounce.
        """
        agrees = {
            name: getattr(self, name) == getattr(attributes, name) for name in ATTRIBUTE_NAMES
        }
        if either_way and self.direction != UNREADABLE:
            step_x, step_y = DIRECTIONS[attributes.direction]
            agrees["direction"] |= DIRECTIONS[self.direction] == (-step_x, -step_y)
        return agrees


@dataclass(frozen=True)
class Steadiness:
    """How steady a clip is, and the numbers that say so.

    Attributes:
        kept_share: share of the frames that show the clip's shape.
        rhythm: amplitude of the strongest rhythm of 4 or 2 frames in the changes from frame to
            frame, as a share of their mean: 0 is even, 2 is a change at every fourth frame only.
        jumps: frames after which the picture or the shape jumps.
        pieces: frames in which the shape is in pieces.
        num_frames: frames of the clip.
    """

    kept_share: float
    rhythm: float
    jumps: tuple[int, ...]
    pieces: tuple[int, ...]
    num_frames: int

    @property
    def keeps_shape(self) -> bool:
        """Whether nearly all frames show the shape."""
        return self.kept_share >= _KEPT_SHARE

    @property
    def is_smooth(self) -> bool:
        """Whether the picture changes without the rhythm of a VAE's stride."""
        return self.rhythm <= _LARGEST_RHYTHM

    @property
    def is_torn(self) -> bool:
        """Whether it jumps anywhere, or shows its shape in pieces for more than a moment."""
        return bool(self.jumps) or len(self.pieces) > _PIECES_SHARE * self.num_frames

    @property
    def passes(self) -> dict[str, bool]:
        """By name, what holds of a steady clip."""
        return {"kept": self.keeps_shape, "smooth": self.is_smooth, "whole": not self.is_torn}


@dataclass(frozen=True)
class _Seen:
    """What stands out in a clip: background colour, pixels of the shape, and its place."""

    background: np.ndarray
    mask_THW: np.ndarray
    x_T: np.ndarray
    y_T: np.ndarray

    @property
    def is_one_shape(self) -> np.ndarray:
        """Whether a frame shows about as much of a shape as is drawn, `[T]`."""
        area_T = self.mask_THW.mean(axis=(1, 2))
        return (area_T > _AREA_RANGE[0]) & (area_T < _AREA_RANGE[1])


def judge(frames: np.ndarray) -> Verdict:
    """Read colour, shape, direction and background from a clip.

    Args:
        frames: uint8 `[T, 64, 64, 3]`, at least two frames.
    """
    return _judge(frames, shown_share=_SHOWN_SHARE)


def judge_scene(frames: np.ndarray, scene: Sequence[Attributes]) -> list[Verdict]:
    """Read every shape of a scene from a clip; see `judge`.

    Args:
        scene: the shapes of the caption, whose colours tell them apart.
    """
    if len(scene) == 1:
        return [judge(frames)]
    alone = [only(frames, attributes, scene) for attributes in scene]
    return [_judge(each, shown_share=_PAIR_SHOWN_SHARE) for each in alone]


def only(frames: np.ndarray, attributes: Attributes, scene: Sequence[Attributes]) -> np.ndarray:
    """Paint the background over all shapes of a scene but one."""
    pixels = frames.astype(np.float32)
    own_THW = _shade_distance(pixels, COLORS[attributes.color])
    background = _commonest_color(frames)
    away_THW = np.linalg.norm(pixels - background, axis=-1)
    alone = frames.copy()
    for other in scene:
        if other is not attributes:
            other_THW = _shade_distance(pixels, COLORS[other.color])
            is_other_THW = (other_THW < own_THW) & (other_THW < away_THW)
            alone[is_other_THW] = background
    return alone


def _shade_distance(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Return how far pixels are from the nearest shade of a colour, `[T, H, W]`."""
    shades = (np.array(color, dtype=np.float32) * shade for shade in _SHADES)
    return np.min([np.linalg.norm(pixels - shade, axis=-1) for shade in shades], axis=0)


def _judge(frames: np.ndarray, *, shown_share: float) -> Verdict:
    seen = _look(frames)
    background = _nearest(seen.background, BACKGROUNDS)
    if seen.is_one_shape.mean() < shown_share:
        return Verdict(UNREADABLE, UNREADABLE, UNREADABLE, background)
    color = _nearest(np.median(frames[seen.mask_THW].astype(np.float32), axis=0), COLORS)
    shape, _ = _shape(seen)
    opening = slice(OPENING_FRAMES + 1)
    return Verdict(color, shape, _direction(seen.x_T[opening], seen.y_T[opening]), background)


def judge_steadiness(frames: np.ndarray) -> Steadiness:
    """Measure whether a clip of one shape keeps it, moves evenly and is nowhere torn.

    Args:
        frames: uint8 `[T, 64, 64, 3]`, at least two frames.
    """
    seen = _look(frames)
    _, template_HW = _shape(seen)
    overlap_T = np.array([_overlap(mask_HW, template_HW) for mask_HW in _centred(seen)])
    change_T = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))
    jumps = np.flatnonzero(_is_jump(change_T) | _is_leap(seen))
    whole_T = np.array([_largest_piece(mask_HW) for mask_HW in _centred(seen)])
    return Steadiness(
        kept_share=float((seen.is_one_shape & (overlap_T > _KEPT_OVERLAP)).mean()),
        rhythm=_rhythm(change_T),
        jumps=tuple(jumps.tolist()),
        pieces=tuple(np.flatnonzero(whole_T < _SMALLEST_PIECE).tolist()),
        num_frames=len(frames),
    )


def _look(frames: np.ndarray) -> _Seen:
    """Find what stands out from the background."""
    if frames.ndim != 4 or frames.shape[1:] != (SIZE, SIZE, 3) or frames.dtype != np.uint8:
        raise ValueError(
            f"the judge reads uint8 frames [T, {SIZE}, {SIZE}, 3], "
            f"not {frames.dtype} {frames.shape}"
        )
    if len(frames) < 2:
        raise ValueError("the judge needs at least 2 frames to see a direction, not 1")
    background_3 = _commonest_color(frames)
    away_THW = np.linalg.norm(frames.astype(np.float32) - background_3, axis=-1)
    mask_THW = away_THW > _MASK_DISTANCE
    x_T, y_T = _circular_mean(mask_THW.sum(axis=1)), _circular_mean(mask_THW.sum(axis=2))
    return _Seen(background_3, mask_THW, x_T, y_T)


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
    """Name the direction of a path, from the median of its moves over four frames."""
    span = min(4, len(x_T) - 1)
    moves = []
    for place_T in (x_T, y_T):
        move = (place_T[span:] - place_T[:-span] + SIZE / 2) % SIZE - SIZE / 2
        moves.append(float(np.median(move)) / span)
    along, across = sorted((abs(move) for move in moves), reverse=True)
    if along < _SLOWEST or across > _LARGEST_DRIFT * along:
        return UNREADABLE
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], moves)))


def _shape(seen: _Seen) -> tuple[str, np.ndarray]:
    """Average a few centred masks; name the template they overlap most, and return it."""
    area_T = seen.mask_THW.sum(axis=(1, 2))
    (whole,) = np.nonzero(area_T >= np.median(area_T))  # the others may be hidden in part
    chosen = np.linspace(0, len(whole) - 1, _NUM_SHAPE_FRAMES).round().astype(int)
    times = whole[np.unique(chosen)]
    mean_HW = np.mean(_centred(seen, times), axis=0)
    best, best_overlap, template_HW = UNREADABLE, -1.0, np.zeros((SIZE, SIZE))
    for shape in SHAPES:
        for drawn_HW in _templates(shape):
            overlap = _overlap(mean_HW, drawn_HW)
            if overlap > best_overlap:
                best, best_overlap, template_HW = shape, overlap, drawn_HW
    return (best if best_overlap > _SMALLEST_OVERLAP else UNREADABLE), template_HW


def _centred(seen: _Seen, times: Iterable[int] | None = None) -> list[np.ndarray]:
    """Move the shape's place to the middle of the picture, in some frames or in all."""
    return [
        np.roll(
            seen.mask_THW[t],
            (SIZE // 2 - round(float(seen.y_T[t])), SIZE // 2 - round(float(seen.x_T[t]))),
            axis=(0, 1),
        )
        for t in (range(len(seen.x_T)) if times is None else times)
    ]


def _overlap(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Return the intersection over the union of two coverages."""
    return float(np.minimum(a_HW, b_HW).sum() / np.maximum(a_HW, b_HW).sum())


def _rhythm(change_T: np.ndarray) -> float:
    """Return the amplitude of the strongest rhythm of 4 or 2 frames, as a share of the mean.

    Example: changes of 16, 1.6, 1.6, 1.6 and so on have the mean 5.2; a period of 4 has the
    amplitude 2 * 14.4 / 4 = 7.2, which is 1.38 of it.
    """
    mean = float(change_T.mean())
    if mean == 0:
        return 0.0
    # a single jump is no rhythm
    change_T = np.minimum(change_T, _LARGEST_CHANGE * _usual(change_T))
    # whole periods only, so that what goes on steadily has no part in them
    change_T = change_T[: len(change_T) // _STRIDE * _STRIDE]
    amplitudes = [0.0]
    for period, weight in ((_STRIDE, 2.0), (2, 1.0)):
        turn_T = np.exp(-2j * np.pi * np.arange(len(change_T)) / period)
        amplitudes.append(weight * float(np.abs((change_T * turn_T).mean())))
    return max(amplitudes) / mean


def _is_jump(change_T: np.ndarray) -> np.ndarray:
    """Tell where the picture changes far more than usual, `[T - 1]`."""
    return (change_T > _LARGEST_CHANGE * _usual(change_T)) & (change_T > _VISIBLE_CHANGE)


def _is_leap(seen: _Seen) -> np.ndarray:
    """Tell where the shape's place moves far more than usual, `[T - 1]`."""
    is_leap_T = np.zeros(len(seen.x_T) - 1, dtype=bool)
    for place_T in (seen.x_T, seen.y_T):
        move_T = np.abs((np.diff(place_T) + SIZE / 2) % SIZE - SIZE / 2)
        is_leap_T |= move_T > _usual(move_T) + _LARGEST_LEAP
    return is_leap_T


def _usual(value_T: np.ndarray) -> np.ndarray:
    """Give the median of each frame's phase, so that a rhythm counts as a rhythm and no tear."""
    usual_T = np.empty_like(value_T)
    for phase in range(min(_STRIDE, len(value_T))):
        usual_T[phase::_STRIDE] = np.median(value_T[phase::_STRIDE])
    return usual_T


def _largest_piece(mask_HW: np.ndarray) -> float:
    """Return the share of a mask that hangs together; 1 if there is nothing."""
    pieces_HW = np.zeros(mask_HW.shape, dtype=np.int32)
    label(mask_HW, structure=np.ones((3, 3)), output=pieces_HW)
    sizes = np.bincount(pieces_HW.ravel())[1:]
    return float(sizes.max() / sizes.sum()) if len(sizes) else 1.0


def _templates(shape: str) -> np.ndarray:
    """Draw a shape at each radius, its circular mean in the middle of the picture: `[N, H, W]`."""
    grid = np.arange(SIZE) - SIZE // 2
    drawn = []
    for radius in _RADII:
        template = coverage(shape, grid[None, :], grid[:, None], radius=float(radius))
        shift = SIZE // 2 - round(float(_circular_mean(template.sum(axis=1)[None])[0]))
        drawn.append(np.roll(template, shift, axis=0))
    return np.stack(drawn)
