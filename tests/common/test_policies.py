"""When chunks are computed, as worked by hand, and how branches agree."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.policies import (
    Decision,
    Disagreement,
    FlowCache,
    GuardedPlan,
    GuidanceRisk,
    MagCache,
    Planned,
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
from flowcache.schedule import Tick, staggered
from flowcache.tuning.gram import distance_band, magnitude_ratios

pytestmark = pytest.mark.numeric

Rows = Sequence[Mapping[int, float]]
"""By tick: chunk -> its signal."""


def signal(*values: float) -> Tensor:
    return torch.tensor(values)


def run_policy(policy: ReusePolicy, rows: Rows, *, lag: int = 0) -> list[dict[int, Decision]]:
    """Plan every tick; a chunk has a stored result from its first computed step on."""
    chunks = sorted({chunk for row in rows for chunk in row})
    num_steps = sum(chunks[0] in row for row in rows)
    stored: set[int] = set()
    plans = []
    for tick, row in zip(staggered(chunks, num_steps=num_steps, lag=lag), rows, strict=True):
        plan = policy.plan(tick, {c: signal(v) for c, v in row.items()}, stored=stored)
        stored |= {c for c, decision in plan.items() if decision.is_computed}
        plans.append(plan)
    return plans


def computed(plans: Sequence[Mapping[int, Decision]], chunk: int = 0) -> list[int]:
    return [int(plan[chunk].is_computed) for plan in plans if chunk in plan]


def one(*values: float) -> Rows:
    """Return the signals of a single chunk."""
    return [{0: value} for value in values]


def same(num_steps: int, *, lag: int, chunks: int = 2) -> Rows:
    """Return signals of several chunks that never change."""
    ticks = staggered(range(chunks), num_steps=num_steps, lag=lag)
    return [dict.fromkeys(tick.steps, 1.0) for tick in ticks]


GROWING = one(*(10 * 1.1**step for step in range(9)))
"""Every distance is 0.1."""
APART = [{0: 1.0, 1: 1.0}, {0: 1.0, 1: 2.0}, {0: 1.0, 1: 4.0}, {0: 1.0, 1: 8.0}]
BOTH = [{0: 2.0, 1: 2.0}, {0: 3.0, 1: 2.0}, {0: 3.0, 1: 2.0}]
"""Mean change over both chunks: (1 + 0) / (2 + 2) = 0.25, though chunk 1 does not change."""
CHANGED_LAST = [{0: 1.0}, {0: 1.0, 1: 1.0}, {0: 2.0, 1: 1.0}, {1: 1.0}]
DROP = polynomial([1.0, -0.05])


def free_end() -> FlowCache:
    return FlowCache(0.5, 1, compute_last_step=False)


def guarded(low: float, high: float, *steps: int) -> GuardedPlan:
    return GuardedPlan([steps or [0, 3]], low=[0.0] + [low] * 5, high=[high] * 6)


RISKS = [[1.0, 3.0, 5.0][:step] for step in range(8)]
"""Of reusing a result that is one, two or three steps old; an older one has none."""

TABLE: list[tuple[str, ReusePolicy, Rows, int, str]] = [
    # sums with a warm-up of 2: -, 0.1 (warm-up), 0.1, 0.2, 0.3 (computed), 0.1, ...
    ("flowcache accumulates", FlowCache(0.25, 2), GROWING, 0, "110010011"),
    ("at the threshold", FlowCache(0.5, 1), one(2, 3, 3), 0, "111"),
    ("below the threshold", FlowCache(0.5001, 1), one(2, 3, 3), 0, "101"),
    ("by own change", FlowCache(0.5, 1), APART, 0, "1001 1111"),
    ("warm-up by own steps", FlowCache(0.5, 3), same(5, lag=2), 2, "11101 11101"),
    ("own last steps forced", FlowCache(0.5, 1), same(4, lag=1), 1, "1001 1001"),
    # chunk 0 ends on a reused step, chunk 1 takes the last tick of the run
    ("own last steps decided", free_end(), same(4, lag=1), 1, "1000 1001"),
    ("a last step above the threshold", free_end(), CHANGED_LAST, 1, "101 101"),
    ("flowcache with threshold 0", FlowCache(0.0, 1), one(*[1] * 5), 0, "11111"),
    ("teacache with threshold 0", TeaCache(0.0, 1), one(*[1] * 5), 0, "11111"),
    ("teacache accumulates", TeaCache(0.25, 1), GROWING[:8], 0, "10010011"),
    ("one decision for all", TeaCache(0.25, 1), BOTH, 0, "111 111"),
    ("one decision against all", TeaCache(0.26, 1), BOTH, 0, "101 101"),
    # warm-up by ticks; chunk 1 enters at tick 3, while chunk 0 is reused to its end
    ("an entering chunk alone", TeaCache(0.5, 2), same(5, lag=3), 3, "11000 10001"),
    ("a stride", Stride(3, warmup_steps=3), one(*[0] * 10), 0, "1111001001"),
    ("by own steps", Stride(2, warmup_steps=1), same(6, lag=1), 1, "110101 110101"),
    ("listed steps", Stride(steps=[2, 3]), one(*[0] * 6), 0, "101101"),
    ("a plan", Planned([[1, 4]]), one(*[0] * 8), 0, "11001001"),
    ("a plan of all steps", Planned([range(5)]), one(*[0] * 5), 0, "11111"),
    # the last plan serves all chunks behind it
    ("plans", Planned([[0, 1], [0, 3]]), same(5, lag=2, chunks=3), 2, "11001 10011 10011"),
    ("inside the band", guarded(0.0, 1.0), one(1, 1.1, 1.2, 1.3, 1.4, 1.5), 0, "100101"),
    ("below the band", guarded(0.1, 1.0), one(1, 1.2, 1.2, 1.5), 0, "1011"),
    # errors after a computed step: 0.1, then 0.1 + 0.19 = 0.29: one reuse at a time
    ("magcache", MagCache([1.0] + [0.9] * 7, 0.25, 1, 5), one(*[0] * 8), 0, "10101011"),
    ("most reuses in a row", MagCache([1.0] * 10, 0.1, 2, 3), one(*[0] * 10), 0, "1100010001"),
    # half of 8 steps are retained; of the others two in a row may be reused
    ("retention", MagCache([1.0] * 8, 0.1, 1, 2, 0.5), one(*[0] * 8), 0, "11110011"),
    ("a warm-up beyond it", MagCache([1.0] * 8, 0.1, 6, 2, 0.5), one(*[0] * 8), 0, "11111101"),
    # a result one step old costs 1, two 3, three 5; sums 1, 4: so one reuse below 4, two below 5
    ("risks", GuidanceRisk(RISKS, 4.0, 1, 8), one(*[0] * 8), 0, "10101011"),
    ("more risk is taken", GuidanceRisk(RISKS, 4.1, 1, 8), one(*[0] * 8), 0, "10010011"),
    ("no risk of older results", GuidanceRisk(RISKS, 1e9, 1, 8), one(*[0] * 8), 0, "10001001"),
    ("most reuses of a risk", GuidanceRisk(RISKS, 1e9, 2, 1), one(*[0] * 8), 0, "11010101"),
    ("risks with threshold 0", GuidanceRisk(RISKS, 0.0, 1, 8), one(*[0] * 8), 0, "11111111"),
    ("magcache with threshold 0", MagCache([1.0] * 5, 0.0, 1, 3), one(*[0] * 5), 0, "11111"),
]
"""Name, policy, signals, lag, and by chunk which of its own steps are computed."""


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_a_policy_computes_the_steps_worked_by_hand(row: tuple[str, ReusePolicy, Rows, int, str]):
    _, policy, signals, lag, expected = row
    plans = run_policy(policy, signals, lag=lag)
    steps = ["".join(map(str, computed(plans, chunk))) for chunk in range(len(expected.split()))]
    assert " ".join(steps) == expected


def test_vanilla_computes_everything_and_needs_no_signal():
    assert not Vanilla.needs_signals
    for tick in staggered(range(2), num_steps=3, lag=1):
        assert Vanilla().plan(tick, {}, stored={0, 1}) == dict.fromkeys(tick.steps, Decision(True))


@pytest.mark.parametrize(("every", "share"), [(2, 0.567), (3, 0.433), (4, 0.367)])
def test_strides_compute_the_published_shares_of_30_steps(every: int, share: float):
    plans = run_policy(Stride(every, warmup_steps=3), one(*[0] * 30))
    assert round(sum(computed(plans)) / 30, 3) == share


@pytest.mark.parametrize(
    ("policy", "rows", "distances", "sums"),
    [
        (
            *(FlowCache(0.25, 2), GROWING, [0.1] * 8),
            [0.1, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1],
        ),
        # with the previous tick, also after a reused one
        (FlowCache(0.9, 1), one(10, 12, 12, 12), [0.2, 0, 0], [0.2, 0.2, 0.2]),
        (FlowCache(0.3, 1, rescale=DROP), one(10, 11, 11, 11), [0.1, 0, 0], [0.05, 0.0, -0.05]),
        (TeaCache(0.25, 1), BOTH, [0.25, 0.0], [0.25, 0.0]),
    ],
    ids=["flowcache", "previous tick", "rescaled", "teacache"],
)
def test_distances_and_sums_are_those_worked_by_hand(
    policy: ReusePolicy, rows: Rows, distances: list[float], sums: list[float]
):
    first, *decisions = [plan[0] for plan in run_policy(policy, rows)]
    assert (first.distance, first.accumulated) == (None, None)
    found: Any = [d.distance for d in decisions]
    assert_close(found, distances, ulps=64, dtype=torch.float32)
    assert_close([d.accumulated for d in decisions], sums, ulps=64, dtype=torch.float32)


@pytest.mark.parametrize("compute_last_step", [False, True])
def test_the_sum_of_flowcache_stays_as_it_is_in_the_last_tick_of_the_run(compute_last_step: bool):
    policy = FlowCache(0.5, 1, compute_last_step=compute_last_step)
    assert computed(run_policy(policy, one(10, 11, 15))) == [1, 0, 1]
    assert policy.accumulated[0] == pytest.approx(0.1, rel=1e-5)  # float32 signals


@pytest.mark.parametrize(
    ("policy", "strange", "after"),
    [
        (FlowCache(1e9, 1), math.nan, 1),
        (TeaCache(1e9, 1), math.nan, 1),
        (FlowCache(1e9, 1), math.inf, None),
        (TeaCache(1e9, 1), math.inf, None),
        (guarded(0.0, 0.5, 0, 5), math.nan, None),
        (guarded(0.0, 0.5, 0, 5), 9.0, None),
    ],
)
def test_a_distance_that_is_no_number_or_out_of_bounds_leads_to_a_computation(
    policy: ReusePolicy, strange: float, after: int | None
):
    steps = computed(run_policy(policy, one(1, 1, strange, 1, 1, 1)))
    assert steps[:3] == [1, 0, 1]
    assert after is None or steps[3] == after
    assert steps[4:] == [0, 1]


def test_a_chunk_without_a_stored_result_is_computed():
    policy, ticks = FlowCache(1e9, 0), staggered([0], num_steps=4, lag=0)
    for tick, stored, is_computed in zip(ticks, (set(), set(), {0}), (1, 1, 0), strict=False):
        assert policy.plan(tick, {0: signal(1.0)}, stored=stored)[0].is_computed == is_computed


def test_flowcache_starts_anew_where_a_chunk_was_computed_anyway():
    policy, ticks = FlowCache(0.25, 1), staggered([0], num_steps=9, lag=0)
    sums = []
    for tick, row in zip(ticks[:4], GROWING, strict=False):
        if tick.index == 3:
            policy.computed_anyway([0])
        decision = policy.plan(tick, {0: signal(row[0])}, stored={0})[0]
        sums.append(decision.accumulated)
    assert not decision.is_computed
    assert_close(sums[2:], [0.2, 0.1], ulps=64, dtype=torch.float32)


def test_a_forecast_is_followed_as_long_as_two_agree():
    """Line 5 and parabola 4 are 0.2 apart; 5 and 5 agree; an unknown distance computes."""
    tick = Tick(4, 9, 9, {0: 4, 1: 4, 2: 4, 3: 4})
    pairs = {0: signal(5, 4), 1: signal(5, 5), 3: signal(math.nan, 5)}
    for threshold, want in ((0.2, [1, 0, 1, 1]), (0.21, [0, 0, 1, 1])):
        plan = Disagreement(threshold, 2).plan(tick, pairs, stored=range(4))
        assert [decision.is_computed for decision in plan.values()] == want
        assert plan[0].distance == pytest.approx(0.2)
        assert plan[2].distance is None
    policy = Disagreement(9.0, 2)
    for step, stored, want in ((1, [0], True), (2, [0], False), (2, [], True), (8, [0], True)):
        plan = policy.plan(Tick(step, 9, 9, {0: step}), {0: signal(5, 4)}, stored=stored)
        assert plan[0].is_computed is want


def test_magcache_starts_anew_where_a_chunk_was_computed_anyway():
    policy = MagCache([1.0] * 9, threshold=0.1, warmup_steps=1, most_reuses=2)
    made = []
    for tick in staggered([0], num_steps=9, lag=2):
        step = tick.steps[0]
        if policy.plan(tick, {}, stored=set() if step == 0 else {0})[0].is_computed:
            made.append(step)
        elif step == 2:
            policy.computed_anyway([0])
    assert made == [0, 5, 8]


def test_a_polynomial_has_its_highest_power_first():
    assert polynomial([2.0, -3.0, 5.0])(10.0) == 2 * 100 - 3 * 10 + 5
    assert identity(0.25) == 0.25


# Several branches ---------------------------------------------------------------------------------


def test_one_computed_chunk_takes_all_along_where_they_cant_be_computed_apart():
    policy, tick = FlowCache(0.5, 0), Tick(1, 9, 9, {0: 1, 1: 1})
    policy.plan(tick, {0: signal(1.0), 1: signal(1.0)}, stored={0, 1})
    plan = policy.plan(tick, {0: signal(3.0), 1: signal(1.1)}, stored={0, 1})
    assert [plan[c].is_computed for c in (0, 1)] == [True, False]
    together = compute_together(policy, plan)
    assert [together[c].is_computed for c in (0, 1)] == [True, True]
    assert together[1].distance == plan[1].distance
    assert policy.accumulated == {0: 0.0, 1: 0.0}
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
    assert agree(policies, plans, apart=[0]) == plans


def test_branches_share_no_state():
    first, second = FlowCache(0.25, 1), FlowCache(0.25, 1)
    for value, tick in zip((1.0, 5.0, 2.0, 9.0), staggered([0], num_steps=4, lag=0), strict=True):
        first.plan(tick, {0: signal(value)}, stored={0})
        second.plan(tick, {0: signal(1.0)}, stored={0})
    assert second.accumulated == {0: 0.0}
    assert first.previous[0].item() == 9.0
    assert second.previous[0].item() == 1.0


# Distances and calibrations -----------------------------------------------------------------------


def test_relative_distances_are_those_worked_by_hand():
    pairs: Any = {
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


def test_the_band_holds_all_distances_seen_and_a_margin():
    low, high = distance_band([(1, 0.2), (2, 0.5), (1, 0.4)], num_steps=3, margin=0.1)
    assert low == pytest.approx([0.0, 0.18, 0.45])
    assert high == pytest.approx([0.0, 0.44, 0.55])
    with pytest.raises(ValueError, match="step 2"):
        distance_band([(1, 0.2)], num_steps=3)


def test_ratios_are_those_of_the_norms():
    velocities = np.array([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]])
    assert magnitude_ratios(velocities @ velocities.T) == pytest.approx([1.0, 2.0, 0.1])
