"""The denoising loop of one window: the algorithm of SkyReels-V2 with FlowCache.

Axes: C latent channels, F latent frames, h/w latent rows/columns; the batch is 1.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowcache.kv import Compression, KVCache, cached_attention
from flowcache.reuse import (
    Decision,
    Quantity,
    ResultStore,
    ReusePolicy,
    agree,
    compute_together,
)
from flowcache.schedule import Tick, staggered
from flowcache.stats import RunStats
from skyreels_v2 import flops
from skyreels_v2.dit import DiT, Embedded, whole_window
from skyreels_v2.layers import ContextKV, join_contexts
from skyreels_v2.solver import UniPC, timestep_grid
from skyreels_v2.window import Window

Signal = Literal["timestep", "timestep_embedding", "content"]

WHOLE_WINDOW = -1
"""Unit id under which results of the whole window are stored."""
WAITING_TIMESTEP = 999
"""Timestep shown to the model for chunks that are still pure noise."""


@dataclass(frozen=True)
class Sampling:
    """How a window is denoised."""

    num_steps: int
    shift: float
    guidance: float
    lag: int
    attention: Literal["full", "causal"]
    clean_pass: bool
    fps: int
    addnoise: int = 0
    """Timestep, 0..60, to which the prefix is noised while it conditions the rest."""
    signal: Signal = "timestep"
    quantity: Quantity = "residual"
    """What a reused chunk gets again."""
    batch_branches: bool = False
    """Compute the guidance branches in one batch: fewer, larger operations, more memory."""

    def ticks(self, window: Window) -> list[Tick]:
        """Return the passes that denoise a window."""
        return staggered(window.generated, num_steps=self.num_steps, lag=self.lag)


@dataclass
class Branch:
    """One guidance pass of one window: its prompt, decisions, stored results, keys and values."""

    context: list[ContextKV]
    policy: ReusePolicy
    results: ResultStore
    caches: list[KVCache]
    """One per layer; empty with full attention."""


@dataclass(frozen=True)
class Unit:
    """What goes through the blocks together: one chunk, or the whole window."""

    id: int
    frames: tuple[int, int]
    """Where its frames stand among the embedded ones, (start, stop)."""


class WindowSampler:
    """Denoises one window; lives as long as it does.

    Args:
        latents: `[C, F, h, w]` float32: noise, with the given frames in their places. Changed in
            place.
        branches: by name, "cond" first; "uncond" where guidance is on.
        condition: `[C, F, h, w]` start image condition of an I2V model.
        updates: store of the guided latent's updates, read where these are the reused quantity.
        draw_noise: makes float32 standard normal noise like its argument.
    """

    def __init__(
        self,
        dit: DiT,
        latents: Tensor,
        *,
        window: Window,
        sampling: Sampling,
        branches: Mapping[str, Branch],
        stats: RunStats,
        segment: int = 0,
        compression: Compression | None = None,
        updates: ResultStore | None = None,
        condition: Tensor | None = None,
        draw_noise: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> None:
        self.dit = dit
        self.latents = latents
        self.window = window
        self.sampling = sampling
        self.branches = branches
        self.stats = stats
        self.segment = segment
        self.compression = compression
        self.updates = ResultStore() if updates is None else updates
        self.condition = condition
        self.draw_noise = draw_noise
        self.timesteps, self.sigmas = timestep_grid(sampling.num_steps, shift=sampling.shift)
        self.solvers = {
            chunk: UniPC(sampling.num_steps, shift=sampling.shift) for chunk in window.generated
        }
        self.clean = set(range(window.num_given))
        self.batched_context: list[ContextKV] = []
        if sampling.batch_branches and len(branches) > 1:
            self.batched_context = join_contexts([branch.context for branch in branches.values()])
        height, width = latents.shape[-2:]
        positions = torch.arange(window.num_frames, device=latents.device)
        self.rope = dit.rope(positions, latent_height=height, latent_width=width)
        self.frame_tokens = len(self.rope) // window.num_frames

    def run(self) -> Iterator[tuple[Tick, tuple[int, ...]]]:
        """Denoise; after every tick yield it and the chunks that became clean in it."""
        is_causal = self.sampling.attention == "causal"
        if is_causal:
            self._feed_given()
        for tick in self.sampling.ticks(self.window):
            with self.stats.stage("dit"):
                velocities = self._causal_tick(tick) if is_causal else self._full_tick(tick)
                self._advance(tick, velocities)
                self._finish(tick)
            yield tick, tick.finishing

    # One tick ---------------------------------------------------------------------------------

    def _full_tick(self, tick: Tick) -> dict[int, Tensor]:
        """Forward the whole window, every frame at its own noise level, with full attention."""
        order = sorted(range(len(self.window.chunks)), key=lambda c: self.window.chunks[c].start)
        latents, times, sigmas = self.latents.clone(), [], []
        for chunk in order:
            level = tick.steps.get(chunk)
            waits = level is None and chunk not in self.clean
            size = len(self.window.chunks[chunk])
            t = WAITING_TIMESTEP if waits else 0 if level is None else self.timesteps[level]
            sigma = self.sigmas[0] if waits else 0.0 if level is None else self.sigmas[level]
            times += [t] * size
            sigmas += [sigma] * size
        prefix = self.window.num_prefix
        if prefix and self.sampling.addnoise:
            latents[:, :prefix] = self._noised(latents[:, :prefix])
            times[:prefix] = [self.sampling.addnoise] * prefix
        embedded = self._embed(latents, list(range(self.window.num_frames)), times)
        signals = {
            c: self._signal(
                embedded.frames(self.window.chunks[c].start, self.window.chunks[c].stop)
            )
            for c in order
        }
        plans = self._plan(tick, signals)
        unit = Unit(WHOLE_WINDOW, (0, self.window.num_frames))
        velocities = self._guided([unit], plans, embedded, self._tensor(sigmas))
        return {c: v[:, self._frames(c)] for v in velocities.values() for c in tick.steps}

    def _causal_tick(self, tick: Tick) -> dict[int, Tensor]:
        """Forward the active chunks one by one through the KV cache."""
        frames, times, sigmas, units = [], [], [], []
        for chunk, step in tick.steps.items():
            own = self.window.chunks[chunk]
            units.append(Unit(chunk, (len(frames), len(frames) + len(own))))
            frames += own
            times += [self.timesteps[step]] * len(own)
            sigmas += [self.sigmas[step]] * len(own)
        embedded = self._embed(self.latents[:, frames], frames, times)
        signals = {unit.id: self._signal(embedded.frames(*unit.frames)) for unit in units}
        plans = self._plan(tick, signals)
        return self._guided(units, plans, embedded, self._tensor(sigmas), settles=tick.finishing)

    def _plan(self, tick: Tick, signals: Mapping[int, Tensor]) -> dict[str, dict[int, Decision]]:
        plans, policies = {}, {name: branch.policy for name, branch in self.branches.items()}
        for name, branch in self.branches.items():
            plans[name] = branch.policy.plan(
                tick, signals, stored=self._stored(branch, chunks=tick.steps)
            )
        if self.sampling.attention == "full":
            plans = {n: compute_together(policies[n], plan) for n, plan in plans.items()}
        if self.sampling.quantity == "latent_update":
            plans = agree(policies, plans)
        for name, plan in plans.items():
            for chunk, decision in plan.items():
                self.stats.record(
                    segment=self.segment,
                    tick=tick.index,
                    chunk=chunk,
                    step=tick.steps[chunk],
                    branch=name,
                    decision=decision,
                )
        return plans

    def _stored(self, branch: Branch, *, chunks: Mapping[int, int]) -> set[int]:
        if self.sampling.quantity == "latent_update":
            return set(chunks) & set(self.updates.units())
        units = branch.results.units()
        return set(chunks) if WHOLE_WINDOW in units else set(chunks) & set(units)

    def _guided(
        self,
        units: list[Unit],
        plans: Mapping[str, Mapping[int, Decision]],
        embedded: Embedded,
        sigmas: Tensor,
        *,
        settles: tuple[int, ...] = (),
    ) -> dict[int, Tensor]:
        """Return the velocity of each unit after guidance, `[C, F, h, w]`.

        A unit whose latent update is reused has none.

        Args:
            settles: chunks in their last step. Without a clean pass their keys are final as soon as
                they are put, so that the chunks behind them see them as clean in this tick already.
        """
        by_branch: dict[str, dict[int, Tensor]] = {name: {} for name in self.branches}
        offset = 0
        for unit in units:
            part, sigma = embedded.frames(*unit.frames), sigmas[slice(*unit.frames)]
            computed = [name for name in self.branches if _is_computed(plans[name], unit)]
            for name, branch in self.branches.items():
                self._count_blocks(branch, part, offset=offset, is_computed=name in computed)
            hidden = self._run_branches(computed, unit, part, offset=offset)
            for name, branch in self.branches.items():
                velocity = self._velocity(branch, unit, part, sigma, hidden=hidden.get(name))
                if velocity is not None:
                    by_branch[name][unit.id] = velocity
            if unit.id in settles and not self.sampling.clean_pass:
                self._settle(unit.id)
            else:
                offset += part.tokens.shape[1]
        cond, uncond = by_branch["cond"], by_branch.get("uncond")
        if uncond is None:
            return cond
        scale = self.sampling.guidance
        return {unit: uncond[unit] + scale * (v - uncond[unit]) for unit, v in cond.items()}

    def _velocity(
        self, branch: Branch, unit: Unit, part: Embedded, sigma: Tensor, *, hidden: Tensor | None
    ) -> Tensor | None:
        """Read one unit's velocity in one branch, or predict it from its stored results.

        Args:
            hidden: what the blocks gave, `[1, S, D]`; None if the unit was not computed.
        """
        quantity = self.sampling.quantity
        if hidden is not None:
            velocity = self._read_velocity(hidden, part)
            if quantity == "residual":
                change = (hidden - part.tokens)[0].unflatten(0, (len(sigma), -1))
                branch.results.put(unit.id, change, sigma=sigma)
            elif quantity == "velocity":
                branch.results.put(unit.id, velocity.movedim(1, 0), sigma=sigma)
            return velocity
        if quantity == "latent_update":
            return None
        predicted = branch.results.predict(unit.id, sigma=sigma)
        if quantity == "velocity":
            return predicted.movedim(0, 1)
        return self._read_velocity(part.tokens + predicted.flatten(0, 1), part)

    def _advance(self, tick: Tick, velocities: Mapping[int, Tensor]) -> None:
        """Take one solver step with every active chunk."""
        for chunk, step in tick.steps.items():
            latents, solver = self.latents[:, self._frames(chunk)], self.solvers[chunk]
            sigma = self._tensor([self.sigmas[step]] * latents.shape[1])
            if chunk not in velocities:
                latents += self.updates.predict(chunk, sigma=sigma).movedim(0, 1)
                solver.skip()
            elif self.sampling.quantity == "latent_update":
                before = latents.clone()
                solver.advance_(latents, velocity=velocities[chunk])
                self.updates.put(chunk, (latents - before).movedim(1, 0), sigma=sigma)
            else:
                solver.advance_(latents, velocity=velocities[chunk])

    def _finish(self, tick: Tick) -> None:
        """Make the chunks clean that took their last step: results dropped, keys settled."""
        for chunk in tick.finishing:
            self.clean.add(chunk)
            self.updates.drop(chunk)
            for branch in self.branches.values():
                branch.results.drop(chunk)
            if self.sampling.attention == "causal" and self.sampling.clean_pass:
                if not tick.is_last:
                    self._feed_clean(chunk, timestep=0)
                self._settle(chunk)

    # The model --------------------------------------------------------------------------------

    def _feed_given(self) -> None:
        """Put the keys of the given chunks into the cache: one forward each."""
        with self.stats.stage("dit"):
            for chunk in range(self.window.num_given):
                is_prefix = self.window.chunks[chunk].start < self.window.num_prefix
                self._feed_clean(chunk, timestep=self.sampling.addnoise if is_prefix else 0)
                self._settle(chunk)

    def _feed_clean(self, chunk: int, *, timestep: int) -> None:
        """Forward a clean chunk for the sake of its keys, noised up to `timestep` if above 0."""
        frames = self.window.chunks[chunk]
        latents = self.latents[:, self._frames(chunk)]
        if timestep:
            latents = self._noised(latents)
        embedded = self._embed(latents, list(frames), [timestep] * len(frames))
        for branch in self.branches.values():
            self._count_blocks(branch, embedded, offset=0, is_computed=True, has_head=False)
        self._run_branches(list(self.branches), Unit(chunk, (0, len(frames))), embedded, offset=0)

    def _settle(self, chunk: int) -> None:
        for branch in self.branches.values():
            for cache in branch.caches:
                cache.settle(len(self.window.chunks[chunk]) * self.frame_tokens)

    def _embed(self, latents: Tensor, frames: list[int], times: list[int]) -> Embedded:
        config, condition = self.dit.config, self.condition
        cost = flops.embed(config, num_frames=len(frames), frame_tokens=self.frame_tokens)
        self.stats.add_flops(computed=cost, without_reuse=cost)
        return self.dit.embed(
            latents.unsqueeze(0),
            self._tensor(times).unsqueeze(0),
            fps=[self.sampling.fps],
            y_BCFhw=None if condition is None else condition[:, frames].unsqueeze(0),
        )

    def _run_branches(
        self, names: list[str], unit: Unit, part: Embedded, *, offset: int
    ) -> dict[str, Tensor]:
        """Run the blocks for some branches; return each one's `[1, S, D]`."""
        if self.batched_context and len(names) == len(self.branches):
            branches = list(self.branches.values())
            tokens = part.tokens.expand(len(branches), -1, -1)
            modulation = part.modulation.expand(len(branches), -1, -1, -1)
            hidden = self._run_blocks(
                branches,
                self.batched_context,
                unit,
                Embedded(tokens, part.time, modulation),
                offset=offset,
            )
            return dict(zip(names, hidden.split(1), strict=True))
        return {
            name: self._run_blocks([branch], branch.context, unit, part, offset=offset)
            for name, branch in self.branches.items()
            if name in names
        }

    def _run_blocks(
        self,
        branches: list[Branch],
        context: list[ContextKV],
        unit: Unit,
        part: Embedded,
        *,
        offset: int,
    ) -> Tensor:
        """Run the blocks on one batch entry per branch, each with its own cache."""
        if unit.id == WHOLE_WINDOW:
            attend, rope = whole_window(self.dit.kernel), self.rope
        else:
            attend = cached_attention(
                [branch.caches for branch in branches],
                offset=offset,
                kernel=self.dit.kernel,
                compression=self.compression,
                timing=lambda: self.stats.stage("kv_compression"),
            )
            rope = self.rope[self._tokens(unit.id)]
        return self.dit.run_blocks(part, rope, context, self_attend=attend)

    def _read_velocity(self, hidden: Tensor, part: Embedded) -> Tensor:
        height, width = self.latents.shape[-2:]
        return self.dit.velocity(hidden, part, latent_height=height, latent_width=width)[0]

    def _count_blocks(
        self,
        branch: Branch,
        part: Embedded,
        *,
        offset: int,
        is_computed: bool,
        has_head: bool = True,
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
        )

    def _signal(self, part: Embedded) -> Tensor:
        match self.sampling.signal:
            case "timestep":
                return part.modulation
            case "timestep_embedding":
                return part.time
            case "content":
                return part.tokens

    def _noised(self, latents: Tensor) -> Tensor:
        share = self.sampling.addnoise / 1000
        return (1 - share) * latents + share * self.draw_noise(latents)

    def _frames(self, chunk: int) -> slice:
        own = self.window.chunks[chunk]
        return slice(own.start, own.stop)

    def _tokens(self, chunk: int) -> slice:
        own = self.window.chunks[chunk]
        return slice(own.start * self.frame_tokens, own.stop * self.frame_tokens)

    def _tensor(self, values: list[int] | list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.latents.device)


def _is_computed(decisions: Mapping[int, Decision], unit: Unit) -> bool:
    if unit.id == WHOLE_WINDOW:
        return any(decision.is_computed for decision in decisions.values())
    return decisions[unit.id].is_computed
