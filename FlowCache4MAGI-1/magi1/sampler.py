"""The denoising loop of one clip: the algorithm of MAGI-1 with FlowCache.

Chunks go through the transformer one by one, oldest first, and find the keys of those before them
in a KV cache. That gives what one forward of all active chunks gives, whose attention is causal
between chunks.

Axes: C latent channels, F latent frames, h/w latent rows/columns, L text tokens; the batch is 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.kv import KVCache, cached_attention, caches_for
from flowcache.reuse import ResultStore, ReusePolicy
from flowcache.schedule import Tick
from flowcache.stats import RunStats
from magi1 import flops
from magi1.dit import DiT
from magi1.layers import ContextKV, SelfAttend
from magi1.sampling import Branch, KVBudget, Sampling, cache_chunks
from magi1.schedule import Clip, Clock


class ClipSampler:
    """Denoises one clip; lives as long as it does.

    Args:
        latents: `[C, F, h, w]` float32 noise for all chunks, given ones included. Changed in place.
        captions: text of each chunk to denoise, `[L, C']`.
        null_caption: text that stands for no text, `[L, C']`.
        policy: when a chunk is computed. One decision serves all passes: their signal is the same.
        results: what computed steps gave, for reuse.
        prefix: given latents, `[C, clip.num_prefix, h, w]`.
        budget: bound of the KV cache; None: all chunks stay.

    Raises:
        UserError: the budget does not hold the window and a clean chunk.
    """

    def __init__(
        self,
        dit: DiT,
        latents: Tensor,
        *,
        clip: Clip,
        clock: Clock,
        sampling: Sampling,
        captions: Mapping[int, Tensor],
        null_caption: Tensor,
        policy: ReusePolicy,
        stats: RunStats,
        results: ResultStore | None = None,
        prefix: Tensor | None = None,
        budget: KVBudget | None = None,
    ) -> None:
        if budget is not None and budget.total_chunks <= clock.window:
            raise UserError(
                f"the KV budget is {budget.total_chunks} chunks, but must be above the window of "
                f"{clock.window}; raise total_chunks"
            )
        self.dit = dit
        self.latents = latents
        self.clip = clip
        self.clock = clock
        self.sampling = sampling
        self.captions = captions
        self.policy = policy
        self.stats = stats
        self.results = ResultStore() if results is None else results
        self.prefix = prefix
        self.budget = budget
        self.timesteps = clock.timesteps().tolist()
        self.contexts: dict[int, list[ContextKV]] = {}
        self.null_context = dit.encode_context(null_caption.unsqueeze(0))
        self._count_both(flops.context(dit.config, text=len(null_caption)))
        self.waiting: tuple[int, ...] = ()
        """Chunks that became clean in the last tick; the next one settles their keys."""
        self.num_unshared = 0
        """Chunks whose clean keys the branches don't share yet, see `_share_clean`."""
        rows, columns = (size // dit.config.patch_size for size in latents.shape[-2:])
        self.chunk_tokens = clip.chunk_width * rows * columns
        self.branches = {"cond": Branch(is_null=False, caches=self._caches())}
        if sampling.guidance is not None:
            self.branches["prev"] = Branch(is_null=True, caches=self._caches())

    def _caches(self) -> list[KVCache]:
        config = self.dit.config
        total = None if self.budget is None else self.budget.total_chunks
        num_chunks = cache_chunks(self.clip, total_chunks=total)
        return caches_for(
            config.num_layers,
            capacity=num_chunks * self.chunk_tokens,
            num_heads=config.num_query_groups,
            head_width=config.kv_channels,
            dtype=self.dit.dtype,
            device=self.latents.device,
        )

    def run(self) -> Iterator[tuple[Tick, tuple[int, ...]]]:
        """Denoise; after every tick yield it and the chunks that became clean in it.

        Their latents are final. The generator may be closed at any time.
        """
        ticks = self.clock.ticks(self.clip)
        with self.stats.stage("dit"):
            self._feed_given(ticks[0])
        for tick in ticks:
            with self.stats.stage("dit"):
                self._settle_waiting(tick)
                self._compress(tick)
                velocities = self._velocities(tick)
                self._advance(tick, velocities)
                self._finish(tick)
            yield tick, tick.finishing

    # One tick ---------------------------------------------------------------------------------

    def _velocities(self, tick: Tick) -> dict[int, Tensor]:
        """Return the guided velocity of each chunk that is computed, `[C, F, h, w]`."""
        for chunk in tick.steps:
            self._frames(chunk).copy_(self._fixed(chunk))
            if chunk not in self.contexts:
                text = self.captions[chunk].unsqueeze(0)
                self.contexts[chunk] = self.dit.encode_context(text)
                self._count_both(flops.context(self.dit.config, text=text.shape[1]))
        steps = {chunk: tick.steps[chunk] for chunk in self._computed(tick)}
        self._count(tick, steps)
        passes = {name: self._through_cache(branch, tick, steps) for name, branch in self._named()}
        guided = passes["cond"]
        if self.sampling.guidance is not None:
            guided = {
                chunk: self._guide(tick, chunk, {n: v[chunk] for n, v in passes.items()})
                for chunk in steps
            }
        oldest = min(tick.steps)
        if oldest in steps and self._is_computed_twice(tick.steps[oldest]):
            alone = self._alone(tick, oldest, position=max(tick.steps) + 1)
            share = self.sampling.prev_share
            guided[oldest] = share * guided[oldest] + (1 - share) * alone
        return guided

    def _computed(self, tick: Tick) -> list[int]:
        """Ask the policy which chunks are computed, and record its answer."""
        signals: dict[int, Tensor] = {}
        if self.policy.needs_signals:
            signals = {chunk: self._signal(tick, chunk) for chunk in tick.steps}
        plan = self.policy.plan(tick, signals, stored=self.results.units())
        for chunk, decision in plan.items():
            self.stats.record(
                segment=0,
                tick=tick.index,
                chunk=chunk,
                step=tick.steps[chunk],
                branch="all",
                decision=decision,
            )
        return [chunk for chunk, decision in plan.items() if decision.is_computed]

    def _signal(self, tick: Tick, chunk: int) -> Tensor:
        x, t = self._frames(chunk).unsqueeze(0), self._t(self.timesteps[tick.steps[chunk]])
        tokens = flops.embed(self.dit.config, tokens=self.chunk_tokens, is_distilled=False)
        self.stats.add_flops(computed=tokens, without_reuse=0)
        return self.dit.embed(x, t, is_null=False).tokens

    def _through_cache(
        self, branch: Branch, tick: Tick, steps: Mapping[int, int]
    ) -> dict[int, Tensor]:
        """Compute chunks one after the other, each with the keys of those before it."""
        order, velocities = list(tick.steps), {}
        for chunk, step in steps.items():
            attend = self._attend(
                branch,
                offset=order.index(chunk) * self.chunk_tokens,
                reach=self.clock.reach(step),
                keeps_queries=self.budget is not None,
            )
            context = self.null_context if branch.is_null else self.contexts[chunk]
            hidden = self._hidden(
                self._frames(chunk),
                t=self.timesteps[step],
                tick=tick,
                position=chunk,
                is_null=branch.is_null,
                context=context,
                attend=attend,
            )
            velocities[chunk] = self._read(hidden)
        return velocities

    def _guide(self, tick: Tick, chunk: int, passes: Mapping[str, Tensor]) -> Tensor:
        """Weight the passes; the one of the chunk alone is left out where it has no weight."""
        assert self.sampling.guidance is not None
        step = tick.steps[chunk]
        prev, text = self.sampling.guidance.scales(self.timesteps[step])
        guided = (prev - text) * passes["prev"] + text * passes["cond"]
        if not self._has_pass_alone(step):
            return guided
        hidden = self._hidden(
            self._frames(chunk),
            t=self.timesteps[step],
            tick=tick,
            position=0,
            is_null=True,
            context=self.null_context,
            attend=self._own_tokens,
        )
        return (1 - prev) * self._read(hidden) + guided

    def _has_pass_alone(self, step: int) -> bool:
        """Tell whether the pass of a chunk alone has any weight in the guidance."""
        guidance = self.sampling.guidance
        return guidance is not None and guidance.scales(self.timesteps[step])[0] != 1

    def _is_computed_twice(self, step: int) -> bool:
        """Tell whether the oldest chunk is also computed without the chunks before it."""
        sampling = self.sampling
        is_wanted = sampling.nearly_clean_pass and sampling.guidance is None
        return is_wanted and self.clock.is_nearly_clean(step)

    def _alone(self, tick: Tick, chunk: int, *, position: int) -> Tensor:
        """Compute a chunk with its text, but without the chunks before it."""
        hidden = self._hidden(
            self._frames(chunk),
            t=self.timesteps[tick.steps[chunk]],
            tick=tick,
            position=position,
            is_null=False,
            context=self.contexts[chunk],
            attend=self._own_tokens,
        )
        return self._read(hidden)

    def _advance(self, tick: Tick, velocities: Mapping[int, Tensor]) -> None:
        """Take one Euler step with every active chunk."""
        is_velocity = self.sampling.quantity == "velocity"
        for chunk, step in tick.steps.items():
            t, latents = self.timesteps[step], self._frames(chunk)
            step_size = self.timesteps[step + 1] - t
            sigma = latents.new_full((latents.shape[1],), 1 - t)
            if chunk in velocities:
                velocity = velocities[chunk]
                change = velocity * step_size
                stored = velocity if is_velocity else change
                self.results.put(chunk, stored.movedim(1, 0), sigma=sigma)
            else:
                change = self.results.predict(chunk, sigma=sigma).movedim(0, 1)
                change = change * step_size if is_velocity else change
            latents += change

    def _finish(self, tick: Tick) -> None:
        self._share_clean()
        self.waiting = tick.finishing
        for chunk in tick.finishing:
            self.results.drop(chunk)
            del self.contexts[chunk]

    # Clean chunks -----------------------------------------------------------------------------

    def _feed_given(self, first: Tick) -> None:
        """Put the keys of the given chunks into the caches, those without text into all."""
        *others, (_, last) = self._named()
        for chunk in range(self.clip.num_given):
            self._feed(chunk, last, tick=first, reach=self.clock.reach_given())
            self._settle(last)
            for _, branch in others:
                for cache, source in zip(branch.caches, last.caches, strict=True):
                    keys, values = source.prefix(0, reach_tokens=self.chunk_tokens)
                    cache.put(0, keys, values)
                branch.queries.update(last.queries)
                self._settle(branch)

    def _settle_waiting(self, tick: Tick) -> None:
        """Give the chunks that became clean in the last tick their final keys."""
        for chunk in self.waiting:
            for _, branch in self._named():
                if self.sampling.clean_pass:
                    self._feed(chunk, branch, tick=tick, reach=self.clock.reach_clean())
                self._settle(branch)
        self.num_unshared = len(self.waiting) if self.sampling.clean_pass else 0
        self.waiting = ()

    def _settle(self, branch: Branch) -> None:
        for cache in branch.caches:
            cache.settle(self.chunk_tokens)

    def _share_clean(self) -> None:
        """Give the pass with text the clean keys of the pass without.

        In the tick in which a chunk's clean keys are made, the released model lets each pass see
        its own; from the next tick on, all see those of the pass without text.
        """
        tokens = self.num_unshared * self.chunk_tokens
        self.num_unshared = 0
        *others, (_, last) = self._named()
        for _, branch in others:
            for cache, source in zip(branch.caches, last.caches, strict=True):
                cache.copy_last_clean(source, tokens)

    def _compress(self, tick: Tick) -> None:
        """Drop clean tokens where the caches have no room for the chunk that enters."""
        if self.budget is None or not tick.entering:
            return
        kept = (self.budget.total_chunks - len(tick.steps)) * self.chunk_tokens
        if self.branches["cond"].caches[0].clean <= kept:
            return
        self._share_clean()
        keep = partial(self.budget.strategy.keep, budget=kept, layout=self.budget.layout)
        with self.stats.stage("kv_compression"):
            for _, branch in self._named():
                for layer, cache in enumerate(branch.caches):
                    cache.compress(branch.queries[layer], keep)

    # The model --------------------------------------------------------------------------------

    def _feed(self, chunk: int, branch: Branch, *, tick: Tick, reach: int | None) -> None:
        """Send a clean chunk through the model, without its text, for the sake of its keys."""
        keys = self._num_keys(branch, offset=0, reach=reach)
        self._count_both(self._pass_flops(keys, self.null_context))
        self._hidden(
            self._fixed(chunk),
            t=self.sampling.clean_t,
            tick=tick,
            position=chunk,
            is_null=branch.is_null,
            context=self.null_context,
            attend=self._attend(branch, offset=0, reach=reach, keeps_queries=not branch.queries),
        )

    def _hidden(
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
        height_width = dict(zip(("latent_height", "latent_width"), x_CFhw.shape[-2:], strict=True))
        rope = self.dit.rope_table(
            first_frame=position * self.clip.chunk_width,
            num_frames=self.clip.chunk_width,
            **height_width,
        )
        return self.dit.run_blocks(embedded, rope, context, self_attend=attend)

    def _read(self, hidden: Tensor) -> Tensor:
        height, width = self.latents.shape[-2:]
        return self.dit.velocity(hidden, latent_height=height, latent_width=width)[0]

    def _attend(
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
            offset=offset,
            kernel=self.dit.kernel,
            reach_tokens=None if reach is None else reach * self.chunk_tokens,
            remember=remember if keeps_queries else None,
        )

    def _own_tokens(self, _layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let a chunk attend to itself alone."""
        return self.dit.kernel(q, k, v)

    # FLOPs ------------------------------------------------------------------------------------

    def _count(self, tick: Tick, computed: Mapping[int, int]) -> None:
        """Add the FLOPs of a tick, as done and as without reuse."""
        head = flops.head(self.dit.config, queries=self.chunk_tokens)
        for place, (chunk, step) in enumerate(tick.steps.items()):
            cost = 0
            for _, branch in self._named():
                keys = self._num_keys(
                    branch, offset=place * self.chunk_tokens, reach=self.clock.reach(step)
                )
                context = self.null_context if branch.is_null else self.contexts[chunk]
                cost += self._pass_flops(keys, context) + head
            if self._has_pass_alone(step):
                cost += self._pass_flops(self.chunk_tokens, self.null_context) + head
            if place == 0 and self._is_computed_twice(step):
                cost += self._pass_flops(self.chunk_tokens, self.contexts[chunk]) + head
            self.stats.add_flops(computed=cost if chunk in computed else 0, without_reuse=cost)

    def _pass_flops(self, keys: int, context: Sequence[ContextKV]) -> int:
        """Return the FLOPs of one chunk through embedding and layers."""
        config, tokens = self.dit.config, self.chunk_tokens
        cost = flops.embed(config, tokens=tokens, is_distilled=self.sampling.is_distilled)
        return cost + flops.blocks(config, queries=tokens, keys=keys, text=context[0].k.shape[1])

    def _num_keys(self, branch: Branch, *, offset: int, reach: int | None) -> int:
        seen = branch.caches[0].clean + offset + self.chunk_tokens
        return seen if reach is None else min(seen, reach * self.chunk_tokens)

    def _count_both(self, cost: int) -> None:
        self.stats.add_flops(computed=cost, without_reuse=cost)

    # Small things -----------------------------------------------------------------------------

    def _named(self) -> list[tuple[str, Branch]]:
        """Return the branches; the last one's clean keys are those of all."""
        return list(self.branches.items())

    def _frames(self, chunk: int) -> Tensor:
        """Return a view of a chunk's latents."""
        own = self.clip.latents(chunk)
        return self.latents[:, own.start : own.stop]

    def _fixed(self, chunk: int) -> Tensor:
        """Return a copy of a chunk's latents, the given ones in their places."""
        latents, num_fixed = self._frames(chunk).clone(), self.clip.num_fixed(chunk)
        if num_fixed:
            assert self.prefix is not None, "the clip has given latents, but none were passed"
            start = self.clip.latents(chunk).start
            latents[:, :num_fixed] = self.prefix[:, start : start + num_fixed]
        return latents

    def _t(self, t: float) -> Tensor:
        return torch.tensor([[t]], dtype=torch.float32, device=self.latents.device)
