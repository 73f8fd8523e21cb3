"""What a run will cost, by arithmetic: ticks, chunks, tokens, FLOPs, bytes. Nothing is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowcache.attention import AttentionShape
from flowcache.compress import kept_tokens
from flowcache.runtime.cli import gigabytes
from flowcache.runtime.settings import check_pass, stored_results, strategy_of
from flowcache.scoring import scoring_bytes
from flowcache.wan.dit import (
    PATCH,
    DiT,
    DiTConfig,
    blocks_flops,
    context_flops,
    embed_flops,
    head_flops,
)
from flowcache.wan.quantize import weight_bytes
from skyreels_v2.build import (
    batches_branches,
    branches_of,
    budget_of,
    compression_of,
    kv_capacity,
    sampling_of,
    segments_of,
    token_layout,
    tokens_per_frame,
    window_of,
)
from skyreels_v2.config import RunConfig
from skyreels_v2.window import Window, describe, pixel_frames

RESIDUAL_COPIES = 6
"""Token-wide float32 arrays alive at once inside a block (stream, norms, q, k, their rotations)."""


@dataclass(frozen=True)
class SegmentPlan:
    """One window of the video."""

    window: Window
    num_ticks: int
    num_forwards: int
    """Chunk forwards of all branches if every step is computed."""
    flops: int
    """FLOPs of the window if every step is computed."""
    kv_tokens: int
    """Tokens that each layer's KV cache of a branch holds at most."""


@dataclass(frozen=True)
class Plan:
    """What a run will cost if every step is computed; reuse only saves."""

    segments: tuple[SegmentPlan, ...]
    frame_tokens: int
    num_branches: int
    context_flops: int
    """FLOPs of projecting the prompts, once per video."""
    weight_bytes: int
    """The transformer's weights."""
    kv_bytes: int
    """The KV caches of all layers and branches."""
    scoring_bytes: int
    """Extra memory while the KV cache is compressed."""
    stored_bytes: int
    """Stored results from which reused steps are made."""
    forward_tokens: int
    """Tokens of one branch that go through the blocks at once, at most."""
    activation_bytes: int
    """Estimate of what one forward needs beside weights and caches."""

    @property
    def num_ticks(self) -> int:
        return sum(segment.num_ticks for segment in self.segments)

    @property
    def flops(self) -> int:
        return self.context_flops + sum(segment.flops for segment in self.segments)


def make_plan(config: RunConfig, dit: DiTConfig, *, dtype: torch.dtype) -> Plan:
    """Work out what the run will cost.

    Raises:
        UserError: frames, chunks or resolution don't fit each other.
    """
    num_branches = len(branches_of(config))
    frame_tokens = tokens_per_frame(config)
    segments = segments_of(config)
    frames = max(segment.num_frames for segment in segments)
    if config.attention == "causal":
        frames = min(frames, config.causal_block_size)
    check_pass(frames * frame_tokens, sizes="height, width, base_num_frames or causal_block_size")
    plans: list[SegmentPlan] = []
    for segment in segments:
        window = window_of(
            config, segment, num_segments=len(segments), is_i2v=dit.model_type == "i2v"
        )
        _check_compression(config, window)
        plans.append(_plan_segment(config, dit, window, num_branches=num_branches))
    width = dtype.itemsize
    largest = max(plans, key=lambda plan: plan.window.num_frames)
    tokens = largest.window.num_frames * frame_tokens
    kv_tokens = max(plan.kv_tokens for plan in plans)
    with torch.device("meta"):
        weights = weight_bytes(DiT(dit), config.quantize, dtype=dtype)
    queries = max(len(chunk) for chunk in largest.window.chunks) * frame_tokens
    if config.attention == "full":
        queries = tokens
    forward_tokens = queries
    if config.attention == "causal":
        forward_tokens = max(queries, min(config.together_tokens, _active_tokens(config, plans)))
    return Plan(
        segments=tuple(plans),
        frame_tokens=frame_tokens,
        num_branches=num_branches,
        context_flops=num_branches * context_flops(dit),
        weight_bytes=weights,
        kv_bytes=2 * kv_tokens * dit.dim * dit.num_layers * num_branches * width,
        scoring_bytes=_scoring_bytes(config, dit, queries=queries, kv_tokens=kv_tokens),
        stored_bytes=_stored_bytes(config, dit, tokens=tokens, width=width) * num_branches,
        forward_tokens=forward_tokens,
        activation_bytes=(num_branches if batches_branches(config) else 1)
        * forward_tokens
        * (RESIDUAL_COPIES * 4 * dit.dim + 2 * width * dit.ffn_dim),
    )


def _check_compression(config: RunConfig, window: Window) -> None:
    """Compress the number of clean tokens as a run does in which every step is computed.

    Raises:
        UserError: the rule that picks what stays can't work with such a budget.
    """
    strategy = strategy_of(config.kv)
    if strategy is None:
        return
    per_frame = tokens_per_frame(config)
    layout = token_layout(config, frame_tokens=per_frame)
    budget = budget_of(config, layout)
    kept: dict[int, int] = {}
    clean = per_frame * sum(len(chunk) for chunk in window.chunks[: window.num_given])
    for tick in sampling_of(config).ticks(window):
        if clean > budget:
            if clean not in kept:
                kept[clean] = kept_tokens(strategy, num_keys=clean, budget=budget, layout=layout)
            clean = kept[clean]
        clean += per_frame * sum(len(window.chunks[chunk]) for chunk in tick.finishing)


def _active_tokens(config: RunConfig, plans: Sequence[SegmentPlan]) -> int:
    """Return how many tokens the active chunks of a tick have at most."""
    return tokens_per_frame(config) * max(
        sum(len(plan.window.chunks[chunk]) for chunk in tick.steps)
        for plan in plans
        for tick in sampling_of(config).ticks(plan.window)
    )


def _plan_segment(
    config: RunConfig, dit: DiTConfig, window: Window, *, num_branches: int
) -> SegmentPlan:
    ticks = sampling_of(config).ticks(window)
    if config.attention == "full":
        count = _full_flops
        forwards = len(ticks)
    else:
        count = _causal_flops
        forwards = sum(len(tick.steps) for tick in ticks)
    total = count(config, dit, window, num_branches=num_branches)
    return SegmentPlan(
        window, len(ticks), forwards * num_branches, total, kv_capacity(config, window)
    )


def _full_flops(config: RunConfig, dit: DiTConfig, window: Window, *, num_branches: int) -> int:
    per_frame = tokens_per_frame(config)
    tokens = window.num_frames * per_frame
    forward = blocks_flops(dit, queries=tokens, keys=tokens) + head_flops(dit, queries=tokens)
    embed = embed_flops(dit, num_frames=window.num_frames, frame_tokens=per_frame)
    num_ticks = len(sampling_of(config).ticks(window))
    return num_ticks * (embed + num_branches * forward)


def _causal_flops(config: RunConfig, dit: DiTConfig, window: Window, *, num_branches: int) -> int:
    """Walk through the ticks as the sampler does, with every step computed."""
    per_frame = tokens_per_frame(config)
    compression = compression_of(config, frame_tokens=per_frame)
    clean = embedding = per_branch = 0

    def forward(queries: int, *, offset: int, has_head: bool) -> None:
        nonlocal clean, per_branch
        if compression is not None:
            clean = min(clean, compression.budget)
        per_branch += blocks_flops(dit, queries=queries, keys=clean + offset + queries)
        per_branch += head_flops(dit, queries=queries) if has_head else 0

    def embed(num_frames: int) -> None:
        nonlocal embedding
        embedding += embed_flops(dit, num_frames=num_frames, frame_tokens=per_frame)

    def feed_clean(chunk: range) -> None:
        nonlocal clean
        embed(len(chunk))
        forward(len(chunk) * per_frame, offset=0, has_head=False)
        clean += len(chunk) * per_frame

    for chunk in window.chunks[: window.num_given]:
        feed_clean(chunk)
    for tick in sampling_of(config).ticks(window):
        embed(sum(len(window.chunks[chunk]) for chunk in tick.steps))
        offset = 0
        for chunk in tick.steps:
            tokens = len(window.chunks[chunk]) * per_frame
            forward(tokens, offset=offset, has_head=True)
            if chunk in tick.finishing and not config.clean_pass:
                clean += tokens
            else:
                offset += tokens
        if config.clean_pass and not tick.is_last:
            for chunk in tick.finishing:
                feed_clean(window.chunks[chunk])
    return embedding + num_branches * per_branch


def _scoring_bytes(config: RunConfig, dit: DiTConfig, *, queries: int, kv_tokens: int) -> int:
    """Return the extra memory of one compression; only scoring by importance needs any."""
    kv = config.kv
    if kv.compress != "importance":
        return 0
    seen = {"token": 50, "frame": tokens_per_frame(config), "chunk": queries}[kv.queries]
    return scoring_bytes(
        min(seen, queries),
        kv_tokens,
        num_heads=dit.num_heads,
        kv_heads=dit.num_heads,
        head_dim=dit.head_width,
    )


def _stored_bytes(config: RunConfig, dit: DiTConfig, *, tokens: int, width: int) -> int:
    """Return the bytes of one branch's stored results, all chunks active.

    They are stored whether a policy will ask for them or not.
    """
    copies = stored_results(config.reuse)
    if config.reuse.predict == "residual":
        return copies * tokens * dit.dim * width
    return copies * tokens * PATCH[1] * PATCH[2] * dit.out_dim * 4


def attention_shape(config: RunConfig, dit: DiTConfig, plan: Plan) -> AttentionShape:
    """Return the largest self-attention of a run: a chunk's, or with full attention a window's."""
    window = max((segment.window for segment in plan.segments), key=lambda w: w.num_frames)
    whole = window.num_frames * plan.frame_tokens
    is_full = config.attention == "full"
    return AttentionShape(
        num_queries=whole if is_full else max(map(len, window.chunks)) * plan.frame_tokens,
        num_keys=whole if is_full else max(segment.kv_tokens for segment in plan.segments),
        num_heads=dit.num_heads,
        kv_heads=dit.num_heads,
        head_width=dit.head_width,
    )


def shown_frames(config: RunConfig, plan: Plan, *, num_before: int) -> dict[int, list[list[int]]]:
    """Return for each segment and chunk the frames `[first, stop)` of the video that show it.

    Args:
        num_before: frames that the video begins with.
    """
    rows: dict[int, list[list[int]]] = {}
    first = num_before
    for segment, planned in zip(segments_of(config), plan.segments, strict=True):
        repeated = segment.prefix_pixels
        new = pixel_frames(segment.num_frames) - repeated

        def place(latent: int, *, start: int = first, cut: int = repeated, most: int = new) -> int:
            return start + min(max((pixel_frames(latent) if latent else 0) - cut, 0), most)

        chunks = planned.window.chunks
        rows[segment.index] = [[place(chunk.start), place(chunk.stop)] for chunk in chunks]
        first += new
    return rows


def lines(plan: Plan, config: RunConfig) -> list[str]:
    """Say the plan in a few lines."""
    first = plan.segments[0]
    frames = config.num_frames
    size = f"{config.width}x{config.height}"
    windows = ", ".join(describe(segment.window) for segment in plan.segments)
    tokens = first.window.num_frames * plan.frame_tokens
    return [
        f"video        {frames} frames of {size} at {config.fps} fps, seed {config.seed}",
        f"segments     {len(plan.segments)}: {windows}",
        f"ticks        {plan.num_ticks} of {config.num_steps} steps per chunk, "
        f"{config.attention} attention, lag {config.ar_step}, {plan.num_branches} branches",
        f"tokens       {plan.frame_tokens} per latent frame, {tokens} in the first window",
        f"forwards     {sum(s.num_forwards for s in plan.segments)}, "
        f"{plan.flops / 1e15:.4g} PFLOPs if every step is computed",
        f"weights      {gigabytes(plan.weight_bytes)} (transformer)",
        f"KV cache     {gigabytes(plan.kv_bytes)}, {max(s.kv_tokens for s in plan.segments)} tokens"
        " per layer and branch",
        f"KV scoring   {gigabytes(plan.scoring_bytes)} extra while compressing",
        f"stored       {gigabytes(plan.stored_bytes)} of results for reuse",
        f"activations  {gigabytes(plan.activation_bytes)} (estimate, one forward)",
    ]
