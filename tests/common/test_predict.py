import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.errors import UserError
from flowcache.policies import ReuseRule, check_guidance, check_reuse, guidance_of
from flowcache.predict import HeldGuidance, ResultStore, clean_estimate, velocity_to

pytestmark = pytest.mark.numeric


def signal(*values: float) -> Tensor:
    return torch.tensor(values)


def test_the_last_result_is_held_bit_for_bit():
    store, value = ResultStore(), torch.randn(2, 3)
    store.put(4, torch.randn(2, 3), sigma=torch.tensor([0.9, 0.9]))
    store.put(4, value, sigma=torch.tensor([0.8, 0.8]))
    assert torch.equal(store.predict(4, sigma=torch.tensor([0.1, 0.1])), value)
    assert list(store.units()) == [4]
    store.drop(4)
    store.drop(4)
    assert list(store.units()) == []


def test_a_linear_velocity_is_extrapolated_exactly_with_factor_1():
    draw = torch.Generator().manual_seed(0)
    start, slope = torch.randn(2, 3, 5, 4, generator=draw)

    def velocity(sigma: Tensor) -> Tensor:
        return start + slope * sigma.view(-1, 1, 1)

    store, sigmas = ResultStore(1.0), [torch.full((3,), s) for s in (0.9, 0.8, 0.65, 0.3)]
    for sigma in sigmas[:2]:
        store.put(0, velocity(sigma), sigma=sigma)
    for sigma in sigmas[2:]:
        predicted = store.predict(0, sigma=sigma)
        assert_close(predicted, velocity(sigma), ulps=64)


@pytest.mark.parametrize(
    ("factor", "order", "results", "at", "expected"),
    [
        (0.0, 1, [(2.0, 1.0), (6.0, 0.8)], 0.6, 6.0),
        (0.5, 1, [(2.0, 1.0), (6.0, 0.8)], 0.6, 8.0),
        (1.0, 1, [(2.0, 1.0), (6.0, 0.8)], 0.6, 10.0),
        (1.0, 1, [(2.0, 1.0)], 0.5, 2.0),
        (0.7, 2, [(2.0, 1.0), (6.0, 0.8)], 0.5, 6.0 + 0.7 * 6.0),
        (1.0, 2, [(1.0, 1.0), (3.0, 0.8), (4.0, 0.6)], 0.4, 4.0),
        (1.0, 2, [(1.0, 1.0), (3.0, 0.8), (4.0, 0.6)], 0.2, 3.0),
        (0.5, 2, [(1.0, 1.0), (3.0, 0.8), (4.0, 0.6)], 0.2, 3.5),
    ],
    ids=[
        "held",
        "half",
        "line",
        "no trend",
        "two for order 2",
        "parabola",
        "further",
        "half of it",
    ],
)
def test_predictions_are_those_worked_by_hand(
    factor: float, order: int, results: list[tuple[float, float]], at: float, expected: float
):
    store = ResultStore(factor, order=order)
    for value, sigma in results:
        store.put(0, signal(value), sigma=signal(sigma))
    assert_close(store.predict(0, sigma=signal(at)), signal(expected), ulps=64)


def test_a_line_and_a_parabola_forecast_while_the_last_result_is_held():
    store, at = ResultStore(is_forecasting=True), {0: signal(0.4), 1: signal(0.4)}
    assert (store.most_results, ResultStore().most_results) == (3, 1)
    for value, sigma in ((1.0, 1.0), (3.0, 0.8), (4.0, 0.6)):
        assert store.forecasts(at) == {}, "three results are needed"
        store.put(0, signal(value), sigma=signal(sigma))
        assert store.predict(0, sigma=signal(0.4)).tolist() == [value]
    # a prediction along the line looks at no more than before
    line = ResultStore(1.0, is_forecasting=True, history=store.history)
    assert_close(line.predict(0, sigma=signal(0.4)), signal(5.0), ulps=64)
    made = store.forecasts(at)
    made = store.forecasts(at)
    assert list(made) == [0]
    assert_close(made[0], torch.tensor([[5.0], [4.0]]), ulps=64)


def test_frames_at_their_own_noise_levels_have_trends_of_their_own():
    """The second frame stood still between the results: it is held."""
    store = ResultStore(1.0)
    store.put(-1, torch.tensor([[0.0], [5.0]]), sigma=signal(1.0, 0.0))
    store.put(-1, torch.tensor([[1.0], [7.0]]), sigma=signal(0.5, 0.0))
    assert store.predict(-1, sigma=signal(0.0, 0.0)).tolist() == [[2.0], [7.0]]


def test_order_two_is_exact_for_a_parabola_at_uneven_steps_and_keeps_three_results():
    draw = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 2, 5, generator=draw)

    def velocity(sigma: float) -> Tensor:
        return a + b * sigma + c * sigma**2

    store = ResultStore(1.0, order=2)
    for at in (1.0, 0.93, 0.8, 0.55):
        store.put(0, velocity(at), sigma=torch.full((2,), at))
    assert len(store.history[0]) == 3
    predicted = store.predict(0, sigma=torch.full((2,), 0.3))
    assert_close(predicted, velocity(0.3), ulps=64)


def test_a_frame_that_waited_has_the_trend_of_the_results_since():
    """Frame 0 stood at noise 1 twice: a line. Frame 1 moved thrice: a parabola."""
    store = ResultStore(1.0, order=2)
    for value, levels in ((1.0, (1.0, 1.0)), (3.0, (1.0, 0.8)), (4.0, (0.8, 0.6))):
        store.put(0, torch.full((2, 1), value), sigma=signal(*levels))
    predicted = store.predict(0, sigma=signal(0.6, 0.4))
    assert_close(predicted.flatten(), signal(5.0, 4.0), ulps=64)


def test_a_velocity_leads_back_to_the_clean_estimate_it_gave():
    """Noisy 1 with velocity -2 at noise 0.5 points to 2; from 1.6 at noise 0.2 that is -2."""
    clean = clean_estimate(signal(1.0), signal(-2.0), sigma=signal(0.5))
    assert clean.tolist() == [2.0]
    velocity = velocity_to(clean, signal(1.6), sigma=signal(0.2))
    assert_close(velocity, signal(-2.0), ulps=16)
    assert velocity_to(clean, signal(2.0), sigma=signal(0.0)).tolist() == [0.0]


# Held guidance ------------------------------------------------------------------------------------


def full_steps(guidance: HeldGuidance, computed: list[int], *, num_steps: int = 8) -> list[int]:
    """Return the computed steps that run all passes."""
    full: list[int] = []
    for step in computed:
        if guidance.is_held(0, step, num_steps=num_steps):
            guidance.take(0)
        else:
            guidance.put(0, torch.zeros(1))
            full.append(step)
    return full


@pytest.mark.parametrize(
    ("guidance", "steps", "full"),
    [
        (HeldGuidance(every=3), [0, 1, 2, 4, 5, 7], [0, 4, 7]),
        (HeldGuidance([3, 5]), [0, 1, 3, 4, 7], [0, 3, 7]),
    ],
    ids=["every third", "listed steps"],
)
def test_some_computed_steps_run_all_passes_the_first_and_the_last_anyway(
    guidance: HeldGuidance, steps: list[int], full: list[int]
):
    assert full_steps(guidance, steps) == full


def test_without_settings_every_step_runs_all_passes_and_nothing_is_kept():
    guidance = guidance_of(ReuseRule())
    assert not guidance.is_on
    assert full_steps(guidance, list(range(8))) == list(range(8))
    assert not guidance.differences


def test_a_difference_made_with_other_scales_is_not_held():
    guidance = HeldGuidance(every=9)
    guidance.put(0, torch.ones(1), scales=(1.5, 7.5))
    assert guidance.is_held(0, 3, num_steps=8, scales=(1.5, 7.5))
    assert not guidance.is_held(0, 3, num_steps=8, scales=(1.0, 0.0))
    assert not guidance.is_held(1, 3, num_steps=8, scales=(1.5, 7.5))
    guidance.drop(0)
    guidance.drop(0)
    assert not guidance.is_held(0, 3, num_steps=8, scales=(1.5, 7.5))


def test_guidance_that_is_not_there_cannot_be_held():
    for rule in (ReuseRule(guidance_every=2), ReuseRule(guidance_steps=[0])):
        check_guidance(rule, num_passes=2)
        with pytest.raises(UserError, match=r"this run has that one pass only .*leave them out"):
            check_guidance(rule, num_passes=1)
    check_guidance(ReuseRule(), num_passes=1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ReuseRule(guidance_steps=[0, 8]), r"guidance_steps are own steps .*: 8 is none"),
        (ReuseRule(guidance_every=2, guidance_steps=[0]), r"both say .*: give one of them"),
    ],
)
def test_values_that_mean_nothing_are_refused(rule: ReuseRule, message: str):
    with pytest.raises(UserError, match=message):
        check_reuse(rule, num_steps=8, least_warmup=1)
