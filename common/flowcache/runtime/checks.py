"""What a run makes is looked at: values that are not finite, and videos that show nothing.

Whether values are finite is computed on the device along with the result and read with it, so that
nothing waits for it. Which weight is to blame is looked up only after a check has failed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flowcache.errors import UserError

Modules = Mapping[str, nn.Module]
"""Loaded models by what messages call them."""
Pixels = npt.NDArray[np.uint8]

MAX_FLAT_STD = 1.0
"""Of a frame's colour over its pixels, in levels of 255: rounding and the codec reach half of it,
while a disc of 1 % of the frame in another grey (100 levels apart) has 10, and the flattest frame
of ten videos of both demos has 20."""
MAX_FROZEN_CHANGE = 1.5
"""Of the mean of a square of `SQUARE` pixels against the first frame, in levels of 255: the codec
moves means of equal frames by less than one; an edge that moves by a pixel moves the means next
to it by an eighth of its height. In ten videos of both demos the largest change was at least 52."""
SQUARE = 8
"""Pixels: where a codec works, so that its noise cancels out."""
MAX_BLACK = 2.0
"""Mean level of 255 up to which one colour is called black."""


@dataclass(frozen=True)
class Decoded:
    """New pixel frames, and whether the latents that they show are finite."""

    frames: Tensor
    """`[3, T, H, W]`, about -1..1."""
    is_latent_finite: Tensor
    """A boolean on the device, still unread."""

    @classmethod
    def concatenated(cls, parts: Sequence["Decoded"]) -> "Decoded":
        """Return parts that follow each other as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.frames for part in parts], dim=1),
            torch.stack([part.is_latent_finite for part in parts]).all(),
        )


def all_finite(x: Tensor) -> Tensor:
    """Return whether all values are finite, as a boolean on the device of the values."""
    return x.isfinite().all()


class NotFiniteError(UserError):
    """A result holds values that are not finite."""

    def __init__(self, place: str, *, modules: Modules | None = None) -> None:
        """Say where they are, and why."""
        self.place, cause = place, ""
        if modules is not None:
            weight, names = broken_weight(modules), " and ".join(modules)
            cause = (
                f"; so does its weight {weight}: the file is damaged, download it again"
                if weight is not None
                else f", though all weights of {names} are finite: a number grew too large; try "
                "dtype=float32 or bfloat16, or other settings"
            )
        super().__init__(f"{place} hold values that are not finite{cause}")

    def caused_by(self, modules: Modules) -> "NotFiniteError":
        """Return the same error with its cause."""
        return NotFiniteError(self.place, modules=modules)


def check_finite(x: Tensor, place: str, *, modules: Modules | None = None) -> Tensor:
    """Return a result that was read already."""
    if not bool(all_finite(x)):
        raise NotFiniteError(place, modules=modules)
    return x


def broken_weight(modules: Modules) -> str | None:
    """Name the first weight that holds a value that is not finite; None: all are finite."""
    for owner, module in modules.items():
        for name, weight in chain(module.named_parameters(), module.named_buffers()):
            # types of one byte know no `isfinite`
            values = weight.float() if weight.dtype.itemsize == 1 else weight
            if not bool(all_finite(values)):
                return f"{name} of the {owner}"
    return None


# Degenerate videos --------------------------------------------------------------------------------


class DegenerateCheck:
    """Tells whether a video is of one colour all over, or frozen: then a run failed silently."""

    def __init__(self) -> None:
        self.num_frames = 0
        self._is_flat = True
        self._is_frozen = True
        self._first: npt.NDArray[np.floating] | None = None
        self._colour = np.zeros(3)

    def see(self, frames_THW3: Iterable[Pixels]) -> None:
        """Look at the next frames, uint8 `[H, W, 3]` each."""
        for frame in frames_THW3:
            self.num_frames += 1
            if self._is_flat:
                self._is_flat = bool((frame.std(axis=(0, 1)) <= MAX_FLAT_STD).all())
                self._colour += frame.mean(axis=(0, 1))
            if self._is_frozen:
                means = _square_means(frame)
                if self._first is None:
                    self._first = means
                change = np.abs(means - self._first).max()
                self._is_frozen = bool(change <= MAX_FROZEN_CHANGE)

    def alarms(self) -> list[str]:
        """Return a line for each way in which the video shows nothing."""
        if self.num_frames == 0:
            return []
        if self._is_flat:
            colour = self._colour / self.num_frames
            hexadecimal = "#" + "".join(f"{round(value):02x}" for value in colour)
            name = "black" if colour.max() <= MAX_BLACK else hexadecimal
            moves = "" if self._is_frozen else ", which changes"
            return [f"constant: all {self.num_frames} frames are of one colour ({name}{moves})"]
        if self._is_frozen and self.num_frames > 1:
            return [f"frozen: all {self.num_frames} frames are equal"]
        return []


def _square_means(frame_HW3: Pixels) -> npt.NDArray[np.floating]:
    """Return the mean colour of each square of pixels; of smaller ones at the edges, too."""
    sums = np.add.reduceat(frame_HW3.astype(np.float32), range(0, frame_HW3.shape[0], SQUARE))
    sums = np.add.reduceat(sums, range(0, frame_HW3.shape[1], SQUARE), axis=1)
    height, width = frame_HW3.shape[:2]
    rows = np.minimum(SQUARE, height - np.arange(0, height, SQUARE))
    columns = np.minimum(SQUARE, width - np.arange(0, width, SQUARE))
    return sums / (rows[:, None, None] * columns[None, :, None])
