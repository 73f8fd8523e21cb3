"""From calibration clips to plans with an expected PSNR and cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowcache.errors import UserError
from flowcache.tune.forecast import Costs, Forecast, fit_costs, fit_pixel_scale, to_psnr
from flowcache.tune.gap import ErrorModel
from flowcache.tune.gram import Calibration
from flowcache.tune.plan import Constraints, Plan, fitted_plans
from tuning.methods import REFERENCE, planned
from tuning.rows import Rows, geometric_mean, mean
from tuning.study import GUIDED, Prompt, calibrate, measure
from tuning.subject import Subject

ORDER = 1
"""Of the extrapolation: what the samplers' stores carry out."""
MEASURED_SHARES = (1 / 3, 1 / 2)
"""Shares of the steps that the plans compute from which an error's meaning in dB is measured."""
NUM_MEASURED_CLIPS = 2


@dataclass(frozen=True)
class Found:
    """What tuning has found out."""

    calibration: Calibration
    distances: list[tuple[int, float]]
    model: ErrorModel
    plans: Mapping[int, Plan]
    scale: float
    costs: Costs
    increments: list[list[float]]

    def forecast(self, plan: Plan) -> Forecast:
        """Return what is expected of a plan."""
        return self.costs.forecast(plan.num_computed, psnr=to_psnr(plan.error, scale=self.scale))

    def forecasts(self) -> list[Forecast]:
        """Return what is expected of every plan that reuses something."""
        num_steps = self.model.num_steps
        return [self.forecast(plan) for count, plan in self.plans.items() if count < num_steps]


def investigate(
    subject: Subject, rows: Rows, prompts: Sequence[Prompt], constraints: Constraints
) -> Found:
    """Calibrate, plan, and measure two plans.

    Raises:
        UserError: nothing can be reused.
    """
    calibration, distances = calibrate(subject, rows, prompts)
    model = calibration.error_model({GUIDED: 1.0})
    plans = fitted_plans(model, order=ORDER, constraints=constraints)
    sample = sample_plans(plans, num_steps=model.num_steps)
    measured = measure(
        subject,
        rows,
        prompts[:NUM_MEASURED_CLIPS],
        [planned(plan) for plan in sample],
        kind="scale",
    )
    reference = measured[REFERENCE]
    costs = {model.num_steps: (1.0, mean(reference, "seconds"))}
    errors: list[tuple[float, float]] = []
    for plan in sample:
        own = measured[planned(plan).name]
        costs[plan.num_computed] = (mean(own, "flops"), mean(own, "seconds"))
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


def sample_plans(plans: Mapping[int, Plan], *, num_steps: int) -> list[Plan]:
    """Return the plans that are measured, those nearest to `MEASURED_SHARES`.

    Raises:
        UserError: no plan reuses anything.
    """
    counts = [count for count in plans if count < num_steps]
    if not counts:
        raise UserError(
            f"nothing can be reused in {num_steps} steps: the first and the last one are always "
            "computed, and --most-reuses must be 1 or more"
        )
    chosen = {min(counts, key=lambda c: abs(c - share * num_steps)) for share in MEASURED_SHARES}
    return [plans[count] for count in sorted(chosen)]
