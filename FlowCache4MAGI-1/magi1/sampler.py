"""The denoising loop of one clip: the algorithm of MAGI-1 with FlowCache.

Chunks go through the transformer one by one, oldest first, and find the keys of those before them
in a KV cache. That gives what one forward of all active chunks gives, whose attention is causal
between chunks.

Axes: C latent channels, F latent frames, h/w latent rows/columns, L text tokens; the batch is 1.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.ranks import Ranks
from flowcache.reuse import Observe, ResultStore, ReusePolicy
from flowcache.schedule import Tick
from flowcache.stats import RunStats
from flowcache.trace import PassId
from magi1.caches import PassCaches
from magi1.dit import DiT
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
        ranks: the processes that divide the work; all hold the same latents.

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
        ranks: Ranks | None = None,
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
        self.ranks = Ranks() if ranks is None else ranks
        self.forward = ClipForward(
            dit,
            clip=clip,
            clock=clock,
            size=(latents.shape[-2], latents.shape[-1]),
            device=latents.device,
            sampling=sampling,
            stats=stats,
            budget=budget,
            ranks=self.ranks,
        )
        self.chunk_tokens = self.forward.chunk_tokens
        self.timesteps = clock.timesteps().tolist()
        self.contexts: dict[int, list[ContextKV]] = {}
        self.null_context = self.forward.context(null_caption)
        self.waiting: tuple[int, ...] = ()
        """Chunks that became clean in the last tick; the next one settles their keys."""
        total = None if budget is None else budget.total_chunks
        self.caches = PassCaches(
            dit,
            passes=sampling.passes,
            num_chunks=cache_chunks(clip, total_chunks=total),
            chunk_tokens=self.chunk_tokens,
            device=latents.device,
            storage=kv_storage,
            ranks=self.ranks,
        )
        if stats.trace is not None:
            self.caches.track(clip.num_chunks)

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
        own = {name: self._through_cache(name, tick, steps) for name in self.caches.own}
        guided = own.get("cond", {})
        if self.sampling.guidance is not None:
            guided = {
                chunk: self._guide(tick, chunk, {n: v[chunk] for n, v in own.items()})
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
        branch, order, velocities = self.caches.own[name], list(tick.steps), {}
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

    def _guide(self, tick: Tick, chunk: int, own: Mapping[str, Tensor]) -> Tensor:
        """Weight the passes; the one of the chunk alone is left out where it has no weight.

        Args:
            own: the velocities of this process' passes through the cache.
        """
        assert self.sampling.guidance is not None
        t, names, own = self.timesteps[tick.steps[chunk]], list(self.caches.branches), dict(own)
        if self.sampling.has_pass_alone(t):
            names.append("alone")
            if "alone" in self.ranks.own(self.sampling.passes):
                own["alone"] = self._alone(tick, chunk, branch="alone", position=0)
        passes = self.ranks.exchanged(own, names=names, like=self._frames(chunk))
        prev, text = self.sampling.guidance.scales(t)
        guided = (prev - text) * passes["prev"] + text * passes["cond"]
        return (1 - prev) * passes["alone"] + guided if "alone" in passes else guided

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
        self.caches.share()
        self.waiting = tick.finishing
        for chunk in tick.finishing:
            self.results.drop(chunk)
            del self.contexts[chunk]

    # Clean chunks -----------------------------------------------------------------------------

    def _feed_given(self, first: Tick) -> None:
        """Put the keys of the given chunks into the caches, those without text into all.

        A process without the pass without text makes its keys in a cache of its own.
        """
        _, last = self.caches.last
        *_, fed = self.caches.own.values() or [last]
        for chunk in range(self.clip.num_given):
            maker = replace(fed, is_null=last.is_null)
            self._feed(chunk, maker, tick=first, reach=self.clock.reach_given())
            self.caches.copy_active(fed)
            self.caches.settle(chunk)

    def _settle_waiting(self, tick: Tick) -> None:
        """Give the chunks that became clean in the last tick their final keys."""
        for chunk in self.waiting:
            if self.sampling.clean_pass:
                for branch in self.caches.branches.values():
                    self._feed(chunk, branch, tick=tick, reach=self.clock.reach_clean())
            self.caches.settle(chunk)
        self.caches.num_unshared = len(self.waiting) if self.sampling.clean_pass else 0
        self.waiting = ()

    def _compress(self, tick: Tick) -> None:
        """Drop clean tokens where the caches have no room for the chunk that enters."""
        if self.budget is None or not tick.entering:
            return
        kept = (self.budget.total_chunks - len(tick.steps)) * self.chunk_tokens
        if self.caches.num_clean <= kept:
            return
        self.caches.share()
        keep = partial(self.budget.strategy.keep, budget=kept, layout=self.budget.layout)
        with self.stats.stage("kv_compression"):
            self.caches.compress(keep, num_kept=kept)

    def _feed(self, chunk: int, branch: Branch, *, tick: Tick, reach: int | None) -> None:
        """Send a clean chunk through the model, without its text, for the sake of its keys."""
        self.forward.feed(
            branch,
            self._fixed(chunk),
            tick=tick,
            position=chunk,
            context=self.null_context,
            reach=reach,
            num_clean=self.caches.num_clean,
        )

    # What others see --------------------------------------------------------------------------

    def _count(self, tick: Tick, computed: Mapping[int, int]) -> None:
        """Add the FLOPs of a tick, as done and as without reuse."""
        for place, (chunk, step) in enumerate(tick.steps.items()):
            own, cost = self.contexts[chunk], 0
            for branch in self.caches.branches.values():
                before = self.caches.num_clean + place * self.chunk_tokens
                keys = self.forward.num_keys(before, reach=self.clock.reach(step))
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
        for name, branch in self.caches.own.items():
            tokens = partial(self.caches.tokens_per_chunk, branch)
            self.stats.keep_tokens(0, tick.index, branch=name, tokens=tokens)

    # Small things -----------------------------------------------------------------------------

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
