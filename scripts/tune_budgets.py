#!/usr/bin/env python
"""Make what `bench_demo.py --table reuse` compares: three budgets, and every rule set to meet them.

FlowCache-fast, as published, is measured on calibration clips. Its FLOPs are the middle budget; 0.6
and 1.3 times as many are the others (`--levels rivals`: those of FlowCache-slow and half of
FlowCache-fast's, for --table rivals). Then one calibration gives a profile for each budget, by
scripts/tune.py, and a search on two of the clips gives the thresholds of the adaptive rules:

    OUT/flops_0.37.yaml, ...   profiles; of --levels rivals also those whose predictor was chosen by
                               its error, and with --search those of searched plans (by the
                               mean error, and with its spread)
    OUT/budgets.yaml           thresholds, even steps, fitted factors, and the command

What is measured is kept in OUT/work; a second start goes on where the first one stopped.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

import tune

from flowcache.bench.methods import Comparison, comparison_of
from flowcache.bench.reuse import (
    CHOSEN,
    LEVELS,
    MID,
    SEARCHED,
    STEADY,
    Adaptive,
    Budgets,
    Level,
    Outcome,
    Trials,
    find_threshold,
    profile_next_to,
    rule_names,
    rule_settings,
    suiting_factor,
    write_budgets,
)
from flowcache.bench.rivals import (
    FAST,
    HALF,
    RIVAL_LEVELS,
    SLOW,
    rival_rules,
)
from flowcache.errors import UserError
from flowcache.runtime.cli import Parser, add_checkpoint, run_command, settle_checkpoint
from flowcache.runtime.config import check_left_out
from flowcache.runtime.files import made_folder
from flowcache.runtime.model import load_model
from flowcache.runtime.profile import Profile, read_profile
from flowcache.tuning.gap import ErrorModel
from flowcache.tuning.gram import Calibration, merge
from flowcache.tuning.methods import even_steps, published
from flowcache.tuning.runs import Runs, choose_prompts
from flowcache.tuning.study import Rows

NUM_SEARCH_CLIPS = 2
SPREAD = 1.0
"""Standard deviations of the error that TRAC's cost adds to its mean."""
HALF_A_STEP = 0.55
"""How near to a budget a rule must come, in own steps: the step that is nearest, and rounding."""
STARTS = {
    "flowcache": 0.15,
    "content": 0.15,
    "teacache": 0.1,
    "magcache": 0.2,
    "magcache_bounded": 0.12,
    "racfg": 1.0,
    "racer": 0.05,
    "motioncache": 0.15,
}
"""Thresholds that the search begins with."""
OWN_SETTINGS: Mapping[str, str] = dict.fromkeys(
    ("reuse.policy", "reuse.profile", "reuse.threshold"),
    "is set for each rule and budget: leave it out",
)
EXAMPLES = """examples:
  python scripts/tune_budgets.py --out result/reuse_skyreels_v2
  python scripts/tune_budgets.py --architecture magi1 --out result/reuse_magi1
"""


@dataclass(frozen=True)
class Bench:
    """What all parts of the command need."""

    comparison: Comparison
    trials: Trials
    options: argparse.Namespace

    @property
    def work(self) -> Path:
        """The folder of the calibration."""
        return self.options.out / "work"


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES
    )
    add_checkpoint(parser)
    parser.add_argument("--clips", type=int, default=8, help="to calibrate on (default: 8)")
    parser.add_argument(
        "--levels",
        choices=("reuse", "rivals"),
        default="reuse",
        help="the budgets of which table (default: reuse)",
    )
    parser.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="TRIALS",
        help="of --levels rivals: plans tried on finished clips, see tune.py (default: 0)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of profiles and budgets")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all runs")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = parse_options(argv)

    def made() -> None:
        with made_folder(options.out):
            command(options)

    return run_command(made)


def command(options: argparse.Namespace) -> None:
    """Measure FlowCache-fast, tune the profiles, search the thresholds, write the budgets."""
    settle_checkpoint(options)
    check_search(options)
    check_left_out(options.settings, OWN_SETTINGS)
    bench = open_bench(options)
    words, preset = bench.comparison.words, bench.comparison.preset
    fast = bench.trials.outcome(published(words), preset=preset).flops
    print(f"FlowCache-fast spends {fast:.4f} of the FLOPs of every step")
    multiples = rival_multiples(bench, fast) if options.levels == "rivals" else LEVELS
    wanted = {level: min(times * fast, 1) for level, times in multiples.items()}
    profiles = {level: tuned(bench, flops) for level, flops in wanted.items()}
    for flops in wanted.values() if options.levels == "rivals" else ():
        tuned(bench, flops, policy=CHOSEN, given=["--choose-predictor"])
        if options.search:
            searching = ["--search", str(options.search)]
            tuned(bench, flops, policy=SEARCHED, given=searching)
            tuned(bench, flops, policy=STEADY, given=[*searching, "--spread", f"{SPREAD:g}"])
    model = error_model(bench.work)
    levels = {
        level: make_level(path, read_profile(path), model) for level, path in profiles.items()
    }
    adaptive = [
        make_adaptive(bench, rule, level, levels[level], wanted=wanted[level], model=model)
        for rule, level in rules_of(bench)
    ]
    budgets = Budgets(
        command=shlex.join(["python", *sys.argv]),
        model=options.architecture,
        checkpoint=options.model,
        settings=list(options.settings),
        levels=levels,
        adaptive=adaptive,
    )
    print(f"wrote {write_budgets(budgets, options.out)}")


def open_bench(options: argparse.Namespace) -> Bench:
    """Load the model and find what was measured before."""
    comparison = comparison_of(options.architecture)
    runs = Runs(
        load_model(options.architecture),
        options.model,
        comparison.preset,
        options.settings,
        folder=options.out,
    )
    prompts, _ = choose_prompts(
        None, checkpoint=options.model, num_clips=options.clips, num_checks=0
    )
    identity = {
        "model": options.architecture,
        "checkpoint": options.model,
        "settings": options.settings,
    }
    rows = Rows(options.out / "search", identity=identity)
    runs.load()
    return Bench(comparison, Trials(runs, rows, prompts[:NUM_SEARCH_CLIPS]), options)


def check_search(options: argparse.Namespace) -> None:
    """Refuse what no search can do."""
    if options.search < 0:
        raise UserError(f"--search must be 0 or more trials, not {options.search}")
    if options.search and options.levels != "rivals":
        raise UserError("--search makes the searched plans of --levels rivals: give that, too")


def rival_multiples(bench: Bench, fast: float) -> dict[str, float]:
    """Return the budgets of --table rivals as multiples of FlowCache-fast's FLOPs."""
    comparison = bench.comparison
    own = published(comparison.words)
    slow = bench.trials.outcome(own, preset=comparison.slow_preset).flops
    print(f"FlowCache-slow spends {slow:.4f}")
    return {SLOW: slow / fast, FAST: 1.0, HALF: 0.5}


def rules_of(bench: Bench) -> list[tuple[str, str]]:
    """Return the adaptive rules, each with the level that it is set to."""
    words = bench.comparison.words
    if bench.options.levels == "rivals":
        rules = rival_rules(bench.comparison, bench.trials.runs.model.presets)
        return [(rule, level) for level in RIVAL_LEVELS for rule in rules]
    every = [(rule, MID) for rule in rule_names(words)]
    return every + [("flowcache", level) for level in LEVELS if level != MID]


def tuned(
    bench: Bench, flops: float, *, policy: str | None = None, given: Sequence[str] = ()
) -> Path:
    """Return the profile of a budget; it is made if it isn't there.

    Args:
        policy: one of `OWN_PROFILES`, made with what is `given` to tune.py; None: planned alone.
    """
    options = bench.options
    path = options.out / f"flops_{flops:.2f}.yaml"
    if policy is not None:
        path = profile_next_to(path, policy)
    if path.is_file():
        return path
    line = ["--model", options.model, "--architecture", options.architecture]
    line += ["--preset", bench.comparison.preset, "--target", f"flops={flops:.4f}"]
    line += ["--clips", str(options.clips), "--check-prompts", "0", *given]
    line += ["--work", str(bench.work), "--out", str(path), *options.settings]
    tune.command(tune.parse_options(line))
    return path


def error_model(work: Path) -> ErrorModel:
    """Return the error model of the calibration that tune.py has left."""
    parts = [Calibration.load(path) for path in sorted(work.glob("calibration-*.npz"))]
    if not parts:
        raise UserError(f"{work} holds no calibration: delete the profiles beside it")
    calibration = merge(parts)
    (guided,) = calibration.branches
    return calibration.error_model({guided: 1.0})


def make_level(path: Path, profile: Profile, model: ErrorModel) -> Level:
    """Return a budget with its profile and with as many even steps."""
    (plan,) = profile.reuse.plans
    even = even_steps(len(plan), num_steps=profile.setting.num_steps)
    return Level(
        flops=profile.predicted.flops,
        profile=path.name,
        even_steps=even,
        even_factor=model.best_factor(even, order=1),
        parabola_factor=model.best_factor(plan, order=2),
    )


def make_adaptive(
    bench: Bench, rule: str, level: str, own: Level, *, wanted: float, model: ErrorModel
) -> Adaptive:
    """Return an adaptive rule with the threshold that comes nearest to a budget."""
    words, is_rivals = bench.comparison.words, bench.options.levels == "rivals"
    preset, settings = rule_settings(
        rule, words, preset=bench.comparison.preset, profile=bench.options.out / own.profile
    )
    settings += published(words)

    def outcome(threshold: float | None) -> Outcome:
        given = [] if threshold is None else [f"reuse.threshold={threshold:.6g}"]
        return bench.trials.outcome([*settings, *given], preset=preset)

    threshold = None
    if (rule, level) not in (("flowcache", MID), ("flowcache", FAST)):
        threshold = find_threshold(
            lambda value: outcome(value).flops,
            wanted,
            start=STARTS[rule],
            tolerance=HALF_A_STEP / bench.trials.runs.size().num_steps,
            takes_nearest=is_rivals,
        )
    found = outcome(threshold)
    print(f"{rule:16} {level:5} threshold {threshold} spends {found.flops:.4f} of {wanted:.4f}")
    return Adaptive(rule, level, threshold, found.flops, suiting_factor(model, found.steps))


if __name__ == "__main__":
    sys.exit(main())
