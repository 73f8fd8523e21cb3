"""Divide the tokens of a chunk among processes, and its heads inside attention.

Outside attention each process has a share of the tokens of every frame and all heads. Inside it has
all tokens and a share of the heads: keys and values are cached, compressed and attended to per
head, so nothing else has to be exchanged. The order of the tokens is that of one process.

Example: 2 frames of 3 tokens, a b c | d e f, and 2 processes: the first has a b d e, the second
c f. Inside attention the first has a b c d e f of the first half of the heads.

Axes: B batch, S tokens of a chunk, H query heads, G key/value heads, C head width.

Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowcache.kv import Attend
from flowcache.runtime.ranks import Group


@dataclass(frozen=True)
class TokenSplit:
    """Which tokens of a chunk each process of a group has; alone it has all.

    Attributes:
        num_frames: parts of the chunk that are divided one by one.
        frame_tokens: tokens of such a part; they need not divide evenly.
    """

    group: Group
    num_frames: int
    frame_tokens: int

    @property
    def sizes(self) -> list[int]:
        """Tokens of a frame in each process."""
        size, rest = divmod(self.frame_tokens, self.group.size)
        return [size + (rank < rest) for rank in range(self.group.size)]

    def own(self, x: Tensor, *, axis: int) -> Tensor:
        """Return this process' share of all tokens, which are on an axis."""
        return x if self.group.size == 1 else self._shares(x, axis=axis)[self.group.rank]

    def whole(self, x_BS: Tensor) -> Tensor:
        """Return all tokens from this process' share, `[B, own tokens, ...]`."""
        return x_BS if self.group.size == 1 else self._collect([x_BS] * self.group.size)

    def over_heads(self, attend: Attend) -> Attend:
        """Return an attention of this process' tokens that calls `attend` with all tokens.

        `attend` sees this process' share of the heads, query heads beside their key/value heads.
        """
        if self.group.size == 1:
            return attend

        def exchanged(layer: int, q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor) -> Tensor:
            parts = [x.chunk(self.group.size, dim=2) for x in (q_BSHC, k_BSGC, v_BSGC)]
            pieces = [torch.cat(shares, dim=2) for shares in zip(*parts, strict=True)]
            q, k, v = self._collect(pieces).split([part[0].shape[2] for part in parts], dim=2)
            return self._scatter(attend(layer, q, k, v))

        return exchanged

    def _shares(self, x: Tensor, *, axis: int) -> list[Tensor]:
        frames = x.unflatten(axis, (self.num_frames, self.frame_tokens))
        return [part.flatten(axis, axis + 1) for part in frames.split(self.sizes, dim=axis + 1)]

    def _collect(self, pieces: Sequence[Tensor]) -> Tensor:
        """Give each process its piece of the own tokens; return all tokens of one's own piece."""
        batch, _, *rest = pieces[0].shape
        shapes = [(batch, self.num_frames, size, *rest) for size in self.sizes]
        counts = [torch.Size(shape).numel() for shape in shapes]
        received = self.group.swapped(pieces, sizes=counts)
        frames = [x.view(shape) for x, shape in zip(received, shapes, strict=True)]
        return torch.cat(frames, dim=2).flatten(1, 2)

    def _scatter(self, x_BSHC: Tensor) -> Tensor:
        """Give each process its tokens of the own heads; return one's own tokens of all heads."""
        pieces = self._shares(x_BSHC, axis=1)
        shape = pieces[self.group.rank].shape
        received = self.group.swapped(pieces, sizes=[shape.numel()] * self.group.size)
        return torch.cat([x.view(shape) for x in received], dim=2)
