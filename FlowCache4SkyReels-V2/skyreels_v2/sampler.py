"""The denoising loop of one window: the algorithm of SkyReels-V2 with FlowCache.

Axes: C latent channels, F latent frames, h/w latent rows/columns; the batch is 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flowcache.guidance import HeldGuidance
from flowcache.kv import Compression, tokens_per_chunk
from flowcache.ranks import Ranks
from flowcache.results import ResultStore, clean_estimate, velocity_to
from flowcache.reuse import Decision, Observe, agree, compute_together
from flowcache.schedule import Tick
from flowcache.stats import RunStats
from flowcache.trace import PassId
from flowcache.transfer import on_device
from skyreels_v2.dit import DiT, Embedded
from skyreels_v2.forward import WindowForward
from skyreels_v2.sampling import WHOLE_WINDOW, Branch, Noisy, Sampling, Unit
from skyreels_v2.solver import UniPC, timestep_grid
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
        self.observe = observe
        self.ranks = Ranks() if ranks is None else ranks
        self.own = {name: branches[name] for name in self.ranks.own(list(branches))}
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
        velocities = self._guided(tick, [unit], plans, noisy)
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
        latents = torch.cat([self.latents[:, self._frames(chunk)] for chunk in tick.steps], dim=1)
        embedded = self.forward.embed(latents, frames=frames, times=times)
        signals = {unit.id: self._signal(embedded.frames(*unit.frames)) for unit in units}
        plans = self._plan(tick, signals)
        return self._guided(tick, units, plans, Noisy(latents, self._tensor(sigmas), embedded))

    def _plan(self, tick: Tick, signals: Mapping[int, Tensor]) -> dict[str, dict[int, Decision]]:
        policies = {name: branch.policy for name, branch in self.branches.items()}
        plans = {
            name: branch.policy.plan(tick, signals, stored=self._stored(branch, chunks=tick.steps))
            for name, branch in self.branches.items()
        }
        if self.sampling.attention == "full":
            plans = {n: compute_together(policies[n], plan) for n, plan in plans.items()}
        held = self._held(tick)
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

    def _guided(
        self,
        tick: Tick,
        units: list[Unit],
        plans: Mapping[str, Mapping[int, Decision]],
        noisy: Noisy,
    ) -> dict[int, Tensor]:
        """Return the velocity of each unit after guidance, `[C, F, h, w]`.

        A unit whose latent update is reused has none. Without a clean pass the keys of a chunk in
        its last step are final as soon as they are put, so that the chunks behind it see them as
        clean in this tick already.
        """
        guided: dict[int, Tensor] = {}
        offset = 0
        for unit in units:
            part = noisy.frames(*unit.frames)
            computed = [name for name in self.branches if unit.is_computed(plans[name])]
            velocities = self._branch_velocities(tick, unit, part, computed=computed, offset=offset)
            if velocities:
                guided[unit.id] = self._guide(velocities)
                if len(computed) == len(self.branches):
                    self._show(tick, unit, "guided", guided[unit.id])
            if unit.id in tick.finishing and not self.sampling.clean_pass:
                self.forward.settle(unit.id)
            else:
                offset += part.embedded.tokens.shape[1]
        return guided

    def _guide(self, velocities: Mapping[str, Tensor]) -> Tensor:
        """Move a unit's velocity away from that of the branch without its prompt."""
        if "uncond" not in velocities:
            return velocities["cond"]
        uncond = velocities["uncond"]
        return uncond + self.sampling.guidance * (velocities["cond"] - uncond)

    def _branch_velocities(
        self,
        tick: Tick,
        unit: Unit,
        part: Noisy,
        *,
        computed: Sequence[str],
        offset: int,
    ) -> dict[str, Tensor]:
        """Return one unit's velocity in each branch: computed, predicted, or cond's and more."""
        held = self._held(tick) if "cond" in computed else ()
        own_computed = [name for name in computed if name in self.own]
        passes = {name: self._passes(tick, unit, name) for name in self.own}
        for name, branch in self.own.items():
            self.forward.count(
                branch,
                part.embedded,
                offset=offset,
                is_computed=name in computed,
                passes=passes[name],
            )
        with self.stats.timed_pass([each for name in own_computed for each in passes[name]]):
            hidden = self.forward.run(own_computed, unit, part.embedded, offset=offset)
        velocities: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        made = [name for name in self.branches if name in computed or unit.id not in held]
        for name in made:
            if name in self.own:
                velocity = self._velocity(self.own[name], unit, part, hidden=hidden.get(name))
                if velocity is not None:
                    own[name] = velocity
        if not computed and self.sampling.quantity == "latent_update":
            return {}
        velocities = self.ranks.exchanged(own, names=made, like=part.latents)
        for name in computed:
            self._show(tick, unit, name, velocities[name])
        for name in self.branches:
            if name not in made:
                velocities[name] = velocities["cond"] + self.guidance.take(unit.id)
                if name in self.own:
                    self._store_velocity(self.own[name], unit, part, velocities[name])
        if len(computed) == 2:
            self.guidance.put(unit.id, velocities["uncond"] - velocities["cond"])
        return velocities

    def _velocity(
        self, branch: Branch, unit: Unit, part: Noisy, *, hidden: Tensor | None
    ) -> Tensor | None:
        """Read one unit's velocity in one branch, or predict it from its stored results.

        Args:
            hidden: what the blocks gave, `[1, S, D]`; None if the unit was not computed.
        """
        quantity, sigma, tokens = self.sampling.quantity, part.sigma, part.embedded.tokens
        if hidden is not None:
            velocity = self.forward.velocity(hidden, part.embedded)
            if quantity == "residual":
                change = (hidden - tokens)[0].unflatten(0, (len(sigma), -1))
                branch.results.put(unit.id, change, sigma=sigma)
            else:
                self._store_velocity(branch, unit, part, velocity)
            return velocity
        if quantity == "latent_update":
            return None
        predicted = branch.results.predict(unit.id, sigma=sigma)
        if quantity == "residual":
            return self.forward.velocity(tokens + predicted.flatten(0, 1), part.embedded)
        if quantity == "clean":
            predicted = velocity_to(predicted, part.latents.movedim(1, 0), sigma=sigma)
        return predicted.movedim(0, 1)

    def _store_velocity(self, branch: Branch, unit: Unit, part: Noisy, velocity: Tensor) -> None:
        """Store one unit's velocity in one branch, or the clean estimate that it points to."""
        if self.sampling.quantity == "latent_update":
            return
        value = velocity.movedim(1, 0)
        if self.sampling.quantity == "clean":
            value = clean_estimate(part.latents.movedim(1, 0), value, sigma=part.sigma)
        branch.results.put(unit.id, value, sigma=part.sigma)

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
        self.forward.run(list(self.own), Unit(chunk, (0, len(frames))), embedded, offset=0)

    # What others see --------------------------------------------------------------------------

    def _show(self, tick: Tick, unit: Unit, branch: str, velocity: Tensor) -> None:
        """Show the observer, if there is one, a unit's computed velocity, chunk by chunk."""
        if self.observe is None:
            return
        for chunk in unit.chunks(tick):
            is_whole, step = unit.id == WHOLE_WINDOW, tick.steps[chunk]
            self.observe(
                segment=self.segment,
                tick=tick.index,
                chunk=chunk,
                step=step,
                branch=branch,
                velocity=velocity[:, self._frames(chunk)] if is_whole else velocity,
                sigma=self.sigmas[step],
            )

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
        return sequence.total(tokens_per_chunk(branch.caches)) / sequence.size

    def _passes(self, tick: Tick, unit: Unit, branch: str) -> list[PassId]:
        return [PassId(self.segment, tick.index, chunk, branch) for chunk in unit.chunks(tick)]

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
