"""Which steps are computed, without a trained model: decisions from the published distance curve.

Random weights know nothing of how much a chunk changes, so the decisions of a run with random
weights mean nothing. Instead FlowCache's own rule is applied to the published curve of the change
per own step, with the threshold at which it computes the published share of the FLOPs.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.policies import Decision, FlowCache, Policies, Replay, ReusePolicy
from flowcache.runtime.model import Work
from flowcache.runtime.record import Record, check_replay, replay_policies
from flowcache.runtime.stats import RunStats
from flowcache.schedule import Tick, staggered

NUM_HALVINGS = 16
"""Of the range in which a threshold is looked for."""
CACHING = "caching"
"""Stage in which decisions are made."""


@dataclass(frozen=True)
class Curve:
    """Relative change of a chunk's signal from one own step to the next.

    Attributes:
        num_steps: own steps of a chunk in the published run.
        points: some own steps and their distances (dimensionless); straight lines of the logarithm
            lie between and beyond them.
    """

    num_steps: int
    points: tuple[tuple[int, float], ...]

    def at(self, step: int) -> float:
        """Return the distance of an own step to the one before it; steps count from 1 here.

        Example: with 0.01 at step 10 and 0.04 at step 20, step 15 has 0.02.
        """
        pairs = list(pairwise(self.points))
        (left, low), (right, high) = next((p for p in pairs if step <= p[1][0]), pairs[-1])
        share = (step - left) / (right - left)
        return math.exp((1 - share) * math.log(low) + share * math.log(high))

    def distances(self, num_steps: int) -> list[float]:
        """Return the distances of own steps 1, 2, ... of a run with fewer, longer steps.

        A longer step changes by as much as the steps that it replaces, together.
        """
        if num_steps < 1 or self.num_steps % num_steps:
            raise UserError(
                f"the number of steps must divide the published {self.num_steps}, not {num_steps}"
            )
        factor = self.num_steps // num_steps
        return [
            sum(self.at(step) for step in range((own - 1) * factor + 1, own * factor + 1))
            for own in range(1, num_steps)
        ]


@dataclass(frozen=True)
class Pattern:
    """Which own steps of a chunk are computed.

    Attributes:
        is_computed: by own step.
        threshold: of the accumulated distance, with which FlowCache's rule gives them.
        warmup_steps: first own steps, which are always computed.
    """

    is_computed: tuple[bool, ...]
    threshold: float
    warmup_steps: int

    def share(self, costs: Sequence[float]) -> float:
        """Return the share of the cost of all steps that the computed ones have."""
        spent = sum(cost for cost, own in zip(costs, self.is_computed, strict=True) if own)
        return spent / sum(costs)


def fit_pattern(
    distances: Sequence[float], *, warmup_steps: int, costs: Sequence[float], share: float
) -> Pattern:
    """Find the threshold with which the computed steps come nearest to a share of the cost of all.

    Args:
        distances: of own steps 1, 2, ...
        costs: of own steps 0, 1, 2, ..., in any unit.
        share: wanted, 0..1.
    """
    low, high = min(distances), sum(distances)
    tried: list[Pattern] = []
    for _ in range(NUM_HALVINGS):
        threshold = math.sqrt(low * high)
        tried.append(pattern_at(distances, threshold, warmup_steps))
        if tried[-1].share(costs) > share:
            low = threshold
        else:
            high = threshold
    return min(tried, key=lambda pattern: abs(pattern.share(costs) - share))


def pattern_at(distances: Sequence[float], threshold: float, warmup_steps: int) -> Pattern:
    """Let FlowCache's rule decide about one chunk whose signal changes by these distances.

    Args:
        distances: of own steps 1, 2, ...
    """
    policy = FlowCache(threshold, warmup_steps)
    signal, decided = torch.ones((), dtype=torch.float64), list[bool]()
    for tick in staggered([0], num_steps=len(distances) + 1, lag=1):
        plan = policy.plan(tick, {0: signal}, stored=[0] if tick.index else [])
        decided.append(plan[0].is_computed)
        if tick.index < len(distances):
            signal = signal * (1 + distances[tick.index])
    return Pattern(tuple(decided), threshold, warmup_steps)


def make_trace(pattern: Pattern, work: Work) -> Record:
    """Return the decisions of a run in which every chunk computes the same own steps."""
    return {
        "decisions": [
            {
                "segment": segment,
                "tick": tick.index,
                "chunk": chunk,
                "step": step,
                "branch": branch,
                "computed": pattern.is_computed[step],
            }
            for segment, own in enumerate(work.segments)
            for tick in own.ticks
            for chunk, step in tick.steps.items()
            for branch in work.branches
        ]
    }


@dataclass
class Costed(ReusePolicy):
    """Decide as recorded, at the price of deciding anew: signals are made and compared."""

    replay: Replay
    rule: FlowCache
    stats: RunStats

    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        """Compare the signals, then decide as recorded; see `ReusePolicy.plan`."""
        with self.stats.stage(CACHING):
            self.rule.plan(tick, signals, stored=stored)
        return self.replay.plan(tick, signals, stored=stored)

    def computed_anyway(self, chunks: Collection[int]) -> None:
        """Refuse a run that computes more than was recorded; see `Replay.computed_anyway`."""
        self.replay.computed_anyway(chunks)


def policies_at(
    pattern: Pattern, work: Work, stats: RunStats, record: Record | None = None
) -> Policies:
    """Return what makes the policies of a run that follows a pattern or a record.

    Args:
        record: of another run; with it the pattern only says with which threshold and warm-up
            signals are compared.
    """
    record = record or make_trace(pattern, work)
    ticks = {number: segment.ticks for number, segment in enumerate(work.segments)}
    check_replay(record, ticks=ticks, branches=work.branches)

    def policy_of(*, segment: int, branch: str) -> ReusePolicy:
        return Costed(
            replay_policies(record, segment=segment, branch=branch),
            FlowCache(pattern.threshold, pattern.warmup_steps),
            stats,
        )

    return policy_of
