import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache.attention import SDPA
from flowcache.errors import UserError
from flowcache.quantization import (
    SCALE_DTYPE,
    Codes,
    KVFormat,
    Table,
    attend_wide,
    bias,
    decode,
    encode,
    hadamard,
    key_channels,
    merge_like,
    pack,
    rounded_up,
    tensors_of,
    unpack,
    wide_width,
)

pytestmark = pytest.mark.numeric

QUANTIZERS = ("token", "kivi", "hadamard", "kmeans")
SMALL = KVFormat(group_size=16, centroids=8)


def keys(num_tokens: int = 256, *, heads: int = 3, width: int = 32, seed: int = 0) -> Tensor:
    """Return keys as they are: clusters of tokens, and two channels with large numbers."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, heads, width, generator=draw)
    which = torch.randint(8, (num_tokens,), generator=draw)
    x = centres[which] + 0.3 * torch.randn(num_tokens, heads, width, generator=draw)
    x[..., 5] += 8
    x[..., 20] *= 6
    return x


def slots(x_SGC: Tensor, slot: int = 0) -> Tensor:
    return torch.full(x_SGC.shape[:2], slot, dtype=torch.int16)


def stored(x_SGC: Tensor, made: KVFormat, *, is_key: bool = True) -> tuple[Codes, Table]:
    return encode(x_SGC, made, is_key=is_key, num_entries=made.num_entries(len(x_SGC)))


def decoded(x_SGC: Tensor, made: KVFormat, *, is_key: bool = True) -> tuple[Tensor, Tensor]:
    codes, table = stored(x_SGC, made, is_key=is_key)
    return decode(codes, table, slots(x_SGC), made, is_key=is_key)


def error(x_SGC: Tensor, made: KVFormat, *, is_key: bool = True) -> float:
    return (decoded(x_SGC, made, is_key=is_key)[0] - x_SGC).square().mean().item()


# Grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_codes_come_back_and_take_their_bits(bits: int):
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(3, 2, 4)
    packed = pack(codes, bits)
    assert packed.shape[-1] == codes.shape[-1] * bits // 8
    assert torch.equal(unpack(packed, bits), codes)


def test_the_lowest_channel_has_the_lowest_bits():
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [1 + 8 + 48]


def test_a_step_is_rounded_to_the_next_eight_bit_number_above():
    steps = torch.tensor([0.0, 1.0, 1.01, 447.0, 448.0])
    up = rounded_up(steps).view(SCALE_DTYPE).float()
    assert up.tolist() == [2**-9, 1.0, 1.125, 448.0, 448.0]


def test_two_bits_of_a_token_are_three_levels_and_the_middle_is_zero():
    x = torch.tensor([-4.0, -0.5, 0.9, 2.5]).reshape(1, 1, 4)
    made = KVFormat("int2", group_size=4, centred=False)
    codes, _ = stored(x, made)
    assert unpack(codes.packed, 2).flatten().tolist() == [0, 1, 1, 2]
    # base 4 / 448, of which 448 is a float8 number
    assert decoded(x, made)[0].flatten().tolist() == pytest.approx([-4, 0, 0, 4])


def test_a_range_of_two_bits_uses_four_levels_of_which_one_is_zero():
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 4)
    made = KVFormat("int2", "kivi", group_size=4, centred=False)
    assert decoded(x, made, is_key=False)[0].flatten().tolist() == pytest.approx([-1, 0, 1, 2])
    by_channel = x.reshape(4, 1, 1).expand(-1, -1, 4)
    assert torch.allclose(decoded(by_channel, made)[0], by_channel)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2"])
@pytest.mark.parametrize("quantizer", ["token", "kivi", "kmeans"])
@pytest.mark.parametrize("is_key", [True, False])
def test_no_number_is_further_from_its_code_than_half_a_step(
    dtype: str, quantizer: str, is_key: bool
):
    made, x = replace(SMALL, dtype=dtype, quantizer=quantizer), keys()
    codes, table = stored(x, made, is_key=is_key)
    back, _ = decode(codes, table, slots(x), made, is_key=is_key)
    if made.is_per_channel(is_key=is_key):
        index = codes.indices[..., 0].long()
        step = table.entries[0][torch.arange(3), 0, index].float()
    else:
        step = codes.scales[..., :2].contiguous().view(SCALE_DTYPE).float()
        step = (step * table.base[0][:, None]).repeat_interleave(16, dim=-1)
    # a range's zero is rounded, too: its far end may be half a step off in addition
    slack = 1.01 if quantizer == "kivi" else 0.501
    assert ((back - x).abs() <= slack * step).all()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("is_key", [True, False])
def test_more_bits_have_smaller_errors_and_eight_nearly_none(quantizer: str, is_key: bool):
    made, x = replace(SMALL, quantizer=quantizer), keys()
    two, four, eight, fp8 = (
        error(x, replace(made, dtype=dtype), is_key=is_key)
        for dtype in ("int2", "int4", "int8", "fp8")
    )
    assert two > 4 * four > 64 * eight
    assert eight < 1e-3
    assert fp8 < 0.01


def test_all_ways_to_quantise_beat_rounding_where_channels_or_clusters_stand_out():
    x, plain = keys(512), KVFormat("int2", group_size=16, centred=False)
    rounding = error(x, plain)
    for change in (
        {"centred": True},
        {"quantizer": "kivi"},
        {"quantizer": "hadamard", "centred": True},
        {"quantizer": "kmeans", "centroids": 8},
    ):
        assert error(x, replace(plain, **change)) < 0.8 * rounding, change


def test_each_stage_of_centroids_makes_the_error_smaller():
    made = replace(SMALL, dtype="int2", quantizer="kmeans", centroids=4)
    one, two, four = (error(keys(512), replace(made, stages=n)) for n in (1, 2, 4))
    assert one > 1.05 * two > 1.05**2 * four


def test_centroids_start_from_those_of_the_chunk_before():
    made = replace(SMALL, quantizer="kmeans", dtype="int2")
    x, entries = keys(512), made.num_entries(512)
    _, first = stored(x, made)
    _, fresh = encode(keys(512, seed=1), made, is_key=True, num_entries=entries)
    _, warm = encode(keys(512, seed=1), made, is_key=True, num_entries=entries, before=first)
    assert not torch.equal(fresh.entries, warm.entries)
    _, same = encode(x, made, is_key=True, num_entries=entries, before=first)
    assert (same.entries.float() - first.entries.float()).abs().max() < 0.2


def test_hadamard_turns_back_and_spreads_a_single_channel():
    x = torch.eye(8)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-6)
    assert torch.allclose(hadamard(x).abs(), torch.full((8, 8), 8**-0.5))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_head_does_not_depend_on_the_others(quantizer: str):
    made, x = replace(SMALL, quantizer=quantizer, dtype="int2"), keys()
    every, _ = decoded(x, made)
    for head in range(3):
        assert torch.equal(decoded(x[:, head : head + 1], made)[0], every[:, head : head + 1])


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4", "int2"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("is_key", [True, False])
def test_the_bytes_that_are_counted_are_those_that_are_stored(
    dtype: str, quantizer: str, is_key: bool
):
    made, x = KVFormat(dtype, quantizer, group_size=16, stages=2), keys(300)
    codes, table = stored(x, made, is_key=is_key)
    of_token = made.code_bytes(32, is_key=is_key)
    assert tuple(part.shape[-1] for part in tensors_of(codes)) == of_token
    assert sum(part.nbytes for part in tensors_of(codes)) == 300 * 3 * sum(of_token)
    counted = made.table_bytes(300, 32, is_key=is_key)
    assert sum(part.nbytes for part in tensors_of(table)) == 3 * counted


def test_the_first_tokens_stay_first_where_a_chunk_has_more_than_256_groups():
    x = keys(17_000, heads=1)
    made = KVFormat("int8", "kivi", group_size=16)
    assert made.num_entries(17_000) <= 256
    assert error(x, made) < 1e-2


@pytest.mark.parametrize(
    ("made", "width", "named"),
    [
        (KVFormat(group_size=48), 128, "divides the head width 128, not 48"),
        (KVFormat(group_size=2), 8, "multiple of 4"),
        (KVFormat("int2", "hadamard", group_size=24), 48, "power of two, not 48"),
    ],
)
def test_what_does_not_fit_the_heads_is_refused_in_a_line(made: KVFormat, width: int, named: str):
    with pytest.raises(UserError, match=named):
        made.check(width)


# The bias of logits ---------------------------------------------------------------------------


def explicit(q: Tensor, k: Tensor, v: Tensor, minus_HQK: Tensor) -> Tensor:
    """Attend by the formula: softmax(q k / sqrt(C) - bias) v, `[Q, H, C]`."""
    logits = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5 - minus_HQK
    return torch.einsum("hqk,khc->qhc", logits.softmax(dim=-1), v)


def wide(k: Tensor, v: Tensor, extra: Tensor, *, groups: int) -> tuple[Tensor, Tensor]:
    width = wide_width(k.shape[-1], groups)
    fill = k.new_zeros(*k.shape[:2], width - k.shape[-1])
    wide_k, wide_v = torch.cat([k, fill], -1), torch.cat([v, fill], -1)
    wide_k[..., k.shape[-1] : k.shape[-1] + extra.shape[-1]] = extra
    return wide_k.unsqueeze(0), wide_v.unsqueeze(0)


def problem(dtype: torch.dtype) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 24, 4, 32, generator=draw, dtype=torch.float64).to(dtype)
    variance = 0.3 * torch.rand(24, 4, 2, generator=draw, dtype=torch.float64)
    variance[18:] = 0  # keys that are exact
    return {"q": q, "k": k, "v": v, "variance": variance}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 5e-3)])
def test_extra_channels_give_the_logits_their_bias(dtype: torch.dtype, tolerance: float):
    q, k, v, variance = problem(dtype).values()
    exact = [x.double() for x in (q, k, v)]
    wanted = explicit(*exact, bias(exact[0], variance))
    extra = key_channels(variance, head_width=32)
    wide_k, wide_v = wide(k, v, extra.to(dtype), groups=2)
    made = attend_wide(SDPA, q.unsqueeze(0), wide_k, wide_v, num_groups=2)[0]
    # relative to the largest output; the bias itself moves outputs by much more
    size = wanted.abs().max()
    assert (made.double() - wanted).abs().max() <= tolerance * size
    plain = SDPA(*(x.unsqueeze(0) for x in (q, k, v)))[0]
    assert (plain.double() - wanted).abs().max() > 0.02 * size


def test_turning_neighbouring_channels_leaves_the_bias_as_it_is():
    q, _, _, variance = problem(torch.float64).values()
    angle = torch.rand(24, 1, 16, dtype=torch.float64)
    even, odd = q[..., 0::2], q[..., 1::2]
    turned = torch.stack(
        [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1
    ).flatten(-2)
    assert torch.allclose(bias(turned, variance), bias(q, variance), rtol=1e-12)


def test_keys_of_the_usual_width_are_attended_to_as_they_are():
    q, k, v, _ = problem(torch.float32).values()
    qkv = [x.unsqueeze(0) for x in (q, k, v)]
    assert torch.equal(attend_wide(SDPA, *qkv, num_groups=0), SDPA(*qkv))


def test_the_bias_is_what_uniform_errors_add_to_the_softmax():
    draw = torch.Generator().manual_seed(0)
    q, step = torch.randn(1, 1, 64, generator=draw), 0.8
    noise = (torch.rand(200_000, 64, generator=draw) - 0.5) * step
    measured = (noise @ q[0, 0] / 8).exp().mean().log()
    counted = bias(q, torch.full((1, 1, 4), step**2 / 12)).item()
    assert measured.item() == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_variance_is_that_of_the_errors(dtype: str, quantizer: str):
    made, x = replace(SMALL, dtype=dtype, quantizer=quantizer), keys(512)
    back, variance = decoded(x, made)
    measured = (back - x).square().mean().item()
    assert variance.mean().item() == pytest.approx(measured, rel=0.02)


# Merging of like keys -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 5e-3)])
def test_merging_equal_keys_changes_no_attention(dtype: torch.dtype, tolerance: float):
    draw = torch.Generator().manual_seed(2)
    frame = torch.randn(8, 2, 16, generator=draw, dtype=torch.float64)
    new = torch.randn(8, 2, 16, generator=draw, dtype=torch.float64)
    k = torch.cat([frame, frame[torch.randperm(8, generator=draw)], new]).to(dtype)
    q = torch.randn(5, 2, 16, generator=draw, dtype=torch.float64).to(dtype)
    v = torch.randn(24, 2, 16, generator=draw, dtype=torch.float64).to(dtype)
    merged_k, merged_v, log_count = merge_like(k, v, frame_tokens=8, threshold=0.999)
    assert len(merged_k) == 16
    assert torch.equal(log_count.exp().sum(dim=0).round(), torch.tensor([24.0, 24.0]))
    exact = [x.double() for x in (q, k, v)]
    wanted = explicit(*exact, torch.zeros(2, 5, 24, dtype=torch.float64))
    none = torch.zeros(16, 2, 1, dtype=torch.float64)
    extra = key_channels(none, head_width=16, log_count_KG=log_count.to(torch.float64))
    wide_kv = wide(merged_k, merged_v, extra.to(dtype), groups=1)
    made = attend_wide(SDPA, q.unsqueeze(0), *wide_kv, num_groups=1)[0]
    # counts are float32: log 2 is right to 1e-8
    assert (made.double() - wanted).abs().max() < max(tolerance, 1e-7) * wanted.abs().max()


def test_a_head_that_merges_more_has_rows_without_mass():
    k = torch.randn(12, 2, 8, generator=torch.Generator().manual_seed(0))
    k[:6, 0] = k[6:, 0]
    merged, _, log_count = merge_like(k, k, frame_tokens=6, threshold=0.99)
    assert len(merged) == 12
    assert log_count[:6, 0].tolist() == [-math.inf] * 6
    assert log_count[6:, 0].tolist() == pytest.approx([math.log(2)] * 6)
    assert torch.equal(merged[:, 1], k[:, 1])
