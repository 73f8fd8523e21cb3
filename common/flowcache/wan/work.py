"""What a run of a Wan model costs that goes chunk by chunk through a KV cache."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from flowcache.attention import AttentionShape
from flowcache.compress import KVRule
from flowcache.errors import UserError
from flowcache.runtime.config import check_pass
from flowcache.runtime.memory import META, weight_bytes
from flowcache.runtime.model import SegmentWork, Work
from flowcache.runtime.plan import TOKEN_COPIES, kv_bytes, most_active
from flowcache.wan.cached import pass_flops
from flowcache.wan.dit import PATCH, DiT, DiTConfig, context_flops, embed_flops
from flowcache.wan.vae import SPATIAL_STRIDE


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
) -> Work:
    """Work out what a video of one segment costs.

    Args:
        sizes: of the transformer.
        dtype: of its weights.
        loop: see `Work`.
    """
    num_branches, width, heads = len(branches), dtype.itemsize, sizes.num_heads
    queries = max(*segment.tokens.values(), most_active(segment.ticks, segment.tokens))
    check_pass(queries, sizes="height, width or the frames of a chunk")
    with META:
        weights = weight_bytes(DiT(sizes).to(dtype))
    flops = num_branches * context_flops(sizes)
    for call in calls:
        flops += embed_flops(sizes, num_frames=call.num_frames, frame_tokens=frame_tokens)
        flops += num_branches * pass_flops(
            sizes,
            call.num_frames,
            seen=call.seen,
            frame_tokens=frame_tokens,
            is_clean=call.is_clean,
        )
    return Work(
        segments=(segment,),
        branches=branches,
        passes=branches,
        is_whole=False,
        num_caches=num_branches,
        frame_tokens=frame_tokens,
        divided_tokens=frame_tokens,
        pass_tokens=queries,
        text_tokens=sizes.text_len,
        attention=AttentionShape(queries, segment.kv_tokens, heads, heads, sizes.head_width),
        flops=flops,
        weight_bytes=weights,
        **kv_bytes(
            [segment],
            AttentionShape(queries, segment.kv_tokens, heads, heads, sizes.head_width),
            kv=kv,
            num_caches=sizes.num_layers * num_branches,
            itemsize=width,
        ),
        scoring_bytes=0,
        query_bytes=0,
        stored_bytes=0,
        activation_bytes=queries * (TOKEN_COPIES * 4 * sizes.dim + 2 * width * sizes.ffn_dim),
        loop=loop,
    )


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
