"""The key/value cache: one preallocated prefix buffer per layer and guidance branch.

Clean tokens come first, then the active chunks in ascending order, so that what a chunk may see is
always a prefix of the buffer. A chunk that becomes clean moves a boundary, not data. Compression
gathers the kept clean tokens and moves the active part down.

Axes: T tokens in the buffer, S tokens of a chunk, H query heads, G key/value heads, C head width,
K kept tokens, N chunks. Guidance branches have caches of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from flowcache.attention import Kernel
from flowcache.compress import gather
from flowcache.pinned import PINNED_BYTES, Packer, aligned, host_memory, piece_for
from flowcache.quantization import attend_wide
from flowcache.schedule import Tick

PREFETCHED_LAYERS = 2
"""Layers of a cache in the memory of the host that are on the device: in use, and next."""
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, q [B, S, H, C], k [B, S, G, C], v [B, S, G, C]) -> [B, S, H, C]`."""
Keep = Callable[[Tensor, Tensor], Tensor]
"""`(queries [S, H, C], clean keys [T, G, C]) -> indices [K, G]` of the clean tokens to keep."""


class TokenOrigins:
    """Which chunk each clean token of a cache comes from, for a record; nothing waits for it."""

    def __init__(
        self, capacity: int, *, num_heads: int, num_chunks: int, device: torch.device
    ) -> None:
        self.chunk_TG = torch.zeros(capacity, num_heads, dtype=torch.int64, device=device)
        self.count_GN = torch.zeros(num_heads, num_chunks, dtype=torch.int64, device=device)

    def settle(self, start: int, stop: int, *, chunk: int) -> None:
        """Note that the tokens from one row to another are those of a chunk."""
        self.chunk_TG[start:stop] = chunk
        self.count_GN[:, chunk] += stop - start

    def rewind(self, start: int, stop: int) -> None:
        """Note that the tokens from one row to another are gone."""
        gone_GT = self.chunk_TG[start:stop].transpose(0, 1)
        self.count_GN.scatter_add_(1, gone_GT, -torch.ones_like(gone_GT))

    def keep(self, indices_KG: Tensor) -> None:
        """Note which tokens of each head stay."""
        kept_KG = self.chunk_TG.gather(0, indices_KG)
        self.chunk_TG[: len(kept_KG)] = kept_KG
        kept_GK = kept_KG.transpose(0, 1)
        none_GN = torch.zeros_like(self.count_GN)
        self.count_GN = none_GN.scatter_add(1, kept_GK, torch.ones_like(kept_GK))


class KVCache:
    """Keys and values of one layer and branch.

    The buffer may lie in the memory of the host (`storage`): reading it copies the part that is
    seen to `device`. All copies then go through the stream of the device, or through that of a
    `Prefetcher`, which waits for it; so a row is never overwritten before an earlier copy has left.

    Example: capacity 6, chunks of 2 tokens. Chunk 0 is put at offset 0 and settled: clean = 2.
    Chunks 1 and 2 are active: they are put at offsets 0 and 2 behind the clean tokens, that is at
    rows 2 and 4; chunk 2 attends to rows 0..5, chunk 1 to rows 0..3.
    """

    bias_groups = 0
    """Groups of channels whose errors bias logits; see `quantization.attend_wide`."""

    def __init__(
        self,
        capacity: int,
        *,
        num_heads: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: torch.device | None = None,
        packer: Packer | None = None,
    ) -> None:
        self.device, self.storage, self.capacity = device, storage, capacity
        self.kv = memory_for((2, capacity, num_heads, head_width), dtype, storage or device, packer)
        self.clean = self.filled = 0
        self.origins: TokenOrigins | None = None

    def track(self, num_chunks: int) -> None:
        """Follow from now on which chunk each clean token comes from."""
        assert self.clean == 0, "clean tokens of unknown chunks"
        self.origins = TokenOrigins(
            self.capacity,
            num_heads=self.kv.shape[2],
            num_chunks=num_chunks,
            device=self.device,
        )

    def put(self, offset: int, k_SGC: Tensor, v_SGC: Tensor, *, rows: Tensor | None = None) -> None:
        """Write a chunk's keys and values `offset` tokens behind the clean ones.

        Args:
            rows: which of the chunk's tokens these are, ascending; those of the others stay as
                they were put last. None: all.
        """
        start = self.clean + offset
        if rows is not None:
            self._overwrite(start + rows, k_SGC, v_SGC)
            return
        stop = start + len(k_SGC)
        assert start <= self.filled, f"a gap in the buffer: {self.filled} filled, put at {start}"
        assert stop <= self.kv.shape[1], f"{stop} tokens do not fit {self.kv.shape[1]}"
        # non-blocking: the host never looks at the rows, it only has them copied
        self.kv[0, start:stop].copy_(k_SGC, non_blocking=True)
        self.kv[1, start:stop].copy_(v_SGC, non_blocking=True)
        self.filled = max(self.filled, stop)

    def _overwrite(self, rows: Tensor, k_SGC: Tensor, v_SGC: Tensor) -> None:
        """Replace some rows of the buffer, which were put before."""
        device, width = self.kv.device, self.kv.shape[-1]
        for half, x in zip(self.kv, (k_SGC, v_SGC), strict=True):
            half.index_copy_(0, rows.to(device), x[..., :width].to(device))

    def prefix(self, offset: int, *, reach_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the rows that `seen` names, `[T, G, C]` each."""
        rows = self.seen(offset, reach_tokens=reach_tokens)
        return self._read(0, rows.start, rows.stop), self._read(1, rows.start, rows.stop)

    def seen(self, offset: int, *, reach_tokens: int | None = None) -> range:
        """Return the rows of the clean tokens and `offset` tokens behind them.

        Args:
            reach_tokens: how many of these, the last ones, are wanted; None: all.
        """
        stop = self.clean + offset
        return range(0 if reach_tokens is None else max(0, stop - reach_tokens), stop)

    def last_clean(self, num_tokens: int) -> Tensor:
        """Return keys and values of the last clean tokens, `[2, T, G, C]`."""
        start = self.clean - num_tokens
        return torch.stack([self._read(half, start, self.clean) for half in (0, 1)])

    def replace_last_clean(self, kv_2TGC: Tensor) -> None:
        """Put other keys and values in the place of the last clean ones, see `last_clean`."""
        self.kv[:, self.clean - kv_2TGC.shape[1] : self.clean] = kv_2TGC

    def settle(self, num_tokens: int, *, chunk: int | None = None) -> None:
        """Declare the first `num_tokens` active tokens clean.

        Args:
            chunk: whose they are; needed where origins are tracked.
        """
        self.clean += num_tokens
        assert self.clean <= self.filled, "a chunk was settled before its keys were put"
        if self.origins is not None:
            assert chunk is not None, "origins are tracked, but the chunk is not named"
            self.origins.settle(self.clean - num_tokens, self.clean, chunk=chunk)

    def rewind(self, num_tokens: int) -> None:
        """Drop the newest clean tokens, and all active ones."""
        self.clean -= num_tokens
        self.filled = self.clean
        if self.origins is not None:
            self.origins.rewind(self.clean, self.clean + num_tokens)

    def pack(self) -> None:
        """Quantise what is clean, where a cache does that; its keys must be final."""

    def keep(self, indices_KG: Tensor) -> None:
        """Keep these clean tokens of each head and drop the other clean ones."""
        kept = len(indices_KG)
        active = self.filled - self.clean
        for half in (0, 1):
            rows = self._read(half, 0, self.filled)
            self.kv[half, :kept] = gather(rows[: self.clean], indices_KG)
            # clone: source and destination overlap when fewer than `active` tokens are dropped
            self.kv[half, kept : kept + active] = rows[self.clean :].clone()
        self.clean, self.filled = kept, kept + active
        if self.origins is not None:
            self.origins.keep(indices_KG)

    def num_bytes(self) -> int:
        """Return the bytes of what is held."""
        return self.kv.nbytes

    def compress(self, q_SHC: Tensor, keep: Keep) -> None:
        """Keep the clean tokens that a rule picks by these queries."""
        self.keep(keep(q_SHC, self._read(0, 0, self.clean)))

    def _read(self, half: int, start: int, stop: int) -> Tensor:
        """Return rows of the keys (0) or values (1), `[T, G, C]`: a view, or a copy."""
        return self.kv[half, start:stop].to(self.device, non_blocking=True)


def memory_for(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, packer: Packer | None
) -> Tensor:
    """Return memory without values on a device, or from a packer."""
    if packer is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return packer.like(torch.empty(shape, dtype=dtype, device="meta"))


def tokens_per_chunk(caches: Sequence[KVCache]) -> Tensor:
    """Return the clean tokens of each chunk `[N]`, mean over layers and heads of tracked caches."""
    counts = [cache.origins.count_GN for cache in caches if cache.origins is not None]
    return torch.stack(counts).double().mean(dim=(0, 1))


class Prefetcher:
    """Copies a layer's keys and values from the host while the layer before it is at work.

    Two buffers on the device take turns. On CUDA the copies have a stream of their own: a copy
    waits for all that was queued before, the attention that last read its buffer included, and
    attention waits for the copy. Elsewhere a copy is done when it is begun.

    Example: layer 0 has its rows copied and waits; then the copy of layer 1 begins and runs
    concurrently with the rest of layer 0. Layer 1 takes it, and layer 2 begins in the buffer of
    layer 0.
    """

    def __init__(self, like: KVCache) -> None:
        """Allocate both buffers, of the size of the caches that are read."""
        device = self._device = like.device
        self._buffers = [torch.empty_like(like.kv, device=device) for _ in range(PREFETCHED_LAYERS)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: tuple[KVCache, range] | None = None

    def begin(self, cache: KVCache, rows: range) -> None:
        """Begin to copy rows of a cache; they must not change until they are taken."""
        self._buffers.reverse()
        with self._in_stream():
            # half by half: what is not contiguous would be copied once more, on the host
            for half, buffer in zip(cache.kv, self._buffers[0], strict=True):
                buffer[: len(rows)].copy_(half[rows.start : rows.stop], non_blocking=True)
        self._begun = (cache, rows)

    def take(
        self, cache: KVCache, rows: range, *, own: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return rows of a cache and, behind them, keys and values that are on the device already.

        They hold until the next but one copy begins. `[T, G, C]` each.
        """
        if self._begun != (cache, rows):
            self.begin(cache, rows)
        self._begun = None
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        k, v = (half[: len(rows) + len(own[0])] for half in self._buffers[0])
        k[len(rows) :], v[len(rows) :] = own
        return k, v

    def _in_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)


def prefetcher_for(caches: Sequence[KVCache]) -> Prefetcher | None:
    """Return what reads these caches, and others of their size; None where they need no copies."""
    return None if not caches or caches[0].storage is None else Prefetcher(caches[0])


@dataclass(frozen=True)
class Compression:
    """A KV budget and the rule that picks which clean tokens stay within it."""

    budget: int
    """Clean tokens kept per head."""
    keep: Keep


def caches_for(
    num_layers: int,
    *,
    capacity: int,
    num_heads: int,
    head_width: int,
    dtype: torch.dtype,
    device: torch.device,
    storage: torch.device | None = None,
    make: Callable[..., KVCache] = KVCache,
) -> list[KVCache]:
    """Allocate the caches of all layers of one branch, `capacity` tokens each; see `KVCache`.

    On the host they lie in pinned memory if the device is CUDA: copies are several times faster.
    """
    packer = None
    if storage is not None and storage.type == "cpu" and device.type == "cuda":
        size = 2 * capacity * num_heads * head_width * dtype.itemsize
        total = num_layers * aligned(size) if make is KVCache else None
        piece_bytes = piece_for(size) if make is KVCache else PINNED_BYTES
        packer = Packer(host_memory(is_pinned=True), total_bytes=total, piece_bytes=piece_bytes)
    return [
        make(
            capacity,
            num_heads=num_heads,
            head_width=head_width,
            dtype=dtype,
            device=device,
            storage=storage,
            packer=packer,
        )
        for _ in range(num_layers)
    ]


_Read = tuple[KVCache, range]
"""A cache, and where the chunk that reads it stands behind the clean tokens."""


def cached_attention(
    caches: Sequence[Sequence[KVCache]],
    *,
    active: Sequence[range],
    kernel: Kernel,
    reach_tokens: int | None = None,
    compression: Compression | None = None,
    prefetcher: Prefetcher | None = None,
    timing: Callable[[], AbstractContextManager[object]] = nullcontext,
    remember: Callable[[int, Tensor], None] | None = None,
    rows: Tensor | None = None,
) -> Attend:
    """Return the self-attention of active chunks: store their keys, attend to all up to their own.

    In each layer one chunk's keys are stored before the next chunk attends, so that several chunks
    give together what they give one after the other.

    Args:
        caches: per batch entry (guidance branch) the caches of its layers.
        active: for each chunk, in ascending order, where its tokens stand behind the clean ones.
        reach_tokens: how many tokens are seen, the last ones, own ones included; None: all.
        compression: compresses clean tokens above its budget before they are seen, scored by the
            queries of the chunk that sees them first.
        prefetcher: reads caches that lie on the host; the layers must then come in order.
        timing: makes a context in which the compression runs.
        remember: is given each layer's index and queries `[B, S, H, C]`.
        rows: of the one active chunk's tokens, those that are computed; the keys of the others are
            those that were put last. None: all.
    """
    sizes = [len(own) for own in active] if rows is None else [len(rows)]

    def is_full(cache: KVCache) -> bool:
        return compression is not None and cache.clean > compression.budget

    def before(cache: KVCache, own: range) -> range:
        reach = None if reach_tokens is None else reach_tokens - len(own)
        return cache.seen(own.start, reach_tokens=reach)

    def read(
        cache: KVCache, own: range, kv: tuple[Tensor, Tensor], *, then: Sequence[_Read]
    ) -> tuple[Tensor, Tensor]:
        if prefetcher is None or rows is not None:
            return cache.prefix(own.stop, reach_tokens=reach_tokens)
        seen = prefetcher.take(cache, before(cache, own), own=kv)
        for other, chunk in then[:1]:
            if not is_full(other):
                prefetcher.begin(other, before(other, chunk))
        return seen

    def attend(layer: int, q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor) -> Tensor:
        if remember is not None:
            remember(layer, q_BSHC)
        reads = [(layers[layer], own) for layers in caches for own in active]
        below = [layers[layer + 1] for layers in caches[:1] if layer + 1 < len(layers)]
        upcoming = [*reads, *((cache, active[0]) for cache in below)]
        parts = [
            part
            for entry in zip(q_BSHC.split(1), k_BSGC.split(1), v_BSGC.split(1), strict=True)
            for part in zip(*(x.split(sizes, dim=1) for x in entry), strict=True)
        ]
        outputs: list[Tensor] = []
        for number, ((cache, own), (q, k, v)) in enumerate(zip(reads, parts, strict=True)):
            if compression is not None and is_full(cache):
                with timing():  # first: the tokens that leave make room for the new ones
                    cache.compress(q[0], compression.keep)
            cache.put(own.start, k[0], v[0], rows=rows)
            seen_k, seen_v = read(cache, own, (k[0], v[0]), then=upcoming[number + 1 :])
            seen = seen_k.unsqueeze(0), seen_v.unsqueeze(0)
            outputs.append(attend_wide(kernel, q, *seen, num_groups=cache.bias_groups))
        if len(outputs) == 1:
            return outputs[0]
        size = len(active)
        entries = [torch.cat(outputs[i : i + size], dim=1) for i in range(0, len(outputs), size)]
        return torch.cat(entries)

    return attend


def peak_tokens(
    ticks: Sequence[Tick], *, chunk_tokens: Mapping[int, int], given: int, budget: int | None
) -> int:
    """Return how many tokens a cache must hold at most: clean (or kept) and active ones.

    Compression counts only where it surely happens: before a chunk that enters puts its keys.
    Example: chunks of 80 tokens, budget 80, two active. When a third one enters, behind 80 kept
    tokens, 80 that just became clean and 80 active ones, 80 leave first: 240, not 320.

    Args:
        given: tokens of the given clean chunks (prefix, end image).
        budget: clean tokens kept; None: all.
    """
    clean = peak = given
    for tick in ticks:
        active = sum(chunk_tokens[chunk] for chunk in tick.steps)
        if budget is not None and tick.entering:
            entering = sum(chunk_tokens[chunk] for chunk in tick.entering)
            peak, clean = max(peak, clean + active - entering), min(clean, budget)
        peak = max(peak, clean + active)
        clean += sum(chunk_tokens[chunk] for chunk in tick.finishing)
    return peak
