"""From encoded prompts to pixel frames: noise, given frames, decoding as chunks become clean.

Axes: B batch, C latent channels, F latent frames, h/w latent rows/columns, T frames, H/W pixels.
"""

from collections.abc import Generator

import torch

from flowcache.errors import UserError
from flowcache.policies import Observe, Policies
from flowcache.runtime.model import Progress, Work
from flowcache.runtime.offload import HostWeights
from flowcache.runtime.ops import Draw, seeded_noise
from flowcache.runtime.overlap import Worker, should_overlap
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats
from flowcache.wan.cached import CachedDiT, add_flops_of_others, kv_layout, open_branches
from flowcache.wan.codec import Codec
from flowcache.wan.dit import DiT
from flowcache.wan.given import Conditioning
from flowcache.wan.reuse import StepReuse
from flowcache.wan.vae import SPATIAL_STRIDE, VAE
from self_forcing.config import RunConfig
from self_forcing.sampler import Sampler
from self_forcing.work import work_of


@torch.no_grad()
def generate(
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
    """Make a video; see `VideoModel.generate`. All of few steps are computed."""
    device, ranks = dit.patch_embedding.weight.device, ranks or Ranks()
    if config.reuse_blocks and ranks.layout.sequence > 1:
        raise UserError(
            f"reuse_blocks compares all tokens of a chunk, but {ranks.layout.sequence} processes "
            "divide them: set parallel.sequence=1"
        )
    draw = seeded_noise(config.seed, device=device) if draw is None else draw
    work = work or work_of(config, dit.config, dtype=dit.dtype)
    (part,) = work.segments
    chunks = part.cut
    num_given = chunks[len(part.given)].start
    dit_weights = HostWeights(dit, device, stream=dit.stream) if config.offload else None
    size = (dit.config.in_dim, config.height // SPATIAL_STRIDE, config.width // SPATIAL_STRIDE)
    # frames before channels, in the transformer's type: the same seed gives upstream's noise
    noise = draw((chunks[-1].stop - num_given, *size), dit.dtype)
    latents = noise.movedim(1, 0)
    latents = latents.contiguous() if config.precision == "reference" else latents.float()
    takes_turns = config.offload or ranks.place.size > 1
    is_concurrent = should_overlap(config.overlap, device, takes_turns=takes_turns)
    with Worker("decode", device=device, is_concurrent=is_concurrent) as worker:
        codec = Codec(vae, vae.stream(ranks), stats, worker, device, dit_weights)
        if conditioning.given is not None:
            given = codec.encode(conditioning.given).to(latents)
            latents = torch.cat([given, latents], dim=1)
        branches = open_branches(
            dit,
            conditioning.text,
            stats=stats,
            ranks=ranks,
            kv_tokens=part.kv_tokens,
            on_host=config.kv_on_host,
            layout=kv_layout(
                dit,
                config.kv,
                part,
                chunks=chunks,
                size=size[1:],
                # a view rotates keys when it reads them
                comes_rotated=config.positions == "absolute" and not config.rolling,
                waits=config.clean_pass == "merged",
            ),
        )
        cached = CachedDiT(
            dit,
            branches,
            stats=stats,
            ranks=ranks,
            size=size[1:],
            num_chunks=len(chunks),
            budget=work.loop.budget,
        )
        sampler = Sampler(
            cached,
            work.loop,
            latents,
            chunks=chunks,
            num_given=len(part.given),
            draw=draw,
            reuse=StepReuse.of(
                config, cached, guidance=config.scale, policies=policies, observe=observe
            ),
            scenes=conditioning.scenes,
        )
        # the frames of a video that goes on were shown before; its decoder needs them all the same
        waiting = [(latents[:, :num_given], config.hidden_frames)] if num_given else []
        for tick, finished in sampler.denoise():
            if finished:
                own = slice(chunks[finished[0]].start, chunks[finished[-1]].stop)
                yield Progress(tick, codec.decode([*waiting, (latents[:, own], 0)]))
                waiting = []
            else:
                yield Progress(tick, None)
    add_flops_of_others(stats, ranks)
