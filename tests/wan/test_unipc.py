import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from diffusers import UniPCMultistepScheduler
from safetensors import safe_open

from flowcache.wan.unipc import UniPC, timestep_grid

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parents[1] / "golden" / "skyreels_v2" / "schedule.safetensors"


def golden_sets() -> list[dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["case"])["sets"]


def diffusers_scheduler(num_steps: int, *, shift: float) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    first = float(np.float32(0.999))
    scheduler.set_timesteps(sigmas=np.linspace(first, 0.0, num_steps + 1)[:-1])
    return scheduler


@pytest.mark.parametrize(
    "entry", golden_sets(), ids=lambda e: f"{e['N']} steps, shift {e['shift']}"
)
def test_noise_levels_and_trajectory_equal_the_reference(entry: dict[str, Any]):
    """Bit for bit those of diffusers on this machine; the stored ones come from another.

    Some processors' `expm1` has another last bit, and so have a few of the coefficients.
    """
    with safe_open(GOLDEN, "pt") as file:
        stored = {
            part: file.get_tensor(f"{entry['i']}.{part}")
            for part in ("timesteps", "sigmas", "trajectory", "velocity")
        }
    timesteps, sigmas = timestep_grid(entry["N"], shift=entry["shift"])
    assert timesteps == stored["timesteps"].tolist()
    assert torch.equal(torch.tensor(sigmas), stored["sigmas"])
    solver, sample = UniPC(entry["N"], shift=entry["shift"]), stored["trajectory"][0]
    scheduler = diffusers_scheduler(entry["N"], shift=entry["shift"])
    here = sample
    for t, velocity, after in zip(
        scheduler.timesteps, stored["velocity"], stored["trajectory"][1:], strict=True
    ):
        here = scheduler.step(velocity, t, here, return_dict=False)[0]
        sample = solver.step(velocity, sample=sample)
        assert torch.equal(sample, here)
        assert_close(sample, after, ulps=64)


def test_thirty_steps_with_shift_8_are_the_published_ones():
    timesteps, sigmas = timestep_grid(30, shift=8.0)
    assert timesteps[:5] + timesteps[-5:] == [999, 995, 991, 986, 980, 615, 551, 470, 363, 216]
    assert sigmas[-2:] == [pytest.approx(0.21604, abs=5e-6), 0.0]


def test_the_last_step_lands_on_the_predicted_data():
    solver, sample = UniPC(3, shift=8.0), torch.randn(2, 4)
    _, sigmas = timestep_grid(3, shift=8.0)
    data = torch.randn(2, 4)
    for sigma in sigmas[:-1]:
        sample = solver.step((sample - data) / sigma, sample=sample)
    assert_close(sample, data, ulps=64)


def test_stepping_in_place_equals_the_released_pipelines_assignment():
    """The released code writes each step's result into the slice that it gave to the solver."""
    draw = torch.Generator().manual_seed(0)
    start, velocities = (torch.randn(*n, 3, 2, 4, generator=draw) for n in ((), (6,)))
    scheduler = diffusers_scheduler(6, shift=8.0)
    frames, ours, plain = start.clone(), start.clone(), start
    solver, without_quirk = UniPC(6, shift=8.0), UniPC(6, shift=8.0)
    for t, velocity in zip(scheduler.timesteps, velocities, strict=True):
        frames[1] = scheduler.step(velocity[1], t, frames[1], return_dict=False)[0]
        solver.advance_(ours[1], velocity=velocity[1])
        plain = without_quirk.step(velocity, sample=plain)
        assert torch.equal(ours[1], frames[1])
    assert torch.equal(ours[[0, 2]], start[[0, 2]])
    assert not torch.allclose(ours[1], plain[1])


def test_chunks_have_solvers_of_their_own():
    draw = torch.Generator().manual_seed(0)
    start, velocities = (torch.randn(*n, 2, 3, 4, generator=draw) for n in ((), (4,)))
    together, apart = UniPC(4, shift=5.0), [UniPC(4, shift=5.0) for _ in range(2)]
    both, each = start, list(start)
    for velocity in velocities:
        both = together.step(velocity, sample=both)
        each = [s.step(v, sample=x) for s, v, x in zip(apart, velocity, each, strict=True)]
    assert_close(both, torch.stack(each), ulps=64)


def test_after_a_skipped_step_the_next_one_is_of_first_order():
    """Without history the step is a straight line: x + (sigma_next - sigma) v."""
    _, sigmas = timestep_grid(5, shift=3.0)
    draw = torch.Generator().manual_seed(0)
    sample, velocities = (torch.randn(*n, 3, 4, generator=draw) for n in ((), (5,)))
    solver = UniPC(5, shift=3.0)
    for step in (0, 1):
        sample = solver.step(velocities[step], sample=sample)
    solver.skip()
    after = solver.step(velocities[3], sample=sample)
    straight = sample + (sigmas[4] - sigmas[3]) * velocities[3]
    assert_close(after, straight, ulps=64)
    data = solver.step(velocities[4], sample=after)
    assert_close(data + sigmas[4] * velocities[4], after, ulps=64)
