"""The keys of one guidance branch, of which a strategy of `flowcache.compress` keeps some.

    kept = KeptKeys(dit, num_frames=6, rule=rule, ...)   # 6 frames: own and clean ones together
    hidden = dit.run_blocks(..., self_attend=kept.attend(num_own))
    kept.settle(num_own, chunk=chunk)                    # what was put last is clean

Clean tokens are chosen when a chunk is first denoised that has no room next to all of them, by its
queries; in classes of heads, when a chunk has become clean. So a cache never holds more than the
window, however long the video is.

Keys lie in the cache as they are read, or before rotation (`rotates`). Then they are rotated when
they are read: kept tokens stand one behind the other, as many to a frame as a frame has, each at
its own row and column.

Axes: S own tokens, T tokens in the cache, K kept tokens, H heads, C head width, F frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from flowcache.compress import (
    CompressionStrategy,
    Density,
    KVRule,
    TokenLayout,
    any_strategy_of,
    kept_tokens,
    scoring_queries,
)
from flowcache.errors import UserError
from flowcache.head_classes import (
    SCORING_FRAMES,
    SCORING_LAYER,
    SORTING_CHUNK,
    HeadClasses,
    frame_mass,
)
from flowcache.kv import Attend, KVCache
from flowcache.quantization import attend_wide
from flowcache.runtime.ops import attention_flops, on_device
from flowcache.runtime.parallel import Ranks
from flowcache.wan.dit import DiT, rotate


@dataclass(frozen=True)
class Budget:
    """How many clean tokens stay, by which rule."""

    rule: KVRule
    layout: TokenLayout
    tokens: int
    """Clean ones that stay; in classes of heads at most, from when heads are sorted."""
    rotates: bool
    """Whether keys are rotated when they are read."""
    sorting: int = 0
    """Clean tokens from which on heads are sorted; 0: they are not."""

    @classmethod
    def of(
        cls, rule: KVRule, *, window: int | None, layout: TokenLayout, rotates: bool
    ) -> "Budget | None":
        """Return what stays next to a chunk within a window, in latent frames.

        Raises:
            UserError: the window does not hold what a strategy keeps in any case.
        """
        strategy, chunk = any_strategy_of(rule), layout.chunk_tokens
        if strategy is None:
            return None
        if isinstance(strategy, HeadClasses):
            per_frame = layout.frame_tokens
            kinds = range(strategy.num_classes)
            most = max(strategy.frames(k, chunk_frames=chunk // per_frame) for k in kinds)
            return cls(rule, layout, most * per_frame, rotates, (SORTING_CHUNK + 1) * chunk)
        assert window is not None, "a strategy needs a window"
        tokens = window * layout.frame_tokens - chunk
        if isinstance(strategy, Density):
            strategy.check(tokens, layout)
        else:
            num_keys = window * layout.frame_tokens
            tokens = kept_tokens(strategy, num_keys=num_keys, budget=tokens, layout=layout)
        return cls(rule, layout, tokens, rotates)

    @property
    def num_scoring(self) -> int:
        """Queries that score the keys."""
        return scoring_queries(any_strategy_of(self.rule), self.layout)

    @property
    def held_tokens(self) -> int:
        """Tokens that a cache holds at most, own ones included."""
        return max(self.tokens + self.layout.chunk_tokens, self.sorting)

    def room(self, clean_frames: int) -> int:
        """Return how many clean frames' worth of tokens a chunk sees at most."""
        if clean_frames * self.layout.frame_tokens < self.sorting:
            return clean_frames
        return min(clean_frames, self.tokens // self.layout.frame_tokens)


@dataclass
class _Heads:
    """Some heads of one layer and the cache of their keys."""

    cache: KVCache
    strategy: CompressionStrategy | None
    """None: of a class, see `HeadClasses`."""
    place_TH: Tensor
    """Place of each clean token in its frame; needed where keys are rotated when they are read."""
    index: Tensor | None = None
    """Of the heads; None: all."""
    kind: int = 0
    """Their class."""

    def of(self, x_BSHC: Tensor) -> Tensor:
        """Return the part of these heads."""
        return x_BSHC if self.index is None else x_BSHC[:, :, self.index]


class KeptKeys:
    """The caches of all layers of one branch.

    Args:
        caches: of all layers, with room for the budget and the largest chunk; in classes of heads
            for the chunks before heads are sorted.
        size: rows and columns of a latent frame.
    """

    def __init__(
        self,
        dit: DiT,
        budget: Budget,
        *,
        caches: Sequence[KVCache],
        ranks: Ranks,
        size: tuple[int, int],
    ) -> None:
        self.dit, self.budget, self.size = dit, budget, size
        self.sequence = ranks.layout.sequence
        """Processes that divide the heads."""
        strategies = [any_strategy_of(budget.rule) for _ in caches]
        self.classes = next((s for s in strategies if isinstance(s, HeadClasses)), None)
        if self.classes is not None and ranks.layout.sequence > 1:
            raise UserError(
                f"kv.compress={budget.rule.compress} sorts the heads of all processes together, "
                f"but {ranks.layout.sequence} divide them: set parallel.sequence=1"
            )
        self.layers = [
            [_Heads(cache, None if isinstance(s, HeadClasses) else s, _no_places(cache))]
            for cache, s in zip(caches, strategies, strict=True)
        ]
        self.mass: list[Tensor] = []
        """Attention that each frame receives, by layer, while heads are sorted."""
        self.num_settled = 0
        self._table = self._angles(0)
        """Of as many frames as were asked for so far: those of fewer are its start."""

    @property
    def layout(self) -> TokenLayout:
        return self.budget.layout

    @property
    def num_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(each.cache.num_bytes() for heads in self.layers for each in heads)

    def flops(self, num_own: int) -> int:
        """Return the FLOPs of a pass's self-attention to its own tokens and to what then stays.

        All heads count, also those that other processes compute.
        """
        width, seen = self.dit.config.head_width, 0
        for heads in self.layers:
            for each in heads:
                clean = each.cache.clean
                if each.strategy is not None:
                    clean = min(clean, self.budget.tokens)
                seen += (num_own + clean) * each.cache.kv.shape[2]
        return attention_flops(num_own, keys=1, width=width * seen * self.sequence)

    def attend(self, num_own: int, *, is_clean: bool) -> Attend:
        """Return the self-attention of a chunk that is denoised, or of a clean one that is fed."""
        sorts = is_clean and self.classes is not None and self.num_settled == SORTING_CHUNK
        self.mass = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outputs = list[tuple[_Heads, Tensor]]()
            for each in self.layers[layer]:
                own = each.of(q), each.of(k), each.of(v)
                queries, keys, values = self._seen(each, own, num_own)
                if sorts:
                    per_frame = self.layout.frame_tokens
                    self.mass.append(frame_mass(queries, keys, frame_tokens=per_frame))
                seen = (x.unsqueeze(0) for x in (queries, keys, values))
                out = attend_wide(self.dit.kernel, *seen, num_groups=each.cache.bias_groups)
                outputs.append((each, out))
            if len(outputs) == 1 and outputs[0][0].index is None:
                return outputs[0][1]
            whole = torch.empty_like(q)
            for each, out in outputs:
                whole[:, :, each.index] = out
            return whole

        return attend

    def settle(self, num_own: int, *, chunk: int) -> None:
        """Declare the chunk clean whose keys were put last; sort heads, and let tokens leave."""
        for heads in self.layers:
            for each in heads:
                each.cache.settle(num_own, chunk=chunk)
                each.cache.pack()
                if self.budget.rotates:
                    own = torch.arange(num_own, device=each.cache.device)
                    own_TH = own.unsqueeze(1).expand(-1, each.place_TH.shape[1])
                    places = [each.place_TH, own_TH % self.layout.frame_tokens]
                    each.place_TH = torch.cat(places)
        if self.classes is not None and self.num_settled == SORTING_CHUNK:
            self._sort(self.classes, own_frames=num_own // self.layout.frame_tokens)
        elif self.classes is not None and self.num_settled > SORTING_CHUNK:
            self._keep_by_class(self.classes)
        self.num_settled += 1

    # One layer --------------------------------------------------------------------------------

    def _seen(
        self, heads: _Heads, own: tuple[Tensor, Tensor, Tensor], num_own: int
    ) -> tuple[Tensor, ...]:
        """Store a chunk's keys; return queries, keys and values as they are attended to."""
        (q, k, v), cache = (x[0] for x in own), heads.cache
        if heads.strategy is not None and cache.clean > self.budget.tokens:
            self._compress(heads, heads.strategy, q)
        cache.put(0, k, v)
        keys, values = cache.prefix(num_own)
        if self.budget.rotates:
            q, keys = self._rotated(heads, q, keys)
        return q, keys, values

    def _rotated(self, heads: _Heads, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate a chunk's queries, and keys of clean tokens with or without its own behind them.

        The chunk stands behind the clean tokens, which fill frames one after the other.
        """
        per_frame, clean = self.layout.frame_tokens, heads.cache.clean
        behind = -(-clean // per_frame)
        rope = self._rope(behind + len(q) // per_frame)
        own_S = torch.arange(behind * per_frame, len(rope), device=q.device)
        rows_TH = self._rows(heads)
        if len(keys) > clean:
            rows_TH = torch.cat([rows_TH, own_S.unsqueeze(1).expand(-1, rows_TH.shape[1])])
        return (
            rotate(q[None], rope[own_S])[0].to(q.dtype),
            rotate_keys(keys[None], rope[rows_TH], width=q.shape[-1])[0],
        )

    def _compress(self, heads: _Heads, strategy: CompressionStrategy, q_SHC: Tensor) -> None:
        """Keep the clean tokens that a strategy picks by the queries of the chunk that sees them.

        It compares keys as they are read; density, which looks at no queries, compares them as
        if all were in one frame.
        """
        keys = heads.cache.prefix(0)[0][..., : q_SHC.shape[-1]]
        if isinstance(strategy, Density):
            keys = rotate(keys[None], self._rope(1)[heads.place_TH])[0]
        elif self.budget.rotates:
            q_SHC, keys = self._rotated(heads, q_SHC, keys)
        kept = strategy.keep(q_SHC, keys, budget=self.budget.tokens, layout=self.layout)
        self._keep(heads, kept)

    def _keep(self, heads: _Heads, indices_KH: Tensor) -> None:
        """Let all clean tokens leave but these."""
        heads.cache.keep(indices_KH)
        if self.budget.rotates:
            heads.place_TH = heads.place_TH.gather(0, indices_KH)

    def _rows(self, heads: _Heads) -> Tensor:
        """Return the row in `_rope` of each clean token, `[T, H]`."""
        rank = torch.arange(len(heads.place_TH), device=heads.place_TH.device)
        per_frame = self.layout.frame_tokens
        return (rank // per_frame * per_frame).unsqueeze(1) + heads.place_TH

    def _rope(self, num_frames: int) -> Tensor:
        """Return the rotary angles of frames at the positions 0, 1, ..., by frame and token."""
        num_rows = num_frames * self.layout.frame_tokens
        if num_rows > len(self._table):
            self._table = self._angles(num_frames)
        return self._table[:num_rows]

    def _angles(self, num_frames: int) -> Tensor:
        positions = torch.arange(num_frames, device=self.layers[0][0].cache.device)
        return self.dit.rope(positions, latent_height=self.size[0], latent_width=self.size[1])

    # Classes of heads -------------------------------------------------------------------------

    def _sort(self, classes: HeadClasses, *, own_frames: int) -> None:
        """Give each class of heads a cache of its own; that of all heads is freed."""
        kinds_NH = classes.sort(torch.stack(self.mass), own_frames=own_frames)
        self.mass, chunk = [], self.layout.chunk_tokens
        rows_of = self._rows_of(classes)
        for number, kinds_H in enumerate(kinds_NH):
            (whole,) = self.layers[number]
            keys, values = whole.cache.prefix(0)
            made = list[_Heads]()
            for kind in kinds_H.unique().tolist():
                index = (kinds_H == kind).nonzero().flatten()
                rows = rows_of(kind, len(keys))
                frames = classes.frames(kind, chunk_frames=chunk // self.layout.frame_tokens)
                cache = KVCache(
                    frames * self.layout.frame_tokens + chunk,
                    num_heads=len(index),
                    head_width=keys.shape[-1],
                    dtype=keys.dtype,
                    device=keys.device,
                    storage=whole.cache.storage,
                )
                cache.put(0, keys[rows][:, index], values[rows][:, index])
                cache.settle(len(rows))
                place = whole.place_TH[rows][:, index] if self.budget.rotates else whole.place_TH
                made.append(_Heads(cache, None, place, index, kind))
            self.layers[number] = made

    def _keep_by_class(self, classes: HeadClasses) -> None:
        """Keep of every class what its heads look at."""
        rows_of = self._rows_of(classes)
        for heads in self.layers:
            for each in heads:
                rows = rows_of(each.kind, each.cache.clean)
                self._keep(each, rows.unsqueeze(1).expand(-1, each.cache.kv.shape[2]))

    def _recent(self) -> Tensor:
        """Return the keys of the newest frames in the layer that scores patches."""
        scoring = self.layers[min(SCORING_LAYER, len(self.layers) - 1)]
        parts = [each.cache.prefix(0)[0] for each in scoring]
        count = min(SCORING_FRAMES * self.layout.frame_tokens, *(len(part) for part in parts))
        return torch.cat([part[-count:] for part in parts], dim=1)

    def _rows_of(self, classes: HeadClasses) -> Callable[[int, int], Tensor]:
        """Return what tells the rows, of so many keys, that a class keeps; all layers keep them."""
        recent_THD = self._recent()

        @cache
        def rows(kind: int, num_keys: int) -> Tensor:
            spans = classes.kept(kind, recent_THD, num_keys=num_keys, layout=self.layout)
            kept = [row for span in spans for row in span]
            return on_device(kept, dtype=torch.int64, device=recent_THD.device)

        return rows


def rotate_keys(k_BTGX: Tensor, rope: Tensor, *, width: int) -> Tensor:
    """Rotate the channels of keys, but for those behind them that bias logits."""
    turned = rotate(k_BTGX[..., :width], rope).to(k_BTGX.dtype)
    if k_BTGX.shape[-1] == width:
        return turned
    return torch.cat([turned, k_BTGX[..., width:]], dim=-1)


def _no_places(cache: KVCache) -> Tensor:
    return torch.zeros(0, cache.kv.shape[2], dtype=torch.int64, device=cache.device)
