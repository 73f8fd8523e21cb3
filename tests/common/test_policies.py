import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.policies import (
    Decision,
    FlowCache,
    ReusePolicy,
    Stride,
    TeaCache,
    Vanilla,
    agree,
    compute_together,
    identity,
    polynomial,
    relative_l1,
)
from flowcache.predict import ResultStore
from flowcache.schedule import Tick, staggered

pytestmark = pytest.mark.numeric


def signal(*values: float) -> Tensor:
    return torch.tensor(values)


def run_policy(
    policy: ReusePolicy, signals: Sequence[Mapping[int, float]], *, num_steps: int, lag: int = 0
) -> list[dict[int, Decision]]:
    """Plan every tick; a chunk has a stored result from its first computed step on."""
    chunks = sorted({chunk for row in signals for chunk in row})
    stored: set[int] = set()
    plans = []
    for tick, row in zip(staggered(chunks, num_steps=num_steps, lag=lag), signals, strict=True):
        plan = policy.plan(tick, {c: signal(v) for c, v in row.items()}, stored=stored)
        stored |= {c for c, decision in plan.items() if decision.is_computed}
        plans.append(plan)
    return plans


def computed(plans: Sequence[Mapping[int, Decision]], chunk: int = 0) -> list[int]:
    return [int(plan[chunk].is_computed) for plan in plans if chunk in plan]


def test_vanilla_computes_everything_and_needs_no_signal():
    policy = Vanilla()
    assert not policy.needs_signals
    ticks = staggered(range(2), num_steps=3, lag=1)
    plans = [policy.plan(tick, {}, stored={0, 1}) for tick in ticks]
    assert [list(plan) for plan in plans] == [list(tick.steps) for tick in ticks]
    assert all(decision.is_computed for plan in plans for decision in plan.values())


# FlowCache ----------------------------------------------------------------------------------------


def test_flowcache_accumulates_as_worked_by_hand():
    """The signal grows from 10 by 1, 1.1, 1.21, ...: every distance is 0.1. With threshold 0.25 and
    a warm-up of 2 the sums are -, 0.1 (warm-up), 0.1, 0.2, 0.3 (computed), 0.1, 0.2, 0.3, 0.1."""
    values = [10 * 1.1**step for step in range(9)]
    plans = run_policy(FlowCache(0.25, 2), [{0: value} for value in values], num_steps=9)
    assert computed(plans) == [1, 1, 0, 0, 1, 0, 0, 1, 1]  # the last one because it is the last
    decisions = [plan[0] for plan in plans]
    assert decisions[0].distance is None
    assert decisions[0].accumulated is None
    distances = [d.distance for d in decisions[1:] if d.distance is not None]
    assert_close(distances, [0.1] * 8, ulps=64, dtype=torch.float32)
    sums = [d.accumulated for d in decisions[1:] if d.accumulated is not None]
    expected = [0.1, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1]
    assert_close(sums, expected, ulps=64, dtype=torch.float32)


def test_where_the_own_last_step_is_decided_only_the_last_tick_of_the_run_is_forced():
    """Two chunks of four steps, one tick apart, that never change: chunk 0 ends on a reused step,
    chunk 1 takes the last tick of the run."""
    rows = [{0: 1.0}] + [{0: 1.0, 1: 1.0}] * 3 + [{1: 1.0}]
    decided = run_policy(FlowCache(0.5, 1, compute_last_step=False), rows, num_steps=4, lag=1)
    assert (computed(decided, 0), computed(decided, 1)) == ([1, 0, 0, 0], [1, 0, 0, 1])
    forced = run_policy(FlowCache(0.5, 1), rows, num_steps=4, lag=1)
    assert (computed(forced, 0), computed(forced, 1)) == ([1, 0, 0, 1], [1, 0, 0, 1])


def test_an_own_last_step_is_computed_where_its_sum_reaches_the_threshold():
    rows = [{0: 1.0}, {0: 1.0, 1: 1.0}, {0: 2.0, 1: 1.0}, {1: 1.0}]
    plans = run_policy(FlowCache(0.5, 1, compute_last_step=False), rows, num_steps=3, lag=1)
    assert computed(plans, 0) == [1, 0, 1]


@pytest.mark.parametrize("compute_last_step", [False, True])
def test_the_sum_of_flowcache_stays_as_it_is_in_the_last_tick_of_the_run(compute_last_step: bool):
    policy = FlowCache(0.5, 1, compute_last_step=compute_last_step)
    plans = run_policy(policy, [{0: 10.0}, {0: 11.0}, {0: 15.0}], num_steps=3)
    assert computed(plans) == [1, 0, 1]
    assert policy.accumulated[0] == pytest.approx(0.1, rel=1e-5)  # float32 signals


def test_flowcache_compares_with_the_previous_tick_also_after_a_reused_one():
    plans = run_policy(FlowCache(0.5, 1), [{0: 10.0}, {0: 12.0}, {0: 12.0}, {0: 12.0}], num_steps=4)
    distances = [plan[0].distance for plan in plans[1:]]
    assert_close(distances, [0.2, 0.0, 0.0], ulps=8, dtype=torch.float32)


def test_flowcache_computes_when_the_sum_is_exactly_the_threshold():
    plans = run_policy(FlowCache(0.5, 1), [{0: 2.0}, {0: 3.0}, {0: 3.0}], num_steps=3)
    assert computed(plans) == [1, 1, 1]
    above = run_policy(FlowCache(0.5001, 1), [{0: 2.0}, {0: 3.0}, {0: 3.0}], num_steps=3)
    assert computed(above) == [1, 0, 1]


def test_flowcache_warms_up_by_own_steps_of_each_chunk():
    """Chunk 1 starts two ticks later and is warmed up two ticks later."""
    same = [{0: 1.0}] * 2 + [{0: 1.0, 1: 1.0}] * 3 + [{1: 1.0}] * 2
    plans = run_policy(FlowCache(0.5, 3), same, num_steps=5, lag=2)
    assert computed(plans, 0) == [1, 1, 1, 0, 1]
    assert computed(plans, 1) == [1, 1, 1, 0, 1]


def test_flowcache_lets_each_chunk_decide_by_its_own_change():
    rows = [{0: 1.0, 1: 1.0}, {0: 1.0, 1: 2.0}, {0: 1.0, 1: 4.0}, {0: 1.0, 1: 8.0}]
    plans = run_policy(FlowCache(0.5, 1), rows, num_steps=4)
    assert computed(plans, 0) == [1, 0, 0, 1]
    assert computed(plans, 1) == [1, 1, 1, 1]


def test_threshold_zero_recomputes_even_unchanged_chunks():
    plans = run_policy(FlowCache(0.0, 1), [{0: 1.0}] * 5, num_steps=5)
    assert computed(plans) == [1] * 5
    plans = run_policy(TeaCache(0.0, 1), [{0: 1.0}] * 5, num_steps=5)
    assert computed(plans) == [1] * 5


@pytest.mark.parametrize("policy", [FlowCache(1e9, 1), TeaCache(1e9, 1)], ids=["flow", "tea"])
@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_a_distance_that_is_no_number_leads_to_a_computation(
    policy: FlowCache | TeaCache, strange: float
):
    rows = [{0: 1.0}, {0: 1.0}, {0: strange}, {0: 1.0}, {0: 1.0}, {0: 1.0}]
    plans = run_policy(type(policy)(1e9, 1), rows, num_steps=6)
    assert computed(plans) == [1, 0, 1, 1 if math.isnan(strange) else computed(plans)[3], 0, 1]
    assert computed(plans)[2] == 1


def test_a_chunk_without_a_stored_result_is_computed():
    policy = FlowCache(1e9, 0)
    ticks = staggered([0], num_steps=4, lag=0)
    assert policy.plan(ticks[0], {0: signal(1.0)}, stored=set())[0].is_computed
    assert policy.plan(ticks[1], {0: signal(1.0)}, stored=set())[0].is_computed
    assert not policy.plan(ticks[2], {0: signal(1.0)}, stored={0})[0].is_computed


def test_the_rescale_decides_what_is_accumulated_and_may_be_negative():
    policy = FlowCache(0.3, 1, rescale=polynomial([1.0, -0.05]))
    plans = run_policy(policy, [{0: 10.0}, {0: 11.0}, {0: 11.0}, {0: 11.0}], num_steps=4)
    sums = [plan[0].accumulated for plan in plans[1:]]
    assert_close(sums, [0.05, 0.0, -0.05], ulps=16, dtype=torch.float32)


def test_computed_anyway_starts_the_sum_anew():
    policy = FlowCache(0.25, 1)
    ticks = staggered([0], num_steps=9, lag=0)
    for tick, value in zip(ticks[:3], (10.0, 11.0, 12.1), strict=True):
        plan = policy.plan(tick, {0: signal(value)}, stored={0})
    assert_close(plan[0].accumulated, 0.2, ulps=64, dtype=torch.float32)
    policy.computed_anyway([0])
    plan = policy.plan(ticks[3], {0: signal(13.31)}, stored={0})
    assert_close(plan[0].accumulated, 0.1, ulps=64, dtype=torch.float32)
    assert not plan[0].is_computed


def test_a_polynomial_has_its_highest_power_first():
    assert polynomial([2.0, -3.0, 5.0])(10.0) == 2 * 100 - 3 * 10 + 5
    assert identity(0.25) == 0.25


# TeaCache -----------------------------------------------------------------------------------------


def test_teacache_takes_one_decision_for_all_chunks():
    """Mean change over both chunks: (1 + 0) / (2 + 2) = 0.25, though chunk 1 does not change."""
    rows = [{0: 2.0, 1: 2.0}, {0: 3.0, 1: 2.0}, {0: 3.0, 1: 2.0}]
    plans = run_policy(TeaCache(0.25, 1), rows, num_steps=3)
    assert [plan[1].distance for plan in plans] == [None, pytest.approx(0.25), 0.0]
    assert computed(plans, 0) == computed(plans, 1) == [1, 1, 1]
    plans = run_policy(TeaCache(0.26, 1), rows, num_steps=3)
    assert computed(plans, 0) == computed(plans, 1) == [1, 0, 1]


def test_teacache_warms_up_by_ticks_and_computes_an_entering_chunk_alone():
    """Warm-up 2; chunk 1 enters at tick 3 while chunk 0 is reused."""
    rows = [{0: 1.0}] * 3 + [{0: 1.0, 1: 1.0}] * 2 + [{1: 1.0}] * 3
    plans = run_policy(TeaCache(0.5, 2), rows, num_steps=5, lag=3)
    assert computed(plans, 0) == [1, 1, 0, 0, 0]  # its own last step is no exception
    assert computed(plans, 1) == [1, 0, 0, 0, 1]  # the run's last tick is one


def test_teacache_accumulates_over_reused_ticks():
    values = [10 * 1.1**step for step in range(8)]
    plans = run_policy(TeaCache(0.25, 1), [{0: value} for value in values], num_steps=8)
    assert computed(plans) == [1, 0, 0, 1, 0, 0, 1, 1]


# Stride -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "share"), [(2, 0.567), (3, 0.433), (4, 0.367)])
def test_strides_compute_the_published_shares_of_30_steps(every: int, share: float):
    plans = run_policy(Stride(every, warmup_steps=3), [{0: 0.0}] * 30, num_steps=30)
    assert round(sum(computed(plans)) / 30, 3) == share


def test_a_stride_of_3_after_3_steps_computes_the_steps_of_the_worked_example():
    plans = run_policy(Stride(3, warmup_steps=3), [{0: 0.0}] * 10, num_steps=10)
    assert [step for step, is_computed in enumerate(computed(plans)) if is_computed] == [
        0,
        1,
        2,
        3,
        6,
        9,
    ]


def test_a_stride_counts_every_chunks_own_steps():
    rows = [{0: 0.0}] + [{0: 0.0, 1: 0.0}] * 5 + [{1: 0.0}]
    plans = run_policy(Stride(2, warmup_steps=1), rows, num_steps=6, lag=1)
    assert computed(plans, 0) == computed(plans, 1) == [1, 1, 0, 1, 0, 1]


def test_listed_steps_are_computed_and_the_first_and_last_anyway():
    plans = run_policy(Stride(steps=[2, 3]), [{0: 0.0}] * 6, num_steps=6)
    assert computed(plans) == [1, 0, 1, 1, 0, 1]


# Plans of several branches ------------------------------------------------------------------------


def tick_of(*chunks: int) -> Tick:
    return Tick(1, 9, 9, dict.fromkeys(chunks, 1))


def test_one_computed_chunk_takes_all_along_where_they_cant_be_computed_apart():
    policy = FlowCache(0.5, 0)
    policy.plan(tick_of(0, 1), {0: signal(1.0), 1: signal(1.0)}, stored={0, 1})
    plan = policy.plan(tick_of(0, 1), {0: signal(3.0), 1: signal(1.1)}, stored={0, 1})
    assert [plan[c].is_computed for c in (0, 1)] == [True, False]
    together = compute_together(policy, plan)
    assert [together[c].is_computed for c in (0, 1)] == [True, True]
    assert together[1].distance == plan[1].distance
    assert policy.accumulated == {0: 0.0, 1: 0.0}


def test_nothing_is_computed_where_nothing_must_be():
    policy = FlowCache(0.5, 0)
    plan = {0: Decision(False, 0.1, 0.1), 1: Decision(False, 0.2, 0.2)}
    assert compute_together(policy, plan) == plan


def test_branches_agree_on_a_chunk_as_soon_as_one_computes_it():
    policies = {"cond": FlowCache(0.5, 0), "uncond": FlowCache(0.5, 0)}
    for policy in policies.values():
        policy.accumulated = {0: 0.1, 1: 0.1}
    plans = {
        "cond": {0: Decision(True), 1: Decision(False)},
        "uncond": {0: Decision(False), 1: Decision(False)},
    }
    agreed = agree(policies, plans)
    for branch in policies:
        assert [agreed[branch][chunk].is_computed for chunk in (0, 1)] == [True, False]
    assert policies["uncond"].accumulated == {0: 0.0, 1: 0.1}


def test_branches_share_no_state():
    first, second = FlowCache(0.25, 1), FlowCache(0.25, 1)
    alone = run_policy(FlowCache(0.25, 1), [{0: 1.0}] * 4, num_steps=4)
    for value, tick in zip((1.0, 5.0, 2.0, 9.0), staggered([0], num_steps=4, lag=0), strict=True):
        first.plan(tick, {0: signal(value)}, stored={0})
        second.plan(tick, {0: signal(1.0)}, stored={0})
    assert second.accumulated == {0: 0.0}
    assert first.previous[0].item() == 9.0
    assert second.previous[0].item() == 1.0
    assert computed(alone) == [1, 0, 0, 1]
    stores = ResultStore(), ResultStore()
    stores[0].put(0, signal(1.0), sigma=signal(1.0))
    assert list(stores[1].units()) == []


# Distances ----------------------------------------------------------------------------------------


def test_relative_distances_are_those_worked_by_hand():
    pairs = {
        "half": (signal(3.0, -3.0), signal(2.0, -2.0)),
        "same": (signal(0.0, 0.0), signal(0.0, 0.0)),
        "from zero": (signal(0.0, 1.0), signal(0.0, 0.0)),
        "mixed": (signal(1.0, 5.0), signal(2.0, -2.0)),
    }
    assert relative_l1(pairs) == {"half": 0.5, "same": 0.0, "from zero": math.inf, "mixed": 2.0}
    assert relative_l1({}) == {}


def test_the_distance_of_16_bit_signals_is_not_rounded_to_16_bits():
    torch.manual_seed(0)
    before = torch.randn(4096).bfloat16()
    now = (before.float() * 1.015).bfloat16()
    wide = relative_l1({0: (now.double(), before.double())})[0]
    # differences of neighbouring 16-bit numbers are exact; sums of 4096 float32 err by 1e-6 or so
    assert relative_l1({0: (now, before)})[0] == pytest.approx(wide, rel=1e-5)
    coarse = ((now - before).abs().mean() / before.abs().mean()).item()
    assert abs(coarse - wide) > 1e-4 * wide


def test_half_precision_signals_are_compared_without_overflow():
    large = torch.full((4096,), 60000.0, dtype=torch.float16)
    assert_close(relative_l1({0: (large, large / 2)})[0], 1.0, ulps=64, dtype=torch.float32)
