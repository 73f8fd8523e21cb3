"""Step reuse in the many-step loop: what is computed, what the rest gets, what it costs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowcache.predict import PREDICTORS
from flowcache.runtime.stats import RunStats
from flowcache.wan.calibration import ReuseConfig
from flowcache.wan.dit import DiT
from flowcache.wan.unipc import UniPC
from self_forcing.sampler import Sampler, Sampling

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]
MakeSampler = Callable[..., Sampler]
Denoise = Callable[..., Tensor]

MANY = Sampling(steps=(), num_steps=6, guidance=3.0)
STRIDE = ReuseConfig(policy="stride", warmup_steps=2, every=2)
"""Own steps 0 1 2 4 5 of 6 are computed."""
HELD = ReuseConfig(guidance_every=2, predict="velocity")
FORECAST = ReuseConfig(policy="racer", threshold=1e9, warmup_steps=1)
"""Own steps 0 1 2 5 of 6 are computed."""


def computed_steps(stats: RunStats, branch: str, chunk: int) -> list[int]:
    rows = [row for row in stats.passes if row.branch == branch and row.chunk == chunk]
    return [row.step for row in rows if row.is_computed]


@pytest.mark.parametrize("predict", PREDICTORS)
@pytest.mark.parametrize(
    "rule",
    [
        ReuseConfig(policy="flowcache", threshold=0, rescale="none"),
        ReuseConfig(policy="teacache", threshold=0, rescale="none"),
        ReuseConfig(policy="stride", every=1),
        ReuseConfig(policy="racer", threshold=0, warmup_steps=1),
    ],
    ids=lambda rule: rule.policy,
)
def test_a_policy_that_reuses_nothing_changes_no_bit(
    make_dit: MakeDiT, denoise: Denoise, rule: ReuseConfig, predict: str
):
    dit = make_dit()
    found = denoise(dit, MANY, num_frames=6, size=3, rule=replace(rule, predict=predict))
    assert torch.equal(found, denoise(dit, MANY, num_frames=6, size=3))


@pytest.mark.parametrize(
    "rule",
    [*(replace(STRIDE, predict=name) for name in PREDICTORS), HELD, FORECAST],
    ids=[*PREDICTORS, "held guidance", "forecasts"],
)
def test_reuse_costs_what_torch_counts_and_saves_the_rest(
    make_dit: MakeDiT, make_sampler: MakeSampler, rule: ReuseConfig
):
    dit, stats, whole = make_dit(), *(RunStats(torch.device("cpu")) for _ in range(2))
    for each in make_sampler(dit, MANY, num_frames=6, size=3, stats=whole).denoise():
        del each
    sampler = make_sampler(dit, MANY, num_frames=6, size=3, stats=stats, rule=rule)
    before = stats.computed_flops
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for _ in sampler.denoise():
            pass
    assert stats.computed_flops - before == counter.get_total_flops()
    assert stats.computed_flops < stats.flops_without_reuse == whole.computed_flops


def test_every_chunk_and_branch_takes_the_same_steps_of_its_own(
    make_dit: MakeDiT, make_sampler: MakeSampler
):
    stats = RunStats(torch.device("cpu"))
    sampler = make_sampler(make_dit(), MANY, num_frames=6, size=3, stats=stats, rule=STRIDE)
    assert len(list(sampler.denoise())) == 12
    for chunk in (0, 1):
        for branch in ("cond", "uncond"):
            assert computed_steps(stats, branch, chunk) == [0, 1, 2, 4, 5]


def test_flowcache_decides_alike_for_chunks_that_differ_only_in_their_picture(
    make_dit: MakeDiT, make_sampler: MakeSampler
):
    """The signal is the timestep's; a threshold between the steps' distances reuses some."""
    stats = RunStats(torch.device("cpu"))
    rule = ReuseConfig(policy="flowcache", threshold=0.4, warmup_steps=1, rescale="none")
    sampler = make_sampler(
        make_dit(), replace(MANY, num_steps=12), num_frames=6, size=3, stats=stats, rule=rule
    )
    list(sampler.denoise())
    first, second = (computed_steps(stats, "cond", chunk) for chunk in (0, 1))
    assert first == second
    assert first[0] == 0
    assert first[-1] == 11
    assert 2 < len(first) < 12


def test_teacache_begins_anew_with_every_chunk_and_may_skip_its_last_step(
    make_dit: MakeDiT, make_sampler: MakeSampler
):
    stats = RunStats(torch.device("cpu"))
    rule = ReuseConfig(policy="teacache", threshold=1e9, warmup_steps=1, rescale="none")
    sampler = make_sampler(make_dit(), MANY, num_frames=9, size=3, stats=stats, rule=rule)
    list(sampler.denoise())
    assert [computed_steps(stats, "cond", chunk) for chunk in range(3)] == [[0], [0], [0, 5]]


def test_a_held_velocity_is_that_of_the_last_computed_step(
    make_dit: MakeDiT, make_sampler: MakeSampler
):
    """Steps 0 1 2 4 5 are shown; step 3 takes step 2's, through a solver of its own."""
    shown: list[Tensor] = []

    def observe(*, branch: str, velocity: Tensor, **_place: Any) -> None:
        if branch == "guided":
            shown.append(velocity.clone())

    rule = replace(STRIDE, predict="velocity")
    sampler = make_sampler(make_dit(), MANY, num_frames=3, size=3, rule=rule, observe=observe)
    x, solver = sampler.latents.clone(), UniPC(6, shift=5.0)
    list(sampler.denoise())
    assert len(shown) == 5
    for velocity in (*shown[:3], *shown[2:]):
        x = solver.step(velocity, sample=x)
    assert_close(sampler.latents, x, ulps=8)


def test_held_guidance_runs_the_conditional_pass_alone_every_second_step(
    make_dit: MakeDiT, make_sampler: MakeSampler
):
    stats = RunStats(torch.device("cpu"))
    sampler = make_sampler(make_dit(), MANY, num_frames=6, size=3, stats=stats, rule=HELD)
    list(sampler.denoise())
    assert computed_steps(stats, "cond", 1) == [*range(6)]
    assert computed_steps(stats, "uncond", 1) == [0, 2, 4, 5]


def test_what_a_chunk_stored_is_gone_when_it_is_clean(make_dit: MakeDiT, make_sampler: MakeSampler):
    rule = replace(STRIDE, guidance_every=2, predict="velocity")
    sampler = make_sampler(make_dit(), MANY, num_frames=6, size=3, rule=rule)
    list(sampler.denoise())
    assert not sampler.reuse.results["cond"].history
    assert not sampler.reuse.guidance.differences


def test_held_guidance_adds_the_last_difference_to_the_conditional_velocity(
    make_dit: MakeDiT, make_sampler: MakeSampler
):
    """By hand: steps 1 and 3 take the differences of steps 0 and 2."""
    shown: dict[tuple[str, int], Tensor] = {}

    def observe(*, branch: str, step: int, velocity: Tensor, **_place: Any) -> None:
        shown[branch, step] = velocity.clone()

    sampler = make_sampler(make_dit(), MANY, num_frames=3, size=3, rule=HELD, observe=observe)
    x, solver = sampler.latents.clone(), UniPC(6, shift=5.0)
    list(sampler.denoise())
    for step in range(6):
        cond = shown["cond", step]
        full = step if ("uncond", step) in shown else step - 1
        uncond = cond + shown["uncond", full] - shown["cond", full]
        x = solver.step(uncond + 3.0 * (cond - uncond), sample=x)
    assert_close(sampler.latents, x, ulps=64)
