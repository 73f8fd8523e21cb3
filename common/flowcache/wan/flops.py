"""Closed-form FLOPs of the SkyReels-V2 DiT, equal to what torch's FLOP counter counts."""

from collections.abc import Sequence

from flowcache.runtime.ops import attention_flops, linear_flops
from flowcache.wan.dit import PATCH, DiTConfig

IMAGE_TOKENS = 257


def embed(config: DiTConfig, *, num_frames: int, frame_tokens: int) -> int:
    """FLOPs of the patch, time and frame-rate embeddings of some latent frames."""
    dim = config.dim
    patch = config.in_dim * PATCH[0] * PATCH[1] * PATCH[2]
    flops = linear_flops(num_frames * frame_tokens, d_in=patch, d_out=dim)
    flops += linear_flops(num_frames, d_in=config.freq_dim, d_out=dim)
    flops += linear_flops(num_frames, d_in=dim, d_out=dim + 6 * dim)
    if config.inject_sample_info:
        flops += linear_flops(1, d_in=dim, d_out=dim + 6 * dim)
    return flops


def context(config: DiTConfig) -> int:
    """FLOPs of one prompt's projection to every layer's cross-attention keys and values."""
    dim, rows = config.dim, config.text_len
    flops = linear_flops(rows, d_in=config.text_dim, d_out=dim) + linear_flops(
        rows, d_in=dim, d_out=dim
    )
    flops += config.num_layers * linear_flops(rows, d_in=dim, d_out=2 * dim)
    if config.model_type == "i2v":
        image = config.image_dim or 1280
        flops += linear_flops(IMAGE_TOKENS, d_in=image, d_out=image + dim)
        flops += config.num_layers * linear_flops(IMAGE_TOKENS, d_in=dim, d_out=2 * dim)
    return flops


def blocks(config: DiTConfig, *, queries: int, keys: int) -> int:
    """FLOPs of all blocks for `queries` tokens that attend to `keys` tokens (own ones included)."""
    dim = config.dim
    context_tokens = config.text_len + (IMAGE_TOKENS if config.model_type == "i2v" else 0)
    per_block = linear_flops(queries, d_in=dim, d_out=4 * dim)  # q, k, v, o of self-attention
    per_block += attention_flops(queries, keys=keys, width=dim)
    per_block += linear_flops(queries, d_in=dim, d_out=2 * dim)  # q, o of cross-attention
    per_block += attention_flops(queries, keys=context_tokens, width=dim)
    per_block += 2 * linear_flops(queries, d_in=dim, d_out=config.ffn_dim)
    return config.num_layers * per_block


def head(config: DiTConfig, *, queries: int) -> int:
    """FLOPs of the projection of tokens to latent patches."""
    return linear_flops(queries, d_in=config.dim, d_out=config.out_dim * PATCH[1] * PATCH[2])


def published_forward(config: DiTConfig, *, chunk_tokens: Sequence[int]) -> int:
    """FLOPs of one forward of a whole window as the FlowCache paper counts its vanilla baseline.

    Attention is counted block-causally although the baseline's is full, and every chunk projects
    the prompt's keys and values anew. 5 chunks of 10,200 tokens of the 1.3B model give 420.7
    TFLOPs; 270 such forwards (70 + 65 ticks, 2 branches) the published 113.6 PFLOPs.

    Source: the published spreadsheet, sheet SkyreelsV2-Chunkwise, without its norms.
    """
    flops, keys = 0, 0
    for tokens in chunk_tokens:
        keys += tokens
        flops += blocks(config, queries=tokens, keys=keys)
        flops += config.num_layers * linear_flops(
            config.text_len, d_in=config.dim, d_out=2 * config.dim
        )
    return flops
