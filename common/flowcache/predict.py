"""What a chunk gets at a step that is not computed: a prediction from results of computed steps.

Each guidance branch has a store of its own. Latents and results have their latent frames on the
first axis: `[F, ...]`; noise levels are `[F]`.

To add a predictor that works on a branch's velocities: write its two functions and list it in
`PREDICTORS`. Those of other levels need a place in the sampler of each model as well.

In computed steps, too, guidance may be predicted: `HeldGuidance`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from flowcache.bounds import OneOf

if TYPE_CHECKING:
    from torch import Tensor

MAX_ORDER = 2


Level: TypeAlias = Literal["tokens", "velocity", "step"]
"""tokens: what the blocks change, by branch. velocity: what the model puts out, by branch.
step: what a whole step changes in the latent, after guidance."""


@dataclass(frozen=True)
class Predictor:
    """What is stored of a computed step and replaces the result of one that is not."""

    level: Level
    stored: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda velocity, _noisy, _sigma: velocity
    """At level velocity: `(velocity, noisy latent, sigma)` -> what is stored."""
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda stored, _noisy, _sigma: stored
    """At level velocity: `(what was stored, noisy latent of now, sigma of now)` -> velocity."""


PREDICTORS: Mapping[str, Predictor] = MappingProxyType(
    {
        # as published for SkyReels-V2
        "residual": Predictor("tokens"),
        "velocity": Predictor("velocity"),
        # as published for MAGI-1: it contains the step size of the step in which it was made
        "latent_update": Predictor("step"),
        # the velocity that leads to the clean latent that the stored one pointed to: after Euler
        # steps the held velocity; it differs where it is extrapolated and after higher orders
        "clean": Predictor(
            "velocity",
            stored=lambda velocity, noisy, sigma: clean_estimate(noisy, velocity, sigma=sigma),
            velocity=lambda stored, noisy, sigma: velocity_to(stored, noisy, sigma=sigma),
        ),
    }
)
"""What `reuse.predict` names."""

Quantity: TypeAlias = Annotated[str, OneOf(tuple(PREDICTORS))]


@dataclass
class ResultStore:
    """The last results of computed steps, by unit: a chunk, or the whole window.

    A prediction is the last result, moved on by `factor` times what the polynomial of degree
    `order` through the last results, over the noise level, adds to it: factor 0 holds it, 1 follows
    the polynomial. As long as there are fewer results the degree is lower.

    Source: TaylorSeer (arXiv 2503.06923), with results at uneven steps (Newton's polynomial).
    """

    factor: float = 0.0
    order: int = 1
    is_forecasting: bool = False
    """Whether `forecasts` is asked for, which takes more results than a prediction may."""
    history: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @property
    def most_results(self) -> int:
        """The most results that are kept of a unit."""
        return MAX_ORDER + 1 if self.is_forecasting else self._num_used

    @property
    def _num_used(self) -> int:
        """The most results that a prediction is made from."""
        return 1 + self.order if self.factor else 1

    def units(self) -> Collection[int]:
        """Return the units that `predict` can be asked for."""
        return self.history.keys()

    def put(self, unit: int, value: Tensor, *, sigma: Tensor, where: Tensor | None = None) -> None:
        """Store a result computed at noise level `sigma`.

        Args:
            where: which elements were computed, bool, broadcast to `value`; the others keep the
                results that they have. None: all.
        """
        known, at = self.history.get(unit, []), _per_frame(sigma, value)
        results = [*known, (value, at)][-self.most_results :]
        if where is not None:
            kept = known[-len(results) :]
            kept = [kept[0]] * (len(results) - len(kept)) + kept  # twice the same: no trend
            results = [
                (new.where(where, old), level.where(where, before))
                for (new, level), (old, before) in zip(results, kept, strict=True)
            ]
        self.history[unit] = results

    def predict(self, unit: int, *, sigma: Tensor) -> Tensor:
        """Predict the result at noise level `sigma`.

        Example: results 1, 3, 4 at noise 1.0, 0.8, 0.6 and a noise of 0.4. The line through the
        last two gives 5; their parabola bends down and gives 4.
        """
        results = self.history[unit][-self._num_used :]
        return _moved_on(results, sigma=sigma, factor=self.factor)

    def forecasts(self, sigmas: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return what the line and the parabola forecast for each unit, `[2, F, ...]`.

        Those without three results are left out.

        Args:
            sigmas: unit -> noise levels now.
        """
        import torch

        made: dict[int, Tensor] = {}
        for unit, sigma in sigmas.items():
            results = self.history.get(unit, [])
            if len(results) > MAX_ORDER:
                each = [_moved_on(known, sigma=sigma) for known in (results[-2:], results)]
                made[unit] = torch.stack(each)
        return made

    def drop(self, unit: int) -> None:
        """Forget a unit that is clean."""
        self.history.pop(unit, None)


def _moved_on(
    results: Sequence[tuple[Tensor, Tensor]], *, sigma: Tensor, factor: float = 1.0
) -> Tensor:
    """Return the last result plus `factor` times what the polynomial through all adds to it."""
    *older, (last, at) = results
    if not older:
        return last
    sigma = _per_frame(sigma, last)
    middle, between = older[-1]
    moved = last + factor * _share(sigma - at, at - between, last) * (last - middle)
    if len(older) == MAX_ORDER:
        first, start = older[0]
        bend = _slope(last - middle, at - between) - _slope(middle - first, between - start)
        is_bent = (at != between) & (between != start)
        width = (at - start).where(is_bent, 0.0)
        moved += factor * _share((sigma - at) * (sigma - between), width, last) * bend
    return moved


def clean_estimate(noisy: Tensor, velocity: Tensor, *, sigma: Tensor) -> Tensor:
    """Return the clean latent that a velocity (noise minus data) points to."""
    return noisy - _per_frame(sigma, noisy) * velocity


def velocity_to(clean: Tensor, noisy: Tensor, *, sigma: Tensor) -> Tensor:
    """Return the velocity (noise minus data) that leads to a clean latent; 0 without noise."""
    return _slope(noisy - clean, sigma)


def _slope(change: Tensor, span: Tensor) -> Tensor:
    return _share(span.new_ones(span.shape), span, change) * change


def _share(part: Tensor, whole: Tensor, like: Tensor) -> Tensor:
    """Return part / whole; 0 where the noise level did not change: there is no trend."""
    share = (part / whole.where(whole != 0, 1.0)).where(whole != 0, 0.0)
    return _per_frame(share, like)


def _per_frame(values: Tensor, like: Tensor) -> Tensor:
    """Give `[F]` the axes of `like`; what has them already, levels of single elements, has."""
    return values if values.ndim == like.ndim else values.view(-1, *[1] * (like.ndim - 1))


# Held guidance ------------------------------------------------------------------------------------


@dataclass
class _Held:
    difference: Tensor
    scales: tuple[float, ...]
    num_uses: int = 0


@dataclass
class HeldGuidance:
    """Which computed steps run the conditional pass alone, and what replaces the others.

    What the other passes add to the conditional velocity is a difference, as uncond - cond. It is
    kept from the last step that computed all passes, and added to the conditional velocity of the
    steps that compute that pass only. The last own step computes all passes, and so does a step
    without a difference of its scales.

    Example with `every=3` and own steps 0 1 2 4 5 7 of 8 computed: steps 0, 4 and 7 (the last one)
    compute all passes, steps 1, 2 and 5 the conditional one.

    Source: FasterCache (arXiv 2410.19355), without its correction by frequency.
    """

    steps: Collection[int] | None = None
    """Own steps that run all passes if they are computed; None: every one."""
    every: int = 1
    """Of a chunk's computed steps in a row, the first of so many runs all passes."""
    differences: dict[int, _Held] = field(default_factory=dict)

    @property
    def is_on(self) -> bool:
        """Whether any difference is ever held."""
        return self.steps is not None or self.every > 1

    def is_held(
        self, chunk: int, step: int, *, num_steps: int, scales: tuple[float, ...] = ()
    ) -> bool:
        """Return whether a chunk's own step, if computed, runs the conditional pass alone.

        Args:
            scales: of the guidance in this step; a difference made with others is not held.
        """
        held = self.differences.get(chunk)
        if held is None or step == num_steps - 1 or held.scales != scales:
            return False
        if self.steps is not None:
            return step not in self.steps
        return held.num_uses + 1 < self.every

    def put(self, chunk: int, difference: Tensor, *, scales: tuple[float, ...] = ()) -> None:
        """Keep the difference of a step that ran all passes."""
        if self.is_on:
            self.differences[chunk] = _Held(difference, scales)

    def take(self, chunk: int) -> Tensor:
        """Return the difference that replaces a step's other passes."""
        held = self.differences[chunk]
        held.num_uses += 1
        return held.difference

    def drop(self, chunk: int) -> None:
        """Forget a chunk that is clean."""
        self.differences.pop(chunk, None)
