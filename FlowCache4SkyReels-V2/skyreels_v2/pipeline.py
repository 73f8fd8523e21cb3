"""From encoded prompts to pixel frames: segments, prefixes, decoding as chunks become clean.

Axes: B batch, C latent channels, F latent frames, h/w latent rows/columns, T frames, H/W pixels.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flowcache.policies import Calibration, Observe, Policies, guidance_of, identity, store_of
from flowcache.runtime.checks import Decoded
from flowcache.runtime.compile import compiled_scoring
from flowcache.runtime.model import Progress, SegmentWork, Work
from flowcache.runtime.offload import HostWeights
from flowcache.runtime.ops import Draw, seeded_noise
from flowcache.runtime.overlap import Worker, done, should_overlap
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats
from flowcache.schedule import Tick
from flowcache.tokens import check_one_process, tokens_of
from flowcache.wan.cached import add_flops_of_others, encode_contexts, kv_layout, open_caches
from flowcache.wan.calibration import policies_of, rescale_for
from flowcache.wan.codec import Codec, LatentCodec
from flowcache.wan.dit import ContextKV, DiT
from flowcache.wan.given import Conditioning
from flowcache.wan.vae import SPATIAL_STRIDE, pixel_frames
from skyreels_v2.config import RunConfig
from skyreels_v2.sampler import Branch, Run, WindowSampler
from skyreels_v2.window import Segment, Window
from skyreels_v2.work import compression_of, work_of

MASK_CHANNELS = 4
"""Channels that show an I2V model which latent frames are given."""


@dataclass(frozen=True)
class SegmentProgress(Progress):
    """What just happened, and in which segment."""

    segment: Segment
    latents: Tensor
    """Of the segment's window, `[C, F, h, w]` float32; the next tick starts from them."""


@torch.no_grad()
def generate(
    dit: DiT,
    vae: LatentCodec,
    config: RunConfig,
    conditioning: Conditioning,
    *,
    stats: RunStats,
    work: Work | None = None,
    draw: Draw | None = None,
    observe: Observe | None = None,
    policies: Policies | None = None,
    ranks: Ranks | None = None,
) -> Generator[SegmentProgress, None, None]:
    """Make a video with a transformer on the device of the run; see `VideoModel.generate`."""
    device = dit.patch_embedding.weight.device
    draw = seeded_noise(config.seed, device=device) if draw is None else draw
    policies = policies or policies_of(config, dit.config)
    work = work or work_of(config, dit.config, dtype=dit.dtype)
    compression = work.loop.compression
    if device.type == "cuda" and dit.parts.compilation is not None:
        received = compiled_scoring()
        compression = compression_of(config, frame_tokens=work.frame_tokens, received=received)
    run = Run(
        dit,
        work.loop.sampling,
        stats,
        compression=compression,
        new_store=partial(store_of, config.reuse),
        new_guidance=partial(guidance_of, config.reuse),
        draw_noise=lambda like: draw(tuple(like.shape), like.dtype),
        observe=observe,
        ranks=ranks or Ranks(),
    )
    dit_weights = HostWeights(dit, device, stream=dit.stream) if config.offload else None
    contexts = encode_contexts(
        dit, conditioning.text, conditioning.image_features, stats=stats, ranks=run.ranks
    )
    segments: Sequence[Segment] = work.loop.segments
    # before any that is blended into a prefix, which upstream takes from another source
    noises = [_draw_noise(draw, config, segment, dit=dit) for segment in segments]
    tail = None if conditioning.video is None else done(conditioning.video)
    is_concurrent = should_overlap(
        config.overlap, device, takes_turns=config.offload or run.ranks.place.size > 1
    )
    with Worker("decode", device=device, is_concurrent=is_concurrent) as worker:
        for segment, part, noise in zip(segments, work.segments, noises, strict=True):
            codec = Codec(vae, vae.stream(run.ranks), stats, worker, device, dit_weights)
            window: Window = part.cut
            before = None if tail is None else tail.result()
            latents = _start_latents(
                codec, conditioning, noise, window=window, segment=segment, before=before
            )
            # caches are made in the call: a name would keep them until the next ones are made
            made = _make_segment(
                run,
                codec,
                latents,
                window=window,
                segment=segment,
                branches=_branches(
                    run, config, contexts, policies, part=part, number=segment.index
                ),
                condition=_image_condition(dit, codec, conditioning, segment),
            )
            for tick, frames in made:
                yield SegmentProgress(tick, frames, segment, latents)
                if frames is not None and config.overlap_history is not None:
                    last = partial(_last_frames, tail, frames, config.overlap_history)
                    tail = worker.submit(last, is_small=True)
    add_flops_of_others(stats, run.ranks)


# Before the first segment -------------------------------------------------------------------------


def _draw_noise(draw: Draw, config: RunConfig, segment: Segment, *, dit: DiT) -> Tensor:
    """Draw what a window starts from, `[C, F, h, w]`, as upstream: nothing for an end image.

    Upstream draws in the transformer's type for diffusion forcing models, in float32 for T2V and
    I2V models; in bfloat16 the same seed gives other numbers.
    """
    is_float32 = config.noise_dtype == "float32" or (
        config.noise_dtype == "auto" and dit.config.model_type == "i2v"
    )
    size = (config.height // SPATIAL_STRIDE, config.width // SPATIAL_STRIDE)
    dtype = torch.float32 if is_float32 else dit.dtype
    return draw((dit.config.out_dim, segment.num_frames, *size), dtype)


# One segment --------------------------------------------------------------------------------------


def _start_latents(
    codec: Codec,
    conditioning: Conditioning,
    noise: Tensor,
    *,
    window: Window,
    segment: Segment,
    before: Tensor | None,
) -> Tensor:
    """Return noise with the given frames in their places, `[C, F, h, w]` float32.

    Args:
        noise: `[C, F, h, w]`, without an end image.
        before: the pixel frames before this segment, `[3, T, H, W]`; its last ones are repeated.
    """
    latents, given = noise.to(torch.float32, copy=True), conditioning.image
    if segment.prefix_pixels:
        assert before is not None, "a segment with a prefix needs the frames before it"
        given = before[:, -segment.prefix_pixels :]
    if window.num_prefix and given is not None:
        latents[:, : window.num_prefix] = codec.encode(given)
    if window.num_frames > segment.num_frames:
        end_image = conditioning.end_image
        assert end_image is not None, "the window has an end frame, but no end image was passed"
        latents = torch.cat([latents, codec.encode(end_image)], dim=1)
    return latents


def _image_condition(
    dit: DiT, codec: Codec, conditioning: Conditioning, segment: Segment
) -> Tensor | None:
    """Return what an I2V model sees along with the noise: a mask and the encoded start image.

    The image is followed by mid-grey frames, as the model was trained.
    """
    image = conditioning.image
    if dit.config.model_type != "i2v" or image is None:
        return None
    clip = torch.zeros(3, pixel_frames(segment.num_frames), *image.shape[-2:])
    clip[:, :1] = image
    latents = codec.encode(clip)
    mask = latents.new_zeros(MASK_CHANNELS, *latents.shape[1:])
    mask[:, 0] = 1
    return torch.cat([mask, latents])


def _branches(
    run: Run,
    config: RunConfig,
    contexts: Mapping[str, list[ContextKV]],
    policies: Policies,
    *,
    part: SegmentWork,
    number: int,
) -> dict[str, Branch]:
    """Return the guidance branches of a window; those of other processes have no caches."""
    branches: dict[str, Branch] = {}
    layout = kv_layout(
        run.dit,
        config.kv,
        part,
        chunks=part.cut.chunks,
        size=(config.height // SPATIAL_STRIDE, config.width // SPATIAL_STRIDE),
    )
    rescale = identity
    if config.reuse.tokens.is_on:
        check_one_process(config.reuse.tokens, num_processes=run.ranks.place.size)
        _, rescale = rescale_for(config, run.dit.config)
    for branch, (name, context) in enumerate(contexts.items()):
        policy = policies(segment=number, branch=name)
        has_caches = config.attention == "causal" and run.ranks.computes(branch)
        branches[name] = Branch(
            context,
            run.ranks.decided_by(policy, branch=branch),
            run.new_store(),
            open_caches(
                run.dit,
                ranks=run.ranks,
                kv_tokens=part.kv_tokens,
                on_host=config.kv_on_host,
                layout=layout,
            )
            if has_caches
            else [],
            tokens_of(config.reuse, Calibration(rescale)),
        )
    return branches


def _make_segment(
    run: Run,
    codec: Codec,
    latents: Tensor,
    *,
    window: Window,
    segment: Segment,
    branches: Mapping[str, Branch],
    condition: Tensor | None,
) -> Iterator[tuple[Tick, Future[Decoded] | None]]:
    """Denoise one segment; yield after every tick the new pixel frames, or None.

    Args:
        latents: noise and given frames, `[C, F, h, w]`; changed in place.
    """
    sampler = WindowSampler(
        run,
        latents,
        window=window,
        branches=branches,
        segment=segment.index,
        condition=condition,
    )
    waiting: list[Future[Decoded]] = []
    if window.num_prefix:
        prefix = latents[:, : window.num_prefix]
        # what it repeats was shown before; the decoder needs it all the same
        waiting.append(codec.decode([(prefix, segment.prefix_pixels)]))
    for tick, finished in sampler.denoise():
        for chunk in finished:
            own = window.chunks[chunk]
            waiting.append(codec.decode([(latents[:, own.start : own.stop], 0)]))
        if finished:
            yield tick, codec.worker.submit(partial(_concatenated, waiting), is_small=True)
            waiting = []
        else:
            yield tick, None


def _concatenated(parts: list[Future[Decoded]]) -> Decoded:
    return Decoded.concatenated([part.result() for part in parts])


def _last_frames(before: Future[Tensor] | None, new: Future[Decoded], count: int) -> Tensor:
    """Return the last pixel frames of a video so far, `[3, T, H, W]`."""
    parts = [] if before is None else [before.result()]
    return torch.cat([*parts, new.result().frames], dim=1)[:, -count:]
