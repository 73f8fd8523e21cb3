"""The error of reusing results over a gap between computed steps, in closed form.

A chunk's latent moves by ``(sigma_{k+1} - sigma_k) v_k`` in step k (Euler). Where step k is reused,
a prediction from earlier computed steps stands for v_k. Both are linear in the velocities, so the
error of the latent behind a gap is ``sum_n c_n v_n``, and its squared norm ``c^T G c`` with the
Gram matrix ``G_nm = <v_n, v_m>``. What a model makes of an error depends on when it is made: early
ones change what is drawn. A measured gain per step weights the squared error of that step.

Example: noise levels 1.0 0.8 0.5 0.0; step 0 is computed and held in step 1, step 2 is computed.
The error is ``-0.3 (v_1 - v_0)``, so c = (0.3, -0.3, 0); if the velocities are unit vectors at
right angles, c^T G c = 0.18.

Axes: N own steps of a chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MAX_ORDER = 2


@dataclass(frozen=True)
class Predictor:
    """What stands for the velocity of a reused step.

    The last computed velocity, moved by `factor` times what the polynomial of degree `order`
    through the last computed velocities, over the noise level, adds to it. Order 0, or factor 0,
    holds the last velocity. A chunk with fewer results uses the degree that they allow.

    Source: TaylorSeer (arXiv 2503.06923) for extrapolated features; `flowcache.reuse.ResultStore`
    carries the same rule out.
    """

    order: int = 0
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.order <= MAX_ORDER:
            raise ValueError(f"order must be in 0..{MAX_ORDER}, not {self.order}")

    @property
    def num_results(self) -> int:
        """Computed steps that a prediction looks back on."""
        return self.order + 1

    def weights(self, history: Sequence[int], step: int, *, sigmas: Array) -> dict[int, float]:
        """Return computed step -> its weight in the prediction for `step`; they add up to 1.

        Args:
            history: computed steps before `step`, ascending, at least one.
            sigmas: noise level of each step, `[N + 1]`.
        """
        points = history[-self.num_results :]
        weights: dict[int, float] = {}
        for j in points:
            others = [i for i in points if i != j]
            polynomial = float(
                np.prod([(sigmas[step] - sigmas[i]) / (sigmas[j] - sigmas[i]) for i in others])
            )
            weights[j] = self.factor * polynomial + (1 - self.factor) * (j == points[-1])
        return weights


@dataclass(frozen=True)
class ErrorModel:
    """The expected squared error that reuse adds to the latent of a chunk.

    Attributes:
        gram: mean inner products of the velocities, `[N, N]`.
        sigmas: noise level of each step and the last one, `[N + 1]`.
        gains: by how much a squared error made in each step grows until the end, `[N]`; None: 1.
    """

    gram: Array
    sigmas: Array
    gains: Array | None = None

    def __post_init__(self) -> None:
        size = len(self.sigmas) - 1
        if self.gram.shape != (size, size):
            raise ValueError(f"{size} steps need a {size} x {size} matrix, not {self.gram.shape}")
        if not (np.diff(self.sigmas) < 0).all():
            raise ValueError("noise levels must fall from step to step")

    @property
    def num_steps(self) -> int:
        return len(self.gram)

    def gap(self, history: Sequence[int], stop: int, predictor: Predictor) -> float:
        """Return the error of reusing all steps between ``history[-1]`` and `stop`.

        Args:
            history: computed steps up to the gap, ascending, at least one.
            stop: the next computed step.
        """
        c_N = gap_coefficients(
            history, stop, sigmas=self.sigmas, predictor=predictor, gains=self.gains
        )
        return self._norm(c_N, c_N)

    def plan(self, steps: Sequence[int], predictor: Predictor) -> float:
        """Return the summed error of all gaps of a plan: the errors are taken as independent.

        Args:
            steps: computed steps, ascending, the first and the last one included.
        """
        return sum(self.gap(steps[: i + 1], stop, predictor) for i, stop in enumerate(steps[1:]))

    def best_factor(self, steps: Sequence[int], *, order: int) -> float:
        """Return the factor that makes the summed error of a plan least; 0 where none matters.

        The coefficients of a gap are ``a + f b``, so the error is a parabola in f with its lowest
        point at ``- sum <a, b> / sum <b, b>``.
        """
        above = below = 0.0
        for i, stop in enumerate(steps[1:]):
            a_N, full_N = (
                gap_coefficients(
                    steps[: i + 1],
                    stop,
                    sigmas=self.sigmas,
                    predictor=Predictor(order, factor),
                    gains=self.gains,
                )
                for factor in (0.0, 1.0)
            )
            above -= self._norm(a_N, full_N - a_N)
            below += self._norm(full_N - a_N, full_N - a_N)
        return above / below if below else 0.0

    def _norm(self, left_N: Array, right_N: Array) -> float:
        return float(left_N @ self.gram @ right_N)


def gap_coefficients(
    history: Sequence[int],
    stop: int,
    *,
    sigmas: Array,
    predictor: Predictor,
    gains: Array | None = None,
) -> Array:
    """Return the weight of every velocity in the error that a gap leaves, `[N]`; see the top."""
    c_N = np.zeros(len(sigmas) - 1)
    for step in range(history[-1] + 1, stop):
        size = sigmas[step + 1] - sigmas[step]
        if gains is not None:
            size *= gains[step] ** 0.5
        c_N[step] += size
        for source, weight in predictor.weights(history, step, sigmas=sigmas).items():
            c_N[source] -= size * weight
    return c_N


def interpolated_gains(measured: Mapping[float, float], *, num_steps: int) -> Array:
    """Return the gain of every step, `[N]`, from measured ones: their logarithms between them.

    Args:
        measured: own step, or a place between two, -> gain, above 0.
    """
    places = sorted(measured)
    logs = [np.log(measured[place]) for place in places]
    return np.exp(np.interp(np.arange(num_steps), places, logs))
