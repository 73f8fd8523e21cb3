"""The passes of one tick: chunks through the blocks, velocities computed or predicted, guidance.

Axes: B batch, S tokens, D width, C latent channels, F latent frames, h/w latent rows/columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flowcache.guidance import HeldGuidance
from flowcache.results import clean_estimate, velocity_to
from flowcache.reuse import Decision, Observe
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import PassId, RunStats
from flowcache.schedule import Tick
from skyreels_v2.forward import WindowForward
from skyreels_v2.sampling import WHOLE_WINDOW, Branch, Noisy, Sampling, Unit
from skyreels_v2.window import Window


@dataclass(frozen=True)
class Turn:
    """One unit's part in a tick."""

    unit: Unit
    part: Noisy
    computed: tuple[str, ...]
    """Branches in which it goes through the blocks, those of other processes included."""
    offset: int
    """Tokens of the active chunks before it."""
    settles: bool
    """Whether its keys are final after it."""


@dataclass(frozen=True)
class Computed:
    """What a branch's blocks gave for one unit."""

    hidden: Tensor
    """`[1, S, D]`."""
    velocity: Tensor
    """`[C, F, h, w]`."""


class WindowPasses:
    """Makes the guided velocities of one window's ticks.

    Args:
        branches: all guidance branches, "cond" first.
        guidance: says where only "cond" is computed.
        sigmas: noise level of every step.
        observe: is shown the velocities of computed steps.
        ranks: the processes that divide the work.
    """

    def __init__(
        self,
        forward: WindowForward,
        *,
        window: Window,
        sampling: Sampling,
        branches: Mapping[str, Branch],
        guidance: HeldGuidance,
        stats: RunStats,
        segment: int,
        sigmas: Sequence[float],
        observe: Observe | None,
        ranks: Ranks,
    ) -> None:
        self.forward = forward
        self.window = window
        self.sampling = sampling
        self.branches = branches
        self.own = {name: branches[name] for name in ranks.local_branches(list(branches))}
        """The branches that this process computes."""
        self.guidance = guidance
        self.stats = stats
        self.segment = segment
        self.sigmas = sigmas
        self.observe = observe
        self.ranks = ranks

    def velocities(
        self,
        tick: Tick,
        units: Sequence[Unit],
        plans: Mapping[str, Mapping[int, Decision]],
        noisy: Noisy,
    ) -> dict[int, Tensor]:
        """Return the velocity of each unit after guidance, `[C, F, h, w]`.

        A unit whose latent update is reused has none.
        """
        guided: dict[int, Tensor] = {}
        for turns in self._until_settled(tick, units, plans, noisy):
            for turn in turns:
                self._count(tick, turn)
            made = self._run(tick, turns)
            for turn in turns:
                velocities = self._of_branches(tick, turn, made.get(turn.unit.id, {}))
                if velocities:
                    guided[turn.unit.id] = own = self._guide(velocities)
                    if len(turn.computed) == len(self.branches):
                        self._show(tick, turn.unit, "guided", own)
            if turns[-1].settles:
                self.forward.settle(turns[-1].unit.id)
        return guided

    def held(self, tick: Tick) -> set[int]:
        """Return the chunks that compute the conditional branch alone, if they are computed."""
        num_steps = self.sampling.num_steps
        return {
            chunk
            for chunk, step in tick.steps.items()
            if self.guidance.is_held(chunk, step, num_steps=num_steps)
        }

    # What goes through the blocks together ----------------------------------------------------

    def _until_settled(
        self,
        tick: Tick,
        units: Sequence[Unit],
        plans: Mapping[str, Mapping[int, Decision]],
        noisy: Noisy,
    ) -> Iterator[list[Turn]]:
        """Yield the turns of a tick, up to each one whose keys become final.

        Without a clean pass the keys of a chunk in its last step are final as soon as they are put,
        so that the chunks behind it see them as clean in this tick already.
        """
        turns: list[Turn] = []
        offset = 0
        for unit in units:
            part = noisy.frames(*unit.frames)
            computed = tuple(name for name in self.branches if unit.is_computed(plans[name]))
            settles = unit.id in tick.finishing and not self.sampling.clean_pass
            turns.append(Turn(unit, part, computed, offset, settles))
            if settles:
                yield turns
                turns = []
            else:
                offset += part.embedded.tokens.shape[1]
        if turns:
            yield turns

    def _together(self, turns: Sequence[Turn]) -> Iterator[list[Turn]]:
        """Yield the computed turns that go through the blocks at once: same branches, few tokens.

        Example: with at most 200 tokens, chunks of 80 go through two by two.
        """
        batch: list[Turn] = []
        tokens = 0
        for turn in turns:
            if not turn.computed:
                continue
            size = turn.part.embedded.tokens.shape[1]
            if batch and (
                turn.computed != batch[0].computed or tokens + size > self.sampling.together_tokens
            ):
                yield batch
                batch, tokens = [], 0
            batch.append(turn)
            tokens += size
        if batch:
            yield batch

    def _run(self, tick: Tick, turns: Sequence[Turn]) -> dict[int, dict[str, Computed]]:
        """Send the computed units through the blocks; return what each gave, by unit and branch."""
        made: dict[int, dict[str, Computed]] = {}
        for batch in self._together(turns):
            names = [name for name in batch[0].computed if name in self.own]
            units = [turn.unit for turn in batch]
            embedded = batch[0].part.embedded.joined([t.part.embedded for t in batch[1:]])
            passes = [p for name in names for u in units for p in self._passes(tick, u, name)]
            with self.stats.timed_pass(passes):
                hidden = self.forward.run(
                    names, units, embedded, offsets=[turn.offset for turn in batch]
                )
            frames = [len(turn.part.sigma) for turn in batch]
            tokens = [turn.part.embedded.tokens.shape[1] for turn in batch]
            for name, whole in hidden.items():
                velocities = self.forward.velocity(whole, embedded).split(frames, dim=1)
                parts = whole.split(tokens, dim=1)
                for unit, part, velocity in zip(units, parts, velocities, strict=True):
                    made.setdefault(unit.id, {})[name] = Computed(part, velocity)
        return made

    def _count(self, tick: Tick, turn: Turn) -> None:
        """Count a unit's FLOPs in each branch, as done and as without reuse."""
        for name, branch in self.own.items():
            self.forward.count(
                branch,
                turn.part.embedded,
                offset=turn.offset,
                is_computed=name in turn.computed,
                passes=self._passes(tick, turn.unit, name),
            )

    # Velocities -------------------------------------------------------------------------------

    def _of_branches(
        self, tick: Tick, turn: Turn, made: Mapping[str, Computed]
    ) -> dict[str, Tensor]:
        """Return one unit's velocity in each branch: computed, predicted, or cond's and more."""
        unit, part, computed = turn.unit, turn.part, turn.computed
        held = self.held(tick) if "cond" in computed else ()
        names = [name for name in self.branches if name in computed or unit.id not in held]
        own: dict[str, Tensor] = {}
        for name in (name for name in names if name in self.own):
            velocity = self._velocity(self.own[name], unit, part, made=made.get(name))
            if velocity is not None:
                own[name] = velocity
        if not computed and self.sampling.quantity == "latent_update":
            return {}
        velocities = self.ranks.gather_branches(own, names=names, like=part.latents)
        for name in computed:
            self._show(tick, unit, name, velocities[name])
        for name in self.branches:
            if name not in names:
                velocities[name] = velocities["cond"] + self.guidance.take(unit.id)
                if name in self.own:
                    self._store(self.own[name], unit, part, velocities[name])
        if len(computed) == 2:
            self.guidance.put(unit.id, velocities["uncond"] - velocities["cond"])
        return velocities

    def _guide(self, velocities: Mapping[str, Tensor]) -> Tensor:
        """Move a unit's velocity away from that of the branch without its prompt."""
        if "uncond" not in velocities:
            return velocities["cond"]
        uncond = velocities["uncond"]
        return uncond + self.sampling.guidance * (velocities["cond"] - uncond)

    def _velocity(
        self, branch: Branch, unit: Unit, part: Noisy, *, made: Computed | None
    ) -> Tensor | None:
        """Store what one branch computed, or predict its velocity from what is stored.

        Args:
            made: what the blocks gave; None if the unit was not computed.
        """
        quantity, sigma, tokens = self.sampling.quantity, part.sigma, part.embedded.tokens
        if made is not None:
            if quantity == "residual":
                change = (made.hidden - tokens)[0].unflatten(0, (len(sigma), -1))
                branch.results.put(unit.id, change, sigma=sigma)
            else:
                self._store(branch, unit, part, made.velocity)
            return made.velocity
        if quantity == "latent_update":
            return None
        predicted = branch.results.predict(unit.id, sigma=sigma)
        if quantity == "residual":
            return self.forward.velocity(tokens + predicted.flatten(0, 1), part.embedded)
        if quantity == "clean":
            predicted = velocity_to(predicted, part.latents.movedim(1, 0), sigma=sigma)
        return predicted.movedim(0, 1)

    def _store(self, branch: Branch, unit: Unit, part: Noisy, velocity: Tensor) -> None:
        """Store one unit's velocity in one branch, or the clean estimate that it points to."""
        if self.sampling.quantity == "latent_update":
            return
        value = velocity.movedim(1, 0)
        if self.sampling.quantity == "clean":
            value = clean_estimate(part.latents.movedim(1, 0), value, sigma=part.sigma)
        branch.results.put(unit.id, value, sigma=part.sigma)

    # What others see --------------------------------------------------------------------------

    def _show(self, tick: Tick, unit: Unit, branch: str, velocity: Tensor) -> None:
        """Show the observer, if there is one, a unit's computed velocity, chunk by chunk."""
        if self.observe is None:
            return
        for chunk in unit.chunks(tick):
            is_whole, step = unit.id == WHOLE_WINDOW, tick.steps[chunk]
            own = self.window.chunks[chunk]
            self.observe(
                segment=self.segment,
                tick=tick.index,
                chunk=chunk,
                step=step,
                branch=branch,
                velocity=velocity[:, own.start : own.stop] if is_whole else velocity,
                sigma=self.sigmas[step],
            )

    def _passes(self, tick: Tick, unit: Unit, branch: str) -> list[PassId]:
        return [PassId(self.segment, tick.index, chunk, branch) for chunk in unit.chunks(tick)]
