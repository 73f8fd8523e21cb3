"""From calibration clips to plans with an expected PSNR and cost, and a table that checks them.

Results are kept row by row, so that a second start goes on where the first one stopped.
"""

import datetime
import json
import logging
import math
import os
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flowcache.errors import UserError
from flowcache.runtime.files import read_json_lines
from flowcache.runtime.metrics import PIXEL_MAX
from flowcache.runtime.profile import VERSION, Observed, Prediction, Profile, Reuse, Source
from flowcache.runtime.run import Clip
from flowcache.runtime.stats import RunStats
from flowcache.runtime.text_files import escaped
from flowcache.tuning.gap import ErrorModel, Predictor, interpolated_gains
from flowcache.tuning.gram import (
    Calibration,
    GramCollector,
    Sketch,
    distance_band,
    guidance_risks,
    magnitude_ratios,
    merge,
    propagation_gains,
)
from flowcache.tuning.methods import (
    OWN_SIGNAL,
    REFERENCE,
    WHOLE_KV,
    Method,
    guidance_steps,
    held,
    planned,
    reusing,
    searched,
    whole_kv,
)
from flowcache.tuning.plan import (
    Constraints,
    Costs,
    Forecast,
    Plan,
    Target,
    fit_costs,
    fit_pixel_scale,
    least_error_plans,
    to_psnr,
)
from flowcache.tuning.runs import CONDITIONAL, GUIDED, Prompt, Runs, Size
from flowcache.tuning.search import Search, climb

logger = logging.getLogger(__name__)

MEASURED_SHARES = (1 / 3, 1 / 2)
"""Shares of the steps in the plans that show what steps cost and what an error means in dB."""
NUM_MEASURED_CLIPS = 2
NUM_PROBES = 6
PROBE_SHARE = 1 / 8
"""Steps of a probe's gap, as a share of all."""
STEP_SPREAD = 0.8
"""Of the mean cost of a step, what the computed ones cost at least."""
SKETCH_SEED = 0
CLEAR_RATIO = 1.10
"""Error of the next best quantity over that of the best, at least. Source: AutoTarget."""


class Rows:
    """A file of JSON lines in a working folder that belongs to one set of settings."""

    def __init__(self, folder: Path, *, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._path = folder / "rows.jsonl"
        advice, wanted = "delete it, or choose another --work folder", dict(identity)
        self._rows: list[dict[str, Any]] = read_json_lines(self._path, advice=advice, repairs=True)
        self._unwritten = [] if self._rows else [wanted]
        self._rows = self._rows or [wanted]
        if self._rows[0] != json.loads(json.dumps(wanted)):
            raise UserError(
                f"{folder} holds the results of other settings: choose another --work folder, or "
                "delete it"
            )

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row; before the first one nothing is written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(each) + "\n" for each in (*self._unwritten, row))
        self._unwritten = []
        self._rows.append(dict(row))

    def find(self, **values: Any) -> list[dict[str, Any]]:
        """Return the rows that have these values."""
        return [r for r in self._rows[1:] if all(r.get(k) == v for k, v in values.items())]


def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the mean of a column."""
    return statistics.fmean(float(row[key]) for row in rows)


def geometric_mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the geometric mean of a column; 0 if one of its values is 0."""
    values = [float(row[key]) for row in rows]
    return statistics.geometric_mean(values) if all(values) else 0.0


# Measuring ----------------------------------------------------------------------------------------


def calibrate(
    runs: Runs, rows: Rows, prompts: Sequence[Prompt]
) -> tuple[Calibration, list[tuple[int, float]]]:
    """Record the clips that were not recorded yet.

    Returns:
        the mean inner products of the guided velocities, and the distances of the chunks' content
        as (own step, distance).
    """
    width = runs.size().sketch_width
    sketch = None if width is None else Sketch(width, seed=SKETCH_SEED)
    for prompt in prompts:
        if not rows.find(kind="calibration", index=prompt.index):
            _record(runs, rows, prompt, sketch)
    found = [rows.find(kind="calibration", index=prompt.index)[0] for prompt in prompts]
    parts = [Calibration.load(rows.folder / row["file"]) for row in found]
    return merge(parts), [(step, value) for row in found for step, value in row["distances"]]


def _record(runs: Runs, rows: Rows, prompt: Prompt, sketch: Sketch | None) -> None:
    collector = GramCollector(runs.size().num_steps, runs.size().branches, sketch=sketch)
    settings = (*OWN_SIGNAL, *runs.words.content)
    clip = runs.render(settings, prompt=prompt.text, seed=prompt.seed, observe=collector.observe)
    path = rows.folder / f"calibration-{prompt.index:03d}.npz"
    part = path.with_name(f".{path.stem}.part.npz")
    collector.finish().save(part)
    os.replace(part, path)
    distances = [(row.step, row.distance) for row in clip.stats.passes if row.distance is not None]
    row = {"kind": "calibration", "index": prompt.index, "file": path.name, "distances": distances}
    rows.add(row)
    logger.info("calibrated on clip %d: %s", prompt.index + 1, prompt.text)


def measure(
    runs: Runs,
    rows: Rows,
    prompts: Sequence[Prompt],
    methods: Sequence[Method],
    *,
    kind: str,
    references: dict[int, Clip] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Make the clips that were not made yet, each method against the reference of its clip.

    Args:
        references: clips with every step computed, by prompt; new ones are put there.

    Returns:
        method -> its rows, one per prompt; the reference among them.
    """
    for prompt in prompts:
        done = {row["method"] for row in rows.find(kind=kind, index=prompt.index)}
        missing = [method for method in methods if method.name not in done]
        if not missing and REFERENCE in done:
            continue
        reference = None if references is None else references.get(prompt.index)
        reference = reference or runs.render(OWN_SIGNAL, prompt=prompt.text, seed=prompt.seed)
        if references is not None:
            references[prompt.index] = reference
        where = {"kind": kind, "index": prompt.index}
        if REFERENCE not in done:
            row = _costs(reference.stats, reference.stats)
            row["increments"] = _increments(reference.stats)
            rows.add({**where, "method": REFERENCE, **row})
        for method in missing:
            clip = runs.render(
                method.settings, prompt=prompt.text, seed=prompt.seed, preset=method.preset
            )
            squares = (clip.frames.double() - reference.frames.double()).square()
            mse = squares.mean().item()
            row = {
                "mse": mse,
                "psnr": _decibel(mse) if mse else None,
                "frame_rmse": squares.flatten(1).mean(dim=1).sqrt().tolist(),
                **_costs(clip.stats, reference.stats),
            }
            rows.add({**where, "method": method.name, **row})
        logger.info("%s: %d methods on clip %d", kind, len(missing), prompt.index + 1)
    wanted = {prompt.index for prompt in prompts}
    return {
        name: [row for row in rows.find(kind=kind, method=name) if row["index"] in wanted]
        for name in (REFERENCE, *(method.name for method in methods))
    }


def _decibel(mse: float) -> float:
    """Return the PSNR of a mean squared error in pixel levels."""
    return 10 * math.log10(PIXEL_MAX**2 / mse)


def _costs(stats: RunStats, reference: RunStats) -> dict[str, Any]:
    return {
        "flops": stats.computed_flops / reference.computed_flops,
        "seconds": stats.stage_times()["dit"].seconds,
        "computed": stats.num_computed / (stats.num_computed + stats.num_reused),
    }


def _increments(stats: RunStats) -> list[list[float]]:
    """Return what each own step of each chunk adds to an accumulator, from the second step on."""
    branch = stats.passes[0].branch
    chunks: dict[tuple[int, int], list[float]] = {}
    for row in stats.passes:
        if row.branch == branch and row.accumulated is not None:
            chunks.setdefault((row.segment, row.chunk), []).append(row.accumulated)
    return list(chunks.values())


# Planning -----------------------------------------------------------------------------------------


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
    num_passes = size.num_passes if size.holds_guidance else 1
    plans = least_error_plans(model, constraints=constraints, num_passes=num_passes)
    sample = sample_plans(plans, num_steps=model.num_steps)
    methods = [planned(plan) for plan in sample]
    measured = measure(runs, rows, prompts[:NUM_MEASURED_CLIPS], methods, kind="scale")
    reference = measured[REFERENCE]
    costs = {float(model.num_steps): (1.0, mean(reference, "seconds"))}
    errors: list[tuple[float, float]] = []
    for plan, method in zip(sample, methods, strict=True):
        own = measured[method.name]
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
    methods = [Method(name, held(plan).settings) for name, (_, plan) in probes.items()]
    measured = measure(runs, rows, prompts, methods, kind="probe")
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


def check_possible(target: Target, size: Size, constraints: Constraints) -> None:
    """Refuse, before anything is measured, what no plan can do."""
    num_steps = size.num_steps
    if len(constraints.forced(num_steps)) == num_steps:
        raise UserError(
            f"nothing can be reused in {num_steps} steps, of which the first and the last are "
            "always computed: use more steps"
        )
    # in steps that run all passes
    least_cost = 1 / size.num_passes if size.holds_guidance else 1
    fewest = constraints.fewest(num_steps)
    share = fewest / num_steps * least_cost * STEP_SPREAD
    if (target.name == "flops" and target.value < share) or (
        target.name == "speedup" and target.value > 1 / share
    ):
        raise UserError(
            f"the target {target.name}={target.value:g} cannot be reached: at least {fewest} of "
            f"{num_steps} steps are computed, as at most {constraints.most_reuses} in a row are "
            "reused: ask for less"
        )
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
    likeness = "equal to" if mse == 0 else f"{_decibel(mse):.1f} dB like"
    return (
        f"KV cache     with compression clips are {likeness} those without, at "
        f"{1 / mean(own, 'flops'):.3g} of the FLOPs; what follows is against clips with it"
    )


def sample_plans(plans: Mapping[float, Plan], *, num_steps: int) -> list[Plan]:
    """Return the plans that are measured, those nearest to `MEASURED_SHARES`."""
    costs = [cost for cost in plans if cost < num_steps]
    chosen = {min(costs, key=lambda c: abs(c - share * num_steps)) for share in MEASURED_SHARES}
    return [plans[cost] for cost in sorted(chosen)]


def random_plans(
    model: ErrorModel, *, count: int, constraints: Constraints, seed: int
) -> list[Plan]:
    """Return random plans that compute a quarter to 60 % of the steps, half of them with trend."""
    draw, num_steps, plans = random.Random(seed), model.num_steps, list[Plan]()
    while len(plans) < count:
        size = draw.randint(max(num_steps // 4, 2), max(num_steps * 6 // 10, 3))
        inner = sorted(draw.sample(range(1, num_steps - 1), size - 2))
        steps = (0, *inner, num_steps - 1)
        if constraints.allow(steps, num_steps=num_steps):
            predictor = Predictor(1, 0.5) if len(plans) % 2 else Predictor(0)
            plans.append(Plan(steps, predictor, model.plan(steps, predictor)))
    return plans


def search(
    runs: Runs,
    rows: Rows,
    prompts: Sequence[Prompt],
    found: Found,
    plan: Plan,
    *,
    constraints: Constraints,
    num_trials: int,
    spread: float,
) -> Search:
    """Look for a better plan of the same cost, by the finished clips of some prompts."""
    references: dict[int, Clip] = {}

    def errors(candidate: Plan, number: int) -> list[float]:
        method, own = searched(candidate), [prompts[number]]
        made = measure(runs, rows, own, [method], kind="search", references=references)
        return made[method.name][0]["frame_rmse"]

    return climb(
        plan,
        errors,
        model=found.model,
        num_clips=len(prompts),
        constraints=constraints,
        num_trials=num_trials,
        spread=spread,
    )


@dataclass(frozen=True)
class Choice:
    """What the finished calibration clips say of the quantities that a plan may reuse."""

    quantity: str
    """Of the least error."""
    errors: Mapping[str, float]
    """Quantity -> mean squared error of the clips, in squared pixel levels."""

    @property
    def ratio(self) -> float:
        """Error of the second best over that of the best."""
        best, *others = sorted(self.errors.values())
        return min(others, default=math.inf) / best if best else math.inf

    @property
    def is_clear(self) -> bool:
        """Whether the best one is so much better that it is taken."""
        return self.ratio >= CLEAR_RATIO

    @property
    def psnr(self) -> float:
        """PSNR of the best one in dB, of all clips together."""
        error = self.errors[self.quantity]
        return _decibel(error) if error else math.inf


def choose_quantity(
    runs: Runs, rows: Rows, prompts: Sequence[Prompt], plan: Plan, quantities: Sequence[str]
) -> Choice:
    """Try which of some quantities a plan had better reuse, each along the plan's own trend.

    Example: mean squared errors of 4.0, 2.0 and 2.1 have the ratio 1.05: the second one is best,
    but not clearly.

    Source: AutoTarget (arXiv 2610.03577).
    """
    methods = {name: reusing(plan, name) for name in quantities}
    measured = measure(runs, rows, prompts, [*methods.values()], kind="quantity")
    errors = {name: mean(measured[method.name], "mse") for name, method in methods.items()}
    return Choice(min(errors, key=lambda name: errors[name]), errors)


def make_profile(
    runs: Runs,
    prompts: Sequence[Prompt],
    found: Found,
    plan: Plan,
    *,
    model: str,
    choice: Choice | None = None,
) -> Profile:
    """Return what a run needs to follow a plan.

    Args:
        prompts: that it was calibrated on.
        model: its name, for messages.
        choice: of what is reused instead of the plan's own quantity.
    """
    forecast = found.forecast(plan)
    if choice is not None:
        forecast = replace(forecast, psnr=choice.psnr)
    low, high = distance_band(found.distances, num_steps=found.model.num_steps)
    return Profile(
        version=VERSION,
        fingerprint=runs.fingerprint(),
        setting=runs.setting(),
        reuse=Reuse(
            plans=[list(plan.steps)],
            predict=plan.predictor.quantity if choice is None else choice.quantity,
            order=plan.predictor.order,
            factor=plan.predictor.factor,
            guidance_steps=guidance_steps(plan),
        ),
        predicted=Prediction(
            error=plan.error, psnr=forecast.psnr, flops=forecast.flops, pixel_scale=found.scale
        ),
        observed=Observed(
            magnitude_ratios=magnitude_ratios(found.model.gram),
            distance_low=low,
            distance_high=high,
            guidance_risks=risks_of(found.model),
        ),
        source=Source(
            model=model,
            preset=runs.preset,
            date=datetime.date.today().isoformat(),
            prompts=[prompt.text for prompt in prompts],
            seeds=[prompt.seed for prompt in prompts],
        ),
    )


def risks_of(model: ErrorModel) -> list[list[float]]:
    """Return by own step the risk of reusing a result that is 1, 2, ... steps old.

    They are in pixel levels where the gains were measured.
    """
    growth_N = np.abs(np.diff(model.sigmas))
    if model.gains is not None:
        growth_N = growth_N * np.sqrt(model.gains)
    return guidance_risks(model.gram, propagation_gains(growth_N))


# The table ----------------------------------------------------------------------------------------


def summarize(
    measured: Mapping[str, Sequence[Mapping[str, Any]]],
    methods: Sequence[Method],
    expected: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Average over the prompts, cheapest first; mark what nothing beats in cost and quality."""
    table: list[dict[str, Any]] = []
    base = mean(measured[REFERENCE], "seconds")
    for method in methods:
        rows = measured[method.name]
        finite = [row for row in rows if row["psnr"] is not None]
        averages = {name: mean(rows, name) for name in ("computed", "flops", "seconds")}
        table.append(
            {
                "method": method.name,
                "policy": method.policy,
                "predictor": method.predictor,
                "num_clips": len(rows),
                **averages,
                "speedup": base / averages["seconds"],
                "psnr": mean(finite, "psnr") if finite else None,
                "predicted_psnr": expected.get(method.name),
            }
        )
    table.sort(key=lambda row: row["flops"])
    best = -math.inf
    for row in table:
        found = math.inf if row["psnr"] is None else row["psnr"]
        row["is_best"] = row["psnr"] is None or found > best
        best = max(best, found)
    return table


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the table; `*` marks a method that no cheaper one beats."""
    lines = [
        "| method | computed | FLOPs | DiT s | speed-up | PSNR | predicted | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        predicted, found = row["predicted_psnr"], row["psnr"]
        lines.append(
            f"| {escaped(row['method'])} "
            f"| {100 * row['computed']:.0f} % | {100 * row['flops']:.1f} % | "
            f"{row['seconds']:.2f} | {row['speedup']:.2f}x | "
            f"{'equal' if found is None else f'{found:.2f}'} | "
            f"{'' if predicted is None else f'{predicted:.2f}'} | {'*' if row['is_best'] else ''} |"
        )
    return "\n".join(lines) + "\n"
