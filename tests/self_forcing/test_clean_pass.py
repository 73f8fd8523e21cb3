"""What makes a chunk's final keys in few steps, and what that costs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowcache.block_reuse import BlockReuse
from flowcache.runtime.stats import RunStats
from flowcache.wan.dit import DiT, blocks_flops
from flowcache.wan.flow_match import add_noise, estimate_clean, levels_of
from self_forcing.config import CleanPass
from self_forcing.sampler import Sampler, Sampling

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]
MakeSampler = Callable[..., Sampler]
Denoise = Callable[..., Tensor]

FEW = Sampling(steps=levels_of(5.0).warped([1000, 500]))
MERGED = replace(FEW, clean_pass="merged")
WINDOWS: dict[str, dict[str, Any]] = {
    "all": {},
    "window": {"window": 5},
    "window and sink": {"window": 6, "sink": 1},
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [1, 3])
def test_a_merged_pass_equals_separate_ones(
    make_dit: MakeDiT, denoise: Denoise, window: str, size: int
):
    dit, changes = make_dit(), {**WINDOWS[window], "context_noise": 20.0}
    pair = [
        denoise(dit, replace(each, **changes), num_frames=15, size=size) for each in (FEW, MERGED)
    ]
    assert_close(*pair, ulps=64)


def test_where_another_prompt_begins_passes_stay_separate(
    make_dit: MakeDiT, make_sampler: MakeSampler
):
    """The clean pass is made with the prompt of its own chunk."""
    dit = make_dit()
    shape = (1, dit.config.text_len, dit.config.text_dim)
    scene = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = list[Tensor]()
    for sampling in (FEW, MERGED):
        sampler = make_sampler(
            dit, replace(sampling, switches=(2,)), num_frames=12, size=3, scenes=[scene]
        )
        list(sampler.denoise())
        made.append(sampler.latents)
    assert_close(*made, ulps=64)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("how", ["merged", "skipped", "refined"])
def test_every_way_costs_what_torch_counts(
    make_dit: MakeDiT, make_sampler: MakeSampler, how: CleanPass, window: str
):
    dit, stats = make_dit(), RunStats(torch.device("cpu"))
    sampling = replace(FEW, clean_pass=how, **WINDOWS[window])
    sampler = make_sampler(dit, sampling, num_frames=12, size=3, stats=stats)
    before = stats.computed_flops
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        list(sampler.denoise())
    assert stats.computed_flops - before == counter.get_total_flops()


def test_without_a_clean_pass_the_last_steps_keys_are_final(
    make_dit: MakeDiT, make_sampler: MakeSampler
):
    sampler = make_sampler(make_dit(), replace(FEW, clean_pass="skipped"), num_frames=6, size=3)
    for tick, finished in sampler.denoise():
        cache = sampler.cached.own["cond"].caches[1]
        if tick.index == 0:
            first = cache.kv[:, :18].clone()
        if finished == (0,):
            last = cache.kv[:, :18].clone()
            assert cache.clean == 18
    assert not torch.equal(first, last)
    assert torch.equal(sampler.cached.own["cond"].caches[1].kv[:, :18], last)


def test_a_refining_pass_moves_the_chunk_once_more_and_leaves_its_keys(
    make_dit: MakeDiT, make_sampler: MakeSampler
):
    """By hand: the finished chunk, noised to 0.05, goes through at timestep 50."""
    dit, sampling = make_dit(), replace(FEW, clean_pass="refined", refine_noise=0.05)
    plain = make_sampler(dit, FEW, num_frames=3, size=3)
    list(plain.denoise())
    noise = plain._noise_like(plain.latents)
    noisy = add_noise(plain.latents, noise, sigma=0.05)
    velocity = plain.cached.velocities(noisy, [50.0] * 3, frames=range(3))["cond"]
    refined = make_sampler(dit, sampling, num_frames=3, size=3)
    list(refined.denoise())
    assert torch.equal(refined.latents, estimate_clean(noisy, velocity, sigma=0.05))
    mine, theirs = (each.cached.own["cond"].caches[1] for each in (refined, plain))
    assert mine.clean == 18
    assert torch.equal(mine.kv[:, :18], theirs.kv[:, :18])


# Blocks of the chunk before -----------------------------------------------------------------------

BLOCKS = replace(FEW, reuses_blocks=True)


def test_blocks_that_are_never_alike_change_nothing(make_dit: MakeDiT, make_sampler: MakeSampler):
    dit = make_dit()
    plain, sampler = (make_sampler(dit, each, num_frames=9, size=3) for each in (FEW, BLOCKS))
    sampler.blocks = BlockReuse(floor=2)
    for each in (plain, sampler):
        list(each.denoise())
    assert torch.equal(sampler.latents, plain.latents)


def test_reused_blocks_save_what_torch_does_not_count(make_dit: MakeDiT, make_sampler: MakeSampler):
    """All blocks but the first are alike from the second chunk on; clean passes are complete."""
    dit, stats = make_dit(num_layers=3), RunStats(torch.device("cpu"))
    sampler = make_sampler(dit, BLOCKS, num_frames=9, size=3, stats=stats)
    sampler.blocks = BlockReuse(floor=-1, margin=9, most_change=1e9)
    before = stats.computed_flops
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        list(sampler.denoise())
    assert stats.computed_flops - before == counter.get_total_flops()
    per_block = [
        blocks_flops(dit.config, queries=18, keys=18 * (chunk + 1)) // 3 for chunk in (1, 2)
    ]
    saved = 2 * 2 * sum(per_block)  # two steps of two blocks
    assert stats.flops_without_reuse - stats.computed_flops == saved
