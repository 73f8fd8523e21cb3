import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache.attention import SDPA
from flowcache.kv import KVCache, cached_attention, caches_for
from flowcache.kv_quantized import (
    KVLayout,
    KVSizes,
    QuantizedKVCache,
    Rotary,
    cache_maker,
)
from flowcache.quantization import KVFormat, tensors_of
from flowcache.schedule import staggered

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
HEADS, WIDTH, CHUNK = 2, 32, 64
PLACE: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
QUANTIZERS = ("token", "kivi", "hadamard", "kmeans")
TICKS = staggered(range(6), num_steps=4, lag=2)


def rotate(x_BSHC: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring channels, as complex numbers."""
    turned = torch.view_as_complex(x_BSHC.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.view_as_complex(rope.contiguous())[:, None]
    return torch.view_as_real(turned).flatten(-2)


def rotary(num_positions: int = 6 * CHUNK) -> Rotary:
    angles = torch.arange(num_positions)[:, None] * 10.0 ** -torch.linspace(0, 3, WIDTH // 2)
    return Rotary(torch.stack([angles.cos(), angles.sin()], -1), rotate, has_neighbours=True)


def layout_of(made: KVFormat, *, is_rotated: bool = True) -> KVLayout:
    sizes = KVSizes.of(made, TICKS, dict.fromkeys(range(6), CHUNK))
    starts = {chunk: chunk * CHUNK for chunk in range(6)}
    return KVLayout(sizes, starts, rotary() if is_rotated else None)


def caches(
    made: KVFormat | None, num_layers: int = 1, *, is_rotated: bool = True, **place: Any
) -> list[Any]:
    layout = None if made is None else layout_of(made, is_rotated=is_rotated)
    sizes = {"capacity": 6 * CHUNK, "num_heads": HEADS, "head_width": WIDTH}
    return caches_for(num_layers, **sizes, **PLACE, **place, make=cache_maker(layout))


def drawn(seed: int, *, num_tokens: int = CHUNK) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, num_tokens, HEADS, WIDTH, generator=torch.Generator().manual_seed(seed))
    k[..., 3] += 6
    return k, v


def fill(cache: KVCache, num_chunks: int, *, first: int = 0) -> None:
    for chunk in range(first, first + num_chunks):
        k, v = drawn(chunk)
        positions = torch.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
        cache.put(0, rotate(k.unsqueeze(0), rotary().table[positions])[0], v)
        cache.settle(CHUNK, chunk=chunk)
        cache.pack()


def stored(cache: QuantizedKVCache) -> list[Tensor]:
    """Return what is stored of the quantised tokens."""
    return [part[: cache.packed].clone() for part in cache.rows.tensors()]


def some_rows(num_tokens: int, kept: int, *, seed: int = 9) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_tokens, generator=draw)[:kept].sort().values for _ in range(HEADS)]
    return torch.stack(rows, dim=1)


def made(dtype: str = "int4", quantizer: str = "token", **change: Any) -> KVFormat:
    return dataclasses.replace(KVFormat(dtype, quantizer, group_size=16, centroids=8), **change)


def test_the_dtype_of_the_model_is_the_cache_without_quantisation():
    assert type(caches(None)[0]) is KVCache


def test_a_chunk_that_stays_as_it_is_is_read_bit_by_bit():
    (cache,), (plain,) = caches(made(keep_last=True)), caches(None)
    for each in (cache, plain):
        fill(each, 1)
        each.put(0, *drawn(7))
    for own, other in zip(cache.prefix(CHUNK), plain.prefix(CHUNK), strict=True):
        assert torch.equal(own, other)


def test_the_last_clean_chunk_is_quantised_when_the_next_one_is_clean():
    (cache,) = caches(made(keep_last=True))
    fill(cache, 2)
    assert (cache.packed, cache.clean) == (CHUNK, 2 * CHUNK)
    assert torch.equal(cache.prefix(0)[1][CHUNK:], drawn(1)[1])
    (other,) = caches(made())
    fill(other, 2)
    assert other.packed == other.clean == 2 * CHUNK


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bias_correction", [False, True])
def test_eight_bits_attend_nearly_as_sixteen(quantizer: str, bias_correction: bool):
    outputs: list[Tensor] = []
    for form in (None, made("int8", quantizer, bias_correction=bias_correction)):
        (cache,) = caches(form)
        fill(cache, 3)
        attend = cached_attention(
            [[cache]], active=[range(CHUNK), range(CHUNK, 2 * CHUNK)], kernel=SDPA
        )
        k, v = drawn(8, num_tokens=2 * CHUNK)
        outputs.append(attend(0, k[None] / 4, k[None], v[None]))
    assert torch.allclose(*outputs, atol=0.03)


def test_what_is_read_does_not_depend_on_what_was_read_before():
    """Chunks see prefixes of several lengths, layers take turns in one buffer."""
    form = made("int4", "kmeans", bias_correction=True)
    first, second = caches(form, 2)
    assert first.layer is second.layer
    for cache in (first, second):
        fill(cache, 3)
        cache.put(0, *drawn(5))
        cache.put(CHUNK, *drawn(6))
    reads = [(0, None), (CHUNK, None), (2 * CHUNK, 3 * CHUNK), (CHUNK, CHUNK), (CHUNK, 2 * CHUNK)]

    def read(cache: QuantizedKVCache, offset: int, reach: int | None) -> list[Tensor]:
        return [x.clone() for x in cache.prefix(offset, reach_tokens=reach)]

    for offset, reach in reads:
        wanted = read(first, offset, reach)
        for other, other_reach in reads:
            read(first, other, other_reach)
            read(second, other, other_reach)
            again = read(first, offset, reach)
            assert all(torch.equal(*pair) for pair in zip(wanted, again, strict=True))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_keys_are_quantised_before_rotation(quantizer: str):
    (turned,), (plain,) = (caches(made(quantizer=quantizer), is_rotated=x) for x in (True, False))
    fill(turned, 2)
    for chunk in range(2):
        plain.put(0, *drawn(chunk))
        plain.settle(CHUNK, chunk=chunk)
        plain.pack()
    same = [
        (one == two).float().mean()
        for one, two in zip(stored(turned), stored(plain), strict=True)
        if one.numel()
    ]
    assert min(same) > 0.99  # but for rounding of the rotations
    keys, _ = plain.prefix(0)
    wanted = rotate(keys.unsqueeze(0), rotary().table[: 2 * CHUNK])[0]
    assert (turned.prefix(0)[0] - wanted).abs().mean() < 0.01


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_evicting_changes_no_stored_byte(quantizer: str):
    (cache,) = caches(made("int2", quantizer, stages=2, bias_correction=True))
    fill(cache, 4)
    cache.put(0, *drawn(7))
    before, seen = stored(cache), [x.clone() for x in cache.prefix(CHUNK)]
    tables = [x.clone() for table in cache.tables for x in tensors_of(table)]
    rows = some_rows(4 * CHUNK, 100)
    cache.keep(rows)

    def kept(x: Tensor, rows: Tensor = rows) -> Tensor:
        return torch.stack([x[rows[:, head], head] for head in range(HEADS)], dim=1)

    for one, two in zip(stored(cache), before, strict=True):
        assert torch.equal(one, kept(two))
    for one, two in zip(
        (x for table in cache.tables for x in tensors_of(table)), tables, strict=True
    ):
        assert torch.equal(one, two)
    for one, two in zip(cache.prefix(CHUNK), seen, strict=True):
        assert torch.equal(one, torch.cat([kept(two[: 4 * CHUNK]), two[4 * CHUNK :]]))
    again = some_rows(100, 30, seed=1)
    held = stored(cache)
    cache.keep(again)
    assert all(
        torch.equal(one, kept(two, again)) for one, two in zip(stored(cache), held, strict=True)
    )


def test_quantising_and_then_evicting_stores_what_evicting_and_then_quantising_does():
    """With a step per token; only what is seen of a key while it is scored differs."""
    form = made("int2", centred=False)
    (first,), (then,) = caches(form, is_rotated=False), caches(form, is_rotated=False)
    k, v = drawn(0)
    kept = torch.arange(3, 40).unsqueeze(1).expand(-1, HEADS)
    first.put(0, k, v)
    first.settle(CHUNK, chunk=0)
    first.pack()
    first.keep(kept)
    then.put(0, k[3:40], v[3:40])
    then.settle(37, chunk=0)
    then.pack()
    for own, other in zip(first.prefix(0), then.prefix(0), strict=True):
        # steps are float8 numbers over those of the largest one, which may have left
        assert (own - other).abs().mean() < 0.05 * other.abs().mean()


def test_tables_without_tokens_make_room_for_others():
    (cache,) = caches(made("int2", "kmeans"))
    for chunk in range(6):
        before = cache.prefix(0)[0].clone()
        fill(cache, 1, first=chunk)
        assert torch.equal(cache.prefix(0)[0][: len(before)], before)
        if cache.clean > 2 * CHUNK:
            last = torch.arange(cache.clean - CHUNK, cache.clean)
            cache.keep(last.unsqueeze(1).expand(-1, HEADS))
    assert len(cache.tables[0].base) == 3
    assert cache.rows.slot[: cache.clean].unique().numel() == 2


def test_a_compression_sees_the_keys_as_they_are_read():
    (cache,) = caches(made("int4", bias_correction=True))
    cache.track(6)
    fill(cache, 2)
    wanted = cache.prefix(0)[0][..., :WIDTH].clone()
    seen: list[Tensor] = []

    def keep(_queries: Tensor, keys: Tensor) -> Tensor:
        seen.append(keys.clone())
        return some_rows(2 * CHUNK, 50)

    cache.compress(torch.zeros(1, HEADS, WIDTH), keep)
    assert torch.equal(seen[0], wanted)
    assert cache.clean == 50
    assert cache.origins.count_GN.sum(dim=1).tolist() == [50, 50]
    assert cache.prefix(0)[0].shape == (50, HEADS, 40)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("num_gone", [1, 2, 3])
def test_chunks_that_are_dropped_leave_no_trace(quantizer: str, keep_last: bool, num_gone: int):
    form = made("int2", quantizer, keep_last=keep_last, bias_correction=True)
    (cache,), (wanted,) = caches(form), caches(form)
    for each in (cache, wanted):
        each.track(6)
    fill(cache, 3)
    cache.put(0, *drawn(9))
    cache.prefix(CHUNK)
    cache.rewind(num_gone * CHUNK)
    fill(wanted, 3 - num_gone)
    for each in (cache, wanted):
        assert each.clean == each.filled == (3 - num_gone) * CHUNK
        fill(each, 2, first=3)
        each.put(0, *drawn(8))
    assert (cache.packed, cache.waiting) == (wanted.packed, wanted.waiting)
    assert torch.equal(cache.origins.count_GN, wanted.origins.count_GN)
    for own, other in zip(cache.prefix(CHUNK), wanted.prefix(CHUNK), strict=True):
        assert torch.equal(own, other)
    # their tables make room for those of the new chunks
    assert len(cache.tables[0].base) == len(wanted.tables[0].base)


def test_a_part_of_a_chunk_that_waits_may_be_dropped():
    (cache,) = caches(made(keep_last=True))
    fill(cache, 2)
    cache.rewind(10)
    assert torch.equal(cache.prefix(0)[1][CHUNK:], drawn(1)[1][:-10])
    fill(cache, 1, first=2)
    assert (cache.packed, cache.clean) == (2 * CHUNK - 10, 3 * CHUNK - 10)


def test_keys_on_the_host_are_those_on_the_device():
    (here,), (there,) = caches(made("int2", "kmeans")), caches(made("int2", "kmeans"), storage=CPU)
    for cache in (here, there):
        fill(cache, 3)
    assert all(torch.equal(*pair) for pair in zip(here.prefix(0), there.prefix(0), strict=True))


def test_shared_keys_are_replaced_before_they_are_quantised():
    (cache,) = caches(made())
    cache.put(0, *drawn(0))
    cache.settle(CHUNK, chunk=0)
    new = torch.stack(drawn(1))
    cache.replace_last_clean(new)
    assert torch.equal(cache.last_clean(CHUNK), new)
    cache.pack()
    with pytest.raises(AssertionError, match="never replaced"):
        cache.replace_last_clean(new)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("dtype", ["int8", "int2"])
def test_the_planned_bytes_are_those_of_a_full_cache(dtype: str, quantizer: str):
    form = made(dtype, quantizer, stages=2, keep_last=True)
    (cache,) = caches(form)
    fill(cache, 6)
    cache.pack()
    sizes = cache.layout.sizes
    # five chunks are quantised, the sixth has no table yet
    sizes = dataclasses.replace(sizes, num_chunks=5)
    planned = 6 * CHUNK * sizes.row_bytes(WIDTH) + sizes.rest_bytes(6 * CHUNK, WIDTH, itemsize=4)
    assert cache.num_bytes() == HEADS * planned


def test_dense_tokens_are_those_of_the_fullest_tick_and_those_that_wait():
    ticks, tokens = staggered(range(4), num_steps=4, lag=2), dict.fromkeys(range(4), 10)
    assert [len(tick.steps) for tick in ticks] == [1, 1, 2, 2, 2, 2, 2, 2, 1, 1]
    form = made()
    assert KVSizes.of(form, ticks, tokens).dense_tokens == 20
    assert KVSizes.of(form, ticks, tokens, waits=True).dense_tokens == 30
    keeps = dataclasses.replace(form, keep_last=True)
    assert KVSizes.of(keeps, ticks, tokens).dense_tokens == 30


@pytest.mark.parametrize(
    ("dtype", "quantizer", "factor"), [("int2", "kmeans", 6.0), ("int4", "token", 3.5)]
)
@pytest.mark.parametrize("chunk_tokens", [4680, 10_200])
def test_caches_of_released_sizes_are_many_times_smaller(
    dtype: str, quantizer: str, factor: float, chunk_tokens: int
):
    """Of Self-Forcing and SkyReels-V2: heads of 128 numbers; how many there are does not matter."""
    form = KVFormat(dtype, quantizer)
    tokens = dict.fromkeys(range(2), chunk_tokens)
    sizes = KVSizes.of(form, [], tokens)
    layout = KVLayout(sizes, {0: 0, 1: chunk_tokens})
    cache = QuantizedKVCache(
        2 * chunk_tokens,
        layout=layout,
        num_heads=1,
        head_width=128,
        dtype=torch.bfloat16,
        device=CPU,
    )
    draw = torch.Generator().manual_seed(0)
    for chunk in tokens:
        k, v = torch.randn(2, chunk_tokens, 1, 128, generator=draw)
        cache.put(0, k, v)
        cache.settle(chunk_tokens, chunk=chunk)
        cache.pack()
    dense = 2 * 2 * chunk_tokens * 128 * 2
    assert factor < dense / (cache.num_bytes() - cache.kv.nbytes) < 1.1 * factor
