"""Read quantised keys or values in one kernel: unpack, scale, add what tokens share, rotate.

What `quantization.decode` and a rotation do, for steps per token: each byte that is stored is read
once, each number is written once, and nothing in between goes through memory. One program reads a
token of a head; the heads of a token follow each other, so that its angles are read once.

Axes: as in `kv_quantized`; J pairs of channels that are rotated together.
"""

# Triton is there where CUDA is, and its functions have no Python types.
# pyright: basic, reportMissingImports=false
# ruff: noqa: ANN001, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowcache.kv_quantized import Rotary
from flowcache.quantization import PLACE_BYTES, Codes, KVFormat, Table


@triton.jit
def _number(code):
    """Return the float32 that an E4M3 code means, exactly: by its bits."""
    code = code.to(tl.int32)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent > 0, normal, mantissa.to(tl.float32) * 0.001953125)  # 2^-9
    return tl.where(code & 128 != 0, -size, size)


@triton.jit
def _values(
    channel,
    token_head,
    head,
    slot,
    packed,
    scales,
    indices,
    base,
    mean,
    entries,
    num_heads: tl.constexpr,
    width: tl.constexpr,
    group_size: tl.constexpr,
    bits: tl.constexpr,
    is_fp8: tl.constexpr,
    num_stages: tl.constexpr,
    num_entries: tl.constexpr,
):
    """Return some channels of a token, before rotation."""
    per_byte: tl.constexpr = 8 // bits
    byte = tl.load(packed + token_head * (width // per_byte) + channel // per_byte)
    if is_fp8:
        level = _number(byte)
    else:
        code = (byte.to(tl.int32) >> ((channel % per_byte) * bits)) & ((1 << bits) - 1)
        level = (code - ((1 << (bits - 1)) - 1)).to(tl.float32)
    scale = tl.load(scales + token_head * (width // group_size) + channel // group_size)
    table = slot * num_heads + head
    x = level * (_number(scale) * tl.load(base + table))
    for stage in tl.static_range(num_stages):
        index = tl.load(indices + token_head * num_stages + stage).to(tl.int64)
        row = (table * num_stages + stage) * num_entries + index
        x += tl.load(entries + row * width + channel).to(tl.float32)
    return x + tl.load(mean + table * width + channel).to(tl.float32)


@triton.jit
def _decode(
    packed,
    scales,
    indices,
    base,
    mean,
    entries,
    slots,
    positions,
    angles,
    into,
    into_stride_token,
    into_stride_head,
    num_heads: tl.constexpr,
    width: tl.constexpr,
    num_lanes: tl.constexpr,
    group_size: tl.constexpr,
    bits: tl.constexpr,
    is_fp8: tl.constexpr,
    num_stages: tl.constexpr,
    num_entries: tl.constexpr,
    num_pairs: tl.constexpr,
    has_neighbours: tl.constexpr,
):
    token_head = tl.program_id(0).to(tl.int64)
    token, head = token_head // num_heads, token_head % num_heads
    slot = tl.load(slots + token_head).to(tl.int64)
    j = tl.arange(0, num_lanes)
    inside, is_rotated = j < width // 2, j < num_pairs
    # channels that are not rotated are neighbours, too
    is_near = (j >= num_pairs) | has_neighbours
    first = tl.where(inside, tl.where(is_near, 2 * j, j), 0)
    second = tl.where(inside, tl.where(is_near, 2 * j + 1, j + num_pairs), 0)
    both = _values(
        tl.join(first, second),
        token_head,
        head,
        slot,
        packed,
        scales,
        indices,
        base,
        mean,
        entries,
        num_heads,
        width,
        group_size,
        bits,
        is_fp8,
        num_stages,
        num_entries,
    )
    a, b = tl.split(both)
    if num_pairs > 0:
        place = tl.load(positions + token_head).to(tl.int64) * (2 * num_pairs) + 2 * j
        cos = tl.load(angles + place, mask=is_rotated, other=1.0)
        sin = tl.load(angles + place + 1, mask=is_rotated, other=0.0)
        a, b = a * cos - b * sin, a * sin + b * cos
    row = into + token * into_stride_token + head * into_stride_head
    tl.store(row + first, a.to(into.dtype.element_ty), mask=inside)
    tl.store(row + second, b.to(into.dtype.element_ty), mask=inside)


def can_decode(made: KVFormat) -> bool:
    """Return whether the kernel reads this: steps per token, no mixed channels."""
    return made.quantizer in ("token", "kmeans")


def decode_into(
    into: Tensor,
    codes: Codes,
    table: Table,
    *,
    is_key: bool,
    slot_TG: Tensor,
    position_TG: Tensor,
    made: KVFormat,
    rotary: Rotary | None = None,
) -> None:
    """Write keys or values, `[T, G, C]`, as `quantization.decode` and a rotation make them.

    Args:
        into: `[T, G, X]`, of whose last axis the first C are written.
        rotary: turns what is written by its position; None: it stays as it is.
    """
    num_tokens, num_heads = slot_TG.shape
    width = table.mean.shape[-1]
    angles = None if rotary is None else rotary.table.contiguous()
    assert into.stride(-1) == 1, "channels lie side by side"
    _decode[(num_tokens * num_heads,)](  # pyright: ignore[reportIndexIssue]
        codes.packed,
        codes.scales,
        codes.indices,
        table.base,
        table.mean,
        table.entries,
        slot_TG,
        position_TG,
        table.base if angles is None else angles,
        into,
        into.stride(0),
        into.stride(1),
        num_heads=num_heads,
        width=width,
        num_lanes=triton.next_power_of_2(width // 2),
        group_size=made.group_size,
        bits=made.bits,
        is_fp8=made.dtype == "fp8",
        num_stages=made.table_stages(is_key=is_key),
        num_entries=table.entries.shape[3],
        num_pairs=0 if angles is None else angles.shape[1],
        has_neighbours=rotary is None or rotary.has_neighbours,
    )


def moved_bytes(
    made: KVFormat, num_heads: int, head_width: int, *, itemsize: int
) -> tuple[int, int]:
    """Return the bytes per token that the kernel moves for a key, and the least that can be.

    It reads codes, the token's table and position in each head, and the angles once, and writes the
    numbers; tables of a chunk stay in the cache of the device. The least are codes and numbers.
    """
    codes = sum(made.code_bytes(head_width, is_key=True)) * num_heads
    least = codes + num_heads * head_width * itemsize
    return least + PLACE_BYTES * num_heads + 4 * head_width, least


INTERPRETED = not isinstance(_decode, triton.JITFunction)
"""Whether Triton's interpreter runs the kernel, as it can on a CPU."""


def runs_on(device: torch.device) -> bool:
    """Return whether the kernel can read what lies on a device."""
    return device.type == "cuda" or INTERPRETED
