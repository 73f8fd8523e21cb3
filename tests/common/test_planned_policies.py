import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flowcache.policies import (
    GuardedPlan,
    MagCache,
    Planned,
    ReusePolicy,
    Stride,
)
from flowcache.schedule import staggered
from flowcache.tune.gram import distance_band, magnitude_ratios


def computed_steps(
    policy: ReusePolicy, *, num_steps: int, signals: list[float] | None = None, chunks: int = 1
) -> dict[int, list[int]]:
    """Run a policy; return the own steps that each chunk computed.

    Args:
        signals: the signal at each tick, the same for all chunks; None: a constant.
    """
    stored: set[int] = set()
    computed: dict[int, list[int]] = {chunk: [] for chunk in range(chunks)}
    for tick in staggered(range(chunks), num_steps=num_steps, lag=2):
        value = 1.0 if signals is None else signals[tick.index]
        now: dict[int, Tensor] = {chunk: torch.full((3,), float(value)) for chunk in tick.steps}
        for chunk, decision in policy.plan(tick, now, stored=stored & set(tick.steps)).items():
            if decision.is_computed:
                computed[chunk].append(tick.steps[chunk])
                stored.add(chunk)
    return computed


def test_a_plan_computes_its_steps_and_the_ends():
    assert computed_steps(Planned([[1, 4]]), num_steps=8)[0] == [0, 1, 4, 7]


def test_one_shared_plan_is_what_stride_does_with_the_same_steps():
    steps = [0, 2, 3, 7]
    planned = computed_steps(Planned([steps]), num_steps=10, chunks=3)
    assert planned == computed_steps(Stride(steps=steps), num_steps=10, chunks=3)


def test_every_chunk_position_may_have_its_own_plan_and_the_last_one_serves_the_rest():
    computed = computed_steps(Planned([[0, 1], [0, 5]]), num_steps=8, chunks=3)
    assert computed == {0: [0, 1, 7], 1: [0, 5, 7], 2: [0, 5, 7]}


def test_a_plan_of_all_steps_reuses_nothing():
    assert computed_steps(Planned([range(8)]), num_steps=8)[0] == list(range(8))


def test_the_guard_is_silent_inside_the_band():
    policy = GuardedPlan([[0, 3]], low=[0.0] * 6, high=[1.0] * 6)
    assert computed_steps(policy, num_steps=6, signals=[1, 1.1, 1.2, 1.3, 1.4, 1.5])[0] == [0, 3, 5]


@pytest.mark.parametrize("jump", [9.0, math.nan])
def test_the_guard_computes_where_a_signal_leaves_the_band_or_is_no_number(jump: float):
    policy = GuardedPlan([[0, 5]], low=[0.0] * 6, high=[0.5] * 6)
    computed = computed_steps(policy, num_steps=6, signals=[1.0, 1.0, jump, jump, 1.0, 1.0])[0]
    assert 2 in computed
    assert 1 not in computed


def test_the_guard_computes_where_a_chunk_changes_less_than_any_calibration_clip():
    policy = GuardedPlan([[0, 3]], low=[0.0, 0.1, 0.1, 0.1], high=[1.0] * 4)
    assert computed_steps(policy, num_steps=4, signals=[1, 1.2, 1.2, 1.5])[0] == [0, 2, 3]


def test_the_band_holds_all_distances_seen_and_a_margin():
    low, high = distance_band([(1, 0.2), (2, 0.5), (1, 0.4)], num_steps=3, margin=0.1)
    assert low == pytest.approx([0.0, 0.18, 0.45])
    assert high == pytest.approx([0.0, 0.44, 0.55])


def test_a_step_without_a_distance_is_an_error():
    with pytest.raises(ValueError, match="step 2"):
        distance_band([(1, 0.2)], num_steps=3)


def test_magcache_reuses_until_the_error_of_the_example_is_reached():
    policy = MagCache([1.0] + [0.9] * 7, threshold=0.25, warmup_steps=1, most_reuses=5)
    # errors after a computed step: 0.1, then 0.1 + 0.19 = 0.29: one reuse at a time
    assert computed_steps(policy, num_steps=8)[0] == [0, 2, 4, 6, 7]


def test_magcache_never_reuses_more_steps_in_a_row_than_it_may():
    policy = MagCache([1.0] * 10, threshold=0.1, warmup_steps=2, most_reuses=3)
    assert computed_steps(policy, num_steps=10)[0] == [0, 1, 5, 9]


def test_magcache_with_threshold_zero_computes_every_step():
    policy = MagCache([1.0] * 5, threshold=0.0, warmup_steps=1, most_reuses=3)
    assert computed_steps(policy, num_steps=5)[0] == [0, 1, 2, 3, 4]


def test_magcache_starts_anew_where_a_chunk_was_computed_anyway():
    policy = MagCache([1.0] * 9, threshold=0.1, warmup_steps=1, most_reuses=2)
    stored: set[int] = set()
    computed: list[int] = []
    for tick in staggered([0], num_steps=9, lag=2):
        step = tick.steps[0]
        if policy.plan(tick, {}, stored=stored)[0].is_computed:
            computed.append(step)
        elif step == 2:
            policy.computed_anyway([0])
        stored.add(0)
    assert computed == [0, 5, 8]


def test_ratios_are_those_of_the_norms():
    velocities = np.array([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]])
    assert magnitude_ratios(velocities @ velocities.T) == pytest.approx([1.0, 2.0, 0.1])
