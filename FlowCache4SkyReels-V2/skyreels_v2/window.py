"""How a video is cut: segments of a long video, and the chunks of one window.

All counts are latent frames unless a name says pixels. A video of T pixel frames has
(T - 1) // 4 + 1 latent frames: the VAE makes one of the first frame and one of every four more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flowcache.errors import UserError
from flowcache.runtime.config import check_work
from flowcache.wan.vae import TEMPORAL_STRIDE, latent_frames, pixel_frames
from skyreels_v2.config import RunConfig


@dataclass(frozen=True)
class Window:
    """The latent frames of one segment, cut into chunks.

    Chunks are in the order in which the KV cache holds them: the given prefix, the given end frame,
    then the chunks to denoise. In time the end frame is the last one nevertheless.
    """

    num_frames: int
    """Latent frames, the end frame included."""
    chunks: tuple[range, ...]
    """Frame positions of each chunk."""
    num_prefix: int
    """Given latent frames at the start."""
    num_given: int
    """Given chunks: `chunks[:num_given]`."""

    @property
    def generated(self) -> range:
        """Ids of the chunks to denoise."""
        return range(self.num_given, len(self.chunks))


def cut_window(
    num_frames: int, *, chunk_frames: int, num_prefix: int = 0, has_end: bool = False
) -> Window:
    """Cut a window into chunks of `chunk_frames`, counted from the end of the prefix.

    The last chunk may be shorter. Example: 12 frames, chunks of 5, a start image and an end image
    give the chunks 0 | 12 | 1-5 | 6-10 | 11 (the end image is frame 12, after the 12 others).

    Args:
        num_frames: prefix included, end frame not.
        has_end: whether a given frame follows the window.
    """
    prefix = _ranges(0, num_prefix, chunk_frames)
    end = (range(num_frames, num_frames + 1),) if has_end else ()
    generated = _ranges(num_prefix, num_frames, chunk_frames)
    return Window(
        num_frames + has_end, (*prefix, *end, *generated), num_prefix, len(prefix) + len(end)
    )


def _ranges(start: int, stop: int, size: int) -> tuple[range, ...]:
    return tuple(range(a, min(a + size, stop)) for a in range(start, stop, size))


@dataclass(frozen=True)
class Segment:
    """One window of a long video."""

    index: int
    num_frames: int
    """Latent frames, prefix included."""
    prefix_pixels: int
    """Pixel frames at the start that repeat the end of what came before (0: none)."""

    @property
    def new_pixels(self) -> int:
        return pixel_frames(self.num_frames) - self.prefix_pixels


def cut_segments(
    num_frames: int, *, base: int, overlap: int | None, continues_video: bool = False
) -> list[Segment]:
    """Cut a video into windows that overlap; the last one may be shorter.

    Example: 177 pixel frames, windows of 97, overlap 17: 45 latent frames, windows of 25 latent
    frames that share 5: two segments.

    Args:
        num_frames: pixel frames to make; when a video is extended, `overlap` of them are given.
        base: pixel frames of a window.
        overlap: pixel frames shared by neighbouring windows.
        continues_video: whether the first window, too, starts with given frames.
    """
    _check_frames("num_frames", num_frames)
    _check_frames("base_num_frames", base)
    if num_frames <= base and not continues_video:
        return [Segment(0, latent_frames(num_frames), 0)]
    if overlap is None:
        raise UserError(
            f"num_frames {num_frames} is above base_num_frames {base}, so the video is made in "
            "segments that overlap: give overlap_history, 17 or 37 frames are recommended"
        )
    _check_frames("overlap_history", overlap)
    if overlap >= base:
        raise UserError(
            f"overlap_history {overlap} must be below base_num_frames {base}, of which it is a part"
        )
    if continues_video and num_frames <= overlap:
        raise UserError(
            f"num_frames {num_frames} counts the {overlap} frames of overlap_history, too: "
            "it must be above it"
        )
    total, window, shared = (latent_frames(n) for n in (num_frames, base, overlap))
    segments = [] if continues_video else [Segment(0, window, 0)]
    done = shared if continues_video else window
    while done < total:
        size = min(total - done + shared, window)
        segments.append(Segment(len(segments), size, overlap))
        done += size - shared
    return segments


def segments_of(config: RunConfig) -> list[Segment]:
    """Cut the run into segments."""
    window = latent_frames(min(config.num_frames, config.base_num_frames))
    step = max(window - latent_frames(config.overlap_history or 1), 1)
    num_segments = -(-latent_frames(config.num_frames) // step)
    num_chunks = num_segments * -(-window // config.causal_block_size)
    check_work(num_chunks=num_chunks, num_steps=config.num_steps)
    return cut_segments(
        config.num_frames,
        base=config.base_num_frames,
        overlap=config.overlap_history,
        continues_video=config.video is not None,
    )


def window_of(config: RunConfig, segment: Segment, *, is_last: bool, is_i2v: bool) -> Window:
    """Cut one segment into chunks, given frames included."""
    num_prefix = latent_frames(segment.prefix_pixels) if segment.prefix_pixels else 0
    if segment.index == 0 and config.image is not None and not is_i2v:
        num_prefix = 1
    return cut_window(
        segment.num_frames,
        chunk_frames=config.causal_block_size,
        num_prefix=num_prefix,
        has_end=config.end_image is not None and is_last,
    )


def _check_frames(name: str, value: int) -> None:
    if value < 1 or (value - 1) % TEMPORAL_STRIDE:
        below = max(value - 1, 0) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
        raise UserError(
            f"{name} must be 4 n + 1, as the VAE compresses four frames into one, not {value}; "
            f"use {below} or {below + TEMPORAL_STRIDE}"
        )


def describe(window: Window) -> str:
    """Return the chunks in words, as in `5 chunks of 5, 1 of 4 latent frames`."""
    sizes: Sequence[int] = [len(window.chunks[i]) for i in window.generated]
    parts = [f"{sizes.count(s)} of {s}" for s in sorted(set(sizes), reverse=True)]
    return f"{len(sizes)} chunks ({', '.join(parts)} latent frames)"
