"""What a MAGI-1 run does, derived once from its settings: chunks, ticks, FLOPs, bytes."""

from dataclasses import replace
from functools import cache

import torch

from flowcache.attention import AttentionShape
from flowcache.compress import TokenLayout, scoring_queries, strategy_of
from flowcache.policies import ReusePolicy, guidance_of, stored_results
from flowcache.quantization import format_of
from flowcache.runtime import memory
from flowcache.runtime.cli import choose_dtype
from flowcache.runtime.config import check_pass, check_work
from flowcache.runtime.memory import META
from flowcache.runtime.model import SegmentWork, Work
from flowcache.runtime.plan import (
    Limit,
    Pass,
    check_compression,
    held_bytes,
    walk,
)
from flowcache.runtime.profile import policy_maker
from flowcache.schedule import Tick
from magi1.config import PIXELS_PER_LATENT, PIXELS_PER_TOKEN, ModelConfig, RunConfig
from magi1.dit import DiT, block_flops, context_flops, embed_flops, head_flops, set_precision
from magi1.sampling import ALL_BRANCHES, GUIDANCE, KVBudget, Sampling, cache_chunks
from magi1.schedule import Clip
from magi1.text import NULL_TOKENS
from magi1.vae import Tiling


def clip_of(config: RunConfig, *, num_prefix: int) -> Clip:
    """Cut the video into chunks.

    Args:
        num_prefix: given latents.
    """
    run = config.runtime_config
    clip = Clip(
        run.num_frames,
        num_prefix=num_prefix,
        is_image=config.image is not None,
        chunk_width=run.chunk_width,
        temporal_stride=run.temporal_downsample_factor,
    )
    check_work(num_chunks=clip.num_chunks, num_steps=run.num_steps)
    return clip


def loop_of(config: RunConfig) -> Sampling:
    """Return the settings of the denoising loop."""
    sampling = Sampling.of(config)
    guidance = sampling.guidance
    return replace(
        sampling,
        guidance=guidance and replace(guidance, text_scales=config.text_scales),
        clean_pass=config.passes.clean_pass,
        nearly_clean_pass=config.passes.nearly_clean_pass,
        prev_share=config.passes.prev_share,
        quantity=config.reuse.predict,
        budget=budget_of(config),
        kv_format=format_of(config.kv, head_width=config.model_config.kv_channels),
    )


def policy_of(config: RunConfig) -> ReusePolicy:
    """Return a new reuse policy; a clip has one for all its guidance passes."""
    return policy_maker(config.reuse)()


def layout_of(config: RunConfig) -> TokenLayout:
    """Return the DiT tokens of a latent frame and of a chunk."""
    run = config.runtime_config
    per_frame = (run.video_size_h // PIXELS_PER_TOKEN) * (run.video_size_w // PIXELS_PER_TOKEN)
    return TokenLayout(frame_tokens=per_frame, chunk_tokens=per_frame * run.chunk_width)


def budget_of(config: RunConfig) -> KVBudget | None:
    """Return the bound of the KV cache and the rule that picks what stays, or None."""
    strategy = strategy_of(config.kv)
    if strategy is None:
        return None
    return KVBudget(config.kv.total_chunks, strategy, layout_of(config))


def tiling_of(config: RunConfig) -> Tiling:
    """Return the tiles in which the VAE works."""
    return Tiling.of_rate(config.runtime_config.fps)


def latent_size(config: RunConfig) -> tuple[int, int]:
    """Return the rows and columns of a latent."""
    run = config.runtime_config
    return run.video_size_h // PIXELS_PER_LATENT, run.video_size_w // PIXELS_PER_LATENT


def dtype_of(config: RunConfig, device: torch.device) -> torch.dtype:
    """Return the type of the weights inside the blocks.

    `auto` is the JSON's `params_dtype` on CUDA, float32 on the CPU; 8-bit checkpoints work in
    bfloat16 everywhere.
    """
    if config.engine_config.fp8_quant:
        return torch.bfloat16
    if config.dtype == "auto" and device.type == "cuda":
        return config.model_config.dtype
    return choose_dtype(config.dtype, device)


# What a run costs ---------------------------------------------------------------------------------


def clip_work(
    config: RunConfig,
    *,
    num_prefix: int,
    prompt_tokens: int,
    has_special_tokens: bool,
    dtype: torch.dtype,
) -> Work:
    """Work out what a run does if every step is computed.

    Args:
        num_prefix: given latents.
        prompt_tokens: T5 tokens of the prompt.
        has_special_tokens: whether learned tokens go before them.
        dtype: type of the weights inside the blocks.
    """
    model = replace(config.model_config, params_dtype=str(dtype))
    dit = _empty_dit(config, dtype)
    sampling, layout = loop_of(config), layout_of(config)
    budget, chunk_tokens, width = sampling.budget, layout.chunk_tokens, dtype.itemsize
    check_pass(chunk_tokens, sizes="video_size_h, video_size_w or chunk_width")
    special = len(config.tokens.names()) + config.tokens.duration if has_special_tokens else 0
    text_tokens = min(prompt_tokens + special, model.caption_max_length)
    num_caches = 1 if sampling.guidance is None else 2
    clip = clip_of(config, num_prefix=num_prefix)
    total_chunks = None if budget is None else budget.total_chunks
    segment = SegmentWork(
        ticks=sampling.clock.ticks(clip),
        tokens=dict.fromkeys(range(clip.num_chunks), chunk_tokens),
        given=range(clip.num_given),
        frames=clip.shown_frames(),
        kv_tokens=cache_chunks(clip, total_chunks=total_chunks) * chunk_tokens,
        cut=clip,
    )
    if budget is not None:
        check_compression(budget.strategy, segment, layout=layout, limit=_limit(budget))
    reaches, kv_chunks = sampling.clock.reaches, segment.kv_tokens
    seen = min(max(reaches) * chunk_tokens, kv_chunks) if reaches else kv_chunks
    attention = AttentionShape(
        num_queries=chunk_tokens,
        num_keys=seen,
        num_heads=model.num_attention_heads,
        kv_heads=model.num_query_groups,
        head_width=model.kv_channels,
    )
    return Work(
        segments=(segment,),
        branches=(ALL_BRANCHES, GUIDANCE) if guidance_of(config.reuse).is_on else (ALL_BRANCHES,),
        passes=sampling.passes,
        is_whole=False,
        num_caches=num_caches,
        frame_tokens=layout.frame_tokens,
        divided_tokens=chunk_tokens,
        pass_tokens=chunk_tokens,
        text_tokens=text_tokens,
        attention=attention,
        **_cost(model, sampling, segment, text_tokens=text_tokens, num_caches=num_caches),
        weight_bytes=memory.weight_bytes(dit),
        block_bytes=[memory.weight_bytes(layer) for layer in dit.videodit_blocks.layers],
        stored_bytes=_stored_bytes(
            config, chunk_tokens * model.hidden_size * width, num_chunks=clip.num_chunks
        ),
        loop=sampling,
        **held_bytes(
            [segment],
            attention,
            num_layers=model.num_layers,
            num_caches=num_caches,
            ffn_width=model.ffn_hidden_size,
            pass_tokens=chunk_tokens,
            num_queries=0 if budget is None else scoring_queries(budget.strategy, budget.layout),
            keeps_queries=True,
            itemsize=width,
            kv=config.kv,
            waits=True,
        ),
    )


def _limit(budget: KVBudget | None) -> Limit:
    """Return how many clean tokens stay where a chunk enters: the budget less the active ones."""

    def limit(tick: Tick | None) -> int | None:
        if budget is None or tick is None or not tick.entering:
            return None
        return (budget.total_chunks - len(tick.steps)) * budget.layout.chunk_tokens

    return limit


def _cost(
    model: ModelConfig,
    sampling: Sampling,
    segment: SegmentWork,
    *,
    text_tokens: int,
    num_caches: int,
) -> dict[str, int]:
    """Return `flops`, `num_passes` and `read_tokens` of a clip, as `Work` has them.

    Each pass sees as many chunks as its reach allows.
    """
    clock, guidance, tokens = sampling.clock, sampling.guidance, segment.tokens[0]
    null_text = min(NULL_TOKENS, model.caption_max_length)
    times = clock.timesteps().tolist()

    @cache  # the passes of a long video are alike
    def layers(keys: int, words: int) -> int:
        cost = embed_flops(model, tokens=tokens, is_distilled=sampling.is_distilled)
        return cost + block_flops(model, queries=tokens, keys=keys, text=words)

    def step(own: Pass, number: int) -> list[tuple[int, int]]:
        """Return the keys and words that each guidance pass of a step sees."""
        keys = _seen(own, clock.reach(number), tokens)
        made = [(keys, text_tokens)]
        if guidance is None:
            may_be_twice = sampling.nearly_clean_pass and own.is_oldest
            twice = may_be_twice and clock.is_nearly_clean(number)
            return [*made, (tokens, text_tokens)] if twice else made
        made.append((keys, null_text))
        return [*made, (tokens, null_text)] if sampling.has_pass_alone(times[number]) else made

    head = head_flops(model, queries=tokens)
    flops, seen, num_texts = context_flops(model, text=null_text), list[int](), 1
    passes = walk(
        segment,
        limit=_limit(sampling.budget),
        clean_pass=sampling.clean_pass,
        settles_at_once=False,
    )
    for own in (own for group in passes for own in group):
        if own.step is not None:
            made = step(own, own.step)
            flops += len(made) * head
            if own.step == 0:
                flops += context_flops(model, text=text_tokens)
                num_texts += 1
        elif own.is_given:
            made = [(_seen(own, clock.reach_given(), tokens), null_text)]
        else:
            made = [(_seen(own, clock.reach_clean(), tokens), null_text)] * num_caches
        flops += sum(layers(*pair) for pair in made)
        seen += [keys for keys, _ in made]
    # the words of a text go through all layers, too, each as one projection
    return {"flops": flops, "num_passes": num_texts + len(seen), "read_tokens": sum(seen)}


def _seen(own: Pass, reach: int | None, chunk_tokens: int) -> int:
    """Return the tokens that a pass attends to."""
    return own.keys if reach is None else min(own.keys, reach * chunk_tokens)


def _empty_dit(config: RunConfig, dtype: torch.dtype) -> DiT:
    """Return a transformer without values, whose weights have their types."""
    with META:
        dit = DiT(config.model_config, is_fp8=config.engine_config.fp8_quant)
    set_precision(dit, dtype)
    return dit


def _stored_bytes(config: RunConfig, signals: int, *, num_chunks: int) -> int:
    """Return the bytes of stored results and signals, all chunks of the window active.

    Results are stored whether a policy will ask for them or not.

    Args:
        signals: bytes of what is compared of a chunk.
    """
    model, run = config.model_config, config.runtime_config
    height, width = latent_size(config)
    latents = model.latent_channels * run.chunk_width * height * width * 4
    signals *= config.reuse.kind.needs_signals
    num_active = min(run.window_size, num_chunks)
    return num_active * (stored_results(config.reuse) * latents + signals)
