"""Read videos and images, write videos; never overwrite or half-write a result.

Pixels are uint8 `[T, H, W, 3]`, sizes are (height, width) in pixels. ffmpeg encodes as a program
(from imageio-ffmpeg) and decodes as a library (PyAV). Both are imported where a file is written or
read: what makes videos in memory, as the benchmark, runs without them.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from flowcache.errors import UserError, one_line
from flowcache.runtime.ending import Ending, Stopped, current, undisturbed
from flowcache.runtime.files import check_writable, fresh_path, remove_stale_parts
from flowcache.runtime.images import read_image as read_image

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

# HD players read an untagged file as BT.709, ffmpeg writes BT.601 unless told: the colours shift.
COLOUR = [
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
]
# In pieces of half a second until the end, then an ordinary mp4: it can be watched while it grows,
# and what a killed run has written stays readable.
FRAGMENTS = ["-movflags", "hybrid_fragmented", "-frag_duration", "500000"]
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

    With `publishes=False` a complete file keeps that name until `publish`, so that what has to lie
    next to the video can be written first.
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
        publishes: bool = True,
        keeps_partial: bool = True,
    ) -> None:
        """Check what can be checked before the first frame exists.

        Args:
            path: the `.mp4` to write.
            fps: frames per second, above 0.
            size: (height, width) in pixels, both even unless lossless.
            quality: 1 (small) to 10 (constant rate factor 0); 8 is factor 10.
            is_lossless: store the exact RGB values (H.264 4:4:4; few players show it).
            overwrite: replace an existing file.
            publishes: give the file its name at the end of the context; else `publish` does.
            keeps_partial: keep the frames of an unfinished video.

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
        self._publishes = publishes
        self._keeps_partial = keeps_partial
        self._ending: Ending | None = None
        before, after = f".{path.stem[:40]}.", ".part.mp4"
        remove_stale_parts(path.parent, before=before, after=after)
        self._part = path.with_name(f"{before}{os.getpid()}{after}")
        import imageio_ffmpeg

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

    def __enter__(self) -> VideoWriter:
        """Return the writer; the encoder starts with the first frame."""
        self._ending = current()
        if self._ending is not None and self._keeps_partial:
            self._ending.begin(self._part, self._partial_name())
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
            with undisturbed():  # imageio ends the encoder at once if a signal meets it here
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
        with undisturbed():
            self._finish(error)

    def publish(self) -> None:
        """Give a complete file its name.

        Raises:
            UserError: a file of that name appeared meanwhile; the video is kept as a partial one.
        """
        if self.path.exists() and not self._overwrite:
            self._keep(None, self.num_frames)
            self._end()
            raise UserError(f"{self.path} appeared meanwhile and is kept: see {self.partial_path}")
        os.replace(self._part, self.path)
        self._end()

    def _finish(self, error: BaseException | None) -> None:
        from flowcache.runtime.decoding import num_decodable

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
        path: a video file; of several video streams the one that is shown, see `shown_stream`.
        max_frames: stop after so many.
        last: keep the last so many only.
        fps: bring the video to this rate by its time stamps, see `at_rate`; None: frames as stored.
        size: (height, width) in pixels to scale to (bicubic; the aspect ratio may change).

    Raises:
        UserError: the file is missing, not a video, or holds no frame.
    """
    from flowcache.runtime.decoding import at_rate, open_video, pixels_of

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

    Raises:
        UserError: the file is missing or not a video; while reading, it is damaged.
    """
    from flowcache.runtime.decoding import num_decodable, open_video, pixels_of

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
    """Count the frames of a video and read its rate and its size as it is shown.

    Raises:
        UserError: the file is missing, not a video, or holds no frame.
    """
    from flowcache.runtime.decoding import num_decodable, open_video

    with open_video(path) as video:
        return Probe(num_decodable(path), video.fps, *video.size)


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
            VideoWriter(
                Path(folder) / "trial.mp4", fps=24, size=(16, 16), keeps_partial=False
            ) as writer,
        ):
            writer.append(np.zeros((1, 16, 16, 3), np.uint8))
    except (UserError, OSError, RuntimeError) as error:
        raise UserError(f"ffmpeg does not work ({one_line(error)}): {advice}") from None


def _as_array(frames: Pixels | torch.Tensor) -> Pixels:
    array = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else frames
    return np.ascontiguousarray(array)
