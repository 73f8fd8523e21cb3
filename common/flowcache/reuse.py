"""When a chunk is recomputed.

A policy says *when*: at every tick it looks at one cheap signal per chunk and says which chunks
must be computed. *What* the others get is told in `flowcache.results`; any policy goes with any
stored quantity. Each guidance branch has a policy of its own.

Source of the rules: FlowCache (arXiv 2602.10825) and TeaCache (arXiv 2411.19108).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.schedule import Tick

Rescale = Callable[[float], float]
"""Maps a relative distance to the amount that is accumulated (both dimensionless)."""


@dataclass(frozen=True)
class Decision:
    """What a policy says about one chunk at one tick."""

    is_computed: bool
    distance: float | None = None
    """Relative L1 distance of the signal to the previous tick; None where none was measured."""
    accumulated: float | None = None
    """Sum of the rescaled distances since the last computed step, this tick included."""


def identity(distance: float) -> float:
    """Return the distance as it is."""
    return distance


def polynomial(coefficients: Sequence[float]) -> Rescale:
    """Return TeaCache's rescaling polynomial, highest power first (may be negative)."""

    def rescale(distance: float) -> float:
        value = 0.0
        for coefficient in coefficients:
            value = value * distance + coefficient
        return value

    return rescale


class ReusePolicy(ABC):
    """Decides for one guidance branch which active chunks are computed at each tick."""

    needs_signals = True
    """Whether `plan` reads its signals; where not, the caller may pass none."""

    @abstractmethod
    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        """Decide for each chunk of `tick.steps`.

        Args:
            signals: chunk -> its signal now; any shape, the same at every tick.
            stored: chunks with a stored result; the others have to be computed.
        """

    def computed_anyway(self, chunks: Collection[int]) -> None:  # noqa: B027
        """Learn that these chunks were computed although `plan` did not ask for it."""


class Vanilla(ReusePolicy):
    """Compute every step of every chunk."""

    needs_signals = False

    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        return {chunk: Decision(True) for chunk in tick.steps}


@dataclass
class Stride(ReusePolicy):
    """Compute fixed own steps of every chunk: the baseline any adaptive rule has to beat.

    Either an explicit list `steps`, or the `warmup_steps` first ones and from there every
    `every`-th. The first and the last own step are always computed. Example with 10 steps,
    warm-up 3, every 3: 0 1 2 3 6 9.
    """

    every: int = 2
    warmup_steps: int = 3
    steps: Collection[int] | None = None
    needs_signals = False

    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        return {
            chunk: Decision(chunk not in stored or self._is_planned(step, tick.num_steps))
            for chunk, step in tick.steps.items()
        }

    def _is_planned(self, step: int, num_steps: int) -> bool:
        if step == num_steps - 1:
            return True
        if self.steps is not None:
            return step in self.steps
        return step < self.warmup_steps or (step - self.warmup_steps) % self.every == 0


@dataclass
class FlowCache(ReusePolicy):
    """Every chunk decides for itself, by the accumulated change of its own signal.

    A chunk is computed in its first `warmup_steps` own steps, in the last tick of the run, and when
    the accumulated rescaled distance reaches `threshold`; each computed step sets the sum to zero.

    Source: FlowCache, section 3.2, and its published code, which treats a chunk's own last step
    differently per model: SkyReels-V2 computes it, MAGI-1 may reuse it.
    """

    threshold: float
    warmup_steps: int
    rescale: Rescale = identity
    compute_last_step: bool = True
    """Whether a chunk's own last step is always computed; else it is decided like any other."""
    previous: dict[int, Tensor] = field(default_factory=dict)
    accumulated: dict[int, float] = field(default_factory=dict)

    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        distances = relative_l1(
            {c: (signals[c], self.previous[c]) for c in tick.steps if c in self.previous}
        )
        decisions: dict[int, Decision] = {}
        for chunk, step in tick.steps.items():
            is_own_last = self.compute_last_step and step == tick.num_steps - 1
            decisions[chunk] = self._decide(
                chunk,
                distances.get(chunk),
                is_forced=step < self.warmup_steps or is_own_last or chunk not in stored,
                is_run_end=tick.is_last,
            )
        self.previous = {chunk: signals[chunk] for chunk in tick.steps}
        return decisions

    def computed_anyway(self, chunks: Collection[int]) -> None:
        self.accumulated.update(dict.fromkeys(chunks, 0.0))

    def _decide(
        self, chunk: int, distance: float | None, *, is_forced: bool, is_run_end: bool
    ) -> Decision:
        before, total = self.accumulated.setdefault(chunk, 0.0), None
        if distance is not None:
            total = before + self.rescale(distance)
        if is_run_end:  # as published, the sum stays what it was
            return Decision(True, distance, total)
        # "not below": a distance that is not a number must lead to a computation
        is_computed = is_forced or total is None or not total < self.threshold
        self.accumulated[chunk] = 0.0 if is_computed or total is None else total
        return Decision(is_computed, distance, total)


@dataclass
class TeaCache(ReusePolicy):
    """One decision for the whole window: all active chunks are computed, or none.

    The distance is taken over all signals given, in one mean. The first `warmup_ticks` ticks and
    the last one are computed; a chunk without a stored result is computed alone.

    Source: TeaCache, section 3.3; the baseline of the FlowCache paper.
    """

    threshold: float
    warmup_ticks: int
    rescale: Rescale = identity
    previous: dict[int, Tensor] = field(default_factory=dict)
    accumulated: float = 0.0

    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        distance = self._distance(signals)
        total = None if distance is None else self.accumulated + self.rescale(distance)
        is_forced = tick.index < self.warmup_ticks or tick.is_last
        is_computed = is_forced or total is None or not total < self.threshold
        self.accumulated = 0.0 if is_computed or total is None else total
        self.previous = dict(signals)
        return {
            chunk: Decision(is_computed or chunk not in stored, distance, total)
            for chunk in tick.steps
        }

    def computed_anyway(self, chunks: Collection[int]) -> None:
        self.accumulated = 0.0

    def _distance(self, signals: Mapping[int, Tensor]) -> float | None:
        common = [chunk for chunk in signals if chunk in self.previous]
        if not common:
            return None
        now = torch.cat([signals[c].flatten() for c in common])
        before = torch.cat([self.previous[c].flatten() for c in common])
        return relative_l1({0: (now, before)})[0]


@dataclass
class Replay(ReusePolicy):
    """Compute exactly what a recorded run computed.

    `ticks` holds its decisions: tick -> chunk -> (own step, whether it was computed).
    """

    ticks: Mapping[int, Mapping[int, tuple[int, bool]]]
    needs_signals = False

    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        """Decide as recorded; see `ReusePolicy.plan`.

        Raises:
            UserError: the record is of another schedule, or reuses what is not there.
        """
        if len(self.ticks) != tick.num_ticks:
            raise _unfit(f"it has {len(self.ticks)} ticks, the run {tick.num_ticks}")
        recorded = self.ticks.get(tick.index, {})
        steps = {chunk: step for chunk, (step, _) in recorded.items()}
        if steps != dict(tick.steps):
            raise _unfit(
                f"in tick {tick.index} it has the chunks and steps {steps}, the run "
                f"{dict(tick.steps)}"
            )
        decisions = {chunk: Decision(is_computed) for chunk, (_, is_computed) in recorded.items()}
        for chunk, decision in decisions.items():
            if not decision.is_computed and chunk not in stored:
                raise _unfit(f"it reuses chunk {chunk} in tick {tick.index}, but nothing is stored")
        return decisions

    def computed_anyway(self, chunks: Collection[int]) -> None:
        """Refuse a run that computes more than was recorded.

        Raises:
            UserError: always.
        """
        raise _unfit(f"it reuses chunks {sorted(chunks)} where the run has to compute them")


class Policies(Protocol):
    """Makes the policy of a guidance branch in a segment."""

    def __call__(self, *, segment: int, branch: str) -> ReusePolicy:
        """Return a new policy."""
        ...


def _unfit(reason: str) -> UserError:
    return UserError(
        f"the record does not fit this run: {reason}; replay it with the settings it was made with"
    )


def compute_together(policy: ReusePolicy, plan: Mapping[int, Decision]) -> dict[int, Decision]:
    """Compute all chunks of a plan as soon as one must be.

    For attention over the whole window, where chunks can't be computed apart.
    """
    is_any = any(decision.is_computed for decision in plan.values())
    return _compute(policy, plan, plan if is_any else ())


def agree(
    policies: Mapping[str, ReusePolicy],
    plans: Mapping[str, Mapping[int, Decision]],
    *,
    apart: Collection[int] = (),
) -> dict[str, dict[int, Decision]]:
    """Compute a chunk in all branches as soon as one branch must compute it.

    For what is reused after guidance, which needs every branch.

    Args:
        apart: chunks that one branch may compute without the others.
    """
    wanted = {c for plan in plans.values() for c, decision in plan.items() if decision.is_computed}
    wanted -= set(apart)
    return {branch: _compute(policies[branch], plan, wanted) for branch, plan in plans.items()}


def _compute(
    policy: ReusePolicy, plan: Mapping[int, Decision], chunks: Collection[int]
) -> dict[int, Decision]:
    extra = [
        chunk for chunk, decision in plan.items() if chunk in chunks and not decision.is_computed
    ]
    if extra:
        policy.computed_anyway(extra)
    return {
        c: replace(decision, is_computed=True) if c in extra else decision
        for c, decision in plan.items()
    }


def relative_l1(pairs: Mapping[int, tuple[Tensor, Tensor]]) -> dict[int, float]:
    """Return mean|now - before| / mean|before| of each pair, with one device-to-host copy.

    Identical signals give 0 even where both are zero; a change from an all-zero signal gives inf.
    """
    if not pairs:
        return {}
    sums = torch.stack(
        [
            torch.stack([_mean(now - before), _mean(before)]).float()
            for now, before in pairs.values()
        ]
    ).tolist()
    return {key: _ratio(change, size) for key, (change, size) in zip(pairs, sums, strict=True)}


def _mean(x: Tensor) -> Tensor:
    """Return mean|x|: summed and kept in float32 at least; a 16-bit mean is 0.4 % coarse."""
    return x.abs().mean(dtype=torch.promote_types(x.dtype, torch.float32))


def _ratio(change: float, size: float) -> float:
    if size == 0.0:
        return 0.0 if change == 0.0 else math.inf
    return change / size


class Observe(Protocol):
    """Is shown the velocity of each computed step of a chunk, for calibration."""

    def __call__(
        self,
        *,
        segment: int,
        tick: int,
        chunk: int,
        step: int,
        branch: str,
        velocity: Tensor,
        sigma: float,
    ) -> None:
        """Look at a velocity; it must not be changed.

        Args:
            branch: the guidance pass; "guided": what guidance makes of all.
            velocity: the model's output, `[C, F, h, w]`.
            sigma: noise level of the step, 1 noise to 0 clean.
        """
        ...
