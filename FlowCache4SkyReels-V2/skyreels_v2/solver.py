"""The UniPC solver of one chunk, through diffusers.

Source: UniPC (arXiv 2302.04867), order 2, variant bh2, on x0 predictions of a flow model.
"""

from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

# The grid of the released models starts at the float32 value of 0.999 and divides it evenly.
SIGMA_MAX = float(np.float32(0.999))
NUM_TRAIN_TIMESTEPS = 1000


class UniPC:
    """Steps one chunk from noise to data; holds the chunk's own multistep history."""

    def __init__(self, num_steps: int, *, shift: float) -> None:
        self.num_steps = num_steps
        self.shift = shift
        self._scheduler = self._start_at(0)
        self._step = 0

    @property
    def timesteps(self) -> Tensor:
        """Timestep of every step, int64 `[num_steps]`, truncated from 1000 sigma."""
        return self._scheduler.timesteps

    @property
    def sigmas(self) -> Tensor:
        """Noise level of every step and a final 0, float32 `[num_steps + 1]`."""
        return self._scheduler.sigmas

    def step(self, velocity: Tensor, *, sample: Tensor) -> Tensor:
        """Take the next step: the sample at the next noise level, same shape and dtype.

        Args:
            velocity: noise minus data, after guidance.
        """
        timestep = self._scheduler.timesteps[self._step]
        self._step += 1
        return self._scheduler.step(velocity, timestep, sample, return_dict=False)[0]

    def advance_(self, sample: Tensor, *, velocity: Tensor) -> None:
        """Take the next step in place.

        The released pipeline overwrites the sample that its solver has kept from the first step, so
        that the first correction starts from the advanced sample. Its videos are made that way, so
        it is done here, too, at the first step only.
        """
        kept = sample if self._step == 0 else sample.clone()
        sample.copy_(self.step(velocity, sample=kept))

    def skip(self) -> None:
        """Go on to the next step without a velocity: the multistep history starts anew there."""
        self._step += 1
        self._scheduler = self._start_at(self._step)

    def _start_at(self, step: int) -> UniPCMultistepScheduler:
        scheduler = UniPCMultistepScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=self.shift,
        )
        grid: Any = np.linspace(SIGMA_MAX, 0.0, self.num_steps + 1)[:-1]
        scheduler.set_timesteps(sigmas=grid)
        scheduler.set_begin_index(step)
        return scheduler


def timestep_grid(num_steps: int, *, shift: float) -> tuple[list[int], list[float]]:
    """Return the timesteps and the sigmas (one more, ending in 0) of `num_steps` steps.

    sigma' = 0.999 (1 - i/N), sigma = shift sigma' / (1 + (shift - 1) sigma').
    """
    solver = UniPC(num_steps, shift=shift)
    timesteps: list[int] = solver.timesteps.to(torch.int64).tolist()
    sigmas: list[float] = solver.sigmas.tolist()
    return timesteps, sigmas
