"""The denoising loop of one clip: the algorithm of MAGI-1 with FlowCache.

Chunks go through the transformer one by one, oldest first, and find the keys of those before them
in a KV cache. That gives what one forward of all active chunks gives, whose attention is causal
between chunks.

Axes: C latent channels, F latent frames, h/w latent rows/columns, L text tokens; the batch is 1.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.kv import KVCache, caches_for, tokens_per_chunk
from flowcache.results import ResultStore
from flowcache.reuse import Observe, ReusePolicy
from flowcache.schedule import Tick
from flowcache.stats import RunStats
from flowcache.trace import PassId
from magi1.dit import DiT
from magi1.euler import euler_step_
from magi1.forward import ClipForward
from magi1.layers import ContextKV
from magi1.sampling import Branch, KVBudget, Sampling, cache_chunks
from magi1.schedule import Clip, Clock

ALL_BRANCHES = "all"
"""Branch under which the one decision for all guidance passes is recorded."""


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
        kv_storage: where the KV cache lies; None: on the device.
        observe: is shown the velocities of computed steps.

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
        kv_storage: torch.device | None = None,
        observe: Observe | None = None,
    ) -> None:
        if budget is not None and budget.total_chunks <= clock.window:
            raise UserError(
                f"the KV budget is {budget.total_chunks} chunks, but must be above the window of "
                f"{clock.window}; raise total_chunks"
            )
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
        self.observe = observe
        self.forward = ClipForward(
            dit,
            clip=clip,
            clock=clock,
            size=(latents.shape[-2], latents.shape[-1]),
            device=latents.device,
            sampling=sampling,
            stats=stats,
            budget=budget,
        )
        self.chunk_tokens = self.forward.chunk_tokens
        self.timesteps = clock.timesteps().tolist()
        self.contexts: dict[int, list[ContextKV]] = {}
        self.null_context = self.forward.context(null_caption)
        self.waiting: tuple[int, ...] = ()
        """Chunks that became clean in the last tick; the next one settles their keys."""
        self.num_unshared = 0
        """Chunks whose clean keys the branches don't share yet, see `_share_clean`."""
        names = ("cond",) if sampling.guidance is None else ("cond", "prev")
        self.branches = {
            name: Branch(is_null=name == "prev", caches=self._caches(dit, kv_storage))
            for name in names
        }

    def _caches(self, dit: DiT, storage: torch.device | None) -> list[KVCache]:
        config = dit.config
        total = None if self.budget is None else self.budget.total_chunks
        num_chunks = cache_chunks(self.clip, total_chunks=total)
        caches = caches_for(
            config.num_layers,
            capacity=num_chunks * self.chunk_tokens,
            num_heads=config.num_query_groups,
            head_width=config.kv_channels,
            dtype=dit.dtype,
            device=self.latents.device,
            storage=storage,
        )
        if self.stats.trace is not None:
            for cache in caches:
                cache.track(self.clip.num_chunks)
        return caches

    def run(self) -> Iterator[tuple[Tick, tuple[int, ...]]]:
        """Denoise; after every tick yield it and the chunks that became clean in it.

        Their latents are final. The generator may be closed at any time.
        """
        ticks = self.clock.ticks(self.clip)
        with self.stats.stage("dit"):
            self._feed_given(ticks[0])
        for tick in ticks:
            with self.stats.timed_tick(0, tick.index), self.stats.stage("dit"):
                self._settle_waiting(tick)
                self._compress(tick)
                velocities = self._velocities(tick)
                self._advance(tick, velocities)
                self._finish(tick)
            self._keep_tokens(tick)
            yield tick, tick.finishing

    # One tick ---------------------------------------------------------------------------------

    def _velocities(self, tick: Tick) -> dict[int, Tensor]:
        """Return the guided velocity of each chunk that is computed, `[C, F, h, w]`."""
        for chunk in tick.steps:
            self._frames(chunk).copy_(self._fixed(chunk))
            if chunk not in self.contexts:
                self.contexts[chunk] = self.forward.context(self.captions[chunk])
        steps = {chunk: tick.steps[chunk] for chunk in self._computed(tick)}
        self._count(tick, steps)
        passes = {name: self._through_cache(name, tick, steps) for name in self.branches}
        guided = passes["cond"]
        if self.sampling.guidance is not None:
            guided = {
                chunk: self._guide(tick, chunk, {n: v[chunk] for n, v in passes.items()})
                for chunk in steps
            }
        oldest = min(tick.steps)
        if oldest in steps and self._is_computed_twice(tick.steps[oldest]):
            alone = self._alone(tick, oldest, branch="nearly_clean", position=max(tick.steps) + 1)
            share = self.sampling.prev_share
            guided[oldest] = share * guided[oldest] + (1 - share) * alone
        for chunk, velocity in guided.items():
            self._show(tick, chunk, "guided", velocity)
        return guided

    def _computed(self, tick: Tick) -> list[int]:
        """Ask the policy which chunks are computed, and record its answer."""
        signals: dict[int, Tensor] = {}
        if self.policy.needs_signals:
            signals = {
                chunk: self.forward.signal(self._frames(chunk), t=self.timesteps[step])
                for chunk, step in tick.steps.items()
            }
        plan = self.policy.plan(tick, signals, stored=self.results.units())
        for chunk, decision in plan.items():
            self.stats.record(
                segment=0,
                tick=tick.index,
                chunk=chunk,
                step=tick.steps[chunk],
                branch=ALL_BRANCHES,
                decision=decision,
            )
        return [chunk for chunk, decision in plan.items() if decision.is_computed]

    def _through_cache(self, name: str, tick: Tick, steps: Mapping[int, int]) -> dict[int, Tensor]:
        """Compute chunks one after the other, each with the keys of those before it."""
        branch, order, velocities = self.branches[name], list(tick.steps), {}
        for chunk, step in steps.items():
            attend = self.forward.through_cache(
                branch,
                offset=order.index(chunk) * self.chunk_tokens,
                reach=self.clock.reach(step),
                keeps_queries=self.budget is not None,
            )
            with self.stats.timed_pass([_pass(tick, chunk)]):
                hidden = self.forward.run(
                    self._frames(chunk),
                    t=self.timesteps[step],
                    tick=tick,
                    position=chunk,
                    is_null=branch.is_null,
                    context=self.null_context if branch.is_null else self.contexts[chunk],
                    attend=attend,
                )
                velocities[chunk] = self.forward.velocity(hidden)
            self._show(tick, chunk, name, velocities[chunk])
        return velocities

    def _guide(self, tick: Tick, chunk: int, passes: Mapping[str, Tensor]) -> Tensor:
        """Weight the passes; the one of the chunk alone is left out where it has no weight."""
        assert self.sampling.guidance is not None
        step = tick.steps[chunk]
        prev, text = self.sampling.guidance.scales(self.timesteps[step])
        guided = (prev - text) * passes["prev"] + text * passes["cond"]
        if not self.sampling.has_pass_alone(self.timesteps[step]):
            return guided
        return (1 - prev) * self._alone(tick, chunk, branch="alone", position=0) + guided

    def _is_computed_twice(self, step: int) -> bool:
        """Tell whether the oldest chunk is also computed without the chunks before it."""
        return self.sampling.has_nearly_clean_pass and self.clock.is_nearly_clean(step)

    def _alone(self, tick: Tick, chunk: int, *, branch: str, position: int) -> Tensor:
        """Compute a chunk without the chunks before it; as "alone" also without its text."""
        is_null = branch == "alone"
        with self.stats.timed_pass([_pass(tick, chunk)]):
            hidden = self.forward.run(
                self._frames(chunk),
                t=self.timesteps[tick.steps[chunk]],
                tick=tick,
                position=position,
                is_null=is_null,
                context=self.null_context if is_null else self.contexts[chunk],
                attend=self.forward.own_tokens,
            )
            velocity = self.forward.velocity(hidden)
        self._show(tick, chunk, branch, velocity)
        return velocity

    def _advance(self, tick: Tick, velocities: Mapping[int, Tensor]) -> None:
        """Take one Euler step with every active chunk."""
        for chunk, step in tick.steps.items():
            t, latents = self.timesteps[step], self._frames(chunk)
            euler_step_(
                latents.movedim(1, 0),
                velocities[chunk].movedim(1, 0) if chunk in velocities else None,
                chunk=chunk,
                t=t,
                step_size=self.timesteps[step + 1] - t,
                results=self.results,
                quantity=self.sampling.quantity,
            )

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
            last.settle(self.chunk_tokens, chunk=chunk)
            for _, branch in others:
                for cache, source in zip(branch.caches, last.caches, strict=True):
                    keys, values = source.prefix(0, reach_tokens=self.chunk_tokens)
                    cache.put(0, keys, values)
                branch.queries.update(last.queries)
                branch.settle(self.chunk_tokens, chunk=chunk)

    def _settle_waiting(self, tick: Tick) -> None:
        """Give the chunks that became clean in the last tick their final keys."""
        for chunk in self.waiting:
            for _, branch in self._named():
                if self.sampling.clean_pass:
                    self._feed(chunk, branch, tick=tick, reach=self.clock.reach_clean())
                branch.settle(self.chunk_tokens, chunk=chunk)
        self.num_unshared = len(self.waiting) if self.sampling.clean_pass else 0
        self.waiting = ()

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

    def _feed(self, chunk: int, branch: Branch, *, tick: Tick, reach: int | None) -> None:
        """Send a clean chunk through the model, without its text, for the sake of its keys."""
        self.forward.feed(
            branch,
            self._fixed(chunk),
            tick=tick,
            position=chunk,
            context=self.null_context,
            reach=reach,
        )

    # What others see --------------------------------------------------------------------------

    def _count(self, tick: Tick, computed: Mapping[int, int]) -> None:
        """Add the FLOPs of a tick, as done and as without reuse."""
        for place, (chunk, step) in enumerate(tick.steps.items()):
            own, cost = self.contexts[chunk], 0
            for _, branch in self._named():
                keys = self.forward.num_keys(
                    branch, offset=place * self.chunk_tokens, reach=self.clock.reach(step)
                )
                cost += self.forward.flops(self.null_context if branch.is_null else own, keys=keys)
            if self.sampling.has_pass_alone(self.timesteps[step]):
                cost += self.forward.flops(self.null_context, keys=self.chunk_tokens)
            if place == 0 and self._is_computed_twice(step):
                cost += self.forward.flops(own, keys=self.chunk_tokens)
            self.stats.add_flops(
                computed=cost if chunk in computed else 0,
                without_reuse=cost,
                passes=[_pass(tick, chunk)],
            )

    def _show(self, tick: Tick, chunk: int, branch: str, velocity: Tensor) -> None:
        """Show the observer, if there is one, a chunk's computed velocity."""
        if self.observe is None:
            return
        step = tick.steps[chunk]
        self.observe(
            segment=0,
            tick=tick.index,
            chunk=chunk,
            step=step,
            branch=branch,
            velocity=velocity,
            sigma=1 - self.timesteps[step],
        )

    def _keep_tokens(self, tick: Tick) -> None:
        """Trace the clean tokens in the caches after a tick."""
        for name, branch in self.branches.items():
            self.stats.keep_tokens(
                0, tick.index, branch=name, tokens=partial(tokens_per_chunk, branch.caches)
            )

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


def _pass(tick: Tick, chunk: int) -> PassId:
    return PassId(0, tick.index, chunk, ALL_BRANCHES)
