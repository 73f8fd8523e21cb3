import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache.attention import SDPA, Kernel
from flowcache.kv import (
    Compression,
    KVCache,
    Prefetcher,
    cached_attention,
    caches_for,
    peak_tokens,
    prefetcher_for,
    tokens_per_chunk,
)
from flowcache.schedule import staggered

pytestmark = pytest.mark.numeric


CPU = torch.device("cpu")
PLACE: dict[str, Any] = {"dtype": torch.float32, "device": CPU}


def empty_cache(capacity: int, *, num_heads: int = 1) -> KVCache:
    return KVCache(capacity, num_heads=num_heads, head_width=1, **PLACE)


def rows(values: Sequence[float], *, num_heads: int = 1) -> Tensor:
    """Return one-number keys `[S, G, 1]`; head g has the values plus 100 g."""
    return torch.stack([torch.tensor(values) + 100 * g for g in range(num_heads)], 1).unsqueeze(-1)


def put(cache: KVCache, offset: int, values: Sequence[float]) -> None:
    num_heads = cache.kv.shape[2]
    cache.put(offset, rows(values, num_heads=num_heads), -rows(values, num_heads=num_heads))


def keys(cache: KVCache, offset: int = 0, *, head: int = 0) -> list[float]:
    """Return the keys that a prefix shows to a head; the values must be their negatives."""
    k, v = cache.prefix(offset)
    assert torch.equal(v, -k)
    return k[:, head, 0].tolist()


def filled_cache(*chunks: Sequence[float], capacity: int = 6) -> KVCache:
    """Return a cache with some clean chunks."""
    cache = empty_cache(capacity)
    for values in chunks:
        put(cache, 0, values)
        cache.settle(len(values))
    return cache


def test_clean_and_active_chunks_are_prefixes_and_settling_moves_no_data():
    cache = empty_cache(6)
    put(cache, 0, [1, 2])
    assert keys(cache, 2) == [1, 2]
    before = cache.kv.clone()
    cache.settle(2)
    # as bits: what nobody has written may be no number
    assert torch.equal(cache.kv.view(torch.int32), before.view(torch.int32))
    put(cache, 0, [0, 0])
    put(cache, 2, [5, 6])
    put(cache, 0, [3, 4])  # a computed step overwrites the keys of the last one
    assert (cache.clean, cache.filled) == (2, 6)
    assert keys(cache) == [1, 2]
    assert keys(cache, 2) == [1, 2, 3, 4]
    assert keys(cache, 4) == [1, 2, 3, 4, 5, 6]


def test_kept_tokens_come_first_and_active_ones_move_down():
    cache = empty_cache(7, num_heads=2)
    put(cache, 0, [0, 1, 2, 3])
    cache.settle(4)
    put(cache, 0, [4, 5, 6])
    cache.keep(torch.tensor([[0, 3], [2, 1], [3, 0]]))
    assert (cache.clean, cache.filled) == (3, 6)
    assert keys(cache, 3) == [0, 2, 3, 4, 5, 6]
    assert keys(cache, 3, head=1) == [103, 101, 100, 104, 105, 106]


def test_keeping_nothing_leaves_the_active_tokens():
    cache = filled_cache([1, 2])
    put(cache, 0, [3, 4])
    cache.keep(torch.empty(0, 1, dtype=torch.int64))
    assert keys(cache) == []
    assert keys(cache, 2) == [3, 4]


def test_room_that_compression_freed_can_be_filled_again():
    cache = filled_cache([1, 2], [3, 4], capacity=4)
    cache.keep(torch.tensor([[1], [3]]))
    put(cache, 0, [5, 6])
    assert keys(cache, 2) == [2, 4, 5, 6]


def test_gaps_overflow_and_settling_too_early_are_caught():
    cache = empty_cache(4)
    with pytest.raises(AssertionError, match="a gap in the buffer: 0 filled, put at 1"):
        put(cache, 1, [1])
    with pytest.raises(AssertionError, match="5 tokens do not fit 4"):
        put(cache, 0, [1, 2, 3, 4, 5])
    with pytest.raises(AssertionError, match="before its keys were put"):
        cache.settle(1)


def test_a_chunk_attends_to_clean_and_older_active_tokens_and_itself():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 4, generator=draw) for _ in range(3))
    caches = caches_for(3, capacity=6, num_heads=2, head_width=4, **PLACE)
    outputs = []
    for chunk, offset in enumerate((0, 0, 2)):  # the first chunk is clean when the others come
        own = slice(2 * chunk, 2 * chunk + 2)
        attend = cached_attention([caches], active=[range(offset, offset + 2)], kernel=SDPA)
        outputs.append(attend(1, q[:, own], k[:, own], v[:, own]))
        if chunk == 0:
            caches[1].settle(2)
    for chunk, out in enumerate(outputs):
        stop = 2 * chunk + 2
        expected = SDPA(q[:, 2 * chunk : stop], k[:, :stop], v[:, :stop])
        assert torch.equal(out, expected)
    assert [cache.filled for cache in caches] == [0, 6, 0]


@pytest.mark.parametrize(("budget", "visible"), [(4, 5), (2, 3)])
def test_clean_tokens_above_the_budget_are_compressed_before_attending(budget: int, visible: int):
    cache, seen = filled_cache([0.0, 1.0, 2.0, 3.0]), []

    def keep(q_SHC: Tensor, k_TGC: Tensor) -> Tensor:
        seen.append((q_SHC[:, 0, 0].tolist(), k_TGC[:, 0, 0].tolist()))
        return torch.tensor([[1], [3]])

    attend = cached_attention(
        [[cache]], active=[range(1)], kernel=SDPA, compression=Compression(budget, keep)
    )
    own = rows([9.0]).unsqueeze(0)
    attend(0, own, own, -own)
    assert seen == ([] if budget == 4 else [([9], [0, 1, 2, 3])])
    assert cache.filled == visible
    assert keys(cache, 1) == ([0, 1, 2, 3, 9] if budget == 4 else [1, 3, 9])


def test_a_chunk_with_a_reach_sees_only_the_last_tokens():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 4, generator=draw) for _ in range(3))
    (cache,) = caches = caches_for(1, capacity=6, num_heads=2, head_width=4, **PLACE)
    cache.put(0, k[0, :4], v[0, :4])
    cache.settle(4)
    for reach, start in ((3, 3), (6, 0), (9, 0)):
        attend = cached_attention([caches], active=[range(2)], kernel=SDPA, reach_tokens=reach)
        out = attend(0, q[:, 4:], k[:, 4:], v[:, 4:])
        assert torch.equal(out, SDPA(q[:, 4:], k[:, start:], v[:, start:]))


def test_the_queries_are_remembered_on_request():
    cache, seen = empty_cache(2), {}
    attend = cached_attention([[cache]], active=[range(2)], kernel=SDPA, remember=seen.__setitem__)
    own = rows([1.0, 2.0]).unsqueeze(0)
    attend(0, own, own, own)
    assert torch.equal(seen[0], own)


def test_the_last_clean_tokens_of_another_cache_are_taken_over():
    ours, theirs = filled_cache([1, 2, 3, 4]), filled_cache([5, 6, 7, 8])
    ours.replace_last_clean(theirs.last_clean(2))
    assert keys(ours) == [1, 2, 7, 8]


def test_the_chunk_of_every_kept_token_is_known():
    cache = empty_cache(6, num_heads=2)
    cache.track(3)
    for chunk in range(2):
        put(cache, 0, [1, 2])
        cache.settle(2, chunk=chunk)
    assert tokens_per_chunk([cache]).tolist() == [2, 2, 0]
    # head 0 keeps tokens 0, 1, 3, head 1 tokens 1, 2, 3
    cache.keep(torch.tensor([[0, 1], [1, 2], [3, 3]]))
    put(cache, 0, [3, 4])
    cache.settle(2, chunk=2)
    assert tokens_per_chunk([cache]).tolist() == [1.5, 1.5, 2]
    # head 0 holds tokens of chunks 0 0 1 2 2, head 1 of 0 1 1 2 2: rows 0, 3 and 2, 4 stay
    cache.keep(torch.tensor([[0, 2], [3, 4]]))
    assert tokens_per_chunk([cache]).tolist() == [0.5, 0.5, 1]


def test_tracked_tokens_must_be_named():
    cache = empty_cache(2)
    cache.track(1)
    put(cache, 0, [1, 2])
    with pytest.raises(AssertionError, match="the chunk is not named"):
        cache.settle(2)


def outputs_of(
    device: torch.device,
    storage: torch.device | None,
    *,
    num_entries: int = 1,
    reach_tokens: int | None = None,
    compression: Compression | None = None,
) -> list[Tensor]:
    """Return what each layer gives for six chunks, each denoised in two ticks with the next."""
    draw = torch.Generator(device).manual_seed(0)
    sizes = {"num_heads": 2, "head_width": 8, "dtype": torch.float32, "device": device}
    caches = [caches_for(3, capacity=224, storage=storage, **sizes) for _ in range(num_entries)]
    prefetcher = prefetcher_for(caches[0])
    assert (prefetcher is None) == (storage is None)
    outputs: list[Tensor] = []
    for chunk in range(6):
        for offset in (0, 32):
            attend = cached_attention(
                caches,
                active=[range(offset, offset + 32)],
                kernel=SDPA,
                reach_tokens=reach_tokens,
                compression=compression,
                prefetcher=prefetcher,
            )
            for layer in range(3):
                shape = (3, num_entries, 32, 2, 8)
                qkv = torch.randn(shape, generator=draw, device=device)
                outputs.append(attend(layer, *qkv))
        for cache in (cache for layers in caches for cache in layers):
            cache.settle(32, chunk=chunk)
    return outputs


KEPT = Compression(
    32, lambda _q, k: torch.arange(16, 48, device=k.device).unsqueeze(1).expand(-1, 2)
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_entries", [1, 2])
@pytest.mark.parametrize(
    ("reach_tokens", "compression"), [(None, None), (64, None), (32, None), (None, KEPT)]
)
def test_caches_in_host_memory_give_what_those_on_the_device_give(
    device: str, num_entries: int, reach_tokens: int | None, compression: Compression | None
):
    settings: dict[str, Any] = {"num_entries": num_entries, "reach_tokens": reach_tokens}
    on_device, on_host = (
        outputs_of(torch.device(device), storage, compression=compression, **settings)
        for storage in (None, CPU)
    )
    assert len(on_device) == len(on_host) == 36
    for expected, out in zip(on_device, on_host, strict=True):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("storage", [None, torch.device("cpu")], ids=["device", "host"])
@pytest.mark.parametrize("compression", [None, KEPT], ids=["all", "kept"])
def test_chunks_that_attend_together_get_what_they_get_one_after_the_other(
    storage: torch.device | None, compression: Compression | None
):
    active = [range(3), range(5, 7), range(7, 11)]  # the keys of tokens 3 and 4 are older ones
    sizes = {"num_heads": 2, "head_width": 8, "dtype": torch.float32}

    def outputs(groups: list[list[range]]) -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        place = {"device": torch.device("cpu"), "storage": storage}
        caches = [caches_for(2, capacity=64, **sizes, **place) for _ in range(2)]
        for cache in (cache for layers in caches for cache in layers):
            cache.put(0, *torch.randn(2, 53, 2, 8, generator=draw))
            cache.settle(48)
        own = [torch.randn(3, 2, len(tokens), 2, 8, generator=draw) for tokens in active]
        made: dict[tuple[int, int], Tensor] = {}
        for group in groups:
            attend = cached_attention(
                caches,
                active=group,
                kernel=SDPA,
                compression=compression,
                prefetcher=prefetcher_for(caches[0]),
            )
            places = [active.index(tokens) for tokens in group]
            for layer in range(2):
                out = attend(layer, *torch.cat([own[place] for place in places], dim=2))
                parts = out.split([len(tokens) for tokens in group], dim=1)
                made.update({(layer, p): x for p, x in zip(places, parts, strict=True)})
        return [made[key] for key in sorted(made)]

    apart = outputs([[tokens] for tokens in active])
    for groups in ([active], [active[:1], active[1:]]):
        for expected, out in zip(apart, outputs(groups), strict=True):
            assert torch.equal(out, expected)


def test_the_copy_of_the_next_layer_begins_before_a_layer_attends_in_two_buffers():
    caches = caches_for(4, capacity=4, num_heads=1, head_width=1, storage=CPU, **PLACE)
    events: list[str] = []
    places: list[int] = []

    class Watched(Prefetcher):
        def begin(self, cache: KVCache, rows: range) -> None:
            events.append(f"copy {caches.index(cache)}")
            super().begin(cache, rows)

    def kernel(q: Tensor, k: Tensor, _v: Tensor) -> Tensor:
        events.append("attend")
        places.append(k.data_ptr())
        return q

    attend = cached_attention(
        [caches],
        active=[range(2)],
        kernel=Kernel("watched", kernel),
        prefetcher=Watched(caches[0]),
    )
    own = rows([1.0, 2.0]).unsqueeze(0)
    for layer in range(4):
        attend(layer, own, own, own)
    begun = [["copy 0", "copy 1"], ["copy 2"], ["copy 3"], []]
    assert events == [event for copies in begun for event in (*copies, "attend")]
    assert places[:2] == places[2:]
    assert places[0] != places[1]


@pytest.mark.gpu
def test_a_cache_in_host_memory_is_pinned():
    place = PLACE | {"device": torch.device("cuda"), "storage": CPU}
    (cache,) = caches_for(1, capacity=96, num_heads=2, head_width=8, **place)
    assert cache.kv.device == CPU
    assert cache.kv.is_pinned()


def simulate(
    num_chunks: int,
    num_steps: int,
    *,
    lag: int,
    given: int,
    sizes: Sequence[int],
    budget: int | None,
    computed: random.Random | None,
) -> tuple[int, int]:
    """Run the cache through a whole window, keys only; return most tokens filled, and the plan.

    Args:
        computed: draws which steps after every chunk's first are computed; None: none.
    """
    chunks = range(given, num_chunks)
    ticks = staggered(chunks, num_steps=num_steps, lag=lag)
    capacity = peak_tokens(
        ticks,
        chunk_tokens={chunk: sizes[chunk] for chunk in chunks},
        given=sum(sizes[:given]),
        budget=budget,
    )
    # far larger than planned, so that a plan that is too small shows as a number
    cache, peak = empty_cache(1000), 0
    for chunk in range(given):
        put(cache, 0, [0.0] * sizes[chunk])
        cache.settle(sizes[chunk])
        peak = max(peak, cache.filled)
    for tick in ticks:
        offset = 0
        for chunk, step in tick.steps.items():
            if step == 0 or (computed is not None and computed.random() < 0.5):
                if budget is not None and cache.clean > budget:
                    cache.keep(torch.arange(budget).unsqueeze(1))
                put(cache, offset, [0.0] * sizes[chunk])
                peak = max(peak, cache.filled)
            offset += sizes[chunk]
        for chunk in tick.finishing:
            cache.settle(sizes[chunk])
    return peak, capacity


def test_the_planned_capacity_is_never_exceeded():
    draw = random.Random(0)
    for _ in range(300):
        num_chunks, num_steps = draw.randint(1, 6), draw.randint(1, 6)
        settings = {
            "lag": draw.randint(0, num_steps + 1),
            "given": draw.randint(0, num_chunks - 1),
            "sizes": [draw.randint(1, 3) for _ in range(num_chunks)],
            "budget": draw.choice([None, 0, 1, 2, 5]),
        }
        peak, capacity = simulate(num_chunks, num_steps, **settings, computed=draw)
        assert peak <= capacity, settings


@pytest.mark.parametrize("budget", [None, 0, 2, 4, 100])
@pytest.mark.parametrize("lag", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("given", [0, 1, 2])
def test_the_planned_capacity_is_reached_where_all_is_reused_that_can_be(
    budget: int | None, lag: int, given: int
):
    peak, capacity = simulate(
        6, 5, lag=lag, given=given, sizes=[2] * 6, budget=budget, computed=None
    )
    assert peak == capacity


def test_the_capacity_of_the_published_run_is_that_worked_by_hand():
    """5 chunks of 10,200 tokens, 50 steps, lag 5: the first becomes clean after the last has begun,
    so that a budget saves nothing; one chunk after another it saves 2 of 5."""
    ticks = staggered(range(5), num_steps=50, lag=5)
    tokens = dict.fromkeys(range(5), 10_200)
    assert peak_tokens(ticks, chunk_tokens=tokens, given=0, budget=None) == 51_000
    assert peak_tokens(ticks, chunk_tokens=tokens, given=0, budget=10_200) == 51_000
    one_by_one = staggered(range(5), num_steps=50, lag=50)
    assert peak_tokens(one_by_one, chunk_tokens=tokens, given=0, budget=None) == 51_000
    # one kept, and one newly clean or active
    assert peak_tokens(one_by_one, chunk_tokens=tokens, given=0, budget=10_200) == 20_400
    two_by_two = staggered(range(5), num_steps=10, lag=5)
    tokens = dict.fromkeys(range(5), 80)
    assert peak_tokens(two_by_two, chunk_tokens=tokens, given=0, budget=80) == 240


def test_the_newest_clean_tokens_are_forgotten_with_all_behind_them():
    cache = KVCache(8, num_heads=1, head_width=1, dtype=torch.float32, device=torch.device("cpu"))
    cache.track(3)
    for chunk, value in enumerate((1.0, 2.0)):
        rows = torch.full((3, 1, 1), value)
        cache.put(0, rows, rows)
        cache.settle(3, chunk=chunk)
    cache.put(0, torch.zeros(2, 1, 1), torch.zeros(2, 1, 1))
    cache.rewind(3)
    assert (cache.clean, cache.filled) == (3, 3)
    assert cache.origins is not None
    assert cache.origins.count_GN.tolist() == [[3, 0, 0]]
    cache.put(0, torch.full((3, 1, 1), 5.0), torch.zeros(3, 1, 1))
    assert cache.prefix(3)[0].flatten().tolist() == [1, 1, 1, 5, 5, 5]
