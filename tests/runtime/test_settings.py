"""What shared settings stand for, and what they refuse."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import pytest

from flowcache.bounds import SETTING, annotated_hints, names_of, sources_of
from flowcache.compress import (
    STRATEGIES,
    ImportanceRedundancy,
    KVRule,
    Recent,
    SinkRecent,
    strategy_of,
)
from flowcache.errors import UserError
from flowcache.policies import (
    POLICIES,
    Calibration,
    FlowCache,
    ReusePolicy,
    ReuseRule,
    Stride,
    TeaCache,
    Vanilla,
    check_reuse,
    threshold_of,
)
from flowcache.runtime.config import check_pass, check_prompt, check_work
from flowcache.runtime.profile import policy_maker


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
    assert names_of(annotated_hints(ReuseRule)["policy"]) == tuple(POLICIES)
    assert names_of(annotated_hints(KVRule)["compress"]) == tuple(STRATEGIES)
    for name in ("vanilla", "stride", "teacache", "flowcache"):
        assert type(policy_maker(ReuseRule(policy=name))()) is POLICIES[name]


@pytest.mark.parametrize("policy", POLICIES.values())
def test_what_a_policy_must_be_given_is_a_setting_or_calibrated(policy: type[ReusePolicy]):
    given = {each.name for section in (ReuseRule, Calibration) for each in fields(section)}
    for each in fields(policy):
        has_default = not (each.default is each.default_factory is MISSING)
        assert has_default or sources_of(policy)[each.name] in given
        assert SETTING not in each.metadata or each.metadata[SETTING] in given


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


def test_what_a_run_can_do_is_taken():
    check_reuse(ReuseRule(warmup_steps=0), num_steps=4, least_warmup=0)
    check_prompt("prompt", "ein Bär 🐻")
    check_work(num_chunks=2 * 3600, num_steps=64)  # two hours in chunks of a second
    check_pass(25 * 135 * 240, sizes="height")  # 97 frames of 4K


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda: check_reuse(ReuseRule(warmup_steps=0), num_steps=4, least_warmup=1),
            "reuse.warmup_steps must be 1 or more, not 0",
        ),
        (
            lambda: check_reuse(ReuseRule(steps=[0, 4]), num_steps=4, least_warmup=1),
            "reuse.steps are own steps of a chunk, 0..3: 4 is none",
        ),
        (lambda: check_prompt("prompt", ""), "prompt is empty"),
        (lambda: check_prompt("prompt", " \t"), "prompt is empty"),
        (
            lambda: check_work(num_chunks=100_000, num_steps=64),
            "100000 chunks of 64 steps are 6400000 steps, at most",
        ),
        (
            lambda: check_pass(2_000_000, sizes="height"),
            "one pass would have 2000000 tokens, at most 1048576 are possible: lower height",
        ),
    ],
)
def test_what_no_run_can_do_is_refused(check: Callable[[], None], message: str):
    with pytest.raises(UserError) as caught:
        check()
    assert str(caught.value).startswith(message)


def test_settings_are_read_without_pytorch():
    names = "skyreels_v2.config", "magi1.config", "flowcache.runtime.profile"
    code = f"import sys, {', '.join(names)}; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
