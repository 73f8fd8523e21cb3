"""Read videos and images, write videos; never overwrite or half-write a result.

Pixels are uint8 `[T, H, W, 3]`, sizes are (height, width) in pixels. ffmpeg encodes as a program
(from imageio-ffmpeg) and decodes as a library (PyAV).
"""

import contextlib
import logging
import math
import os
import tempfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar, cast

import av
import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
import torch
from av import FFmpegError, VideoFrame
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from PIL import Image

from flowcache.errors import UserError
from flowcache.files import check_writable, fresh_path, remove_stale_parts
from flowcache.images import check_file, one_line, over_background
from flowcache.images import read_image as read_image

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

# HD players read an untagged file as BT.709, ffmpeg writes BT.601 unless told: the colours shift.
COLOUR = [
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
]
# In pieces of half a second until the end, then an ordinary mp4: it can be watched while it grows,
# and what a killed run has written stays readable.
FRAGMENTS = ["-movflags", "hybrid_fragmented", "-frag_duration", "500000"]
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,gif,mpeg,mpegts,flv,asf,ogg"
MAX_NAME_BYTES = 240  # 255 on common file systems, less what `-001` or `.partial` adds


@dataclass(frozen=True)
class Probe:
    """What a video file holds."""

    num_frames: int
    fps: float
    height: int
    width: int


class VideoWriter:
    """Write an H.264 mp4 frame by frame; the file gets its name only when it is complete.

    with VideoWriter(path, fps=24, size=(544, 960)) as writer:
        for frames in chunks:
            writer.append(frames)

    Until the end the frames are in `.NAME.PID.part.mp4` in the same folder. If the body raises (or
    is interrupted), the frames so far become `STEM.partial.mp4`; see `partial_path`. What a killed
    process left is removed by a later writer of that name; see `remove_stale_parts`.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: float,
        size: tuple[int, int],
        quality: int = 8,
        is_lossless: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Check what can be checked before the first frame exists.

        Args:
            path: the `.mp4` to write.
            fps: frames per second, above 0.
            size: (height, width) in pixels, both even unless lossless.
            quality: 1 (small) to 10 (constant rate factor 0); 8 is factor 10.
            is_lossless: store the exact RGB values (H.264 4:4:4; few players show it).
            overwrite: replace an existing file.

        Raises:
            UserError: the size, rate, quality or name is not possible, the file exists, or the
                folder is not writable.
        """
        if path.suffix.lower() != ".mp4":
            raise UserError(f"{path}: a video is written as .mp4, not {path.suffix or 'no suffix'}")
        if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
            raise UserError(f"{path}: a file name has at most {MAX_NAME_BYTES} bytes")
        if not (math.isfinite(fps) and fps > 0):
            raise UserError(f"fps must be above 0, got {fps}")
        if not 1 <= quality <= 10:
            raise UserError(f"video quality must be between 1 and 10, got {quality}")
        divisor = 1 if is_lossless else 2
        if any(length < 1 or length % divisor for length in size):
            rule = "at least 1" if is_lossless else "even (the mp4 halves the colour planes)"
            raise UserError(f"video height and width must be {rule}, got {size[0]} x {size[1]}")
        check_writable(path.parent)
        if path.is_dir() or (path.exists() and not overwrite):
            raise UserError(f"{path} exists: choose another name, or allow overwriting")
        self.path = path
        self.num_frames = 0
        self.partial_path: Path | None = None
        self._size = size
        self._overwrite = overwrite
        before, after = f".{path.stem[:40]}.", ".part.mp4"
        remove_stale_parts(path.parent, before=before, after=after)
        self._part = path.with_name(f"{before}{os.getpid()}{after}")
        self._encoder = imageio_ffmpeg.write_frames(
            str(self._part.resolve()),
            (size[1], size[0]),
            fps=cast(int, fps),  # any positive number; the library's signature names its default
            codec="libx264rgb" if is_lossless else "libx264",
            pix_fmt_out="rgb24" if is_lossless else "yuv420p",
            quality=cast(int, None if is_lossless else quality),
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=(["-crf", "0"] if is_lossless else COLOUR) + FRAGMENTS,
        )

    def __enter__(self) -> "VideoWriter":
        """Return the writer; the encoder starts with the first frame."""
        return self

    def append(self, frames_THW3: Pixels | torch.Tensor) -> None:
        """Add frames, uint8 `[T, H, W, 3]`.

        Raises:
            ValueError: another type or shape than that.
            UserError: the file can't be written, for example because the disk is full.
        """
        frames = _as_array(frames_THW3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self._size, 3):
            wanted = f"uint8 [T, {self._size[0]}, {self._size[1]}, 3]"
            raise ValueError(f"frames must be {wanted}, got {frames.dtype} {list(frames.shape)}")
        try:
            if self.num_frames == 0 and len(frames):
                self._encoder.send(None)
            for frame in frames:
                self._encoder.send(frame)
                self.num_frames += 1
        except OSError as error:
            raise UserError(self._failure(str(error).partition("\n")[0])) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file and give it its name: the result's, or a partial one after an error."""
        self._encoder.close()
        num_written = _num_decodable(self._part) if self._part.exists() else 0
        if kind is None and self.num_frames == 0:
            raise UserError(f"{self.path}: no frame was written")
        if kind is None and num_written == self.num_frames:
            self.path = _settle(self._part, self.path, overwrite=self._overwrite)
            return
        if num_written:
            partial = self.path.with_name(f"{self.path.stem}.partial.mp4")
            self.partial_path = _settle(self._part, partial, overwrite=self._overwrite)
            logger.warning("kept the first %d frames in %s", num_written, self.partial_path)
        self._part.unlink(missing_ok=True)
        if kind is None:
            raise UserError(self._failure("the file holds fewer frames"))

    def _failure(self, reason: str) -> str:
        done = f"after {self.num_frames} frames"
        return f"{self.path}: writing failed {done} ({reason}); is the disk full?"


def read_video(
    path: Path,
    *,
    max_frames: int | None = None,
    last: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[Pixels, float]:
    """Read frames, uint8 `[T, H, W, 3]`, and the rate in frames per second.

    No more frames than those returned are ever in memory.

    Args:
        path: a video file; of several video streams the one that is shown, see `_shown_stream`.
        max_frames: stop after so many.
        last: keep the last so many only.
        fps: bring the video to this rate by its time stamps, see `at_rate`; None: frames as stored.
        size: (height, width) in pixels to scale to (bicubic; the aspect ratio may change).

    Raises:
        UserError: the file is missing, not a video, or holds no frame.
    """
    with _open_video(path) as video:
        timed = video.frames()
        wanted = (each.frame for each in timed) if fps is None else at_rate(timed, fps)
        kept = deque(
            (_pixels(frame, size=size or video.size) for frame in islice(wanted, max_frames)),
            maxlen=last,
        )
        if not kept:
            raise UserError(f"{path}: holds no frame")
        if video.num_damaged:
            logger.warning(
                "%s: damaged in %d places; what could be read is used", path, video.num_damaged
            )
        if fps is not None and video.fps != fps:
            logger.info("%s: %g frames per second are read as %g", path, video.fps, fps)
    return np.stack(kept), video.fps if fps is None else float(fps)


def stream_video(path: Path) -> tuple[tuple[int, int], Generator[Pixels, None, None]]:
    """Return the size (height, width) of a video and its frames one by one, uint8 `[H, W, 3]`.

    Strict: where `read_video` goes on with what can be made of damaged data, the frames end with
    an error.

    Raises:
        UserError: the file is missing or not a video; while reading, it is damaged.
    """
    with _open_video(path) as video:
        size = video.size

    def frames() -> Generator[Pixels, None, None]:
        count = 0
        with _open_video(path, is_strict=True) as video:
            for timed in video.frames():
                yield _pixels(timed.frame, size=size)
                count += 1
        if count == 0 or count < _num_decodable(path):
            raise UserError(f"{path}: broken after frame {count}")

    return size, frames()


def probe(path: Path) -> Probe:
    """Count the frames of a video and read its rate and its size as it is shown.

    Raises:
        UserError: the file is missing, not a video, or holds no frame.
    """
    with _open_video(path) as video:
        return Probe(_num_decodable(path), video.fps, *video.size)


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


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Turn float pixels in -1..1, `[..., 3, T, H, W]`, into uint8 `[..., T, H, W, 3]`.

    -1 -> 0, 0 -> 127 (127.5 is cut off), 1 -> 255.

    Source: SkyReels-V2, the end of the released pipelines: x / 2 + 0.5, clamped, times 255.
    """
    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.to(torch.uint8).movedim(-4, -1)


def to_pixels(frames_THW3: torch.Tensor) -> torch.Tensor:
    """Turn uint8 frames `[T, H, W, 3]` into float pixels `[3, T, H, W]` in -1..1."""
    return frames_THW3.permute(3, 0, 1, 2).float() / 127.5 - 1


def check_ffmpeg() -> None:
    """Encode one frame, so that a missing or unfit ffmpeg shows before hours of work.

    Raises:
        UserError: ffmpeg is missing or can't write what `VideoWriter` asks for.
    """
    advice = "unset IMAGEIO_FFMPEG_EXE, or run: pip install --force-reinstall imageio-ffmpeg"
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            VideoWriter(Path(folder) / "trial.mp4", fps=24, size=(16, 16)) as writer,
        ):
            writer.append(np.zeros((1, 16, 16, 3), np.uint8))
    except (UserError, OSError, RuntimeError) as error:
        raise UserError(f"ffmpeg does not work ({one_line(error)}): {advice}") from None


# Decoding -----------------------------------------------------------------------------------------


class _Video:
    """An open video: its stream that is shown, decoded frame by frame.

    Attributes:
        fps: mean rate in frames per second.
        size: height and width of the first frame, upright.
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
        self._stream = _shown_stream(path, container)
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
        height, width = first.frame.height, first.frame.width
        self.size = (width, height) if _quarter_turns(first.frame) % 2 else (height, width)

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
def _open_video(path: Path, *, is_strict: bool = False) -> Generator[_Video, None, None]:
    check_file(path)
    # without the lists ffmpeg takes a text file for a video of text, and follows links in playlists
    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
    try:
        container = av.open(str(path.resolve()), options=options)
    except (FFmpegError, UnicodeDecodeError):
        raise UserError(f"{path}: not a video that can be read") from None
    with container:
        yield _Video(path, container, is_strict=is_strict)


def _shown_stream(path: Path, container: InputContainer) -> VideoStream:
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


def _pixels(frame: VideoFrame, *, size: tuple[int, int]) -> Pixels:
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


def _num_decodable(path: Path) -> int:
    """Return the number of frames that a file holds; 0 if it can't be read."""
    try:
        with av.open(str(path.resolve())) as container:
            stream = _shown_stream(path, container)
            return sum(bool(p.size) and not p.is_discard for p in container.demux(stream))
    except (FFmpegError, UserError, UnicodeDecodeError):
        return 0


def _settle(part: Path, path: Path, *, overwrite: bool) -> Path:
    """Give a finished file its name, or a fresh one if that exists by now."""
    if not overwrite:
        path = fresh_path(path.parent, path.stem, path.suffix)
    os.replace(part, path)
    return path


def _as_array(frames: Pixels | torch.Tensor) -> Pixels:
    array = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else frames
    return np.ascontiguousarray(array)
