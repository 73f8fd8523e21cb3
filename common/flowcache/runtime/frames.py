"""Clips as streams of frames: videos, folders of PNG files, and arrays.

A stream holds one frame at a time, whatever the clip's length; an `.npz` alone is read whole.
"""

import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowcache.errors import UserError
from flowcache.runtime.files import ARRAY_ERRORS
from flowcache.runtime.images import read_image
from flowcache.runtime.video import Pixels, stream_video

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
ARRAY_SUFFIXES = (".npy", ".npz")


@dataclass(frozen=True)
class FrameStream:
    """The frames of a clip, read as they are asked for."""

    path: Path
    size: tuple[int, int]
    """Height and width in pixels."""
    frames: Generator[Pixels, None, None]
    """Each uint8 `[H, W, 3]`."""


def is_clip(path: Path) -> bool:
    """Tell whether a path is one clip: a video, an array, or a folder of PNG files."""
    if path.is_dir():
        return bool(_png_files(path))
    return path.suffix.lower() in VIDEO_SUFFIXES + ARRAY_SUFFIXES


def list_clips(folder: Path) -> dict[str, Path]:
    """Return the clips of a folder by name without suffix; hidden files are left out.

    Raises:
        UserError: there is no clip, or two have one name.
    """
    clips: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not is_clip(path):
            continue
        name = path.name if path.is_dir() else path.stem
        if name in clips:
            raise UserError(
                f"{folder}: {clips[name].name} and {path.name} are two clips of one name: keep one"
            )
        clips[name] = path
    if not clips:
        kinds = ", ".join(VIDEO_SUFFIXES + ARRAY_SUFFIXES)
        raise UserError(f"{folder}: holds no clip ({kinds}, or folders of PNG files)")
    return clips


def open_clip(path: Path) -> FrameStream:
    """Open a clip; what kind it is shows in the suffix.

    Args:
        path: a video; an `.npy` or `.npz` that holds one uint8 array `[T, H, W, 3]`; or a folder
            of PNG files, in the order of the numbers in their names.

    Raises:
        UserError: it is missing or can't be read; while reading, a frame is damaged or has another
            size than the first.
    """
    if path.is_dir():
        return _open_images(path)
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return _open_array(path)
    size, frames = stream_video(path)
    return FrameStream(path, size, frames)


def _open_images(folder: Path) -> FrameStream:
    paths = _png_files(folder)
    if not paths:
        raise UserError(f"{folder}: a folder without PNG files, so no clip")
    first = read_image(paths[0])
    size = (first.height, first.width)

    def frames() -> Generator[Pixels, None, None]:
        for path in paths:
            frame = np.asarray(read_image(path))
            if frame.shape[:2] != size:
                raise UserError(
                    f"{path}: {frame.shape[1]}x{frame.shape[0]} pixels, but the first frame has "
                    f"{size[1]}x{size[0]}"
                )
            yield frame

    return FrameStream(folder, size, frames())


def _png_files(folder: Path) -> list[Path]:
    """Return the PNG files of a folder, `frame_2` before `frame_10`."""

    def order(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.stem)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    found = (path for path in folder.iterdir() if path.suffix.lower() == ".png")
    return sorted((path for path in found if not path.name.startswith(".")), key=order)


def _open_array(path: Path) -> FrameStream:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = list(content.values()) if isinstance(content, np.lib.npyio.NpzFile) else [content]
    except ARRAY_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not an array file of numpy ({reason[:200]})") from None
    if len(arrays) != 1:
        raise UserError(f"{path}: must hold one array, not {len(arrays)}")
    pixels = arrays[0]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or not pixels.size:
        raise UserError(
            f"{path}: must hold uint8 pixels [T, H, W, 3], found {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    _, height, width, _ = pixels.shape
    return FrameStream(path, (height, width), (np.array(frame) for frame in pixels))
