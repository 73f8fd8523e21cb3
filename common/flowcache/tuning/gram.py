"""Record what planning needs of a model: inner products of a chunk's velocities in its steps.

    collector = GramCollector(30, ["cond", "uncond"])
    ... in every branch at every computed step ...
    collector.observe(segment=0, tick=7, chunk=1, step=2, branch="cond", velocity=v, sigma=s)
    calibration = collector.finish()
    model = calibration.error_model({"cond": 4.0, "uncond": -3.0})

The velocities of a chunk are held only while it is active, as they are or as a random sketch of
fixed width. Every step must be computed while this is recorded.

Axes: N own steps, M = branches x N, the steps of the first branch first.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.files import ARRAY_ERRORS
from flowcache.tuning.gap import Array, ErrorModel

BAND_MARGIN = 0.1
"""Share by which the calibrated band of distances is widened on both sides: few clips are seen."""
OLDEST_RESULT = 8
"""Steps between a computed step and the last one for which the risk of its reuse is kept."""
EXPONENTS = np.linspace(0.25, 8, 32)
"""Among which the one of the growth of changes is sought."""
SKETCHING_BYTES = 8 + 4 + 2 * 4
"""Per element of a velocity that is sketched: its place (int64) and its sign, and the element in
float32 before and after the sign."""


@dataclass(frozen=True)
class Sketch:
    """A random linear map to `width` numbers that keeps inner products on average.

    Every element goes, with a random sign, to a random place. The squared norm of a sketch has a
    relative standard deviation of about ``sqrt(2 / width)``; the map is linear, so this holds for
    differences of velocities, too.

    Source: Charikar, Chen, Farach-Colton 2002 (count sketch); Weinberger et al. 2009
    (arXiv 0902.2206), the same for inner products.
    """

    width: int
    seed: int
    _maps: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, Any], init=False)

    def __call__(self, values: Tensor) -> Tensor:
        """Return the sketch of a flat tensor, float32 `[width]`."""
        places, signs = self._map(values)
        result = torch.zeros(self.width, device=values.device)
        return result.index_add_(0, places, values.float() * signs)

    def _map(self, values: Tensor) -> tuple[Tensor, Tensor]:
        size = values.numel()
        if size not in self._maps:
            # drawn on the CPU, so that a seed means the same everywhere
            generator = torch.Generator().manual_seed(self.seed)
            places = torch.randint(self.width, (size,), generator=generator)
            signs = torch.randint(2, (size,), generator=generator).float() * 2 - 1
            self._maps[size] = (places.to(values.device), signs.to(values.device))
        return self._maps[size]


@dataclass(frozen=True)
class Calibration:
    """Mean inner products of a model's velocities, by chunk position.

    Attributes:
        sigmas: noise level of each step and the last one, `[N + 1]`.
        branches: guidance passes, in the order of the matrix.
        gram: chunk -> mean inner products per element of the latent, `[M, M]`.
        num_clips: chunk -> clips in the mean.
    """

    sigmas: Array
    branches: tuple[str, ...]
    gram: Mapping[int, Array]
    num_clips: Mapping[int, int]

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def error_model(
        self, weights: Mapping[str, float], *, conditional: str | None = None
    ) -> ErrorModel:
        """Return the errors of a weighted sum of the branches, on average over chunk positions.

        Args:
            weights: branch -> weight, as in cond 4, uncond -3 for guidance 4.
            conditional: branch that may be computed alone; None: none.
        """
        assert set(weights) == set(self.branches)
        weight_B = np.array([weights[name] for name in self.branches])
        shape = (len(self.branches), self.num_steps) * 2
        guided = [
            np.einsum("anbm,a,b->nm", gram_MM.reshape(shape), weight_B, weight_B)
            for gram_MM in self.gram.values()
        ]
        gram_NN = np.mean(guided, axis=0)
        if conditional is None:
            return ErrorModel(gram_NN, self.sigmas)
        both_KB = np.array([weight_B, [float(name == conditional) for name in self.branches]])
        joint_2N_M = np.kron(both_KB, np.eye(self.num_steps))
        gram_MM = np.mean(list(self.gram.values()), axis=0)
        return ErrorModel(gram_NN, self.sigmas, joint=joint_2N_M @ gram_MM @ joint_2N_M.T)

    def save(self, path: Path) -> None:
        """Write it as .npz."""
        chunks = sorted(self.gram)
        arrays: dict[str, Any] = {
            "sigmas": self.sigmas,
            "branches": np.array(self.branches),
            "chunks": np.array(chunks),
            "num_clips": np.array([self.num_clips[chunk] for chunk in chunks]),
            "gram": np.stack([self.gram[chunk] for chunk in chunks]),
        }
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what `save` wrote."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                chunks: list[int] = stored["chunks"].tolist()
                return cls(
                    sigmas=stored["sigmas"],
                    branches=tuple(stored["branches"].tolist()),
                    gram=dict(zip(chunks, stored["gram"], strict=True)),
                    num_clips=dict(zip(chunks, stored["num_clips"].tolist(), strict=True)),
                )
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except ARRAY_ERRORS:
            raise UserError(f"{path} is no calibration, or damaged: calibrate again") from None


@dataclass
class _Active:
    """A chunk that is being denoised: what was seen of it so far."""

    gram: Array
    held: dict[int, Tensor] = field(default_factory=dict)
    """Row of the matrix -> velocity, or its sketch."""


class GramCollector:
    """Watches clips being made; see the top of the file.

    Args:
        num_steps: own steps of a chunk; the noise level behind the last one is 0.
        branches: guidance passes.
        sketch: what is held of a velocity; None: all of it.
    """

    def __init__(
        self, num_steps: int, branches: Collection[str], *, sketch: Sketch | None = None
    ) -> None:
        self.num_steps, self.branches, self.sketch = num_steps, tuple(branches), sketch
        self._active: dict[tuple[int, int], _Active] = {}
        self._sigmas: dict[int, float] = {}
        self._sums: dict[int, Array] = {}
        self._num_clips: dict[int, int] = {}

    def observe(
        self,
        *,
        segment: int,
        tick: int,
        chunk: int,
        step: int,
        branch: str,
        velocity: Tensor,
        sigma: float,
    ) -> None:
        """Take in a chunk's velocity of any shape; a branch not asked for is passed over."""
        if branch not in self.branches:
            return
        active = self._active.setdefault((segment, chunk), _Active(self._zeros()))
        flat = velocity.detach().flatten()
        kept = flat.float() if self.sketch is None else self.sketch(flat)
        row = self.branches.index(branch) * self.num_steps + step
        active.held[row] = kept
        # what counts later is the small difference of large products: float32 sums would lose it
        exact = kept.double()
        sums = torch.stack([torch.dot(other.double(), exact) for other in active.held.values()])
        rows = list(active.held)
        active.gram[row, rows] = active.gram[rows, row] = sums.cpu() / flat.numel()
        self._sigmas[step] = sigma
        if len(rows) == len(active.gram):
            self._sums[chunk] = self._sums.get(chunk, self._zeros()) + active.gram
            self._num_clips[chunk] = self._num_clips.get(chunk, 0) + 1
            del self._active[segment, chunk]

    def finish(self) -> Calibration:
        """Return the means; every chunk must have been observed in all its steps and branches."""
        if self._active or not self._sums:
            missing = sorted(self._active) or "no chunk"
            raise ValueError(f"every step of a chunk must be observed; incomplete: {missing}")
        sigmas = [*(self._sigmas[step] for step in range(self.num_steps)), 0.0]
        return Calibration(
            sigmas=np.array(sigmas),
            branches=self.branches,
            gram={chunk: self._sums[chunk] / n for chunk, n in sorted(self._num_clips.items())},
            num_clips=dict(self._num_clips),
        )

    def _zeros(self) -> Array:
        size = len(self.branches) * self.num_steps
        return np.zeros((size, size))


def merge(calibrations: Sequence[Calibration]) -> Calibration:
    """Return the means over the clips of several calibrations of one model."""
    first = calibrations[0]
    gram: dict[int, Array] = {}
    num_clips: dict[int, int] = {}
    for each in calibrations:
        if each.branches != first.branches or not np.array_equal(each.sigmas, first.sigmas):
            raise ValueError("calibrations with other branches or noise levels cannot be merged")
        for chunk, count in each.num_clips.items():
            gram[chunk] = gram.get(chunk, 0.0) + count * each.gram[chunk]
            num_clips[chunk] = num_clips.get(chunk, 0) + count
    means = {chunk: gram[chunk] / num_clips[chunk] for chunk in sorted(gram)}
    return Calibration(first.sigmas, first.branches, means, num_clips)


def calibration_bytes(
    *, num_elements: int, num_steps: int, num_branches: int, num_active: int, width: int | None
) -> int:
    """Return the most memory that collecting needs in addition to the run itself.

    Args:
        num_elements: numbers in the latent of a chunk.
        num_active: chunks that are active at once.
        width: of the sketch; None: velocities are held as they are.
    """
    held, rows = num_elements if width is None else width, num_steps * num_branches
    velocities = num_active * rows * held * 4
    doubles = 2 * held * 8
    sketching = 0 if width is None else num_elements * SKETCHING_BYTES
    return velocities + doubles + sketching + num_active * rows**2 * 8


def distance_band(
    distances: Iterable[tuple[int, float]], *, num_steps: int, margin: float = BAND_MARGIN
) -> tuple[list[float], list[float]]:
    """Return the least and the largest distance seen at each own step, widened by `margin`.

    Args:
        distances: (own step, distance to the previous tick), in any order. The first step has
            none: its band is 0, 0 and never asked for.
    """
    seen: dict[int, list[float]] = {}
    for step, distance in distances:
        seen.setdefault(step, []).append(distance)
    missing = set(range(1, num_steps)) - set(seen)
    if missing:
        raise ValueError(f"no distance was measured at own step {min(missing)}")
    low = [0.0, *(min(seen[step]) * (1 - margin) for step in range(1, num_steps))]
    high = [0.0, *(max(seen[step]) * (1 + margin) for step in range(1, num_steps))]
    return low, high


def magnitude_ratios(gram_NN: Array) -> list[float]:
    """Return |v_k| / |v_{k-1}| for every own step, root mean squares; 1 for the first step."""
    norm_N = np.sqrt(np.diag(gram_NN))
    return [1.0, *(norm_N[1:] / norm_N[:-1]).tolist()]


def guidance_risks(gram_NN: Array, gains_N: Array) -> list[list[float]]:
    """Return the risk ``g_b r_g`` of reusing at own step b a result that is 1, 2, ... steps old.

    With guidance s, ``r_g^2 = (1-s)^2 r_u^2 + s^2 r_c^2 + 2 s (1-s) rho r_u r_c``, where r_u and
    r_c are the changes of the branches between two steps and rho is their cosine: the squared
    change of the guided velocity, which its Gram matrix has without taking the branches apart.

    Example with s = 3: both branches change by 1, at a cosine of 0.5. The guided velocity changes
    by the square root of 4 + 9 - 6 = 7.

    Args:
        gram_NN: inner products of the guided velocity.
        gains_N: growth g, see `propagation_gains`.

    Source: RA-CFGCache (arXiv 2609.36433); r_u and r_c are those of the calibration clips here.
    """
    square_N = np.diag(gram_NN)
    change_NN = np.sqrt(np.maximum(square_N[:, None] + square_N - 2 * gram_NN, 0))
    return [
        [
            float(gains_N[b] * change_NN[b, a])
            for a in range(b - 1, max(b - 1 - OLDEST_RESULT, -1), -1)
        ]
        for b in range(len(gram_NN))
    ]


def propagation_gains(growth_N: Array) -> Array:
    """Return ``scale ((N - k) / N)^a + floor`` of every step, fitted to a measured growth.

    Args:
        growth_N: error of the finished clip over the change of the velocity that step k makes.

    Source: as above.
    """
    left_N = 1 - np.arange(len(growth_N)) / len(growth_N)
    fits: list[tuple[float, Array]] = []
    for exponent in EXPONENTS:
        basis_N2 = np.stack([left_N**exponent, np.ones_like(left_N)], axis=1)
        weights_2, error = nnls(basis_N2, growth_N)
        fits.append((float(error), basis_N2 @ weights_2))
    return min(fits, key=lambda fit: fit[0])[1]
