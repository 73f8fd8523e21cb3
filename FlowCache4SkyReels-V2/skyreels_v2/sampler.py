"""The denoising loop of one window: the algorithm of SkyReels-V2 with FlowCache.

Axes: C latent channels, F latent frames, h/w latent rows/columns; the batch is 1.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flowcache.guidance import HeldGuidance
from flowcache.kv import Compression, tokens_per_chunk
from flowcache.results import ResultStore
from flowcache.reuse import Decision, Observe, agree, compute_together
from flowcache.runtime.ops import on_device
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats
from flowcache.schedule import Tick
from flowcache.wan.dit import DiT, Embedded
from flowcache.wan.solver import UniPC, timestep_grid
from skyreels_v2.forward import WindowForward
from skyreels_v2.passes import WindowPasses
from skyreels_v2.sampling import WHOLE_WINDOW, Branch, Noisy, Sampling, Unit
from skyreels_v2.window import Window

WAITING_TIMESTEP = 999
"""Timestep shown to the model for chunks that are still pure noise."""


class WindowSampler:
    """Denoises one window; lives as long as it does.

    Args:
        latents: `[C, F, h, w]` float32: noise, with the given frames in their places. Changed in
            place.
        branches: by name, "cond" first; "uncond" where guidance is on.
        condition: `[C, F, h, w]` start image condition of an I2V model.
        updates: store of the guided latent's updates, read where these are the reused quantity.
        guidance: says where only "cond" is computed; None: nowhere.
        draw_noise: makes float32 standard normal noise like its argument.
        observe: is shown the velocities of computed steps.
        ranks: the processes that divide the work; all hold the same latents.
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
        guidance: HeldGuidance | None = None,
        condition: Tensor | None = None,
        draw_noise: Callable[[Tensor], Tensor] = torch.randn_like,
        observe: Observe | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.latents = latents
        self.window = window
        self.sampling = sampling
        self.branches = branches
        self.stats = stats
        self.segment = segment
        self.updates = ResultStore() if updates is None else updates
        self.guidance = HeldGuidance() if guidance is None else guidance
        self.draw_noise = draw_noise
        self.ranks = Ranks() if ranks is None else ranks
        self.own = {name: branches[name] for name in self.ranks.local_branches(list(branches))}
        """The branches that this process computes."""
        self.timesteps, self.sigmas = timestep_grid(sampling.num_steps, shift=sampling.shift)
        self.solvers = {
            chunk: UniPC(sampling.num_steps, shift=sampling.shift) for chunk in window.generated
        }
        self.clean = set(range(window.num_given))
        self.forward = WindowForward(
            dit,
            window=window,
            size=(latents.shape[-2], latents.shape[-1]),
            device=latents.device,
            sampling=sampling,
            branches=self.own,
            stats=stats,
            compression=compression,
            condition=condition,
            ranks=self.ranks,
        )
        self.passes = WindowPasses(
            self.forward,
            window=window,
            sampling=sampling,
            branches=branches,
            guidance=self.guidance,
            stats=stats,
            segment=segment,
            sigmas=self.sigmas,
            observe=observe,
            ranks=self.ranks,
        )
        if stats.trace is not None:
            for branch in branches.values():
                for cache in branch.caches:
                    cache.track(len(window.chunks))

    def run(self) -> Iterator[tuple[Tick, tuple[int, ...]]]:
        """Denoise; after every tick yield it and the chunks that became clean in it."""
        is_causal = self.sampling.attention == "causal"
        if is_causal:
            self._feed_given()
        for tick in self.sampling.ticks(self.window):
            with self.stats.timed_tick(self.segment, tick.index), self.stats.stage("dit"):
                velocities = self._causal_tick(tick) if is_causal else self._full_tick(tick)
                self._advance(tick, velocities)
                self._finish(tick)
            self._keep_tokens(tick)
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
        embedded = self.forward.embed(
            latents, frames=list(range(self.window.num_frames)), times=times
        )
        signals = {
            c: self._signal(
                embedded.frames(self.window.chunks[c].start, self.window.chunks[c].stop)
            )
            for c in order
        }
        plans = self._plan(tick, signals)
        unit = Unit(WHOLE_WINDOW, (0, self.window.num_frames))
        noisy = Noisy(latents, self._tensor(sigmas), embedded)
        velocities = self.passes.velocities(tick, [unit], plans, noisy)
        return {c: v[:, self._frames(c)] for v in velocities.values() for c in tick.steps}

    def _causal_tick(self, tick: Tick) -> dict[int, Tensor]:
        """Forward the active chunks through the KV cache, each behind those before it."""
        frames, times, sigmas, units = [], [], [], []
        for chunk, step in tick.steps.items():
            own = self.window.chunks[chunk]
            units.append(Unit(chunk, (len(frames), len(frames) + len(own))))
            frames += own
            times += [self.timesteps[step]] * len(own)
            sigmas += [self.sigmas[step]] * len(own)
        latents = torch.cat([self.latents[:, self._frames(chunk)] for chunk in tick.steps], dim=1)
        embedded = self.forward.embed(latents, frames=frames, times=times)
        signals = {unit.id: self._signal(embedded.frames(*unit.frames)) for unit in units}
        plans = self._plan(tick, signals)
        return self.passes.velocities(
            tick, units, plans, Noisy(latents, self._tensor(sigmas), embedded)
        )

    def _plan(self, tick: Tick, signals: Mapping[int, Tensor]) -> dict[str, dict[int, Decision]]:
        policies = {name: branch.policy for name, branch in self.branches.items()}
        plans = {
            name: branch.policy.plan(tick, signals, stored=self._stored(branch, chunks=tick.steps))
            for name, branch in self.branches.items()
        }
        if self.sampling.attention == "full":
            plans = {n: compute_together(policies[n], plan) for n, plan in plans.items()}
        held = self.passes.held(tick)
        if self.sampling.quantity == "latent_update":
            plans = agree(policies, plans, apart=held)
        for plan in (plan for name, plan in plans.items() if name != "cond"):
            plan.update({c: replace(plan[c], is_computed=False) for c in held})
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

    def _held(self, tick: Tick) -> set[int]:
        """Return the chunks that compute the conditional branch alone, if they are computed."""
        num_steps = self.sampling.num_steps
        return {
            chunk
            for chunk, step in tick.steps.items()
            if self.guidance.is_held(chunk, step, num_steps=num_steps)
        }

    def _stored(self, branch: Branch, *, chunks: Mapping[int, int]) -> set[int]:
        if self.sampling.quantity == "latent_update":
            return set(chunks) & set(self.updates.units())
        units = branch.results.units()
        return set(chunks) if WHOLE_WINDOW in units else set(chunks) & set(units)

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
            self.guidance.drop(chunk)
            for branch in self.branches.values():
                branch.results.drop(chunk)
            if self.sampling.attention == "causal" and self.sampling.clean_pass:
                if not tick.is_last:
                    self._feed_clean(chunk, timestep=0)
                self.forward.settle(chunk)

    # Given and clean chunks -------------------------------------------------------------------

    def _feed_given(self) -> None:
        """Put the keys of the given chunks into the cache: one forward each."""
        with self.stats.stage("dit"):
            for chunk in range(self.window.num_given):
                is_prefix = self.window.chunks[chunk].start < self.window.num_prefix
                self._feed_clean(chunk, timestep=self.sampling.addnoise if is_prefix else 0)
                self.forward.settle(chunk)

    def _feed_clean(self, chunk: int, *, timestep: int) -> None:
        """Forward a clean chunk for the sake of its keys, noised up to `timestep` if above 0."""
        frames = self.window.chunks[chunk]
        latents = self.latents[:, self._frames(chunk)]
        if timestep:
            latents = self._noised(latents)
        embedded = self.forward.embed(latents, frames=list(frames), times=[timestep] * len(frames))
        for branch in self.own.values():
            self.forward.count(branch, embedded, offset=0, is_computed=True, has_head=False)
        self.forward.run(list(self.own), [Unit(chunk, (0, len(frames)))], embedded, offsets=[0])

    # What others see --------------------------------------------------------------------------

    def _keep_tokens(self, tick: Tick) -> None:
        """Trace the clean tokens in the caches after a tick."""
        for name, branch in self.branches.items():
            if branch.caches:
                self.stats.keep_tokens(
                    self.segment,
                    tick.index,
                    branch=name,
                    tokens=partial(self._tokens_per_chunk, branch),
                )

    def _tokens_per_chunk(self, branch: Branch) -> Tensor:
        """Return the clean tokens of each chunk, mean over layers and the heads of all ranks."""
        sequence = self.ranks.sequence
        return sequence.all_reduce(tokens_per_chunk(branch.caches)) / sequence.size

    # Small things -----------------------------------------------------------------------------

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

    def _tensor(self, values: list[int] | list[float]) -> Tensor:
        return on_device(values, dtype=torch.float32, device=self.latents.device)
