"""From an encoded prompt to pixel frames: prefix, captions, denoising, decoding chunk by chunk."""

from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from flowcache.reuse import Observe, Policies
from flowcache.runtime.checks import Decoded, all_finite
from flowcache.runtime.offload import HostWeights, aside
from flowcache.runtime.ops import Draw, seeded_noise
from flowcache.runtime.overlap import Worker, should_overlap
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.settings import guidance_of, store_of
from flowcache.runtime.stats import RunStats
from flowcache.schedule import Tick
from magi1.build import budget_of, clip_of, latent_size, policy_of, sampling_of
from magi1.captions import NO_TOKENS, SpecialTokens, chunk_captions, null_caption
from magi1.dit import DiT
from magi1.sampler import ALL_BRANCHES, ClipSampler
from magi1.schedule import Clip, Clock
from magi1.settings import RunConfig


class LatentCodec(Protocol):
    """What the pipeline needs of a VAE."""

    def encode(self, pixels_B3THW: Tensor, /) -> Tensor:
        """Return scaled latents `[B, C, F, h, w]`."""
        ...

    def decode(self, latents_BCFhw: Tensor, ranks: Ranks, /) -> Tensor:
        """Return pixels `[B, 3, T, H, W]`, about -1..1; the processes may divide the work."""
        ...

    @property
    def model(self) -> nn.Module:
        """Its network; it is moved where memory is scarce."""
        ...


@dataclass(frozen=True)
class Conditioning:
    """What the video is made from."""

    text: Tensor
    """The encoded prompt, `[L, C]`."""
    tokens: SpecialTokens | None = None
    """Learned tokens that go before the prompt; None: none do."""
    prefix: Tensor | None = None
    """Given frames, `[3, T, H, W]` in -1..1 of the final size."""


@dataclass(frozen=True)
class Progress:
    """What just happened: a tick, and the frames that can be shown after it."""

    tick: Tick
    later: Future[Decoded] | None
    """New pixel frames, about -1..1, which may be under way, or None."""

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
        draw: makes the noise; default: from a generator seeded with `runtime_config.seed`.
        observe: is shown the velocities of computed steps.
        policies: decide what is computed, in segment 0 and branch `ALL_BRANCHES`; default: as the
            settings say.
        ranks: the processes that divide the work; each yields the whole video. Default: one.
    """
    ranks = Ranks() if ranks is None else ranks
    policy = policy_of(config) if policies is None else policies(segment=0, branch=ALL_BRANCHES)
    codec = _Codec(dit, vae, turns=_Turns.of(config, dit, vae), stats=stats, ranks=ranks)
    if draw is None:
        draw = seeded_noise(config.runtime_config.seed, device=codec.device)
    prefix = None if conditioning.prefix is None else codec.encode(conditioning.prefix)
    clip = clip_of(config, num_prefix=0 if prefix is None else prefix.shape[1])
    shape = (dit.config.latent_channels, clip.num_latents, *latent_size(config))
    captions = chunk_captions(
        conditioning.text.to(codec.device),
        num_chunks=len(clip.generated),
        tokens=conditioning.tokens,
        choice=config.tokens if conditioning.tokens else NO_TOKENS,
        max_length=dit.config.caption_max_length,
    )
    sampler = ClipSampler(
        dit,
        draw(shape, torch.float32),
        clip=clip,
        clock=Clock.of(config),
        sampling=sampling_of(config),
        captions=dict(zip(clip.generated, captions, strict=True)),
        null_caption=null_caption(
            dit.null_caption, tokens=conditioning.tokens, choice=config.tokens
        ),
        policy=ranks.decided_by(policy, branch=0),
        stats=stats,
        results=store_of(config.reuse),
        held_guidance=guidance_of(config.reuse),
        prefix=prefix,
        budget=budget_of(config),
        kv_storage=torch.device("cpu") if config.engine_config.kv_offload else None,
        observe=observe,
        ranks=ranks,
    )
    is_concurrent = should_overlap(
        config.overlap, codec.device, takes_turns=config.offload or ranks.place.size > 1
    )
    with Worker("decode", device=codec.device, is_concurrent=is_concurrent) as worker:
        for tick, finished in sampler.run():
            parts = {chunk: clip.latents(chunk) for chunk in finished}
            # a copy: the thread must not see later changes of the whole
            latents = {c: sampler.latents[:, p.start : p.stop].clone() for c, p in parts.items()}
            later = None
            if finished:
                later = worker.submit(
                    partial(_decode_chunks, codec, latents, clip=clip, is_concurrent=is_concurrent)
                )
            yield Progress(tick, later)


def _decode_chunks(
    codec: "_Codec", latents: Mapping[int, Tensor], *, clip: Clip, is_concurrent: bool
) -> Decoded:
    """Decode clean chunks and return the frames of them that are new."""
    return Decoded.concatenated(
        [
            Decoded(
                _decode_chunk(codec, own, clip=clip, chunk=chunk, is_concurrent=is_concurrent),
                all_finite(own),
            )
            for chunk, own in latents.items()
        ]
    )


def _decode_chunk(
    codec: "_Codec", latents: Tensor, *, clip: Clip, chunk: int, is_concurrent: bool
) -> Tensor:
    """Decode a clean chunk and return the frames of it that are new, `[3, T, H, W]`.

    Given latents are decoded with the others and cut off afterwards. The release cuts first; what
    remains is then no whole number of decoder tiles, and a video may lose three frames at the seam.
    """
    own, shown = clip.latents(chunk), clip.shown(chunk)
    frames = codec.decode(latents, is_concurrent=is_concurrent)
    return frames[:, (shown.start - own.start) * clip.temporal_stride :]


@dataclass(frozen=True)
class _Turns:
    """The weights of transformer and VAE on the host, where one of them is on the device at a time.

    The VAE is the one that waits.
    """

    dit: HostWeights
    vae: HostWeights

    @classmethod
    def of(cls, config: RunConfig, dit: DiT, vae: LatentCodec) -> "_Turns | None":
        """Return them if memory is scarce."""
        if not config.offload:
            return None
        device = dit.x_embedder.weight.device
        return cls(HostWeights(dit, device), HostWeights(vae.model, device))

    @contextmanager
    def of_vae(self) -> Generator[None, None, None]:
        """Have the VAE on the device, and the transformer off it."""
        with aside(self.dit):
            self.vae.come()
            try:
                yield
            finally:
                self.vae.leave()


@dataclass(frozen=True)
class _Codec:
    """The VAE, which may have to take turns on the device with the transformer."""

    dit: DiT
    vae: LatentCodec
    turns: _Turns | None
    stats: RunStats
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return self.dit.x_embedder.weight.device

    def encode(self, pixels_3THW: Tensor) -> Tensor:
        """Return float32 latents `[C, F, h, w]`."""
        with self._at_work() as device:
            latents = self.vae.encode(pixels_3THW.unsqueeze(0))[0]
        return latents.to(device=device, dtype=torch.float32)

    def decode(self, latents_CFhw: Tensor, *, is_concurrent: bool) -> Tensor:
        """Return float32 pixels `[3, T, H, W]`."""
        with self._at_work(is_concurrent=is_concurrent):
            return self.vae.decode(latents_CFhw.unsqueeze(0), self.ranks)[0].float()

    @contextmanager
    def _at_work(self, *, is_concurrent: bool = False) -> Generator[torch.device, None, None]:
        """Put the VAE on the device of the run, and the transformer off it, if memory is scarce."""
        device = self.device
        with (
            self.stats.stage("vae", is_concurrent=is_concurrent),
            nullcontext() if self.turns is None else self.turns.of_vae(),
        ):
            yield device
