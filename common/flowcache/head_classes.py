"""Sort attention heads by what they look at; every class keeps other clean tokens.

Most heads of an autoregressive video model look at few frames: the first one, the newest ones, or
their own chunk. Heads are sorted once, after some chunks with all tokens; from then on each class
has a cache of its own, which holds the frames that its heads look at.

Axes: Q queries, T clean and own key tokens, H heads, N layers, F latent frames, P tokens of a
patch, D head width. Everything is unbatched, without grouped-query attention.

Source: Dummy Forcing, arXiv 2601.20499; Forcing-KV, arXiv 2605.09681.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from flowcache.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Layout(Protocol):
    """See `flowcache.compress.TokenLayout`."""

    @property
    def frame_tokens(self) -> int: ...

    @property
    def chunk_tokens(self) -> int: ...


QUERY_SHARE = 3
"""Of a frame's queries one in so many is looked at. Source: Dummy Forcing."""
SORTING_CHUNK = 1
"""The chunk in whose clean pass heads are sorted: the second. Source: both, for Self-Forcing."""
SCORING_LAYER = 1
"""Whose keys say which patches stay, in all layers. Source: Forcing-KV."""
SCORING_FRAMES = 4
"""Newest frames of that layer that are looked at: three that may stay, and the next one."""


def frame_mass(q_QHD: Tensor, k_THD: Tensor, *, frame_tokens: int) -> Tensor:
    """Return the attention that each frame of keys receives from a query on average, [H, F].

    The queries are evenly spaced, a third of a frame's. Example with D = 1: a query of 1 and keys
    0, log 3 in frames of one token give 1/4 and 3/4.
    """
    step = max(len(q_QHD) * QUERY_SHARE // frame_tokens, 1)
    q_HQD = q_QHD[::step].transpose(0, 1).float()
    logits_HQT = q_HQD @ k_THD.permute(1, 2, 0).float() * q_HQD.shape[-1] ** -0.5
    received_HT = logits_HQT.softmax(dim=-1).mean(dim=1)
    return received_HT.unflatten(-1, (-1, frame_tokens)).sum(dim=-1)


class HeadClasses(ABC):
    """Says of which class each head is, and which clean tokens a class keeps."""

    num_classes: ClassVar[int]

    @abstractmethod
    def sort(self, mass_NHF: Tensor, /, *, own_frames: int) -> Tensor:
        """Return the class of every head of all layers, int64 [N, H].

        Args:
            mass_NHF: attention that each frame receives, see `frame_mass`.
            own_frames: the last of these, which are the queries' own.
        """

    @abstractmethod
    def frames(self, kind: int, *, chunk_frames: int) -> int:
        """Return how many frames of clean tokens a class keeps at most."""

    @abstractmethod
    def kept(
        self, kind: int, recent_THD: Tensor, /, *, num_keys: int, layout: Layout
    ) -> list[range]:
        """Return which of the clean tokens a class keeps, when a chunk has become clean.

        Args:
            recent_THD: keys of the newest frames in the layer that scores.
        """


@dataclass(frozen=True)
class DummyForcing(HeadClasses):
    """Half of the heads see the newest frame, the others the first frame or the newest chunk.

    With the masses p0 of the first frame and p1 of the frames between it and the queries' own,
    each divided by its sum over all heads, the cost of a head is the larger one. The heads of least
    cost are of class 0, dummy; the others of class 1, sink, where p0 >= p1, else of class 2, local.

    Example: four heads of one layer with p0 = .1 .6 .2 .1 and p1 = .1 .1 .1 .7 (both of sum 1)
    have the costs .1 .6 .2 .7: heads 0 and 2 are dummy, head 1 is a sink, head 3 is local.
    """

    num_classes = 3
    share: float = 0.5
    """Of all heads that are dummy. Source: 180 of 360."""

    def sort(self, mass_NHF: Tensor, /, *, own_frames: int) -> Tensor:
        """Return classes 0 to 2, see `HeadClasses.sort`."""
        first = mass_NHF[..., 0]
        between = mass_NHF[..., 1 : mass_NHF.shape[-1] - own_frames].sum(dim=-1)
        first, between = first / first.sum(), between / between.sum()
        cost = first.maximum(between).flatten()
        kinds = (first < between).long().flatten() + 1
        kinds[cost.argsort(stable=True)[: round(self.share * len(cost))]] = 0
        return kinds.view_as(first)

    def frames(self, kind: int, *, chunk_frames: int) -> int:
        """Return a single frame, or those of a chunk."""
        return chunk_frames if kind == 2 else 1

    def kept(
        self, kind: int, _recent_THD: Tensor, /, *, num_keys: int, layout: Layout
    ) -> list[range]:
        """Return the tokens of one frame or chunk, see `HeadClasses.kept`."""
        if kind == 1:
            return [range(layout.frame_tokens)]
        newest = layout.chunk_tokens if kind == 2 else layout.frame_tokens
        return [range(num_keys - newest, num_keys)]


@dataclass(frozen=True)
class ForcingKV(HeadClasses):
    """Static heads see the first and the newest frame, dynamic ones what changed before it, too.

    A head is static, class 0, if the newest four frames have at least `threshold` of the mass
    outside of the first frame; else dynamic, class 1. Of the three frames before the newest one
    dynamic heads keep the patches that are least like the same patch of the next frame, by the mean
    cosine of keys.

    Example: masses .5 | .05 .05 .1 .1 .1 .1 of seven frames: .4 of .5 are the newest four's, just
    enough to be static.
    """

    num_classes = 2
    threshold: float = 0.8
    retention: float = 0.33
    """Share of the patches that stay."""
    patches: int = 6
    """That a frame is cut into, of as many tokens each."""

    def sort(self, mass_NHF: Tensor, /, *, own_frames: int) -> Tensor:
        """Return classes 0 and 1, see `HeadClasses.sort`."""
        newest = mass_NHF[..., -SCORING_FRAMES:].sum(dim=-1)
        outside = mass_NHF[..., 1:].sum(dim=-1)
        return (newest < self.threshold * outside).long()

    def frames(self, kind: int, *, chunk_frames: int) -> int:
        """Return two frames, and what patches fill."""
        count = round(self.retention * self.patches * (SCORING_FRAMES - 1))
        return 2 + kind * -(-count // self.patches)

    def kept(
        self, kind: int, recent_THD: Tensor, /, *, num_keys: int, layout: Layout
    ) -> list[range]:
        """Return the tokens of frames and patches, see `HeadClasses.kept`."""
        frame_tokens = layout.frame_tokens
        first, newest = range(frame_tokens), range(num_keys - frame_tokens, num_keys)
        start = max(num_keys - SCORING_FRAMES * frame_tokens, frame_tokens)
        if kind == 0 or start == newest.start:
            return [first, newest]
        known = recent_THD[start - num_keys :]
        size = frame_tokens // self.patches
        changed = self.changed(known, frame_tokens=frame_tokens)
        return [
            first,
            *(range(start + n * size, start + (n + 1) * size) for n in changed),
            newest,
        ]

    def changed(self, k_THD: Tensor, *, frame_tokens: int) -> list[int]:
        """Return the patches of all frames but the last that are least like the next frame's.

        Example: two patches of one token, keys (1, 0) and (0, 1), then (1, 0) and (1, 0): the
        second patch changed, and is the one of two that stays at a retention of a half.
        """
        import torch

        if frame_tokens % self.patches:
            raise UserError(
                f"a latent frame has {frame_tokens} tokens, which {self.patches} patches do not "
                "divide: change height or width, or choose another kv.compress"
            )
        frames_FXHD = k_THD.float().unflatten(0, (-1, frame_tokens))
        alike_FX = torch.cosine_similarity(frames_FXHD[:-1], frames_FXHD[1:], dim=-1).mean(dim=-1)
        alike = alike_FX.flatten().unflatten(0, (-1, frame_tokens // self.patches)).mean(dim=-1)
        count = round(self.retention * len(alike))
        return sorted(alike.argsort(stable=True)[:count].tolist())
