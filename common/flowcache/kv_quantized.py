"""A KV cache whose clean chunks are quantised.

    rows of packed tokens | clean chunks that are not quantised yet | active chunks
    0 ... packed            packed ... clean                          clean ... filled

Rows are quantised once, by `pack`; compression gathers them and never changes one. What is not
packed lies in the model's dtype in a small buffer. A layer that is read is decoded into a buffer
that all layers share, so that one layer at a time is dense.

Keys that were rotated are turned back before they are quantised, and turned again when they are
read: channels with large numbers then stay the same in all tokens.

Axes: as in `kv` and `quantization`; P positions in a video, X head width and extra channels.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from flowcache.compress import gather
from flowcache.kv import KVCache, memory_for
from flowcache.pinned import Packer
from flowcache.quantization import (
    ENCODING_BYTES,
    ENCODING_COPIES,
    PLACE_BYTES,
    Codes,
    KVFormat,
    Table,
    decode,
    encode,
    joined,
    key_channels,
    mapped,
    tensors_of,
    token_variance,
    wide_width,
)
from flowcache.schedule import Tick

DECODED_TOKENS, DECODING_COPIES = 1024, 12
"""Tokens that are decoded at once, and float32 copies of them meanwhile."""

Rotate = Callable[[Tensor, Tensor], Tensor]
"""`(x [B, S, H, C], angles [S, n, 2]) -> [B, S, H, C]`."""


@cache
def unpack_kernel(device: torch.device) -> Any:
    """Return the module `unpack_triton` where it runs; it reads what `decode` reads, faster."""
    if importlib.util.find_spec("triton") is None:
        return None
    module = importlib.import_module("flowcache.unpack_triton")
    return module if module.runs_on(device) else None


@dataclass(frozen=True)
class Rotary:
    """How the keys of a video were rotated before they came into the cache."""

    table: Tensor
    """Cosine and sine, `[P, n, 2]`."""
    rotate: Rotate
    has_neighbours: bool
    """Whether channels 2j and 2j + 1 are rotated together, as the bias of groups needs."""

    def turned(self, x_TGC: Tensor, position_TG: Tensor, *, back: bool = False) -> Tensor:
        """Rotate the token of each head by its position, or turn it back."""
        angles = self.table[position_TG.flatten().long()]
        if back:
            angles = torch.stack([angles[..., 0], -angles[..., 1]], dim=-1)
        # a rotation takes one position per token: each head's token is one
        turned = self.rotate(x_TGC.reshape(1, -1, 1, x_TGC.shape[-1]), angles)
        return turned.view(x_TGC.shape)


class DenseLayer:
    """The buffer into which the layer that is read is decoded; all caches of a video share it."""

    def __init__(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> None:
        # zeros: extra channels of values stay what they are
        self.kv = torch.zeros(2, *shape, dtype=dtype, device=device)
        self.held: tuple[KVCache, int, int] | None = None
        """The cache, its version, and the first row that is decoded."""


@dataclass(frozen=True)
class KVSizes:
    """How large the quantised caches of a video are."""

    made: KVFormat
    dense_tokens: int
    """That a cache holds as they are, at most: active ones, and those that wait."""
    chunk_tokens: int
    """Of the largest chunk."""
    num_chunks: int

    @classmethod
    def of(
        cls,
        made: KVFormat,
        ticks: Sequence[Tick],
        tokens: Mapping[int, int],
        *,
        waits: bool = False,
    ) -> "KVSizes":
        """Derive them from the tokens of each chunk, given ones included.

        Args:
            waits: whether a clean chunk is quantised at the end of the tick after it became clean.
        """
        largest = max(tokens.values())
        peak, waiting = largest, 0
        for tick in ticks:
            peak = max(peak, waiting + sum(tokens[chunk] for chunk in tick.steps))
            waiting = sum(tokens[chunk] for chunk in tick.finishing) if waits else 0
        return cls(made, peak + largest * made.keep_last, largest, len(tokens))

    def row_bytes(self, head_width: int) -> int:
        """Return the bytes of a quantised token in one head, key and value."""
        sizes = (self.made.code_bytes(head_width, is_key=is_key) for is_key in (True, False))
        return PLACE_BYTES + sum(map(sum, sizes))

    def rest_bytes(self, capacity: int, head_width: int, *, itemsize: int) -> int:
        """Return the bytes of a cache's tables and dense tokens, in one head."""
        tables = sum(
            self.made.table_bytes(self.chunk_tokens, head_width, is_key=is_key)
            for is_key in (True, False)
        )
        dense = 2 * min(self.dense_tokens, capacity) * head_width * itemsize
        return self.num_chunks * tables + dense

    def read_bytes(self, capacity: int, num_heads: int, head_width: int, *, itemsize: int) -> int:
        """Return the bytes of the layer that is dense, and of the scratch of making it."""
        groups = self.made.bias_groups(head_width)
        dense = 2 * capacity * num_heads * wide_width(head_width, groups) * itemsize
        number = 4 * num_heads * head_width
        encoding = min(ENCODING_COPIES * number * self.chunk_tokens, ENCODING_BYTES)
        return dense + max(encoding, DECODING_COPIES * number * min(DECODED_TOKENS, capacity))


@dataclass
class KVLayout:
    """What the quantised caches of a video have in common."""

    sizes: KVSizes
    starts: Mapping[int, int]
    """Chunk -> position of its first token in the video."""
    rotary: Rotary | None = None
    """None: keys come before rotation."""
    layer: DenseLayer | None = None
    """Made with the first cache."""

    @property
    def made(self) -> KVFormat:
        """Return how keys and values are quantised."""
        return self.sizes.made

    def num_groups(self, head_width: int) -> int:
        """Return the groups of channels with a bias of their own; 0 without correction."""
        has_neighbours = self.rotary is None or self.rotary.has_neighbours
        return self.made.bias_groups(head_width, has_neighbours=has_neighbours)


@dataclass(frozen=True)
class Rows:
    """Packed tokens; all tensors `[T, G, ...]`."""

    keys: Codes
    values: Codes
    slot: Tensor
    """int16 `[T, G, 1]`: the table of the token's chunk."""
    position: Tensor
    """int32 `[T, G, 1]`: in the video."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors."""
        for each in fields(self):
            part = getattr(self, each.name)
            yield from tensors_of(part) if isinstance(part, Codes) else (part,)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """Return the rows, each tensor changed."""
        return Rows(
            mapped(self.keys, change),
            mapped(self.values, change),
            change(self.slot),
            change(self.position),
        )


class QuantizedKVCache(KVCache):
    """Keys and values of one layer and branch, quantised chunk by chunk; see `KVCache`.

    Args:
        capacity: tokens, those that are not quantised included.
        storage: where packed rows lie; what is not quantised is on the device.
    """

    def __init__(
        self,
        capacity: int,
        *,
        layout: KVLayout,
        num_heads: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: torch.device | None = None,
        packer: Packer | None = None,
    ) -> None:
        super().__init__(
            min(layout.sizes.dense_tokens, capacity),
            num_heads=num_heads,
            head_width=head_width,
            dtype=dtype,
            device=device,
        )
        self.capacity, self.layout = capacity, layout
        self.bias_groups = layout.num_groups(head_width)
        if layout.layer is None:
            width = wide_width(head_width, self.bias_groups)
            layout.layer = DenseLayer((capacity, num_heads, width), dtype=dtype, device=device)
        self.layer = layout.layer
        self.packed = self.version = 0
        self.waiting: list[tuple[int, int]] = []
        """Tokens and chunk of what is clean, but not quantised yet."""
        self.tables: tuple[Table, Table] | None = None
        """Of keys and of values; a slot that no token needs is used again."""
        self.slot, self.free_slots = 0, list[int]()

        def empty(width: int, dtype: torch.dtype = torch.uint8) -> Tensor:
            return memory_for((capacity, num_heads, width), dtype, storage or device, packer)

        keys, values = (
            Codes(*map(empty, layout.made.code_bytes(head_width, is_key=is_key)))
            for is_key in (True, False)
        )
        self.rows = Rows(keys, values, empty(1, torch.int16), empty(1, torch.int32))

    # Writing ----------------------------------------------------------------------------------

    def put(self, offset: int, k_SGC: Tensor, v_SGC: Tensor, *, rows: Tensor | None = None) -> None:
        """Write a chunk's keys and values `offset` tokens behind the clean ones; see `KVCache`."""
        start = self.clean + offset
        if rows is not None:
            self._overwrite(start - self.packed + rows, k_SGC, v_SGC)
            return
        stop = start + len(k_SGC)
        assert start <= self.filled, f"a gap in the buffer: {self.filled} filled, put at {start}"
        tail = slice(start - self.packed, stop - self.packed)
        assert tail.stop <= self.kv.shape[1], f"{tail.stop} dense tokens, {self.kv.shape[1]} fit"
        width = self.kv.shape[-1]  # what was read from another cache may be wider
        self.kv[0, tail], self.kv[1, tail] = k_SGC[..., :width], v_SGC[..., :width]
        self.filled = max(self.filled, stop)

    def replace_last_clean(self, kv_2TGC: Tensor) -> None:
        """Put other keys and values in the place of the last clean ones, which are not packed."""
        stop = self.clean - self.packed
        assert kv_2TGC.shape[1] <= stop, "quantised keys are never replaced"
        self.kv[:, stop - kv_2TGC.shape[1] : stop] = kv_2TGC

    def settle(self, num_tokens: int, *, chunk: int | None = None) -> None:
        """Declare the first `num_tokens` active tokens clean; `pack` quantises them."""
        super().settle(num_tokens, chunk=chunk)
        assert chunk is not None, "the place of a quantised chunk must be known"
        self.waiting.append((num_tokens, chunk))

    def pack(self) -> None:
        """Quantise the clean chunks, but for the last one where that stays as it is."""
        self._pack(max(len(self.waiting) - self.layout.made.keep_last, 0))

    def keep(self, indices_KG: Tensor) -> None:
        """Keep these clean tokens of each head and drop the other clean ones.

        Heads keep different tokens, so that none may be left that is not quantised.
        """
        self._pack(len(self.waiting))
        kept = len(indices_KG)
        places = indices_KG.to(self.rows.slot.device)
        for stored in self.rows.tensors():
            stored[:kept] = gather(stored[: self.packed], places)
        self.filled -= self.clean - kept
        self.clean = self.packed = kept
        self._free_tables()
        if self.origins is not None:
            self.origins.keep(indices_KG)

    def rewind(self, num_tokens: int) -> None:
        """Drop the newest clean tokens, quantised or not, and all active ones."""
        super().rewind(num_tokens)
        room, waiting = self.clean - self.packed, self.waiting
        self.waiting = []
        for count, chunk in waiting:
            if (left := min(count, room)) > 0:
                self.waiting.append((left, chunk))
                room -= left
        if self.packed > self.clean:
            self.packed = self.clean
            if self.packed:
                # the tables of the newest chunk that stays are those that the next one begins with
                self.slot = int(self.rows.slot[self.packed - 1, 0])
            else:
                self.tables, self.slot = None, 0
            self._free_tables()

    def _free_tables(self) -> None:
        """Make room in place of the tables whose tokens have all left; packed rows have changed."""
        self.version += 1
        self.free_slots = []
        if self.tables is not None:
            # the host waits
            used = {*self.rows.slot[: self.packed].unique().tolist(), self.slot}
            self.free_slots = [s for s in range(len(self.tables[0].base)) if s not in used]

    def _pack(self, num_chunks: int) -> None:
        for _ in range(num_chunks):
            self._pack_oldest(*self.waiting.pop(0))

    def _pack_oldest(self, num_tokens: int, chunk: int) -> None:
        """Quantise the first tokens of the dense buffer and move the others to its start."""
        made, rotary = self.layout.made, self.layout.rotary
        k, v = self.kv[0, :num_tokens], self.kv[1, :num_tokens]
        position_S = self.layout.starts[chunk] + torch.arange(num_tokens, device=self.device)
        position_SG = position_S.int().unsqueeze(-1).expand(-1, k.shape[1])
        if rotary is not None:
            k = rotary.turned(k.float(), position_SG, back=True)
        entries = made.num_entries(self.layout.sizes.chunk_tokens)
        before = self._last_tables()
        keys, of_keys = encode(k, made, is_key=True, num_entries=entries, before=before[0])
        values, of_values = encode(v, made, is_key=False, num_entries=entries, before=before[1])
        self._store_tables(of_keys, of_values)
        slot_SG = torch.full_like(position_SG, self.slot, dtype=torch.int16)
        rows = Rows(keys, values, slot_SG.unsqueeze(-1), position_SG.unsqueeze(-1))
        for stored, new in zip(self.rows.tensors(), rows.tensors(), strict=True):
            stored[self.packed : self.packed + num_tokens].copy_(new, non_blocking=True)
        rest = self.filled - self.packed - num_tokens
        # clone: source and destination overlap
        self.kv[:, :rest] = self.kv[:, num_tokens : num_tokens + rest].clone()
        self.packed += num_tokens
        self.version += 1

    def _last_tables(self) -> tuple[Table | None, Table | None]:
        """Return those of the chunk that was quantised last."""
        if self.tables is None:
            return None, None
        own = slice(self.slot, self.slot + 1)
        keys, values = (mapped(table, lambda x: x[own]) for table in self.tables)
        return keys, values

    def _store_tables(self, keys: Table, values: Table) -> None:
        if self.tables is None:
            self.tables, self.slot = (keys, values), 0
        elif self.free_slots:
            self.slot = self.free_slots.pop()
            for held, new in zip(self.tables, (keys, values), strict=True):
                for old, own in zip(tensors_of(held), tensors_of(new), strict=True):
                    old[self.slot] = own[0]
        else:
            self.slot = len(keys.base) - 1 + len(self.tables[0].base)
            of_keys, of_values = self.tables
            self.tables = joined([of_keys, keys], dim=0), joined([of_values, values], dim=0)

    # Reading ----------------------------------------------------------------------------------

    def prefix(self, offset: int, *, reach_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the rows that `seen` names, `[T, G, X]` each.

        They hold until another cache of the same layer buffer is read.
        """
        rows = self.seen(offset, reach_tokens=reach_tokens)
        first = self._decoded_from(rows.start)
        tail = range(max(rows.start, self.packed), rows.stop)
        kv = self.layer.kv[:, : rows.stop - first]
        width = self.kv.shape[-1]
        dense = kv[:, tail.start - first :]
        dense[..., :width] = self.kv[:, tail.start - self.packed : tail.stop - self.packed]
        dense[0, ..., width:] = 0  # exact: no bias
        k, v = kv[:, rows.start - first :]
        return k, v

    def compress(self, q_SHC: Tensor, keep: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Keep the clean tokens that a rule picks by these queries."""
        self.keep(keep(q_SHC, self._read(0, 0, self.clean)))

    def num_bytes(self) -> int:
        """Return the bytes of packed rows, of tables and of the dense buffer."""
        tables = [] if self.tables is None else [x for t in self.tables for x in tensors_of(t)]
        return sum(x.nbytes for x in (*self.rows.tensors(), *tables, self.kv))

    def _read(self, half: int, start: int, stop: int) -> Tensor:
        seen = self.prefix(stop - self.clean, reach_tokens=stop - start)[half]
        return seen[..., : self.kv.shape[-1]]

    def _decoded_from(self, start: int) -> int:
        """Decode the packed rows from one on, unless they are; return the first that is."""
        held = self.layer.held
        if held is not None and held[:2] == (self, self.version) and held[2] <= start:
            return held[2]
        for first in range(start, self.packed, DECODED_TOKENS):
            last = min(first + DECODED_TOKENS, self.packed)
            self._decode(first, last, into=self.layer.kv[:, first - start : last - start])
        self.layer.held = (self, self.version, start)
        return start

    def _decode(self, start: int, stop: int, *, into: Tensor) -> None:
        assert self.tables is not None, "packed rows have tables"
        rows = self.rows.mapped(lambda x: x[start:stop].to(self.device, non_blocking=True))
        slot_TG, position_TG = rows.slot[..., 0], rows.position[..., 0]
        made, rotary, width = self.layout.made, self.layout.rotary, self.kv.shape[-1]
        of_keys, of_values = self.tables
        if (kernel := unpack_kernel(self.device)) is not None and kernel.can_decode(made):
            place = {"position_TG": position_TG, "made": made, "slot_TG": slot_TG}
            kernel.decode_into(into[0], rows.keys, of_keys, is_key=True, rotary=rotary, **place)
            kernel.decode_into(into[1], rows.values, of_values, is_key=False, **place)
            groups = width // made.group_size
            variance_TGN = token_variance(rows.keys, of_keys, slot_TG, num_groups=groups)
        else:
            keys, variance_TGN = decode(rows.keys, of_keys, slot_TG, made, is_key=True)
            values, _ = decode(rows.values, of_values, slot_TG, made, is_key=False)
            keys = keys if rotary is None else rotary.turned(keys, position_TG)
            into[0, ..., :width], into[1, ..., :width] = keys, values
        if self.bias_groups:
            variance = variance_TGN.unflatten(-1, (self.bias_groups, -1)).mean(dim=-1)
            extra = key_channels(variance, head_width=width)
            into[0, ..., width : width + extra.shape[-1]] = extra


def cache_maker(layout: KVLayout | None) -> Callable[..., KVCache]:
    """Return what makes the caches of a video, see `kv.caches_for`; None: nothing is quantised."""
    return KVCache if layout is None else partial(QuantizedKVCache, layout=layout)
