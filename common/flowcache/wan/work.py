"""What a run of a Wan model costs."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from flowcache.attention import AttentionShape
from flowcache.compress import KVRule
from flowcache.errors import UserError
from flowcache.policies import stored_results
from flowcache.predict import PREDICTORS
from flowcache.runtime.memory import META
from flowcache.runtime.model import SegmentWork, Work
from flowcache.runtime.plan import Pass, held_bytes
from flowcache.wan.calibration import ReuseConfig
from flowcache.wan.dit import (
    PATCH,
    DiT,
    DiTConfig,
    blocks_flops,
    context_flops,
    embed_flops,
    head_flops,
)
from flowcache.wan.quantize import block_bytes, weight_bytes
from flowcache.wan.vae import SPATIAL_STRIDE


def wan_work(
    sizes: DiTConfig,
    segments: Sequence[SegmentWork],
    passes: Iterable[Sequence[Pass]],
    *,
    branches: tuple[str, ...],
    queries: int,
    pass_tokens: int,
    frame_tokens: int,
    dtype: torch.dtype,
    loop: Any,
    kv: KVRule,
    is_whole: bool = False,
    batch: int = 1,
    num_scored: int = 0,
    stored_bytes: int = 0,
    mode: Any = None,
    waits: bool = False,
    num_scenes: int = 1,
) -> Work:
    """Put together what a run costs.

    Args:
        sizes: of the transformer.
        passes: of one branch; those of a group are embedded together, once for all branches.
        queries: of the largest self-attention.
        pass_tokens: see `Work`.
        dtype: of the weights.
        loop: see `Work`.
        batch: branches that go through the blocks together.
        num_scored: queries that score the keys when the KV cache is compressed.
        mode: of quantised weights.
        waits: see `plan.kv_bytes`.
        num_scenes: prompts that follow each other in the first branch.
    """
    num_branches, heads = len(branches), sizes.num_heads
    num_texts, made = num_branches + num_scenes - 1, list[Pass]()
    flops = num_texts * context_flops(sizes)
    for group in passes:
        made += group
        num_frames = sum(own.tokens for own in group) // frame_tokens
        flops += embed_flops(sizes, num_frames=num_frames, frame_tokens=frame_tokens)
    for own in made:
        cost = blocks_flops(sizes, queries=own.tokens, keys=own.keys)
        cost += 0 if own.step is None else head_flops(sizes, queries=own.tokens)
        flops += num_branches * cost
    kv_tokens = max(part.kv_tokens for part in segments)
    keys = queries if is_whole else kv_tokens
    attention = AttentionShape(queries, keys, heads, heads, sizes.head_width)
    with META:
        dit = DiT(sizes)
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
        flops=flops,
        weight_bytes=weight_bytes(dit, mode, dtype=dtype),
        block_bytes=block_bytes(dit, mode, dtype=dtype),
        num_passes=num_texts + len(made) * num_branches // batch,
        read_tokens=0 if is_whole else num_branches * sum(own.keys for own in made),
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
