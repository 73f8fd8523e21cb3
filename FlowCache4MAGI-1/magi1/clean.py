"""Keys of clean chunks: made final, shared among the guidance passes, compressed."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

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
        self.num_unshared = 0
        """Chunks whose clean keys the branches don't share yet, see `share`."""

    def feed_given(self, first: Tick) -> None:
        """Put the keys of the given chunks into the caches, those without text into all."""
        *others, (_, last) = self._named()
        for chunk in range(self.forward.clip.num_given):
            self._feed(chunk, last, tick=first, reach=self.forward.clock.reach_given())
            last.settle(self.forward.chunk_tokens, chunk=chunk)
            for _, branch in others:
                for cache, source in zip(branch.caches, last.caches, strict=True):
                    keys, values = source.prefix(0, reach_tokens=self.forward.chunk_tokens)
                    cache.put(0, keys, values)
                branch.queries.update(last.queries)
                branch.settle(self.forward.chunk_tokens, chunk=chunk)

    def settle_waiting(self, tick: Tick) -> None:
        """Give the chunks that became clean in the last tick their final keys."""
        for chunk in self.waiting:
            for _, branch in self._named():
                if self.forward.sampling.clean_pass:
                    self._feed(chunk, branch, tick=tick, reach=self.forward.clock.reach_clean())
                branch.settle(self.forward.chunk_tokens, chunk=chunk)
        self.num_unshared = len(self.waiting) if self.forward.sampling.clean_pass else 0
        self.waiting = ()

    def share(self) -> None:
        """Give the pass with text the clean keys of the pass without.

        In the tick in which a chunk's clean keys are made, the released model lets each pass see
        its own; from the next tick on, all see those of the pass without text.
        """
        tokens = self.num_unshared * self.forward.chunk_tokens
        self.num_unshared = 0
        *others, (_, last) = self._named()
        for _, branch in others:
            for cache, source in zip(branch.caches, last.caches, strict=True):
                cache.copy_last_clean(source, tokens)

    def compress(self, tick: Tick) -> None:
        """Drop clean tokens where the caches have no room for the chunk that enters."""
        budget = self.forward.budget
        if budget is None or not tick.entering:
            return
        kept = (budget.total_chunks - len(tick.steps)) * self.forward.chunk_tokens
        if self.branches["cond"].caches[0].clean <= kept:
            return
        self.share()
        keep = partial(budget.strategy.keep, budget=kept, layout=budget.layout)
        with self.forward.stats.stage("kv_compression"):
            for _, branch in self._named():
                for layer, cache in enumerate(branch.caches):
                    cache.compress(branch.queries[layer], keep)

    def _feed(self, chunk: int, branch: Branch, *, tick: Tick, reach: int | None) -> None:
        """Send a clean chunk through the model, without its text, for the sake of its keys."""
        self.forward.feed(
            branch,
            self.fixed(chunk),
            tick=tick,
            position=chunk,
            context=self.null_context,
            reach=reach,
        )

    def _named(self) -> list[tuple[str, Branch]]:
        return list(self.branches.items())
