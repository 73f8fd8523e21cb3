"""From an encoded prompt to pixel frames: prefix, captions, denoising, decoding chunk by chunk."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flowcache.policies import Calibration, Observe, Policies, guidance_of, store_of
from flowcache.runtime.checks import Decoded, all_finite
from flowcache.runtime.model import Progress, Work
from flowcache.runtime.offload import HostWeights, aside
from flowcache.runtime.ops import Draw, seeded_noise
from flowcache.runtime.overlap import Worker, should_overlap
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats
from flowcache.tokens import check_one_process, tokens_of
from magi1.config import RunConfig
from magi1.dit import DiT
from magi1.sampler import ClipInputs, ClipSampler, Reuse
from magi1.sampling import ALL_BRANCHES
from magi1.schedule import Clip
from magi1.text import NO_TOKENS, SpecialTokens, chunk_captions, null_caption
from magi1.vae import VAE
from magi1.work import clip_work, latent_size, policy_of


@dataclass(frozen=True)
class Conditioning:
    """What the video is made from."""

    text: Tensor
    """The encoded prompt, `[L, C]`."""
    tokens: SpecialTokens | None = None
    """Learned tokens that go before the prompt; None: none do."""
    prefix: Tensor | None = None
    """Given frames, `[3, T, H, W]` in -1..1 of the final size."""


@torch.no_grad()
def generate_clip(
    dit: DiT,
    vae: VAE,
    config: RunConfig,
    conditioning: Conditioning,
    *,
    stats: RunStats,
    work: Work | None = None,
    draw: Draw | None = None,
    observe: Observe | None = None,
    policies: Policies | None = None,
    ranks: Ranks | None = None,
) -> Generator[Progress, None, None]:
    """Make a video with a transformer on the device of the run; see `VideoModel.generate`.

    Policies are asked for segment 0 and branch `ALL_BRANCHES`.
    """
    device = dit.x_embedder.weight.device
    ranks = Ranks() if ranks is None else ranks
    check_one_process(config.reuse.tokens, num_processes=ranks.place.size)
    policy = policy_of(config) if policies is None else policies(segment=0, branch=ALL_BRANCHES)
    codec = _Codec(vae, dit, takes_turns=config.offload, stats=stats, ranks=ranks)
    prefix = None if conditioning.prefix is None else codec.encode(conditioning.prefix)
    work = work or clip_work(
        config,
        num_prefix=0 if prefix is None else prefix.shape[1],
        prompt_tokens=len(conditioning.text),
        has_special_tokens=conditioning.tokens is not None,
        dtype=dit.dtype,
    )
    clip: Clip = work.segments[0].cut
    shape = (dit.config.latent_channels, clip.num_latents, *latent_size(config))
    draw = draw or seeded_noise(config.runtime_config.seed, device=device)
    tokens = conditioning.tokens
    captions = chunk_captions(
        conditioning.text.to(device),
        num_chunks=len(clip.generated),
        tokens=tokens,
        choice=config.tokens if tokens else NO_TOKENS,
        max_length=dit.config.caption_max_length,
    )
    inputs = ClipInputs(
        clip,
        draw(shape, torch.float32),
        captions=dict(zip(clip.generated, captions, strict=True)),
        null_caption=null_caption(dit.null_caption, tokens=tokens, choice=config.tokens),
        prefix=prefix,
    )
    sampler = ClipSampler(
        dit,
        inputs,
        replace(
            work.loop,
            kv_storage=torch.device("cpu") if config.engine_config.kv_offload else None,
        ),
        reuse=Reuse(
            ranks.decided_by(policy, branch=0),
            store_of(config.reuse),
            guidance_of(config.reuse),
            tokens_of(config.reuse, Calibration()),
        ),
        stats=stats,
        observe=observe,
        ranks=ranks,
    )
    is_concurrent = should_overlap(
        config.overlap, device, takes_turns=config.offload or ranks.place.size > 1
    )
    with Worker("decode", device=device, is_concurrent=is_concurrent) as worker:
        for tick, finished in sampler.run():
            # a copy: the thread must not see later changes of the whole
            latents = {chunk: inputs.frames(chunk).clone() for chunk in finished}
            decode = partial(codec.decode, latents, clip=clip, is_concurrent=is_concurrent)
            yield Progress(tick, worker.submit(decode) if finished else None)


class _Codec:
    """The VAE; where memory is scarce it takes turns on the device with the transformer."""

    def __init__(
        self, vae: VAE, dit: DiT, *, takes_turns: bool, stats: RunStats, ranks: Ranks
    ) -> None:
        self.vae, self.stats, self.ranks = vae, stats, ranks
        self.device = dit.x_embedder.weight.device
        self.dit_weights = self.vae_weights = None
        if takes_turns:
            self.dit_weights = HostWeights(dit, self.device, stream=dit.stream)
            self.vae_weights = HostWeights(vae.model, self.device)

    def encode(self, pixels_3THW: Tensor) -> Tensor:
        """Return float32 latents `[C, F, h, w]`."""
        with self._at_work():
            latents = self.vae.encode(pixels_3THW.unsqueeze(0))[0]
        return latents.to(device=self.device, dtype=torch.float32)

    def decode(self, latents: Mapping[int, Tensor], *, clip: Clip, is_concurrent: bool) -> Decoded:
        """Decode clean chunks `[C, F, h, w]` and return the frames of them that are new.

        Given latents are decoded with the others and cut off afterwards. The release cuts first;
        what remains is then no whole number of decoder tiles, and a video may lose three frames at
        the seam.
        """
        parts: list[Decoded] = []
        for chunk, own in latents.items():
            with self._at_work(is_concurrent=is_concurrent):
                frames = self.vae.decode(own.unsqueeze(0), self.ranks)[0].float()
            given = clip.shown(chunk).start - clip.latents(chunk).start
            parts.append(Decoded(frames[:, given * clip.temporal_stride :], all_finite(own)))
        return Decoded.concatenated(parts)

    @contextmanager
    def _at_work(self, *, is_concurrent: bool = False) -> Generator[None, None, None]:
        """Put the VAE on the device, and the transformer off it, if they take turns."""
        with self.stats.stage("vae", is_concurrent=is_concurrent), aside(self.dit_weights):
            if self.vae_weights is None:
                yield
                return
            self.vae_weights.come()
            try:
                yield
            finally:
                self.vae_weights.leave()
