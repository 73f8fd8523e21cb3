"""What a SkyReels-V2 run does, derived once from its settings: segments, ticks, FLOPs, bytes."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch

from flowcache.compress import (
    TokenLayout,
    scoring_queries,
    strategy_of,
)
from flowcache.kv import Compression, peak_tokens
from flowcache.runtime.config import check_pass
from flowcache.runtime.memory import PIXEL_BYTES
from flowcache.runtime.model import SegmentWork, Work
from flowcache.runtime.plan import Pass, check_compression, most_active, walk
from flowcache.schedule import Tick
from flowcache.scores import (
    Received,
)
from flowcache.wan.dit import DiTConfig
from flowcache.wan.memory import Held
from flowcache.wan.reuse import WHOLE_WINDOW
from flowcache.wan.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE, latent_frames, pixel_frames
from flowcache.wan.work import result_bytes, tokens_per_frame, wan_work
from skyreels_v2.config import RunConfig
from skyreels_v2.sampler import Sampling
from skyreels_v2.window import Segment, segments_of, window_of


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
    tokens = (
        len(branches_of(config))
        * frames
        * tokens_per_frame(height=config.height, width=config.width)
    )
    return tokens <= config.together_tokens


def branches_of(config: RunConfig) -> tuple[str, ...]:
    """Return the guidance passes by name."""
    return ("cond", "uncond") if config.guidance > 1 else ("cond",)


def compression_of(
    config: RunConfig, *, frame_tokens: int, received: Received | None = None
) -> Compression | None:
    """Return the KV budget in tokens and the rule that picks what stays, or None.

    Args:
        received: how importance is summed, see `flowcache.compress.ImportanceRedundancy`.
    """
    strategy = strategy_of(config.kv, received=received)
    if strategy is None:
        return None
    layout = token_layout(config, frame_tokens=frame_tokens)
    budget = int(config.kv.budget_chunks * layout.chunk_tokens)
    return Compression(budget, partial(strategy.keep, budget=budget, layout=layout))


def token_layout(config: RunConfig, *, frame_tokens: int) -> TokenLayout:
    """Return how tokens group into frames and chunks."""
    return TokenLayout(
        frame_tokens=frame_tokens, chunk_tokens=frame_tokens * config.causal_block_size
    )


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
        """Derive it from the settings."""
        frame_tokens = tokens_per_frame(height=config.height, width=config.width)
        return cls(
            sampling_of(config),
            frame_tokens,
            compression_of(config, frame_tokens=frame_tokens),
            tuple(segments_of(config)),
        )

    def limit(self, _: Tick | None = None) -> int | None:
        """Return how many clean tokens stay, in every tick as many; None: all."""
        return None if self.compression is None else self.compression.budget

    def groups(self, segment: SegmentWork) -> Iterable[list[Pass]]:
        """Return the passes of a segment in one branch; those of a group are embedded together."""
        if self.sampling.attention == "full":
            tokens = segment.cut.num_frames * self.frame_tokens
            return [[Pass(WHOLE_WINDOW, tick.index, tokens, tokens)] for tick in segment.ticks]
        clean_pass = self.sampling.clean_pass
        return walk(segment, limit=self.limit, clean_pass=clean_pass, settles_at_once=True)


def work_of(config: RunConfig, sizes: DiTConfig, *, dtype: torch.dtype) -> Work:
    """Work out what a run does if every step is computed.

    Args:
        sizes: of the transformer.
        dtype: of its weights.
    """
    loop, passes = Loop.of(config), branches_of(config)
    per_frame, num_branches = loop.frame_tokens, len(passes)
    is_whole = config.attention == "full"
    frames = max(segment.num_frames for segment in loop.segments)
    frames = frames if is_whole else min(frames, config.causal_block_size)
    check_pass(frames * per_frame, sizes="height, width, base_num_frames or causal_block_size")
    segments, first = list[SegmentWork](), 0
    for segment in loop.segments:
        segments.append(_segment_work(config, sizes, loop, segment, first=first))
        first += segment.new_pixels
    largest = max(segments, key=lambda part: part.cut.num_frames)
    window_tokens, queries = largest.cut.num_frames * per_frame, max(largest.tokens.values())
    queries = window_tokens if is_whole else queries
    pass_tokens = queries
    if not is_whole:
        active = max(most_active(part.ticks, part.tokens) for part in segments)
        pass_tokens = max(queries, min(config.together_tokens, active))
    layout = token_layout(config, frame_tokens=per_frame)
    scored = min(scoring_queries(strategy_of(config.kv), layout), queries)
    # results are stored whether a policy will ask for them or not
    stored = num_branches * result_bytes(sizes, config.reuse, window_tokens, dtype)
    return wan_work(
        sizes,
        segments,
        chain.from_iterable(map(loop.groups, segments)),
        branches=passes,
        queries=queries,
        pass_tokens=pass_tokens,
        frame_tokens=per_frame,
        dtype=dtype,
        loop=loop,
        kv=config.kv,
        is_whole=is_whole,
        batch=num_branches if loop.sampling.batch_branches else 1,
        num_scored=scored,
        stored_bytes=stored,
        mode=config.quantize,
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


# What it keeps in memory -------------------------------------------------------------------------

LATENT_COPIES = 9
"""Float32 arrays of a window's size: noise, latents, the tick's copy, the solver's two velocities
and last sample, the velocities of two branches and their guided sum."""


def held_of(config: RunConfig, work: Work, sizes: DiTConfig) -> Held:
    """Count for a transformer of such sizes."""
    largest = max(work.segments, key=lambda part: part.cut.num_frames)
    num_frames, pixels = largest.cut.num_frames, config.height * config.width
    latents = LATENT_COPIES * 4 * sizes.out_dim * num_frames * pixels // SPATIAL_STRIDE**2
    rope = work.frame_tokens * num_frames * sizes.head_width * 4
    shown = (config.overlap_history or 0) * pixels * PIXEL_BYTES
    # the frames of all chunks that become clean together
    finishing = max(
        sum(len(largest.cut.chunks[chunk]) for chunk in tick.finishing) for tick in largest.ticks
    )
    return Held(
        latent_bytes=latents + rope + shown,
        encoded_frames=_encoded_frames(config, work, sizes, num_frames=num_frames),
        shown_frames=TEMPORAL_STRIDE * finishing,
        kv_remedy="set kv.compress=importance, or fewer num_frames",
        chunk_key="causal_block_size",
        window_frames=num_frames,
        is_batched=work.loop.sampling.batch_branches,
    )


def _encoded_frames(config: RunConfig, work: Work, sizes: DiTConfig, *, num_frames: int) -> int:
    frames = [0, config.image is not None or config.end_image is not None]
    if sizes.model_type == "i2v" and config.image is not None:
        frames.append(pixel_frames(num_frames))
    if config.video is not None or len(work.segments) > 1:
        frames.append(config.overlap_history or 1)
    return int(max(frames))
