"""What shared settings stand for, and what they refuse."""

from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

import pytest

from flowcache.compress import ImportanceRedundancy, Recent, SinkRecent
from flowcache.errors import UserError
from flowcache.reuse import FlowCache, Stride, TeaCache, Vanilla
from flowcache.settings import (
    POLICIES,
    KVRule,
    ReuseRule,
    check_finite,
    check_prompt,
    check_reuse,
    check_seed,
    policy_maker,
    strategy_of,
    threshold_of,
)


def test_every_policy_is_made_with_its_values():
    def rule(policy: Any) -> ReuseRule:
        return ReuseRule(policy=policy, threshold=0.3, warmup_steps=4, every=5, steps=[1, 2])

    assert isinstance(policy_maker(rule("vanilla"))(), Vanilla)
    assert policy_maker(rule("stride"))() == Stride(every=5, warmup_steps=4, steps=[1, 2])
    flowcache, teacache = policy_maker(rule("flowcache"))(), policy_maker(rule("teacache"))()
    assert isinstance(flowcache, FlowCache)
    assert (flowcache.threshold, flowcache.warmup_steps) == (0.3, 4)
    assert isinstance(teacache, TeaCache)
    assert (teacache.threshold, teacache.warmup_ticks) == (0.3, 4)
    assert threshold_of(rule("flowcache")) == threshold_of(rule("teacache")) == 0.3
    assert threshold_of(rule("stride")) is None


def test_every_policy_that_settings_name_is_known():
    assert set(get_args(get_type_hints(ReuseRule)["policy"])) == set(POLICIES)
    for name in ("vanilla", "stride", "teacache", "flowcache"):
        assert type(policy_maker(ReuseRule(policy=name))()) is POLICIES[name]


def test_policies_of_one_rule_share_no_state():
    make = policy_maker(ReuseRule(policy="flowcache"))
    first, second = make(), make()
    first.computed_anyway([0])
    assert first != second


def test_every_strategy_is_made_with_its_values():
    assert strategy_of(KVRule()) is None
    assert strategy_of(KVRule(compress="recent")) == Recent()
    assert strategy_of(KVRule(compress="sink_recent", sink_frames=3)) == SinkRecent(3)
    rule = KVRule(compress="importance", mix=0.2, kernel=5, granularity="frame", order="score")
    want = ImportanceRedundancy(mix=0.2, kernel=5, granularity="frame", order="score")
    assert strategy_of(rule) == want


@dataclass
class Inner:
    size: float = 1.0


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)


def test_an_infinite_value_is_named_with_its_section():
    check_finite(Outer())
    with pytest.raises(UserError, match=r"^inner\.size must be a finite number, not inf"):
        check_finite(Outer(Inner(float("inf"))))


def test_values_out_of_range_are_refused():
    check_reuse(ReuseRule(warmup_steps=0), num_steps=4, least_warmup=0)
    for rule, message in (
        (ReuseRule(warmup_steps=0), r"reuse\.warmup_steps must be 1 or more, not 0"),
        (ReuseRule(threshold=float("nan")), r"reuse\.threshold must be 0 or more"),
        (ReuseRule(order=0), r"reuse\.order .* must be in 1\.\.2, not 0; to hold the last result"),
        (ReuseRule(order=3), r"must be in 1\.\.2, not 3"),
        (ReuseRule(steps=[0, 4]), r"reuse\.steps are own steps of a chunk, 0\.\.3: 4 is none"),
    ):
        with pytest.raises(UserError, match=message):
            check_reuse(rule, num_steps=4, least_warmup=1)
    with pytest.raises(UserError, match=r"seed must be in 0\.\."):
        check_seed("seed", 2**63)


def test_a_prompt_must_be_text_of_a_sensible_length():
    check_prompt("prompt", "ein Bär 🐻", may_be_empty=False)
    check_prompt("negative_prompt", "", may_be_empty=True)
    for prompt, message in (
        (" \t", "prompt is empty"),
        ("caf\udce9", "not valid UTF-8"),
        ("a" * 10_001, "prompt has 10001 characters, at most 10000"),
    ):
        with pytest.raises(UserError, match=message):
            check_prompt("prompt", prompt, may_be_empty=False)
