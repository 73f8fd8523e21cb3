"""Step reuse in every guidance branch of a Wan model: what is computed, and what the others get.

    reuse = StepReuse(cached, rule, policies={"cond": policy, "uncond": other}, guidance=3.0)
    velocity = reuse.velocity(tick, x, timestep=991, sigma=0.99, frames=range(3, 6))

In every step each branch decides whether its chunk goes through the blocks; else its velocity is
predicted from stored results. `BranchReuse` does that for all chunks of a tick, whoever sends them
through the blocks. `StepReuse` serves models whose chunks are denoised one after the other: nobody
reads the keys of a noisy chunk there, so that a step that is not computed costs the embedding only.

Axes: C latent channels, F latent frames, h/w latent rows/columns, S tokens, D width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowcache.policies import (
    Decisions,
    Observe,
    Policies,
    ReusePolicy,
    Signals,
    agree,
    compute_together,
    guidance_of,
    store_of,
)
from flowcache.predict import PREDICTORS, HeldGuidance, Quantity, ResultStore
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import PassId, RunStats
from flowcache.schedule import Tick
from flowcache.tokens import TokenChoice, chosen_tokens, pixels_of
from flowcache.wan.cached import CachedDiT, View
from flowcache.wan.calibration import ReuseConfig, Signal, policies_of
from flowcache.wan.dit import PATCH, Embedded

WHOLE_WINDOW = -1
"""Id under which results of the whole window are stored, which full attention computes at once."""

Computed = dict[str, tuple[Tensor, Tensor]]
"""Branch -> a chunk's tokens after the blocks, `[1, S, D]`, and its velocity `[C, F, h, w]`."""


@dataclass(frozen=True)
class NoisyChunk:
    """A chunk in one tick, noisy and embedded; with full attention the whole window."""

    id: int
    """The chunk, or `WHOLE_WINDOW`."""
    active: Mapping[int, tuple[slice, float]]
    """The active chunks in it: which frames are theirs, and their noise level."""
    latents: Tensor
    """`[C, F, h, w]`."""
    sigma: Tensor
    """Noise level of each frame, `[F]`."""
    embedded: Embedded
    offset: int = 0
    """Tokens of the active chunks before it."""
    computed: tuple[str, ...] = ()
    """Branches in which it goes through the blocks, those of other processes included."""
    is_held: bool = False
    """Whether "cond" alone goes through the blocks, and the others' difference to it is held."""
    rows: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Branches in which some tokens alone go through the blocks, and which."""

    @property
    def num_tokens(self) -> int:
        return self.embedded.tokens.shape[1]

    def computed_tokens(self, branch: str) -> Tensor | None:
        """Return which of its tokens are computed, `[F, P]` bool; None: all."""
        if branch not in self.rows:
            return None
        num_frames, num_tokens = len(self.sigma), self.num_tokens
        return chosen_tokens(self.rows[branch], num_frames=num_frames, num_tokens=num_tokens)


@dataclass(kw_only=True)
class BranchReuse:
    """Decides what is computed, stores it, and predicts the rest; lives as long as a window."""

    signal: Signal
    quantity: Quantity
    scale: float
    """Of classifier-free guidance, where there is a branch "uncond"."""
    policies: Mapping[str, ReusePolicy]
    """Of all branches, "cond" first."""
    results: Mapping[str, ResultStore]
    """Of all branches."""
    tokens: Mapping[str, TokenChoice] = field(default_factory=dict[str, TokenChoice])
    """Branches in which some tokens of a chunk may be enough."""
    updates: ResultStore
    """Of the guided latents, where their updates are what is reused."""
    guidance: HeldGuidance
    stats: RunStats
    ranks: Ranks
    read: Callable[[Tensor, Embedded], Tensor]
    """Reads a velocity `[C, F, h, w]` out of what the blocks made of one branch."""
    observe: Observe | None = None
    """Is shown the velocities of computed steps."""
    segment: int = 0

    def __post_init__(self) -> None:
        self.predictor = PREDICTORS[self.quantity]
        self.own = self.ranks.local_branches(list(self.policies))
        """The branches that this process computes."""

    # What is computed -------------------------------------------------------------------------

    def decide(
        self, tick: Tick, chunks: Sequence[NoisyChunk], signals: Signals
    ) -> list[NoisyChunk]:
        """Return the chunks with the branches in which each is computed, which is recorded."""
        policies, plans = self.policies, dict[str, Decisions]()
        for name, policy in policies.items():
            stored, compared = self._stored(name, chunks=tick.steps), signals
            if policy.needs_forecasts:
                store = self._store_of(name)
                compared = store.forecasts({chunk.id: chunk.sigma for chunk in chunks})
            plans[name] = policy.plan(tick, compared, stored=stored)
            if name in self.tokens:
                plans[name] = self.tokens[name].choose(tick, plans[name], stored=stored)
        if chunks[0].id == WHOLE_WINDOW:
            plans = {n: compute_together(policies[n], plan) for n, plan in plans.items()}
        held = {
            chunk
            for chunk, step in tick.steps.items()
            if self.guidance.is_held(chunk, step, num_steps=tick.num_steps)
        }
        if self.predictor.level == "step":
            plans = agree(policies, plans, apart=held)
        for plan in (plan for name, plan in plans.items() if name != "cond"):
            plan.update({c: replace(plan[c], is_computed=False) for c in held})
        for name, plan in plans.items():
            for chunk, decision in plan.items():
                self.stats.record(tick, chunk, name, decision, segment=self.segment)
        decided: list[NoisyChunk] = []
        for chunk in chunks:
            computed = tuple(
                name
                for name, plan in plans.items()
                if any(plan[active].is_computed for active in chunk.active)
            )
            is_held = chunk.id in held and "cond" in computed
            own = {n: plans[n][c].rows for n in computed for c in chunk.active if c == chunk.id}
            rows = {name: part for name, part in own.items() if part is not None}
            decided.append(replace(chunk, computed=computed, is_held=is_held, rows=rows))
        return decided

    def signal_of(self, part: Embedded) -> Tensor:
        """Return what policies compare of some frames."""
        parts = {"timestep": part.modulation, "timestep_embedding": part.time}
        return (parts | {"content": part.tokens})[self.signal]

    def _store_of(self, name: str) -> ResultStore:
        """Return the results that a branch's reused steps are predicted from."""
        return self.updates if self.predictor.level == "step" else self.results[name]

    def _stored(self, name: str, *, chunks: Iterable[int]) -> set[int]:
        """Return the active chunks that have a stored result."""
        units = self._store_of(name).units()
        return set(chunks) if WHOLE_WINDOW in units else set(chunks) & set(units)

    # Velocities -------------------------------------------------------------------------------

    def guided(self, tick: Tick, chunk: NoisyChunk, computed: Computed) -> Tensor | None:
        """Return a chunk's guided velocity, `[C, F, h, w]`; None where its update is reused.

        Args:
            computed: of this process's branches.
        """
        if not chunk.computed and self.predictor.level == "step":
            return None
        velocities = self._by_branch(tick, chunk, computed)
        guided = velocities["cond"]
        if "uncond" in velocities:  # away from the branch without the prompt
            uncond = velocities["uncond"]
            guided = uncond + self.scale * (guided - uncond)
        if len(chunk.computed) == len(self.policies):
            self._show(tick, chunk, "guided", guided)
        return guided

    def _by_branch(self, tick: Tick, chunk: NoisyChunk, computed: Computed) -> dict[str, Tensor]:
        """Return a chunk's velocity in each branch: computed, predicted, or by held guidance."""
        names = [n for n in self.policies if n in chunk.computed or not chunk.is_held]
        own = {
            name: self._store_computed(name, chunk, *computed[name])
            if name in computed
            else self._predict(name, chunk)
            for name in self.own
            if name in names
        }
        velocities = self.ranks.gather_branches(own, names=names, like=chunk.latents)
        for name in chunk.computed:
            self._show(tick, chunk, name, velocities[name])
        for name in self.policies:
            if name not in names:
                velocities[name] = velocities["cond"] + self.guidance.take(chunk.id)
                if name in self.own:
                    self._store(name, chunk, velocities[name])
        if len(chunk.computed) == 2:
            self.guidance.put(chunk.id, velocities["uncond"] - velocities["cond"])
        return velocities

    def _show(self, tick: Tick, chunk: NoisyChunk, branch: str, velocity: Tensor) -> None:
        """Show the observer, if there is one, a computed velocity, chunk by chunk."""
        if self.observe is None:
            return
        for active, (frames, sigma) in chunk.active.items():
            self.observe(
                segment=self.segment,
                tick=tick.index,
                chunk=active,
                step=tick.steps[active],
                branch=branch,
                velocity=velocity[:, frames],
                sigma=sigma,
            )

    # Stored results ---------------------------------------------------------------------------

    def _store_computed(
        self, name: str, chunk: NoisyChunk, hidden_BSD: Tensor, velocity: Tensor
    ) -> Tensor:
        """Store what a branch computed; return its velocity, predicted for tokens left out."""
        is_own_FP = chunk.computed_tokens(name)
        if self.predictor.level == "tokens":
            change = (hidden_BSD - chunk.embedded.tokens)[0].unflatten(0, (len(chunk.sigma), -1))
            where = None if is_own_FP is None else is_own_FP.unsqueeze(-1)
            self.results[name].put(chunk.id, change, sigma=chunk.sigma, where=where)
            self._see(name, chunk, hidden_BSD)
        elif is_own_FP is None:
            self._store(name, chunk, velocity)
        else:
            where = pixels_of(is_own_FP, size=PATCH[1], like=velocity)
            velocity = velocity.where(where, self._predict(name, chunk))
            self._store(name, chunk, velocity, where=where.movedim(1, 0))
        return velocity

    def _store(
        self, name: str, chunk: NoisyChunk, velocity: Tensor, *, where: Tensor | None = None
    ) -> None:
        """Store a velocity of one branch, or what the predictor makes of it."""
        if self.predictor.level == "step":  # stored of the guided latent, by `put_update`
            return
        latents = chunk.latents.movedim(1, 0)
        value = self.predictor.stored(velocity.movedim(1, 0), latents, chunk.sigma)
        self.results[name].put(chunk.id, value, sigma=chunk.sigma, where=where)

    def _see(self, name: str, chunk: NoisyChunk, hidden_BSD: Tensor) -> None:
        """Show the choice of tokens what the blocks, or a prediction, made of a chunk."""
        if name in self.tokens and self.tokens[name].weighed == "hidden":
            self.tokens[name].see(chunk.id, hidden_BSD[0].unflatten(0, (len(chunk.sigma), -1)))

    def _predict(self, name: str, chunk: NoisyChunk) -> Tensor:
        """Predict a velocity of one branch, `[C, F, h, w]`, from what is stored."""
        predicted = self.results[name].predict(chunk.id, sigma=chunk.sigma)
        if self.predictor.level == "tokens":
            hidden = chunk.embedded.tokens + predicted.flatten(0, 1)
            self._see(name, chunk, hidden)
            return self.read(hidden, chunk.embedded)
        latents = chunk.latents.movedim(1, 0)
        return self.predictor.velocity(predicted, latents, chunk.sigma).movedim(0, 1)

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
        for each in (self.updates, self.guidance, *self.results.values(), *self.tokens.values()):
            each.drop(chunk)


class StepReuse(BranchReuse):
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
        super().__init__(
            signal=rule.signal,
            quantity=rule.predict,
            scale=guidance,
            policies=policies,
            results={name: store_of(rule) for name in cached.names},
            updates=store_of(rule),
            guidance=guidance_of(rule),
            stats=cached.stats,
            ranks=cached.ranks,
            read=cached.read,
            observe=observe,
        )
        self.cached = cached

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
        """Decide by the settings, if not by other policies."""
        policies = policies or policies_of(config, cached.dit.config)
        made = {
            name: cached.ranks.decided_by(policies(segment=0, branch=name), branch=number)
            for number, name in enumerate(cached.names)
        }
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
        cached, (chunk,) = self.cached, tick.steps
        embedded = cached.embed(x_CFhw, [timestep] * len(frames))
        sigma_F = torch.full((len(frames),), sigma, device=x_CFhw.device)
        noisy = NoisyChunk(chunk, {chunk: (slice(None), sigma)}, x_CFhw, sigma_F, embedded)
        (noisy,) = self.decide(tick, [noisy], {chunk: self.signal_of(embedded)})
        computed: Computed = {}
        for name in self.own:
            passes, is_computed = [PassId(0, tick.index, chunk, name)], name in noisy.computed
            head = is_computed or self.predictor.level == "tokens"
            cached.count(name, frames, view, blocks=is_computed, head=head, passes=passes)
            if is_computed:
                with cached.stats.timed_pass(passes):
                    hidden = cached.run(name, embedded, frames=frames, view=view)
                    computed[name] = hidden, cached.read(hidden, embedded)
        return self.guided(tick, noisy, computed)
