"""The denoising loop of one clip: the algorithm of MAGI-1 with FlowCache.

Chunks go through the transformer one by one, oldest first, and find the keys of those before them
in a KV cache. That gives what one forward of all active chunks gives, whose attention is causal
between chunks.

Axes: C latent channels, F latent frames, h/w latent rows/columns, L text tokens; the batch is 1.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.guidance import HeldGuidance
from flowcache.results import ResultStore
from flowcache.reuse import Decision, Observe, ReusePolicy
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import PassId, RunStats
from flowcache.schedule import Tick
from magi1.clean import CleanKeys
from magi1.dit import DiT
from magi1.euler import euler_step_
from magi1.forward import ClipForward
from magi1.layers import ContextKV
from magi1.sampling import Branch, KVBudget, Sampling
from magi1.schedule import Clip, Clock

ALL_BRANCHES = "all"
"""Branch under which the one decision for all guidance passes is recorded."""
GUIDANCE = "guidance"
"""Branch under which the passes beside that with text are recorded where they are held."""


class ClipSampler:
    """Denoises one clip; lives as long as it does.

    Args:
        latents: `[C, F, h, w]` float32 noise for all chunks, given ones included. Changed in place.
        captions: text of each chunk to denoise, `[L, C']`.
        null_caption: text that stands for no text, `[L, C']`.
        policy: when a chunk is computed. One decision serves all passes: their signal is the same.
        results: what computed steps gave, for reuse.
        held_guidance: says where only the pass with text is computed; None: nowhere.
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
        held_guidance: HeldGuidance | None = None,
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
        self.held_guidance = HeldGuidance() if held_guidance is None else held_guidance
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
        own = self.ranks.local_branches(sampling.passes)
        self.branches = {
            name: Branch(
                is_null=name == "prev",
                caches=self.forward.caches(kv_storage) if name in own else [],
            )
            for name in sampling.passes
            if name != "alone"
        }
        self.keys = CleanKeys(
            self.forward, self.branches, null_context=self.null_context, fixed=self._fixed
        )

    def run(self) -> Iterator[tuple[Tick, tuple[int, ...]]]:
        """Denoise; after every tick yield it and the chunks that became clean in it.

        Their latents are final. The generator may be closed at any time.
        """
        ticks = self.clock.ticks(self.clip)
        with self.stats.stage("dit"):
            self.keys.feed_given(ticks[0])
        for tick in ticks:
            with self.stats.timed_tick(0, tick.index), self.stats.stage("dit"):
                self.keys.settle_waiting(tick)
                self.keys.compress(tick)
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
        held = self._held(tick)
        steps = {chunk: tick.steps[chunk] for chunk in self._computed(tick, held=held)}
        full = {chunk: step for chunk, step in steps.items() if chunk not in held}
        self._count(tick, steps, full)
        own = {
            name: self._through_cache(name, tick, steps if name == "cond" else full)
            for name in self.keys.own
        }
        guided = own.get("cond", {})
        if self.sampling.guidance is not None:
            guided = {
                chunk: self._guide(
                    tick,
                    chunk,
                    {name: passes[chunk] for name, passes in own.items() if chunk in passes},
                    is_held=chunk in held,
                )
                for chunk in steps
            }
        oldest = min(tick.steps)
        if oldest in steps and self._is_computed_twice(tick.steps[oldest]):
            alone = self._alone(tick, oldest, branch="nearly_clean", position=max(tick.steps) + 1)
            share = self.sampling.prev_share
            guided[oldest] = share * guided[oldest] + (1 - share) * alone
        for chunk in full:
            self._show(tick, chunk, "guided", guided[chunk])
        return guided

    def _held(self, tick: Tick) -> set[int]:
        """Return the chunks that compute the pass with text alone, if they are computed."""
        if self.sampling.guidance is None:
            return set()
        return {
            chunk
            for chunk, step in tick.steps.items()
            if self.held_guidance.is_held(
                chunk, step, num_steps=tick.num_steps, scales=self._scales(step)
            )
        }

    def _scales(self, step: int) -> tuple[float, ...]:
        assert self.sampling.guidance is not None
        return self.sampling.guidance.scales(self.timesteps[step])

    def _computed(self, tick: Tick, *, held: Collection[int]) -> list[int]:
        """Ask the policy which chunks are computed, and record its answer."""
        signals: dict[int, Tensor] = {}
        if self.policy.needs_signals:
            signals = {
                chunk: self.forward.signal(self._frames(chunk), t=self.timesteps[step])
                for chunk, step in tick.steps.items()
            }
        plan = self.policy.plan(tick, signals, stored=self.results.units())
        for chunk, decision in plan.items():
            rows = {ALL_BRANCHES: decision}
            if self.held_guidance.is_on:
                rows[GUIDANCE] = Decision(decision.is_computed and chunk not in held)
            for branch, row in rows.items():
                self.stats.record(
                    segment=0,
                    tick=tick.index,
                    chunk=chunk,
                    step=tick.steps[chunk],
                    branch=branch,
                    decision=row,
                )
        return [chunk for chunk, decision in plan.items() if decision.is_computed]

    def _through_cache(self, name: str, tick: Tick, steps: Mapping[int, int]) -> dict[int, Tensor]:
        """Compute chunks one after the other, each with the keys of those before it."""
        branch, order, velocities = self.keys.own[name], list(tick.steps), {}
        for chunk, step in steps.items():
            attend = self.forward.through_cache(
                branch,
                offset=order.index(chunk) * self.chunk_tokens,
                reach=self.clock.reach(step),
                keeps_queries=self.budget is not None,
            )
            with self.stats.timed_pass([self._pass(tick, chunk, is_text=name == "cond")]):
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

    def _guide(self, tick: Tick, chunk: int, own: Mapping[str, Tensor], *, is_held: bool) -> Tensor:
        """Weight the passes; the one of the chunk alone is left out where it has no weight.

        Args:
            own: the velocities of this process' passes through the cache.
            is_held: whether only the pass with text is computed.
        """
        like, step = self._frames(chunk), tick.steps[chunk]
        if is_held:
            cond = self.ranks.gather_branches(own, names=["cond"], like=like)["cond"]
            return cond + self.held_guidance.take(chunk)
        passes = self._passes(tick, chunk, own)
        prev, text = scales = self._scales(step)
        guided = (prev - text) * passes["prev"] + text * passes["cond"]
        if "alone" in passes:
            guided = (1 - prev) * passes["alone"] + guided
        self.held_guidance.put(chunk, guided - passes["cond"], scales=scales)
        return guided

    def _passes(self, tick: Tick, chunk: int, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the velocities of all passes from the own ones, that of the chunk alone made."""
        names, made = list(self.branches), dict(own)
        if self.sampling.has_pass_alone(self.timesteps[tick.steps[chunk]]):
            names.append("alone")
            if "alone" in self.ranks.local_branches(self.sampling.passes):
                made["alone"] = self._alone(tick, chunk, branch="alone", position=0)
        return self.ranks.gather_branches(made, names=names, like=self._frames(chunk))

    def _is_computed_twice(self, step: int) -> bool:
        """Tell whether the oldest chunk is also computed without the chunks before it."""
        return self.sampling.has_nearly_clean_pass and self.clock.is_nearly_clean(step)

    def _alone(self, tick: Tick, chunk: int, *, branch: str, position: int) -> Tensor:
        """Compute a chunk without the chunks before it; as "alone" also without its text."""
        is_null = branch == "alone"
        with self.stats.timed_pass([self._pass(tick, chunk, is_text=not is_null)]):
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
        self.keys.share()
        self.keys.waiting = tick.finishing
        for chunk in tick.finishing:
            self.results.drop(chunk)
            self.held_guidance.drop(chunk)
            del self.contexts[chunk]

    # What others see --------------------------------------------------------------------------

    def _count(self, tick: Tick, computed: Collection[int], full: Collection[int]) -> None:
        """Add the FLOPs of a tick, as done and as without reuse.

        Args:
            computed: chunks that run the pass with text.
            full: those that run the others as well.
        """
        for place, (chunk, step) in enumerate(tick.steps.items()):
            own, costs = self.contexts[chunk], {True: 0, False: 0}
            for name, branch in self.branches.items():
                before = self.keys.num_clean + place * self.chunk_tokens
                keys = self.forward.num_keys(before, reach=self.clock.reach(step))
                context = self.null_context if branch.is_null else own
                costs[name == "cond"] += self.forward.flops(context, keys=keys)
            if self.sampling.has_pass_alone(self.timesteps[step]):
                costs[False] += self.forward.flops(self.null_context, keys=self.chunk_tokens)
            if place == 0 and self._is_computed_twice(step):
                costs[True] += self.forward.flops(own, keys=self.chunk_tokens)
            for is_text, cost in costs.items():
                self.stats.add_flops(
                    computed=cost if chunk in (computed if is_text else full) else 0,
                    without_reuse=cost,
                    passes=[self._pass(tick, chunk, is_text=is_text)],
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
        for name, branch in self.keys.own.items():
            tokens = partial(self.keys.tokens_per_chunk, branch)
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

    def _pass(self, tick: Tick, chunk: int, *, is_text: bool) -> PassId:
        """Return the row of the record that a pass belongs to."""
        is_own = self.held_guidance.is_on and not is_text
        return PassId(0, tick.index, chunk, GUIDANCE if is_own else ALL_BRANCHES)
