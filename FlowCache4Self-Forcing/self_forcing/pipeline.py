"""From encoded prompts to pixel frames: noise, given frames, decoding as chunks become clean.

Axes: B batch, C latent channels, F latent frames, h/w latent rows/columns, T frames, H/W pixels.
"""

from collections.abc import Generator

import torch

from flowcache.kv_quantized import KVLayout, KVSizes, Rotary
from flowcache.policies import Observe, Policies
from flowcache.quantization import format_of
from flowcache.runtime.memory import HostWeights
from flowcache.runtime.model import Progress, SegmentWork, Work
from flowcache.runtime.ops import Draw, seeded_noise
from flowcache.runtime.overlap import Worker, should_overlap
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats
from flowcache.wan.cached import CachedDiT, add_flops_of_others, open_branches
from flowcache.wan.codec import Codec
from flowcache.wan.dit import DiT, rotate
from flowcache.wan.given import Conditioning
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
    observe: Observe | None = None,  # noqa: ARG001
    policies: Policies | None = None,  # noqa: ARG001
    ranks: Ranks | None = None,
) -> Generator[Progress, None, None]:
    """Make a video; see `VideoModel.generate`. Every step is computed, whatever policies say."""
    device, ranks = dit.patch_embedding.weight.device, ranks or Ranks()
    draw = seeded_noise(config.seed, device=device) if draw is None else draw
    work = work or work_of(config, dit.config, dtype=dit.dtype)
    (part,) = work.segments
    chunks = part.cut
    num_given = chunks[len(part.given)].start
    dit_weights = HostWeights(dit, device) if config.offload else None
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
            layout=_kv_layout(dit, config, part, size=size[1:]),
        )
        cached = CachedDiT(
            dit, branches, stats=stats, ranks=ranks, size=size[1:], num_chunks=len(chunks)
        )
        sampler = Sampler(
            cached, work.loop, latents, chunks=chunks, num_given=len(part.given), draw=draw
        )
        # the frames of a video that goes on were shown before; its decoder needs them all the same
        hidden = 0 if config.video is None else config.overlap_history or 0
        waiting = [(latents[:, :num_given], hidden)] if num_given else []
        for tick, finished in sampler.denoise():
            if finished:
                own = slice(chunks[finished[0]].start, chunks[finished[-1]].stop)
                yield Progress(tick, codec.decode([*waiting, (latents[:, own], 0)]))
                waiting = []
            else:
                yield Progress(tick, None)
    add_flops_of_others(stats, ranks)


def _kv_layout(
    dit: DiT, config: RunConfig, part: SegmentWork, *, size: tuple[int, int]
) -> KVLayout | None:
    """Return what quantised caches have in common, if they are quantised.

    Args:
        size: rows and columns of a latent.
    """
    made, chunks = format_of(config.kv, head_width=dit.config.head_width), part.cut
    if made is None:
        return None
    frames = torch.arange(chunks[-1].stop, device=dit.patch_embedding.weight.device)
    frame_tokens = part.tokens[0] // len(chunks[0])
    # a view rotates keys when it reads them
    comes_rotated = config.positions == "absolute" and not config.rolling
    rope = dit.rope(frames, latent_height=size[0], latent_width=size[1]) if comes_rotated else None
    return KVLayout(
        KVSizes.of(made, part.ticks, part.tokens),
        {number: chunk.start * frame_tokens for number, chunk in enumerate(chunks)},
        None if rope is None else Rotary(rope, rotate, has_neighbours=True),
    )
