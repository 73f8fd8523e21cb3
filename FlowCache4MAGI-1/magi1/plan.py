"""What a run will cost, by arithmetic: ticks, chunks, tokens, FLOPs, bytes. Nothing is loaded."""

from dataclasses import dataclass, field, replace

import torch

from flowcache.attention import AttentionShape
from flowcache.compress import ImportanceRedundancy, kept_tokens
from flowcache.runtime.cli import gigabytes
from flowcache.runtime.settings import POLICIES, check_pass, stored_results
from flowcache.schedule import Tick
from flowcache.scoring import scoring_bytes
from magi1.build import budget_of, clip_of, latent_size, layout_of, sampling_of
from magi1.config import ModelConfig, RunConfig
from magi1.dit import DiT, block_flops, context_flops, embed_flops, head_flops, set_precision
from magi1.sampler import KVBudget, Sampling, cache_bytes, cache_chunks
from magi1.schedule import Clip, Clock
from magi1.text import NULL_TOKENS

TOKEN_COPIES = 6
"""Token-wide float32 arrays alive at once inside a layer (stream, norms, gated output)."""


@dataclass(frozen=True)
class Plan:
    """What a run will cost if every step is computed; reuse only saves."""

    clip: Clip
    num_ticks: int
    num_passes: int
    """Guidance passes per chunk and step."""
    num_branches: int
    """Guidance passes with a KV cache."""
    frame_tokens: int
    text_tokens: int
    """Tokens of the prompt that a chunk is told, special ones included."""
    flops: int
    weight_bytes: int
    """The transformer's weights."""
    kv_chunks: int
    """Chunks that each layer's KV cache of a branch holds."""
    kv_bytes: int
    """The KV caches of all layers and branches."""
    scoring_bytes: int
    """Extra memory for compressing the KV cache: kept queries, scores."""
    query_bytes: int
    """The kept queries alone, which stay from one compression to the next."""
    stored_bytes: int
    """Stored results from which reused steps are made, and the signals that are compared."""
    activation_bytes: int
    """Estimate of what one forward needs beside weights and caches."""


def make_plan(
    config: RunConfig,
    *,
    num_prefix: int,
    prompt_tokens: int,
    has_special_tokens: bool,
    dtype: torch.dtype,
) -> Plan:
    """Work out what the run will cost.

    Args:
        num_prefix: given latents.
        prompt_tokens: T5 tokens of the prompt.
        has_special_tokens: whether learned tokens go before them.
        dtype: type of the weights inside the blocks.
    """
    model = replace(config.model_config, params_dtype=str(dtype))
    clip, clock = clip_of(config, num_prefix=num_prefix), Clock.of(config)
    sampling, layout, budget = sampling_of(config), layout_of(config), budget_of(config)
    check_pass(layout.chunk_tokens, sizes="video_size_h, video_size_w or chunk_width")
    special = len(config.tokens.names()) + config.tokens.duration if has_special_tokens else 0
    text = min(prompt_tokens + special, model.caption_max_length)
    total = None if budget is None else budget.total_chunks
    num_branches = 1 if sampling.guidance is None else 2
    query_bytes = _query_bytes(config, dtype, num_branches=num_branches)
    counter = _FlopCounter(
        model,
        clock=clock,
        sampling=sampling,
        chunk_tokens=layout.chunk_tokens,
        text=text,
        null_text=min(NULL_TOKENS, model.caption_max_length),
        total_chunks=total,
        num_branches=num_branches,
    )
    ticks = clock.ticks(clip)
    if budget is not None:
        _check_budget(budget, clip, ticks)
    return Plan(
        clip=clip,
        num_ticks=len(ticks),
        num_passes=1 if sampling.guidance is None else 3,
        num_branches=num_branches,
        frame_tokens=layout.frame_tokens,
        text_tokens=text,
        flops=counter.clip(clip, ticks),
        weight_bytes=_weight_bytes(config, dtype),
        kv_chunks=cache_chunks(clip, total_chunks=total),
        kv_bytes=cache_bytes(
            model,
            clip=clip,
            chunk_tokens=layout.chunk_tokens,
            total_chunks=total,
            num_branches=num_branches,
        ),
        scoring_bytes=query_bytes + _scoring_scratch(config, clip=clip),
        query_bytes=query_bytes,
        stored_bytes=_stored_bytes(config, dtype, num_active=min(clock.window, clip.num_chunks)),
        activation_bytes=layout.chunk_tokens
        * (TOKEN_COPIES * 4 * model.hidden_size + 2 * dtype.itemsize * model.ffn_hidden_size),
    )


def _check_budget(budget: KVBudget, clip: Clip, ticks: list[Tick]) -> None:
    """Compress the number of clean chunks as the sampler does.

    Raises:
        UserError: the rule that picks what stays can't work with such a budget.
    """
    compressions: set[tuple[int, int]] = set()
    num_clean, waiting = clip.num_given, 0
    for tick in ticks:
        num_clean += waiting
        kept = budget.total_chunks - len(tick.steps)
        if tick.entering and num_clean > kept:
            compressions.add((num_clean, kept))
            num_clean = kept
        waiting = len(tick.finishing)
    tokens = budget.layout.chunk_tokens
    for num_clean, kept in compressions:
        kept_tokens(
            budget.strategy,
            num_keys=num_clean * tokens,
            budget=kept * tokens,
            layout=budget.layout,
        )


@dataclass
class _FlopCounter:
    """Walks through the ticks as the sampler does, with every step computed."""

    model: ModelConfig
    clock: Clock
    sampling: Sampling
    chunk_tokens: int
    text: int
    null_text: int
    total_chunks: int | None
    num_branches: int
    num_clean: int = 0
    """Chunks whose clean keys are in the caches, or as many tokens."""
    known: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    """What has been counted: the passes of a long video are alike."""

    def clip(self, clip: Clip, ticks: list[Tick]) -> int:
        """Return the FLOPs of a whole clip, given chunks included."""
        total = context_flops(self.model, text=self.null_text)
        for _ in range(clip.num_given):
            total += self._feed(self.clock.reach_given())
            self.num_clean += 1
        waiting = 0
        for tick in ticks:
            for _ in range(waiting):
                if self.sampling.clean_pass:
                    total += self.num_branches * self._feed(self.clock.reach_clean())
                self.num_clean += 1
            if self.total_chunks is not None and tick.entering:
                self.num_clean = min(self.num_clean, self.total_chunks - len(tick.steps))
            total += len(tick.entering) * context_flops(self.model, text=self.text)
            total += self._tick(tick)
            waiting = len(tick.finishing)
        return total

    def _tick(self, tick: Tick) -> int:
        total, guidance = 0, self.sampling.guidance
        for place, step in enumerate(tick.steps.values()):
            seen, reach = self.num_clean + place + 1, self.clock.reach(step)
            keys = seen if reach is None else min(seen, reach)
            total += self._step(keys, text=self.text)
            if guidance is None:
                is_twice = self.sampling.nearly_clean_pass and self.clock.is_nearly_clean(step)
                total += self._step(1, text=self.text) if is_twice and place == 0 else 0
                continue
            total += self._step(keys, text=self.null_text)
            prev, _ = guidance.scales(self.clock.timesteps()[step].item())
            total += self._step(1, text=self.null_text) if prev != 1 else 0
        return total

    def _feed(self, reach: int | None) -> int:
        seen = self.num_clean + 1
        return self._layers(seen if reach is None else min(seen, reach), text=self.null_text)

    def _step(self, num_seen: int, *, text: int) -> int:
        return self._layers(num_seen, text=text) + head_flops(self.model, queries=self.chunk_tokens)

    def _layers(self, num_seen: int, *, text: int) -> int:
        """Return the FLOPs of one chunk that sees `num_seen` chunks, itself included."""
        known = self.known.get((num_seen, text))
        if known is None:
            tokens = self.chunk_tokens
            known = embed_flops(self.model, tokens=tokens, is_distilled=self.sampling.is_distilled)
            known += block_flops(self.model, queries=tokens, keys=num_seen * tokens, text=text)
            self.known[num_seen, text] = known
        return known


def _weight_bytes(config: RunConfig, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        dit = DiT(config.model_config, is_fp8=config.engine_config.fp8_quant)
    set_precision(dit, dtype)
    return sum(parameter.nbytes for parameter in dit.parameters())


def _query_bytes(config: RunConfig, dtype: torch.dtype, *, num_branches: int) -> int:
    """Return the queries that are kept for scoring."""
    model = config.model_config
    width = num_branches * model.num_layers * model.hidden_size * dtype.itemsize
    return _seen_queries(budget_of(config)) * width


def _seen_queries(budget: KVBudget | None) -> int:
    """Return how many queries score the keys; 0 without scores."""
    if budget is None or not isinstance(budget.strategy, ImportanceRedundancy):
        return 0
    sample = torch.empty(budget.layout.chunk_tokens, 1, 1, device="meta")
    return len(budget.strategy.seen_queries(sample, budget.layout))


def _scoring_scratch(config: RunConfig, *, clip: Clip) -> int:
    """Return the scratch memory of one compression."""
    budget, model = budget_of(config), config.model_config
    num_queries = _seen_queries(budget)
    if budget is None or not num_queries:
        return 0
    num_keys = cache_chunks(clip, total_chunks=budget.total_chunks) * budget.layout.chunk_tokens
    return scoring_bytes(
        num_queries,
        num_keys,
        num_heads=model.num_attention_heads,
        kv_heads=model.num_query_groups,
        head_dim=model.kv_channels,
    )


def _stored_bytes(config: RunConfig, dtype: torch.dtype, *, num_active: int) -> int:
    """Return the bytes of stored results and signals, all chunks of the window active.

    Results are stored whether a policy will ask for them or not.
    """
    model, run = config.model_config, config.runtime_config
    height, width = latent_size(config)
    latents = model.latent_channels * run.chunk_width * height * width * 4
    copies = stored_results(config.reuse)
    signals = 0
    if POLICIES[config.reuse.policy].needs_signals:
        signals = layout_of(config).chunk_tokens * model.hidden_size * dtype.itemsize
    return num_active * (copies * latents + signals)


def attention_shape(config: RunConfig, plan: Plan) -> AttentionShape:
    """Return the largest self-attention of a run: a chunk's."""
    model, chunk = config.model_config, layout_of(config).chunk_tokens
    reaches = config.runtime_config.noise2clean_kvrange
    seen = min(max(reaches), plan.kv_chunks) if reaches else plan.kv_chunks
    return AttentionShape(
        num_queries=chunk,
        num_keys=seen * chunk,
        num_heads=model.num_attention_heads,
        kv_heads=model.num_query_groups,
        head_width=model.kv_channels,
    )


def shown_frames(clip: Clip) -> list[list[int]]:
    """Return for each chunk the frames `[first, stop)` of the video that show it."""
    rows: list[list[int]] = []
    stop = 0
    for chunk in range(clip.num_chunks):
        first = stop
        if chunk in clip.generated:
            stop += len(clip.shown(chunk)) * clip.temporal_stride
        rows.append([first, stop])
    return rows


def lines(plan: Plan, config: RunConfig) -> list[str]:
    """Say the plan in a few lines."""
    run, clip = config.runtime_config, plan.clip
    asked, made = run.num_frames, clip.num_frames_out
    rounded = "" if asked == made else f" ({asked} asked, {made} made: whole chunks)"
    given = f", {clip.num_prefix} latents given" if clip.num_prefix else ""
    reach = "all chunks" if not run.noise2clean_kvrange else f"{list(run.noise2clean_kvrange)}"
    place = " (in the CPU's memory)" if config.engine_config.kv_offload else ""
    return [
        f"video        {made} frames of {run.video_size_w}x{run.video_size_h} at {run.fps} fps"
        f"{rounded}, seed {run.seed}",
        f"chunks       {len(clip.generated)} of {run.chunk_width} latents{given}; "
        f"{run.window_size} at once, each sees {reach}",
        f"ticks        {plan.num_ticks} of {run.num_steps} steps per chunk, guidance passes "
        f"{plan.num_passes}",
        f"tokens       {plan.frame_tokens} per latent frame, "
        f"{plan.frame_tokens * run.chunk_width} per chunk, text {plan.text_tokens}",
        f"compute      {plan.flops / 1e15:.4g} PFLOPs if every step is computed",
        f"weights      {gigabytes(plan.weight_bytes)} (transformer)",
        f"KV cache     {gigabytes(plan.kv_bytes)}, {plan.kv_chunks} chunks per layer and branch"
        f"{place}",
        f"KV scoring   {gigabytes(plan.scoring_bytes)} extra while compressing",
        f"stored       {gigabytes(plan.stored_bytes)} of results and signals for reuse",
        f"activations  {gigabytes(plan.activation_bytes)} (estimate, one forward)",
    ]
