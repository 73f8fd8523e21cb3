"""Which tokens of a chunk are computed: every case is worked out by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_close
from refusals import refuses

from flowcache.kv import KVCache
from flowcache.policies import Calibration, Decision, Decisions, ReuseRule
from flowcache.predict import ResultStore
from flowcache.schedule import Tick, staggered
from flowcache.tokens import (
    PUBLISHED_FOR_LATENTS,
    MotionTokens,
    TokenChoice,
    TokenRule,
    TopTokens,
    check_one_process,
    check_tokens,
    motion_weights,
    patches_of,
    pixels_of,
    tokens_of,
    unused_settings,
)

pytestmark = pytest.mark.numeric

TICKS = staggered([0], num_steps=10, lag=0)


def frames(*values: list[float]) -> torch.Tensor:
    """Return frames of tokens with one channel, `[F, P, 1]`."""
    return torch.tensor(values).unsqueeze(-1)


# Weights ------------------------------------------------------------------------------------------


def test_the_token_that_moves_most_in_its_frame_weighs_1_and_the_stillest_the_least():
    x = frames([1, 3, 5], [1, 5, 5], [3, 3, 3])
    weights = motion_weights(x, before_PD=torch.zeros(3, 1), least=0.6)
    # the motions are 1 3 5, 0 2 0 and 2 2 2
    expected = torch.tensor([[0.6, 0.8, 1.0], [0.6, 1.0, 0.6], [1.0, 1.0, 1.0]])
    assert_close(weights, expected, ulps=8)


def test_the_first_frame_of_a_video_moves_as_the_second_one_does():
    x = frames([0, 0, 0], [1, 3, 5])
    weights = motion_weights(x, before_PD=None, least=0.5)
    assert_close(weights, torch.tensor([[0.5, 0.75, 1.0]]).expand(2, 3), ulps=8)
    assert torch.equal(motion_weights(x[:1], before_PD=None, least=0.5), torch.ones(1, 3))


def motion(**changes: Any) -> MotionTokens:
    plain = {"warmup_steps": 1, "vote": None, "least_share": 0.0}
    given = {**plain, "coarse_updates": 0, "coarse_steps": 0, **changes}
    return MotionTokens("hidden", 0.6, threshold=0.1, **given)


def test_hidden_frames_are_compared_with_those_of_the_chunk_before():
    choice = motion()
    choice.see(0, frames([0, 0, 0], [9, 9, 4]))
    choice.see(1, frames([9, 9, 9], [9, 9, 9]))
    # the first frame of chunk 1 moved where the last one of chunk 0 was 4
    expected = torch.tensor([[0.6, 0.6, 1.0], [1.0, 1.0, 1.0]])
    assert_close(choice.weights[1], expected, ulps=8)


def test_the_first_frame_of_noisy_latents_has_no_frame_to_be_compared_with():
    rule = ReuseRule(tokens=TokenRule("motion", "latent"))
    choice = tokens_of(rule, Calibration())
    assert choice is not None
    for chunk in (0, 1):
        choice.see(chunk, frames([0, 7, 2], [1, 10, 7]))
    expected = torch.tensor([[1.0, 1.0, 1.0], [0.6, 0.8, 1.0]])
    assert_close(choice.weights[1], expected, ulps=8)


# Motion -------------------------------------------------------------------------------------------


def run(
    choice: TokenChoice,
    distances: list[float | None],
    weights: list[list[float]],
    *,
    ticks: list[Tick] = TICKS,
) -> list[Any]:
    """Return for each tick what is computed: "all", "none", or the tokens."""
    made: list[Any] = []
    for tick, distance in zip(ticks, distances, strict=False):
        plan: Decisions = {chunk: Decision(False, distance) for chunk in tick.steps}
        decision = choice.choose(tick, plan, stored=[0] if tick.index else [])[0]
        choice.weights[0] = torch.tensor(weights)
        rows = "all" if decision.rows is None else decision.rows.tolist()
        made.append(rows if decision.is_computed else "none")
    return made


def test_each_token_is_computed_when_its_own_sum_reaches_the_threshold():
    """The example of the docstring, then the sums 0.126 0.04 0.1 after the second computation."""
    distances = [None, 0.06, 0.05, 0.05, 0.05]
    assert run(motion(), distances, [[0.6, 0.8, 1.0]]) == ["all", "none", [2], [1], [0, 2]]


def test_a_chunk_is_coarse_until_it_was_computed_so_often_after_the_warm_up():
    """Sums of 0.06 0.12, 0.06 0.12 make two updates of the whole chunk; the warm-up's is none."""
    choice = motion(coarse_updates=2)
    made = run(choice, [None, *[0.06] * 7], [[0.6, 1.0]])
    #                  coarse --------------------------  0.036 0.06  0.072 0.12  0.108 0.06
    assert made == ["all", "none", "all", "none", "all", "none", [1], [0]]


def test_a_chunk_is_coarse_in_its_first_steps_and_keeps_its_sum():
    """Step 2 ends with 0.06 for all; 0.06 more is 0.096 and 0.12."""
    choice = motion(coarse_steps=3, warmup_steps=2)
    assert run(choice, [None, 0.5, 0.06, 0.06], [[0.6, 1.0]]) == ["all", "all", "none", [1]]


def test_frames_vote_and_few_tokens_wait():
    """Weights ask at 0.1 from 0.06: tokens of weight 1; two of three frames ask in place 1."""
    weights = [[0.6, 1.0, 1.0], [0.6, 1.0, 0.6], [0.6, 0.6, 0.6]]
    voting = motion(vote=0.5)
    assert run(voting, [None, 0.12], weights) == ["all", [1, 4, 7]]
    assert voting.sums[0].flatten().tolist() == pytest.approx(
        [0.072, 0, 0.12, 0.072, 0, 0.072, 0.072, 0, 0.072]
    )
    # a third of the tokens is too few: the sums stay, and all are asked for in the next step
    waiting = motion(vote=0.5, least_share=0.4)
    assert run(waiting, [None, 0.12, 0.12], weights) == ["all", "none", "all"]
    assert run(motion(), [None, 0.12], weights) == ["all", [1, 2, 4]]


def test_a_distance_that_is_no_number_computes_the_chunk_as_do_the_last_step_and_the_last_tick():
    made = run(motion(), [None, math.nan, *[0.0] * 8], [[0.6, 1.0]])
    assert made == ["all", "all", *["none"] * 7, "all"]
    late = staggered([0, 1], num_steps=3, lag=2)  # chunk 0 is clean before the last tick
    is_free = motion(compute_last_step=False)
    assert run(is_free, [None, 0.0, 0.0], [[0.6, 1.0]], ticks=late) == ["all", "none", "none"]
    assert run(motion(), [None, 0.0, 0.0], [[0.6, 1.0]], ticks=late) == ["all", "none", "all"]


def test_a_clean_chunk_is_forgotten_but_for_the_frame_that_the_next_one_needs():
    choice = motion()
    choice.see(0, frames([0, 0, 0], [9, 9, 4]))
    choice.sums[0], choice.updates[0] = 0.5, 3
    choice.drop(0)
    assert (choice.weights, choice.sums, choice.updates) == ({}, {}, {})
    assert list(choice.last_frames) == [0]
    choice.drop(1)
    assert not choice.last_frames


# Top ----------------------------------------------------------------------------------------------


def top(steps: list[int], *, share: float = 0.5) -> TopTokens:
    return TopTokens("hidden", 0.6, steps, share)


def planned(choice: TokenChoice, computed: set[int]) -> list[Any]:
    made: list[Any] = []
    for tick in TICKS[:6]:
        plan = {0: Decision(tick.index in computed)}
        decision = choice.choose(tick, plan, stored=[0] if tick.index else [])[0]
        choice.weights[0] = torch.tensor([[0.6, 0.7], [0.9, 1.0]])
        rows = "all" if decision.rows is None else decision.rows.tolist()
        made.append(rows if decision.is_computed else "none")
    return made


def test_the_tokens_with_the_largest_weight_times_age_are_computed():
    """Ages of 1, then 2 2 1 1; a step that is not planned makes all one older."""
    assert planned(top([0, 1, 2]), {0, 1, 2}) == ["all", [2, 3], [0, 1], "none", "none", "none"]
    # ages 1 1 1 1 at step 1; then 3 3 2 2 at step 3: 1.8 2.1 1.8 2.0
    assert planned(top([1, 3]), {0, 1, 3, 4}) == ["all", [2, 3], "none", [1, 3], "all", "none"]
    # steps that the policy does not compute stay so; a share of 1 is the whole chunk
    assert planned(top([1, 2], share=1.0), {0, 2}) == ["all", "none", "all", *["none"] * 3]


# Places -------------------------------------------------------------------------------------------


def test_a_token_is_the_pixels_that_are_marked_for_it():
    latents = torch.randn(4, 3, 4, 6)
    own = torch.zeros(3, 6, dtype=torch.bool)
    own[0, 4] = own[2, 1] = True
    where = pixels_of(own, size=2, like=latents)
    assert where.shape == (1, 3, 4, 6)
    assert where.sum() == 8
    assert where[0, 0, 2:, 2:4].all()
    assert where[0, 2, :2, 2:4].all()
    marked = latents.masked_fill(~where, 0.0)
    is_marked = patches_of(marked, size=2).abs().sum(dim=-1) > 0
    assert torch.equal(is_marked, own)
    assert torch.equal(patches_of(latents, size=2)[2, 1], latents[:, 2, :2, 2:4].flatten())


@pytest.mark.parametrize(("factor", "order"), [(0.0, 1), (0.5, 1), (1.0, 2)])
def test_results_of_some_tokens_are_predicted_as_in_a_store_of_their_own(factor: float, order: int):
    """Of two tokens the first has results at each of five levels, the second at three of them."""
    levels = [0.9, 0.8, 0.65, 0.5, 0.4]
    both, *alone = (ResultStore(factor, order=order) for _ in range(3))
    seen = [(True, True), (True, False), (True, True), (True, False), (True, True)]
    for level, is_own in zip(levels, seen, strict=True):
        value, sigma = torch.randn(1, 2, 3), torch.tensor([level])
        where = None if all(is_own) else torch.tensor(is_own).view(1, 2, 1)
        both.put(0, value, sigma=sigma, where=where)
        for token, store in enumerate(alone):
            if is_own[token]:
                store.put(0, value[:, token : token + 1], sigma=sigma)
        at = torch.tensor([level - 0.1])
        expected = torch.cat([store.predict(0, sigma=at) for store in alone], dim=1)
        assert_close(both.predict(0, sigma=at), expected, ulps=16)


def test_keys_of_some_tokens_are_written_in_place():
    cache = KVCache(8, num_heads=1, head_width=2, dtype=torch.float32, device=torch.device("cpu"))
    old, new = torch.randn(2, 6, 1, 2), torch.randn(2, 2, 1, 2)
    cache.put(0, *old)
    cache.settle(2)
    cache.put(0, *new, rows=torch.tensor([1, 3]))
    keys, values = cache.prefix(4)
    for found, before, after in zip((keys, values), old, new, strict=True):
        assert torch.equal(found[[3, 5]], after)
        assert torch.equal(found[[0, 1, 2, 4]], before[[0, 1, 2, 4]])


# Settings -----------------------------------------------------------------------------------------


def test_the_published_forms_are_the_defaults():
    rule = ReuseRule(policy="flowcache", threshold=0.2, tokens=TokenRule("motion"))
    choice = tokens_of(rule, Calibration(lambda distance: 2 * distance))
    assert isinstance(choice, MotionTokens)
    assert (choice.threshold, choice.warmup_steps, choice.least_weight) == (0.2, 5, 0.6)
    assert (choice.vote, choice.least_share, choice.coarse_updates) == (0.5, 0.4, 6)
    assert choice.rescale(0.3) == 0.6
    own = PUBLISHED_FOR_LATENTS
    assert (own.weighed, own.vote, own.least_share, own.coarse_steps) == ("latent", None, 0, 20)
    assert tokens_of(ReuseRule(), Calibration()) is None
    # the steps are those of the choice, not those of a stride
    steps = ReuseRule(steps=[1, 2, 3], tokens=TokenRule("top", steps=[2]))
    made = tokens_of(steps, Calibration())
    assert isinstance(made, TopTokens)
    assert made.steps == [2]


FITS = {"num_steps": 10, "level": "tokens", "compress": "none"}


@pytest.mark.parametrize(
    ("rule", "changes", "message"),
    [
        ({"policy": "stride"}, {}, "set reuse.policy=flowcache, not stride"),
        ({"tokens": TokenRule("top")}, {}, "top needs reuse.tokens.steps"),
        ({"tokens": TokenRule("top", steps=[10])}, {}, "0..9: 10 is none"),
        ({}, {"level": "velocity"}, "set reuse.tokens.weighed=latent"),
        ({}, {"compress": "recent"}, "kv.compress=recent scores keys"),
        ({"guidance_every": 2}, {}, "leave out reuse.guidance_every"),
        ({"guidance_steps": [1]}, {}, "leave out reuse.guidance_every"),
    ],
)
def test_what_makes_no_sense_is_refused(
    rule: dict[str, Any], changes: dict[str, Any], message: str
):
    class Rule(ReuseRule):
        predict = "velocity"

    def check(own: dict[str, Any], run: dict[str, Any]) -> Callable[[], None]:
        given = {"policy": "flowcache", "tokens": TokenRule("motion"), **own}
        return lambda: check_tokens(Rule(**given), **{**FITS, **run})

    check({}, {})()
    check({"tokens": TokenRule()}, {"compress": "recent"})()
    refuses(check(rule, changes), message)


def test_settings_that_change_nothing_are_named():
    usual = TokenRule(weighed="latent", vote=None)
    assert unused_settings(usual, usual) is None
    assert unused_settings(TokenRule("motion", share=0.3), TokenRule()) is None
    said = unused_settings(replace(usual, share=0.3, vote=0.5), usual)
    assert said is not None
    assert said.startswith("reuse.tokens.vote, reuse.tokens.share changes nothing, as reuse.tok")


def test_a_divided_run_is_refused():
    check_one_process(TokenRule("motion"), num_processes=1)
    check_one_process(TokenRule(), num_processes=2)
    refuses(lambda: check_one_process(TokenRule("top"), num_processes=2), "but 2 run: start one")
