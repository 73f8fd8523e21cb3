"""The KV caches of the guidance passes: own ones, shared clean keys, compression.

Where processes divide the passes, each has the caches of those that it computes. The other branches
are empty, and what they hold is counted only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowcache.kv import Keep, KVCache, caches_for, tokens_per_chunk
from flowcache.ranks import Ranks
from magi1.dit import DiT
from magi1.sampling import Branch


class PassCaches:
    """Keys and values of one clip.

    Args:
        passes: all guidance passes by name; the one of a chunk alone needs no cache.
        num_chunks: chunks that a cache holds.
        device: where keys and values are read.
        storage: where they lie; None: there, too.
    """

    def __init__(
        self,
        dit: DiT,
        *,
        passes: Sequence[str],
        num_chunks: int,
        chunk_tokens: int,
        device: torch.device,
        storage: torch.device | None,
        ranks: Ranks,
    ) -> None:
        config = dit.config
        self.passes = passes
        self.chunk_tokens = chunk_tokens
        self.device = device
        self.dtype = dit.dtype
        self.ranks = ranks
        self.num_layers = config.num_layers
        self.num_heads = config.num_query_groups // ranks.layout.sequence
        self.head_width = config.kv_channels
        self.num_clean = 0
        """Clean tokens in each cache."""
        self.num_unshared = 0
        """Chunks whose clean keys the branches don't share yet, see `share`."""
        own = ranks.own(passes)

        def caches(name: str) -> list[KVCache]:
            if name not in own:
                return []
            return caches_for(
                config.num_layers,
                capacity=num_chunks * chunk_tokens,
                num_heads=self.num_heads,
                head_width=config.kv_channels,
                dtype=dit.dtype,
                device=device,
                storage=storage,
            )

        self.branches = {
            name: Branch(is_null=name == "prev", caches=caches(name))
            for name in passes
            if name != "alone"
        }

    @property
    def own(self) -> dict[str, Branch]:
        """The branches that this process computes."""
        return {name: branch for name, branch in self.branches.items() if branch.caches}

    @property
    def last(self) -> tuple[str, Branch]:
        """The branch whose clean keys are those of all, with its name."""
        return list(self.branches.items())[-1]

    def track(self, num_chunks: int) -> None:
        """Follow from now on which chunk each clean token comes from."""
        for branch in self.own.values():
            for cache in branch.caches:
                cache.track(num_chunks)

    def settle(self, chunk: int) -> None:
        """Declare the keys of the oldest active chunk final, in all branches."""
        for branch in self.branches.values():
            branch.settle(self.chunk_tokens, chunk=chunk)
        self.num_clean += self.chunk_tokens

    def copy_active(self, source: Branch) -> None:
        """Put the oldest active chunk of an own branch into the other own ones."""
        for branch in self.own.values():
            if branch is source:
                continue
            for cache, other in zip(branch.caches, source.caches, strict=True):
                keys, values = other.prefix(self.chunk_tokens, reach_tokens=self.chunk_tokens)
                cache.put(0, keys, values)
            branch.queries.update(source.queries)

    def share(self) -> None:
        """Give the pass with text the clean keys of the pass without.

        In the tick in which a chunk's clean keys are made, the released model lets each pass see
        its own; from the next tick on, all see those of the pass without text.
        """
        tokens = self.num_unshared * self.chunk_tokens
        self.num_unshared = 0
        if not tokens or len(self.branches) == 1:
            return
        name, last = self.last
        shape = (2, tokens, self.num_heads, self.head_width)
        for layer in range(self.num_layers):
            if last.caches:
                kv = last.caches[layer].last_clean(tokens)
            else:
                kv = torch.empty(shape, dtype=self.dtype, device=self.device)
            kv = self.ranks.branches.copied(kv, source=self.ranks.holder(self.passes, name))
            for branch in self.own.values():
                if branch is not last:
                    branch.caches[layer].replace_last_clean(kv)

    def compress(self, keep: Keep, *, num_kept: int) -> None:
        """Keep the clean tokens that a rule picks by the queries computed last.

        Args:
            num_kept: how many these are.
        """
        for branch in self.own.values():
            for layer, cache in enumerate(branch.caches):
                cache.compress(branch.queries[layer], keep)
                assert cache.clean == num_kept, f"{cache.clean} tokens kept instead of {num_kept}"
        self.num_clean = num_kept

    def tokens_per_chunk(self, branch: Branch) -> Tensor:
        """Return the clean tokens of each chunk, mean over layers and the heads of all ranks."""
        sequence = self.ranks.sequence
        return sequence.total(tokens_per_chunk(branch.caches)) / sequence.size
