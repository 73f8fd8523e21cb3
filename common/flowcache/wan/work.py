"""What a run of a Wan model costs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flowcache.attention import AttentionShape
from flowcache.compress import KVRule
from flowcache.errors import UserError
from flowcache.policies import stored_results
from flowcache.predict import PREDICTORS
from flowcache.runtime.config import QuantizeName, check_pass
from flowcache.runtime.memory import weight_bytes
from flowcache.runtime.model import SegmentWork, Work
from flowcache.runtime.plan import held_bytes, most_active
from flowcache.runtime.quantize import saved_bytes
from flowcache.wan.cached import pass_flops
from flowcache.wan.calibration import ReuseConfig
from flowcache.wan.dit import PATCH, DiTConfig, context_flops, embed_flops, empty_dit
from flowcache.wan.vae import SPATIAL_STRIDE


def wan_work(
    sizes: DiTConfig,
    segments: Sequence[SegmentWork],
    *,
    branches: tuple[str, ...],
    queries: int,
    pass_tokens: int,
    frame_tokens: int,
    flops: int,
    dtype: torch.dtype,
    loop: Any,
    kv: KVRule,
    is_whole: bool = False,
    batch: int = 1,
    num_scored: int = 0,
    stored_bytes: int = 0,
    mode: QuantizeName | None = None,
    waits: bool = False,
    num_passes: int,
    read_tokens: int,
) -> Work:
    """Put together what a run costs.

    Args:
        sizes: of the transformer.
        queries: of the largest self-attention.
        pass_tokens: see `Work`.
        flops: of embeddings, blocks and heads; those of the prompts are added.
        dtype: of the weights.
        loop: see `Work`.
        batch: branches that go through the blocks together.
        num_scored: queries that score the keys when the KV cache is compressed.
        mode: of quantised weights.
        waits: see `plan.kv_bytes`.
        num_passes: see `Work`, as is `read_tokens`; those of the prompts are added.
    """
    num_branches, heads = len(branches), sizes.num_heads
    kv_tokens = max(part.kv_tokens for part in segments)
    keys = queries if is_whole else kv_tokens
    attention = AttentionShape(queries, keys, heads, heads, sizes.head_width)
    dit = empty_dit(sizes, dtype)
    saved = [saved_bytes([block], mode, dtype=dtype) for block in dit.blocks]
    return Work(
        segments=tuple(segments),
        branches=branches,
        passes=branches,
        is_whole=is_whole,
        num_caches=num_branches,
        frame_tokens=frame_tokens,
        divided_tokens=frame_tokens,
        pass_tokens=pass_tokens,
        text_tokens=sizes.text_len,
        attention=attention,
        flops=num_branches * context_flops(sizes) + flops,
        weight_bytes=weight_bytes(dit) - sum(saved),
        block_bytes=[
            weight_bytes(block) - less for block, less in zip(dit.blocks, saved, strict=True)
        ],
        num_passes=num_branches + num_passes,
        read_tokens=read_tokens,
        stored_bytes=stored_bytes,
        loop=loop,
        **held_bytes(
            segments,
            attention,
            num_layers=sizes.num_layers,
            num_caches=num_branches,
            ffn_width=sizes.ffn_dim,
            pass_tokens=batch * pass_tokens,
            num_queries=num_scored,
            keeps_queries=False,
            itemsize=dtype.itemsize,
            kv=kv,
            waits=waits,
        ),
    )


@dataclass(frozen=True)
class Call:
    """One pass of every guidance branch."""

    num_frames: int
    seen: int
    """Clean frames that these attend to in addition to themselves."""
    is_clean: bool
    """Whether they are fed for their keys alone."""


def chunk_work(
    sizes: DiTConfig,
    segment: SegmentWork,
    calls: Iterable[Call],
    *,
    branches: tuple[str, ...],
    frame_tokens: int,
    dtype: torch.dtype,
    loop: Any,
    kv: KVRule,
    reuse: ReuseConfig | None = None,
    num_scoring: int = 0,
    num_prompts: int = 1,
    stored_steps: int = 0,
    mode: QuantizeName | None = None,
    waits: bool = False,
) -> Work:
    """Work out what a video of one segment costs that goes chunk by chunk through a KV cache.

    Args:
        sizes: of the transformer.
        dtype: of its weights.
        loop: see `Work`.
        reuse: of whose steps results are stored; None: none are.
        num_scoring: queries that score keys when some of these leave.
        num_prompts: that follow each other in the first branch.
        stored_steps: of a chunk, at which what every block changes is stored.
        mode: of quantised weights.
        waits: see `plan.kv_bytes`.
    """
    queries = max(*segment.tokens.values(), most_active(segment.ticks, segment.tokens))
    check_pass(queries, sizes="height, width or the frames of a chunk")
    flops = (num_prompts - 1) * context_flops(sizes)
    num_passes, read_tokens = num_prompts - 1, 0
    for call in calls:
        num_passes += len(branches)
        read_tokens += len(branches) * (call.seen + call.num_frames) * frame_tokens
        flops += embed_flops(sizes, num_frames=call.num_frames, frame_tokens=frame_tokens)
        flops += len(branches) * pass_flops(
            sizes,
            call.num_frames,
            seen=call.seen,
            frame_tokens=frame_tokens,
            is_clean=call.is_clean,
        )
    stored = stored_steps * sizes.num_layers * queries * sizes.dim * dtype.itemsize
    if reuse is not None:
        stored += len(branches) * result_bytes(sizes, reuse, queries, dtype)
    return wan_work(
        sizes,
        [segment],
        branches=branches,
        queries=queries,
        pass_tokens=queries,
        frame_tokens=frame_tokens,
        flops=flops,
        dtype=dtype,
        num_scored=num_scoring,
        stored_bytes=stored,
        loop=loop,
        kv=kv,
        mode=mode,
        waits=waits,
        num_passes=num_passes,
        read_tokens=read_tokens,
    )


def result_bytes(sizes: DiTConfig, reuse: ReuseConfig, tokens: int, dtype: torch.dtype) -> int:
    """Return what the results of some tokens take that one branch's reused steps are made from."""
    is_tokens = PREDICTORS[reuse.predict].level == "tokens"
    width = sizes.dim * dtype.itemsize if is_tokens else PATCH[1] * PATCH[2] * sizes.out_dim * 4
    return stored_results(reuse) * tokens * width


def tokens_per_frame(*, height: int, width: int) -> int:
    """Return the tokens of one latent frame of a picture of some pixels."""
    multiple = SPATIAL_STRIDE * PATCH[1]
    for name, value in (("height", height), ("width", width)):
        if value % multiple:
            below = max(value // multiple, 1) * multiple
            raise UserError(
                f"{name} must be a multiple of {multiple} pixels, not {value}; use {below} or "
                f"{below + multiple}"
            )
    return (height // multiple) * (width // multiple)
