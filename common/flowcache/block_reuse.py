"""Reuse what a block of the transformer changed in the chunk before, at the same step.

Where chunks take few steps, a step is too unlike the one before; but the same step of the chunk
before is much like it. A block whose input is like that chunk's adds what it added there.

Axes: S tokens, D width, N looked-at rows.

Source: X-Cache, arXiv 2604.20289.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

GRID = (2, 4, 4)
"""Frames, rows and columns of the tokens that are looked at: 32. Source: X-Cache."""


@dataclass(frozen=True)
class _Stored:
    looked_ND: Tensor
    change_SD: Tensor
    likeness: float | None
    """Smoothed, of the inputs that were compared with this one's."""


@dataclass
class BlockReuse:
    """Decides block by block; lives as long as a video.

    Of a block's input 32 tokens on a grid and the mean of all are compared with those of the chunk
    for which the block was last computed. It is reused if the least cosine is at least
    `max(floor, smoothed - margin)` and no token moved by `most_change` times its length or more.
    The first block is always computed, and so is a chunk of another size.

    Example: cosines 0.999, then 0.98: after the first one the smoothed likeness is 0.999, so that
    0.979 is asked for, and both are reused; the next is asked for
    0.7 * 0.999 + 0.3 * 0.98 - 0.02 = 0.9733.
    """

    floor: float = 0.97
    margin: float = 0.02
    smoothing: float = 0.3
    most_change: float = 2.0
    stored: dict[tuple[Hashable, int], _Stored] = field(default_factory=dict)
    num_reused: int = 0
    """Blocks since the last `begin`."""

    def begin(self) -> None:
        """Begin a pass through all blocks."""
        self.num_reused = 0

    def through(
        self,
        x_SD: Tensor,
        *,
        step: Hashable,
        block: int,
        size: tuple[int, int, int],
        compute: Callable[[], Tensor],
    ) -> Tensor:
        """Return what a block makes of its input.

        Args:
            step: which of a chunk's steps it is.
            size: frames, rows and columns of the tokens.
            compute: runs the block.
        """
        looked_ND = looked_at(x_SD, size=size)
        key, old = (step, block), self.stored.get((step, block))
        likeness: float | None = None
        if block and old is not None and old.change_SD.shape == x_SD.shape:
            found, change = _compared(looked_ND, old.looked_ND)
            asked = self.floor
            if old.likeness is not None:
                asked = max(asked, old.likeness - self.margin)
            likeness = found
            if old.likeness is not None:
                likeness = (1 - self.smoothing) * old.likeness + self.smoothing * found
            if found >= asked and change < self.most_change:
                self.stored[key] = _Stored(old.looked_ND, old.change_SD, likeness)
                self.num_reused += 1
                return x_SD + old.change_SD
        y_SD = compute()
        self.stored[key] = _Stored(looked_ND, y_SD - x_SD, likeness)
        return y_SD


def looked_at(x_SD: Tensor, *, size: tuple[int, int, int]) -> Tensor:
    """Return tokens on an even grid, and the mean of all, float32 [N, D].

    Example: of 4 frames of a single token the frames 0 and 3 are looked at, each 16 times.
    """
    x_FHWD = x_SD.unflatten(0, size)
    for axis, (length, count) in enumerate(zip(size, GRID, strict=True)):
        places = [round(n * (length - 1) / (count - 1)) for n in range(count)]
        x_FHWD = x_FHWD.index_select(axis, torch.tensor(places, device=x_SD.device))
    return torch.cat([x_FHWD.flatten(0, 2).float(), x_SD.float().mean(dim=0, keepdim=True)])


def _compared(now_ND: Tensor, before_ND: Tensor) -> tuple[float, float]:
    """Return the least cosine of two inputs' rows, and the largest relative change of one."""
    cosine_N = torch.cosine_similarity(now_ND, before_ND, dim=-1)
    change_N = (now_ND - before_ND).norm(dim=-1) / before_ND.norm(dim=-1)
    least, largest = torch.stack([cosine_N.min(), change_N.max()]).tolist()
    return least, largest
