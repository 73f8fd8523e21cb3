"""What a run costs, by arithmetic: one walk through its ticks, with every step computed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flowcache.attention import AttentionShape
from flowcache.compress import (
    CompressionStrategy,
    KVRule,
    TokenLayout,
    kept_tokens,
)
from flowcache.kv_quantized import KVSizes
from flowcache.quantization import format_of
from flowcache.runtime.model import SegmentWork, Work
from flowcache.runtime.parallel import Layout, bytes_per_process
from flowcache.runtime.stats import scaled
from flowcache.schedule import Tick
from flowcache.scores import (
    scoring_bytes,
)

TOKEN_COPIES = 6
"""Token-wide float32 arrays alive at once inside a block (stream, norms, their rotations)."""

Limit = Callable[[Tick | None], int | None]
"""Tick -> clean tokens that stay when it begins, None: all. None: a clean chunk is fed."""


@dataclass(frozen=True)
class Pass:
    """One chunk's way through the blocks in one branch."""

    chunk: int
    step: int | None
    """Its own step; None: it is clean, and fed for its keys and values."""
    tokens: int
    keys: int
    """Tokens of this chunk, of active ones before it, and clean ones that are kept."""
    is_oldest: bool = False
    """Whether it is the first active chunk of its tick."""
    is_given: bool = False


def walk(
    segment: SegmentWork,
    *,
    limit: Limit,
    clean_pass: bool,
    settles_at_once: bool,
) -> Iterator[list[Pass]]:
    """Yield the passes of a segment in groups that are embedded together.

    Args:
        clean_pass: whether a chunk that became clean is fed once more, before the next tick.
        settles_at_once: without a clean pass, whether the keys of a chunk's last step count as
            clean for the chunks after it in the same tick, and may be dropped.
    """
    tokens, clean, finished = segment.tokens, 0, list[int]()

    def fed(chunk: int, *, is_given: bool) -> list[Pass]:
        nonlocal clean
        most = limit(None)
        clean = clean if most is None else min(clean, most)
        made = Pass(chunk, None, tokens[chunk], clean + tokens[chunk], is_given=is_given)
        clean += tokens[chunk]
        return [made]

    for chunk in segment.given:
        yield fed(chunk, is_given=True)
    for tick in segment.ticks:
        for chunk in finished:
            if clean_pass:
                yield fed(chunk, is_given=False)
            else:
                clean += tokens[chunk]
        finished, active, group = list[int](), 0, list[Pass]()
        for place, (chunk, step) in enumerate(tick.steps.items()):
            most = limit(tick)
            clean = clean if most is None else min(clean, most)
            own = tokens[chunk]
            group.append(Pass(chunk, step, own, clean + active + own, is_oldest=place == 0))
            if chunk in tick.finishing and settles_at_once and not clean_pass:
                clean += own
                continue
            active += own
            finished += [chunk] if chunk in tick.finishing else []
        yield group


def check_compression(
    strategy: CompressionStrategy, segment: SegmentWork, *, layout: TokenLayout, limit: Limit
) -> None:
    """Compress the number of clean tokens as a run does in which every step is computed."""
    kept: dict[tuple[int, int], int] = {}
    clean = sum(segment.tokens[chunk] for chunk in segment.given)
    for tick in segment.ticks:
        most = limit(tick)
        if most is not None and clean > most:
            if (clean, most) not in kept:
                kept[clean, most] = kept_tokens(
                    strategy, num_keys=clean, budget=most, layout=layout
                )
            clean = kept[clean, most]
        clean += sum(segment.tokens[chunk] for chunk in tick.finishing)


def most_active(ticks: Sequence[Tick], tokens: Mapping[int, int]) -> int:
    """Return how many tokens the active chunks of a tick have at most."""
    return max(sum(tokens[chunk] for chunk in tick.steps) for tick in ticks)


def scored_bytes(shape: AttentionShape, *, num_queries: int) -> int:
    """Return the scratch memory of one compression, at most.

    Args:
        num_queries: that score the keys; 0: no scores are computed.
    """
    if not num_queries:
        return 0
    return scoring_bytes(
        num_queries,
        shape.num_keys,
        num_heads=shape.num_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_width,
    )


def held_bytes(
    segments: Sequence[SegmentWork],
    attention: AttentionShape,
    *,
    num_layers: int,
    num_caches: int,
    ffn_width: int,
    pass_tokens: int,
    num_queries: int,
    keeps_queries: bool,
    itemsize: int,
    kv: KVRule,
    waits: bool = False,
) -> dict[str, int]:
    """Return the fields of `Work` that count bytes in the same way in all transformers.

    Args:
        attention: the largest self-attention.
        pass_tokens: that go through the blocks at once, guidance passes in one batch included.
        num_queries: that score the keys when the KV cache is compressed.
        keeps_queries: whether those of all layers and caches are kept from one to the next.
        itemsize: bytes of a number inside the blocks.
        waits: see `kv_bytes`.
    """
    kv_tokens, width = max(part.kv_tokens for part in segments), attention.head_width
    num_kept, model_width = num_layers * num_caches * itemsize, attention.num_heads * width
    query_bytes = num_queries * num_kept * model_width * keeps_queries
    scored = scored_bytes(replace(attention, num_keys=kv_tokens), num_queries=num_queries)
    return {
        **kv_bytes(
            segments,
            attention,
            kv=kv,
            num_caches=num_layers * num_caches,
            itemsize=itemsize,
            waits=waits,
        ),
        "scoring_bytes": query_bytes + scored,
        "query_bytes": query_bytes,
        "activation_bytes": pass_tokens
        * (TOKEN_COPIES * 4 * model_width + 2 * itemsize * ffn_width),
    }


def kv_bytes(
    segments: Sequence[SegmentWork],
    attention: AttentionShape,
    *,
    kv: KVRule,
    num_caches: int,
    itemsize: int,
    waits: bool = False,
) -> dict[str, int]:
    """Return the fields of `Work` that count the bytes of KV caches.

    Args:
        attention: whose heads the caches have.
        num_caches: of all layers and branches.
        waits: whether a clean chunk is quantised at the end of the tick after it became clean.
    """
    num_heads, width = attention.kv_heads, attention.head_width
    kv_tokens = max(part.kv_tokens for part in segments)
    made = format_of(kv, head_width=width)
    if made is None or not kv_tokens:
        return {"kv_bytes": 2 * kv_tokens * num_heads * width * num_caches * itemsize}
    counted: list[dict[str, int]] = []
    for part in segments:
        sizes, capacity = KVSizes.of(made, part.ticks, part.tokens, waits=waits), part.kv_tokens
        rest = sizes.rest_bytes(capacity, width, itemsize=itemsize) * num_heads * num_caches
        counted.append(
            {
                "kv_bytes": capacity * sizes.row_bytes(width) * num_heads * num_caches + rest,
                "kv_device_bytes": rest,
                "kv_read_bytes": sizes.read_bytes(capacity, num_heads, width, itemsize=itemsize),
            }
        )
    return max(counted, key=lambda fields: fields["kv_bytes"])


def cost_lines(work: Work, *, cache: str, stored: str) -> list[str]:
    """Describe what a run holds."""
    read = f"; {scaled(work.kv_read_bytes, 'B')} to read a layer" if work.kv_read_bytes else ""
    return [
        f"weights      {scaled(work.weight_bytes, 'B')} (transformer)",
        f"KV cache     {scaled(work.kv_bytes, 'B')}, {cache}{read}",
        f"KV scoring   {scaled(work.scoring_bytes, 'B')} extra while compressing",
        f"stored       {scaled(work.stored_bytes, 'B')} of {stored} for reuse",
        f"activations  {scaled(work.activation_bytes, 'B')} (estimate, one forward)",
    ]


# Several processes --------------------------------------------------------------------------------


def per_process(work: Work, layout: Layout) -> Work:
    """Return the work with the caches that each process has at most."""
    num_caches = work.num_caches
    # kept queries are those of each branch; the scratch memory of scoring is there once
    num_scored = num_caches if work.query_bytes else 1
    return replace(
        work,
        kv_bytes=bytes_per_process(work.kv_bytes, layout, num_branches=num_caches),
        kv_device_bytes=bytes_per_process(work.kv_device_bytes, layout, num_branches=num_caches),
        kv_read_bytes=bytes_per_process(work.kv_read_bytes, layout, num_branches=1),
        scoring_bytes=bytes_per_process(work.scoring_bytes, layout, num_branches=num_scored),
        query_bytes=bytes_per_process(work.query_bytes, layout, num_branches=num_caches),
    )
