"""Steps in which only the conditional branch is computed, on small models with random weights."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.errors import UserError
from flowcache.policies import FlowCache, Stride
from flowcache.predict import HeldGuidance
from flowcache.wan.dit import DiT
from flowcache.wan.unipc import UniPC, timestep_grid
from skyreels_v2.config import ReuseConfig, RunConfig
from skyreels_v2.sampler import Sampling
from skyreels_v2.window import cut_window

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]
Denoise = Callable[..., Any]
"""`denoise_window` of conftest.py"""

SCALE = 3.0
CAUSAL = Sampling(
    6, 8.0, SCALE, 2, "causal", clean_pass=False, fps=24, signal="content", quantity="velocity"
)
QUANTITIES = ("velocity", "clean", "latent_update")


def noise(num_frames: int) -> Tensor:
    return torch.randn(16, num_frames, 4, 6, generator=torch.Generator().manual_seed(1))


def computed(run: Any, branch: str, *, chunk: int = 0) -> list[int]:
    rows = [row for row in run.stats.passes if (row.branch, row.chunk) == (branch, chunk)]
    return [row.step for row in rows if row.is_computed]


def test_the_difference_of_the_branches_is_held_as_worked_by_hand(
    denoise: Denoise, make_dit: MakeDiT
):
    """Steps 0, 1, 3, 5 of 6 are computed, 0 and 3 and the last one with both branches."""
    dit, z = make_dit(), noise(2)
    draw = torch.Generator().manual_seed(2)
    shape = (1, dit.config.text_len, dit.config.text_dim)
    texts = {name: torch.randn(*shape, generator=draw) for name in ("cond", "uncond")}
    run = denoise(
        dit,
        z,
        window=cut_window(2, chunk_frames=2),
        sampling=CAUSAL,
        policy=lambda: Stride(steps=[1, 3]),
        texts=texts,
        guidance=HeldGuidance([3]),
    )
    assert computed(run, "cond") == [0, 1, 3, 5]
    assert computed(run, "uncond") == [0, 3, 5]
    timesteps, _ = timestep_grid(6, shift=8.0)
    solver, x = UniPC(6, shift=8.0), z.clone()
    guided = difference = torch.empty(0)
    for step, t in enumerate(timesteps):
        if step in (0, 1, 3, 5):
            cond = dit(x.unsqueeze(0), torch.full((1, 2), t), texts["cond"])[0]
            if step != 1:
                difference = dit(x.unsqueeze(0), torch.full((1, 2), t), texts["uncond"])[0] - cond
            guided = cond + (1 - SCALE) * difference
        solver.advance_(x, velocity=guided)
        assert_close(run.rows[step], x, ulps=256)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("batch_branches", [False, True])
def test_with_all_steps_listed_it_is_vanilla(
    denoise: Denoise, make_dit: MakeDiT, quantity: Any, batch_branches: bool
):
    sampling = replace(CAUSAL, quantity=quantity, batch_branches=batch_branches)
    window, dit = cut_window(5, chunk_frames=2), make_dit()
    want = denoise(dit, noise(5), window=window, sampling=sampling)
    found = denoise(
        dit, noise(5), window=window, sampling=sampling, guidance=HeldGuidance(range(6))
    )
    assert torch.equal(found.latents, want.latents)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_second_computed_step_runs_one_branch_and_costs_half(
    denoise: Denoise, make_dit: MakeDiT, quantity: Any
):
    """Both branches cost the same; 6 steps, all computed: 0, 2, 4 and the last one with both."""
    run = denoise(
        make_dit(),
        noise(5),
        window=cut_window(5, chunk_frames=2),
        sampling=replace(CAUSAL, quantity=quantity),
        guidance=HeldGuidance(every=2),
        records=True,
    )
    for chunk in range(3):
        assert computed(run, "cond", chunk=chunk) == list(range(6))
        assert computed(run, "uncond", chunk=chunk) == [0, 2, 4, 5]
    spent = dict.fromkeys(("cond", "uncond"), 0)
    for each, flops in run.stats.trace.flops.items():
        spent[each.branch] += flops.spent
    saved = run.stats.flops_without_reuse - run.stats.computed_flops
    assert spent["uncond"] == spent["cond"] - saved
    assert saved > 0
    assert run.stats.num_reused == 6
    assert not run.updates.history


def test_an_adaptive_policy_and_held_guidance_go_together(denoise: Denoise, make_dit: MakeDiT):
    run = denoise(
        make_dit(),
        noise(5),
        window=cut_window(5, chunk_frames=2),
        sampling=replace(CAUSAL, quantity="latent_update"),
        policy=lambda: FlowCache(1.0, 3),
        guidance=HeldGuidance(every=2),
    )
    assert computed(run, "cond") == [0, 1, 2, 5]
    assert computed(run, "uncond") == [0, 2, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 1.0}, "this run has that one pass only"),
        ({"attention": "full"}, "work chunk by chunk: set attention=causal"),
        ({"reuse": ReuseConfig(guidance_every=2)}, "set reuse.predict to velocity, clean or"),
    ],
)
def test_a_run_that_cannot_hold_guidance_is_refused(settings: dict[str, Any], message: str):
    good = RunConfig(
        prompt="a cat",
        attention="causal",
        reuse=ReuseConfig(guidance_every=2, predict="velocity"),
    )
    with pytest.raises(UserError, match=message):
        replace(good, **settings)
