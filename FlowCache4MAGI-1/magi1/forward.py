"""One clip's way through the transformer: a chunk at a time, with KV caches, and its FLOPs.

Axes: B batch, S tokens of a chunk, H query heads, C latent channels, F latent frames, h/w latent
rows/columns, L text tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowcache.kv import KVCache, Prefetcher, cached_attention, caches_for, prefetcher_for
from flowcache.runtime.parallel import Ranks, TokenSplit
from flowcache.runtime.stats import RunStats
from flowcache.schedule import Tick
from magi1 import flops
from magi1.dit import DiT, Embedded
from magi1.layers import ContextKV, SelfAttend
from magi1.sampling import Branch, KVBudget, Sampling, cache_chunks
from magi1.schedule import Clip, Clock


class ClipForward:
    """Sends the chunks of one clip through the transformer.

    Args:
        size: latent rows and columns.
        budget: bound of the KV cache, which asks for queries to be kept.
        ranks: the processes that divide the work.
    """

    def __init__(
        self,
        dit: DiT,
        *,
        clip: Clip,
        clock: Clock,
        size: tuple[int, int],
        device: torch.device,
        sampling: Sampling,
        stats: RunStats,
        budget: KVBudget | None = None,
        ranks: Ranks,
    ) -> None:
        self.dit = dit
        self.clip = clip
        self.clock = clock
        self.size = size
        self.device = device
        self.sampling = sampling
        self.stats = stats
        self.budget = budget
        rows, columns = (length // dit.config.patch_size for length in size)
        self.chunk_tokens = clip.chunk_width * rows * columns
        self.ranks = ranks
        self.num_kv_heads = dit.config.num_query_groups // ranks.layout.sequence
        """Key/value heads of this process."""
        self.split = TokenSplit(ranks.sequence, 1, self.chunk_tokens)
        self.prefetcher: Prefetcher | None = None
        """Reads all caches where they lie on the host."""

    def caches(self, storage: torch.device | None) -> list[KVCache]:
        """Return new KV caches for one guidance pass.

        Args:
            storage: where they lie; None: on the device.
        """
        config = self.dit.config
        total = None if self.budget is None else self.budget.total_chunks
        caches = caches_for(
            config.num_layers,
            capacity=cache_chunks(self.clip, total_chunks=total) * self.chunk_tokens,
            num_heads=self.num_kv_heads,
            head_width=config.kv_channels,
            dtype=self.dit.dtype,
            device=self.device,
            storage=storage,
        )
        self.prefetcher = self.prefetcher or prefetcher_for(caches)
        if self.stats.trace is not None:
            for cache in caches:
                cache.track(self.clip.num_chunks)
        return caches

    def context(self, text_LC: Tensor) -> list[ContextKV]:
        """Project a text to every layer's cross-attention keys and values."""
        cost = flops.context(self.dit.config, text=len(text_LC))
        self.stats.add_flops(computed=cost, without_reuse=cost)
        return self.dit.encode_context(text_LC.unsqueeze(0))

    def signal(self, x_CFhw: Tensor, *, t: float) -> Tensor:
        """Return what policies compare: the patch embedding, `[1, S, D]`."""
        cost = flops.embed(self.dit.config, tokens=self.chunk_tokens, is_distilled=False)
        self.stats.add_flops(computed=cost, without_reuse=0)
        return self.dit.embed(x_CFhw.unsqueeze(0), self._t(t), is_null=False).tokens

    def run(
        self,
        x_CFhw: Tensor,
        *,
        t: float,
        tick: Tick,
        position: int,
        is_null: bool,
        context: Sequence[ContextKV],
        attend: SelfAttend,
    ) -> Tensor:
        """Send one chunk, standing at the place of chunk `position`, through all layers."""
        width = self.clock.step_width(tick) if self.sampling.is_distilled else None
        embedded = self.dit.embed(
            x_CFhw.unsqueeze(0), self._t(t), is_null=is_null, step_width=width
        )
        rope = self.dit.rope_table(
            first_frame=position * self.clip.chunk_width,
            num_frames=self.clip.chunk_width,
            latent_height=self.size[0],
            latent_width=self.size[1],
        )
        own = Embedded(self.split.scatter(embedded.tokens, axis=1), embedded.condition)
        hidden = self.dit.run_blocks(
            own,
            self.split.scatter(rope, axis=0),
            context,
            self_attend=self.split.over_heads(attend),
        )
        return self.split.gather(hidden)

    def feed(
        self,
        branch: Branch,
        x_CFhw: Tensor,
        *,
        tick: Tick,
        position: int,
        context: Sequence[ContextKV],
        reach: int | None,
        num_clean: int,
    ) -> None:
        """Send a clean chunk through all layers for the sake of its keys.

        Where other processes have the branch, it is counted only.

        Args:
            num_clean: clean tokens in the cache.
        """
        keys = self.num_keys(num_clean, reach=reach)
        cost = self.flops(context, keys=keys, has_head=False)
        self.stats.add_flops(computed=cost, without_reuse=cost)
        if not branch.caches:
            return
        self.run(
            x_CFhw,
            t=self.sampling.clean_t,
            tick=tick,
            position=position,
            is_null=branch.is_null,
            context=context,
            attend=self.through_cache(
                branch, offset=0, reach=reach, keeps_queries=not branch.queries
            ),
        )

    def velocity(self, hidden_BSD: Tensor) -> Tensor:
        """Read the velocity `[C, F, h, w]` out of what the layers gave."""
        height, width = self.size
        return self.dit.velocity(hidden_BSD, latent_height=height, latent_width=width)[0]

    def through_cache(
        self, branch: Branch, *, offset: int, reach: int | None, keeps_queries: bool
    ) -> SelfAttend:
        """Return the attention of one chunk: store its keys, attend to the last `reach` chunks.

        Args:
            offset: tokens of the active chunks before this one.
            reach: chunks of the cache that are seen, this one included; None: all.
            keeps_queries: whether the queries are kept for the compression of the cache.
        """
        budget = self.budget

        def remember(layer: int, q_BSHC: Tensor) -> None:
            if budget is not None:
                branch.queries[layer] = budget.seen_queries(q_BSHC[0])

        return cached_attention(
            [branch.caches],
            active=[range(offset, offset + self.chunk_tokens)],
            kernel=self.dit.kernel,
            reach_tokens=None if reach is None else reach * self.chunk_tokens,
            prefetcher=self.prefetcher,
            remember=remember if keeps_queries else None,
        )

    def own_tokens(self, _layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let a chunk attend to itself alone."""
        return self.dit.kernel(q, k, v)

    def num_keys(self, before: int, *, reach: int | None) -> int:
        """Return how many tokens a chunk sees, with `before` tokens before its own."""
        seen = before + self.chunk_tokens
        return seen if reach is None else min(seen, reach * self.chunk_tokens)

    def flops(self, context: Sequence[ContextKV], *, keys: int, has_head: bool = True) -> int:
        """Return the FLOPs of one chunk through embedding, layers and, if asked, the head."""
        config, tokens = self.dit.config, self.chunk_tokens
        cost = flops.embed(config, tokens=tokens, is_distilled=self.sampling.is_distilled)
        cost += flops.blocks(config, queries=tokens, keys=keys, text=context[0].k.shape[1])
        return cost + (flops.head(config, queries=tokens) if has_head else 0)

    def _t(self, t: float) -> Tensor:
        # made on the device: a copy from the host would wait for all that is queued there
        return torch.full((1, 1), t, dtype=torch.float32, device=self.device)
