"""The denoising loop of one clip: the algorithm of MAGI-1 with FlowCache.

Chunks go through the transformer one by one, oldest first, and find the keys of those before them
in a KV cache. That gives what one forward of all active chunks gives, whose attention is causal
between chunks. Where processes divide the guidance passes, each has the caches of its own ones.

Axes: B batch (1), C latent channels, F latent frames, h/w latent rows/columns, L text tokens,
S tokens of a chunk, H query heads, D model width.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flowcache.kv import Attend, KVCache, cached_attention, caches_for, prefetcher_for
from flowcache.kv_quantized import KVLayout, KVSizes, Rotary, cache_maker
from flowcache.policies import Decision, Observe, ReusePolicy
from flowcache.predict import PREDICTORS, HeldGuidance, ResultStore
from flowcache.runtime.parallel import Ranks, TokenSplit
from flowcache.runtime.stats import PassId, RunStats
from flowcache.schedule import Tick
from flowcache.tokens import TokenChoice, chosen_tokens, patches_of, pixels_of
from magi1.config import Quantity
from magi1.dit import ContextKV, DiT, block_flops, context_flops, embed_flops, head_flops, rotate
from magi1.sampling import ALL_BRANCHES, GUIDANCE, Sampling, cache_chunks
from magi1.schedule import Clip


@dataclass(frozen=True)
class ClipInputs:
    """What a clip is made from."""

    clip: Clip
    latents: Tensor
    """`[C, F, h, w]` float32 noise for all chunks, given ones included."""
    captions: Mapping[int, Tensor]
    """Text of each chunk to denoise, `[L, C']`."""
    null_caption: Tensor
    prefix: Tensor | None = None
    """Given latents, `[C, clip.num_prefix, h, w]`."""

    def frames(self, chunk: int) -> Tensor:
        """Return a view of a chunk's latents."""
        own = self.clip.latents(chunk)
        return self.latents[:, own.start : own.stop]

    def fixed(self, chunk: int) -> Tensor:
        """Return a copy of a chunk's latents, the given ones in their places."""
        latents, num_fixed = self.frames(chunk).clone(), self.clip.num_fixed(chunk)
        if num_fixed:
            assert self.prefix is not None, "the clip has given latents, but none were passed"
            start = self.clip.latents(chunk).start
            latents[:, :num_fixed] = self.prefix[:, start : start + num_fixed]
        return latents


@dataclass(frozen=True)
class Reuse:
    """When chunks are computed, and what they get when they are not."""

    policy: ReusePolicy
    """One decision serves all guidance passes: their signal is the same."""
    results: ResultStore = field(default_factory=ResultStore)
    held_guidance: HeldGuidance = field(default_factory=HeldGuidance)
    tokens: TokenChoice | None = None
    """Which tokens of a chunk are computed; None: all."""


@dataclass
class CachedPass:
    """One guidance pass through the KV cache."""

    is_null: bool
    caches: list[KVCache]
    """By layer; empty where other processes compute the pass."""
    queries: dict[int, Tensor] = field(default_factory=dict)
    """Of the chunk computed last, by layer; empty without a KV budget."""


class ClipSampler:
    """Denoises one clip; lives as long as it does.

    Args:
        inputs: of the clip; the latents are changed in place.
        observe: is given the velocities of computed steps.
        ranks: the processes that divide the work; all hold the same latents.
    """

    def __init__(
        self,
        dit: DiT,
        inputs: ClipInputs,
        sampling: Sampling,
        *,
        reuse: Reuse,
        stats: RunStats,
        observe: Observe | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.dit, self.inputs, self.sampling, self.reuse = dit, inputs, sampling, reuse
        self.clip, self.latents, self.clock = inputs.clip, inputs.latents, sampling.clock
        self.stats, self.observe = stats, observe
        self.ranks = Ranks() if ranks is None else ranks
        self.timesteps: list[float] = self.clock.timesteps().tolist()
        self.size = (self.latents.shape[-2], self.latents.shape[-1])
        rows, columns = (length // dit.config.patch_size for length in self.size)
        self.chunk_tokens = self.clip.chunk_width * rows * columns
        self.split = TokenSplit(self.ranks.sequence, 1, self.chunk_tokens)
        self.num_kv_heads = dit.config.num_query_groups // self.ranks.layout.sequence
        """Key/value heads of this process."""
        self.null_context = self._context(inputs.null_caption)
        self.contexts: dict[int, list[ContextKV]] = {}
        self.kv_layout = self._kv_layout()
        owned = self.ranks.local_branches(sampling.passes)
        self.branches = {
            name: CachedPass(name == "prev", caches=self._caches() if name in owned else [])
            for name in sampling.passes
            if name != "alone"
        }
        """The passes with a cache; the clean keys of the last one are those of all."""
        self.own = {name: branch for name, branch in self.branches.items() if branch.caches}
        """Those that this process computes."""
        self.prefetcher = prefetcher_for([c for own in self.own.values() for c in own.caches])
        self.num_clean = 0
        """Clean tokens in each cache."""
        self.waiting: tuple[int, ...] = ()
        """Chunks that became clean in the last tick; the next one makes their keys final."""
        self.rows: dict[int, Tensor] = {}
        """Chunks of which, in this tick, some tokens alone are computed, and which."""
        self.num_unshared = 0
        """Chunks whose clean keys the branches don't share yet, see `_share`."""

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
                self._advance(tick, self._velocities(tick))
                self._finish(tick)
            caches = {name: branch.caches for name, branch in self.own.items()}
            self.stats.keep_tokens(0, tick.index, caches, sequence=self.ranks.sequence)
            yield tick, tick.finishing

    # One tick -------------------------------------------------------------------------------------

    def _velocities(self, tick: Tick) -> dict[int, Tensor]:
        """Return the guided velocity of each chunk that is computed, `[C, F, h, w]`."""
        for chunk in tick.steps:
            self.inputs.frames(chunk).copy_(self.inputs.fixed(chunk))
            if chunk not in self.contexts:
                self.contexts[chunk] = self._context(self.inputs.captions[chunk])
        held = self._held(tick)
        computed = self._computed(tick, held=held)
        full = [chunk for chunk in computed if chunk not in held]
        self._count(tick, computed, full)
        own = {
            name: {
                chunk: self._through_cache(name, tick, chunk)
                for chunk in (computed if name == "cond" else full)
            }
            for name in self.own
        }
        guided = own.get("cond", {})
        if self.sampling.guidance is not None:
            guided = {
                chunk: self._guided(
                    tick,
                    chunk,
                    {name: passes[chunk] for name, passes in own.items() if chunk in passes},
                    is_held=chunk in held,
                )
                for chunk in computed
            }
        oldest = min(tick.steps)
        if oldest in computed and self.sampling.is_computed_twice(tick.steps[oldest]):
            alone = self._alone("nearly_clean", tick, oldest, position=max(tick.steps) + 1)
            share = self.sampling.prev_share
            guided[oldest] = share * guided[oldest] + (1 - share) * alone
        for chunk in full:
            self._show(tick, chunk, "guided", guided[chunk])
        return guided

    def _held(self, tick: Tick) -> set[int]:
        """Return the chunks that compute the pass with text alone, if they are computed."""
        if self.sampling.guidance is None:
            return set()
        is_held = partial(self.reuse.held_guidance.is_held, num_steps=tick.num_steps)
        return {
            chunk
            for chunk, step in tick.steps.items()
            if is_held(chunk, step, scales=self._scales(step))
        }

    def _computed(self, tick: Tick, *, held: Collection[int]) -> list[int]:
        """Ask the policy which chunks are computed, and record its answer."""
        policy, signals, tokens = self.reuse.policy, dict[int, Tensor](), self.reuse.tokens
        if policy.needs_signals:
            signals = {chunk: self._signal(chunk, step) for chunk, step in tick.steps.items()}
        elif policy.needs_forecasts:
            signals = self.reuse.results.forecasts(
                {
                    chunk: noise_levels(self.timesteps[step], like=self.inputs.frames(chunk)[0])
                    for chunk, step in tick.steps.items()
                }
            )
        stored = self.reuse.results.units()
        plan = policy.plan(tick, signals, stored=stored)
        if tokens is not None:
            plan = tokens.choose(tick, plan, stored=stored)
        self.rows = {c: decision.rows for c, decision in plan.items() if decision.rows is not None}
        for chunk, decision in plan.items():
            rows = {ALL_BRANCHES: decision}
            if self.reuse.held_guidance.is_on:
                rows[GUIDANCE] = Decision(decision.is_computed and chunk not in held)
            for branch, row in rows.items():
                self.stats.record(tick, chunk, branch, row)
        return [chunk for chunk, decision in plan.items() if decision.is_computed]

    def _guided(
        self, tick: Tick, chunk: int, own: Mapping[str, Tensor], *, is_held: bool
    ) -> Tensor:
        """Weight the passes; the one of the chunk alone is left out where it has no weight.

        Args:
            own: the velocities of this process' passes through the cache.
            is_held: whether only the pass with text is computed.
        """
        held_guidance, like = self.reuse.held_guidance, self.inputs.frames(chunk)
        if is_held:
            cond = self.ranks.gather_branches(own, names=["cond"], like=like)["cond"]
            return cond + held_guidance.take(chunk)
        step, names, made = tick.steps[chunk], list(self.branches), dict(own)
        if self.sampling.has_pass_alone(self.timesteps[step]):
            names.append("alone")
            if "alone" in self.ranks.local_branches(self.sampling.passes):
                made["alone"] = self._alone("alone", tick, chunk, position=0)
        passes = self.ranks.gather_branches(made, names=names, like=like)
        prev, text = scales = self._scales(step)
        guided = (prev - text) * passes["prev"] + text * passes["cond"]
        if "alone" in passes:
            guided = (1 - prev) * passes["alone"] + guided
        held_guidance.put(chunk, guided - passes["cond"], scales=scales)
        return guided

    def _scales(self, step: int) -> tuple[float, ...]:
        assert self.sampling.guidance is not None
        return self.sampling.guidance.scales(self.timesteps[step])

    def _advance(self, tick: Tick, velocities: Mapping[int, Tensor]) -> None:
        """Take one Euler step with every active chunk."""
        for chunk, step in tick.steps.items():
            t, latents = self.timesteps[step], self.inputs.frames(chunk)
            euler_step_(
                latents.movedim(1, 0),
                velocities[chunk].movedim(1, 0) if chunk in velocities else None,
                chunk=chunk,
                t=t,
                step_size=self.timesteps[step + 1] - t,
                results=self.reuse.results,
                quantity=self.sampling.quantity,
                where=self._computed_pixels(chunk),
            )
            if self.reuse.tokens is not None:
                patch = self.dit.config.patch_size
                self.reuse.tokens.see(chunk, patches_of(latents, size=patch))

    def _computed_pixels(self, chunk: int) -> Tensor | None:
        """Return which latent pixels of a chunk are computed, `[F, 1, h, w]`; None: all."""
        if chunk not in self.rows:
            return None
        like, num_frames = self.inputs.frames(chunk), self.clip.chunk_width
        is_own_FP = chosen_tokens(
            self.rows[chunk], num_frames=num_frames, num_tokens=self.chunk_tokens
        )
        return pixels_of(is_own_FP, size=self.dit.config.patch_size, like=like).movedim(1, 0)

    def _finish(self, tick: Tick) -> None:
        self._share()
        self.waiting = tick.finishing
        for chunk in tick.finishing:
            self.reuse.results.drop(chunk)
            self.reuse.held_guidance.drop(chunk)
            if self.reuse.tokens is not None:
                self.reuse.tokens.drop(chunk)
            del self.contexts[chunk]

    # The keys of clean chunks ---------------------------------------------------------------------

    def _feed_given(self, first: Tick) -> None:
        """Put the keys of the given chunks into the caches, those without text into all.

        A process without the pass without text makes its keys in a cache of its own.
        """
        _, last = list(self.branches.items())[-1]
        *others, fed = self.own.values() or [last]
        tokens = self.chunk_tokens
        for chunk in range(self.clip.num_given):
            self._feed(chunk, fed, tick=first, is_null=last.is_null, reach=self.clock.reach_given())
            for branch in others:
                for cache, source in zip(branch.caches, fed.caches, strict=True):
                    cache.put(0, *source.prefix(tokens, reach_tokens=tokens))
                branch.queries.update(fed.queries)
            self._settle(chunk)
            self._pack()

    def _settle_waiting(self, tick: Tick) -> None:
        """Give the chunks that became clean in the last tick their final keys."""
        has_pass, reach = self.sampling.clean_pass, self.clock.reach_clean()
        for chunk in self.waiting:
            for branch in self.branches.values() if has_pass else ():
                self._feed(chunk, branch, tick=tick, is_null=branch.is_null, reach=reach)
            self._settle(chunk)
        self.num_unshared = len(self.waiting) if has_pass else 0
        self.waiting = ()

    def _feed(
        self, chunk: int, branch: CachedPass, *, tick: Tick, is_null: bool, reach: int | None
    ) -> None:
        """Send a clean chunk through all layers, without its text, for the sake of its keys.

        Where other processes have the branch, it is only counted.
        """
        keys = self._num_keys(self.num_clean, reach=reach)
        cost = self._flops(self.null_context, keys=keys, has_head=False)
        self.stats.add_flops(computed=cost, without_reuse=cost)
        if branch.caches:
            attend = self._attend(branch, offset=0, reach=reach, keeps_queries=not branch.queries)
            self._hidden(
                self.inputs.fixed(chunk),
                self.null_context,
                attend,
                t=self.sampling.clean_t,
                tick=tick,
                position=chunk,
                is_null=is_null,
            )

    def _settle(self, chunk: int) -> None:
        """Declare the keys of the oldest active chunk final."""
        for branch in self.own.values():
            for cache in branch.caches:
                cache.settle(self.chunk_tokens, chunk=chunk)
        self.num_clean += self.chunk_tokens

    def _share(self) -> None:
        """Give the pass with text the clean keys of the pass without.

        In the tick in which a chunk's clean keys are made, the released model lets each pass see
        its own; from the next tick on, all see those of the pass without text.
        """
        tokens = self.num_unshared * self.chunk_tokens
        self.num_unshared = 0
        if tokens and len(self.branches) > 1:
            self._copy_last_clean(tokens)
        self._pack()

    def _pack(self) -> None:
        """Have the keys of clean chunks quantised; no other keys take their place any more."""
        for branch in self.own.values():
            for cache in branch.caches:
                cache.pack()

    def _copy_last_clean(self, tokens: int) -> None:
        """Copy the last clean keys of the pass without text to the other one."""
        name, last = list(self.branches.items())[-1]
        source = self.ranks.rank_of(self.sampling.passes, name)
        shape = (2, tokens, self.num_kv_heads, self.dit.config.kv_channels)
        for layer in range(self.dit.config.num_layers):
            if last.caches:
                made = last.caches[layer].last_clean(tokens)
            else:
                made = torch.empty(shape, dtype=self.dit.dtype, device=self.latents.device)
            kv = self.ranks.branches.broadcast(made, source=source)
            for branch in self.own.values():
                if branch is not last:
                    branch.caches[layer].replace_last_clean(kv)

    def _compress(self, tick: Tick) -> None:
        """Drop clean tokens where the caches have no room for the chunk that enters."""
        budget = self.sampling.budget
        if budget is None or not tick.entering:
            return
        kept = (budget.total_chunks - len(tick.steps)) * self.chunk_tokens
        if self.num_clean <= kept:
            return
        self._share()
        keep = partial(budget.strategy.keep, budget=kept, layout=budget.layout)
        with self.stats.stage("kv_compression"):
            for branch in self.own.values():
                for layer, cache in enumerate(branch.caches):
                    cache.compress(branch.queries[layer], keep)
                    assert cache.clean == kept, f"{cache.clean} tokens kept instead of {kept}"
        self.num_clean = kept

    # One chunk through the transformer ------------------------------------------------------------

    def _through_cache(self, name: str, tick: Tick, chunk: int) -> Tensor:
        """Compute a chunk's velocity with the keys of those before it."""
        branch, rows = self.branches[name], self.rows.get(chunk)
        attend = self._attend(
            branch,
            offset=list(tick.steps).index(chunk) * self.chunk_tokens,
            reach=self.clock.reach(tick.steps[chunk]),
            keeps_queries=self.sampling.budget is not None,
            rows=rows,
        )
        return self._pass(name, tick, chunk, attend, is_null=branch.is_null, rows=rows)

    def _alone(self, name: str, tick: Tick, chunk: int, *, position: int) -> Tensor:
        """Compute a chunk's velocity without the chunks before it; as "alone" without its text.

        Nothing is kept of it, so that all tokens are computed even where some are enough.
        """

        def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.dit.kernel(q, k, v)

        return self._pass(name, tick, chunk, attend, is_null=name == "alone", position=position)

    def _pass(
        self,
        name: str,
        tick: Tick,
        chunk: int,
        attend: Attend,
        *,
        is_null: bool,
        position: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Compute a chunk's velocity `[C, F, h, w]` as `name`, and show it.

        Args:
            position: chunk in whose place it stands; None: its own.
            rows: tokens whose velocities are computed; the others mean nothing. None: all.
        """
        with self.stats.timed_pass([self._pass_id(tick, chunk, is_text=not is_null)]):
            hidden = self._hidden(
                self.inputs.frames(chunk),
                self.null_context if is_null else self.contexts[chunk],
                attend,
                t=self.timesteps[tick.steps[chunk]],
                tick=tick,
                position=chunk if position is None else position,
                is_null=is_null,
                rows=rows,
            )
            velocity = self.dit.velocity(
                hidden, latent_height=self.size[0], latent_width=self.size[1]
            )[0]
        self._show(tick, chunk, name, velocity)
        return velocity

    def _hidden(
        self,
        x_CFhw: Tensor,
        context: Sequence[ContextKV],
        attend: Attend,
        *,
        t: float,
        tick: Tick,
        position: int,
        is_null: bool,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Send one chunk, placed as chunk `position`, through all layers."""
        return self.dit.hidden(
            x_CFhw.unsqueeze(0),
            self._t(t),
            context,
            first_frame=position * self.clip.chunk_width,
            self_attend=attend,
            is_null=is_null,
            step_width=self.clock.step_width(tick) if self.sampling.is_distilled else None,
            split=self.split,
            rows=rows,
        )

    def _attend(
        self,
        branch: CachedPass,
        *,
        offset: int,
        reach: int | None,
        keeps_queries: bool,
        rows: Tensor | None = None,
    ) -> Attend:
        """Return the attention of one chunk: store its keys, attend to the last `reach` chunks.

        Args:
            offset: tokens of the active chunks before this one.
            reach: chunks of the cache that are seen, this one included; None: all.
            keeps_queries: whether the queries are kept for the compression of the cache.
            rows: tokens of the chunk that are computed; None: all.
        """
        budget = self.sampling.budget

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
            rows=rows,
        )

    def _caches(self) -> list[KVCache]:
        """Allocate the KV caches of one guidance pass."""
        config, budget = self.dit.config, self.sampling.budget
        total = None if budget is None else budget.total_chunks
        caches = caches_for(
            config.num_layers,
            capacity=cache_chunks(self.clip, total_chunks=total) * self.chunk_tokens,
            num_heads=self.num_kv_heads,
            head_width=config.kv_channels,
            dtype=self.dit.dtype,
            device=self.latents.device,
            storage=self.sampling.kv_storage,
            make=cache_maker(self.kv_layout),
        )
        if self.stats.trace is not None:
            for cache in caches:
                cache.track(self.clip.num_chunks)
        return caches

    def _kv_layout(self) -> KVLayout | None:
        """Return what quantised caches have in common, if they are quantised."""
        clip, made = self.clip, self.sampling.kv_format
        if made is None:
            return None
        tokens = dict.fromkeys(range(clip.num_chunks), self.chunk_tokens)
        rope = self.dit.rope_table(
            first_frame=0,
            num_frames=clip.num_chunks * clip.chunk_width,
            latent_height=self.size[0],
            latent_width=self.size[1],
        )
        return KVLayout(
            KVSizes.of(made, self.clock.ticks(clip), tokens, waits=True),
            {chunk: chunk * self.chunk_tokens for chunk in tokens},
            Rotary(rope, rotate, has_neighbours=False),
        )

    def _context(self, text_LC: Tensor) -> list[ContextKV]:
        """Project a text to every layer's cross-attention keys and values."""
        cost = context_flops(self.dit.config, text=len(text_LC))
        self.stats.add_flops(computed=cost, without_reuse=cost)
        return self.dit.encode_context(text_LC.unsqueeze(0))

    def _signal(self, chunk: int, step: int) -> Tensor:
        """Return what policies compare: the patch embedding, `[1, S, D]`."""
        cost = embed_flops(self.dit.config, tokens=self.chunk_tokens, is_distilled=False)
        self.stats.add_flops(computed=cost, without_reuse=0)
        x_BCFhw = self.inputs.frames(chunk).unsqueeze(0)
        return self.dit.embed(x_BCFhw, self._t(self.timesteps[step]), is_null=False).tokens

    def _t(self, t: float) -> Tensor:
        # made on the device: a copy from the host would wait for all that is queued there
        return torch.full((1, 1), t, dtype=torch.float32, device=self.latents.device)

    # Statistics -----------------------------------------------------------------------------------

    def _count(self, tick: Tick, computed: Collection[int], full: Collection[int]) -> None:
        """Add the FLOPs of a tick, as done and as without reuse.

        Args:
            computed: chunks that run the pass with text.
            full: those that run the others as well.
        """
        for place, (chunk, step) in enumerate(tick.steps.items()):
            own, costs = self.contexts[chunk], {True: 0, False: 0}
            before = self.num_clean + place * self.chunk_tokens
            keys = self._num_keys(before, reach=self.clock.reach(step))
            rows, spared = self.rows.get(chunk), {True: 0, False: 0}
            for name, branch in self.branches.items():
                context = self.null_context if branch.is_null else own
                costs[name == "cond"] += (whole := self._flops(context, keys=keys))
                if rows is not None:
                    some = self._flops(context, keys=keys, queries=len(rows))
                    spared[name == "cond"] += whole - some
            if self.sampling.has_pass_alone(self.timesteps[step]):
                costs[False] += self._flops(self.null_context, keys=self.chunk_tokens)
            if place == 0 and self.sampling.is_computed_twice(step):
                costs[True] += self._flops(own, keys=self.chunk_tokens)
            for is_text, cost in costs.items():
                done = cost - spared[is_text]
                self.stats.add_flops(
                    computed=done if chunk in (computed if is_text else full) else 0,
                    without_reuse=cost,
                    passes=[self._pass_id(tick, chunk, is_text=is_text)],
                )

    def _num_keys(self, before: int, *, reach: int | None) -> int:
        """Return how many tokens a chunk sees, with `before` tokens before its own."""
        seen = before + self.chunk_tokens
        return seen if reach is None else min(seen, reach * self.chunk_tokens)

    def _flops(
        self,
        context: Sequence[ContextKV],
        *,
        keys: int,
        queries: int | None = None,
        has_head: bool = True,
    ) -> int:
        """Return the FLOPs of one chunk through embedding, layers and, if asked, the head.

        Args:
            queries: tokens that go through the layers; None: all.
        """
        config, tokens = self.dit.config, self.chunk_tokens
        cost = embed_flops(config, tokens=tokens, is_distilled=self.sampling.is_distilled)
        own = tokens if queries is None else queries
        cost += block_flops(config, queries=own, keys=keys, text=context[0].k.shape[1])
        return cost + (head_flops(config, queries=tokens) if has_head else 0)

    def _pass_id(self, tick: Tick, chunk: int, *, is_text: bool) -> PassId:
        """Return the row of the record that a pass belongs to."""
        is_apart = self.reuse.held_guidance.is_on and not is_text
        return PassId(0, tick.index, chunk, GUIDANCE if is_apart else ALL_BRANCHES)

    def _show(self, tick: Tick, chunk: int, branch: str, velocity: Tensor) -> None:
        """Give the observer, if there is one, a chunk's computed velocity."""
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


def noise_levels(t: float, *, like: Tensor) -> Tensor:
    """Return the noise level of each latent frame of `like`, `[F]`, at a timestep."""
    return like.new_full((len(like),), 1 - t)


def euler_step_(
    latents: Tensor,
    velocity: Tensor | None,
    *,
    chunk: int,
    t: float,
    step_size: float,
    results: ResultStore,
    quantity: Quantity,
    where: Tensor | None = None,
) -> None:
    """Move a chunk's latents `[F, ...]` in place, and store what later steps reuse.

    Args:
        velocity: data minus noise, like `latents`; None: the step was not computed, and `results`
            predict the change.
        t: timestep, 0 noise to 1 clean.
        step_size: to the next timestep.
        where: which elements of the velocity were computed, bool, broadcast to it; the others are
            predicted. None: all.
    """
    sigma = noise_levels(t, like=latents)
    predictor = PREDICTORS[quantity]
    predicted = None
    if velocity is None or where is not None:
        predicted = results.predict(chunk, sigma=sigma)
        if predictor.level == "velocity":
            # predictors have velocities of the other sign: noise minus data
            predicted = -predictor.velocity(predicted, latents, sigma) * step_size
    if velocity is None:
        assert predicted is not None
        latents += predicted
        return
    change = velocity * step_size
    is_whole_step = predictor.level == "step"
    stored = change if is_whole_step else predictor.stored(-velocity, latents, sigma)
    results.put(chunk, stored, sigma=sigma, where=where)
    if where is not None and predicted is not None:
        change = change.where(where, predicted)
    latents += change
