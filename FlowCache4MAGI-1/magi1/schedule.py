"""MAGI-1's clock: timesteps, which chunks are denoised when, and what each may see.

Timesteps run from 0 (noise) to 1 (clean).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.schedule import Tick, staggered
from magi1.config import ReleaseConfig

Warp = Literal["sd3_shift", "square", "piecewise", "identity"]

SHIFT = 3.0
"""Of the released models: with it the timestep is s^2 / (3 - 2 s^2)."""
SHORTCUT_STEPS = 12
"""Step count that has a table of its own: four times three steps of unequal length."""
LATE_SHORTCUT = "16,16,8"
"""The shortcut mode whose short steps come first; any other has them last."""
KNEE = (0.875, 0.5)
"""Where the piecewise warp bends: that share of the steps leads to that timestep."""
DEFAULT_PREFIX_REACH = 8
"""Chunks that a given chunk sees, itself included, where no range is configured. Source: MAGI-1."""


def timestep_table(
    num_steps: int, *, shortcut_mode: str = "", warp: Warp = "sd3_shift", shift: float = SHIFT
) -> Tensor:
    """Return the timesteps before each step and after the last, float32 `[num_steps + 1]`.

    With 8 steps: 0, 0.0053, 0.0217, 0.0517, 0.1, 0.1761, 0.3, 0.5213, 1.

    Args:
        shortcut_mode: read with 12 steps only, see `LATE_SHORTCUT`.
        warp: how even steps are stretched; the released models use `sd3_shift`.
        shift: of `sd3_shift`.
    """
    s = torch.linspace(0, 1, num_steps + 1)
    if num_steps == SHORTCUT_STEPS:
        quarter = torch.linspace(0, 1, 5) / 4
        offsets = quarter[:3] if shortcut_mode == LATE_SHORTCUT else quarter[[0, 2, 3]]
        starts = torch.linspace(0, 1, 5).unsqueeze(1)
        s = (starts + offsets).flatten()[: num_steps + 1]
    if warp == "identity":
        return s
    if warp == "piecewise":
        place, height = KNEE
        steep = height + (s - place) * (1 - height) / (1 - place)
        return torch.where(s < place, s * (height / place), steep)
    square = s**2
    if warp == "square":
        return square
    return square / shift / (1 - (1 - 1 / shift) * square)


def interval_table(num_steps: int, *, shortcut_mode: str) -> list[float]:
    """Return the length of every step of a stage in units of the shortest, for distilled models.

    It is 1 throughout, but 2 1 1 2 1 1 ... (or 1 1 2 ...) where the step count divides by three.
    """
    if num_steps % 3:
        return [1.0] * num_steps
    pattern = [1.0, 1.0, 2.0] if shortcut_mode == LATE_SHORTCUT else [2.0, 1.0, 1.0]
    return pattern * (num_steps // 3)


def step_width(num_steps: int, *, interval: float) -> float:
    """Return the step size as a distilled model takes it.

    64 steps give 32, 16 give 8, 8 give 4; 12 give 4 for a long step and 8 for a short one.
    """
    if num_steps == SHORTCUT_STEPS:
        return 4 / interval * 2
    return num_steps / 4 * 2


@dataclass(frozen=True)
class Clip:
    """One video in chunks: given ones, then those to denoise.

    Example: 96 frames after 8 given latents are 24 + 8 = 32 latents, hence 6 chunks of 6. One is
    given whole; chunk 1 begins with the other 2 given latents.
    """

    num_frames: int
    """Asked for."""
    num_prefix: int = 0
    """Given latents (an image is one), at the start of the clip."""
    is_image: bool = False
    """Whether an image is given, which the new video shows."""
    chunk_width: int = 6
    temporal_stride: int = 4

    def __post_init__(self) -> None:
        if self.num_frames < self.temporal_stride:
            least, chunk = self.temporal_stride, self.chunk_width * self.temporal_stride
            raise UserError(
                f"num_frames must be at least {least}, which make one latent frame, not "
                f"{self.num_frames}: use {chunk}, a whole chunk, or a multiple"
            )

    @property
    def num_chunks(self) -> int:
        """Chunks of the clip, given ones included."""
        latents = self.num_frames // self.temporal_stride + self.num_prefix
        return math.ceil(latents / self.chunk_width)

    @property
    def num_given(self) -> int:
        """Chunks that are given whole."""
        return self.num_prefix // self.chunk_width

    @property
    def num_latents(self) -> int:
        """Latents of the clip, given ones included."""
        return self.num_chunks * self.chunk_width

    @property
    def generated(self) -> range:
        """Chunks to denoise."""
        return range(self.num_given, self.num_chunks)

    @property
    def num_frames_out(self) -> int:
        """Frames that the clip shows: whole chunks, without a given video, with a given image."""
        return sum(len(self.shown(chunk)) for chunk in self.generated) * self.temporal_stride

    def latents(self, chunk: int) -> range:
        """Return the latents of a chunk."""
        return range(chunk * self.chunk_width, (chunk + 1) * self.chunk_width)

    def num_fixed(self, chunk: int) -> int:
        """Return how many of a chunk's latents are given."""
        return min(max(self.num_prefix - chunk * self.chunk_width, 0), self.chunk_width)

    def shown(self, chunk: int) -> range:
        """Return the latents of a clean chunk that belong to the new video.

        All but given ones; a given image is shown. The release shows every prefix of one latent;
        of a video that would repeat frames.
        """
        own = self.latents(chunk)
        return own if self.is_image else own[self.num_fixed(chunk) :]

    def shown_frames(self) -> list[list[int]]:
        """Return for each chunk the frames `[first, stop)` of the video that show it."""
        rows, stop = list[list[int]](), 0
        for chunk in range(self.num_chunks):
            first = stop
            if chunk in self.generated:
                stop += len(self.shown(chunk)) * self.temporal_stride
            rows.append([first, stop])
        return rows


@dataclass(frozen=True)
class Clock:
    """When each chunk takes which step, and what it may see then.

    Attributes:
        num_steps: denoising steps of a chunk.
        window: chunks denoised at once.
        reaches: chunks that a chunk sees, itself included, in each part of its steps, noisiest
            first; empty: all before it.
        clean_reach: the same for a clean chunk; -1: as in the last part.
        shortcut_mode: see `timestep_table`.
        nearly_clean: timestep above which a chunk counts as nearly clean.
    """

    num_steps: int
    window: int
    reaches: tuple[int, ...] = ()
    clean_reach: int = -1
    shortcut_mode: str = ""
    nearly_clean: float = 0.3

    @classmethod
    def of(cls, config: ReleaseConfig) -> "Clock":
        """Return the clock that a config of the release describes."""
        run = config.runtime_config
        return cls(
            num_steps=run.num_steps,
            window=run.window_size,
            reaches=run.noise2clean_kvrange,
            clean_reach=run.clean_chunk_kvrange,
            shortcut_mode=config.engine_config.shortcut_mode,
            nearly_clean=config.engine_config.distill_nearly_clean_chunk_threshold,
        )

    @property
    def stage(self) -> int:
        """Ticks between the entries of two chunks."""
        return self.num_steps // self.window

    def ticks(self, clip: Clip) -> list[Tick]:
        """Return the passes that denoise a clip."""
        return staggered(clip.generated, num_steps=self.num_steps, lag=self.stage)

    def timesteps(self) -> Tensor:
        """Return the table of timesteps, see `timestep_table`."""
        return timestep_table(self.num_steps, shortcut_mode=self.shortcut_mode)

    def is_nearly_clean(self, step: int) -> bool:
        """Tell whether a chunk is nearly clean in its own step."""
        # a float32 against a double: three quarters of the way it is 0.30000001, which counts
        return self.timesteps()[step].item() > self.nearly_clean

    def step_width(self, tick: Tick) -> float:
        """Return the step size of a tick as a distilled model takes it."""
        intervals = interval_table(self.num_steps, shortcut_mode=self.shortcut_mode)
        return step_width(self.num_steps, interval=intervals[tick.index % self.stage])

    def reach(self, step: int) -> int | None:
        """Return how many chunks a chunk sees in its own step, itself included; None: all."""
        if not self.reaches:
            return None
        return self.reaches[step // (self.num_steps // len(self.reaches))]

    def reach_clean(self) -> int | None:
        """Return how many chunks a chunk that became clean sees, itself included; None: all."""
        return self.reach_given() if self.reaches else None

    def reach_given(self) -> int:
        """Return how many chunks a given chunk sees, itself included.

        With 2, given chunks 0, 1, 2 see chunks 0; 0 and 1; 1 and 2.
        """
        if self.clean_reach != -1:
            return self.clean_reach
        return self.reaches[-1] if self.reaches else DEFAULT_PREFIX_REACH


def visible(chunk: int, reach: int | None) -> range:
    """Return the chunks that `chunk` sees: the last `reach` up to itself, or all."""
    return range(0 if reach is None else max(0, chunk + 1 - reach), chunk + 1)
