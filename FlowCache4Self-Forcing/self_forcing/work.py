"""What a run does, derived once from its settings: chunks, ticks, FLOPs, bytes."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from flowcache.compress import TokenLayout
from flowcache.errors import UserError
from flowcache.runtime.config import check_pass, check_work
from flowcache.runtime.model import SegmentWork, Work
from flowcache.runtime.plan import Pass, most_active
from flowcache.wan.dit import DiTConfig
from flowcache.wan.flow_match import levels_of
from flowcache.wan.kept import Budget
from flowcache.wan.memory import Held
from flowcache.wan.scenes import switches_of
from flowcache.wan.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE, latent_frames, pixel_frames
from flowcache.wan.work import result_bytes, tokens_per_frame, wan_work
from self_forcing.config import MAX_POSITIONS, RunConfig
from self_forcing.sampler import Sampling

LATENT_COPIES = 6
"""Float32 arrays of the video's size or less: noise, latents, velocities, solver's history."""


def sampling_of(config: RunConfig) -> Sampling:
    """Return how a video is denoised."""

    def timesteps(entries: list[int] | None) -> tuple[float, ...]:
        if config.warp_steps:
            return levels_of(config.shift).warped(entries or ())
        return tuple(map(float, entries or ()))

    per_frame = tokens_per_frame(height=config.height, width=config.width)
    is_relative = config.positions == "relative"
    return Sampling(
        steps=timesteps(config.step_list),
        first_steps=timesteps(config.first_chunk_step_list),
        num_steps=config.num_steps or 50,
        shift=config.shift,
        guidance=config.scale,
        context_noise=config.context_noise,
        window=config.window,
        sink=config.sink,
        is_relative=is_relative,
        is_rolling=config.rolling,
        clean_pass=config.clean_pass,
        refine_noise=config.refine_noise,
        reuses_blocks=config.reuse_blocks,
        budget=Budget.of(
            config.kv,
            window=config.window,
            layout=TokenLayout(per_frame, per_frame * config.chunk_frames),
            rotates=is_relative,
        ),
    )


def chunks_of(num_frames: int, *, size: int, is_first_alone: bool = False) -> list[range]:
    """Cut latent frames into chunks; the last one may be short.

    Example: 7 frames in chunks of 3 with the first frame alone are 0..0, 1..3, 4..6.
    """
    starts = [0, *range(1, num_frames, size)] if is_first_alone else [*range(0, num_frames, size)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], num_frames], strict=True)]


def whole_frames(config: RunConfig, name: str, value: int) -> int:
    """Return the latent frames of some pixel frames, which must fill chunks."""
    first = 1 if config.first_frame_alone else config.chunk_frames
    low, step = pixel_frames(first), TEMPORAL_STRIDE * config.chunk_frames
    near = low + max(round((value - low) / step), 0) * step
    if value != near:
        raise UserError(
            f"{name} is {value}, which does not fill chunks of {config.chunk_frames} latent frames"
            f"{' after a single one' if config.first_frame_alone else ''}: use {near}"
        )
    return latent_frames(value)


def given_frames(config: RunConfig) -> int:
    """Return the latent frames of the given picture or video."""
    if config.video is not None:
        if config.overlap_history is None or config.image is not None:
            raise UserError("video needs overlap_history, and goes without image")
        return whole_frames(config, "overlap_history", config.overlap_history)
    if config.image is None:
        return 0
    if config.chunk_frames > 1 and not config.first_frame_alone:
        raise UserError(
            f"image is one latent frame, but chunks have {config.chunk_frames}: use a frame-wise "
            "model (chunk_frames=1), or one trained with first_frame_alone=true"
        )
    return 1


def work_of(config: RunConfig, sizes: DiTConfig, *, dtype: torch.dtype) -> Work:
    """Work out what a run does.

    Args:
        sizes: of the transformer.
        dtype: of its weights.
    """
    sampling = sampling_of(config)
    frame_tokens = tokens_per_frame(height=config.height, width=config.width)
    segment = _segment(config, sampling, frame_tokens)
    switches = switches_of(config.scenes, chunks=segment.cut, generated=segment.generated)
    sampling = replace(sampling, switches=switches, recaches=config.recache)
    branches = ("cond",) if sampling.steps or sampling.guidance <= 1 else ("cond", "uncond")
    queries = max(*segment.tokens.values(), most_active(segment.ticks, segment.tokens))
    check_pass(queries, sizes="height, width or the frames of a chunk")
    # what every block changes, at each step of a chunk
    num_stored = len({*sampling.steps, *sampling.first_steps}) * sampling.reuses_blocks
    stored = num_stored * sizes.num_layers * queries * sizes.dim * dtype.itemsize
    if not sampling.steps:
        stored += len(branches) * result_bytes(sizes, config.reuse, queries, dtype)
    return wan_work(
        sizes,
        [segment],
        ([own] for own in passes_of(sampling, segment)),
        branches=branches,
        queries=queries,
        pass_tokens=queries,
        frame_tokens=frame_tokens,
        dtype=dtype,
        loop=sampling,
        kv=config.kv,
        num_scored=0 if sampling.budget is None else sampling.budget.num_scoring,
        stored_bytes=stored,
        waits=sampling.clean_pass == "merged",
        num_scenes=1 + len(switches),
    )


def passes_of(sampling: Sampling, segment: SegmentWork) -> Iterator[Pass]:
    """Yield all passes of a run; of chunks that are denoised together one, with the first's id."""
    tokens, chunks, clean, sink = segment.tokens, segment.cut, 0, len(segment.cut[0])
    frame_tokens = tokens[0] // sink

    def made(active: list[int], *, is_clean: bool, has_head: bool = False) -> Pass:
        nonlocal clean
        size = sum(len(chunks[chunk]) for chunk in active)
        clean = sampling.room(size, clean)
        seen = sum(sampling.reach(size, clean, sink=sink, is_clean=is_clean))
        clean += size if is_clean else 0
        queries = sum(tokens[chunk] for chunk in active)
        keys = queries + seen * frame_tokens
        return Pass(active[0], None if is_clean and not has_head else 0, queries, keys)

    for chunk in segment.given:
        yield made([chunk], is_clean=True)
    for tick in segment.ticks:
        for entering in tick.entering:
            anew = sampling.recached(entering, chunks=chunks, clean=clean)
            clean -= sum(len(chunks[chunk]) for chunk in anew)
            for chunk in anew:
                yield made([chunk], is_clean=True)
        yield made(list(tick.steps), is_clean=False)
        for chunk in tick.finishing:
            if sampling.clean_pass == "skipped":
                clean += len(chunks[chunk])
            elif sampling.clean_pass == "refined":
                yield made([chunk], is_clean=True, has_head=True)
            elif not tick.is_last:
                yield made([chunk], is_clean=True)


def held_of(config: RunConfig, work: Work, sizes: DiTConfig) -> Held:
    """Return what the loop keeps in memory."""
    (part,) = work.segments
    given = 1 if config.image is not None else config.hidden_frames
    pixels = config.height * config.width
    num_latents = part.cut[-1].stop * pixels // SPATIAL_STRIDE**2
    return Held(
        latent_bytes=LATENT_COPIES * 4 * sizes.out_dim * num_latents,
        encoded_frames=given,
        # given frames are decoded with the first chunk
        shown_frames=TEMPORAL_STRIDE * max(map(len, part.cut)) + given,
        kv_remedy="set window, or fewer num_frames",
        chunk_key="chunk_frames",
    )


def _segment(config: RunConfig, sampling: Sampling, frame_tokens: int) -> SegmentWork:
    """Return the ticks and chunks of a video."""
    num_frames = whole_frames(config, "num_frames", config.num_frames)
    given = given_frames(config)
    limit = num_frames
    if sampling.is_relative:
        limit = sampling.window or limit
        if sampling.budget is not None:
            limit = sampling.budget.held_tokens // frame_tokens
        limit = min(num_frames, limit)
    if limit > MAX_POSITIONS:
        remedy = "set window" if sampling.is_relative else "set positions=relative and window"
        raise UserError(
            f"num_frames {config.num_frames} makes {num_frames} latent frames, but the model has "
            f"positions for {MAX_POSITIONS}: {remedy}"
        )
    if given >= num_frames:
        raise UserError(f"num_frames {config.num_frames} leaves no frames to make: raise it")
    size = config.chunk_frames
    chunks = chunks_of(num_frames, size=size, is_first_alone=config.first_frame_alone)
    check_work(num_chunks=len(chunks), num_steps=config.num_steps or 50)
    num_given, held = sum(chunk.stop <= given for chunk in chunks), num_frames
    if sampling.window is not None:  # rolling: the window's own frames come on top
        own = len(sampling.steps) * size if sampling.is_rolling else 0
        own = size if sampling.clean_pass == "merged" else own  # two chunks in a pass
        held = min(num_frames, sampling.window + own)
    if sampling.budget is not None:
        held = min(num_frames, -(-sampling.budget.held_tokens // frame_tokens))

    def shown(latent: int) -> int:
        return max(pixel_frames(latent) - config.hidden_frames, 0) if latent else 0

    return SegmentWork(
        ticks=sampling.ticks(range(num_given, len(chunks))),
        tokens={number: len(chunk) * frame_tokens for number, chunk in enumerate(chunks)},
        given=range(num_given),
        frames=[[shown(chunk.start), shown(chunk.stop)] for chunk in chunks],
        kv_tokens=held * frame_tokens,
        cut=chunks,
    )
