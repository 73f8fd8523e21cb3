"""Prompts that begin in the middle of a video, and keys that are made anew for them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowcache.runtime.stats import RunStats
from flowcache.wan.dit import DiT
from flowcache.wan.flow_match import levels_of
from self_forcing.sampler import Sampler, Sampling

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]
MakeSampler = Callable[..., Sampler]

FEW = Sampling(steps=levels_of(5.0).warped([1000, 500]), switches=(2,))
MANY = Sampling(steps=(), num_steps=3, guidance=3.0, switches=(2,))
ANEW = {"few": replace(FEW, recaches=True), "many": replace(MANY, recaches=True)}


def text_of(dit: DiT, seed: int) -> Tensor:
    draw, config = torch.Generator().manual_seed(seed), dit.config
    return torch.randn(1, config.text_len, config.text_dim, generator=draw)


def finished(sampler: Sampler) -> Tensor:
    for _ in sampler.denoise():
        pass
    return sampler.latents


@pytest.mark.parametrize("sampling", [FEW, MANY, *ANEW.values()])
def test_the_video_is_the_same_until_the_prompt_begins(
    make_dit: MakeDiT, make_sampler: MakeSampler, sampling: Sampling
):
    dit = make_dit()
    one = finished(make_sampler(dit, replace(sampling, switches=()), num_frames=12, size=3))
    two = finished(make_sampler(dit, sampling, num_frames=12, size=3, scenes=[text_of(dit, 1)]))
    assert torch.equal(two[:, :6], one[:, :6])
    assert not torch.equal(two[:, 6:], one[:, 6:])


@pytest.mark.parametrize("window", [None, 6])
def test_keys_made_anew_are_those_of_a_video_with_that_prompt(
    make_dit: MakeDiT, make_sampler: MakeSampler, window: int | None
):
    """The same clean latents, fed with the second prompt from the start."""
    dit = make_dit()
    sampling = replace(ANEW["few"], window=window)
    switched, other = (
        make_sampler(dit, sampling, num_frames=9, size=3, scenes=[text_of(dit, 1)])
        for _ in range(2)
    )
    for chunk in (0, 1):
        switched.feed_clean(chunk, timestep=0)
    before = switched.cached.own["cond"].caches[1].prefix(0)[0].clone()
    switched._begin_scene(2)
    other.cached.switch("cond", text_of(dit, 1))
    for chunk in (0, 1):
        other.feed_clean(chunk, timestep=0)
    for mine, theirs in zip(
        switched.cached.own["cond"].caches, other.cached.own["cond"].caches, strict=True
    ):
        assert mine.clean == theirs.clean == 36
        assert_close(mine.kv[:, :36], theirs.kv[:, :36], ulps=8)
    assert not torch.equal(switched.cached.own["cond"].caches[1].prefix(0)[0], before)


def test_the_same_prompt_again_changes_nothing(make_dit: MakeDiT, make_sampler: MakeSampler):
    dit = make_dit()
    prompt = [text_of(dit, 1)]
    for sampling in ANEW.values():
        pair = [
            make_sampler(dit, each, num_frames=12, size=3, scenes=prompt[: len(each.switches)])
            for each in (sampling, replace(sampling, switches=()))
        ]
        for sampler in pair:
            sampler.cached.switch("cond", prompt[0])
        assert_close(finished(pair[0]), finished(pair[1]), ulps=8)


def test_the_newest_twelve_frames_behind_the_sink_are_made_anew():
    chunks = [range(start, start + 3) for start in range(0, 30, 3)]
    sampling = replace(ANEW["few"], switches=(2, 7))

    def anew(chunk: int, clean: int, sink: int = 0) -> list[int]:
        return [*replace(sampling, sink=sink).recached(chunk, chunks=chunks, clean=clean)]

    assert anew(7, 21) == [3, 4, 5, 6]
    assert anew(2, 6) == [0, 1]
    assert anew(2, 6, sink=1) == [1]
    assert anew(7, 12, sink=3) == [4, 5, 6]
    assert anew(3, 9) == []
    assert [*replace(sampling, recaches=False).recached(7, chunks=chunks, clean=21)] == []


@pytest.mark.parametrize("name", ANEW)
def test_a_switch_costs_what_torch_counts(make_dit: MakeDiT, make_sampler: MakeSampler, name: str):
    dit, stats = make_dit(), RunStats(torch.device("cpu"))
    sampler = make_sampler(
        dit, ANEW[name], num_frames=12, size=3, stats=stats, scenes=[text_of(dit, 1)]
    )
    before = stats.computed_flops
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        finished(sampler)
    assert stats.computed_flops - before == counter.get_total_flops()
