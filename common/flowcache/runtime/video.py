"""Read and write videos, read pictures; never overwrite or half-write a result.

Pixels are uint8 `[T, H, W, 3]`, sizes are (height, width) in pixels. ffmpeg encodes as a program
(from imageio-ffmpeg) and decodes as a library (PyAV). Both, and Pillow, are imported where a file
is written or read: what makes videos in memory, as the benchmark, runs without them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import struct
import tempfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange

from flowcache.errors import UserError, first_line, one_line
from flowcache.runtime.ending import Ending, Stopped, current, undisturbed
from flowcache.runtime.files import (
    check_file,
    check_writable,
    fresh_path,
    remove_stale_parts,
)

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from PIL import Image

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

VIDEO_QUALITY = 8  # 1 (small) to 10 (constant rate factor 0); 8 is factor 10
MAX_NAME_BYTES = 240  # 255 on common file systems, less what `-001` or `.partial` adds
# HD players read an untagged file as BT.709, ffmpeg writes BT.601 by default: the colours shift.
COLOUR = [
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
]
# In pieces of half a second until the end, then an ordinary mp4: it can be watched while it grows,
# and what a killed run has written stays readable.
FRAGMENTS = ["-movflags", "hybrid_fragmented", "-frag_duration", "500000"]
BACKGROUND = (255, 255, 255)
"""White, as in viewers and browsers; what shows through a transparent pixel."""
LEVELS = (1, 255, 65535)
"""White in images of float or whole numbers: the first of these that no value is above."""
MAX_ASPECT = 8
"""Of a pixel; the widest in use, of anamorphic film, is 2."""
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,gif,mpeg,mpegts,flv,asf,ogg"


# Writing ------------------------------------------------------------------------------------------


class VideoWriter:
    """Write an H.264 mp4 frame by frame; the file gets its name only when it is complete.

    Until the end the frames are in `.NAME.PID.part.mp4` in the same folder. If the body raises (or
    is interrupted), the frames so far become `STEM.partial.mp4`; see `partial_path`. What a killed
    process left is removed by a later writer of that name; see `remove_stale_parts`.

    With `publishes=False` a complete file keeps that name until `publish`, so that what has to lie
    next to the video can be written first.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: float,
        size: tuple[int, int],
        overwrite: bool = False,
        publishes: bool = True,
        keeps_partial: bool = True,
    ) -> None:
        """Check what can be checked before the first frame exists.

        Args:
            size: (height, width) in pixels, both even.
            publishes: give the file its name at the end of the context; else `publish` does.
            keeps_partial: keep the frames of an unfinished video.
        """
        if path.suffix.lower() != ".mp4":
            raise UserError(f"{path}: a video is written as .mp4, not {path.suffix or 'no suffix'}")
        if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
            raise UserError(f"{path}: a file name has at most {MAX_NAME_BYTES} bytes")
        if not (math.isfinite(fps) and fps > 0):
            raise UserError(f"fps must be above 0, got {fps}")
        if any(length < 1 or length % 2 for length in size):
            rule = "even (the mp4 halves the colour planes)"
            raise UserError(f"video height and width must be {rule}, got {size[0]} x {size[1]}")
        check_writable(path.parent)
        if path.is_dir() or (path.exists() and not overwrite):
            raise UserError(f"{path} exists: choose another name, or allow overwriting")
        self.path = path
        self.num_frames = 0
        self.partial_path: Path | None = None
        self._size = size
        self._overwrite = overwrite
        self._publishes = publishes
        self._keeps_partial = keeps_partial
        self._ending: Ending | None = None
        before, after = f".{path.stem[:40]}.", ".part.mp4"
        remove_stale_parts(path.parent, before=before, after=after)
        self._part = path.with_name(f"{before}{os.getpid()}{after}")
        self._encoder = _encoder(self._part, fps=fps, size=size)

    def __enter__(self) -> VideoWriter:
        """Return the writer; the encoder starts with the first frame."""
        self._ending = current()
        if self._ending is not None and self._keeps_partial:
            self._ending.begin(self._part, self._partial_name())
        return self

    def append(self, frames_THW3: Pixels | torch.Tensor) -> None:
        """Add frames, uint8 `[T, H, W, 3]`."""
        if isinstance(frames_THW3, torch.Tensor):
            frames_THW3 = frames_THW3.cpu().numpy()
        frames = np.ascontiguousarray(frames_THW3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self._size, 3):
            wanted = f"uint8 [T, {self._size[0]}, {self._size[1]}, 3]"
            raise ValueError(f"frames must be {wanted}, got {frames.dtype} {list(frames.shape)}")
        try:
            with undisturbed():  # imageio ends the encoder at once if a signal meets it here
                if self.num_frames == 0 and len(frames):
                    self._encoder.send(None)
                for frame in frames:
                    self._encoder.send(frame)
                    self.num_frames += 1
        except OSError as error:
            raise UserError(self._failure(first_line(error))) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file and give it its name: the result's, or a partial one after an error."""
        with undisturbed():
            self._finish(error)

    def publish(self) -> None:
        """Give a complete file its name."""
        if self.path.exists() and not self._overwrite:
            self._keep(None, self.num_frames)
            self._end()
            raise UserError(f"{self.path} appeared meanwhile and is kept: see {self.partial_path}")
        os.replace(self._part, self.path)
        self._end()

    def _finish(self, error: BaseException | None) -> None:
        self._encoder.close()
        num_written = num_decodable(self._part) if self._part.exists() else 0
        if error is None and self.num_frames == 0:
            self._end()
            raise UserError(f"{self.path}: no frame was written")
        if error is None and num_written == self.num_frames:
            if not self._overwrite:  # another run may have taken the name
                wanted = self.path
                self.path = fresh_path(wanted.parent, wanted.stem, wanted.suffix)
                if self.path != wanted:
                    logger.warning("%s appeared meanwhile and is kept: see %s", wanted, self.path)
            if self._publishes:
                self.publish()
            return
        if num_written and self._keeps_partial:
            self._keep(error, num_written)
        self._end()
        if error is None:
            raise UserError(self._failure("the file holds fewer frames"))

    def _keep(self, error: BaseException | None, num_frames: int) -> None:
        """Give an unfinished file the name that says so, and name it with what ended the run."""
        name = self._partial_name()
        if not self._overwrite:
            name = fresh_path(name.parent, name.stem, name.suffix)
        self.partial_path = name
        os.replace(self._part, self.partial_path)
        sentence = f"kept the first {num_frames} frames in {self.partial_path}"
        if isinstance(error, Stopped):
            error.kept.append(sentence)
        else:
            logger.warning("%s", sentence)

    def _end(self) -> None:
        self._part.unlink(missing_ok=True)
        if self._ending is not None:
            self._ending.finish(self._part)

    def _partial_name(self) -> Path:
        return self.path.with_name(f"{self.path.stem}.partial.mp4")

    def _failure(self, reason: str) -> str:
        done = f"after {self.num_frames} frames"
        return f"{self.path}: writing failed {done} ({reason}); is the disk full?"


def _encoder(path: Path, *, fps: float, size: tuple[int, int]) -> Generator[None, Any, None]:
    """Return ffmpeg as a generator that is sent None, then frames."""
    import imageio_ffmpeg

    return imageio_ffmpeg.write_frames(
        str(path.resolve()),
        (size[1], size[0]),
        fps=cast(int, fps),  # any positive number; the library's signature names its default
        codec="libx264",
        pix_fmt_out="yuv420p",
        quality=VIDEO_QUALITY,
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=COLOUR + FRAGMENTS,
    )


class LiveWriter:
    """Write an H.264 mp4 that can be watched while it grows: every frame is on the disk at once.

    Larger than what `VideoWriter` makes of the same frames, as the encoder may not look ahead.
    """

    def __init__(self, path: Path, *, fps: int, is_lossless: bool = False) -> None:
        """Open the file.

        Args:
            fps: whole frames per second.
            is_lossless: store the exact RGB values (H.264 4:4:4; few players show it).
        """
        import av

        self.num_frames = 0
        self._fps = fps
        self._is_lossless = is_lossless
        self._container = av.open(
            str(path),
            "w",
            format="mp4",
            options={
                "movflags": "frag_every_frame+empty_moov+default_base_moof",
                "flush_packets": "1",
            },
        )
        self._stream: VideoStream | None = None

    def __enter__(self) -> LiveWriter:
        """Return the writer."""
        return self

    def append(self, frames_THW3: Pixels) -> None:
        """Add frames, uint8 `[T, H, W, 3]`, H and W even."""
        import av

        if self._stream is None:
            codec, pixels = ("libx264rgb", "rgb24") if self._is_lossless else ("libx264", "yuv420p")
            factor = "0" if self._is_lossless else "16"
            options = {"tune": "zerolatency", "crf": factor, "preset": "veryfast"}
            stream = self._container.add_stream(codec, self._fps, options)
            stream.height, stream.width = frames_THW3.shape[1:3]
            stream.pix_fmt = pixels
            self._stream = stream
        for frame_HW3 in frames_THW3:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HW3), format="rgb24")
            frame.pts = self.num_frames
            self._container.mux(self._stream.encode(frame))
            self.num_frames += 1

    def __exit__(self, *error: object) -> None:
        """Finish the file, after an error, too."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()


def check_ffmpeg() -> None:
    """Encode one frame, so that a missing or unfit ffmpeg shows before hours of work."""
    advice = "unset IMAGEIO_FFMPEG_EXE, or run: pip install --force-reinstall imageio-ffmpeg"
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trial.mp4"
            encoder = _encoder(path, fps=24, size=(16, 16))
            encoder.send(None)
            encoder.send(np.zeros((16, 16, 3), np.uint8))
            encoder.close()
            if num_decodable(path) != 1:
                raise UserError("it wrote no frame")
    except (UserError, OSError, RuntimeError) as error:
        raise UserError(f"ffmpeg does not work ({one_line(error)}): {advice}") from None


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Turn float pixels in -1..1, `[..., 3, T, H, W]`, into uint8 `[..., T, H, W, 3]`.

    -1 -> 0, 0 -> 127 (127.5 is cut off), 1 -> 255.

    Source: SkyReels-V2, the end of the released pipelines: x / 2 + 0.5, clamped, times 255.
    """
    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    return rearrange(scaled.to(torch.uint8), "... c t h w -> ... t h w c")


def to_pixels(frames_THW3: torch.Tensor) -> torch.Tensor:
    """Turn uint8 frames `[T, H, W, 3]` into float pixels `[3, T, H, W]` in -1..1."""
    return rearrange(frames_THW3, "t h w c -> c t h w").float() / 127.5 - 1


# Reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """What a video file holds."""

    num_frames: int
    fps: float
    height: int
    width: int


def read_video(
    path: Path,
    *,
    max_frames: int | None = None,
    last: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[Pixels, float]:
    """Read frames, uint8 `[T, H, W, 3]`, and the rate in frames per second.

    Args:
        path: a video file; of several video streams the one that is shown, see `shown_stream`.
        fps: bring the video to this rate by its time stamps, see `at_rate`; None: frames as stored.
        size: (height, width) in pixels to scale to (bicubic; the aspect ratio may change).
    """
    with open_video(path) as video:
        timed = video.frames()
        wanted = (each.frame for each in timed) if fps is None else at_rate(timed, fps)
        kept = deque(
            (pixels_of(frame, size=size or video.size) for frame in islice(wanted, max_frames)),
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
    """
    with open_video(path) as video:
        size = video.size

    def frames() -> Generator[Pixels, None, None]:
        count = 0
        with open_video(path, is_strict=True) as video:
            for timed in video.frames():
                yield pixels_of(timed.frame, size=size)
                count += 1
        if count == 0 or count < num_decodable(path):
            raise UserError(f"{path}: broken after frame {count}")

    return size, frames()


def probe(path: Path) -> Probe:
    """Count the frames of a video and read its rate and its size as it is shown."""
    with open_video(path) as video:
        return Probe(num_decodable(path), video.fps, *video.size)


# Decoding -----------------------------------------------------------------------------------------


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
        """Decode the first frame."""
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
        """Return how many times as wide as high a pixel is shown."""
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
        import av

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
        from av import FFmpegError

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
    """Open a video to be decoded; strict: its frames end with an error at damaged data."""
    import av

    check_file(path)
    # without the lists ffmpeg takes a text file for a video of text, and follows links in playlists
    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
    try:
        container = av.open(str(path.resolve()), options=options)
    except (av.FFmpegError, UnicodeDecodeError):
        raise UserError(f"{path}: not a video that can be read") from None
    with container:
        yield Video(path, container, is_strict=is_strict)


def shown_stream(path: Path, container: InputContainer) -> VideoStream:
    """Return the video stream that ffmpeg takes: marked as default, then the most pixels."""
    from av.stream import Disposition

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
    from av.video.reformatter import Interpolation
    from PIL import Image

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
    import av

    try:
        with av.open(str(path.resolve())) as container:
            stream = shown_stream(path, container)
            return sum(bool(p.size) and not p.is_discard for p in container.demux(stream))
    except (av.FFmpegError, UserError, UnicodeDecodeError):
        return 0


# Pictures -----------------------------------------------------------------------------------------


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB as it is seen; of an animated one the first frame.

    It is turned upright as its EXIF data say. Transparency is put over `BACKGROUND`. Grey values
    of 16 bits are scaled; those of float or 32 bits are taken as 0..1, 0..255 or 0..65535, the
    smallest of these ranges that holds all of them (whole numbers: not 0..1).
    """
    from PIL import Image, ImageOps

    check_file(path)
    try:
        with Image.open(path) as image:
            return _as_rgb(ImageOps.exif_transpose(image), path)
    except UserError:
        raise
    except _image_errors() as error:
        raise _no_image(path, error) from None


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image as it is seen."""
    from PIL import Image, ImageOps

    check_file(path)
    try:
        with Image.open(path) as image:
            width, height = ImageOps.exif_transpose(image).size
            return height, width
    except _image_errors() as error:
        raise _no_image(path, error) from None


def over_background(image: Image.Image) -> Image.Image:
    """Return an RGBA image over `BACKGROUND`, as RGB."""
    from PIL import Image

    whole = Image.new("RGBA", image.size, (*BACKGROUND, 255))
    return Image.alpha_composite(whole, image).convert("RGB")


def _image_errors() -> tuple[type[BaseException], ...]:
    """Return what Pillow raises for damaged files: a broken PNG is a SyntaxError."""
    from PIL import Image

    return (
        *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError),
        *(AttributeError, NotImplementedError, struct.error, Image.DecompressionBombError),
    )


def _as_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _grey_as_rgb(image, path)
    if image.mode == "LAB":
        from PIL import ImageCms

        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None, "nothing is converted in place"
        return converted
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    if seen.getchannel("A").getextrema() != (255, 255):
        logger.info("%s: its transparent pixels are shown over white", path)
    return over_background(seen)


def _grey_as_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Turn grey values of more than 8 bits into RGB."""
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{path}: holds values that are not finite: repair or replace the image")
    low, high = float(values.min()), float(values.max())
    white = [level for level in LEVELS if high <= level]
    if not (low >= 0 and white):
        raise UserError(
            f"{path}: its grey values are {low:g} to {high:g}, but must be in 0..1, 0..255 or "
            "0..65535: scale them"
        )
    if image.mode.startswith("I;16"):
        white = [LEVELS[-1]]
    elif image.mode == "I":
        white = [level for level in white if level != 1]
    grey = np.rint(values * (255 / white[0])).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _no_image(path: Path, error: BaseException) -> UserError:
    reason = "" if "cannot identify" in str(error) else f" ({one_line(error)})"
    return UserError(f"{path}: not an image that can be read{reason}")
