"""Key frames of a video as small pictures inside the page, and metrics of two videos."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from flowcache.errors import UserError
from flowcache.runtime.video import Pixels, read_video

WIDTHS = (320, 240, 160, 112, 80)
"""Pixels; the widest is taken whose pictures all fit into the page."""
JPEG_QUALITY = 82
MAX_BYTES = 2_500_000
"""Of all pictures of a page, as text."""
POSITIONS = ("first", "middle", "last")


class Shown(NamedTuple):
    """The frames of the video that a chunk shows, from `first` to before `stop`."""

    segment: int
    chunk: int
    first: int
    stop: int

    @property
    def key_frames(self) -> tuple[int, int, int]:
        """The first, the middle and the last frame."""
        return self.first, (self.first + self.stop - 1) // 2, self.stop - 1


@dataclass(frozen=True)
class Clip:
    """A decoded video, or why there is none."""

    frames_THW3: Pixels | None
    problem: str | None


def read_clip(path: Path) -> Clip:
    """Read the video of a run; a missing or broken one is a problem to report, not an error."""
    try:
        return Clip(read_video(path)[0], None)
    except UserError as error:
        return Clip(None, str(error).replace(str(path), path.name))


def shown_frames(chunk_frames: dict[str, list[list[int] | None]]) -> list[Shown]:
    """Return which frames every chunk shows, in the order of the record."""
    return [
        Shown(int(segment), chunk, *ends)
        for segment, chunks in chunk_frames.items()
        for chunk, ends in enumerate(chunks)
        if ends and ends[0] < ends[1]
    ]


def first_new_frame(chunk_frames: dict[str, list[list[int] | None]]) -> int:
    """Return the first frame that a chunk shows: those before it were given."""
    return min((shown.first for shown in shown_frames(chunk_frames)), default=0)


def pictures(clips: Sequence[Pixels], wanted: Sequence[int]) -> list[dict[int, str]]:
    """Return for every clip the wanted frames as JPEG data URIs, as wide as fits into the page.

    Raises:
        UserError: even the smallest pictures are too many for a page.
    """
    numbers = sorted(set(wanted))
    for width in WIDTHS:
        found = [
            {at: _data_uri(clip[at], width=width) for at in numbers if at < len(clip)}
            for clip in clips
        ]
        if sum(len(uri) for uris in found for uri in uris.values()) <= MAX_BYTES:
            return found
    raise UserError(
        f"{len(numbers)} key frames do not fit into a page of 5 MB: explain a shorter video"
    )


def _data_uri(frame_HW3: Pixels, *, width: int) -> str:
    image = Image.fromarray(frame_HW3)
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
