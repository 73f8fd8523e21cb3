"""Better plans by trial: hill climbing on the error of finished clips.

The dynamic programme adds up local errors, which is not what the eye sees at the end. Starting from
its plan, one computed step is exchanged for one that is reused; the exchange stays if the finished
clips come nearer to those with every step computed. The number of computed steps stays the same.

Source: fixed schedules searched on the final output (arXiv 2609.39343), with swaps as moves; the
cost with its spread over prompts and frames is TRAC's (arXiv 2610.02779).
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from flowcache.tuning.gap import ErrorModel
from flowcache.tuning.plan import Constraints, Plan, with_best_factor

SEED = 0
FIRST_SHARE = 0.5
"""Of the clips, those on which a plan must not be worse, or it is made for no others."""

Errors = Sequence[float]
"""Root mean squared error of each frame of a clip, in pixel levels."""
Measure = Callable[[Plan, int], Errors]
"""Makes a clip by its number with a plan and compares it with the one that computes every step."""


@dataclass(frozen=True)
class Search:
    """What a search came to."""

    plan: Plan
    cost: float
    """Of the plan, in pixel levels."""
    first_cost: float
    """Of the plan that it began with."""
    num_tried: int


def cost_of(clips: Sequence[Errors], *, spread: float) -> float:
    """Return mean + spread * standard deviation of the errors of all frames of all clips.

    Example: frames of 1 and 3 pixel levels have the mean 2 and the standard deviation 1; with a
    spread of 0.5 that is 2.5.
    """
    errors = [error for clip in clips for error in clip]
    return statistics.fmean(errors) + spread * statistics.pstdev(errors)


def climb(
    plan: Plan,
    measure: Measure,
    *,
    model: ErrorModel,
    num_clips: int,
    constraints: Constraints,
    num_trials: int,
    spread: float = 0.0,
) -> Search:
    """Return the best plan that exchanges lead to, after so many trials or when none helps.

    Args:
        model: fits the share of the trend to each plan.
        spread: see `cost_of`.
    """

    def costs(clips: Sequence[Errors]) -> tuple[float, float]:
        first = cost_of(clips[:num_first], spread=spread)
        return first, cost_of(clips, spread=spread)

    num_first = max(round(FIRST_SHARE * num_clips), 1)
    first, best = costs([measure(plan, clip) for clip in range(num_clips)])
    started, tried, draw = best, {plan.steps}, random.Random(SEED)
    options = _exchanges(plan, model, constraints, draw)
    while len(tried) <= num_trials:
        candidate = next((option for option in options if option.steps not in tried), None)
        if candidate is None:
            break
        tried.add(candidate.steps)
        clips = [measure(candidate, clip) for clip in range(num_first)]
        if cost_of(clips, spread=spread) > first:
            continue
        clips += [measure(candidate, clip) for clip in range(num_first, num_clips)]
        own_first, own = costs(clips)
        if own < best:
            plan, first, best = candidate, own_first, own
            options = _exchanges(plan, model, constraints, draw)
    return Search(plan, best, started, len(tried) - 1)


def _exchanges(
    plan: Plan, model: ErrorModel, constraints: Constraints, draw: random.Random
) -> Iterator[Plan]:
    """Yield the plans one exchange away, near exchanges first, each with the factor it wants."""
    num_steps, forced = model.num_steps, set(constraints.forced(model.num_steps))
    pairs = [
        (old, new)
        for old in plan.steps
        if old not in forced
        for new in range(num_steps)
        if new not in plan.steps
    ]
    draw.shuffle(pairs)
    pairs.sort(key=lambda pair: abs(pair[0] - pair[1]))  # stable
    for old, new in pairs:
        steps = tuple(sorted({*plan.steps, new} - {old}))
        if not constraints.allow(steps, num_steps=num_steps):
            continue
        conditional = tuple(sorted(new if step == old else step for step in plan.conditional))
        error = model.plan(steps, plan.predictor, conditional=conditional)
        moved = replace(plan, steps=steps, conditional=conditional, error=error)
        yield with_best_factor(model, moved) if plan.predictor.order else moved
