"""Keys and values in 8, 4 or 2 bits: grids, baselines, k-means residuals, and the logits' bias.

A chunk is quantised once, when it is clean; `kv_quantized` keeps what `encode` returns. A number is

    x = code * step + zero + mean of its channel + centroids of its token

with a step per token and group of channels, or per channel and group of tokens. All that belongs
to a token is in `Codes` and moves with it; what a chunk's tokens share is in a `Table`.

To compare, by the setting `kv.quantizer`:

    token       symmetric, a step per token and group of channels (round to nearest)
    kivi        keys: a range per channel and 64 tokens; values: per token and group of channels
    hadamard    as token, after an orthonormal rotation of the channels that mixes outliers
    kmeans      as token, of what is left after the nearest of some centroids was subtracted

Axes: S tokens of a chunk, T stored tokens, G key/value heads, C head width, N groups of channels,
E entries of a table, R stages, Z tables, Q queries, K keys, H query heads, B batch. `[T, G, x]`
rows are what compression gathers.

Source: QVG, arXiv 2602.02958 (k-means); KIVI, arXiv 2402.02750; QuaRot, arXiv 2404.00456; bias of
quantised keys, arXiv 2605.26266; merging of like keys, FAST-AR, arXiv 2602.01801.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from flowcache.bounds import made_of
from flowcache.compress import KVRule
from flowcache.errors import UserError

BITS = {"fp8": 8, "int8": 8, "int4": 4, "int2": 2}
SCALE_DTYPE = torch.float8_e4m3fn
TOP_SCALE = 448.0
"""The largest number of float8 E4M3; its code is `TOP_CODE`."""
TOP_CODE = 0x7E
TOKENS_PER_ENTRY = 64
"""Tokens that share a range of KIVI, and for which there is a centroid, at least."""
FEW_CENTROIDS = 8
"""That small chunks have in any case, but for one to four tokens."""
MAX_ENTRIES = 256
"""Of a table: an index is a byte."""
FIRST_LLOYD_STEPS, NEXT_LLOYD_STEPS = 10, 2
"""Of k-means, from tokens of the chunk, and from the centroids of the chunk before."""
ENCODING_BYTES, ENCODING_COPIES = 256 * 2**20, 8
"""Scratch memory of encoding: float32 copies of the heads that are encoded at once."""
PLACE_BYTES = 6
"""Of a stored token in a head: its chunk's table (int16) and its position (int32)."""
WIDTH_MULTIPLE = 8
"""Of head widths that attention kernels take."""


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are quantised."""

    dtype: str = "int4"
    quantizer: str = "token"
    group_size: int = 64
    """Channels that share a step."""
    centroids: int = MAX_ENTRIES
    """Of k-means, at most: large chunks have one for 64 tokens."""
    stages: int = 1
    """Of k-means, each of what the one before left."""
    centred: bool = True
    """Whether the mean of each channel in a chunk is subtracted."""
    keep_last: bool = False
    """Whether the last clean chunk stays as it is until the next one is clean."""
    bias_correction: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return BITS[self.dtype]

    def check(self, head_width: int) -> None:
        """Refuse what can't be done with heads of a width."""
        if head_width % self.group_size or self.group_size % 4:
            raise UserError(
                f"kv.group_size must be a multiple of 4 that divides the head width {head_width}, "
                f"not {self.group_size}"
            )
        if self.quantizer == "hadamard" and head_width & (head_width - 1):
            raise UserError(
                f"kv.quantizer=hadamard needs a head width that is a power of two, not "
                f"{head_width}: set kv.quantizer=token"
            )

    def is_per_channel(self, *, is_key: bool) -> bool:
        """Return whether a step belongs to a channel rather than to a token."""
        return self.quantizer == "kivi" and is_key

    def bias_groups(self, head_width: int, *, has_neighbours: bool = True) -> int:
        """Return the groups of channels with a bias of their own; 0 without correction.

        Args:
            has_neighbours: whether the channels that are rotated together lie in one group.
        """
        if not self.bias_correction:
            return 0
        # errors that were mixed, or whose pairs are in two groups, have one variance
        is_one = self.quantizer == "hadamard" or not has_neighbours
        return 1 if is_one else head_width // self.group_size

    def num_entries(self, chunk_tokens: int) -> int:
        """Return the entries of a chunk's table: centroids, or groups of tokens."""
        if self.quantizer == "kmeans":
            few = min(FEW_CENTROIDS, chunk_tokens // 4)
            return max(min(self.centroids, max(chunk_tokens // TOKENS_PER_ENTRY, few)), 1)
        return -(-chunk_tokens // _tokens_per_range(chunk_tokens))

    def table_stages(self, *, is_key: bool) -> int:
        """Return how many lists of entries a table has: stages, or steps and zeros."""
        if self.quantizer == "kmeans":
            return self.stages
        return 2 if self.is_per_channel(is_key=is_key) else 0

    def code_bytes(self, head_width: int, *, is_key: bool) -> tuple[int, int, int]:
        """Return the bytes of a token in one head: codes, scales, indices into the table."""
        groups = head_width // self.group_size
        is_range = self.quantizer == "kivi"
        scales = 0 if self.is_per_channel(is_key=is_key) else groups * (2 if is_range else 1)
        indices = self.table_stages(is_key=is_key)
        if self.is_per_channel(is_key=is_key):
            indices = 1  # one for both step and zero
        return head_width * self.bits // 8, scales, indices

    def table_bytes(self, chunk_tokens: int, head_width: int, *, is_key: bool) -> int:
        """Return the bytes of a chunk's table in one head, see `Table`."""
        entries = self.table_stages(is_key=is_key) * self.num_entries(chunk_tokens)
        return 2 * head_width * (1 + entries) + 8


def _tokens_per_range(chunk_tokens: int) -> int:
    return max(TOKENS_PER_ENTRY, -(-chunk_tokens // MAX_ENTRIES))


def format_of(rule: KVRule, *, head_width: int) -> KVFormat | None:
    """Return how settings quantise heads of a width; None: keys stay as they are."""
    if rule.dtype == "model":
        return None
    made = made_of(KVFormat, rule)
    if rule.group_size is None:
        made = replace(made, group_size=min(KVFormat.group_size, head_width))
    made.check(head_width)
    return made


def read_width(rule: KVRule, *, head_width: int) -> int:
    """Return the head width that attention sees, extra channels included."""
    made = format_of(rule, head_width=head_width)
    return head_width if made is None else wide_width(head_width, made.bias_groups(head_width))


# What is stored -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codes:
    """What belongs to tokens, for keys or values; all uint8 `[T, G, ...]`."""

    packed: Tensor
    """The codes, the lowest channel in the lowest bits of a byte."""
    scales: Tensor
    """E4M3 steps by group of channels over the table's `base`; of a range, its zeros follow."""
    indices: Tensor
    """Into the entries of the table."""


@dataclass(frozen=True)
class Table:
    """What the tokens of a chunk share, `Z` chunks."""

    mean: Tensor
    """bfloat16 `[Z, G, C]`."""
    base: Tensor
    """Float32 `[Z, G]`: of the steps."""
    noise: Tensor
    """Float32 `[Z, G]`: mean squared error over mean squared step, 1/12 if errors are uniform."""
    entries: Tensor
    """bfloat16 `[Z, G, R, E, C]`: centroids of each stage; or steps and zeros of ranges."""


Stored = TypeVar("Stored", Codes, Table)


def tensors_of(stored: Codes | Table) -> Iterator[Tensor]:
    """Yield the tensors of codes or of a table."""
    return (getattr(stored, each.name) for each in fields(stored))


def mapped(stored: Stored, change: Callable[[Tensor], Tensor]) -> Stored:
    """Return codes or a table, each tensor changed."""
    return type(stored)(*map(change, tensors_of(stored)))


def joined(stored: Sequence[Stored], *, dim: int) -> Stored:
    """Concatenate codes or tables along an axis."""
    parts = zip(*map(tensors_of, stored), strict=True)
    return type(stored[0])(*(torch.cat(part, dim=dim) for part in parts))


# Bits ---------------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes below 2^bits along the last axis, 8 / bits to a byte: with 2 bits [1, 2, 3, 0] is
    one byte, 1 + 2 * 4 + 3 * 16."""
    if bits == 8:
        return codes
    parts = codes.unflatten(-1, (-1, 8 // bits)).unbind(-1)
    packed = torch.zeros_like(parts[0])
    for place, part in enumerate(parts):
        packed |= part << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the codes that `pack` packed, uint8."""
    if bits == 8:
        return packed
    shifts = range(0, 8, bits)
    return torch.stack([(packed >> shift) & (2**bits - 1) for shift in shifts], -1).flatten(-2)


def rounded_up(steps: Tensor) -> Tensor:
    """Return the E4M3 codes of the next numbers at or above those in 0..448, but 0.

    A step that was rounded down would clip the largest numbers of its group.
    """
    nearest = steps.to(SCALE_DTYPE)
    codes = nearest.view(torch.uint8) + (nearest.float() < steps).to(torch.uint8)
    return codes.clamp(1, TOP_CODE)


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last axis by the orthonormal Hadamard matrix, which is its own inverse.

    Sums and differences alone: a matrix product could round a head otherwise with other heads.
    """
    width, size = x.shape[-1], 1
    while size < width:
        first, second = x.unflatten(-1, (-1, 2, size)).unbind(-2)
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        size *= 2
    return x / width**0.5


# Encoding -----------------------------------------------------------------------------------------


def encode(
    x_SGC: Tensor, made: KVFormat, *, is_key: bool, num_entries: int, before: Table | None = None
) -> tuple[Codes, Table]:
    """Quantise the keys or the values of a chunk, some heads at once: no head depends on another.

    Args:
        num_entries: of the table; see `KVFormat.num_entries`.
        before: the table of an earlier chunk, from whose centroids k-means starts.
    """
    num_tokens, num_heads, width = x_SGC.shape
    size = max(ENCODING_BYTES // (ENCODING_COPIES * 4 * num_tokens * width), 1)
    blocks = [slice(head, head + size) for head in range(0, num_heads, size)]
    parts = [
        _encode_heads(
            x_SGC[:, own].float(),
            made,
            is_key=is_key,
            num_entries=num_entries,
            start=None if before is None else before.entries[0, own],
        )
        for own in blocks
    ]
    codes, tables = zip(*parts, strict=True)
    return joined(codes, dim=1), joined(tables, dim=1)


def _encode_heads(
    x_SGC: Tensor, made: KVFormat, *, is_key: bool, num_entries: int, start: Tensor | None
) -> tuple[Codes, Table]:
    num_tokens, num_heads, width = x_SGC.shape
    if made.quantizer == "hadamard":
        x_SGC = hadamard(x_SGC)
    mean = x_SGC.mean(dim=0) if made.centred else torch.zeros_like(x_SGC[0])
    mean = mean.bfloat16()
    left = x_SGC - mean.float()
    stages = made.table_stages(is_key=is_key)
    shape = (num_heads, stages, num_entries, width)
    entries = torch.zeros(shape, dtype=torch.bfloat16, device=left.device)
    indices = [torch.empty(num_tokens, num_heads, 0, dtype=torch.uint8, device=left.device)]
    if made.quantizer == "kmeans":
        for stage in range(stages):
            own = None if start is None else start[:, stage]
            entries[:, stage], index_SG = kmeans(left, num_entries, start=own)
            indices.append(index_SG.to(torch.uint8).unsqueeze(-1))
            head_G = torch.arange(num_heads, device=left.device)
            left = left - entries[head_G, stage, index_SG].float()
    if made.is_per_channel(is_key=is_key):
        codes, index_SG, base = _encode_ranges(left, made, entries)
        scales = codes[..., :0]
        indices.append(index_SG.unsqueeze(-1))
    else:
        codes, scales, base = _encode_tokens(left, made)
    stored = Codes(pack(codes, made.bits), scales, torch.cat(indices, dim=-1))
    table = Table(mean[None], base[None], torch.zeros_like(base)[None], entries[None])
    slot_SG = torch.zeros(left.shape[:2], dtype=torch.int64, device=left.device)
    steps, values = _residuals(stored, table, slot_SG, made, is_key)
    error_G = (values - left).square().mean(dim=(0, 2))
    noise_G = error_G / steps.square().mean(dim=(0, 2)).clamp(min=1e-30)
    return stored, Table(table.mean, table.base, noise_G[None], table.entries)


def _encode_tokens(x_SGC: Tensor, made: KVFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales (and zeros) per token and group of channels, and the steps' base."""
    grouped = x_SGC.unflatten(-1, (-1, made.group_size))
    is_range = made.quantizer == "kivi"
    steps = _steps(grouped, made, dim=-1, is_range=is_range)
    # float32: a small number to be divided by has to stay one
    base = (steps.amax(dim=(0, 2)) / TOP_SCALE).clamp(min=1e-30)
    scales = rounded_up(steps / base[:, None])
    steps = scales.view(SCALE_DTYPE).float() * base[:, None]
    zeros = _zeros(grouped, steps, made, dim=-1, is_range=is_range)
    codes = _codes(grouped, steps.unsqueeze(-1), zeros.unsqueeze(-1), made).flatten(-2)
    if is_range:
        scales = torch.cat([scales, zeros.to(torch.uint8)], dim=-1)
    return codes, scales, base


def _encode_ranges(
    x_SGC: Tensor, made: KVFormat, entries_GREC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, the index of each token's group, and a base of 1; write steps and zeros."""
    num_tokens, size = len(x_SGC), _tokens_per_range(len(x_SGC))
    codes = torch.empty_like(x_SGC, dtype=torch.uint8)
    for group, start in enumerate(range(0, num_tokens, size)):
        own = x_SGC[start : start + size]
        steps = _steps(own, made, dim=0, is_range=True).clamp(min=1e-30)
        steps = (steps * (1 + 2**-8)).bfloat16().float()  # not below: it would clip
        zeros = _zeros(own, steps, made, dim=0, is_range=True)
        entries_GREC[:, 0, group], entries_GREC[:, 1, group] = steps, zeros
        codes[start : start + size] = _codes(own, steps, zeros, made)
    index_S = torch.arange(num_tokens, device=x_SGC.device) // size
    index_SG = index_S.to(torch.uint8).unsqueeze(-1).expand(-1, x_SGC.shape[1])
    return codes, index_SG, torch.ones(x_SGC.shape[1], device=x_SGC.device)


def _top(made: KVFormat, *, is_range: bool) -> int:
    """Return the largest code: that of an even range, or of one symmetric about its middle."""
    return 2**made.bits - 1 if is_range else 2**made.bits - 2


def _steps(x: Tensor, made: KVFormat, *, dim: int, is_range: bool) -> Tensor:
    """Return the steps that reach the numbers along an axis; 0 is always in a range."""
    if made.dtype == "fp8":
        return x.abs().amax(dim=dim) / TOP_SCALE
    if is_range:
        return (x.amax(dim).clamp(min=0) - x.amin(dim).clamp(max=0)) / _top(made, is_range=True)
    return x.abs().amax(dim=dim) / (_top(made, is_range=False) // 2)


def _zeros(x: Tensor, steps: Tensor, made: KVFormat, *, dim: int, is_range: bool) -> Tensor:
    """Return the codes of 0."""
    top = _top(made, is_range=is_range)
    if made.dtype == "fp8" or not is_range:
        return torch.full_like(steps, 0 if made.dtype == "fp8" else top // 2)
    return (-x.amin(dim).clamp(max=0) / steps).round().clamp(0, top)


def _codes(x: Tensor, steps: Tensor, zeros: Tensor, made: KVFormat) -> Tensor:
    if made.dtype == "fp8":
        scaled = (x / steps).clamp(-TOP_SCALE, TOP_SCALE)
        return scaled.to(SCALE_DTYPE).view(torch.uint8)
    top = _top(made, is_range=made.quantizer == "kivi")
    return ((x / steps).round() + zeros).clamp(0, top).to(torch.uint8)


def kmeans(x_SGC: Tensor, num_entries: int, *, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return centroids, bfloat16 `[G, E, C]`, and the index of the nearest one to each token.

    Lloyd's algorithm, one head after the other, so that a head's result depends on no other head;
    sums are matrix products, which are made in a fixed order on every device. A centroid without
    tokens stays where it is.

    Args:
        start: centroids to start from; None: tokens at equal distances.
    """
    centroids: list[Tensor] = []
    nearest: list[Tensor] = []
    places = torch.linspace(0, len(x_SGC) - 1, num_entries, device=x_SGC.device).long()
    for head, x_SC in enumerate(x_SGC.unbind(1)):
        x_SC = x_SC.contiguous()
        own_EC = x_SC[places] if start is None else start[head].float()
        for _ in range(FIRST_LLOYD_STEPS if start is None else NEXT_LLOYD_STEPS):
            belongs_ES = torch.zeros(num_entries, len(x_SC), device=x_SC.device)
            belongs_ES.scatter_(0, _nearest(x_SC, own_EC).unsqueeze(0), 1.0)
            count_E1 = belongs_ES.sum(dim=1, keepdim=True)
            own_EC = torch.where(count_E1 > 0, belongs_ES @ x_SC / count_E1.clamp(min=1), own_EC)
        own_EC = own_EC.bfloat16()
        centroids.append(own_EC)
        nearest.append(_nearest(x_SC, own_EC.float()))
    return torch.stack(centroids), torch.stack(nearest, dim=1)


def _nearest(x_SC: Tensor, own_EC: Tensor) -> Tensor:
    return (own_EC.square().sum(dim=-1) - 2 * x_SC @ own_EC.T).argmin(dim=-1)


# Decoding -----------------------------------------------------------------------------------------


def decode(
    codes: Codes, table: Table, slot_TG: Tensor, made: KVFormat, *, is_key: bool
) -> tuple[Tensor, Tensor]:
    """Return the numbers, float32 `[T, G, C]`, and the variance of their errors, `[T, G, N]`.

    Args:
        table: of all chunks.
        slot_TG: which chunk's table belongs to a token; heads differ after compression.
    """
    head_G = torch.arange(slot_TG.shape[1], device=slot_TG.device)
    slot_TG = slot_TG.long()
    steps, x_TGC = _residuals(codes, table, slot_TG, made, is_key)
    for stage in range(made.table_stages(is_key=is_key) if made.quantizer == "kmeans" else 0):
        index_TG = codes.indices[..., stage].long()
        x_TGC = x_TGC + table.entries[slot_TG, head_G, stage, index_TG].float()
    x_TGC = x_TGC + table.mean[slot_TG, head_G].float()
    noise_TG = table.noise[slot_TG, head_G]
    squares_TGN = steps.square()
    if made.is_per_channel(is_key=is_key):
        squares_TGN = squares_TGN.unflatten(-1, (-1, made.group_size)).mean(dim=-1)
    if made.quantizer == "hadamard":
        x_TGC = hadamard(x_TGC)
        # turned back, the errors of all channels are mixed
        squares_TGN = squares_TGN.mean(dim=-1, keepdim=True).expand_as(squares_TGN)
    return x_TGC, noise_TG.unsqueeze(-1) * squares_TGN


def token_steps(codes: Codes, table: Table, slot_TG: Tensor, *, num_groups: int) -> Tensor:
    """Return the steps of tokens and groups of channels, `[T, G, N]`."""
    head_G = torch.arange(slot_TG.shape[1], device=slot_TG.device)
    scales = codes.scales[..., :num_groups].contiguous().view(SCALE_DTYPE).float()
    return scales * table.base[slot_TG.long(), head_G].unsqueeze(-1)


def token_variance(codes: Codes, table: Table, slot_TG: Tensor, *, num_groups: int) -> Tensor:
    """Return the variance of the errors where steps belong to tokens, `[T, G, N]`."""
    head_G = torch.arange(slot_TG.shape[1], device=slot_TG.device)
    steps = token_steps(codes, table, slot_TG, num_groups=num_groups)
    return table.noise[slot_TG.long(), head_G].unsqueeze(-1) * steps.square()


def _residuals(
    codes: Codes, table: Table, slot_TG: Tensor, made: KVFormat, is_key: bool
) -> tuple[Tensor, Tensor]:
    """Return steps, `[T, G, N]` or of channels `[T, G, C]`, and what the codes alone say."""
    head_G = torch.arange(slot_TG.shape[1], device=slot_TG.device)
    is_range = made.quantizer == "kivi"
    levels = unpack(codes.packed, made.bits)
    if made.dtype == "fp8":
        levels = levels.view(SCALE_DTYPE)
    levels = levels.float()
    if made.is_per_channel(is_key=is_key):
        index_TG = codes.indices[..., 0].long()
        steps, zeros = (table.entries[slot_TG, head_G, part, index_TG].float() for part in (0, 1))
        return steps, (levels - zeros) * steps
    groups = levels.shape[-1] // made.group_size
    steps = token_steps(codes, table, slot_TG, num_groups=groups)
    zeros = codes.scales[..., groups:].float() if is_range else None
    grouped = levels.unflatten(-1, (groups, -1))
    if zeros is not None:
        grouped = grouped - zeros.unsqueeze(-1)
    elif made.dtype != "fp8":
        grouped = grouped - _top(made, is_range=False) // 2
    return steps, (grouped * steps.unsqueeze(-1)).flatten(-2)


# The bias of logits -------------------------------------------------------------------------------


def bias(q_QHC: Tensor, variance_KHN: Tensor) -> Tensor:
    """Return what the errors of quantised keys add to their logits, `[H, Q, K]`.

    A logit with noise of variance s^2 adds exp(s^2 / 2) to the softmax in the mean, so s^2 / 2 is
    to be subtracted: `b = sum_c q_c^2 var_c / (2 C)`. For uniform errors, var = step^2 / 12.

    Source: arXiv 2605.26266.
    """
    squares_QHN = _group_squares(q_QHC, variance_KHN.shape[-1])
    return torch.einsum("qhn,khn->hqk", squares_QHN, variance_KHN) / (2 * q_QHC.shape[-1])


def _group_squares(q: Tensor, num_groups: int) -> Tensor:
    return q.square().unflatten(-1, (num_groups, -1)).sum(dim=-1)


def wide_width(head_width: int, num_groups: int) -> int:
    """Return the head width with a channel per group, one for counts, and what kernels want."""
    if not num_groups:
        return head_width
    return -(-(head_width + num_groups + 1) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def key_channels(
    variance_KGN: Tensor, *, head_width: int, log_count_KG: Tensor | None = None
) -> Tensor:
    """Return the extra channels of keys, `[K, G, N + 1]`, which meet those of `attend_wide`.

    The logit bias is bilinear in the squares of a query, summed by group, and the variances of a
    key: as channels, a plain kernel adds it. They are zero for keys that are exact.

    Args:
        log_count_KG: log of the number of tokens that a key has merged; None: 1 each.
    """
    counts = torch.zeros_like(variance_KGN[..., 0]) if log_count_KG is None else log_count_KG
    own = variance_KGN / (-2 * head_width**0.5)
    return torch.cat([own, counts.unsqueeze(-1).to(own.dtype) * head_width**0.5], dim=-1)


Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_wide(
    run: Run, q_BQHC: Tensor, k_BKGX: Tensor, v_BKGX: Tensor, *, num_groups: int
) -> Tensor:
    """Attend to keys that have `key_channels` and zeros behind their own, `[B, Q, H, C]`.

    The kernel scales by the root of the width that it sees, which is made good in the queries.
    Keys without extra channels are attended to as they are.

    Args:
        num_groups: of channels; their pairs that are rotated together lie in one group.
    """
    width, wide = q_BQHC.shape[-1], k_BKGX.shape[-1]
    if wide == width:
        return run(q_BQHC, k_BKGX, v_BKGX)
    # float64 stays what it is, all else is squared in float32
    squares = _group_squares(
        q_BQHC.to(torch.promote_types(q_BQHC.dtype, torch.float32)), num_groups
    )
    extra = pad(torch.cat([squares, torch.ones_like(squares[..., :1])], dim=-1), (0, wide - width))
    extra = extra[..., : wide - width]
    q = torch.cat([q_BQHC.to(extra.dtype), extra], dim=-1) * (wide / width) ** 0.5
    return run(q.to(q_BQHC.dtype), k_BKGX, v_BKGX)[..., :width]


# Merging of like keys -----------------------------------------------------------------------------


def merge_like(
    k_LGC: Tensor, v_LGC: Tensor, *, frame_tokens: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge each key into the most similar newer one of another frame, if similar enough.

    A merged key is its newest one, its value the mean, and its logit grows by the log of how many
    it is: exact where the keys are equal. Heads keep different numbers; rows that a head has fewer
    of have a log of minus infinity.

    Args:
        threshold: least cosine.

    Returns:
        Keys and values `[K, G, C]`, oldest first, and the log of the counts `[K, G]`.
    """
    num_tokens, num_heads, _ = k_LGC.shape
    heads: list[tuple[Tensor, Tensor, Tensor]] = []
    for head in range(num_heads):
        keys, values = k_LGC[:, head], v_LGC[:, head]
        unit = normalize(keys.float(), dim=-1)
        target = torch.arange(num_tokens, device=keys.device)
        kept = target[num_tokens - frame_tokens :]
        for start in range(num_tokens - 2 * frame_tokens, -1, -frame_tokens):
            own = torch.arange(start, start + frame_tokens, device=keys.device)
            cosine, place = (unit[own] @ unit[kept].T).max(dim=-1)
            merges = cosine >= threshold
            target[own[merges]] = kept[place[merges]]
            kept = torch.cat([own[~merges], kept])
        count = torch.zeros(num_tokens, device=keys.device).index_add_(
            0, target, torch.ones(num_tokens, device=keys.device)
        )
        total = torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))
        total.index_add_(0, target, values.to(total.dtype))
        mean = total[kept] / count[kept].unsqueeze(-1).to(total.dtype)
        heads.append((keys[kept], mean.to(values.dtype), count[kept].log()))
    return _side_by_side(heads)


def _side_by_side(
    heads: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Stack the keys, values and logs of heads with different numbers of keys."""
    most = max(len(keys) for keys, *_ in heads)
    keys, values, logs = zip(*heads, strict=True)

    def stacked(parts: Sequence[Tensor], fill: float) -> Tensor:
        size = [(0, 0) * (part.ndim - 1) + (most - len(part), 0) for part in parts]
        filled = [pad(part, where, value=fill) for part, where in zip(parts, size, strict=True)]
        return torch.stack(filled, dim=1)

    return stacked(keys, 0), stacked(values, 0), stacked(logs, -math.inf)
