"""Step reuse where chunks are denoised one after the other, in every guidance branch.

    reuse = StepReuse(cached, rule, policies={"cond": policy, "uncond": other}, guidance=3.0)
    velocity = reuse.velocity(tick, x, timestep=991, sigma=0.99, frames=range(3, 6))

In every step each branch decides whether its chunk goes through the blocks; else its velocity is
predicted from stored results. Nobody reads the keys of a noisy chunk, so that a step that is not
computed costs nothing but the embedding.

Axes: C latent channels, F latent frames, h/w latent rows/columns, S tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowcache.policies import (
    Decisions,
    Observe,
    Policies,
    ReusePolicy,
    agree,
    guidance_of,
    store_of,
)
from flowcache.predict import PREDICTORS
from flowcache.runtime.stats import PassId
from flowcache.schedule import Tick
from flowcache.wan.cached import CachedDiT, View
from flowcache.wan.calibration import ReuseConfig, policy_maker
from flowcache.wan.dit import Embedded


@dataclass(frozen=True)
class _Noisy:
    """A chunk at one of its own steps."""

    tick: Tick
    chunk: int
    step: int
    latents: Tensor
    sigma: Tensor
    """Noise level of each frame, `[F]`."""
    frames: range
    embedded: Embedded
    view: View | None


class StepReuse:
    """Computes or predicts the velocities of one chunk at a time; lives as long as a video.

    Args:
        policies: of every branch of the video.
        guidance: classifier-free guidance scale; 1 or less where there is no branch "uncond".
        observe: is shown the velocities of computed steps.
    """

    def __init__(
        self,
        cached: CachedDiT,
        rule: ReuseConfig,
        *,
        policies: Mapping[str, ReusePolicy],
        guidance: float,
        observe: Observe | None = None,
    ) -> None:
        self.cached, self.policies, self.observe = cached, policies, observe
        self.scale = guidance
        self.signal, self.predictor = rule.signal, PREDICTORS[rule.predict]
        self.results = {name: store_of(rule) for name in cached.names}
        self.updates = store_of(rule)  # of the guided latents, where these are what is reused
        self.guidance = guidance_of(rule)

    @classmethod
    def of(
        cls,
        config: Any,
        cached: CachedDiT,
        *,
        guidance: float,
        policies: Policies | None = None,
        observe: Observe | None = None,
    ) -> "StepReuse":
        """Decide by the settings, see `policy_maker`, if not by other policies."""
        made = dict[str, ReusePolicy]()
        for number, name in enumerate(cached.names):
            if policies is None:
                policy = policy_maker(config, cached.dit.config)()
            else:
                policy = policies(segment=0, branch=name)
            made[name] = cached.ranks.decided_by(policy, branch=number)
        return cls(cached, config.reuse, policies=made, guidance=guidance, observe=observe)

    def velocity(
        self,
        tick: Tick,
        x_CFhw: Tensor,
        *,
        timestep: float,
        sigma: float,
        frames: range,
        view: View | None = None,
    ) -> Tensor | None:
        """Return the guided velocity, `[C, F, h, w]`; None where the update is reused."""
        cached, ((chunk, step),) = self.cached, tick.steps.items()
        embedded = cached.embed(x_CFhw, [timestep] * len(frames))
        sigma_F = torch.full((len(frames),), sigma, device=x_CFhw.device)
        noisy = _Noisy(tick, chunk, step, x_CFhw, sigma_F, frames, embedded, view)
        computed, is_held = self._decide(noisy)
        for name in cached.own:
            reads_head = name in computed or self.predictor.level == "tokens"
            passes = [PassId(0, tick.index, chunk, name)]
            cached.count(
                name, frames, view, blocks=name in computed, head=reads_head, passes=passes
            )
        if not computed and self.predictor.level == "step":
            return None
        velocities = self._by_branch(noisy, computed, is_held=is_held)
        guided = velocities["cond"]
        if "uncond" in velocities:
            uncond = velocities["uncond"]
            guided = uncond + self.scale * (guided - uncond)
        if len(computed) == len(cached.names):
            self._show(noisy, "guided", guided)
        return guided

    def predicted_update(self, chunk: int, *, sigma: float, like: Tensor) -> Tensor:
        """Return what a reused step changes in the latents, `[C, F, h, w]`."""
        sigma_F = torch.full((like.shape[1],), sigma, device=like.device)
        return self.updates.predict(chunk, sigma=sigma_F).movedim(0, 1)

    def put_update(self, chunk: int, change_CFhw: Tensor, *, sigma: float) -> None:
        """Store what a computed step changed in the latents, where that is what is reused."""
        if self.predictor.level == "step":
            sigma_F = torch.full((change_CFhw.shape[1],), sigma, device=change_CFhw.device)
            self.updates.put(chunk, change_CFhw.movedim(1, 0), sigma=sigma_F)

    def drop(self, chunk: int) -> None:
        """Forget a chunk that is clean."""
        for store in (self.updates, *self.results.values()):
            store.drop(chunk)
        self.guidance.drop(chunk)

    # What is computed -------------------------------------------------------------------------

    def _decide(self, noisy: _Noisy) -> tuple[tuple[str, ...], bool]:
        """Return the branches that are computed, and whether "cond" alone is, guidance held."""
        tick, chunk = noisy.tick, noisy.chunk
        parts = {"timestep": noisy.embedded.modulation, "timestep_embedding": noisy.embedded.time}
        signal = (parts | {"content": noisy.embedded.tokens})[self.signal]
        is_held = self.guidance.is_held(chunk, noisy.step, num_steps=tick.num_steps)
        plans: dict[str, Decisions] = {}
        for name, policy in self.policies.items():
            at_step = self.predictor.level == "step"
            store = self.updates if at_step else self.results[name]
            signals = {chunk: signal}
            if policy.needs_forecasts:
                signals = store.forecasts({chunk: noisy.sigma})
            plans[name] = policy.plan(tick, signals, stored={*store.units()} & {chunk})
        if self.predictor.level == "step":
            plans = agree(self.policies, plans, apart={chunk} if is_held else ())
        for name, plan in plans.items():
            if is_held and name != "cond":
                plan[chunk] = replace(plan[chunk], is_computed=False)
            place = {"segment": 0, "tick": tick.index, "chunk": chunk, "step": noisy.step}
            self.cached.stats.record(**place, branch=name, decision=plan[chunk])
        computed = tuple(name for name, plan in plans.items() if plan[chunk].is_computed)
        return computed, is_held and "cond" in computed

    # Velocities -------------------------------------------------------------------------------

    def _by_branch(
        self, noisy: _Noisy, computed: Sequence[str], *, is_held: bool
    ) -> dict[str, Tensor]:
        """Return the velocity in each branch: computed, predicted, or by held guidance."""
        cached = self.cached
        names = [name for name in cached.names if name in computed or not is_held]
        made = {
            name: self._compute(name, noisy) if name in computed else self._predict(name, noisy)
            for name in cached.own
            if name in names
        }
        velocities = cached.ranks.gather_branches(made, names=names, like=noisy.latents)
        for name in computed:
            self._show(noisy, name, velocities[name])
        for name in cached.names:
            if name not in names:
                velocities[name] = velocities["cond"] + self.guidance.take(noisy.chunk)
                self._store(name, noisy, velocities[name])
        if len(computed) == 2:
            self.guidance.put(noisy.chunk, velocities["uncond"] - velocities["cond"])
        return velocities

    def _compute(self, name: str, noisy: _Noisy) -> Tensor:
        """Send the chunk through the blocks of a branch; return its velocity."""
        embedded, frames = noisy.embedded, noisy.frames
        with self.cached.stats.timed_pass([PassId(0, noisy.tick.index, noisy.chunk, name)]):
            hidden = self.cached.run(name, embedded, frames=frames, view=noisy.view)
            velocity = self.cached.read(hidden, embedded)
        if self.predictor.level == "tokens":
            change = (hidden - embedded.tokens)[0].unflatten(0, (len(frames), -1))
            self.results[name].put(noisy.chunk, change, sigma=noisy.sigma)
        else:
            self._store(name, noisy, velocity)
        return velocity

    def _store(self, name: str, noisy: _Noisy, velocity: Tensor) -> None:
        """Store a velocity, or what the predictor makes of it."""
        if self.predictor.level == "velocity" and name in self.cached.own:
            latents = noisy.latents.movedim(1, 0)
            value = self.predictor.stored(velocity.movedim(1, 0), latents, noisy.sigma)
            self.results[name].put(noisy.chunk, value, sigma=noisy.sigma)

    def _predict(self, name: str, noisy: _Noisy) -> Tensor:
        """Predict a velocity, `[C, F, h, w]`, from what is stored."""
        predicted = self.results[name].predict(noisy.chunk, sigma=noisy.sigma)
        if self.predictor.level == "tokens":
            hidden = noisy.embedded.tokens + predicted.flatten(0, 1)
            return self.cached.read(hidden, noisy.embedded)
        latents = noisy.latents.movedim(1, 0)
        return self.predictor.velocity(predicted, latents, noisy.sigma).movedim(0, 1)

    def _show(self, noisy: _Noisy, branch: str, velocity: Tensor) -> None:
        """Show the observer, if there is one, a computed velocity."""
        if self.observe is not None:
            place = {"segment": 0, "tick": noisy.tick.index, "chunk": noisy.chunk}
            sigma = float(noisy.sigma[0])
            self.observe(**place, step=noisy.step, branch=branch, velocity=velocity, sigma=sigma)
