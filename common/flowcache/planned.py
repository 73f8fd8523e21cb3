"""Policies that follow what a calibration has found."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from flowcache.reuse import Decision, ReusePolicy, relative_l1
from flowcache.schedule import Tick
from flowcache.tune.gap import Array

BAND_MARGIN = 0.1
"""Share by which the calibrated band of distances is widened on both sides: few clips are seen."""


@dataclass
class Planned(ReusePolicy):
    """Compute the planned own steps of every chunk.

    The first and the last own step are always computed.
    """

    plans: Sequence[Collection[int]]
    """Computed own steps by chunk; chunks behind the last entry use that one."""
    needs_signals = False

    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        return {
            chunk: Decision(chunk not in stored or self.is_planned(chunk, step, tick.num_steps))
            for chunk, step in tick.steps.items()
        }

    def is_planned(self, chunk: int, step: int, num_steps: int) -> bool:
        """Return whether a chunk's own step is in its plan."""
        own = self.plans[min(chunk, len(self.plans) - 1)]
        return step in own or step == num_steps - 1


@dataclass
class GuardedPlan(Planned):
    """Follow a plan, and compute as well where a chunk changes as no calibration clip did.

    A chunk is computed off plan at an own step at which the distance of its signal to the previous
    tick is outside of the calibrated band: a sudden motion, a change of scene.
    """

    low: Sequence[float] = ()
    """Least distance by own step, widened; see `distance_band`."""
    high: Sequence[float] = ()
    """Largest distance by own step, widened."""
    previous: dict[int, Tensor] = field(default_factory=dict)
    needs_signals = True

    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        distances = relative_l1(
            {c: (signals[c], self.previous[c]) for c in tick.steps if c in self.previous}
        )
        decisions = super().plan(tick, signals, stored=stored)
        for chunk, distance in distances.items():
            step = tick.steps[chunk]
            # "not inside": a distance that is not a number must lead to a computation
            is_inside = self.low[step] <= distance <= self.high[step]
            decisions[chunk] = Decision(decisions[chunk].is_computed or not is_inside, distance)
        self.previous = {chunk: signals[chunk] for chunk in tick.steps}
        return decisions


def distance_band(
    distances: Iterable[tuple[int, float]], *, num_steps: int, margin: float = BAND_MARGIN
) -> tuple[list[float], list[float]]:
    """Return the least and the largest distance seen at each own step, widened by `margin`.

    Args:
        distances: (own step, distance to the previous tick), in any order. The first step has
            none: its band is 0, 0 and never asked for.

    Raises:
        ValueError: a later step has none.
    """
    seen: dict[int, list[float]] = {}
    for step, distance in distances:
        seen.setdefault(step, []).append(distance)
    missing = set(range(1, num_steps)) - set(seen)
    if missing:
        raise ValueError(f"no distance was measured at own step {min(missing)}")
    low = [0.0, *(min(seen[step]) * (1 - margin) for step in range(1, num_steps))]
    high = [0.0, *(max(seen[step]) * (1 + margin) for step in range(1, num_steps))]
    return low, high


@dataclass
class MagCache(ReusePolicy):
    """Reuse while the magnitudes of the skipped results stay near that of the stored one.

    Each skipped step multiplies the chunk's ratio by the calibrated one of that step, and adds
    ``|1 - ratio|`` to its error. The chunk is computed when the error reaches `threshold` or
    `most_reuses` steps were skipped. Example with ratios 0.9 and threshold 0.25: the errors are
    0.1 after one reuse and 0.1 + 0.19 = 0.29 with a second one, which is computed instead.

    Source: MagCache (arXiv 2506.09045), here with every chunk for itself.
    """

    ratios: Sequence[float]
    """Magnitude of the result of each own step over that of the step before; see
    `magnitude_ratios`."""
    threshold: float
    warmup_steps: int
    most_reuses: int
    skipped: dict[int, tuple[float, float, int]] = field(default_factory=dict)
    """Chunk -> ratio, error and steps since its last computed one."""
    needs_signals = False

    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        return {
            chunk: self._decide(
                chunk,
                step,
                is_forced=step < self.warmup_steps
                or step == tick.num_steps - 1
                or chunk not in stored,
            )
            for chunk, step in tick.steps.items()
        }

    def computed_anyway(self, chunks: Collection[int]) -> None:
        for chunk in chunks:
            self.skipped.pop(chunk, None)

    def _decide(self, chunk: int, step: int, *, is_forced: bool) -> Decision:
        ratio, error, count = self.skipped.get(chunk, (1.0, 0.0, 0))
        ratio *= self.ratios[step]
        error += abs(1 - ratio)
        is_computed = is_forced or not error < self.threshold or count >= self.most_reuses
        if is_computed:
            self.skipped.pop(chunk, None)
        else:
            self.skipped[chunk] = (ratio, error, count + 1)
        return Decision(is_computed, accumulated=error)


def magnitude_ratios(gram_NN: Array) -> list[float]:
    """Return |v_k| / |v_{k-1}| for every own step, root mean squares; 1 for the first step."""
    norm_N = np.sqrt(np.diag(gram_NN))
    return [1.0, *(norm_N[1:] / norm_N[:-1]).tolist()]
