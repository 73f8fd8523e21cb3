"""The error of reusing results over a gap between computed steps, in closed form.

A chunk's latent moves by ``(sigma_{k+1} - sigma_k) v_k`` in step k (Euler). Where step k is reused,
a prediction from earlier computed steps replaces v_k. Both are linear in the velocities, so the
error of the latent behind a gap is ``sum_n c_n v_n``, and its squared norm ``c^T G c`` with the
Gram matrix ``G_nm = <v_n, v_m>``. What a model makes of an error depends on when it is made: early
ones change what is drawn. A measured gain per step weights the squared error of that step.

Example: noise levels 1.0 0.8 0.5 0.0; step 0 is computed and held in step 1, step 2 is computed.
The error is ``-0.3 (v_1 - v_0)``, so c = (0.3, -0.3, 0); if the velocities are unit vectors at
right angles, c^T G c = 0.18.

A held clean estimate is a held velocity: ``x_1 = x_0 + (s_1 - s_0) v_0`` and ``x_0 - s_0 v_0``
give ``(x_1 - x_0 + s_0 v_0) / s_1 = v_0``. With a trend they differ, and the clean estimate has its
own coefficients, in which the way from one computed step to the next counts as computed.

Where guidance is held, step k runs the conditional pass alone and gets ``v_k' = c_k + (v_a - c_a)``
with its conditional velocity c_k and step a, the last one that ran all passes. So the error is
linear in guided and conditional velocities, and G holds the inner products of both.

Axes: N own steps of a chunk; M the guided velocities of these, or behind them the conditional ones.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from flowcache.predict import MAX_ORDER

Array = npt.NDArray[np.float64]

Predicted = Literal["velocity", "clean"]
"""What is held or extrapolated: the velocity, or the clean estimate; see `flowcache.predict`."""

Point = tuple[int, int]
"""A computed step, and the last one up to it that ran all guidance passes."""

Parabola = tuple[float, float, float]


@dataclass(frozen=True)
class Predictor:
    """What replaces the velocity of a reused step.

    The last computed velocity (or clean estimate), moved by `factor` times what the polynomial of
    degree `order` through the last computed ones, over the noise level, adds to it. Order 0, or
    factor 0, holds the last velocity. A chunk with fewer results uses the degree that they allow.

    Source: TaylorSeer (arXiv 2503.06923) for extrapolated features; `flowcache.predict.ResultStore`
    carries the same rule out.
    """

    order: int = 0
    factor: float = 1.0
    quantity: Predicted = "velocity"

    def __post_init__(self) -> None:
        if not 0 <= self.order <= MAX_ORDER:
            raise ValueError(f"order must be in 0..{MAX_ORDER}, not {self.order}")

    @property
    def num_results(self) -> int:
        """Computed steps from which a prediction is made."""
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
            polynomial = math.prod(
                float((sigmas[step] - sigmas[i]) / (sigmas[j] - sigmas[i])) for i in others
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
        joint: those of the velocities and, behind them, the conditional ones, `[2N, 2N]`; None:
            no step can run the conditional pass alone.
    """

    gram: Array
    sigmas: Array
    gains: Array | None = None
    joint: Array | None = None

    def __post_init__(self) -> None:
        size = len(self.sigmas) - 1
        if self.gram.shape != (size, size):
            raise ValueError(f"{size} steps need a {size} x {size} matrix, not {self.gram.shape}")
        if self.joint is not None and self.joint.shape != (2 * size, 2 * size):
            raise ValueError(f"{size} steps need a joint matrix of {2 * size} x {2 * size}")
        if not (np.diff(self.sigmas) < 0).all():
            raise ValueError("noise levels must fall from step to step")

    @property
    def num_steps(self) -> int:
        return len(self.gram)

    def gap(
        self,
        history: Sequence[int],
        stop: int,
        predictor: Predictor,
        *,
        conditional: Collection[int] = (),
    ) -> float:
        """Return the error of reusing all steps between `history[-1]` and `stop`.

        Args:
            history: computed steps up to the gap, ascending, at least one.
            stop: the next computed step.
            conditional: steps of these that run the conditional pass alone.
        """
        c_M = self._coefficients(points_of(history, conditional), stop, predictor)
        return self._norm(c_M, c_M)

    def _coefficients(self, points: Sequence[Point], stop: int, predictor: Predictor) -> Array:
        return gap_coefficients(
            points, stop, sigmas=self.sigmas, predictor=predictor, gains=self.gains
        )

    def parabola(
        self, points: Sequence[Point], stop: int, *, order: int, quantity: Predicted
    ) -> Parabola:
        """Return p, q, r of the error of a gap, ``p + 2 q f + r f^2`` with the factor f.

        The coefficients of a gap are ``a + f b``.
        """
        a_M, full_M = (
            self._coefficients(points, stop, Predictor(order, factor, quantity))
            for factor in (0.0, 1.0)
        )
        b_M = full_M - a_M
        return self._norm(a_M, a_M), self._norm(a_M, b_M), self._norm(b_M, b_M)

    def plan(
        self, steps: Sequence[int], predictor: Predictor, *, conditional: Collection[int] = ()
    ) -> float:
        """Return the summed error of all gaps of a plan: the errors are taken as independent.

        Args:
            steps: computed steps, ascending, the first and the last one included.
            conditional: steps of these that run the conditional pass alone; not the first or last.
        """
        return sum(
            self.gap(steps[: i + 1], stop, predictor, conditional=conditional)
            for i, stop in enumerate(steps[1:])
        )

    def best_factor(
        self,
        steps: Sequence[int],
        *,
        order: int,
        quantity: Predicted = "velocity",
        conditional: Collection[int] = (),
    ) -> float:
        """Return the factor that makes the summed error of a plan least; 0 where none matters."""
        points = points_of(steps, conditional)
        gaps = [
            self.parabola(points[: i + 1], stop, order=order, quantity=quantity)
            for i, stop in enumerate(steps[1:])
        ]
        below = sum(r for _, _, r in gaps)
        return -sum(q for _, q, _ in gaps) / below if below else 0.0

    def _norm(self, left_M: Array, right_M: Array) -> float:
        gram = self.gram if len(left_M) == self.num_steps else self.joint
        if gram is None:
            raise ValueError("plans with conditional steps need the joint matrix")
        return float(left_M @ gram @ right_M)


def points_of(history: Sequence[int], conditional: Collection[int] = ()) -> list[Point]:
    points: list[Point] = []
    for step in history:
        points.append((step, points[-1][1] if step in conditional else step))
    return points


def gap_coefficients(
    points: Sequence[Point],
    stop: int,
    *,
    sigmas: Array,
    predictor: Predictor,
    gains: Array | None = None,
) -> Array:
    """Return the weight of every velocity in the error that a gap leaves; see the top.

    Returns:
        `[N]`; if a step that matters ran the conditional pass alone, `[2N]`: those of the guided
        velocities and of the conditional ones.
    """
    num_steps, start = len(sigmas) - 1, points[-1][0]
    points = points[-predictor.num_results :]
    sources = [step for step, _ in points]
    basis = [_result(point, num_steps=num_steps) for point in points]
    if predictor.quantity == "clean":
        estimates = [
            _clean_estimate(result_M, step, start=start, sigmas=sigmas)
            for result_M, step in zip(basis, sources, strict=True)
        ]
        basis = [*estimates, basis[-1]]
    # what is added up are the shares of the basis, of which the last result is the last one
    stand_in = [float(vector is basis[-1]) for vector in basis]
    moved, total = [0.0] * len(basis), [0.0] * len(basis)
    c_M = np.zeros(2 * num_steps)
    for step in range(start, stop):
        if step > start:
            stand_in = list(predictor.weights(sources, step, sigmas=sigmas).values())
            if predictor.quantity == "clean":
                level = float(sigmas[step])
                stand_in = [(m - w) / level for m, w in zip(moved, [*stand_in, 0.0], strict=True)]
        size = float(sigmas[step + 1] - sigmas[step])
        weight = size * (1.0 if gains is None else float(gains[step]) ** 0.5)
        moved = [m + size * share for m, share in zip(moved, stand_in, strict=True)]
        total = [t + weight * share for t, share in zip(total, stand_in, strict=True)]
        c_M[step] += weight
    for share, vector_M in zip(total, basis, strict=True):
        c_M -= share * vector_M
    return c_M if any(step != anchor for step, anchor in points) else c_M[:num_steps]


def _result(point: Point, *, num_steps: int) -> Array:
    """Return the velocity that a computed step gives, `[2N]`: its own, or with an older part."""
    step, anchor = point
    result_M = np.zeros(2 * num_steps)
    result_M[anchor] = 1.0
    if step != anchor:
        result_M[num_steps + step] = 1.0
        result_M[num_steps + anchor] = -1.0
    return result_M


def _clean_estimate(result_M: Array, step: int, *, start: int, sigmas: Array) -> Array:
    """Return the clean latent that a result points to, seen from the latent at step `start`."""
    estimate_M = -sigmas[step] * result_M
    estimate_M[step:start] -= np.diff(sigmas)[step:start]
    return estimate_M


def interpolated_gains(measured: Mapping[float, float], *, num_steps: int) -> Array:
    """Return the gain of every step, `[N]`, from measured ones: their logarithms between them.

    Args:
        measured: own step, or a place between two, -> gain, above 0.
    """
    places = sorted(measured)
    logs = [np.log(measured[place]) for place in places]
    return np.exp(np.interp(np.arange(num_steps), places, logs))
