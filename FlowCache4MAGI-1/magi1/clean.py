"""Keys of clean chunks: made final, shared among the guidance passes, compressed.

Where processes divide the passes, each has the caches of those that it computes. The other branches
have none, and what they would hold is counted only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flowcache.kv import tokens_per_chunk
from flowcache.schedule import Tick
from magi1.forward import ClipForward
from magi1.layers import ContextKV
from magi1.sampling import Branch


class CleanKeys:
    """Looks after the clean chunks in the KV caches of one clip.

    Args:
        branches: passes with a cache; the last one's clean keys are those of all.
        null_context: stands for no text.
        fixed: gives a copy of a chunk's latents `[C, F, h, w]`, the given ones in their places.
    """

    def __init__(
        self,
        forward: ClipForward,
        branches: Mapping[str, Branch],
        *,
        null_context: Sequence[ContextKV],
        fixed: Callable[[int], Tensor],
    ) -> None:
        self.forward = forward
        self.branches = branches
        self.null_context = null_context
        self.fixed = fixed
        self.waiting: tuple[int, ...] = ()
        """Chunks that became clean in the last tick; the next one settles their keys."""
        self.num_clean = 0
        """Clean tokens in each cache."""
        self.num_unshared = 0
        """Chunks whose clean keys the branches don't share yet, see `share`."""

    @property
    def own(self) -> dict[str, Branch]:
        """The branches that this process computes."""
        return {name: branch for name, branch in self.branches.items() if branch.caches}

    @property
    def _last(self) -> tuple[str, Branch]:
        return list(self.branches.items())[-1]

    def feed_given(self, first: Tick) -> None:
        """Put the keys of the given chunks into the caches, those without text into all.

        A process without the pass without text makes its keys in a cache of its own.
        """
        _, last = self._last
        *others, fed = self.own.values() or [last]
        tokens = self.forward.chunk_tokens
        for chunk in range(self.forward.clip.num_given):
            maker = replace(fed, is_null=last.is_null)
            self._feed(chunk, maker, tick=first, reach=self.forward.clock.reach_given())
            for branch in others:
                for cache, source in zip(branch.caches, fed.caches, strict=True):
                    keys, values = source.prefix(tokens, reach_tokens=tokens)
                    cache.put(0, keys, values)
                branch.queries.update(fed.queries)
            self._settle(chunk)

    def settle_waiting(self, tick: Tick) -> None:
        """Give the chunks that became clean in the last tick their final keys."""
        for chunk in self.waiting:
            if self.forward.sampling.clean_pass:
                for branch in self.branches.values():
                    self._feed(chunk, branch, tick=tick, reach=self.forward.clock.reach_clean())
            self._settle(chunk)
        self.num_unshared = len(self.waiting) if self.forward.sampling.clean_pass else 0
        self.waiting = ()

    def share(self) -> None:
        """Give the pass with text the clean keys of the pass without.

        In the tick in which a chunk's clean keys are made, the released model lets each pass see
        its own; from the next tick on, all see those of the pass without text.
        """
        tokens = self.num_unshared * self.forward.chunk_tokens
        self.num_unshared = 0
        if not tokens or len(self.branches) == 1:
            return
        name, last = self._last
        ranks, dit = self.forward.ranks, self.forward.dit
        source = ranks.rank_of(self.forward.sampling.passes, name)
        shape = (2, tokens, self.forward.num_kv_heads, dit.config.kv_channels)
        for layer in range(dit.config.num_layers):
            if last.caches:
                made = last.caches[layer].last_clean(tokens)
            else:
                made = torch.empty(shape, dtype=dit.dtype, device=self.forward.device)
            kv = ranks.branches.broadcast(made, source=source)
            for branch in self.own.values():
                if branch is not last:
                    branch.caches[layer].replace_last_clean(kv)

    def compress(self, tick: Tick) -> None:
        """Drop clean tokens where the caches have no room for the chunk that enters."""
        budget = self.forward.budget
        if budget is None or not tick.entering:
            return
        kept = (budget.total_chunks - len(tick.steps)) * self.forward.chunk_tokens
        if self.num_clean <= kept:
            return
        self.share()
        keep = partial(budget.strategy.keep, budget=kept, layout=budget.layout)
        with self.forward.stats.stage("kv_compression"):
            for branch in self.own.values():
                for layer, cache in enumerate(branch.caches):
                    cache.compress(branch.queries[layer], keep)
                    assert cache.clean == kept, f"{cache.clean} tokens kept instead of {kept}"
        self.num_clean = kept

    def tokens_per_chunk(self, branch: Branch) -> Tensor:
        """Return the clean tokens of each chunk, mean over layers and the heads of all ranks."""
        sequence = self.forward.ranks.sequence
        return sequence.all_reduce(tokens_per_chunk(branch.caches)) / sequence.size

    def _settle(self, chunk: int) -> None:
        for branch in self.branches.values():
            branch.settle(self.forward.chunk_tokens, chunk=chunk)
        self.num_clean += self.forward.chunk_tokens

    def _feed(self, chunk: int, branch: Branch, *, tick: Tick, reach: int | None) -> None:
        """Send a clean chunk through the model, without its text, for the sake of its keys."""
        self.forward.feed(
            branch,
            self.fixed(chunk),
            tick=tick,
            position=chunk,
            context=self.null_context,
            reach=reach,
            num_clean=self.num_clean,
        )
