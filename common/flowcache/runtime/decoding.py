"""Decode videos as they are seen: one stream, upright, by time stamps, transparency over white.

PyAV decodes, ffmpeg as a library.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Generic, TypeVar

import av
import numpy as np
import numpy.typing as npt
from av import FFmpegError, VideoFrame
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from PIL import Image

from flowcache.errors import UserError
from flowcache.runtime.files import check_file
from flowcache.runtime.images import over_background

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

MAX_ASPECT = 8
"""Of a pixel; the widest in use, of anamorphic film, is 2."""
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,gif,mpeg,mpegts,flv,asf,ogg"


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A frame and when it is shown, in seconds."""

    frame: T
    start: Fraction
    stop: Fraction


def at_rate(timed: Iterable[Timed[T]], fps: float) -> Generator[T, None, None]:
    """Yield which frames make a video of another rate, none made up.

    Frame n of the new video is the last one whose start, rounded to frames of the new rate, is not
    after n; the last one is shown until its stop. From 30 to 24 frames per second: 0, 1, 3, 4, 5,
    6, 8, ... A video that is shorter than half a frame has one frame.

    Source: the filter `fps` of ffmpeg, which the release of MAGI-1 uses.
    """
    shown: Timed[T] | None = None
    place = first = 0
    for coming in timed:
        start = _nearest(coming.start * Fraction(fps))
        if shown is None:
            place = first = start
        while shown is not None and place < start:
            yield shown.frame
            place += 1
        shown = coming
    if shown is not None:
        for _ in range(place, max(_nearest(shown.stop * Fraction(fps)), first + 1)):
            yield shown.frame


def _nearest(value: Fraction) -> int:
    """Round to the nearest whole number, halves away from zero."""
    half = Fraction(1, 2)
    return math.floor(value + half) if value >= 0 else math.ceil(value - half)


class Video:
    """An open video: its stream that is shown, decoded frame by frame.

    Attributes:
        fps: mean rate in frames per second.
        size: height and width of the first frame as it is shown: upright, with square pixels.
        num_damaged: packets that could not be decoded so far.
    """

    def __init__(self, path: Path, container: InputContainer, *, is_strict: bool) -> None:
        """Decode the first frame.

        Raises:
            UserError: there is none, or the rate is not told.
        """
        self.path = path
        self.num_damaged = 0
        self._container = container
        self._is_strict = is_strict
        self._stream = shown_stream(path, container)
        self._stream.thread_type = "AUTO"
        if is_strict:
            self._stream.codec_context.options = {"err_detect": "explode"}
        rate = self._stream.average_rate or self._stream.guessed_rate
        if not rate:
            raise UserError(f"{path}: says no frame rate")
        self.fps = float(rate)
        self._usual_length = 1 / rate
        self._decoded = self._decode()
        first = next(self._decoded, None)
        if first is None:
            raise UserError(f"{path}: holds no frame")
        self._first = first
        height, width = first.frame.height, round(first.frame.width * self._aspect())
        self.size = (width, height) if _quarter_turns(first.frame) % 2 else (height, width)

    def _aspect(self) -> Fraction:
        """Return how many times as wide as high a pixel is shown.

        Raises:
            UserError: no picture is meant by it.
        """
        aspect = self._stream.sample_aspect_ratio or Fraction(1)
        if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
            raise UserError(
                f"{self.path}: its pixels are {float(aspect):g} times as wide as high, but must be "
                f"1/{MAX_ASPECT} to {MAX_ASPECT} times: the file is damaged"
            )
        return aspect

    def frames(self) -> Iterator[Timed[VideoFrame]]:
        """Return all frames, once."""
        return chain([self._first], self._decoded)

    def _decode(self) -> Generator[Timed[VideoFrame], None, None]:
        origin = Fraction(self._container.start_time or 0, av.time_base)
        at = Fraction(0)
        for count, frame in enumerate(self._intact()):
            if self._is_strict and frame.is_corrupt:
                raise UserError(f"{self.path}: broken after frame {count}")
            base = frame.time_base or Fraction(1, av.time_base)
            start = at if frame.pts is None else frame.pts * base - origin
            at = start + ((frame.duration or 0) * base or self._usual_length)
            yield Timed(frame, start, at)

    def _intact(self) -> Generator[VideoFrame, None, None]:
        """Yield what can be decoded; strict: end with an error at what can't."""
        count = 0
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                frames = [] if packet is None else packet.decode()
            except FFmpegError:
                if self._is_strict:
                    raise UserError(f"{self.path}: broken after frame {count}") from None
                self.num_damaged += 1
                continue
            if packet is None:
                return
            for frame in frames:
                yield frame
                count += 1


@contextlib.contextmanager
def open_video(path: Path, *, is_strict: bool = False) -> Generator[Video, None, None]:
    check_file(path)
    # without the lists ffmpeg takes a text file for a video of text, and follows links in playlists
    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
    try:
        container = av.open(str(path.resolve()), options=options)
    except (FFmpegError, UnicodeDecodeError):
        raise UserError(f"{path}: not a video that can be read") from None
    with container:
        yield Video(path, container, is_strict=is_strict)


def shown_stream(path: Path, container: InputContainer) -> VideoStream:
    """Return the video stream that ffmpeg takes: marked as default, then the most pixels.

    Cover pictures are no video.

    Raises:
        UserError: there is none.
    """
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise UserError(f"{path}: holds no video stream")
    return max(
        streams,
        key=lambda stream: (
            bool(stream.disposition & Disposition.default),
            stream.codec_context.width * stream.codec_context.height,
        ),
    )


def pixels_of(frame: VideoFrame, *, size: tuple[int, int]) -> Pixels:
    """Return a frame upright in a size, uint8 `[H, W, 3]`; transparent ones over white."""
    has_alpha = any(part.is_alpha for part in frame.format.components)
    wanted = "rgba" if has_alpha else "rgb24"
    array = frame.reformat(format=wanted, interpolation=Interpolation.BICUBIC).to_ndarray()
    if has_alpha:
        array = np.asarray(over_background(Image.fromarray(array)))
    array = np.ascontiguousarray(np.rot90(array, _quarter_turns(frame)))
    if array.shape[:2] == size:
        return array
    image = Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _quarter_turns(frame: VideoFrame) -> int:
    """Return how often a frame is turned left by 90 degrees to be upright, as cameras note."""
    return round(frame.rotation / 90) % 4


def num_decodable(path: Path) -> int:
    """Return the number of frames that a file holds; 0 if it can't be read."""
    try:
        with av.open(str(path.resolve())) as container:
            stream = shown_stream(path, container)
            return sum(bool(p.size) and not p.is_discard for p in container.demux(stream))
    except (FFmpegError, UserError, UnicodeDecodeError):
        return 0
