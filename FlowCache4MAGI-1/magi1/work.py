"""What a MAGI-1 run does, derived from its settings: objects, ticks, FLOPs, memory.

Axes: B batch, C latent channels, F latent frames, T pixel frames, H/W pixels, L text tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flowcache.attention import AttentionShape
from flowcache.compress import ImportanceRedundancy, TokenLayout, strategy_of
from flowcache.kv import cached_attention, caches_for
from flowcache.policies import ReusePolicy, guidance_of, stored_results
from flowcache.runtime import memory
from flowcache.runtime.cli import choose_dtype
from flowcache.runtime.memory import (
    META,
    PIXEL_BYTES,
    SCORING_REMEDY,
    Footprint,
    Part,
    Residence,
    Stage,
    scratch_bytes,
    text_scratch_bytes,
)
from flowcache.runtime.model import SegmentWork, Work
from flowcache.runtime.parallel import Layout, Ranks, TokenSplit
from flowcache.runtime.plan import (
    TOKEN_COPIES,
    Limit,
    Pass,
    check_compression,
    cost_lines,
    scored_bytes,
    walk,
)
from flowcache.runtime.profile import Setting, policy_maker
from flowcache.runtime.settings import check_pass, check_work
from flowcache.schedule import Tick
from magi1 import text, vae
from magi1.checkpoint import Checkpoint
from magi1.config import PIXELS_PER_TOKEN, ModelConfig, RunConfig
from magi1.dit import (
    DiT,
    Embedded,
    block_flops,
    context_flops,
    embed_flops,
    head_flops,
    set_precision,
)
from magi1.sampler import ALL_BRANCHES, GUIDANCE, KVBudget, Sampling, cache_bytes, cache_chunks
from magi1.schedule import SHIFT, Clip, Clock
from magi1.text import NULL_TOKENS
from magi1.vae import Tiling, ViTVAE

CHUNK_COPIES = 4
"""Float32 latents of a chunk that its pass or its step needs in addition to the velocities that are
kept: the noisy ones, the pass of the chunk alone, two terms of a sum."""
T5_REMEDY = "set runtime_config.t5_device=cpu"
VAE_STRIDE = 8
"""Pixels per latent, in both directions."""


def clip_of(config: RunConfig, *, num_prefix: int) -> Clip:
    """Cut the video into chunks.

    Args:
        num_prefix: given latents.

    Raises:
        UserError: the video is too short or too long.
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


def sampling_of(config: RunConfig) -> Sampling:
    """Return the settings of the denoising loop."""
    return replace(
        Sampling.of(config),
        clean_pass=config.passes.clean_pass,
        nearly_clean_pass=config.passes.nearly_clean_pass,
        prev_share=config.passes.prev_share,
        quantity=config.reuse.predict,
        budget=budget_of(config),
    )


def setting_of(config: RunConfig) -> Setting:
    """Return what a profile must fit."""
    run, guidance = config.runtime_config, sampling_of(config).guidance
    scales: list[float] = []
    if guidance is not None:
        scales = [*guidance.t_range, *guidance.prev_scales, *guidance.text_scales]
    return Setting(
        num_steps=run.num_steps, shift=SHIFT, lag=Clock.of(config).stage, guidance=scales
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
    return run.video_size_h // VAE_STRIDE, run.video_size_w // VAE_STRIDE


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


def work_of(
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
    sampling, layout = sampling_of(config), layout_of(config)
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
        frames=_shown_frames(clip),
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
    num_queries = _scoring_queries(budget)
    query_bytes = num_queries * num_caches * model.num_layers * model.hidden_size * width
    scratch = scored_bytes(replace(attention, num_keys=segment.kv_tokens), num_queries=num_queries)
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
        flops=_flops(model, sampling, segment, text_tokens=text_tokens, num_caches=num_caches),
        weight_bytes=_weight_bytes(config, dtype),
        kv_bytes=cache_bytes(
            model,
            clip=clip,
            chunk_tokens=chunk_tokens,
            total_chunks=total_chunks,
            num_branches=num_caches,
        ),
        scoring_bytes=query_bytes + scratch,
        query_bytes=query_bytes,
        stored_bytes=_stored_bytes(
            config, chunk_tokens * model.hidden_size * width, num_chunks=clip.num_chunks
        ),
        activation_bytes=chunk_tokens
        * (TOKEN_COPIES * 4 * model.hidden_size + 2 * width * model.ffn_hidden_size),
        loop=sampling,
    )


def _shown_frames(clip: Clip) -> list[list[int]]:
    """Return for each chunk the frames `[first, stop)` of the video that show it."""
    rows, stop = list[list[int]](), 0
    for chunk in range(clip.num_chunks):
        first = stop
        if chunk in clip.generated:
            stop += len(clip.shown(chunk)) * clip.temporal_stride
        rows.append([first, stop])
    return rows


def _limit(budget: KVBudget | None) -> Limit:
    """Return how many clean tokens stay where a chunk enters: the budget less the active ones."""

    def limit(tick: Tick | None) -> int | None:
        if budget is None or tick is None or not tick.entering:
            return None
        return (budget.total_chunks - len(tick.steps)) * budget.layout.chunk_tokens

    return limit


def _flops(
    model: ModelConfig,
    sampling: Sampling,
    segment: SegmentWork,
    *,
    text_tokens: int,
    num_caches: int,
) -> int:
    """Return the FLOPs of a clip: each pass sees as many chunks as its reach allows."""
    clock, guidance, tokens = sampling.clock, sampling.guidance, segment.tokens[0]
    null_text = min(NULL_TOKENS, model.caption_max_length)
    times = clock.timesteps().tolist()

    @cache  # the passes of a long video are alike
    def layers(keys: int, words: int) -> int:
        cost = embed_flops(model, tokens=tokens, is_distilled=sampling.is_distilled)
        return cost + block_flops(model, queries=tokens, keys=keys, text=words)

    def step(own: Pass, number: int) -> int:
        """Return the cost of all guidance passes of a step."""
        head = head_flops(model, queries=tokens)
        keys = _seen(own, clock.reach(number), tokens)
        cost = layers(keys, text_tokens) + head
        cost += context_flops(model, text=text_tokens) if number == 0 else 0
        if guidance is None:
            may_be_twice = sampling.nearly_clean_pass and own.is_oldest
            if may_be_twice and clock.is_nearly_clean(number):
                cost += layers(tokens, text_tokens) + head
            return cost
        has_alone = sampling.has_pass_alone(times[number])
        return (
            cost + layers(keys, null_text) + head + has_alone * (layers(tokens, null_text) + head)
        )

    total = context_flops(model, text=null_text)
    passes = walk(
        segment,
        limit=_limit(sampling.budget),
        clean_pass=sampling.clean_pass,
        settles_at_once=False,
    )
    for own in (own for group in passes for own in group):
        if own.step is not None:
            total += step(own, own.step)
        elif own.is_given:
            total += layers(_seen(own, clock.reach_given(), tokens), null_text)
        else:
            total += num_caches * layers(_seen(own, clock.reach_clean(), tokens), null_text)
    return total


def _seen(own: Pass, reach: int | None, chunk_tokens: int) -> int:
    """Return the tokens that a pass attends to."""
    return own.keys if reach is None else min(own.keys, reach * chunk_tokens)


def _weight_bytes(config: RunConfig, dtype: torch.dtype) -> int:
    with META:
        dit = DiT(config.model_config, is_fp8=config.engine_config.fp8_quant)
    set_precision(dit, dtype)
    return memory.weight_bytes(dit)


def _scoring_queries(budget: KVBudget | None) -> int:
    """Return how many queries score the keys; 0 without scores."""
    if budget is None or not isinstance(budget.strategy, ImportanceRedundancy):
        return 0
    sample = torch.empty(budget.layout.chunk_tokens, 1, 1, device=META)
    return len(budget.strategy.seen_queries(sample, budget.layout))


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


def lines_of(config: RunConfig, work: Work) -> list[str]:
    """Describe the video and what it costs."""
    run, clip = config.runtime_config, work.segments[0].cut
    asked, made = run.num_frames, clip.num_frames_out
    rounded = "" if asked == made else f" ({asked} asked, {made} made: whole chunks)"
    given = f", {clip.num_prefix} latents given" if clip.num_prefix else ""
    reach = "all chunks" if not run.noise2clean_kvrange else f"{list(run.noise2clean_kvrange)}"
    place = " (in the CPU's memory)" if config.engine_config.kv_offload else ""
    kv_chunks = work.segments[0].kv_tokens // work.pass_tokens
    return [
        f"video        {made} frames of {run.video_size_w}x{run.video_size_h} at {run.fps} fps"
        f"{rounded}, seed {run.seed}",
        f"chunks       {len(clip.generated)} of {run.chunk_width} latents{given}; "
        f"{run.window_size} at once, each sees {reach}",
        f"ticks        {work.num_ticks} of {run.num_steps} steps per chunk, guidance passes "
        f"{len(work.passes)}",
        f"tokens       {work.frame_tokens} per latent frame, "
        f"{work.frame_tokens * run.chunk_width} per chunk, text {work.text_tokens}",
        f"compute      {work.flops / 1e15:.4g} PFLOPs if every step is computed",
        *cost_lines(
            work,
            cache=f"{kv_chunks} chunks per layer and branch{place}",
            stored="results and signals",
        ),
    ]


# What a run keeps in memory -----------------------------------------------------------------------


@dataclass(frozen=True)
class Networks:
    """The other networks of a run: empty, on the meta device, in the run's types."""

    text: Any
    vae: vae.VAE

    @classmethod
    def of(cls, files: Checkpoint | None, config: RunConfig, *, dtype: torch.dtype) -> "Networks":
        """Build those of a checkpoint; None: those that all released models share."""
        codec = vae.empty(
            None if files is None else files.vae,
            scale=config.runtime_config.scale_factor,
            tiling=tiling_of(config),
            dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        )
        return cls(text.released() if files is None else text.empty(files.text_encoder), codec)


class TracedVAE(vae.VAE):
    """A VAE that is faster to trace where it decodes many tiles, and holds as much.

    While a tile is decoded, the results of those before it are held. So of the tiles of one shape
    the last one decides; the others only leave their result.
    """

    def _decode_tiles(self, tiles_BCFhw: Sequence[Tensor], *, ranks: Ranks) -> Iterator[Tensor]:
        last = {tile.shape: number for number, tile in enumerate(tiles_BCFhw)}
        for number, tile in enumerate(tiles_BCFhw):
            if last[tile.shape] == number:
                yield self._decode_tile(tile)
                continue
            batch, _, frames, height, width = tile.shape
            stride = self.spatial_stride
            num_frames = frames * self.temporal_stride
            shape = (batch, self.model.config.in_chans, num_frames, height * stride, width * stride)
            pixels = tile.new_empty(shape)
            yield pixels[:, :, :1] if frames == 1 else pixels


class RunMemory(Footprint):
    """Counts what a MAGI-1 run needs; the text encoder is float32."""

    def __init__(
        self,
        config: RunConfig,
        work: Work,
        *,
        networks: Networks,
        dtype: torch.dtype,
        layout: Layout | None = None,
        overlaps: bool = False,
    ) -> None:
        super().__init__(config, work, dtype=dtype, layout=layout or Layout(), overlaps=overlaps)
        self.networks, self.size = networks, latent_size(config)
        self.model: ModelConfig = replace(config.model_config, params_dtype=str(dtype))
        self.clip: Clip = work.segments[0].cut
        self.text_bytes = 4 * sum(p.numel() for p in networks.text.parameters())
        self.vae_bytes = memory.weight_bytes(networks.vae.model)
        self.text_scratch = text_scratch_bytes(
            networks.text, batch=1, num_tokens=max(work.text_tokens, 1), dtype=torch.float32
        )
        self.dit_scratch = self._dit_scratch()
        self.decode_scratch = self._decode_scratch()
        self.encode_scratch = self._encode_scratch() if self.clip.num_prefix else 0

    def stages(self, residence: Residence) -> list[Stage]:
        """Return the stages of the run, given what is kept on the host."""
        is_text_here, is_dit_here = not residence.text_on_host, not residence.dit_aside
        dit, codec = self._dit(is_dit_here), self._vae(is_here=True)
        size_remedy = "lower video_size_h and video_size_w"
        made = [
            Stage(
                "text",
                (
                    Part("the text encoder", self.text_bytes * is_text_here, T5_REMEDY),
                    Part("text activations", self.text_scratch * is_text_here, T5_REMEDY),
                ),
            )
        ]
        if self.encode_scratch:
            scratch = Part("VAE activations", self.encode_scratch, size_remedy)
            made.append(Stage("encode", (dit, codec, scratch)))
        kept = [self._kv(residence), *self._held()]
        decoding = self.decode_scratch * (self.overlaps and is_dit_here)
        denoise = (
            *(self._dit(True), *kept, self._shown(is_held=True)),
            Part("activations", self.dit_scratch, "lower runtime_config.chunk_width"),
            self.scoring_part(residence, num_layers=self.model.num_layers),
            self._vae(is_here=is_dit_here),
            Part("VAE activations", decoding, "set overlap=false"),
        )
        decode = (
            *(dit, *kept),
            Part("kept queries", self.work.query_bytes, SCORING_REMEDY),
            # neighbours that become clean in successive ticks: one is shown, the next decoded
            self._shown(is_held=self.work.loop.clock.stage == 1),
            codec,
            Part("VAE activations", self.decode_scratch, size_remedy),
        )
        return [*made, Stage("denoise", denoise), Stage("decode", decode)]

    def _dit(self, is_here: bool) -> Part:
        return Part("the transformer", self.work.weight_bytes * is_here, "use a smaller model")

    def _vae(self, *, is_here: bool) -> Part:
        return Part("the VAE", self.vae_bytes * is_here, "set offload=true")

    def _kv(self, residence: Residence) -> Part:
        remedy = "set kv.compress=importance and a smaller kv.total_chunks"
        return self.kv_part(residence, num_layers=self.model.num_layers, remedy=remedy)

    def _held(self) -> list[Part]:
        """Return what stays from the first tick to the last, weights and keys aside."""
        clip, model, run = self.clip, self.model, self.config.runtime_config
        head = model.num_query_groups * model.kv_channels
        active = min(run.window_size, len(clip.generated))
        tokens = active * self.work.text_tokens + min(NULL_TOKENS, model.caption_max_length)
        prompts = 2 * tokens * head * model.num_layers * self.dtype.itemsize
        captions = 4 * len(clip.generated) * self.work.text_tokens * model.caption_channels
        latent = 4 * model.latent_channels * self.size[0] * self.size[1]
        # each pass, their guided sum, and the sum of the tick before
        velocities = self.work.num_caches + (self.work.num_caches > 1) + 1
        frames = clip.num_latents + clip.num_prefix
        frames += run.chunk_width * (velocities * active + CHUNK_COPIES)
        return [
            Part("prompts", prompts + captions, "shorten the prompt"),
            Part("stored results", self.work.stored_bytes, "set reuse.extrapolate=0"),
            Part("latents", frames * latent, "lower runtime_config.num_frames"),
        ]

    def _shown(self, *, is_held: bool) -> Part:
        """Return the pixel frames of a chunk, which are held for a tick after it was decoded."""
        run = self.config.runtime_config
        frames = run.chunk_width * run.temporal_downsample_factor
        size = frames * run.video_size_h * run.video_size_w * PIXEL_BYTES
        return Part("a chunk's frames", size * is_held, "lower runtime_config.chunk_width")

    def _dit_scratch(self) -> int:
        """Return what the pass of a chunk holds in addition to weights and caches: a layer is as
        all.

        An 8-bit layer needs more than a plain one, and stands between two of those.
        """
        is_fp8 = self.config.engine_config.fp8_quant
        model = replace(self.model, num_layers=3 if is_fp8 else 1)
        with META:
            dit = DiT(model, is_fp8=is_fp8)
        set_precision(dit, self.dtype)
        width = self.config.runtime_config.chunk_width
        tokens = self.work.pass_tokens
        caches = caches_for(
            model.num_layers,
            capacity=tokens,
            num_heads=self.model.num_query_groups // self.ranks.sequence.size,
            head_width=self.model.kv_channels,
            dtype=self.dtype,
            device=META,
        )
        words = torch.empty(1, max(self.work.text_tokens, 1), self.model.caption_channels)
        context = dit.encode_context(words.to(META))
        attend = cached_attention([caches], active=[range(tokens)], kernel=dit.kernel)
        split = TokenSplit(self.ranks.sequence, 1, tokens)

        def forward() -> Tensor:
            latents = torch.empty(1, self.model.latent_channels, width, *self.size, device=META)
            embedded = dit.embed(latents, torch.empty(1, 1, device=META), is_null=False)
            rope = dit.rope_table(
                first_frame=0,
                num_frames=width,
                latent_height=self.size[0],
                latent_width=self.size[1],
            )
            own = Embedded(split.scatter(embedded.tokens, axis=1), embedded.condition)
            hidden = split.gather(
                dit.run_blocks(
                    own, split.scatter(rope, axis=0), context, self_attend=split.over_heads(attend)
                )
            )
            return dit.velocity(hidden, latent_height=self.size[0], latent_width=self.size[1])

        return scratch_bytes(forward)

    def _decode_scratch(self) -> int:
        """Return what decoding a chunk holds; one of several processes decodes some tiles."""
        frames = self.config.runtime_config.chunk_width
        latents = torch.empty(1, self.model.latent_channels, frames, *self.size, device=META)
        codec = self._one_layer()
        return scratch_bytes(lambda: codec.decode(latents, self.ranks))

    def _encode_scratch(self) -> int:
        """Return what encoding the given frames holds."""
        run, codec = self.config.runtime_config, self._one_layer()
        frames = self.clip.num_prefix * run.temporal_downsample_factor
        frames = 1 if self.clip.is_image else frames
        shape = (1, 3, frames, run.video_size_h, run.video_size_w)
        return scratch_bytes(lambda: codec.encode(torch.empty(shape, device=META)))

    def _one_layer(self) -> vae.VAE:
        """Return the VAE with one layer, which needs as much scratch memory as with all."""
        codec = self.networks.vae
        with META:
            model = ViTVAE(replace(codec.model.config, depth=1)).to(codec.dtype)
        return TracedVAE(model, scale=codec.scale, tiling=codec.tiling)
