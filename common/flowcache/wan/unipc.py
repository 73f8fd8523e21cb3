"""The UniPC solver of one chunk: order 2, variant bh2, on predictions of the clean data.

With noise level s, alpha = 1 - s and lambda = ln alpha - ln s; h is the growth of lambda over a
step from s to t, x_s the sample and m_s = x_s - s v the clean data that the velocity v points to:

    order 1    x_t = (t/s) x_s - alpha_t B m_s                with B = exp(-h) - 1
    order 2    the same, minus alpha_t B (m_r - m_s) / (2 r)  with r = (lambda_r - lambda_s) / h

where m_r is the prediction of the step before. When m_t is known, the step to t is made again
with it (the corrector): minus alpha_t B (rho_1 (m_r - m_s) / r + rho_2 (m_t - m_s)).

All coefficients depend on the noise levels alone. They are worked out on the host before the first
step, so that a step is a few elementwise operations and waits for nothing.

Source: UniPC, arXiv 2302.04867. Results equal those of diffusers' `UniPCMultistepScheduler` and of
the released code bit for bit (tests); those make a step of many small ones that wait for a GPU.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# The grid of the released models starts at the float32 value of 0.999 and divides it evenly.
SIGMA_MAX = float(np.float32(0.999))
NUM_TRAIN_TIMESTEPS = 1000
ORDER = 2


@dataclass(frozen=True)
class StepTo:
    """Coefficients of a step to one noise level, see the formulas above; float32 values."""

    sample: float
    """t/s"""
    data: float
    """alpha_t B"""
    ratio: float = math.nan
    """r; nan where there is no earlier step"""
    rho: tuple[float, float] = (math.nan, math.nan)
    """rho_1 and rho_2 of the corrector of order 2"""

    def predict(self, x: Tensor, m_s: Tensor, m_r: Tensor | None) -> Tensor:
        """Return the next sample; of order 1 without `m_r`."""
        straight = self.sample * x - self.data * m_s
        if m_r is None:
            return straight
        return straight - self.data * (0.5 * ((m_r - m_s) / self.ratio))

    def correct(self, x: Tensor, m_s: Tensor, m_r: Tensor | None, *, m_t: Tensor) -> Tensor:
        """Return the next sample once its prediction is known; of order 1 without `m_r`."""
        straight = self.sample * x - self.data * m_s
        if m_r is None:
            return straight - self.data * (0.5 * (m_t - m_s))
        rho_1, rho_2 = self.rho
        change = rho_1 * ((m_r - m_s) / self.ratio) + rho_2 * (m_t - m_s)
        return straight - self.data * change


@dataclass(frozen=True)
class Grid:
    """Noise levels of a schedule and the steps between them."""

    timesteps: tuple[int, ...]
    sigmas: tuple[float, ...]
    """Float32 values, one more than steps: the last is 0."""
    steps: tuple[StepTo, ...]


@lru_cache(maxsize=8)
def grid_of(num_steps: int, *, shift: float) -> Grid:
    """Return the grid of the released models.

    sigma' = 0.999 (1 - i/N), sigma = shift sigma' / (1 + (shift - 1) sigma'); a timestep is 1000
    sigma, truncated.
    """
    even = np.linspace(SIGMA_MAX, 0.0, num_steps + 1)[:-1]
    exact = shift * even / (1 + (shift - 1) * even)
    sigmas = torch.from_numpy(np.append(exact, 0.0).astype(np.float32))
    return Grid(
        timesteps=tuple((exact * NUM_TRAIN_TIMESTEPS).astype(np.int64).tolist()),
        sigmas=tuple(sigmas.tolist()),
        steps=_steps(sigmas),
    )


def _steps(sigmas: Tensor) -> tuple[StepTo, ...]:
    """Work out the coefficients in float32, as the released solver does."""
    alphas = 1 - sigmas
    lambdas = alphas.log() - sigmas.log()
    steps: list[StepTo] = []
    for s in range(len(sigmas) - 1):
        t, h = s + 1, lambdas[s + 1] - lambdas[s]
        change = torch.expm1(-h)
        sample, data = (sigmas[t] / sigmas[s]).item(), (alphas[t] * change).item()
        if s == 0 or t == len(sigmas) - 1:  # no step before; a level of 0 is reached by order 1
            steps.append(StepTo(sample, data))
            continue
        ratio = (lambdas[s - 1] - lambdas[s]) / h
        first = change / -h - 1
        second = first / -h - 0.5
        left = torch.stack([torch.ones(2), torch.stack([ratio, torch.ones(())])])
        right = torch.stack([first / change, second * 2 / change])
        rho_1, rho_2 = torch.linalg.solve(left, right).tolist()
        steps.append(StepTo(sample, data, ratio.item(), (rho_1, rho_2)))
    return tuple(steps)


class UniPC:
    """Steps one chunk from noise to data; holds the chunk's own multistep history."""

    def __init__(self, num_steps: int, *, shift: float) -> None:
        self.grid = grid_of(num_steps, shift=shift)
        self._step = 0
        self._predictions: list[Tensor] = []
        """Of the last steps, the newest last."""
        self._sample: Tensor | None = None
        """What the last step started from."""
        self._order = 1
        """Of the last step."""

    def step(self, velocity: Tensor, *, sample: Tensor) -> Tensor:
        """Return the sample at the next noise level.

        Args:
            velocity: noise minus data, after guidance.
        """
        number, steps = self._step, self.grid.steps
        prediction = sample - self.grid.sigmas[number] * velocity
        if self._sample is not None:
            sample = steps[number - 1].correct(self._sample, *self._history(), m_t=prediction)
        self._predictions = [*self._predictions, prediction][-ORDER:]
        self._order = min(len(self._predictions), len(steps) - number)
        self._sample, self._step = sample, number + 1
        return steps[number].predict(sample, *self._history())

    def _history(self) -> tuple[Tensor, Tensor | None]:
        """Return the last prediction, and the one before it where the last step was of order 2."""
        return self._predictions[-1], self._predictions[-2] if self._order == ORDER else None

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
        self._predictions, self._sample = [], None


def timestep_grid(num_steps: int, *, shift: float) -> tuple[list[int], list[float]]:
    """Return the timesteps and the sigmas (one more, ending in 0) of `num_steps` steps."""
    grid = grid_of(num_steps, shift=shift)
    return list(grid.timesteps), list(grid.sigmas)
