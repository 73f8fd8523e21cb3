"""When a chunk is recomputed.

A policy says *when*: at every tick it looks at one cheap signal per chunk and says which chunks
must be computed. `flowcache.predict` says *what* the others get; any policy goes with any
predictor. Each guidance branch has a policy of its own.

To add a policy: write its class, whose fields name the settings that it takes, and list it in
`POLICIES`. A setting that no other policy has is one more field of `ReuseRule`.

Source of the rules: FlowCache (arXiv 2602.10825) and TeaCache (arXiv 2411.19108).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Protocol, TypeAlias

from flowcache.bounds import (
    MAX_STEPS,
    SETTING,
    Bounds,
    OneOf,
    OwnSteps,
    Place,
    Share,
    Threshold,
    made_of,
    sources_of,
)
from flowcache.errors import UserError
from flowcache.predict import MAX_ORDER, HeldGuidance, ResultStore
from flowcache.schedule import Tick
from flowcache.tokens import TokenRule

if TYPE_CHECKING:
    from torch import Tensor

# torch is imported where tensors are made: a wrong setting is refused before torch is loaded

Signals: TypeAlias = "Mapping[int, Tensor]"
"""Chunk -> its signal now; any shape, the same at every tick."""
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
    rows: Tensor | None = field(default=None, compare=False)
    """Tokens of the chunk that are computed, ascending; None: all, or none. See `tokens`."""


Decisions: TypeAlias = dict[int, Decision]
"""By chunk."""


def identity(distance: float) -> float:
    """Leave a distance as it is."""
    return distance


def polynomial(coefficients: Sequence[float]) -> Rescale:
    """Return TeaCache's rescaling polynomial, highest power first (may be negative)."""

    def rescale(distance: float) -> float:
        value = 0.0
        for coefficient in coefficients:
            value = value * distance + coefficient
        return value

    return rescale


@dataclass(frozen=True)
class Calibration:
    """What was measured before a run, for the policies that build on it."""

    rescale: Rescale = identity
    plans: Sequence[Collection[int]] = ()
    """Computed own steps by chunk; chunks behind the last entry use that one."""
    magnitude_ratios: Sequence[float] = ()
    """Magnitude of the result of each own step over that of the step before."""
    distance_low: Sequence[float] = ()
    """Least distance of signals seen at each own step, widened."""
    distance_high: Sequence[float] = ()
    """Largest distance of signals seen at each own step, widened."""
    guidance_risks: Sequence[Sequence[float]] = ()
    """By own step: risk of reusing a result that is one step old, two, ...; see `GuidanceRisk`."""


class ReusePolicy(ABC):
    """Decides for one guidance branch which active chunks are computed at each tick.

    The fields of those in `POLICIES` take settings and calibrated values, see `made_of`.
    """

    needs_signals = True
    """Whether `plan` reads its signals; where not, the caller may pass none."""
    needs_forecasts = False
    """Whether the signals are forecasts instead, see `ResultStore.forecasts`."""

    @abstractmethod
    def plan(self, tick: Tick, signals: Signals, *, stored: Collection[int]) -> Decisions:
        """Decide for each chunk of `tick.steps`.

        Args:
            stored: chunks with a stored result; the others have to be computed.
        """

    def computed_anyway(self, chunks: Collection[int]) -> None:  # noqa: B027
        """Learn that these chunks were computed although `plan` did not ask for it."""

    @classmethod
    def of(cls, rule: ReuseRule, calibration: Calibration) -> ReusePolicy:
        """Return a new policy with the values of the settings and of a calibration."""
        return made_of(cls, rule, calibration)

    @classmethod
    def takes(cls, *names: str) -> bool:
        """Return whether the policy depends on one of these settings or calibrated values."""
        return not set(names).isdisjoint(sources_of(cls).values())


class FixedSteps(ReusePolicy):
    """Computes own steps that are known before the run, and the last one."""

    needs_signals = False

    @abstractmethod
    def is_planned(self, chunk: int, step: int) -> bool:
        """Return whether a chunk's own step is computed."""

    def plan(self, tick: Tick, signals: Signals, *, stored: Collection[int]) -> Decisions:
        last = tick.num_steps - 1
        return {
            chunk: Decision(chunk not in stored or step == last or self.is_planned(chunk, step))
            for chunk, step in tick.steps.items()
        }


@dataclass
class Vanilla(FixedSteps):
    """Compute every step of every chunk."""

    def is_planned(self, chunk: int, step: int) -> bool:
        return True


@dataclass
class Stride(FixedSteps):
    """Compute fixed own steps of every chunk: the baseline any adaptive rule has to beat.

    Either an explicit list `steps`, or the `warmup_steps` first ones and from there every
    `every`-th; the first and the last one always. Example with 10 steps, warm-up 3, every 3:
    0 1 2 3 6 9.
    """

    every: int = 2
    warmup_steps: int = 3
    steps: Collection[int] | None = None

    def is_planned(self, chunk: int, step: int) -> bool:
        if self.steps is not None:
            return step in self.steps
        return step < self.warmup_steps or (step - self.warmup_steps) % self.every == 0


@dataclass
class Planned(FixedSteps):
    """Compute the planned own steps of every chunk, the first and the last one always."""

    plans: Sequence[Collection[int]]
    """Computed own steps by chunk; chunks behind the last entry use that one."""

    def is_planned(self, chunk: int, step: int) -> bool:
        return step in self.plans[min(chunk, len(self.plans) - 1)]


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

    def plan(self, tick: Tick, signals: Signals, *, stored: Collection[int]) -> Decisions:
        distances = _changes(self.previous, signals, tick)
        decisions: Decisions = {}
        for chunk in tick.steps:
            is_forced = tick.is_forced(
                chunk, warmup_steps=self.warmup_steps, with_last=self.compute_last_step
            )
            decisions[chunk] = self._decide(
                chunk,
                distances.get(chunk),
                is_forced=is_forced or chunk not in stored,
                is_run_end=tick.is_last,
            )
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
    warmup_ticks: int = field(metadata={SETTING: "warmup_steps"})
    rescale: Rescale = identity
    previous: dict[int, Tensor] = field(default_factory=dict)
    accumulated: float = 0.0

    def plan(self, tick: Tick, signals: Signals, *, stored: Collection[int]) -> Decisions:
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

    def _distance(self, signals: Signals) -> float | None:
        common = [chunk for chunk in signals if chunk in self.previous]
        if not common:
            return None
        import torch

        now = torch.cat([signals[c].flatten() for c in common])
        before = torch.cat([self.previous[c].flatten() for c in common])
        return relative_l1({0: (now, before)})[0]


@dataclass
class GuardedPlan(Planned):
    """Follow a plan, and compute as well where a chunk changes as no calibration clip did.

    A chunk is computed off plan at an own step at which the distance of its signal to the previous
    tick is outside of the calibrated band: a sudden motion, a change of scene.
    """

    low: Sequence[float] = field(default=(), metadata={SETTING: "distance_low"})
    high: Sequence[float] = field(default=(), metadata={SETTING: "distance_high"})
    previous: dict[int, Tensor] = field(default_factory=dict)
    needs_signals = True

    def plan(self, tick: Tick, signals: Signals, *, stored: Collection[int]) -> Decisions:
        distances = _changes(self.previous, signals, tick)
        decisions = super().plan(tick, signals, stored=stored)
        for chunk, distance in distances.items():
            step = tick.steps[chunk]
            # "not inside": a distance that is not a number must lead to a computation
            is_inside = self.low[step] <= distance <= self.high[step]
            decisions[chunk] = Decision(decisions[chunk].is_computed or not is_inside, distance)
        return decisions


class ErrorBound(ReusePolicy):
    """Reuses while the calibrated errors of the skipped steps stay below a threshold in sum.

    A chunk is computed in its first `warmup_steps` own steps and in its last one, after
    `most_reuses` skipped ones, and when the errors of reusing its result since it was computed add
    up to `threshold`. They are known before the run, so that no signal is compared.
    """

    threshold: float
    warmup_steps: int
    most_reuses: int
    skipped: dict[int, tuple[int, float]]
    """Chunk -> the own step whose result is reused, and the errors since."""
    needs_signals = False

    @abstractmethod
    def error(self, source: int, step: int) -> float | None:
        """Return the error of reusing the result of own step `source` at `step`; None: never."""

    def num_first(self, num_steps: int) -> int:
        """Return how many own steps are always computed at the start."""
        return self.warmup_steps

    def plan(self, tick: Tick, signals: Signals, *, stored: Collection[int]) -> Decisions:
        num_first = self.num_first(tick.num_steps)
        decisions: Decisions = {}
        for chunk, step in tick.steps.items():
            is_forced = tick.is_forced(chunk, warmup_steps=num_first, with_last=True)
            decisions[chunk] = self._decide(chunk, step, is_forced=is_forced or chunk not in stored)
        return decisions

    def computed_anyway(self, chunks: Collection[int]) -> None:
        for chunk in chunks:
            self.skipped.pop(chunk, None)

    def _decide(self, chunk: int, step: int, *, is_forced: bool) -> Decision:
        source, before = self.skipped.get(chunk, (step - 1, 0.0))
        error = self.error(source, step)
        total = None if error is None else before + error
        is_too_old = step - source > self.most_reuses
        # "not below": an error that is not a number must lead to a computation
        if is_forced or is_too_old or total is None or not total < self.threshold:
            self.skipped.pop(chunk, None)
            return Decision(True, accumulated=total)
        self.skipped[chunk] = (source, total)
        return Decision(False, accumulated=total)


@dataclass
class MagCache(ErrorBound):
    """Reuse while the magnitudes of the skipped results stay near that of the stored one.

    The error of a skipped step is ``|1 - ratio|``, where the calibrated ratios of the steps since
    the computed one are multiplied. None is skipped in the first share `retention` of the steps.
    Example with ratios 0.9 and threshold 0.25: the errors are 0.1 after one reuse and 0.1 + 0.19 =
    0.29 with a second one, which is computed instead.

    Source: MagCache (arXiv 2506.09045), here with every chunk for itself. As published, threshold
    0.12, at most 2 reuses and a retention of 0.2, the ratios being those of residuals; here they
    are those of the guided velocity.
    """

    ratios: Sequence[float] = field(metadata={SETTING: "magnitude_ratios"})
    threshold: float
    warmup_steps: int
    most_reuses: int
    retention: float = 0.0
    skipped: dict[int, tuple[int, float]] = field(default_factory=dict, init=False)

    def error(self, source: int, step: int) -> float:
        return abs(1 - math.prod(self.ratios[source + 1 : step + 1]))

    def num_first(self, num_steps: int) -> int:
        return max(self.warmup_steps, int(self.retention * num_steps))


@dataclass
class GuidanceRisk(ErrorBound):
    """Reuse all guidance passes together while what that changes after guidance stays small.

    The risk of reusing the results of step a at step b is ``g_b r_g``: the change of the guided
    velocity between the two steps, times how much a change at step b grows until the end. Both are
    calibrated, see `flowcache.tuning.gram`, which has the formula and an example. All passes of a
    chunk have the same risk, so they are computed together.

    Source: RA-CFGCache (arXiv 2609.36433).
    """

    risks: Sequence[Sequence[float]] = field(metadata={SETTING: "guidance_risks"})
    """By own step: of reusing a result that is one step old, two, ...; older ones are not."""
    threshold: float
    warmup_steps: int
    most_reuses: int
    skipped: dict[int, tuple[int, float]] = field(default_factory=dict, init=False)

    def error(self, source: int, step: int) -> float | None:
        age, risks = step - source, self.risks[step]
        return risks[age - 1] if age <= len(risks) else None


@dataclass
class Disagreement(ReusePolicy):
    """Compute a chunk when two forecasts of its result disagree.

    The distance is the mean difference of a parabola through the last three computed results to the
    line through the last two, over the mean size of that line. A chunk is computed in its first
    `warmup_steps` own steps and in its last one, as long as it has no three results, and when the
    distance reaches `threshold`. Example: results 1, 3, 4 at noise 1.0, 0.8, 0.6 give 5 and 4 at
    noise 0.4: the distance is 0.2.

    Source: RACER (arXiv 2608.01740), its signal alone. How far it draws a forecast back to the last
    result is not published in what we know; the threshold meets a budget, where RACER skips a
    planned step for each one that it adds.
    """

    threshold: float
    warmup_steps: int
    needs_signals = False
    needs_forecasts = True

    def plan(self, tick: Tick, signals: Signals, *, stored: Collection[int]) -> Decisions:
        pairs = {chunk: (parabola, line) for chunk, (line, parabola) in signals.items()}
        distances = relative_l1(pairs)
        decisions: Decisions = {}
        for chunk in tick.steps:
            is_forced = tick.is_forced(chunk, warmup_steps=self.warmup_steps, with_last=True)
            is_forced |= chunk not in stored
            distance = distances.get(chunk)
            # "not below": a distance that is not a number must lead to a computation
            is_computed = is_forced or distance is None or not distance < self.threshold
            decisions[chunk] = Decision(is_computed, distance)
        return decisions


@dataclass
class Replay(ReusePolicy):
    """Compute exactly what a recorded run computed."""

    ticks: Mapping[int, Mapping[int, tuple[int, bool]]]
    """Tick -> chunk -> (own step, whether it was computed)."""
    needs_signals = False

    def plan(self, tick: Tick, signals: Signals, *, stored: Collection[int]) -> Decisions:
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
        raise _unfit(f"it reuses chunks {sorted(chunks)} where the run has to compute them")


def _unfit(reason: str) -> UserError:
    return UserError(
        f"the record does not fit this run: {reason}; replay it with the settings it was made with"
    )


# Settings -----------------------------------------------------------------------------------------

PROFILED = ("plans", "magnitude_ratios", "distance_low", "distance_high", "guidance_risks")
"""The values of a `Calibration` that a profile holds."""

POLICIES: Mapping[str, type[ReusePolicy]] = MappingProxyType(
    {
        "vanilla": Vanilla,
        "teacache": TeaCache,
        "flowcache": FlowCache,
        "stride": Stride,
        "planned": Planned,
        "guarded": GuardedPlan,
        "magcache": MagCache,
        "racfg": GuidanceRisk,
        "racer": Disagreement,
    }
)
"""What `reuse.policy` names."""


@dataclass(frozen=True)
class ReuseRule:
    """When a chunk is computed; each model adds what it compares and what it reuses."""

    policy: Annotated[str, OneOf(tuple(POLICIES))] = "vanilla"
    profile: Place = None
    threshold: Threshold = 0.1
    warmup_steps: Annotated[int, Bounds(0, MAX_STEPS)] = 5
    every: Annotated[int, Bounds(1, MAX_STEPS)] = 2
    steps: OwnSteps = None
    most_reuses: Annotated[int, Bounds(0, MAX_STEPS)] = 8
    retention: Share = 0.0
    compute_last_step: bool = True
    extrapolate: Annotated[float, Bounds(-100, 100)] = 0.0
    order: Annotated[int, Bounds(1, MAX_ORDER)] = 1
    guidance_every: Annotated[int, Bounds(1, MAX_STEPS)] = 1
    guidance_steps: OwnSteps = None
    tokens: TokenRule = field(default_factory=TokenRule)

    @property
    def kind(self) -> type[ReusePolicy]:
        """The class of the policy."""
        return POLICIES[self.policy]

    @property
    def needs_profile(self) -> bool:
        """Whether the policy builds on what a profile holds."""
        return self.kind.takes(*PROFILED)


def threshold_of(rule: ReuseRule) -> float | None:
    """Return the threshold of an adaptive policy, or None."""
    return rule.threshold if rule.kind.takes("threshold") else None


def store_of(rule: ReuseRule) -> ResultStore:
    """Return a new store of the results that reused steps are made from."""
    return ResultStore(rule.extrapolate, order=rule.order, is_forecasting=rule.kind.needs_forecasts)


def stored_results(rule: ReuseRule) -> int:
    """Return how many results of a chunk such a store holds."""
    return store_of(rule).most_results


def guidance_of(rule: ReuseRule) -> HeldGuidance:
    """Return a new record of which steps run the conditional pass alone."""
    return HeldGuidance(rule.guidance_steps, every=rule.guidance_every)


def check_reuse(rule: ReuseRule, *, num_steps: int, least_warmup: int) -> None:
    """Check that the rules when chunks are computed fit each other and the number of steps."""
    if rule.warmup_steps < least_warmup:
        raise UserError(
            f"reuse.warmup_steps must be {least_warmup} or more, not {rule.warmup_steps}"
        )
    if rule.kind.takes("guidance_risks") and guidance_of(rule).is_on:
        raise UserError(
            f"reuse.policy={rule.policy} reuses all guidance passes together: leave out "
            "reuse.guidance_every and reuse.guidance_steps"
        )
    if rule.guidance_every > 1 and rule.guidance_steps is not None:
        raise UserError(
            f"reuse.guidance_every={rule.guidance_every} and reuse.guidance_steps both say which "
            "steps run all passes: give one of them"
        )
    for name, steps in (("steps", rule.steps), ("guidance_steps", rule.guidance_steps)):
        wrong = [step for step in steps or () if not 0 <= step < num_steps]
        if wrong:
            raise UserError(
                f"reuse.{name} are own steps of a chunk, 0..{num_steps - 1}: {wrong[0]} is none"
            )


def check_guidance(rule: ReuseRule, *, num_passes: int) -> None:
    """Check that a run of `num_passes` guidance passes has guidance, if it is to be held."""
    if guidance_of(rule).is_on and num_passes == 1:
        raise UserError(
            "reuse.guidance_every and reuse.guidance_steps hold what guidance adds to the "
            "conditional pass, but this run has that one pass only (a distilled model, or no "
            "guidance): leave them out"
        )


# Several branches -------------------------------------------------------------------------------


class Policies(Protocol):
    """Makes the policy of a guidance branch in a segment."""

    def __call__(self, *, segment: int, branch: str) -> ReusePolicy: ...


def compute_together(policy: ReusePolicy, plan: Decisions) -> Decisions:
    """Compute all chunks of a plan as soon as one must be, for attention over the whole window."""
    is_any = any(decision.is_computed for decision in plan.values())
    return _compute(policy, plan, plan if is_any else ())


def agree(
    policies: Mapping[str, ReusePolicy],
    plans: Mapping[str, Decisions],
    *,
    apart: Collection[int] = (),
) -> dict[str, Decisions]:
    """Compute a chunk in all branches as soon as one must: what is reused after guidance needs all.

    Args:
        apart: chunks that one branch may compute without the others.
    """
    wanted = {c for plan in plans.values() for c, decision in plan.items() if decision.is_computed}
    wanted -= set(apart)
    return {branch: _compute(policies[branch], plan, wanted) for branch, plan in plans.items()}


def _compute(policy: ReusePolicy, plan: Decisions, chunks: Collection[int]) -> Decisions:
    extra = [c for c, decision in plan.items() if c in chunks and not decision.is_computed]
    if extra:
        policy.computed_anyway(extra)
    return plan | {c: replace(plan[c], is_computed=True) for c in extra}


# Measurements -----------------------------------------------------------------------------------


def _changes(previous: dict[int, Tensor], signals: Signals, tick: Tick) -> dict[int, float]:
    """Return the distance of each active chunk's signal to the one before, which it replaces."""
    pairs = {c: (signals[c], previous[c]) for c in tick.steps if c in previous}
    previous.clear()
    previous.update({chunk: signals[chunk] for chunk in tick.steps})
    return relative_l1(pairs)


def relative_l1(pairs: Mapping[int, tuple[Tensor, Tensor]]) -> dict[int, float]:
    """Return mean|now - before| / mean|before| of each pair, with one device-to-host copy.

    Identical signals give 0 even where both are zero; a change from an all-zero signal gives inf.
    """
    if not pairs:
        return {}
    import torch

    def mean(x: Tensor) -> Tensor:
        # summed and kept in float32 at least: a 16-bit mean is 0.4 % coarse
        return x.abs().mean(dtype=torch.promote_types(x.dtype, torch.float32))

    def ratio(change: float, size: float) -> float:
        if size == 0.0:
            return 0.0 if change == 0.0 else math.inf
        return change / size

    sums = [torch.stack([mean(now - before), mean(before)]) for now, before in pairs.values()]
    means = torch.stack([each.float() for each in sums]).tolist()
    return {key: ratio(*each) for key, each in zip(pairs, means, strict=True)}


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
        """Look at a velocity, which must not be changed.

        Args:
            branch: the guidance pass; "guided": what guidance makes of all.
            velocity: the model's output, `[C, F, h, w]`.
            sigma: noise level of the step, 1 noise to 0 clean.
        """
