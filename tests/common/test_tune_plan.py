import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from flowcache.errors import UserError
from flowcache.tuning.gap import ErrorModel, Predictor, points_of
from flowcache.tuning.plan import (
    Constraints,
    Forecast,
    Target,
    best_plans,
    choose,
    fit_costs,
    fit_pixel_scale,
    fitted_plans,
    least_error_plans,
    parse_target,
    to_psnr,
)


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


@pytest.mark.parametrize("most_reuses", [0, 1, 2, 3, 8])
@pytest.mark.parametrize(("warmup", "final"), [(1, 1), (3, 2), (9, 1)])
def test_no_plan_computes_fewer_steps_than_is_said(most_reuses: int, warmup: int, final: int):
    constraints = Constraints(warmup, final, most_reuses)
    plans = best_plans(smooth_model(), Predictor(0), constraints=constraints)
    assert min(plans) == constraints.fewest(9)


def test_the_plan_of_all_steps_has_no_error():
    plans = best_plans(smooth_model(), Predictor(1), constraints=Constraints(most_reuses=3))
    assert plans[9].steps == tuple(range(9))
    assert plans[9].error == 0.0


@pytest.mark.parametrize(
    ("num_steps", "constraints", "counts"),
    [
        (1, Constraints(), [1]),
        (2, Constraints(), [2]),
        (4, Constraints(), [2, 3, 4]),
        (9, Constraints(most_reuses=0), [9]),
    ],
)
def test_few_steps_have_the_plans_that_they_leave(
    num_steps: int, constraints: Constraints, counts: list[int]
):
    assert list(least_error_plans(smooth_model(num_steps), constraints=constraints)) == counts


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


@pytest.mark.parametrize(
    ("constraints", "name"), [({"warmup_steps": 0}, "warmup_steps"), ({"most_reuses": -1}, "most_")]
)
def test_constraints_that_mean_nothing_are_refused(constraints: dict[str, int], name: str):
    with pytest.raises(UserError, match=name):
        Constraints(**constraints)


# Steps with the conditional pass alone ------------------------------------------------------------


def guided_model(num_steps: int = 6, seed: int = 0) -> ErrorModel:
    """Return the errors of guided and conditional velocities that walk at random."""
    draw = np.random.default_rng(seed)
    plain_ND = draw.normal(size=(num_steps, 30)).cumsum(axis=0)
    added_ND = 0.5 * draw.normal(size=(num_steps, 30)).cumsum(axis=0)
    both = np.concatenate([plain_ND + added_ND, plain_ND])
    gram = both @ both.T
    sigmas = np.linspace(1, 0, num_steps + 1) ** 1.3
    return ErrorModel(gram[:num_steps, :num_steps], sigmas, joint=gram)


def every_choice(
    num_steps: int, constraints: Constraints
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield all steps that may be computed, with all that may run the conditional pass alone."""
    forced = constraints.forced(num_steps)
    for kinds in itertools.product((0, 1, 2), repeat=num_steps):
        steps = tuple(step for step, kind in enumerate(kinds) if kind)
        conditional = tuple(step for step, kind in enumerate(kinds) if kind == 1)
        if set(conditional) & set(forced) or not constraints.allow(steps, num_steps=num_steps):
            continue
        spans = [step - anchor for step, anchor in points_of(steps, conditional)]
        if max(spans) <= constraints.most_reuses:
            yield steps, conditional


@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize(
    "predictor", [Predictor(0), Predictor(1, 0.5), Predictor(1, 0.7, "clean"), Predictor(2, 0.8)]
)
@pytest.mark.parametrize("constraints", [Constraints(), Constraints(most_reuses=2)])
def test_the_programme_with_conditional_steps_finds_what_exhaustive_search_finds(
    predictor: Predictor, num_passes: int, constraints: Constraints
):
    model = guided_model()
    best: dict[float, float] = {}
    for steps, conditional in every_choice(6, constraints):
        cost = round(len(steps) - len(conditional) + len(conditional) / num_passes, 9)
        error = model.plan(steps, predictor, conditional=conditional)
        best[cost] = min(best.get(cost, error), error)
    found = best_plans(model, predictor, constraints=constraints, num_passes=num_passes)
    assert {round(cost, 9) for cost in found} == set(best)
    for cost, plan in found.items():
        assert plan.cost == pytest.approx(cost)
        assert plan.error == pytest.approx(best[round(cost, 9)], rel=1e-9, abs=1e-12)
        again = model.plan(plan.steps, predictor, conditional=plan.conditional)
        assert plan.error == pytest.approx(again, rel=1e-9, abs=1e-12)
    assert any(plan.conditional for plan in found.values())


def test_the_least_error_is_taken_over_all_predictors():
    model = guided_model(8, seed=3)
    best = least_error_plans(model, constraints=Constraints(), num_passes=2)
    for order in (0, 1, 2):
        for quantity in ("velocity", "clean"):
            for cost, plan in fitted_plans(
                model, order=order, constraints=Constraints(), quantity=quantity
            ).items():
                assert best[cost].error <= plan.error + 1e-12
    guided = fitted_plans(model, order=1, constraints=Constraints(), num_passes=2)
    assert best.keys() == guided.keys()
    assert len({plan.predictor.order for plan in best.values()}) > 1
    for plan in best.values():
        found = model.plan(plan.steps, plan.predictor, conditional=plan.conditional)
        assert plan.error == pytest.approx(found, rel=1e-9, abs=1e-12)


# Forecasts and targets ----------------------------------------------------------------------------

FORECASTS = [
    Forecast(count, speedup=20 / count, flops=count / 20, psnr=20.0 + count, seconds=count / 10)
    for count in range(4, 21)
]


@pytest.mark.parametrize(
    ("text", "count"),
    [("flops=0.36", 7), ("speedup=3", 6), ("seconds=1.25", 12), ("psnr=32", 12), ("flops=1", 20)],
)
def test_the_target_decides_how_many_steps_are_computed(text: str, count: int):
    assert choose(parse_target(text), FORECASTS).cost == count


def test_a_longer_plan_that_is_worse_is_not_chosen():
    worse = [*FORECASTS, Forecast(8, 20 / 8, 0.35, 10.0, 0.8)]
    assert choose(Target("flops", 0.36), worse).psnr == 27.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speedup=9", "cannot be reached: at most 5"),
        ("flops=0.1", "cannot be reached: at least 0.2"),
        ("psnr=99", "cannot be reached: at most 40"),
        *((text, "must be one of the kinds") for text in ("", "fast", "a=1")),
        *((text, "must be a number above 0") for text in ("psnr", "psnr=", "psnr=nan", "flops=-1")),
        ("flops=35", "must be at most 1"),
        ("speedup=0.5", "must be 1 or more"),
    ],
)
def test_an_impossible_target_is_refused_in_one_line(text: str, words: str):
    with pytest.raises(UserError, match=words) as caught:
        choose(parse_target(text), FORECASTS)
    assert "\n" not in str(caught.value)


def test_costs_between_two_measured_runs_lie_on_a_line():
    costs = fit_costs({30: (1.0, 6.0), 10: (0.4, 3.0)}, num_steps=30)
    forecast = costs.forecast(20, psnr=33.0)
    assert forecast.flops == pytest.approx(0.7)
    assert forecast.seconds == pytest.approx(4.5)
    assert forecast.speedup == pytest.approx(6 / 4.5)
    assert forecast.psnr == 33.0


def test_one_run_gives_no_costs():
    with pytest.raises(ValueError, match="two runs"):
        fit_costs({30: (1.0, 6.0)}, num_steps=30)


def test_the_scale_turns_the_predicted_error_into_the_measured_psnr():
    scale = fit_pixel_scale([(0.5, 50.0), (0.5, 200.0)])
    assert scale == pytest.approx(200.0)
    assert to_psnr(255**2 / 200 / 1000, scale=scale) == pytest.approx(30.0)
    assert to_psnr(0.0, scale=scale) == math.inf
