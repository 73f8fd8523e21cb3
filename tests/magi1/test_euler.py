"""One Euler step of a chunk, computed or with a stand-in, against sums worked by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close

from flowcache.predict import ResultStore
from magi1.sampler import euler_step_

pytestmark = pytest.mark.numeric

TIMES = (0.0, 0.1, 0.25, 0.45, 0.7, 1.0)
COMPUTED = (0, 1, 2, 4)


@pytest.mark.parametrize(("order", "factor"), [(1, 0.0), (1, 0.5), (2, 0.8)])
@pytest.mark.parametrize("quantity", ["latent_update", "velocity", "clean"])
def test_a_reused_step_follows_the_polynomial_through_the_stored_results(
    order: int, factor: float, quantity: Any
):
    """Steps 0, 1, 2 and 4 of 5 are computed; the polynomial for step 3 is numpy's."""
    draw = torch.Generator().manual_seed(0)
    velocities = torch.randn(len(COMPUTED) + 1, 2, 3, 4, generator=draw)
    latents = torch.randn(2, 3, 4, generator=draw)
    x = latents.double().numpy().copy()
    store, seen = ResultStore(factor, order=order), dict[float, Any]()
    for step, t in enumerate(TIMES[:-1]):
        size, is_computed = TIMES[step + 1] - t, step in COMPUTED
        v = velocities[step].double().numpy()
        if is_computed:
            estimates = {"latent_update": v * size, "velocity": v, "clean": x + (1 - t) * v}
            seen[1 - t] = estimates[quantity]
        else:
            last = list(seen)[-order - 1 :]
            values = np.stack([seen[at].ravel() for at in last])
            coefficients = np.polyfit(last, values, order)
            polynomial = sum(c * (1 - t) ** p for p, c in enumerate(coefficients[::-1]))
            result = (values[-1] + factor * (polynomial - values[-1])).reshape(x.shape)
            stand_ins = {
                "latent_update": result / size,
                "velocity": result,
                "clean": (result - x) / (1 - t),
            }
            v = stand_ins[quantity]
        x = x + size * v
        euler_step_(
            latents,
            velocities[step] if is_computed else None,
            chunk=0,
            t=t,
            step_size=size,
            results=store,
            quantity=quantity,
        )
        assert_close(latents, x, ulps=64)


def test_a_held_clean_estimate_is_a_held_velocity_after_euler_steps():
    draw = torch.Generator().manual_seed(1)
    start, velocity = torch.randn(2, 2, 3, 4, generator=draw)
    for quantity in ("velocity", "clean"):
        latents, store = start.clone(), ResultStore()
        for step, t in enumerate(TIMES[:-1]):
            euler_step_(
                latents,
                velocity if step == 0 else None,
                chunk=0,
                t=t,
                step_size=TIMES[step + 1] - t,
                results=store,
                quantity=quantity,
            )
        assert_close(latents, start + velocity, ulps=64)
