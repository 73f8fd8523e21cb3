"""What a SkyReels-V2 run does, derived from its settings: objects, ticks, FLOPs, memory.

Axes: B batch, C latent channels, F latent frames, T pixel frames, H/W pixels, L prompt tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowcache.attention import AttentionShape
from flowcache.compress import LAST_QUERY_TOKENS, TokenLayout, strategy_of
from flowcache.errors import UserError
from flowcache.kv import Compression, cached_attention, caches_for, peak_tokens
from flowcache.policies import Rescale, ReusePolicy, identity, polynomial, stored_results
from flowcache.runtime import memory, profile
from flowcache.runtime.memory import (
    META,
    PIXEL_BYTES,
    Footprint,
    Part,
    Residence,
    Stage,
    scratch_bytes,
    text_scratch_bytes,
)
from flowcache.runtime.model import SegmentWork, Work
from flowcache.runtime.parallel import Layout, TokenSplit
from flowcache.runtime.plan import (
    TOKEN_COPIES,
    Pass,
    check_compression,
    cost_lines,
    most_active,
    scored_bytes,
    walk,
)
from flowcache.runtime.profile import Setting
from flowcache.runtime.settings import check_pass, check_work
from flowcache.schedule import Tick
from flowcache.wan import text, vae
from flowcache.wan.dit import (
    IMAGE_TOKENS,
    PATCH,
    DiT,
    DiTConfig,
    Embedded,
    blocks_flops,
    context_flops,
    embed_flops,
    head_flops,
    join_contexts,
    whole_window,
)
from flowcache.wan.quantize import weight_bytes
from skyreels_v2.calibration import COEFFICIENTS, coefficients_for
from skyreels_v2.checkpoint import Checkpoint
from skyreels_v2.config import RunConfig
from skyreels_v2.sampler import WHOLE_WINDOW, Sampling
from skyreels_v2.window import (
    Segment,
    Window,
    cut_segments,
    cut_window,
    describe,
    latent_frames,
    pixel_frames,
)

LATENT_COPIES = 9
"""Float32 arrays of a window's size: noise, latents, the tick's copy, the solver's two velocities
and last sample, the velocities of two branches and their guided sum."""
SIZE_REMEDY = "lower height and width"
TEXT_REMEDY = "set text_on_host=true"
VAE_STRIDE = 8
"""Pixels per latent, in both directions."""


def segments_of(config: RunConfig) -> list[Segment]:
    """Cut the run into segments.

    Raises:
        UserError: frames, windows and overlap don't fit each other, or the video is too long.
    """
    window = latent_frames(min(config.num_frames, config.base_num_frames))
    step = max(window - latent_frames(config.overlap_history or 1), 1)
    num_segments = -(-latent_frames(config.num_frames) // step)
    num_chunks = num_segments * -(-window // config.causal_block_size)
    check_work(num_chunks=num_chunks, num_steps=config.num_steps)
    return cut_segments(
        config.num_frames,
        base=config.base_num_frames,
        overlap=config.overlap_history,
        continues_video=config.video is not None,
    )


def window_of(config: RunConfig, segment: Segment, *, is_last: bool, is_i2v: bool) -> Window:
    """Cut one segment into chunks, given frames included."""
    num_prefix = latent_frames(segment.prefix_pixels) if segment.prefix_pixels else 0
    if segment.index == 0 and config.image is not None and not is_i2v:
        num_prefix = 1
    return cut_window(
        segment.num_frames,
        chunk_frames=config.causal_block_size,
        num_prefix=num_prefix,
        has_end=config.end_image is not None and is_last,
    )


def sampling_of(config: RunConfig) -> Sampling:
    """Return the settings of the denoising loop."""
    return Sampling(
        num_steps=config.num_steps,
        shift=config.shift,
        guidance=config.guidance,
        lag=config.ar_step,
        attention=config.attention,
        clean_pass=config.clean_pass,
        fps=config.fps,
        addnoise=config.addnoise_condition,
        signal=config.reuse.signal,
        quantity=config.reuse.predict,
        batch_branches=batches_branches(config),
        together_tokens=config.together_tokens,
    )


def batches_branches(config: RunConfig) -> bool:
    """Tell whether the guidance branches are computed in one batch."""
    if config.batch_branches is not None:
        return config.batch_branches
    is_full = config.attention == "full"
    frames = latent_frames(config.base_num_frames) if is_full else config.causal_block_size
    tokens = len(branches_of(config)) * frames * tokens_per_frame(config)
    return tokens <= config.together_tokens


def setting_of(config: RunConfig) -> Setting:
    """Return what a profile must fit."""
    return Setting(
        num_steps=config.num_steps,
        shift=config.shift,
        lag=config.ar_step,
        guidance=[config.guidance] if len(branches_of(config)) > 1 else [],
    )


def branches_of(config: RunConfig) -> tuple[str, ...]:
    """Return the guidance passes by name."""
    return ("cond", "uncond") if config.guidance > 1 else ("cond",)


def rescale_for(config: RunConfig, dit: DiTConfig) -> tuple[str, Rescale]:
    """Return the name and the function that turn a distance into what is accumulated.

    Raises:
        UserError: no coefficients are known for this model, or the name is unknown.
    """
    name = config.reuse.rescale
    if name == "none" or (name == "auto" and config.reuse.signal == "content"):
        return "none", identity
    if name == "auto":
        found = coefficients_for(
            dit, signal=config.reuse.signal, height=config.height, width=config.width
        )
        if found is None:
            raise UserError(
                f"reuse.policy={config.reuse.policy} has no calibrated coefficients for a model of "
                f"width {dit.dim}: set reuse.rescale=none, or to one of {', '.join(COEFFICIENTS)}"
            )
        name = found
    if name not in COEFFICIENTS:
        raise UserError(
            f"reuse.rescale={name} is unknown: use auto, none, or one of {', '.join(COEFFICIENTS)}"
        )
    return name, polynomial(COEFFICIENTS[name])


def policy_maker(config: RunConfig, dit: DiTConfig) -> Callable[[], ReusePolicy]:
    """Return what makes the reuse policy of one branch of one window."""
    if not config.reuse.kind.takes("rescale"):
        return profile.policy_maker(config.reuse)
    _, rescale = rescale_for(config, dit)
    return profile.policy_maker(config.reuse, rescale=rescale)


def compression_of(config: RunConfig, *, frame_tokens: int) -> Compression | None:
    """Return the KV budget in tokens and the rule that picks what stays, or None.

    Raises:
        UserError: the budget is below what the rule needs.
    """
    strategy = strategy_of(config.kv)
    if strategy is None:
        return None
    layout = token_layout(config, frame_tokens=frame_tokens)
    budget = budget_of(config, layout)
    return Compression(budget, partial(strategy.keep, budget=budget, layout=layout))


def token_layout(config: RunConfig, *, frame_tokens: int) -> TokenLayout:
    """Return how tokens group into frames and chunks."""
    return TokenLayout(
        frame_tokens=frame_tokens, chunk_tokens=frame_tokens * config.causal_block_size
    )


def budget_of(config: RunConfig, layout: TokenLayout) -> int:
    """Return how many clean tokens a compressed KV cache keeps."""
    return int(config.kv.budget_chunks * layout.chunk_tokens)


def tokens_per_frame(config: RunConfig) -> int:
    """Return the DiT tokens of one latent frame.

    Raises:
        UserError: the resolution is not a multiple of what VAE and patches need.
    """
    multiple = VAE_STRIDE * PATCH[1]
    for name, value in (("height", config.height), ("width", config.width)):
        if value < multiple or value % multiple:
            below = max(value // multiple, 1) * multiple
            raise UserError(
                f"{name} must be a multiple of {multiple} pixels, not {value}; use {below} or "
                f"{below + multiple}"
            )
    return (config.height // multiple) * (config.width // multiple)


# What a run costs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """What the denoising loop takes of the settings."""

    sampling: Sampling
    frame_tokens: int
    compression: Compression | None
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, config: RunConfig) -> "Loop":
        """Derive it from the settings.

        Raises:
            UserError: frames, chunks or resolution don't fit each other.
        """
        frame_tokens = tokens_per_frame(config)
        return cls(
            sampling_of(config),
            frame_tokens,
            compression_of(config, frame_tokens=frame_tokens),
            tuple(segments_of(config)),
        )

    def limit(self, _: Tick | None = None) -> int | None:
        """Return how many clean tokens stay, in every tick as many; None: all."""
        return None if self.compression is None else self.compression.budget


def work_of(config: RunConfig, sizes: DiTConfig, *, dtype: torch.dtype) -> Work:
    """Work out what a run does if every step is computed.

    Args:
        sizes: of the transformer.
        dtype: of its weights.
    """
    loop, passes = Loop.of(config), branches_of(config)
    per_frame, num_branches = loop.frame_tokens, len(passes)
    is_whole, width = config.attention == "full", dtype.itemsize
    frames = max(segment.num_frames for segment in loop.segments)
    frames = frames if is_whole else min(frames, config.causal_block_size)
    check_pass(frames * per_frame, sizes="height, width, base_num_frames or causal_block_size")
    segments, first = list[SegmentWork](), 0
    for segment in loop.segments:
        segments.append(_segment_work(config, sizes, loop, segment, first=first))
        first += segment.new_pixels
    largest = max(segments, key=lambda part: part.cut.num_frames)
    window_tokens, queries = largest.cut.num_frames * per_frame, max(largest.tokens.values())
    kv_tokens = max(part.kv_tokens for part in segments)
    queries = window_tokens if is_whole else queries
    heads = sizes.num_heads
    attention = AttentionShape(
        queries, queries if is_whole else kv_tokens, heads, heads, sizes.head_width
    )
    pass_tokens = queries
    if not is_whole:
        active = max(most_active(part.ticks, part.tokens) for part in segments)
        pass_tokens = max(queries, min(config.together_tokens, active))
    with META:
        weights = weight_bytes(DiT(sizes), config.quantize, dtype=dtype)
    together = num_branches if loop.sampling.batch_branches else 1
    scored = 0  # only scoring by importance needs queries
    if config.kv.compress == "importance":
        seen = {"token": LAST_QUERY_TOKENS, "frame": per_frame, "chunk": queries}
        scored = min(seen[config.kv.queries], queries)
    # results are stored whether a policy will ask for them or not
    stored = stored_results(config.reuse) * num_branches * window_tokens
    if loop.sampling.level == "tokens":
        stored *= sizes.dim * width
    else:
        stored *= PATCH[1] * PATCH[2] * sizes.out_dim * 4
    flops = context_flops(sizes) * num_branches
    flops += sum(_flops(sizes, loop, part, num_branches=num_branches) for part in segments)
    return Work(
        segments=tuple(segments),
        branches=passes,
        passes=passes,
        is_whole=is_whole,
        num_caches=num_branches,
        frame_tokens=per_frame,
        divided_tokens=per_frame,
        pass_tokens=pass_tokens,
        text_tokens=sizes.text_len,
        attention=attention,
        flops=flops,
        weight_bytes=weights,
        kv_bytes=2 * kv_tokens * sizes.dim * sizes.num_layers * num_branches * width,
        scoring_bytes=scored_bytes(replace(attention, num_keys=kv_tokens), num_queries=scored),
        query_bytes=0,
        stored_bytes=stored,
        activation_bytes=together
        * pass_tokens
        * (TOKEN_COPIES * 4 * sizes.dim + 2 * width * sizes.ffn_dim),
        loop=loop,
    )


def _segment_work(
    config: RunConfig, sizes: DiTConfig, loop: Loop, segment: Segment, *, first: int
) -> SegmentWork:
    """Return the ticks and chunks of a segment, whose new frames begin at `first`."""
    is_last = segment.index == len(loop.segments) - 1
    window = window_of(config, segment, is_last=is_last, is_i2v=sizes.model_type == "i2v")
    ticks, kv_tokens = loop.sampling.ticks(window), 0
    tokens = {number: len(chunk) * loop.frame_tokens for number, chunk in enumerate(window.chunks)}
    if config.attention == "causal":
        kv_tokens = peak_tokens(
            ticks,
            chunk_tokens={chunk: tokens[chunk] for chunk in window.generated},
            given=sum(tokens[chunk] for chunk in range(window.num_given)),
            budget=loop.limit(),
        )

    def place(latent: int) -> int:
        shown = (pixel_frames(latent) if latent else 0) - segment.prefix_pixels
        return first + min(max(shown, 0), segment.new_pixels)

    made = SegmentWork(
        ticks=ticks,
        tokens=tokens,
        given=range(window.num_given),
        frames=[[place(chunk.start), place(chunk.stop)] for chunk in window.chunks],
        kv_tokens=kv_tokens,
        cut=window,
    )
    strategy = strategy_of(config.kv)
    if strategy is not None:
        layout = token_layout(config, frame_tokens=loop.frame_tokens)
        check_compression(strategy, made, layout=layout, limit=loop.limit)
    return made


def _flops(sizes: DiTConfig, loop: Loop, segment: SegmentWork, *, num_branches: int) -> int:
    """Return the FLOPs of a segment: embeddings once, blocks and head in every branch."""
    if loop.sampling.attention == "full":
        tokens = segment.cut.num_frames * loop.frame_tokens
        groups = [[Pass(WHOLE_WINDOW, tick.index, tokens, tokens)] for tick in segment.ticks]
    else:
        clean_pass = loop.sampling.clean_pass
        groups = walk(segment, limit=loop.limit, clean_pass=clean_pass, settles_at_once=True)
    total = 0
    for group in groups:
        num_frames = sum(own.tokens for own in group) // loop.frame_tokens
        total += embed_flops(sizes, num_frames=num_frames, frame_tokens=loop.frame_tokens)
        for own in group:
            cost = blocks_flops(sizes, queries=own.tokens, keys=own.keys)
            cost += 0 if own.step is None else head_flops(sizes, queries=own.tokens)
            total += num_branches * cost
    return total


def lines_of(config: RunConfig, work: Work) -> list[str]:
    """Describe the video and what it costs."""
    windows = ", ".join(describe(part.cut) for part in work.segments)
    in_first = work.segments[0].cut.num_frames * work.frame_tokens
    ticks = sum(
        len(part.ticks) if work.is_whole else sum(len(tick.steps) for tick in part.ticks)
        for part in work.segments
    )
    num_branches = len(work.branches)
    kv_tokens = max(part.kv_tokens for part in work.segments)
    return [
        f"video        {config.num_frames} frames of {config.width}x{config.height} at "
        f"{config.fps} fps, seed {config.seed}",
        f"segments     {len(work.segments)}: {windows}",
        f"ticks        {work.num_ticks} of {config.num_steps} steps per chunk, "
        f"{config.attention} attention, lag {config.ar_step}, {num_branches} branches",
        f"tokens       {work.frame_tokens} per latent frame, {in_first} in the first window",
        f"forwards     {ticks * num_branches}, "
        f"{work.flops / 1e15:.4g} PFLOPs if every step is computed",
        *cost_lines(work, cache=f"{kv_tokens} tokens per layer and branch", stored="results"),
    ]


# What a run keeps in memory -----------------------------------------------------------------------


@dataclass(frozen=True)
class Networks:
    """The other networks of a run: empty, on the meta device."""

    text: Any
    vae: vae.VAE
    vision_bytes: int = 0
    """Weights of the image encoder."""

    @classmethod
    def of(cls, files: Checkpoint | None, sizes: DiTConfig, *, dtype: torch.dtype) -> "Networks":
        """Build those of a checkpoint; None: those that all released models share."""
        if files is None:
            vision = text.RELEASED_VISION_WEIGHTS if sizes.model_type == "i2v" else 0
            return cls(text.released_encoder(), vae.released(), vision * dtype.itemsize)
        part = files.image_encoder
        vision = 0 if part is None else text.vision_weights(part) * dtype.itemsize
        return cls(text.empty_encoder(files.text_encoder), vae.empty(files.vae), vision)


class RunMemory(Footprint):
    """Counts what a SkyReels-V2 run needs; the VAE is float32, all else in the run's type."""

    def __init__(
        self,
        config: RunConfig,
        sizes: DiTConfig,
        work: Work,
        *,
        networks: Networks,
        dtype: torch.dtype,
        layout: Layout | None = None,
        overlaps: bool = False,
    ) -> None:
        super().__init__(config, work, dtype=dtype, layout=layout or Layout(), overlaps=overlaps)
        self.sizes, self.networks = sizes, networks
        self.largest: Window = max(
            (part.cut for part in work.segments), key=lambda window: window.num_frames
        )
        self.vae_bytes = memory.weight_bytes(networks.vae.model)
        self.text_bytes = sum(p.numel() for p in networks.text.parameters()) * dtype.itemsize
        self.text_scratch = text_scratch_bytes(
            networks.text, batch=len(work.branches), num_tokens=sizes.text_len, dtype=dtype
        )
        self.dit_scratch = self._dit_scratch()
        self.decode_scratch, self.decoder_state = self._decoding()
        self.encode_scratch = self._encoding()

    def stages(self, residence: Residence) -> list[Stage]:
        """Return the stages of the run, given what is kept on the host."""
        is_text_here, is_dit_here = not residence.text_on_host, not residence.dit_aside
        vae_part, latents = Part("the VAE", self.vae_bytes, "use a larger GPU"), self._latents()
        kept = [self._prompts(), self._kv(residence), self._stored(), latents]
        made = [
            Stage(
                "text",
                (
                    Part("the text encoder", self.text_bytes * is_text_here, TEXT_REMEDY),
                    Part("the image encoder", self.networks.vision_bytes, "use a smaller dtype"),
                    Part("text activations", self.text_scratch * is_text_here, TEXT_REMEDY),
                ),
            )
        ]
        if self.encode_scratch:
            scratch = Part("VAE activations", self.encode_scratch, SIZE_REMEDY)
            parts = (self._dit(is_dit_here), self._prompts(), vae_part, scratch, latents)
            made.append(Stage("encode", parts))
        decoding = Part("VAE state", self.decoder_state, SIZE_REMEDY)
        if self.overlaps and is_dit_here:
            decoding = Part("VAE activations", self.decode_scratch, "set overlap=false")
        denoise = (
            *(self._dit(True), *kept),
            Part("activations", self._activations(), "lower causal_block_size, or the size"),
            self.scoring_part(residence, num_layers=self.sizes.num_layers),
            *(vae_part, decoding),
        )
        scratch = Part("VAE activations", self.decode_scratch, SIZE_REMEDY)
        decode = (self._dit(is_dit_here), *kept, vae_part, scratch)
        return [*made, Stage("denoise", denoise), Stage("decode", decode)]

    def _dit(self, is_here: bool) -> Part:
        size = self.work.weight_bytes * is_here
        return Part("the transformer", size, "use a smaller model or dtype")

    def _prompts(self) -> Part:
        """Return the keys and values of the prompts in all layers, and of the start image."""
        sizes = self.sizes
        tokens = sizes.text_len + (IMAGE_TOKENS if sizes.model_type == "i2v" else 0)
        one = 2 * tokens * sizes.dim * sizes.num_layers * self.dtype.itemsize
        copies = 2 if self.work.loop.sampling.batch_branches and self.num_own > 1 else 1
        return Part("prompts", copies * self.num_own * one, "use a smaller model")

    def _kv(self, residence: Residence) -> Part:
        remedy = "set kv.compress=importance, or fewer num_frames"
        return self.kv_part(residence, num_layers=self.sizes.num_layers, remedy=remedy)

    def _stored(self) -> Part:
        own = self.work.stored_bytes * self.num_own // self.work.num_caches
        return Part("stored results", own, "set reuse.predict=velocity")

    def _latents(self) -> Part:
        pixels, num_frames = self.config.height * self.config.width, self.largest.num_frames
        latents = LATENT_COPIES * 4 * self.sizes.out_dim * num_frames * pixels // VAE_STRIDE**2
        rope = self.work.frame_tokens * num_frames * self.sizes.head_width * 4
        shown = (self.config.overlap_history or 0) * pixels * PIXEL_BYTES
        return Part("latents", latents + rope + shown, "lower num_frames")

    def _activations(self) -> int:
        """Return what a tick holds: all embedded tokens, their modulation, one forward."""
        num_frames, dim = self.largest.num_frames, self.sizes.dim
        embedded = num_frames * self.work.frame_tokens * dim * self.dtype.itemsize
        return embedded + 4 * 7 * dim * num_frames + self.dit_scratch

    def _latent(self, num_frames: int) -> Tensor:
        height, width = self.config.height // VAE_STRIDE, self.config.width // VAE_STRIDE
        return torch.empty(1, self.sizes.out_dim, num_frames, height, width, device=META)

    def _decoding(self) -> tuple[int, int]:
        """Return what the decoder holds at most, and between two chunks.

        One of several processes has a strip of the picture.
        """
        decoder = self.networks.vae.stream(self.ranks)

        def decode() -> None:
            for num_frames in (1, 2):  # from the third latent on every latent costs the same
                decoder.decode(self._latent(num_frames))

        peak, state = scratch_bytes(decode), decoder.state_bytes()
        # the frames of all chunks that become clean together
        part = next(part for part in self.work.segments if part.cut is self.largest)
        latents = max(
            sum(len(self.largest.chunks[chunk]) for chunk in tick.finishing) for tick in part.ticks
        )
        pixels = self.config.height * self.config.width * PIXEL_BYTES
        shown = vae.TEMPORAL_STRIDE * latents * pixels
        return peak + shown, state + shown

    def _encoding(self) -> int:
        """Return what the encoder holds at most, 0 if nothing is encoded."""
        config = self.config
        frames = [1] if config.image is not None or config.end_image is not None else []
        if self.sizes.model_type == "i2v" and config.image is not None:
            frames.append(pixel_frames(self.largest.num_frames))
        if config.video is not None or len(self.work.segments) > 1:
            frames.append(config.overlap_history or 1)
        if not frames:
            return 0
        shape = (1, 3, max(frames), config.height, config.width)
        return scratch_bytes(lambda: self.networks.vae.encode(torch.empty(shape, device=META)))

    def _dit_scratch(self) -> int:
        """Return what one forward holds in addition to weights and caches: one layer is as all."""
        config, sizes, ranks = self.config, self.sizes, self.ranks
        batch = self.num_own if self.work.loop.sampling.batch_branches else 1
        frames = self.work.pass_tokens // self.work.frame_tokens
        with META:
            model = DiT(replace(sizes, num_layers=1)).to(self.dtype)
        tokens = frames * self.work.frame_tokens
        caches = [
            caches_for(
                1,
                capacity=tokens,
                num_heads=sizes.num_heads // ranks.sequence.size,
                head_width=sizes.head_width,
                dtype=self.dtype,
                device=META,
            )
            for _ in range(batch)
        ]
        attend = whole_window(model.kernel)
        if not self.work.is_whole:
            attend = cached_attention(caches, active=[range(tokens)], kernel=model.kernel)
        image = None
        if sizes.model_type == "i2v":
            image = torch.empty(1, IMAGE_TOKENS, sizes.image_dim or 0, device=META)
        prompt = torch.empty(1, sizes.text_len, sizes.text_dim, device=META)
        contexts = join_contexts([model.encode_context(prompt, image)] * batch)
        rope = torch.empty(tokens, sizes.head_width // 2, 2, device=META)
        split = TokenSplit(ranks.sequence, frames, self.work.frame_tokens)
        size = (config.height // VAE_STRIDE, config.width // VAE_STRIDE)

        def forward() -> object:
            latents = torch.empty(batch, sizes.in_dim, frames, *size, device=META)
            embedded = model.embed(
                latents, torch.empty(batch, frames, device=META), fps=[config.fps] * batch
            )
            own = Embedded(
                split.scatter(embedded.tokens, axis=1), embedded.time, embedded.modulation
            )
            hidden = split.gather(
                model.run_blocks(
                    own, split.scatter(rope, axis=0), contexts, self_attend=split.over_heads(attend)
                )
            )
            velocity = model.velocity(hidden, embedded, latent_height=size[0], latent_width=size[1])
            return velocity, hidden - embedded.tokens

        return scratch_bytes(forward)
