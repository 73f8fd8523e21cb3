"""Degenerate videos: of one colour all over, or frozen. A run that made one has failed silently.

check = DegenerateCheck()
for frames in chunks:
    check.see(frames)
for line in check.alarms(): ...
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

MAX_FLAT_STD = 1.0
"""Of a frame's colour over its pixels, in levels of 255: rounding and the codec reach half of it,
while a disc of 1 % of the frame in another grey (100 levels apart) has 10, and the flattest frame
of ten videos of both demos has 20."""
MAX_FROZEN_CHANGE = 1.5
"""Of the mean of a square of `SQUARE` pixels against the first frame, in levels of 255: the codec
moves means of equal frames by less than one; an edge that moves by a pixel moves the means beside
it by an eighth of its height. In ten videos of both demos the largest change was at least 52."""
SQUARE = 8
"""Pixels: where a codec works, so that its noise cancels out."""
MAX_BLACK = 2.0
"""Mean level of 255 up to which one colour is called black."""

Pixels = npt.NDArray[np.uint8]


class DegenerateCheck:
    """Looks at the frames of one video as they come; an ordinary one costs two frames."""

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
            name = "black" if colour.max() <= MAX_BLACK else _hexadecimal(colour)
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


def _hexadecimal(colour: npt.NDArray[np.float64]) -> str:
    return "#" + "".join(f"{round(value):02x}" for value in colour)
