"""A tiny seeded transformer, videos denoised with it, and a tiny checkpoint."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache.policies import Observe
from flowcache.runtime import profile
from flowcache.runtime.ops import seeded_noise
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats
from flowcache.wan.cached import CachedDiT, open_branches
from flowcache.wan.calibration import ReuseConfig
from flowcache.wan.dit import DiT
from flowcache.wan.reuse import StepReuse
from self_forcing.model import MODEL
from self_forcing.sampler import Sampler, Sampling
from self_forcing.work import chunks_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def make(maker: Callable[..., Any], replica: Path) -> Callable[..., Any]:
    """Return what makes a video in a fresh folder from settings given as `key=value`."""
    return maker(MODEL, replica)


def sampler_of(
    dit: DiT,
    sampling: Sampling,
    *,
    num_frames: int,
    size: int,
    kv_frames: int | None = None,
    given: Tensor | None = None,
    stats: RunStats | None = None,
    rule: ReuseConfig | None = None,
    observe: Observe | None = None,
    scenes: Sequence[Tensor] = (),
) -> Sampler:
    """Return what denoises random latents of 4 x 6 with random prompts."""
    stats, ranks, config = stats or RunStats(CPU), Ranks(), dit.config
    draw = seeded_noise(0, device=CPU)
    latents = draw((16, num_frames, 4, 6), torch.float32)
    num_given = 0
    if given is not None:
        num_given = given.shape[1]
        latents[:, :num_given] = given
    shape = (1, config.text_len, config.text_dim)
    made = {name: draw(shape, torch.float32) for name in ("cond", "uncond")}
    if sampling.steps or sampling.guidance <= 1:
        made = {"cond": made["cond"]}
    branches = open_branches(
        dit,
        made,
        stats=stats,
        ranks=ranks,
        kv_tokens=6 * (kv_frames or num_frames),
        on_host=False,
    )
    chunks = chunks_of(num_frames, size=size)
    cached = CachedDiT(
        dit,
        branches,
        stats=stats,
        ranks=ranks,
        size=(4, 6),
        num_chunks=len(chunks),
        budget=sampling.budget,
    )
    rule = rule or ReuseConfig()
    policies = {name: profile.policy_maker(rule)() for name in branches}
    return Sampler(
        cached,
        sampling,
        latents,
        chunks=chunks,
        num_given=num_given // size,
        draw=draw,
        reuse=StepReuse(
            cached, rule, policies=policies, guidance=sampling.guidance, observe=observe
        ),
        scenes=scenes,
    )


@pytest.fixture
def make_sampler() -> Callable[..., Sampler]:
    return sampler_of


@pytest.fixture
def denoise() -> Callable[..., Tensor]:
    """Return what denoises a video, see `sampler_of`."""

    def run(dit: DiT, sampling: Sampling, **options: Any) -> Tensor:
        sampler = sampler_of(dit, sampling, **options)
        for _ in sampler.denoise():
            pass
        return sampler.latents

    return run
