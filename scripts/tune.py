#!/usr/bin/env python
"""Plan which steps to compute: calibrate, plan, write a profile, check it on unseen prompts.

    python scripts/tune.py --model demo --architecture magi1 --target flops=0.35

A few clips are made with every step computed, and the inner products of their velocities are kept.
From these the error of any plan is known without making a clip, so the best plan for every number
of computed steps is found at once. Some plans are measured to tell what an error means in dB, made
early or late. The plan that meets the target is written as a profile and then compared with all
other policies on prompts that it was not tuned on, as a table and as a plot (WORK/pareto.svg).

Results are kept row by row under --work; a second start goes on where the first one stopped.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.errors import UserError
from flowcache.predict import PREDICTORS
from flowcache.report.figures import draw_tuning
from flowcache.runtime.cli import Parser, add_checkpoint, run_command, settle_checkpoint
from flowcache.runtime.files import check_free, check_writable, made_folder, write_json, write_text
from flowcache.runtime.model import load_model
from flowcache.runtime.profile import write_profile
from flowcache.runtime.stats import scaled
from flowcache.tuning.gram import magnitude_ratios
from flowcache.tuning.methods import (
    Method,
    adaptive,
    closest_magcache,
    closest_threshold,
    guarded,
    held,
    magcache,
    planned,
    predictor_name,
    reusing,
    strides,
    whole_window,
)
from flowcache.tuning.plan import Constraints, Plan, choose, parse_target
from flowcache.tuning.runs import Prompt, Runs, choose_prompts, words_of
from flowcache.tuning.study import (
    MEASURED_SHARES,
    NUM_MEASURED_CLIPS,
    NUM_PROBES,
    Choice,
    Found,
    Rows,
    check_possible,
    choose_quantity,
    investigate,
    kv_effect,
    make_profile,
    markdown,
    measure,
    random_plans,
    search,
    summarize,
)

TABLE_SHARES = (0.27, 0.5)
"""Shares of the steps at which methods are compared, in addition to the target's."""
PLOT = "pareto.svg"
"""The table as a drawing, in the folder of the measured rows."""
NUM_CHECK_PLANS = 24
CHECK_PLANS_SEED = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = parse_options(argv)

    def timed() -> None:
        start = time.monotonic()
        command(options)
        if not options.dry_run:
            minutes, spent = (time.monotonic() - start) / 60, time.process_time() / 60
            print(f"took         {minutes:.1f} minutes, {spent:.1f} of them processor time")

    return run_command(timed)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint(parser)
    parser.add_argument(
        "--preset", help="whose attention and KV cache are tuned for (default: FlowCache-fast)"
    )
    parser.add_argument(
        "--target",
        default="flops=0.35",
        help="speedup=3 or flops=0.35 (share) or psnr=32 (dB), against the same preset with every "
        "step computed; or seconds=60 in the transformer (default: flops=0.35)",
    )
    parser.add_argument("--clips", type=int, default=8, help="to calibrate on (default: 8)")
    parser.add_argument(
        "--check-prompts", type=int, default=2, help="unseen clips per method (default: 2)"
    )
    parser.add_argument(
        "--prompts", type=Path, help="text file, a prompt per line; the demo has prompts of its own"
    )
    parser.add_argument(
        "--hold-guidance",
        action="store_true",
        help="plans may also run the conditional guidance pass alone in some computed steps",
    )
    parser.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="TRIALS",
        help="so many plans near the best one are tried on finished calibration clips, and the one "
        "with the least error is taken (default: 0)",
    )
    parser.add_argument(
        "--spread",
        type=float,
        default=0.0,
        help="of --search: standard deviations of the errors of frames that are added to their "
        "mean (default: 0)",
    )
    parser.add_argument(
        "--choose-predictor",
        action="store_true",
        help="what is reused (residual, velocity, clean estimate, latent update) is tried on "
        "finished calibration clips, and the one with the least error is taken if the next one's "
        "is at least 1.1 times as large",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("result/tune"), help="folder of the measured rows"
    )
    parser.add_argument("--out", type=Path, help="profile to write (default: WORK/profile.yaml)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing profile")
    parser.add_argument("--dry-run", action="store_true", help="say what it will cost, and end")
    parser.add_argument(
        "--store-check",
        type=Path,
        metavar="FOLDER",
        help="measure random plans and keep them with the calibration, for the test",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all runs")
    return parser.parse_intermixed_args(argv)


def command(options: argparse.Namespace) -> None:
    """Do what the options ask for."""
    settle_checkpoint(options)
    target = parse_target(options.target)
    constraints = Constraints()
    check_search(options)
    model = load_model(options.architecture)
    options.preset = options.preset or words_of(model).preset
    runs = Runs(
        model,
        options.model,
        options.preset,
        options.settings,
        folder=options.work,
        holds_guidance=options.hold_guidance,
    )
    check_possible(target, runs.size(), constraints)
    out = options.out or options.work / "profile.yaml"
    if options.dry_run:
        print("\n".join(describe(runs, options)))
        return
    advice = "choose another --out, or give --overwrite"
    check_free(out, overwrite=options.overwrite, advice=advice)
    calibrating, unseen = choose_prompts(
        options.prompts,
        checkpoint=options.model,
        num_clips=options.clips,
        num_checks=options.check_prompts,
    )
    with made_folder(options.work), made_folder(out.parent):
        rows = open_rows(options)
        runs.load()
    found = investigate(runs, rows, calibrating, constraints)
    if options.store_check is not None:
        store_check(runs, rows, calibrating, found, constraints, folder=options.store_check)
        return
    if runs.size().compresses_kv:
        print(kv_effect(runs, rows, calibrating))
    chosen = choose(target, found.forecasts())
    plan = found.plans[chosen.cost]
    gentlest = max(found.forecasts(), key=lambda forecast: forecast.cost)
    num_steps = found.model.num_steps
    print(
        f"gentlest     {gentlest.cost:g} of {num_steps} steps: {gentlest.psnr:.1f} dB expected; "
        "no plan is better"
    )
    before = plan
    if options.search:
        plan = improved(runs, rows, calibrating, found, plan, constraints, options=options)
    choice = best_quantity(runs, rows, calibrating, plan) if options.choose_predictor else None
    name = f"{options.architecture} {options.model}"
    write_profile(make_profile(runs, calibrating, found, plan, model=name, choice=choice), out)
    print(f"profile      {out}: {plan.num_computed} of {num_steps} steps are computed")
    reused = predictor_name(plan) if choice is None else f"{choice.quantity} by its error"
    print(f"plan         {' '.join(map(str, plan.steps))}; {reused}")
    if plan.conditional:
        print(f"conditional  {' '.join(map(str, plan.conditional))} run that pass alone")
    check(
        runs,
        rows,
        unseen,
        found,
        plan,
        before=before,
        choice=choice,
        profile=out.resolve(),
        options=options,
    )


def open_rows(options: argparse.Namespace) -> Rows:
    """Return what was measured before with these settings."""
    identity = {
        "model": options.architecture,
        "checkpoint": options.model,
        "preset": options.preset,
        "settings": list(options.settings),
        "prompts": None if options.prompts is None else options.prompts.name,
        "hold_guidance": options.hold_guidance,
    }
    return Rows(options.work, identity=identity)


def check_search(options: argparse.Namespace) -> None:
    """Refuse what no search can do."""
    if options.search < 0:
        raise UserError(f"--search must be 0 or more trials, not {options.search}")
    if not 0 <= options.spread < math.inf:
        raise UserError(f"--spread must be 0 or more, not {options.spread:g}")
    if options.spread and not options.search:
        raise UserError("--spread weighs what --search looks for: give --search TRIALS, too")


def improved(
    runs: Runs,
    rows: Rows,
    prompts: Sequence[Prompt],
    found: Found,
    plan: Plan,
    constraints: Constraints,
    *,
    options: argparse.Namespace,
) -> Plan:
    """Search for a better plan of the same cost; say what came of it."""
    result = search(
        runs,
        rows,
        prompts,
        found,
        plan,
        constraints=constraints,
        num_trials=options.search,
        spread=options.spread,
    )
    what = f"mean + {options.spread:g} sd" if options.spread else "mean"
    print(
        f"search       {result.num_tried} plans on {len(prompts)} clips: the {what} error of a "
        f"frame was {result.first_cost:.4g} pixel levels and is {result.cost:.4g}"
    )
    return result.plan


def best_quantity(runs: Runs, rows: Rows, prompts: Sequence[Prompt], plan: Plan) -> Choice | None:
    """Try what a plan had better reuse; return what is taken instead of its own, or None."""
    quantities = runs.size().quantities
    if plan.conditional:  # whose difference is one of velocities
        quantities = [name for name in quantities if PREDICTORS[name].level != "tokens"]
    choice = choose_quantity(runs, rows, prompts, plan, quantities)
    decibels = ", ".join(f"{name} {error:.4g}" for name, error in choice.errors.items())
    verdict = "taken" if choice.is_clear else f"not clearly, {plan.predictor.quantity} stays"
    print(
        f"predictor    squared error of {decibels}: {choice.quantity} is best by "
        f"{choice.ratio:.3g}, {verdict}"
    )
    return choice if choice.is_clear else None


def describe(runs: Runs, options: argparse.Namespace) -> list[str]:
    """Say what tuning will cost, by arithmetic."""
    size = runs.size()
    width = size.sketch_width
    held_as = "as they are" if width is None else f"as sketches of {width} numbers"
    num_measured = NUM_MEASURED_CLIPS * (2 + NUM_PROBES + len(MEASURED_SHARES))
    tried = f", at most {options.clips * (options.search + 2)} to search" if options.search else ""
    if options.choose_predictor:
        tried += f", {options.clips * len(size.quantities)} to choose what is reused"
    return [
        f"clips        {options.clips} to calibrate on, {num_measured} to measure what an error "
        f"means{tried}, {options.check_prompts} with every method to compare",
        f"FLOPs        {scaled(size.flops, 'FLOP')} per clip with every step computed",
        f"velocities   {size.num_elements} numbers per chunk and step, {size.num_active} chunks at "
        f"once, held {held_as}",
        f"memory       {scaled(size.calibration_bytes, 'B')} more than the run itself",
    ]


def check(
    runs: Runs,
    rows: Rows,
    prompts: Sequence[Prompt],
    found: Found,
    plan: Plan,
    *,
    before: Plan,
    choice: Choice | None,
    profile: Path,
    options: argparse.Namespace,
) -> None:
    """Compare the plan with everything else on unseen prompts; print and draw the table.

    Args:
        before: the plan that a search began with.
        choice: of what the plan reuses instead of its own quantity.
    """
    if not prompts:
        return
    num_steps, words, work, size = runs.size().num_steps, runs.words, options.work, runs.size()
    ratios = magnitude_ratios(found.model.gram)
    guard = guarded(plan, profile, words)
    if choice is not None:
        guard = replace(guard, name=f"guarded {plan.num_computed}, {choice.quantity} by its error")
    methods: list[Method] = [*whole_window(words), guard]
    expected = dict[str, float]()
    shared = {min(found.plans, key=lambda c: abs(c - share * num_steps)) for share in TABLE_SHARES}
    if plan != before:
        name = f"searched {plan.num_computed}, {predictor_name(plan)}"
        methods.append(replace(planned(plan), name=name))
    if choice is not None:
        name = f"planned {plan.num_computed}, {choice.quantity} by its error"
        methods.append(replace(reusing(plan, choice.quantity), name=name))
    for cost in sorted({plan.cost, *shared}):
        own, count = found.plans[cost], max(round(cost), 2)
        threshold, computed = closest_threshold(
            found.increments,
            num_computed=cost,
            warmup_steps=size.warmup_steps,
            compute_last_step=size.compute_last_step,
        )
        print(
            f"threshold    {threshold:.4g} makes FlowCache compute {computed:.1f} own steps, "
            f"the nearest to {cost:g}"
        )
        limit, skipping = closest_magcache(
            ratios, num_computed=cost, warmup_steps=size.warmup_steps
        )
        print(f"threshold    {limit:.4g} makes MagCache compute {skipping:g}")
        methods += [planned(own), held(own), *strides(count, num_steps=num_steps)]
        methods += [*adaptive(threshold, words), *magcache(limit, profile, words)]
        expected[planned(own).name] = found.forecast(own).psnr
    # with few steps, two numbers of computed steps may lead to the same threshold
    methods = list({method.name: method for method in methods}.values())
    measured = measure(runs, rows, prompts, methods, kind="check")
    table = summarize(measured, methods, expected)
    print(f"\n{markdown(table)}")
    write_text(work / "table.md", markdown(table))
    write_json(work / "table.json", {"command": ["python", *sys.argv], "table": table})
    front = [(forecast.flops, forecast.psnr) for forecast in found.forecasts()]
    name = f"{options.architecture} {options.model}"
    write_text(work / PLOT, draw_tuning(table, front, model=name))
    print(f"wrote {work / PLOT}")


def store_check(
    runs: Runs,
    rows: Rows,
    prompts: Sequence[Prompt],
    found: Found,
    constraints: Constraints,
    *,
    folder: Path,
) -> None:
    """Measure random plans on the first calibration clips; keep them with the calibration."""
    check_writable(folder)
    plans = random_plans(
        found.model, count=NUM_CHECK_PLANS, constraints=constraints, seed=CHECK_PLANS_SEED
    )
    methods = [Method(f"random {i}", planned(plan).settings) for i, plan in enumerate(plans)]
    measured = measure(runs, rows, prompts[:NUM_MEASURED_CLIPS], methods, kind="random")
    found.calibration.save(folder / "calibration.npz")
    kept = [
        {
            "steps": list(plan.steps),
            "order": plan.predictor.order,
            "factor": plan.predictor.factor,
            "mse": [row["mse"] for row in measured[method.name]],
        }
        for plan, method in zip(plans, methods, strict=True)
    ]
    gains = found.model.gains
    content = {"gains": None if gains is None else gains.tolist(), "plans": kept}
    write_json(folder / "measured.json", content)
    print(f"{len(kept)} plans measured on {NUM_MEASURED_CLIPS} clips: {folder}")


if __name__ == "__main__":
    sys.exit(main())
