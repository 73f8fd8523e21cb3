"""Thresholds that make an adaptive rule meet a budget, and the factor that suits what it computes.

Shares of FLOPs are measured on calibration clips, threshold by threshold, and kept row by row.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flowcache.errors import UserError
from flowcache.runtime.run import Clip
from flowcache.tune.gap import ErrorModel
from flowcache.tune.runs import Prompt, Runs
from flowcache.tune.study import Rows

MOST_TRIALS = 8
"""Thresholds tried per budget, those tried for other budgets not counted."""
WIDEST = 16.0
"""First step of the search, as a ratio of thresholds."""
LEAST_THRESHOLD, MOST_THRESHOLD = 1e-6, 1e6
EVERY_STEP = ("reuse.policy=vanilla",)


@dataclass(frozen=True)
class Outcome:
    """What a rule does on the calibration clips."""

    flops: float
    """Share of the FLOPs of every step."""
    steps: list[list[int]]
    """Computed own steps of every chunk of every clip."""


class Trials:
    """Measures rules on calibration clips, each once."""

    def __init__(self, runs: Runs, rows: Rows, prompts: Sequence[Prompt]) -> None:
        """Keep what is measured in `rows`."""
        self.runs = runs
        self.rows = rows
        self.prompts = prompts

    def outcome(self, settings: Sequence[str], *, preset: str | None = None) -> Outcome:
        """Return what a rule does, measured now or before."""
        found = [self._row(prompt, settings, preset) for prompt in self.prompts]
        whole = [self._row(prompt, EVERY_STEP, None) for prompt in self.prompts]
        flops = statistics.fmean(
            own["flops"] / every["flops"] for own, every in zip(found, whole, strict=True)
        )
        return Outcome(flops, [steps for row in found for steps in row["steps"]])

    def _row(self, prompt: Prompt, settings: Sequence[str], preset: str | None) -> dict[str, Any]:
        key = {"index": prompt.index, "settings": list(settings), "preset": preset}
        known = self.rows.find(**key)
        if known:
            return known[0]
        clip = self.runs.render(settings, prompt=prompt.text, seed=prompt.seed, preset=preset)
        self.rows.add({**key, "flops": clip.stats.computed_flops, "steps": computed_steps(clip)})
        return self.rows.find(**key)[0]


def computed_steps(clip: Clip) -> list[list[int]]:
    """Return the own steps that each chunk computed in the first guidance branch, ascending."""
    branch = clip.stats.passes[0].branch
    steps: dict[tuple[int, int], list[int]] = {}
    for row in clip.stats.passes:
        if row.branch == branch and row.is_computed:
            steps.setdefault((row.segment, row.chunk), []).append(row.step)
    return list(steps.values())


def find_threshold(
    flops_of: Callable[[float], float], wanted: float, *, start: float, tolerance: float
) -> float:
    """Return the threshold whose share of FLOPs is nearest to a wanted one.

    The share falls as the threshold rises. From `start` the threshold is multiplied until the
    wanted share lies between two tried ones; then the interval is halved, in logarithms.

    Args:
        flops_of: measures the share of a threshold.
        tolerance: of the share; the search ends there.

    Raises:
        UserError: no threshold comes near.
    """
    tried = {start: flops_of(start)}

    def nearest() -> float:
        return min(tried, key=lambda threshold: abs(tried[threshold] - wanted))

    while abs(tried[nearest()] - wanted) > tolerance and len(tried) < MOST_TRIALS:
        below = [threshold for threshold, flops in tried.items() if flops > wanted]
        above = [threshold for threshold, flops in tried.items() if flops <= wanted]
        if below and above:
            threshold = math.sqrt(max(below) * min(above))
        else:
            threshold = max(tried) * WIDEST if below else min(tried) / WIDEST
        if not LEAST_THRESHOLD < threshold < MOST_THRESHOLD:
            raise UserError(
                f"no threshold between {LEAST_THRESHOLD:g} and {MOST_THRESHOLD:g} makes a rule "
                f"spend {wanted:.3f} of the FLOPs: the nearest is {tried[nearest()]:.3f}"
            )
        tried[threshold] = flops_of(threshold)
    return nearest()


def suiting_factor(model: ErrorModel, steps: Sequence[Sequence[int]]) -> float:
    """Return the factor of linear extrapolation that suits chunks of these computed steps."""
    return statistics.fmean(model.best_factor(own, order=1) for own in steps)
