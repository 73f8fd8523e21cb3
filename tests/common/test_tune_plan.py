import itertools

import numpy as np
import pytest

from flowcache.errors import UserError
from flowcache.tune.gap import ErrorModel, Predictor
from flowcache.tune.plan import Constraints, best_plans, fitted_plans


def smooth_model(num_steps: int = 9, seed: int = 0) -> ErrorModel:
    """Return the errors of velocities that walk at random."""
    walk_ND = np.random.default_rng(seed).normal(size=(num_steps, 30)).cumsum(axis=0)
    sigmas = np.linspace(1, 0, num_steps + 1) ** 1.3
    return ErrorModel(walk_ND @ walk_ND.T, sigmas)


def all_plans(num_steps: int, count: int, constraints: Constraints) -> list[tuple[int, ...]]:
    return [
        steps
        for steps in itertools.combinations(range(num_steps), count)
        if constraints.allow(steps, num_steps=num_steps)
    ]


@pytest.mark.parametrize("predictor", [Predictor(0), Predictor(1, 0.5), Predictor(2, 0.8)])
@pytest.mark.parametrize(
    "constraints", [Constraints(), Constraints(warmup_steps=3, final_steps=2, most_reuses=2)]
)
def test_the_programme_finds_what_exhaustive_search_finds(
    predictor: Predictor, constraints: Constraints
):
    model = smooth_model()
    found = best_plans(model, predictor, constraints=constraints)
    for count in range(1, 10):
        errors = {steps: model.plan(steps, predictor) for steps in all_plans(9, count, constraints)}
        assert (count in found) == bool(errors)
        if errors:
            plan = found[count]
            assert plan.steps in errors
            assert plan.error == pytest.approx(min(errors.values()), rel=1e-9, abs=1e-12)
            assert plan.error == pytest.approx(errors[plan.steps], rel=1e-9, abs=1e-12)


def test_the_plan_of_all_steps_is_there_and_has_no_error():
    plans = best_plans(smooth_model(), Predictor(1), constraints=Constraints(most_reuses=3))
    assert plans[9].steps == tuple(range(9))
    assert plans[9].error == 0.0


def test_a_single_step_is_planned():
    plans = best_plans(smooth_model(1), Predictor(0), constraints=Constraints())
    assert [plan.steps for plan in plans.values()] == [(0,)]


def test_without_reuses_only_the_plan_of_all_steps_is_left():
    plans = best_plans(smooth_model(), Predictor(0), constraints=Constraints(most_reuses=0))
    assert list(plans) == [9]


def test_fitting_the_factor_never_costs():
    model = smooth_model(seed=4)
    held = best_plans(model, Predictor(0), constraints=Constraints())
    half = best_plans(model, Predictor(1, 0.5), constraints=Constraints())
    fitted = fitted_plans(model, order=1, constraints=Constraints())
    assert fitted.keys() == held.keys()
    for count, plan in fitted.items():
        assert plan.error <= min(held[count].error, half[count].error) + 1e-12
        assert plan.error == pytest.approx(model.plan(plan.steps, plan.predictor))


def test_more_computed_steps_never_cost_with_a_held_velocity_along_a_straight_walk():
    line_N = np.linspace(0, 1, 8)
    model = ErrorModel(np.outer(line_N, line_N), np.linspace(1, 0, 9))
    plans = best_plans(model, Predictor(0), constraints=Constraints())
    errors = [plans[count].error for count in sorted(plans)]
    assert errors == sorted(errors, reverse=True)


def test_constraints_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="warmup_steps"):
        Constraints(warmup_steps=0)
    with pytest.raises(UserError, match="most_reuses"):
        Constraints(most_reuses=-1)
