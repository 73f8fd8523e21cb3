"""What a chunk gets at a step that is not computed: a stand-in made of results of computed steps.

Each guidance branch has a store of its own. Latents and results have their latent frames on the
first axis: `[F, ...]`; noise levels are `[F]`.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Quantity = Literal["residual", "velocity", "latent_update", "clean"]
"""What is stored of a computed step and put in the place of one that is not:

residual: the change that the blocks made to the tokens; per branch.
velocity: the model's output; per branch.
latent_update: the change that the whole step made to the latent, after guidance. As published for
    MAGI-1: it contains the step size of the step in which it was made.
clean: the clean latent that the velocity points to from the noisy one; the stand-in is the velocity
    that leads from the noisy latent of now to it. After Euler steps that is the held velocity; it
    differs where it is extrapolated, and after steps of a higher order.
"""

MAX_ORDER = 2


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
    history: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def units(self) -> Collection[int]:
        """Return the units that `predict` can be asked for."""
        return self.history.keys()

    def put(self, unit: int, value: Tensor, *, sigma: Tensor) -> None:
        """Store a computed result.

        Args:
            sigma: noise level of each latent frame at that step.
        """
        older = self.history.get(unit, [])[-self.order :] if self.factor else []
        self.history[unit] = [*older, (value, sigma)]

    def predict(self, unit: int, *, sigma: Tensor) -> Tensor:
        """Return the stand-in for the result at noise level `sigma`.

        Example: results 1, 3, 4 at noise 1.0, 0.8, 0.6 and a noise of 0.4. The line through the
        last two gives 5; their parabola bends down and gives 4.
        """
        *older, (last, at) = self.history[unit]
        if not older:
            return last
        middle, between = older[-1]
        moved = last + self.factor * _share(sigma - at, at - between, last) * (last - middle)
        if len(older) == MAX_ORDER:
            first, start = older[0]
            bend = _slope(last - middle, at - between) - _slope(middle - first, between - start)
            is_bent = (at != between) & (between != start)
            width = torch.where(is_bent, at - start, 0.0)
            moved += self.factor * _share((sigma - at) * (sigma - between), width, last) * bend
        return moved

    def drop(self, unit: int) -> None:
        """Forget a unit that is clean."""
        self.history.pop(unit, None)


def clean_estimate(noisy: Tensor, velocity: Tensor, *, sigma: Tensor) -> Tensor:
    """Return the clean latent that a velocity (noise minus data) points to."""
    return noisy - _per_frame(sigma, noisy) * velocity


def velocity_to(clean: Tensor, noisy: Tensor, *, sigma: Tensor) -> Tensor:
    """Return the velocity (noise minus data) that leads to a clean latent; 0 without noise."""
    return _share(torch.ones_like(sigma), sigma, noisy) * (noisy - clean)


def _slope(change: Tensor, span: Tensor) -> Tensor:
    return _share(torch.ones_like(span), span, change) * change


def _share(part: Tensor, whole: Tensor, like: Tensor) -> Tensor:
    """Return part / whole by frame; 0 where the noise level did not change: there is no trend."""
    share = torch.where(whole == 0, 0.0, part / torch.where(whole == 0, 1.0, whole))
    return _per_frame(share, like)


def _per_frame(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
