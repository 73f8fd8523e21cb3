import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.predict import ResultStore, clean_estimate, velocity_to

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


@pytest.mark.parametrize(("factor", "expected"), [(0.0, 6.0), (0.5, 8.0), (1.0, 10.0)])
def test_the_factor_is_the_share_of_the_linear_trend(factor: float, expected: float):
    """Results 2 at noise 1.0 and 6 at 0.8; the line goes through 10 at 0.6."""
    store = ResultStore(factor)
    store.put(0, signal(2.0), sigma=signal(1.0))
    store.put(0, signal(6.0), sigma=signal(0.8))
    assert_close(store.predict(0, sigma=signal(0.6)), signal(expected), ulps=16)


def test_a_single_result_has_no_trend():
    store = ResultStore(1.0)
    store.put(0, signal(2.0), sigma=signal(1.0))
    assert store.predict(0, sigma=signal(0.5)).item() == 2.0


def test_frames_at_their_own_noise_levels_have_trends_of_their_own():
    """The second frame stood still between the results: it is held."""
    store = ResultStore(1.0)
    store.put(-1, torch.tensor([[0.0], [5.0]]), sigma=signal(1.0, 0.0))
    store.put(-1, torch.tensor([[1.0], [7.0]]), sigma=signal(0.5, 0.0))
    assert store.predict(-1, sigma=signal(0.0, 0.0)).tolist() == [[2.0], [7.0]]


def test_order_two_follows_the_parabola_of_the_worked_example():
    """Results 1, 3, 4 at 1.0, 0.8, 0.6: the line gives 5 at 0.4, the parabola 4 (at 0.2: 3)."""
    store = ResultStore(1.0, order=2)
    for value, at in ((1.0, 1.0), (3.0, 0.8), (4.0, 0.6)):
        store.put(0, signal(value), sigma=signal(at))
    assert_close(store.predict(0, sigma=signal(0.4)), signal(4.0), ulps=64)
    assert_close(store.predict(0, sigma=signal(0.2)), signal(3.0), ulps=64)
    half = ResultStore(0.5, order=2, history=store.history)
    assert_close(half.predict(0, sigma=signal(0.2)), signal(3.5), ulps=64)


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


def test_order_two_with_two_results_is_order_one():
    first, second = ResultStore(0.7, order=1), ResultStore(0.7, order=2)
    for store in (first, second):
        store.put(0, signal(2.0), sigma=signal(1.0))
        store.put(0, signal(6.0), sigma=signal(0.8))
    at = signal(0.5)
    assert torch.equal(first.predict(0, sigma=at), second.predict(0, sigma=at))


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
