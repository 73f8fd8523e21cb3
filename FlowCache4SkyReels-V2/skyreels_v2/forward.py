"""One window's way through the transformer: embedding, blocks with KV caches, head, FLOPs.

Axes: B batch, S tokens, D width, C latent channels, F latent frames, h/w latent rows/columns.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowcache.kv import Compression, cached_attention, prefetcher_for
from flowcache.runtime.ops import on_device
from flowcache.runtime.parallel import Ranks, TokenSplit
from flowcache.runtime.stats import PassId, RunStats
from flowcache.wan import flops
from flowcache.wan.dit import DiT, Embedded, whole_window
from flowcache.wan.layers import ContextKV, join_contexts
from skyreels_v2.sampling import WHOLE_WINDOW, Branch, Sampling, Unit
from skyreels_v2.window import Window


class WindowForward:
    """Sends parts of one window through the transformer and counts what that costs.

    Args:
        size: latent rows and columns.
        branches: those that this process computes, by name.
        condition: `[C, F, h, w]` start image condition of an I2V model.
        ranks: the processes that divide the work.
    """

    def __init__(
        self,
        dit: DiT,
        *,
        window: Window,
        size: tuple[int, int],
        device: torch.device,
        sampling: Sampling,
        branches: Mapping[str, Branch],
        stats: RunStats,
        compression: Compression | None = None,
        condition: Tensor | None = None,
        ranks: Ranks,
    ) -> None:
        self.dit = dit
        self.window = window
        self.size = size
        self.device = device
        self.sampling = sampling
        self.branches = branches
        self.stats = stats
        self.compression = compression
        self.condition = condition
        self.ranks = ranks
        caches = [cache for branch in branches.values() for cache in branch.caches]
        self.prefetcher = prefetcher_for(caches)
        self.batched_context: list[ContextKV] = []
        if sampling.batch_branches and len(branches) > 1:
            self.batched_context = join_contexts([branch.context for branch in branches.values()])
        positions = torch.arange(window.num_frames, device=device)
        self.rope = dit.rope(positions, latent_height=size[0], latent_width=size[1])
        self.frame_tokens = len(self.rope) // window.num_frames

    def embed(self, latents_CFhw: Tensor, *, frames: list[int], times: list[int]) -> Embedded:
        """Embed some frames of the window, each at its own timestep."""
        config, condition = self.dit.config, self.condition
        if condition is not None:
            index = on_device(frames, dtype=torch.int64, device=self.device)
            condition = condition.index_select(1, index)
        if self.ranks.branches.rank == 0:  # the others' is the same work
            cost = flops.embed(config, num_frames=len(frames), frame_tokens=self.frame_tokens)
            self.stats.add_flops(computed=cost, without_reuse=cost)
        return self.dit.embed(
            latents_CFhw.unsqueeze(0),
            on_device(times, dtype=torch.float32, device=self.device).unsqueeze(0),
            fps=[self.sampling.fps],
            y_BCFhw=None if condition is None else condition.unsqueeze(0),
        )

    def run(
        self, names: Sequence[str], units: Sequence[Unit], part: Embedded, *, offsets: Sequence[int]
    ) -> dict[str, Tensor]:
        """Run the blocks for some branches; return each one's `[1, S, D]`.

        Args:
            units: what goes through together, in ascending order.
            part: the tokens of all units.
            offsets: for each unit, tokens of the active chunks before it.
        """
        if self.batched_context and len(names) == len(self.branches):
            branches = list(self.branches.values())
            tokens = part.tokens.expand(len(branches), -1, -1)
            modulation = part.modulation.expand(len(branches), -1, -1, -1)
            hidden = self._run_blocks(
                branches,
                self.batched_context,
                units,
                Embedded(tokens, part.time, modulation),
                offsets=offsets,
            )
            return dict(zip(names, hidden.split(1), strict=True))
        return {
            name: self._run_blocks([branch], branch.context, units, part, offsets=offsets)
            for name, branch in self.branches.items()
            if name in names
        }

    def velocity(self, hidden_BSD: Tensor, part: Embedded) -> Tensor:
        """Read the velocity `[C, F, h, w]` out of what the blocks gave."""
        height, width = self.size
        return self.dit.velocity(hidden_BSD, part, latent_height=height, latent_width=width)[0]

    def settle(self, chunk: int) -> None:
        """Declare the keys of the oldest active chunk final."""
        num_tokens = len(self.window.chunks[chunk]) * self.frame_tokens
        for branch in self.branches.values():
            for cache in branch.caches:
                cache.settle(num_tokens, chunk=chunk)

    def count(
        self,
        branch: Branch,
        part: Embedded,
        *,
        offset: int,
        is_computed: bool,
        has_head: bool = True,
        passes: Sequence[PassId] = (),
    ) -> None:
        """Add the FLOPs of the blocks and the head, as done and as without reuse."""
        config, queries = self.dit.config, part.tokens.shape[1]
        keys = queries
        if branch.caches:
            clean = branch.caches[0].clean
            if self.compression is not None:
                clean = min(clean, self.compression.budget)
            keys += clean + offset
        full = flops.blocks(config, queries=queries, keys=keys)
        head = flops.head(config, queries=queries) if has_head else 0
        reads_head = is_computed or self.sampling.quantity == "residual"
        self.stats.add_flops(
            computed=(full if is_computed else 0) + (head if reads_head else 0),
            without_reuse=full + head,
            passes=passes,
        )

    def _run_blocks(
        self,
        branches: list[Branch],
        context: list[ContextKV],
        units: Sequence[Unit],
        part: Embedded,
        *,
        offsets: Sequence[int],
    ) -> Tensor:
        """Run the blocks on one batch entry per branch, each with its own cache."""
        split = TokenSplit(self.ranks.sequence, part.time.shape[1], self.frame_tokens)
        if units[0].id == WHOLE_WINDOW:
            attend, rope = whole_window(self.dit.kernel), self.rope
        else:
            chunks = [self.window.chunks[unit.id] for unit in units]
            sizes = [len(chunk) * self.frame_tokens for chunk in chunks]
            attend = cached_attention(
                [branch.caches for branch in branches],
                active=[range(o, o + size) for o, size in zip(offsets, sizes, strict=True)],
                kernel=self.dit.kernel,
                compression=self.compression,
                prefetcher=self.prefetcher,
                timing=lambda: self.stats.stage("kv_compression"),
            )
            by_frame = self.rope.unflatten(0, (-1, self.frame_tokens))
            rope = torch.cat([by_frame[c.start : c.stop] for c in chunks]).flatten(0, 1)
        own = Embedded(split.scatter(part.tokens, axis=1), part.time, part.modulation)
        hidden = self.dit.run_blocks(
            own, split.scatter(rope, axis=0), context, self_attend=split.over_heads(attend)
        )
        return split.gather(hidden)
