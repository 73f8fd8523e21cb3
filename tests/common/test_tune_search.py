"""The search for better plans, on made-up errors of finished clips."""

from collections.abc import Callable

import numpy as np
import pytest

from flowcache.tuning.gap import ErrorModel, Predictor
from flowcache.tuning.plan import Constraints, Plan
from flowcache.tuning.search import climb, cost_of

NUM_STEPS = 8
MODEL = ErrorModel(np.eye(NUM_STEPS), np.linspace(1, 0, NUM_STEPS + 1))
START = Plan((0, 1, 2, 7), Predictor(0), 0.5)
BEST = {0, 3, 5, 7}


def miss(plan: Plan, clip: int) -> list[float]:
    """Return errors that fall as the plan nears the best one: one level per wrong step."""
    return [1.0 + clip + len(BEST - set(plan.steps))] * 2


def search(
    measure: Callable[[Plan, int], list[float]] = miss,
    *,
    num_trials: int = 100,
    constraints: Constraints | None = None,
    plan: Plan = START,
    spread: float = 0.0,
):
    return climb(
        plan,
        measure,
        model=MODEL,
        num_clips=2,
        constraints=constraints or Constraints(),
        num_trials=num_trials,
        spread=spread,
    )


def test_the_cost_is_the_mean_error_of_all_frames_and_a_share_of_its_spread():
    assert cost_of([[1, 3], [5]], spread=0) == 3
    # deviations -2 0 2: the variance is 8/3
    assert cost_of([[1, 3], [5]], spread=0.5) == pytest.approx(3 + 0.5 * (8 / 3) ** 0.5)


def test_exchanges_lead_to_the_best_plan_of_the_same_cost():
    found = search()
    assert found.plan.steps == (0, 3, 5, 7)
    assert (found.first_cost, found.cost) == (1.5 + 2, 1.5)
    # the error of the closed form is that of the new plan: gaps 1 2, 4 and 6
    assert found.plan.error == pytest.approx(MODEL.plan((0, 3, 5, 7), Predictor(0)))


def test_no_more_plans_are_tried_than_asked_for_and_none_twice():
    seen: list[tuple[int, ...]] = []

    def measure(plan: Plan, clip: int) -> list[float]:
        if clip == 0:
            seen.append(plan.steps)
        return [1.0]  # no exchange helps

    assert search(measure, num_trials=5).num_tried == 5
    assert len(seen) == len(set(seen)) == 6
    seen.clear()
    # two steps may be exchanged for four: eight plans are one exchange away
    assert search(measure, num_trials=100).num_tried == 8
    assert search(measure).plan == START


def test_a_plan_that_is_worse_on_the_first_clips_is_made_for_no_others():
    made: list[int] = []

    def measure(plan: Plan, clip: int) -> list[float]:
        made.append(clip)
        return [1.0 if plan == START else 2.0]

    search(measure, num_trials=8)
    assert made == [0, 1, *[0] * 8]


def test_plans_keep_to_the_constraints_and_the_trend_is_fitted_anew():
    plan = Plan((0, 1, 4, 7), Predictor(1, 0.9), 0.5)
    tried: list[Plan] = []

    def measure(candidate: Plan, clip: int) -> list[float]:
        tried.append(candidate)
        return miss(candidate, clip)

    limits = Constraints(most_reuses=3)
    search(measure, constraints=limits, plan=plan)
    assert all(limits.allow(each.steps, num_steps=NUM_STEPS) for each in tried)
    for each in tried[2:]:
        wanted = MODEL.best_factor(each.steps, order=1)
        assert each.predictor.factor == pytest.approx(wanted)


def test_a_spread_prefers_even_errors():
    def measure(plan: Plan, _clip: int) -> list[float]:
        return [2.0, 2.0] if plan == START else [0.0, 3.9]

    assert search(measure).plan != START
    assert search(measure, spread=1.0).plan == START
