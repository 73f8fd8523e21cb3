"""Few denoising steps with fresh noise between them, as distilled Wan models take them.

At noise level sigma a sample is x = (1 - sigma) x0 + sigma n, and the model predicts the velocity
v = n - x0. So one call gives an estimate of the clean data, x0 = x - sigma v, to which noise of the
next, lower level is added:

    x (1000)  --model-->  x0  --noise of 937.5-->  x (937.5)  --model-->  x0  ...  x0

Levels come from a table of 1000: u = 1, 0.999, ..., 0.001 is turned into
sigma = s u / (1 + (s - 1) u) with shift s; the timestep is 1000 sigma. Arithmetic and its types are
those of the released models, so that tables are equal bit for bit.

Source: flow matching scheduler of Self-Forcing (arXiv 2506.08009).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

NUM_LEVELS = 1000


@dataclass(frozen=True)
class Levels:
    """The table of noise levels of one shift, highest first; float32 values."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    def sigma(self, timestep: float) -> float:
        """Return the level whose timestep is nearest; the higher one of two as near."""
        place = min(range(NUM_LEVELS), key=lambda i: abs(self.timesteps[i] - timestep))
        return self.sigmas[place]

    def warped(self, entries: Sequence[int]) -> tuple[float, ...]:
        """Return the timesteps of evenly spaced entries in 0..1000.

        Example: with shift 5 the entries 1000, 750, 500, 250 are 1000, 937.5, 833.33, 625.
        """
        return tuple((*self.timesteps, 0.0)[NUM_LEVELS - entry] for entry in entries)


@lru_cache(maxsize=8)
def levels_of(shift: float) -> Levels:
    """Return the table of a shift."""
    even = torch.linspace(1.0, 0.0, NUM_LEVELS + 1)[:-1]
    sigmas = shift * even / (1 + (shift - 1) * even)
    return Levels(tuple(sigmas.tolist()), tuple((sigmas * NUM_LEVELS).tolist()))


def estimate_clean(x: Tensor, velocity: Tensor, *, sigma: float) -> Tensor:
    """Return the clean data that a velocity points to, in the velocity's type."""
    return (x.double() - sigma * velocity.double()).to(velocity.dtype)


def add_noise(clean: Tensor, noise: Tensor, *, sigma: float) -> Tensor:
    """Return clean data at a noise level, in the type of the noise."""
    return ((1 - sigma) * clean.float() + sigma * noise.float()).to(noise.dtype)
