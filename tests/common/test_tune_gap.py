import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close

from flowcache.predict import ResultStore, clean_estimate, velocity_to
from flowcache.tuning.gap import ErrorModel, Predictor, gap_coefficients, interpolated_gains

pytestmark = pytest.mark.numeric

SIGMAS = np.array([1.0, 0.9, 0.75, 0.6, 0.4, 0.25, 0.1, 0.0])
NUM_STEPS = len(SIGMAS) - 1


def random_model(seed: int = 0) -> ErrorModel:
    velocities_ND = np.random.default_rng(seed).normal(size=(NUM_STEPS, 40))
    return ErrorModel(velocities_ND @ velocities_ND.T, SIGMAS)


def test_the_gap_in_the_example_costs_what_the_example_says():
    model = ErrorModel(np.eye(3), np.array([1.0, 0.8, 0.5, 0.0]))
    c_N = gap_coefficients([(0, 0)], 2, sigmas=model.sigmas, predictor=Predictor())
    np.testing.assert_allclose(c_N, [0.3, -0.3, 0.0])
    assert model.gap([0], 2, Predictor()) == pytest.approx(0.18)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_the_weights_are_those_of_the_store_that_fills_in_for_reused_steps(
    order: int, factor: float
):
    weights = Predictor(order, factor).weights([0, 1, 3], 5, sigmas=SIGMAS)
    store = ResultStore(factor, order=order)
    values = torch.randn(NUM_STEPS, 2, 3, generator=torch.Generator().manual_seed(1))
    for step in (0, 1, 3):
        store.put(0, values[step], sigma=torch.full((2,), float(SIGMAS[step])))
    predicted = store.predict(0, sigma=torch.full((2,), float(SIGMAS[5])))
    expected = sum(weight * values[step] for step, weight in weights.items())
    assert_close(predicted, expected, ulps=64)


def test_weights_add_up_to_one():
    for order in (0, 1, 2):
        weights = Predictor(order, 0.7).weights([0, 1, 2, 4], 6, sigmas=SIGMAS)
        assert sum(weights.values()) == pytest.approx(1)


def test_velocities_that_follow_a_line_cost_nothing_with_a_full_linear_trend():
    start, slope = np.random.default_rng(2).normal(size=(2, 9))
    velocities_ND = start + SIGMAS[:-1, None] * slope
    model = ErrorModel(velocities_ND @ velocities_ND.T, SIGMAS)
    assert model.plan([0, 1, 6], Predictor(1, 1.0)) == pytest.approx(0, abs=1e-12)
    assert model.plan([0, 1, 6], Predictor(0)) > 1e-3


def test_a_gain_weights_the_squared_error_of_its_steps():
    model = random_model()
    gains = np.array([9.0, 9, 9, 4, 4, 4, 1])
    weighted = ErrorModel(model.gram, SIGMAS, gains)
    held = Predictor(0)
    assert weighted.gap([0], 3, held) == pytest.approx(9 * model.gap([0], 3, held))
    assert weighted.gap([3], 6, held) == pytest.approx(4 * model.gap([3], 6, held))


def test_a_constant_gain_changes_neither_order_nor_factor():
    model = random_model(5)
    scaled = ErrorModel(model.gram, SIGMAS, np.full(NUM_STEPS, 7.0))
    steps = [0, 1, 4, 6]
    assert scaled.plan(steps, Predictor(1, 0.4)) == pytest.approx(
        7 * model.plan(steps, Predictor(1, 0.4))
    )
    assert scaled.best_factor(steps, order=1) == pytest.approx(model.best_factor(steps, order=1))


def test_gains_between_measured_ones_follow_their_logarithms():
    gains = interpolated_gains({1.0: 100.0, 3.0: 1.0}, num_steps=5)
    assert gains.tolist() == pytest.approx([100, 100, 10, 1, 1])


def test_a_plan_of_all_steps_has_no_error():
    model = random_model()
    assert model.plan(range(NUM_STEPS), Predictor(1)) == 0.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ErrorModel(np.eye(6), SIGMAS), "7 x 7"),
        (lambda: ErrorModel(np.eye(7), SIGMAS[::-1].copy()), "fall"),
        (lambda: ErrorModel(np.eye(7), SIGMAS, joint=np.eye(7)), "14 x 14"),
        (
            lambda: ErrorModel(np.eye(7), SIGMAS).gap([0, 1], 6, Predictor(), conditional=[1]),
            "joint",
        ),
        (lambda: Predictor(3), "order"),
    ],
)
def test_what_does_not_fit_together_is_refused(make: Callable[[], object], words: str):
    with pytest.raises(ValueError, match=words):
        make()


# Clean estimates and held guidance ----------------------------------------------------------------


def guided_model(seed: int = 0) -> tuple[ErrorModel, np.ndarray, np.ndarray]:
    """Return the errors of guided and conditional velocities, and these."""
    guided_ND, plain_ND = np.random.default_rng(seed).normal(size=(2, NUM_STEPS, 40))
    both = np.concatenate([guided_ND, plain_ND])
    return ErrorModel(guided_ND @ guided_ND.T, SIGMAS, joint=both @ both.T), guided_ND, plain_ND


def walked(
    predictor: Predictor, computed: list[int], conditional: list[int]
) -> tuple[float, float]:
    """Return the predicted error of a plan, and that of a run that is made step by step.

    The run goes as the samplers do, from the exact latent in front of every gap.
    """
    model, guided_ND, plain_ND = guided_model()
    sizes = np.diff(SIGMAS)
    exact = np.concatenate([np.zeros((1, 40)), (sizes[:, None] * guided_ND).cumsum(axis=0)])
    store = ResultStore(predictor.factor if predictor.order else 0, order=max(predictor.order, 1))
    total, added = 0.0, np.zeros(40)
    for start, stop in itertools.pairwise(computed):
        x = torch.tensor(exact[start])[None]
        for step in range(start, stop):
            at = torch.tensor([SIGMAS[step]])
            if step == start:
                added = added if step in conditional else guided_ND[step] - plain_ND[step]
                velocity = torch.tensor(plain_ND[step] + added)[None]
                is_clean = predictor.quantity == "clean"
                value = clean_estimate(x, velocity, sigma=at) if is_clean else velocity
                store.put(0, value, sigma=at)
            else:
                velocity = store.predict(0, sigma=at)
                if predictor.quantity == "clean":
                    velocity = velocity_to(velocity, x, sigma=at)
            x = x + float(sizes[step]) * velocity
        total += float(((x[0].numpy() - exact[stop]) ** 2).sum())
    return model.plan(computed, predictor, conditional=conditional), total


@pytest.mark.parametrize("quantity", ["velocity", "clean"])
@pytest.mark.parametrize(("order", "factor"), [(0, 1.0), (1, 0.6), (1, 1.0), (2, 0.8)])
@pytest.mark.parametrize("conditional", [[], [2], [2, 3], [1, 3]])
def test_the_gram_form_equals_the_error_of_a_run_with_the_samplers_store(
    quantity: Any, order: int, factor: float, conditional: list[int]
):
    predictor = Predictor(order, factor, quantity)
    predicted, found = walked(predictor, [0, 1, 2, 3, 6], conditional)
    assert predicted == pytest.approx(found, rel=1e-5)
    assert found > 0


def test_a_held_clean_estimate_costs_what_a_held_velocity_does():
    model = random_model(1)
    plans = [model.plan([0, 2, 6], Predictor(0, quantity=q)) for q in ("velocity", "clean")]
    assert plans[0] == pytest.approx(plans[1], rel=1e-9)
    trends = [model.plan([0, 2, 6], Predictor(1, 0.5, q)) for q in ("velocity", "clean")]
    assert trends[0] != pytest.approx(trends[1], rel=1e-2)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("quantity", ["velocity", "clean"])
def test_no_factor_does_better_than_the_fitted_one(order: int, quantity: Any):
    model, _, _ = guided_model(4)
    steps, held = [0, 1, 2, 4, 6], [2]
    best = model.best_factor(steps, order=order, quantity=quantity, conditional=held)
    error = model.plan(steps, Predictor(order, best, quantity), conditional=held)
    for other in (best - 0.1, best + 0.1, 0.0):
        assert model.plan(steps, Predictor(order, other, quantity), conditional=held) > error
