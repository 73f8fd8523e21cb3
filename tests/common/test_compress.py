"""KV compression: scores, kept tokens, and the memory they take."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from safetensors import safe_open
from torch import Tensor

from flowcache.compress import (
    STRATEGIES,
    CompressionStrategy,
    DeepForcing,
    Density,
    ImportanceRedundancy,
    KVRule,
    Recent,
    SinkRecent,
    TokenLayout,
    Window,
    best,
    gather,
    kept_tokens,
    scoring_queries,
    strategy_of,
)
from flowcache.errors import UserError
from flowcache.scores import (
    EXCLUDED_SCORE,
    WEIGHTINGS,
    attention_received_by_sums,
    importance,
    position_weights,
    redundancy,
    scoring_bytes,
    weigh,
)

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parents[1] / "golden/skyreels_v2/kv_compress.safetensors"
SMALLEST_ORDERED_GAP = 32
"""Neighbouring scores nearer than this, in ulps, may swap: each is off by about 3."""

LAYOUT = TokenLayout(frame_tokens=6, chunk_tokens=12)


def golden_outputs(
    case: dict[str, Any], tensors: Callable[[str], Tensor], *, received: Any = None
) -> dict[str, Tensor]:
    """Return all that a case of the golden file can hold, computed by our code."""
    k, v, q = (tensors(f"{case['inputs']}.{name}") for name in "kvq")
    num_clean, is_token = case["clean_tokens"], case["strategy"] == "token"
    frame_tokens = case.get("frame_tokens") or case.get("h", 1) * case.get("w", 1)
    layout = TokenLayout(frame_tokens, case.get("T", 1) * frame_tokens)
    strategy = ImportanceRedundancy(
        mix=case["mix_lambda"],
        kernel=case["kernel_size"],
        granularity=case["strategy"],
        queries=case["query_granularity"],
        weighting=case["weighting"] if is_token else "none",
        power=case.get("power", 3),
        order="score",
        received=received,
    )
    clean_k = k[:num_clean]
    seen_q = strategy.seen_queries(q, layout)
    score = strategy.score(q, clean_k, layout=layout)
    if is_token and case["weighting"] == "no_weight":
        score = score - score.amin(dim=1, keepdim=True)  # the file's shift; no effect on ranks
    indices = strategy.keep(q, clean_k, budget=case["budget"], layout=layout)
    return {
        "importance_unpooled": importance(seen_q, clean_k, kernel=1),
        "importance": importance(seen_q, clean_k, kernel=case["kernel_size"]),
        "redundancy": redundancy(clean_k),
        "score": score,
        "indices": indices,
        "k_out": torch.cat([gather(clean_k, indices), k[num_clean:]]),
        "v_out": torch.cat([gather(v[:num_clean], indices), v[num_clean:]]),
    }


def golden_cases() -> list[dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["case"])["cases"]


def random_keys(seed: int, num_tokens: int = 48, heads: int = 3, head_dim: int = 16) -> Tensor:
    return torch.randn(num_tokens, heads, head_dim, generator=torch.Generator().manual_seed(seed))


def peak_extra_bytes(call: Callable[[], object], trace: Path) -> int:
    """Return the most memory torch held for `call` at a time, kernels' own scratch included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    live = peak = 0
    for event in sorted(
        (event for event in events if event["name"] == "[memory]"),
        key=lambda event: event["args"]["Ev Idx"],
    ):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("received", [None, attention_received_by_sums], ids=["blocks", "sums"])
@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["name"])
def test_reference_scores_and_kept_tokens_are_reproduced(
    case: dict[str, Any], received: Any
) -> None:
    with safe_open(GOLDEN, "pt") as file:
        ours = golden_outputs(case, file.get_tensor, received=received)
        stored = {
            key.split(".")[1]: file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
            if key.startswith(case["name"] + ".")
        }
    assert {"indices", "score"} <= set(stored) <= set(ours)
    size = stored["score"][stored["score"] > EXCLUDED_SCORE].abs().max().item()
    assert_close(ours["score"], stored["score"], ulps=64, size=size)
    for part in {"importance_unpooled", "importance", "redundancy"} & set(stored):
        assert_close(ours[part], stored[part], ulps=64)
    assert torch.equal(ours["indices"].sort(dim=0).values, stored["indices"].sort(dim=0).values)
    if case["min_gap"] > SMALLEST_ORDERED_GAP * torch.finfo(torch.float32).eps * size:
        for part in {"indices", "k_out", "v_out"} & set(stored):
            assert torch.equal(ours[part], stored[part])


def test_position_order_keeps_the_same_tokens_by_age() -> None:
    q, k = random_keys(0, num_tokens=12), random_keys(1)
    by_score, by_age = (
        ImportanceRedundancy(order=order).keep(q, k, budget=20, layout=LAYOUT)
        for order in ("score", "position")
    )
    assert torch.equal(by_score.sort(dim=0).values, by_age)
    assert not torch.equal(by_score, by_age)


def test_linear_redundancy_equals_its_definition_over_all_pairs() -> None:
    k = random_keys(2)
    k[7] = 0
    cosines = torch.nn.functional.cosine_similarity(k[:, None], k[None], dim=-1)
    cosines *= 1 - torch.eye(len(k)).unsqueeze(-1)
    direct = (cosines.sum(dim=0) / len(k)).softmax(dim=0).T
    assert_close(redundancy(k), direct, ulps=64)


def test_redundancy_of_three_keys_is_that_worked_by_hand() -> None:
    k = torch.tensor([[5.0, 0.0], [0.1, 0.0], [0.0, 2.0]]).unsqueeze(1)
    weights = [math.exp(1 / 3), math.exp(1 / 3), 1.0]
    expected = torch.tensor([[weight / sum(weights) for weight in weights]])
    assert_close(redundancy(k), expected, ulps=8)


def test_importance_of_two_keys_is_that_worked_by_hand() -> None:
    q, k = torch.ones(1, 1, 1), torch.tensor([0.0, math.log(3)]).view(2, 1, 1)
    assert_close(importance(q, k, kernel=1), torch.tensor([[0.25, 0.75]]), ulps=8)
    assert_close(importance(q, k, kernel=3), torch.tensor([[0.75, 0.75]]), ulps=8)


def test_the_least_redundant_and_most_attended_key_is_kept() -> None:
    k = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]]).unsqueeze(1)
    q = torch.tensor([[4.0, 0.0]]).unsqueeze(1)
    unlike = ImportanceRedundancy(mix=0, kernel=1).keep(q, k, budget=1, layout=LAYOUT)
    attended = ImportanceRedundancy(mix=1, kernel=1).keep(q, k, budget=1, layout=LAYOUT)
    assert unlike.tolist() == [[3]]
    assert attended.tolist() == [[0]]


def test_query_head_j_scores_for_kv_head_j_over_group() -> None:
    k = random_keys(3, num_tokens=9, heads=2)
    q = torch.zeros(1, 4, 16)
    q[0, 2], q[0, 3] = 3 * k[5, 1], 3 * k[1, 1]
    received = importance(q, k, kernel=1)
    assert_close(received[0], torch.full((9,), 1 / 9), ulps=8)
    logits = (q[0, 2:] @ k[:, 1].T / 4).amax(dim=0)
    assert_close(received[1], logits.softmax(dim=0), ulps=64)


@pytest.mark.parametrize("query_heads", [4, 8])
@pytest.mark.parametrize("max_bytes", [1, 20_000, 60_000, 400_000])
def test_importance_in_blocks_equals_importance_at_once(query_heads: int, max_bytes: int) -> None:
    q, k = random_keys(4, num_tokens=37, heads=query_heads), random_keys(5, heads=4)
    blocked = importance(q, k, max_bytes=max_bytes)
    assert_close(blocked, importance(q, k), ulps=64)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_importance_by_sums_equals_importance_in_blocks() -> None:
    q, k = 2 * random_keys(4, num_tokens=37, heads=4), 2 * random_keys(5, heads=4)
    by_sums = importance(q, k, received=attention_received_by_sums)
    assert_close(by_sums, importance(q, k), ulps=64)
    sums = attention_received_by_sums(q, k).sum(dim=-1)
    assert_close(sums, torch.ones(4), ulps=64)


def test_heads_that_share_keys_are_not_summed() -> None:
    """The maximum over a group is none of the sums that attention gives."""
    q, k = random_keys(4, heads=8), random_keys(5, heads=4)
    assert torch.equal(importance(q, k, received=attention_received_by_sums), importance(q, k))


def test_redundancy_head_by_head_equals_redundancy_at_once() -> None:
    k = random_keys(6)
    assert_close(redundancy(k, max_bytes=1), redundancy(k), ulps=64)


def test_half_precision_inputs_are_scored_in_float32() -> None:
    q, k = random_keys(7, num_tokens=12).bfloat16(), random_keys(8).bfloat16()
    assert torch.equal(importance(q, k), importance(q.float(), k.float()))
    assert torch.equal(redundancy(k), redundancy(k.float()))
    strategy = ImportanceRedundancy()
    assert strategy.score(q, k, layout=LAYOUT).dtype == torch.float32
    kept = strategy.keep(q, k, budget=20, layout=LAYOUT)
    assert torch.equal(kept, strategy.keep(q.float(), k.float(), budget=20, layout=LAYOUT))


@pytest.mark.parametrize(
    "strategy", [ImportanceRedundancy(order="score"), Recent(), SinkRecent()], ids=repr
)
@pytest.mark.parametrize("surplus", [0, 5])
def test_an_ample_budget_keeps_every_token_in_place(
    strategy: CompressionStrategy, surplus: int
) -> None:
    q, k = random_keys(9, num_tokens=12), random_keys(10, num_tokens=30)
    kept = strategy.keep(q, k, budget=30 + surplus, layout=LAYOUT)
    assert torch.equal(gather(k, kept), k)


def test_frames_and_chunks_are_kept_whole_and_the_rest_of_the_budget_unused() -> None:
    q, k = random_keys(11, num_tokens=12), random_keys(12)
    for granularity, size in (("frame", 6), ("chunk", 12)):
        kept = ImportanceRedundancy(granularity=granularity).keep(q, k, budget=29, layout=LAYOUT)
        assert kept.shape == (29 // size * size, 3)
        groups = kept.T.reshape(3, -1, size)
        assert torch.equal(groups - groups[..., :1], torch.arange(size).expand_as(groups))
        assert torch.all(groups[..., 0] % size == 0)


def test_last_queries_are_fifty_tokens_or_one_frame() -> None:
    q = random_keys(13, num_tokens=72)
    for queries, count in (("token", 50), ("frame", 6), ("chunk", 72)):
        seen = ImportanceRedundancy(queries=queries).seen_queries(q, LAYOUT)
        assert torch.equal(seen, q[-count:])


def test_best_groups_are_those_worked_by_hand() -> None:
    score = torch.tensor([[0.2, 0.1, 0.3], [0.5, 0.5, 0.5]])
    by_age = best(score, 2, group_tokens=2, order="position")
    by_score = best(score, 2, group_tokens=2, order="score")
    assert by_age.T.tolist() == [[0, 1, 4, 5], [0, 1, 2, 3]]
    assert by_score.T.tolist() == [[4, 5, 0, 1], [0, 1, 2, 3]]


def test_each_head_gathers_its_own_rows() -> None:
    x = torch.arange(12.0).view(3, 2, 2)
    rows = gather(x, torch.tensor([[2, 0], [0, 1]]))
    assert rows.tolist() == [[[8, 9], [2, 3]], [[0, 1], [6, 7]]]


def test_position_weights_meet_their_ends() -> None:
    ends = {
        name: [round(value, 6) for value in position_weights(64, name)[[0, -1]].tolist()]
        for name in WEIGHTINGS
    }
    assert ends == {
        "none": [1, 1],
        "hard": [1, 1],
        "exponential": [0.1, 1],
        "polynomial": [0.1, 1],
        "upper_convex_polynomial": [0, 2],
        "gaussian": [1, 0.1],
    }
    middle = position_weights(3, "polynomial", power=2)[1]
    assert_close(middle, torch.tensor(0.325), ulps=8)


def test_hard_weighting_never_keeps_the_first_chunk_while_others_remain() -> None:
    q, k = random_keys(14, num_tokens=12), random_keys(15)
    k[:12] = random_keys(16, num_tokens=12) * 4
    kept = ImportanceRedundancy(weighting="hard_code").keep(q, k, budget=36, layout=LAYOUT)
    assert torch.equal(kept, torch.arange(12, 48).unsqueeze(1).expand(-1, 3))


def test_weighing_starts_from_a_non_negative_score_and_spares_its_input() -> None:
    score = torch.tensor([[-3.0, -1.0, -2.0]])
    for name in WEIGHTINGS:
        assert weigh(score, name, chunk_tokens=0).amin() == 0
    assert weigh(score, "hard", chunk_tokens=1).tolist() == [[-1e6, 2.0, 1.0]]
    assert score.tolist() == [[-3.0, -1.0, -2.0]]


@pytest.mark.parametrize(
    ("strategy", "num_keys", "budget", "kept"),
    [
        (Recent(), 25, 19, [*range(15, 25)]),
        (Recent(), 25, 0, []),
        (SinkRecent(), 30, 17, [*range(5), *range(20, 30)]),
    ],
    ids=repr,
)
def test_the_newest_tokens_and_a_sink_are_kept_whole(
    strategy: CompressionStrategy, num_keys: int, budget: int, kept: list[int]
) -> None:
    k, layout = random_keys(17, num_tokens=num_keys), TokenLayout(frame_tokens=5, chunk_tokens=10)
    found = strategy.keep(k, k, budget=budget, layout=layout)
    assert found.T.tolist() == [kept] * 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel": 4}, "kernel must be odd and positive, got 4"),
        ({"weighting": "linear"}, "unknown position weighting 'linear'"),
        ({"granularity": "chunk", "weighting": "hard"}, "weighting 'hard' needs granularity token"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ImportanceRedundancy(**settings)


@pytest.mark.parametrize(
    ("strategy", "budget", "words"),
    [
        (ImportanceRedundancy(granularity="chunk"), 11, "0 or hold a whole chunk of 12 .*, got 11"),
        (ImportanceRedundancy(granularity="frame"), 12, "multiples of 6, got 40"),
        (ImportanceRedundancy(), -1, "got -1"),
        (Recent(), 11, "a whole chunk of 12 tokens, got 11"),
        (SinkRecent(sink_frames=2), 17, "does not hold 2 sink frames"),
    ],
)
def test_a_budget_that_fits_no_group_is_refused_with_and_without_keys(
    strategy: CompressionStrategy, budget: int, words: str
) -> None:
    k = random_keys(19, num_tokens=40)
    with pytest.raises(UserError, match=words):
        strategy.keep(k, k, budget=budget, layout=LAYOUT)
    with pytest.raises(UserError, match=words):
        kept_tokens(strategy, num_keys=40, budget=budget, layout=LAYOUT)


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(12, 12), (12, 4)])
@pytest.mark.parametrize("num_queries", [50, 510])
@pytest.mark.parametrize("max_bytes", [2**20, 4 * 2**20, 2**25])
def test_scoring_stays_within_the_memory_it_announces(
    query_heads: int, kv_heads: int, num_queries: int, max_bytes: int, tmp_path: Path
) -> None:
    q = random_keys(20, num_tokens=num_queries, heads=query_heads, head_dim=64).bfloat16()
    k = random_keys(21, num_tokens=1024, heads=kv_heads, head_dim=64).bfloat16()
    strategy = ImportanceRedundancy(max_bytes=max_bytes)
    peak = peak_extra_bytes(
        lambda: strategy.keep(q, k, budget=512, layout=LAYOUT), tmp_path / "trace.json"
    )
    heads = {"num_heads": query_heads, "kv_heads": kv_heads, "head_dim": 64}
    bound = scoring_bytes(num_queries, 1024, **heads, max_bytes=max_bytes)
    assert 0.5 * bound < peak <= bound


def test_scoring_at_the_real_sizes_takes_below_a_gigabyte() -> None:
    skyreels = scoring_bytes(10_200, 20_400, num_heads=12, kv_heads=12, head_dim=128)
    magi = scoring_bytes(12_150, 60_750, num_heads=24, kv_heads=8, head_dim=128)
    assert max(skyreels, magi) < 320 * 2**20


@pytest.mark.parametrize(
    ("strategy", "budget"),
    [
        (Recent(), 25),
        (SinkRecent(sink_frames=1), 17),
        (ImportanceRedundancy(), 13),
        (ImportanceRedundancy(granularity="frame"), 13),
        (ImportanceRedundancy(granularity="chunk", queries="frame"), 10),
        (Recent(), 40),
    ],
)
def test_how_many_tokens_stay_is_known_without_keys(strategy: CompressionStrategy, budget: int):
    layout = TokenLayout(frame_tokens=5, chunk_tokens=10)
    torch.manual_seed(0)
    kept = strategy.keep(torch.randn(10, 2, 8), torch.randn(30, 2, 8), budget=budget, layout=layout)
    assert kept_tokens(strategy, num_keys=30, budget=budget, layout=layout) == len(kept)


# Rivals -------------------------------------------------------------------------------------------

ONE_EACH = TokenLayout(frame_tokens=1, chunk_tokens=1)


def column(*values: float) -> Tensor:
    """Return tokens of one head of width one, [L, 1, 1]."""
    return torch.tensor(values).view(-1, 1, 1)


def test_a_window_keeps_the_newest_whole_frames():
    keys = torch.zeros(25, 2, 1)
    layout = TokenLayout(frame_tokens=5, chunk_tokens=10)
    kept = Window().keep(keys, keys, budget=12, layout=layout)
    assert kept[:, 0].tolist() == [*range(15, 25)]
    assert kept_tokens(Window(), num_keys=25, budget=12, layout=layout) == 10


def test_deep_forcing_keeps_the_tokens_worked_by_hand():
    strategy = DeepForcing(sink_frames=1, recent_frames=1)
    keys = column(5, 1, -1, 2, 0, 9)
    kept = strategy.keep(column(1, 2), keys, budget=4, layout=ONE_EACH)
    assert kept[:, 0].tolist() == [0, 1, 3, 5]
    both = torch.cat([keys, -keys], dim=1)  # the second head wants what the first does not
    kept = strategy.keep(column(1, 2).expand(-1, 2, -1), both, budget=3, layout=ONE_EACH)
    assert kept.transpose(0, 1).tolist() == [[0, 3, 5], [0, 2, 5]]


def test_query_heads_of_a_group_want_together():
    """Sums over the queries of two heads are 3 and -4: together they want the least key."""
    queries = torch.cat([column(1, 2), column(-4, 0)], dim=1)
    strategy = DeepForcing(sink_frames=1, recent_frames=1)
    kept = strategy.keep(queries, column(0, 1, -1, 2, 0), budget=3, layout=ONE_EACH)
    assert kept[:, 0].tolist() == [0, 2, 4]


def test_density_fills_its_bank_then_lets_leave_what_is_crowded():
    """Width 2: sigma is 1, and keys at distance 1 have the kernel 1/4, at distance 0 one.

    The bank holds keys at 0, 10, 20, alone: densities 1. Of a copy of the first, of one at 30 and
    of one between, those least like it come first: 30, then 11 (1/4 like the second), then the
    copy. A bank of three takes 30 if one leaves: none is crowded, so the densest, the oldest of
    equals. 11 makes nobody crowded, either: two more leave.
    """
    strategy = Density(recent_frames=1)

    def keys(*places: float) -> Tensor:
        return torch.tensor([[place, 0.0] for place in places]).unsqueeze(1)

    def keep(*places: float, budget: int) -> list[int]:
        made = strategy.keep(keys(0), keys(*places), budget=budget, layout=ONE_EACH)
        return made[:, 0].tolist()

    assert keep(0, 10, 20, 99, budget=4) == [0, 1, 2, 3]
    assert strategy.inserted_GB is None  # nothing had to leave
    assert keep(0, 10, 20, 0, 99, budget=4) == [0, 1, 2, 4]
    assert strategy.inserted_GB is not None
    assert_close(strategy.inserted_GB, torch.ones(1, 3), ulps=1 << 12)


def test_density_evicts_a_key_that_became_twice_as_dense():
    """A copy of the key at 10 doubles its density, 1 to 2: that key leaves, not an older one."""
    strategy = Density(recent_frames=1)
    strategy.inserted_GB = torch.ones(1, 3)
    places = torch.tensor([[0.0, 0], [10, 0], [20, 0], [10, 0], [99, 0]]).unsqueeze(1)
    kept = strategy.keep(places, places, budget=4, layout=ONE_EACH)
    assert kept[:, 0].tolist() == [0, 2, 3, 4]


def test_density_takes_no_more_than_leave_room_for_the_crowded():
    """Both new keys are copies; the one of two crowds two of the bank, more than one may evict.

    Bank: 0, 0, 20 with densities at insertion 2, 2 and 1. A copy of 20 alone evicts the one at 20;
    with copies of 0 (2 + 1 of 2 is not twice) nobody else is crowded, so both come in.
    """
    strategy = Density(recent_frames=1)
    strategy.inserted_GB = torch.tensor([[1.0, 1.0, 1.0]])
    places = torch.tensor([[0.0, 0], [0, 0], [20, 0], [0, 0], [99, 0]]).unsqueeze(1)
    kept = strategy.keep(places, places, budget=4, layout=ONE_EACH)
    # both at 0 are three times as dense as alone: one new key has room for one eviction only
    assert kept[:, 0].tolist() == [0, 1, 2, 4]


def test_density_takes_those_first_that_are_least_like_its_bank():
    """Three keys at 0, each 3 dense, at 1.6 when they came. A fourth one would crowd all three.

    The one at 50 comes first, though it is younger, and crowds nobody: the oldest one leaves for
    it. With the copy as well three would have to leave, but only two may.
    """
    strategy = Density(recent_frames=1)
    strategy.inserted_GB = torch.full((1, 3), 1.6)
    places = torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 0], [50, 0], [99, 0]]).unsqueeze(1)
    kept = strategy.keep(places, places, budget=4, layout=ONE_EACH)
    assert kept[:, 0].tolist() == [1, 2, 4, 5]


def test_more_new_keys_than_the_bank_holds_replace_it_at_most():
    strategy = Density(recent_frames=1)
    places = torch.arange(8.0).mul(10).view(-1, 1, 1)
    for _ in range(2):
        kept = strategy.keep(places, places, budget=3, layout=ONE_EACH)
        assert len(kept) == 3
    assert kept[-1].item() == 7
    assert strategy.inserted_GB is not None
    assert strategy.inserted_GB.shape == (1, 2)


def test_what_needs_more_of_a_cache_than_keys_is_refused_where_it_is_not_there():
    for name in ("density", "dummy_forcing", "forcing_kv"):
        with pytest.raises(UserError, match=f"kv.compress={name} needs more than"):
            strategy_of(KVRule(compress=name))
    plain = [name for name in STRATEGIES if name not in ("density", "dummy_forcing", "forcing_kv")]
    assert [scoring_queries(strategy_of(KVRule(compress=n)), LAYOUT) for n in plain] == [
        *(0, 12, 0, 0, 0, 12)
    ]


def test_a_budget_that_does_not_hold_what_always_stays_is_refused():
    keys = column(*range(9))
    with pytest.raises(UserError, match="does not hold 1 sink and 4 recent frames"):
        DeepForcing().keep(keys, keys, budget=4, layout=ONE_EACH)
    with pytest.raises(UserError, match="does not hold 4 recent frames"):
        Density().keep(keys, keys, budget=3, layout=ONE_EACH)
