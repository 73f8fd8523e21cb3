"""From encoded prompts to pixel frames: segments, prefixes, decoding as chunks become clean."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from flowcache.kv import KVCache, caches_for
from flowcache.reuse import Observe, Policies, ReusePolicy
from flowcache.runtime.checks import Decoded, all_finite
from flowcache.runtime.offload import HostWeights, aside
from flowcache.runtime.ops import Draw, seeded_noise
from flowcache.runtime.overlap import Worker, done, should_overlap
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.settings import guidance_of, store_of
from flowcache.runtime.stats import RunStats
from flowcache.schedule import Tick
from flowcache.wan import flops
from flowcache.wan.dit import DiT
from flowcache.wan.layers import ContextKV
from skyreels_v2.build import (
    VAE_STRIDE,
    compression_of,
    kv_capacity,
    policy_maker,
    sampling_of,
    segments_of,
    tokens_per_frame,
    window_of,
)
from skyreels_v2.config import RunConfig
from skyreels_v2.sampler import WindowSampler
from skyreels_v2.sampling import Branch
from skyreels_v2.window import Segment, pixel_frames

LATENT_CHANNELS = 16
MASK_CHANNELS = 4
"""Channels that tell an I2V model which latent frames are given."""


class LatentDecoder(Protocol):
    """Turns the latents of one segment into pixels, bit by bit."""

    def decode(self, latents_BCFhw: Tensor, /) -> Tensor:
        """Return the pixels of the next latents, `[B, 3, T, H, W]` in -1..1."""
        ...


class LatentCodec(Protocol):
    """What the pipeline needs of a VAE."""

    def encode(self, pixels_B3THW: Tensor, /) -> Tensor:
        """Return normalised latents `[B, C, F, h, w]`."""
        ...

    def stream(self, ranks: Ranks, /) -> LatentDecoder:
        """Begin to decode one segment; the processes may divide the work."""
        ...


@dataclass(frozen=True)
class Conditioning:
    """What the video is made from, encoded or as pixels in -1..1 of the final size."""

    text: Mapping[str, Tensor]
    """Branch name -> text encoder output `[1, L, D]`; "uncond" only where guidance is on."""
    image_features: Tensor | None = None
    """CLIP features `[1, 257, 1280]`, I2V models only."""
    image: Tensor | None = None
    """Start image, `[3, 1, H, W]`."""
    end_image: Tensor | None = None
    """End image, `[3, 1, H, W]`."""
    video: Tensor | None = None
    """Last frames of the video to extend, `[3, T, H, W]`."""


@dataclass(frozen=True)
class Progress:
    """What just happened: a tick, and the frames that can be shown after it."""

    segment: Segment
    num_segments: int
    tick: Tick
    later: Future[Decoded] | None
    """New pixel frames in -1..1, which may be under way, or None."""

    @property
    def frames(self) -> Tensor | None:
        """The new pixel frames, waited for if they are under way."""
        return None if self.later is None else self.later.result().frames


@torch.no_grad()
def generate(
    dit: DiT,
    vae: LatentCodec,
    config: RunConfig,
    conditioning: Conditioning,
    *,
    stats: RunStats,
    draw: Draw | None = None,
    observe: Observe | None = None,
    policies: Policies | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Progress]:
    """Make a video; yield after every tick, with the frames that are finished.

    Args:
        dit: the transformer, on the device of the run.
        vae: encodes and decodes; it may be elsewhere.
        draw: makes all noise; default: from a generator seeded with `config.seed`.
        observe: is shown the velocities of computed steps.
        policies: decide what is computed; default: as the settings say.
        ranks: the processes that divide the work; each yields the whole video. Default: one.
    """
    device = dit.patch_embedding.weight.device
    if draw is None:
        draw = seeded_noise(config.seed, device=device)
    ranks = Ranks() if ranks is None else ranks
    dit_weights = HostWeights(dit, device) if config.offload else None
    contexts = _encode_contexts(dit, conditioning, stats=stats, ranks=ranks)
    segments = segments_of(config)
    # before any that is blended into a prefix, which upstream takes from another source
    noises = [_draw_noise(draw, config, segment, dit=dit) for segment in segments]
    tail = None if conditioning.video is None else done(conditioning.video)
    is_concurrent = should_overlap(
        config.overlap, device, takes_turns=config.offload or ranks.place.size > 1
    )
    with Worker("decode", device=device, is_concurrent=is_concurrent) as worker:
        for segment, noise in zip(segments, noises, strict=True):
            maker = _SegmentMaker(
                dit,
                vae,
                config,
                conditioning,
                contexts,
                segment,
                len(segments),
                stats,
                noise,
                draw,
                observe,
                policies or _settings_policies(config, dit),
                ranks,
                worker,
                dit_weights,
            )
            for tick, frames in maker.run(None if tail is None else tail.result()):
                yield Progress(segment, len(segments), tick, frames)
                if frames is not None and config.overlap_history is not None:
                    last = partial(_last_frames, tail, frames, config.overlap_history)
                    tail = worker.submit(last, is_small=True)
    _add_flops_of_others(stats, ranks)


def _concatenated(parts: list[Future[Decoded]]) -> Decoded:
    return Decoded.concatenated([part.result() for part in parts])


def _last_frames(before: Future[Tensor] | None, new: Future[Decoded], count: int) -> Tensor:
    """Return the last pixel frames of a video so far, `[3, T, H, W]`."""
    parts = [] if before is None else [before.result()]
    return torch.cat([*parts, new.result().frames], dim=1)[:, -count:]


def _add_flops_of_others(stats: RunStats, ranks: Ranks) -> None:
    """Count what other processes did in the branches that this one does not compute.

    Those that share a branch count it alike. The numbers are the host's: no device is asked.
    """
    own = torch.tensor([stats.computed_flops, stats.flops_without_reuse])
    every = ranks.world.all_reduce(own) // ranks.sequence.size
    stats.computed_flops, stats.flops_without_reuse = every.tolist()


def _draw_noise(draw: Draw, config: RunConfig, segment: Segment, *, dit: DiT) -> Tensor:
    """Draw what a window starts from, `[C, F, h, w]`, as upstream: nothing for an end image.

    Upstream draws in the transformer's type for diffusion forcing models, in float32 for T2V and
    I2V models; in bfloat16 the same seed gives other numbers.
    """
    is_float32 = config.noise_dtype == "float32" or (
        config.noise_dtype == "auto" and dit.config.model_type == "i2v"
    )
    size = (config.height // VAE_STRIDE, config.width // VAE_STRIDE)
    dtype = torch.float32 if is_float32 else dit.dtype
    return draw((LATENT_CHANNELS, segment.num_frames, *size), dtype)


def _settings_policies(config: RunConfig, dit: DiT) -> Policies:
    make_policy = policy_maker(config, dit.config)

    def policy_of(*, segment: int, branch: str) -> ReusePolicy:  # noqa: ARG001
        return make_policy()

    return policy_of


def _encode_contexts(
    dit: DiT, conditioning: Conditioning, *, stats: RunStats, ranks: Ranks
) -> dict[str, list[ContextKV]]:
    """Project every branch's prompt to cross-attention keys and values, once per video.

    A branch that other processes compute gets none.
    """
    device = dit.patch_embedding.weight.device
    image = conditioning.image_features
    contexts: dict[str, list[ContextKV]] = {}
    with stats.stage("dit"):
        for number, (name, text) in enumerate(conditioning.text.items()):
            contexts[name] = []
            if not ranks.computes(number):
                continue
            cost = flops.context(dit.config)
            stats.add_flops(computed=cost, without_reuse=cost)
            contexts[name] = dit.encode_context(
                text.to(device), None if image is None else image.to(device)
            )
    return contexts


@dataclass
class _SegmentMaker:
    """Makes one segment: given frames, noise, denoising, decoding."""

    dit: DiT
    vae: LatentCodec
    config: RunConfig
    conditioning: Conditioning
    contexts: Mapping[str, list[ContextKV]]
    segment: Segment
    num_segments: int
    stats: RunStats
    noise: Tensor
    """What the window starts from, `[C, F, h, w]`, without an end image."""
    draw: Draw
    observe: Observe | None
    policies: Policies
    ranks: Ranks
    worker: Worker
    dit_weights: HostWeights | None
    """On the host, if the transformer leaves the device while the VAE works."""

    def __post_init__(self) -> None:
        self.device = self.dit.patch_embedding.weight.device
        self.window = window_of(
            self.config,
            self.segment,
            num_segments=self.num_segments,
            is_i2v=self.dit.config.model_type == "i2v",
        )

    def run(self, tail: Tensor | None) -> Iterator[tuple[Tick, Future[Decoded] | None]]:
        """Denoise; yield after every tick the new pixel frames, or None.

        Args:
            tail: the pixel frames before this segment, `[3, T, H, W]`; its last ones are repeated.
        """
        num_prefix, skipped = self.window.num_prefix, self.segment.prefix_pixels
        latents = self._start_latents(tail)
        sampler = self._sampler(latents)
        decoder = self.vae.stream(self.ranks)
        waiting: list[Future[Decoded]] = []
        if num_prefix:
            waiting = [self._decode(decoder, latents[:, :num_prefix], skipped=skipped)]
        for tick, finished in sampler.run():
            for chunk in finished:
                own = self.window.chunks[chunk]
                waiting.append(self._decode(decoder, latents[:, own.start : own.stop]))
            if finished:
                yield tick, self.worker.submit(partial(_concatenated, waiting), is_small=True)
                waiting = []
            else:
                yield tick, None

    def _start_latents(self, tail: Tensor | None) -> Tensor:
        """Return noise with the given frames in their places, `[C, F, h, w]` float32."""
        window, latents = self.window, self.noise.to(torch.float32, copy=True)
        given = self.conditioning.image
        if self.segment.prefix_pixels:
            assert tail is not None, "a segment with a prefix needs the frames before it"
            given = tail[:, -self.segment.prefix_pixels :]
        if window.num_prefix and given is not None:
            latents[:, : window.num_prefix] = self._encode(given)
        if window.num_frames > self.segment.num_frames:
            end_image = self.conditioning.end_image
            assert end_image is not None, "the window has an end frame, but no end image was passed"
            latents = torch.cat([latents, self._encode(end_image)], dim=1)
        return latents

    def _sampler(self, latents: Tensor) -> WindowSampler:
        config = self.config
        return WindowSampler(
            self.dit,
            latents,
            window=self.window,
            sampling=sampling_of(config),
            branches={
                name: Branch(
                    context=context,
                    policy=self._policy(name, number=number),
                    results=store_of(config.reuse),
                    caches=self._caches() if self.ranks.computes(number) else [],
                )
                for number, (name, context) in enumerate(self.contexts.items())
            },
            stats=self.stats,
            segment=self.segment.index,
            compression=compression_of(config, frame_tokens=tokens_per_frame(config)),
            updates=store_of(config.reuse),
            guidance=guidance_of(config.reuse),
            condition=self._condition(),
            observe=self.observe,
            draw_noise=lambda like: self.draw(tuple(like.shape), like.dtype),
            ranks=self.ranks,
        )

    def _policy(self, name: str, *, number: int) -> ReusePolicy:
        own = self.policies(segment=self.segment.index, branch=name)
        return self.ranks.decided_by(own, branch=number)

    def _caches(self) -> list[KVCache]:
        if self.config.attention == "full":
            return []
        model = self.dit.config
        return caches_for(
            model.num_layers,
            capacity=kv_capacity(self.config, self.window),
            num_heads=model.num_heads // self.ranks.layout.sequence,
            head_width=model.head_width,
            dtype=self.dit.dtype,
            device=self.device,
            storage=torch.device("cpu") if self.config.kv_on_host else None,
        )

    def _condition(self) -> Tensor | None:
        """Return what an I2V model sees beside the noise: a mask and the encoded start image.

        The image is followed by mid-grey frames, as the model was trained.
        """
        image = self.conditioning.image
        if self.dit.config.model_type != "i2v" or image is None:
            return None
        num_pixels = pixel_frames(self.segment.num_frames)
        clip = torch.zeros(3, num_pixels, self.config.height, self.config.width)
        clip[:, :1] = image
        latents = self._encode(clip)
        mask = latents.new_zeros(MASK_CHANNELS, *latents.shape[1:])
        mask[:, 0] = 1
        return torch.cat([mask, latents])

    def _encode(self, pixels_3THW: Tensor) -> Tensor:
        with self.stats.stage("vae"), aside(self.dit_weights):
            latents = self.vae.encode(pixels_3THW.unsqueeze(0).to(self.device))
        return latents[0].to(device=self.device, dtype=torch.float32)

    def _decode(
        self, decoder: LatentDecoder, latents_CFhw: Tensor, *, skipped: int = 0
    ) -> Future[Decoded]:
        """Have latents decoded, without the first `skipped` frames; they may still change."""
        own = latents_CFhw.unsqueeze(0).clone() if self.worker.is_concurrent else latents_CFhw[None]

        def decode() -> Decoded:
            is_concurrent = self.worker.is_concurrent
            with self.stats.stage("vae", is_concurrent=is_concurrent), aside(self.dit_weights):
                frames = decoder.decode(own)[0].float()[:, skipped:]
                return Decoded(frames, all_finite(own))

        return self.worker.submit(decode)
