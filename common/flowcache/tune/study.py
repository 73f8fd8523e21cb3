"""From calibration clips to plans with an expected PSNR and cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flowcache.errors import UserError
from flowcache.runtime.metrics import PIXEL_MAX
from flowcache.tune.forecast import Costs, Forecast, Target, fit_costs, fit_pixel_scale, to_psnr
from flowcache.tune.gap import ErrorModel, Predictor, interpolated_gains
from flowcache.tune.gram import Calibration
from flowcache.tune.measure import Prompt, calibrate, measure
from flowcache.tune.methods import REFERENCE, WHOLE_KV, Method, held, planned, whole_kv
from flowcache.tune.plan import Constraints, Plan, least_error_plans
from flowcache.tune.rows import Rows, geometric_mean, mean
from flowcache.tune.runs import CONDITIONAL, GUIDED, Runs, Size

MEASURED_SHARES = (1 / 3, 1 / 2)
"""Shares of the steps in the plans that tell what steps cost and what an error means in dB."""
NUM_MEASURED_CLIPS = 2
NUM_PROBES = 6
PROBE_SHARE = 1 / 8
"""Steps of a probe's gap, as a share of all."""
STEP_SPREAD = 0.8
"""Of the mean cost of a step, what the computed ones cost at least."""


@dataclass(frozen=True)
class Found:
    """What tuning has found out."""

    calibration: Calibration
    distances: list[tuple[int, float]]
    model: ErrorModel
    plans: Mapping[float, Plan]
    """By their cost in steps that run all passes."""
    scale: float
    costs: Costs
    increments: list[list[float]]

    def forecast(self, plan: Plan) -> Forecast:
        """Return what is expected of a plan."""
        return self.costs.forecast(plan.cost, psnr=to_psnr(plan.error, scale=self.scale))

    def forecasts(self) -> list[Forecast]:
        """Return what is expected of every plan that reuses something."""
        num_steps = self.model.num_steps
        return [self.forecast(plan) for cost, plan in self.plans.items() if cost < num_steps]


def investigate(
    runs: Runs, rows: Rows, prompts: Sequence[Prompt], constraints: Constraints
) -> Found:
    """Calibrate, plan, and measure two plans."""
    calibration, distances = calibrate(runs, rows, prompts)
    size = runs.size()
    plain = calibration.error_model(
        {name: float(name == GUIDED) for name in size.branches},
        conditional=CONDITIONAL if size.holds_guidance else None,
    )
    model = with_gains(runs, rows, prompts[:NUM_MEASURED_CLIPS], plain)
    plans = least_error_plans(
        model,
        constraints=constraints,
        num_passes=size.num_passes if size.holds_guidance else 1,
    )
    sample = sample_plans(plans, num_steps=model.num_steps)
    measured = measure(
        runs,
        rows,
        prompts[:NUM_MEASURED_CLIPS],
        [planned(plan) for plan in sample],
        kind="scale",
    )
    reference = measured[REFERENCE]
    costs = {float(model.num_steps): (1.0, mean(reference, "seconds"))}
    errors: list[tuple[float, float]] = []
    for plan in sample:
        own = measured[planned(plan).name]
        costs[plan.cost] = (mean(own, "flops"), mean(own, "seconds"))
        errors.append((plan.error, geometric_mean(own, "mse")))
    return Found(
        calibration=calibration,
        distances=distances,
        model=model,
        plans=plans,
        scale=fit_pixel_scale(errors),
        costs=fit_costs(costs, num_steps=model.num_steps),
        increments=[chunk for row in reference for chunk in row["increments"]],
    )


def with_gains(runs: Runs, rows: Rows, prompts: Sequence[Prompt], model: ErrorModel) -> ErrorModel:
    """Measure by how much errors grow that are made early or late; one short gap at a time."""
    probes = probe_plans(model)
    methods = {name: Method(name, held(plan).settings) for name, (_, plan) in probes.items()}
    measured = measure(runs, rows, prompts, list(methods.values()), kind="probe")
    gains: dict[float, float] = {}
    for name, (middle, plan) in probes.items():
        mse = geometric_mean(measured[name], "mse")
        if mse > 0 and plan.error > 0:
            gains[middle] = mse / plan.error
    if not gains:
        return model
    return replace(model, gains=interpolated_gains(gains, num_steps=model.num_steps))


def probe_plans(model: ErrorModel) -> dict[str, tuple[float, Plan]]:
    """Return name -> the middle of a gap, and the plan that computes all but it; evenly spread."""
    num_steps = model.num_steps
    width = max(round(PROBE_SHARE * num_steps), 1)
    most = max(num_steps - 1 - width, 1)
    probes: dict[str, tuple[float, Plan]] = {}
    for start in sorted({round(1 + i * (most - 1) / (NUM_PROBES - 1)) for i in range(NUM_PROBES)}):
        stop = min(start + width, num_steps - 1)
        steps = (*range(start), *range(stop, num_steps))
        plan = Plan(steps, Predictor(0), model.plan(steps, Predictor(0)))
        probes[f"gap {start}-{stop - 1}"] = ((start + stop - 1) / 2, plan)
    return probes


def check_leaves_steps(num_steps: int, constraints: Constraints) -> None:
    """Refuse a schedule of so few steps that no plan reuses anything.

    Raises:
        UserError: it is so.
    """
    if len(constraints.forced(num_steps)) == num_steps or not constraints.most_reuses:
        raise UserError(
            f"nothing can be reused in {num_steps} steps: the first and the last one are always "
            "computed, --most-reuses must be 1 or more, and --warmup-steps and --final-steps must "
            "leave some"
        )


def check_reachable(
    target: Target, num_steps: int, constraints: Constraints, *, least_cost: float
) -> None:
    """Refuse a target that no plan can reach, before anything is measured.

    Args:
        least_cost: of a computed step, 1 for all guidance passes.

    Raises:
        UserError: it is so.
    """
    fewest = constraints.fewest(num_steps)
    share = fewest / num_steps * least_cost * STEP_SPREAD
    if (target.name == "flops" and target.value < share) or (
        target.name == "speedup" and target.value > 1 / share
    ):
        raise UserError(
            f"the target {target.name}={target.value:g} cannot be reached: at least {fewest} of "
            f"{num_steps} steps are computed, as at most {constraints.most_reuses} in a row are "
            "reused: ask for less, or raise --most-reuses"
        )


def check_has_guidance(size: Size) -> None:
    """Refuse to plan with guidance that is held where there is none.

    Raises:
        UserError: there is one guidance pass.
    """
    if size.holds_guidance and size.num_passes == 1:
        raise UserError(
            "--hold-guidance needs a model with guidance, but this run has one pass (a distilled "
            "model, or guidance that is off): leave it out"
        )


def kv_effect(runs: Runs, rows: Rows, prompts: Sequence[Prompt]) -> str:
    """Say what KV compression alone does to clips with every step computed."""
    measured = measure(runs, rows, prompts[:NUM_MEASURED_CLIPS], [whole_kv()], kind="kv")
    own = measured[WHOLE_KV]
    mse = geometric_mean(own, "mse")
    likeness = "equal to" if mse == 0 else f"{10 * math.log10(PIXEL_MAX**2 / mse):.1f} dB like"
    return (
        f"KV cache     with compression clips are {likeness} those without, at "
        f"{1 / mean(own, 'flops'):.3g} of the FLOPs; what follows is against clips with it"
    )


def sample_plans(plans: Mapping[float, Plan], *, num_steps: int) -> list[Plan]:
    """Return the plans that are measured, those nearest to `MEASURED_SHARES`."""
    costs = [cost for cost in plans if cost < num_steps]
    chosen = {min(costs, key=lambda c: abs(c - share * num_steps)) for share in MEASURED_SHARES}
    return [plans[cost] for cost in sorted(chosen)]
