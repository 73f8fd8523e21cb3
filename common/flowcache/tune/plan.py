"""The best plan for every number of computed steps, by a dynamic programme.

A plan is a list of own steps that are computed. What a gap costs depends on the computed steps that
its prediction looks back on: one with a held velocity, two with linear extrapolation. So the state
of the programme is the tuple of the last computed steps, and it finds the exact minimum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from flowcache.errors import UserError
from flowcache.tune.gap import ErrorModel, Predictor

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Factors that plans are made with before each plan's own is fitted."""

_Steps = tuple[int, ...]
_Partial = tuple[float, _Steps]
"""Error so far, and the steps computed so far."""


@dataclass(frozen=True)
class Constraints:
    """What a plan must respect. The first and the last own step are always computed."""

    warmup_steps: int = 1
    """First own steps that are computed, at least 1."""
    final_steps: int = 1
    """Last own steps that are computed, at least 1."""
    most_reuses: int = 8
    """Reused steps in a row."""

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "final_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.most_reuses < 0:
            raise UserError(f"most_reuses must be 0 or more, not {self.most_reuses}")

    def forced(self, num_steps: int) -> list[int]:
        """Return the steps that every plan computes."""
        first = range(min(self.warmup_steps, num_steps))
        last = range(max(num_steps - self.final_steps, 0), num_steps)
        return sorted({*first, *last})

    def allow(self, steps: Sequence[int], *, num_steps: int) -> bool:
        """Return whether a plan keeps to them."""
        gaps = [after - before - 1 for before, after in pairwise(steps)]
        return set(self.forced(num_steps)) <= set(steps) and all(
            gap <= self.most_reuses for gap in gaps
        )


@dataclass(frozen=True)
class Plan:
    """Which own steps are computed, and what the others get."""

    steps: tuple[int, ...]
    predictor: Predictor
    error: float
    """Predicted squared error of the latent, in the unit of the Gram matrix."""

    @property
    def num_computed(self) -> int:
        return len(self.steps)


def best_plans(
    model: ErrorModel, predictor: Predictor, *, constraints: Constraints
) -> dict[int, Plan]:
    """Return the plan with the least summed error for every possible number of computed steps."""
    num_steps, forced = model.num_steps, set(constraints.forced(model.num_steps))

    @cache
    def gap(history: _Steps, stop: int) -> float:
        return model.gap(history, stop, predictor)

    def nexts(step: int) -> range:
        """Return the steps that may be computed next."""
        stop = min(step + constraints.most_reuses + 2, num_steps)
        return range(step + 1, min([stop, *(f + 1 for f in forced if f > step)]))

    found: dict[int, Plan] = {}
    layer: dict[_Steps, _Partial] = {(0,): (0.0, (0,))}
    while layer:
        ends = [partial for partial in layer.values() if partial[1][-1] == num_steps - 1]
        if ends:
            error, steps = min(ends)
            found[len(steps)] = Plan(steps, predictor, error)
        longer: dict[_Steps, _Partial] = {}
        for history, (error, steps) in layer.items():
            for step in nexts(steps[-1]):
                candidate = (error + gap(history, step), (*steps, step))
                key = candidate[1][-predictor.num_results :]
                longer[key] = min(longer.get(key, candidate), candidate)
        layer = longer
    return found


def fitted_plans(model: ErrorModel, *, order: int, constraints: Constraints) -> dict[int, Plan]:
    """Return the best plan and predictor factor for every possible number of computed steps.

    Plans are made with each of `FACTORS`; then each plan gets the factor that suits it best, in
    closed form.
    """
    if order == 0:
        return best_plans(model, Predictor(0), constraints=constraints)
    best: dict[int, Plan] = {}
    for factor in FACTORS:
        plans = best_plans(model, Predictor(order, factor), constraints=constraints)
        for count, plan in plans.items():
            fitted = with_best_factor(model, plan)
            if count not in best or fitted.error < best[count].error:
                best[count] = fitted
    return best


def with_best_factor(model: ErrorModel, plan: Plan) -> Plan:
    """Return the same steps with the factor that suits them best."""
    order = plan.predictor.order
    predictor = Predictor(order, model.best_factor(plan.steps, order=order))
    return Plan(plan.steps, predictor, model.plan(plan.steps, predictor))
