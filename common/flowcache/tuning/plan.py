"""The best plan for every cost, by a dynamic programme; its forecast; the one that meets a target.

A plan is a list of own steps that are computed, some of them perhaps with the conditional pass
alone. What a gap costs depends on the computed steps that its prediction looks back on: one with a
held velocity, two with linear extrapolation; and on the step whose guidance is held. So the state
of the programme is the tuple of the last computed points, and it finds the exact minimum.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import Literal, cast, get_args

import numpy as np

from flowcache.errors import UserError
from flowcache.runtime.metrics import PIXEL_MAX
from flowcache.tuning.gap import Array, ErrorModel, Parabola, Point, Predicted, Predictor

FACTORS = {0: (0.0,), 1: (0.25, 0.5, 0.75, 1.0), 2: (0.5, 1.0)}
"""Factors, by order, that plans are made with before each plan's own is fitted."""

QUANTITIES: tuple[Predicted, ...] = ("velocity", "clean")

_Points = tuple[Point, ...]
_Partial = tuple[float, _Points]
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

    def fewest(self, num_steps: int) -> int:
        """Return how many steps a plan computes at least.

        Example: 30 steps, at most 8 reuses in a row: 0, 9, 18, 27 and 29 are 5.
        """
        forced = self.forced(num_steps)
        gaps = (after - before for before, after in pairwise(forced))
        return len(forced) + sum(-(-gap // (self.most_reuses + 1)) - 1 for gap in gaps)

    def allow(self, steps: Sequence[int], *, num_steps: int) -> bool:
        """Return whether a plan keeps to them."""
        reuses = [after - before - 1 for before, after in pairwise(steps)]
        has_forced = set(self.forced(num_steps)) <= set(steps)
        return has_forced and max(reuses, default=0) <= self.most_reuses


@dataclass(frozen=True)
class Plan:
    """Which own steps are computed, and what the others get."""

    steps: tuple[int, ...]
    predictor: Predictor
    error: float
    """Predicted squared error of the latent, in the unit of the Gram matrix."""
    conditional: tuple[int, ...] = ()
    """Computed steps that run the conditional pass alone."""
    num_passes: int = 1
    """Guidance passes of the other computed steps."""

    @property
    def num_computed(self) -> int:
        return len(self.steps)

    @property
    def cost(self) -> float:
        """Cost in steps that run all passes; every pass costs the same."""
        return len(self.steps) - len(self.conditional) * (1 - 1 / self.num_passes)


@dataclass(frozen=True)
class _Gaps:
    """Errors of gaps as parabolas of the predictor's factor; each is computed once."""

    model: ErrorModel
    order: int
    quantity: Predicted
    _known: dict[tuple[_Points, int], Parabola] = field(
        default_factory=dict[tuple[_Points, int], Parabola], init=False
    )

    def error(self, points: _Points, stop: int, factor: float) -> float:
        key = points, stop
        if key not in self._known:
            self._known[key] = self.model.parabola(
                points, stop, order=self.order, quantity=self.quantity
            )
        p, q, r = self._known[key]
        return p + factor * (2 * q + factor * r)


def best_plans(
    model: ErrorModel,
    predictor: Predictor,
    *,
    constraints: Constraints,
    num_passes: int = 1,
    known: _Gaps | None = None,
) -> dict[float, Plan]:
    """Return the plan with the least summed error for every possible cost.

    Partial plans are extended step by step, cheapest first.

    Args:
        num_passes: guidance passes; with two or more, computed steps may run the conditional one
            alone, at its share of the cost, as long as the step whose difference they hold is not
            more than `constraints.most_reuses` steps back.
        known: errors of gaps with other factors.

    Returns:
        cost in steps that run all passes -> plan; with one pass, by the number of computed steps.
    """
    gaps = known or _Gaps(model, predictor.order, predictor.quantity)
    num_steps = model.num_steps
    forced = set(constraints.forced(num_steps))

    def nexts(last: Point) -> Iterator[tuple[Point, int]]:
        """Yield the points that may come next, each with what its step costs."""
        stop = min(last[0] + constraints.most_reuses + 2, num_steps)
        for step in range(last[0] + 1, min([stop, *(f + 1 for f in forced if f > last[0])])):
            yield (step, step), num_passes
            is_near = step - last[1] <= constraints.most_reuses
            if num_passes > 1 and step not in forced and is_near:
                yield (step, last[1]), 1

    found: dict[float, Plan] = {}
    layers: dict[int, dict[_Points, _Partial]] = {num_passes: {((0, 0),): (0.0, ((0, 0),))}}
    while layers:
        cost = min(layers)
        layer = layers.pop(cost)
        ends = [partial for partial in layer.values() if partial[1][-1][0] == num_steps - 1]
        if ends:
            error, points = min(ends)
            steps = tuple(step for step, _ in points)
            conditional = tuple(step for step, anchor in points if step != anchor)
            found[cost / num_passes] = Plan(steps, predictor, error, conditional, num_passes)
        for key, (error, points) in layer.items():
            for point, price in nexts(points[-1]):
                candidate = (error + gaps.error(key, point[0], predictor.factor), (*points, point))
                own = candidate[1][-predictor.num_results :]
                longer = layers.setdefault(cost + price, {})
                longer[own] = min(longer.get(own, candidate), candidate)
    return found


def fitted_plans(
    model: ErrorModel,
    *,
    order: int,
    constraints: Constraints,
    quantity: Predicted = "velocity",
    num_passes: int = 1,
) -> dict[float, Plan]:
    """Return the best plan and predictor factor for every possible cost; see `best_plans`.

    Plans are made with each of `FACTORS`; then each plan gets the factor that suits it best, in
    closed form.
    """
    gaps = _Gaps(model, order, quantity)
    best: dict[float, Plan] = {}
    for factor in FACTORS[order]:
        predictor = Predictor(order, factor, quantity)
        plans = best_plans(
            model, predictor, constraints=constraints, num_passes=num_passes, known=gaps
        )
        for cost, plan in plans.items():
            fitted = with_best_factor(model, plan) if order else plan
            if cost not in best or fitted.error < best[cost].error:
                best[cost] = fitted
    return best


def least_error_plans(
    model: ErrorModel, *, constraints: Constraints, num_passes: int = 1
) -> dict[float, Plan]:
    """Return for every possible cost the plan whose error is the least with any predictor.

    Orders 0 to 2, of the velocity and of the clean estimate (which are the same where they are
    held); plans that hold guidance only look back on two results, which bounds the search.
    """
    best = fitted_plans(model, order=0, constraints=constraints, num_passes=num_passes)
    for order, quantity in product((1, 2), QUANTITIES):
        plans = fitted_plans(
            model,
            order=order,
            constraints=constraints,
            quantity=quantity,
            num_passes=num_passes if order == 1 else 1,
        )
        for cost, plan in plans.items():
            if cost not in best or plan.error < best[cost].error:
                best[cost] = plan
    return dict(sorted(best.items()))


def with_best_factor(model: ErrorModel, plan: Plan) -> Plan:
    """Return the same steps with the factor that suits them best."""
    order, quantity, conditional = plan.predictor.order, plan.predictor.quantity, plan.conditional
    factor = model.best_factor(plan.steps, order=order, quantity=quantity, conditional=conditional)
    predictor = Predictor(order, factor, quantity)
    error = model.plan(plan.steps, predictor, conditional=conditional)
    return replace(plan, predictor=predictor, error=error)


# What a plan costs, and which one meets a target ------------------------------------------------

TargetName = Literal["speedup", "flops", "psnr", "seconds"]
EXAMPLES = {"speedup": 3, "flops": 0.35, "psnr": 32, "seconds": 60}


@dataclass(frozen=True)
class Target:
    """What a user asks for.

    speedup: at least so many times faster than with every step computed; flops: at most this share
    of the FLOPs with every step computed; psnr: at least so many dB against the same run with every
    step computed; seconds: at most so many seconds in the transformer.
    """

    name: TargetName
    value: float

    def is_met(self, forecast: "Forecast") -> bool:
        """Return whether a forecast is good enough."""
        found = getattr(forecast, self.name)
        return found >= self.value if self.name in ("speedup", "psnr") else found <= self.value


@dataclass(frozen=True)
class Forecast:
    """What is expected of a run that computes some of the own steps of every chunk."""

    cost: float
    """Computed steps; one that runs fewer passes counts by its share."""
    speedup: float
    flops: float
    """Share of the FLOPs with every step computed."""
    psnr: float
    """dB against the same run with every step computed."""
    seconds: float
    """In the transformer."""


@dataclass(frozen=True)
class Costs:
    """FLOPs share and seconds of a run as straight lines over the number of computed steps."""

    num_steps: int
    """Own steps of a chunk."""
    flops: Array
    """Slope and intercept of the share of FLOPs."""
    seconds: Array
    """Slope and intercept of the seconds in the transformer."""

    def forecast(self, cost: float, *, psnr: float) -> Forecast:
        """Return what is expected of a plan."""
        whole, own = (float(np.polyval(self.seconds, c)) for c in (self.num_steps, cost))
        return Forecast(cost, whole / own, float(np.polyval(self.flops, cost)), psnr, own)


def fit_costs(measured: Mapping[float, tuple[float, float]], *, num_steps: int) -> Costs:
    """Fit the costs of runs: number of computed steps -> (share of FLOPs, seconds)."""
    if len(measured) < 2:
        raise ValueError(f"two runs with different costs are needed, not {len(measured)}")
    columns = zip(*measured.values(), strict=True)
    flops, seconds = (np.polyfit(list(measured), values, 1) for values in columns)
    return Costs(num_steps, flops, seconds)


def fit_pixel_scale(measured: Sequence[tuple[float, float]]) -> float:
    """Return squared pixel levels per predicted squared latent error: a geometric mean.

    Args:
        measured: (predicted error, mean squared error in pixel levels) of some clips, above 0.
    """
    return math.exp(np.mean([math.log(mse / error) for error, mse in measured]))


def to_psnr(error: float, *, scale: float) -> float:
    """Return the PSNR in dB of a predicted error; inf for no error."""
    return math.inf if error <= 0 else 10 * math.log10(PIXEL_MAX**2 / (scale * error))


def parse_target(text: str) -> Target:
    """Read `flops=0.35`."""
    name, _, raw = text.partition("=")
    if name not in get_args(TargetName):
        known = ", ".join(f"{key}={value}" for key, value in EXAMPLES.items())
        raise UserError(f"the target is {text!r}, but must be one of the kinds {known}")
    try:
        value = float(raw)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        rule = f"its value must be a number above 0, as in {name}={EXAMPLES[name]}"
        raise UserError(f"the target is {text!r}: {rule}")
    if name == "flops" and value > 1:
        raise UserError(f"flops={value:g} is a share and must be at most 1, as in flops=0.35")
    if name == "speedup" and value < 1:
        raise UserError(f"speedup={value:g} must be 1 or more, as in speedup=3")
    return Target(cast(TargetName, name), value)


def choose(target: Target, forecasts: Sequence[Forecast]) -> Forecast:
    """Return the best forecast that meets a target.

    With a PSNR as target that is the one with the fewest computed steps, else the one with the
    highest PSNR.
    """
    good = [forecast for forecast in forecasts if target.is_met(forecast)]
    if not good:
        values = [float(getattr(forecast, target.name)) for forecast in forecasts]
        is_least = target.name in ("speedup", "psnr")
        reach = f"at most {max(values):.3g}" if is_least else f"at least {min(values):.3g}"
        costs = [forecast.cost for forecast in forecasts]
        raise UserError(
            f"the target {target.name}={target.value:g} cannot be reached: {reach} can be had with "
            f"{min(costs):g} to {max(costs):g} computed steps; ask for less"
        )
    if target.name == "psnr":
        return min(good, key=lambda forecast: forecast.cost)
    return max(good, key=lambda forecast: forecast.psnr)
