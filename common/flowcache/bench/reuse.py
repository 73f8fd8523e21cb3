"""The table of reuse rules: every policy with the predictors that make sense, at three budgets.

Left out, because nobody would want it or nothing is learnt from it: TeaCache, MagCache, a content
signal and a guard at the low and the high budget (the middle one ranks them); published predictors
of stride and plans (velocities are better at the same cost); a held velocity of anything but a plan
(extrapolation costs nothing); FlowCache with a velocity at the low and the high budget; KV
compression and full attention (`--table methods` has them).
"""

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from flowcache.bench.methods import Comparison, Group, Method
from flowcache.errors import UserError
from flowcache.runtime.config import load_config
from flowcache.runtime.files import write_text
from flowcache.runtime.run import Clip
from flowcache.tuning.gap import ErrorModel
from flowcache.tuning.methods import AS_TUNED, VELOCITY, published
from flowcache.tuning.runs import Prompt, Runs, Words
from flowcache.tuning.study import Rows

BUDGETS_FILE = "budgets.yaml"
LOW, MID, HIGH = "low", "mid", "high"
LEVELS = {LOW: 0.6, MID: 1.0, HIGH: 1.3}
"""Budget -> its FLOPs as a multiple of FlowCache-fast's."""
MAKE_WITH = "scripts/tune_budgets.py"


@dataclass(frozen=True)
class Adaptive:
    """An adaptive rule at one budget."""

    rule: str
    """One of `NAMES`."""
    level: str
    threshold: float | None
    """None: that of the preset."""
    flops: float
    """Share of the FLOPs of every step, measured on calibration clips."""
    factor: float
    """Of an extrapolated velocity: what suits the steps that the rule computes."""


@dataclass(frozen=True)
class Level:
    """One budget."""

    flops: float
    """Most FLOPs, as a share of those of every step."""
    profile: str
    """File in the folder of the budgets."""
    even_steps: list[int]
    """As many own steps as the plan computes, evenly spread."""
    even_factor: float
    """Of an extrapolated velocity, for the even steps."""
    parabola_factor: float
    """Of a velocity that is extrapolated with order 2, for the plan."""


@dataclass(frozen=True)
class Budgets:
    """What `scripts/tune_budgets.py` has found out."""

    command: str
    model: str
    checkpoint: str
    settings: list[str]
    levels: dict[str, Level]
    adaptive: list[Adaptive]

    def rule(self, name: str, level: str) -> Adaptive:
        """Return an adaptive rule at one budget."""
        (found,) = (each for each in self.adaptive if (each.rule, each.level) == (name, level))
        return found


def write_budgets(budgets: Budgets, folder: Path) -> Path:
    """Write the budgets and return where they are."""
    path = folder / BUDGETS_FILE
    head = f"# Made by {MAKE_WITH}; change nothing here: make it again.\n"
    write_text(path, head + yaml.safe_dump(asdict(budgets), sort_keys=False, width=100))
    return path


def read_budgets(
    folder: Path | None, *, model: str, checkpoint: str, levels: Collection[str] = tuple(LEVELS)
) -> Budgets:
    """Read the budgets of a folder, which must have been made for this model and these levels."""
    if folder is None:
        raise UserError(f"this table needs --profiles DIR: a folder that {MAKE_WITH} made")
    path = folder / BUDGETS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file: make it with {MAKE_WITH} --out {folder}")
    budgets = load_config(Budgets, [path])
    if (budgets.model, budgets.checkpoint) != (model, checkpoint):
        raise UserError(
            f"{path} was made for {budgets.model} {budgets.checkpoint}, not for {model} "
            f"{checkpoint}: choose another --profiles"
        )
    if set(budgets.levels) != set(levels):
        raise UserError(
            f"{path} must have the levels {', '.join(levels)}, but has "
            f"{', '.join(budgets.levels)}: make it again with {MAKE_WITH} --levels"
        )
    return budgets


# Rows ---------------------------------------------------------------------------------------------

FAITHFUL, TUNED = "FlowCache-fast", "planned"
TREND = "velocity + trend"
SEARCHED, STEADY, CHOSEN = "searched", "TRAC", "AutoTarget"
OWN_PROFILES = (SEARCHED, STEADY, CHOSEN)
"""Plans that were searched, by the mean error or with its spread, and those whose predictor was
chosen by its error."""
HELD_GUIDANCE = ("reuse.guidance_steps=null", "reuse.guidance_every=2")
"""Every second computed step runs the pass with text alone: a plan costs a quarter less."""
CLEAN = ("reuse.predict=clean", "reuse.extrapolate=0")
NAMES = {
    "flowcache": "FlowCache",
    "content": "FlowCache, content signal",
    "teacache": "TeaCache",
    "magcache": "MagCache",
    "magcache_bounded": "MagCache, published bounds",
    "racfg": "RA-CFG",
    "racer": "RACER",
    "motioncache": "MotionCache",
}
RULES = ("flowcache", "content", "teacache", "magcache")
"""Those of the table of reuse rules; the table of rivals has all."""
CALIBRATED: Mapping[str, tuple[str, ...]] = {
    "magcache": ("reuse.policy=magcache",),
    "magcache_bounded": (
        "reuse.policy=magcache",
        "reuse.warmup_steps=1",
        "reuse.most_reuses=2",
        "reuse.retention=0.2",
    ),
    "racfg": ("reuse.policy=racfg",),
}
"""Settings of the rules that build on a profile."""


def profile_next_to(planned: Path, policy: str) -> Path:
    """Return where the profile of a searched plan, or one of a chosen predictor, is."""
    return planned.with_name(f"{policy.lower()}_{planned.name}")


def trend(factor: float, *, order: int = 1) -> tuple[str, ...]:
    """Return settings of an extrapolated velocity."""
    return ("reuse.predict=velocity", f"reuse.extrapolate={factor:.4g}", f"reuse.order={order}")


def rule_names(words: Words, every: Iterable[str] = RULES) -> list[str]:
    """Return those of some rules that a model has; a content signal may be the published one."""
    return [name for name in every if name != "content" or words.content]


def rule_settings(rule: str, words: Words, *, preset: str, profile: Path) -> tuple[str, list[str]]:
    """Return the preset of an adaptive rule and its settings but the threshold."""
    if rule == "teacache":
        return words.whole_window, []
    if rule == "motioncache":
        return rule, []
    if rule in CALIBRATED:
        return preset, [*CALIBRATED[rule], f"reuse.profile={profile}"]
    if rule == "racer":
        return preset, ["reuse.policy=racer"]
    return preset, list(words.content) if rule == "content" else []


def reuse_methods(comparison: Comparison, budgets: Budgets, folder: Path) -> tuple[Method, ...]:
    """Return the rows of the table.

    Args:
        folder: where the budgets' profiles are.
    """
    rows = RowMaker(comparison, budgets, folder)
    parabola = trend(budgets.levels[MID].parabola_factor, order=2)
    return (
        *comparison.computed,
        *(rows.adaptive("flowcache", level, is_published=True) for level in LEVELS),
        rows.adaptive("flowcache", MID, is_published=False),
        *(
            rows.adaptive(rule, MID, is_published=is_published)
            for rule in rule_names(comparison.words)
            if rule != "flowcache"
            for is_published in (True, False)
        ),
        *(rows.stride(level) for level in LEVELS),
        *(rows.profiled(TUNED, level, AS_TUNED) for level in LEVELS),
        rows.profiled(TUNED, MID, "velocity", VELOCITY),
        rows.profiled(TUNED, MID, "velocity + parabola", parabola),
        *([rows.profiled(TUNED, MID, "clean estimate", CLEAN)] if comparison.has_clean else []),
        *(
            rows.profiled(TUNED, level, "guidance held", HELD_GUIDANCE)
            for level in (MID, HIGH)
            if comparison.has_guidance
        ),
        rows.profiled("guarded", MID, AS_TUNED, comparison.words.content),
    )


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of one table."""

    comparison: Comparison
    budgets: Budgets
    folder: Path

    def adaptive(self, rule: str, level: str, *, is_published: bool) -> Method:
        """Return an adaptive rule with the published predictor, or a velocity along its trend."""
        words, found = self.comparison.words, self.budgets.rule(rule, level)
        preset, settings = rule_settings(
            rule, words, preset=self.comparison.preset, profile=self._profile(level)
        )
        if found.threshold is not None:
            settings.append(f"reuse.threshold={found.threshold:.6g}")
        is_fast = rule == "flowcache" and level == MID
        name = FAITHFUL if is_fast else f"{NAMES[rule]} ({level})"
        predictor = words.published.replace("_", " ") if is_published else TREND
        settings += published(words) if is_published else trend(found.factor)
        return self._row(name, Group(NAMES[rule], predictor, level), settings, preset=preset)

    def stride(self, level: str) -> Method:
        """Return evenly spread steps, as many as the plan computes."""
        own = self.budgets.levels[level]
        steps = f"reuse.steps=[{','.join(map(str, own.even_steps))}]"
        settings = ("reuse.policy=stride", steps, *trend(own.even_factor))
        return self._row(f"stride ({level})", Group("stride", TREND, level), settings)

    def profiled(
        self, policy: str, level: str, predictor: str, settings: Sequence[str] = ()
    ) -> Method:
        """Return what follows the profile of a level; those of `OWN_PROFILES` have another one."""
        profile, followed = self._profile(level), policy
        if policy in OWN_PROFILES:
            profile, followed = profile_next_to(profile, policy), TUNED
        given = (f"reuse.policy={followed}", f"reuse.profile={profile}", *settings)
        return self._row(f"{policy} ({level})", Group(policy, predictor, level), given)

    def _profile(self, level: str) -> Path:
        return self.folder / self.budgets.levels[level].profile

    def _row(
        self, name: str, group: Group, settings: Sequence[str], *, preset: str | None = None
    ) -> Method:
        return Method(
            f"{name}, {group.predictor}",
            preset or self.comparison.preset,
            tuple(settings),
            self.comparison.computed[-1].name,
            group,
        )


# Thresholds ---------------------------------------------------------------------------------------

MOST_TRIALS = 8
"""Thresholds tried per budget, those tried for other budgets not counted."""
WIDEST = 16.0
"""First step of the search, as a ratio of thresholds."""
LEAST_THRESHOLD, MOST_THRESHOLD = 1e-6, 1e6
EVERY_STEP = ("reuse.policy=vanilla",)


@dataclass(frozen=True)
class Outcome:
    """What a rule does on the calibration clips."""

    flops: float
    """Share of the FLOPs of every step."""
    steps: list[list[int]]
    """Computed own steps of every chunk of every clip."""


@dataclass(frozen=True)
class Trials:
    """Measures rules on calibration clips, each once; the rows are kept."""

    runs: Runs
    rows: Rows
    prompts: Sequence[Prompt]

    def outcome(self, settings: Sequence[str], *, preset: str | None = None) -> Outcome:
        """Return what a rule does, measured now or before."""
        found = [self._row(prompt, settings, preset) for prompt in self.prompts]
        whole = [self._row(prompt, EVERY_STEP, None) for prompt in self.prompts]
        flops = statistics.fmean(
            own["flops"] / every["flops"] for own, every in zip(found, whole, strict=True)
        )
        return Outcome(flops, [steps for row in found for steps in row["steps"]])

    def _row(self, prompt: Prompt, settings: Sequence[str], preset: str | None) -> dict[str, Any]:
        key = {"index": prompt.index, "settings": list(settings), "preset": preset}
        known = self.rows.find(**key)
        if known:
            return known[0]
        clip = self.runs.render(settings, prompt=prompt.text, seed=prompt.seed, preset=preset)
        self.rows.add({**key, "flops": clip.stats.computed_flops, "steps": computed_steps(clip)})
        return self.rows.find(**key)[0]


def computed_steps(clip: Clip) -> list[list[int]]:
    """Return the own steps that each chunk computed in the first guidance branch, ascending."""
    branch = clip.stats.passes[0].branch
    steps: dict[tuple[int, int], list[int]] = {}
    for row in clip.stats.passes:
        if row.branch == branch and row.is_computed:
            steps.setdefault((row.segment, row.chunk), []).append(row.step)
    return list(steps.values())


def find_threshold(
    flops_of: Callable[[float], float],
    wanted: float,
    *,
    start: float,
    tolerance: float,
    takes_nearest: bool = False,
) -> float:
    """Return the threshold whose share of FLOPs is nearest to a wanted one.

    The share falls as the threshold rises. From `start` the threshold is multiplied until the
    wanted share lies between two tried ones; then the interval is halved, in logarithms.

    Args:
        flops_of: measures the share of a threshold.
        tolerance: of the share; the search ends there.
        takes_nearest: whether the nearest threshold is taken where no one comes so near; else that
            is an error.
    """
    tried = {start: flops_of(start)}

    def nearest() -> float:
        return min(tried, key=lambda threshold: abs(tried[threshold] - wanted))

    while abs(tried[nearest()] - wanted) > tolerance and len(tried) < MOST_TRIALS:
        below = [threshold for threshold, flops in tried.items() if flops > wanted]
        above = [threshold for threshold, flops in tried.items() if flops <= wanted]
        if below and above:
            threshold = math.sqrt(max(below) * min(above))
        else:
            threshold = max(tried) * WIDEST if below else min(tried) / WIDEST
        if not LEAST_THRESHOLD < threshold < MOST_THRESHOLD:
            if takes_nearest:
                break
            raise UserError(
                f"no threshold between {LEAST_THRESHOLD:g} and {MOST_THRESHOLD:g} makes a rule "
                f"spend {wanted:.3f} of the FLOPs: the nearest is {tried[nearest()]:.3f}"
            )
        tried[threshold] = flops_of(threshold)
    return nearest()


def suiting_factor(model: ErrorModel, steps: Sequence[Sequence[int]]) -> float:
    """Return the factor of linear extrapolation that suits chunks of these computed steps."""
    return statistics.fmean(model.best_factor(own, order=1) for own in steps)


# Claims -------------------------------------------------------------------------------------------

MORE_DECIBEL = 6.0
"""At FlowCache-fast's FLOPs, a plan's PSNR is to be better by this."""
MOST_FLOPS = 0.6
"""Of FlowCache-fast's, for the same PSNR."""
SAME_FLOPS = 1.005
"""What counts as FlowCache-fast's FLOPs at most."""
Row = Mapping[str, Any]


def claims(table: Sequence[Row]) -> list[str]:
    """Say of each claim about tuned plans whether it holds; [] without the rows for it.

    Only plans with the predictor of their profile count, one per budget, so that no best one is
    picked from many after the fact.
    """
    fast = next((row for row in table if row["method"].startswith(f"{FAITHFUL}, ")), None)
    planned = {"policy": TUNED, "predictor": AS_TUNED}
    plans = [row for row in table if row["group"] and planned.items() <= row["group"].items()]
    if fast is None or not plans:
        return []

    def best(share: float) -> Row | None:
        cheap = [plan for plan in plans if plan["gflops"] <= share * fast["gflops"]]
        return max(cheap, key=_decibel, default=None)

    better = f"at {FAITHFUL}'s FLOPs at least {MORE_DECIBEL:g} dB more PSNR, and judge accuracy "
    better += "no lower"
    cheaper = f"the same PSNR at no more than {100 * MOST_FLOPS:.0f} % of {FAITHFUL}'s FLOPs"
    same = best(SAME_FLOPS)
    return [
        f"{better}: {_verdict(same, fast, gain=MORE_DECIBEL, with_judge=True)}",
        f"{cheaper}: {_verdict(best(MOST_FLOPS), fast, gain=0.0)}",
        _seconds(same or plans[0], fast),
    ]


def _verdict(plan: Row | None, fast: Row, *, gain: float, with_judge: bool = False) -> str:
    if plan is None:
        return "not decided, no plan has so few FLOPs"
    more, cost = _decibel(plan) - _decibel(fast), 100 * plan["gflops"] / fast["gflops"]
    ours, others = plan["judge_accuracy"], fast["judge_accuracy"]
    verdict = "holds" if more >= gain and (ours >= others or not with_judge) else "DOES NOT HOLD"
    judged = f", judge {100 * ours:.0f} % against {100 * others:.0f} %," if with_judge else " at"
    return f"{verdict} ({plan['method']}: {more:+.2f} dB{judged} {cost:.0f} % of the FLOPs)"


def _seconds(plan: Row, fast: Row) -> str:
    return (
        f"DiT seconds: {plan['method']} {plan['dit_seconds']:.2f}, "
        f"{FAITHFUL} {fast['dit_seconds']:.2f}, every step "
        f"{plan['dit_seconds'] * plan['speedup_base']:.2f}"
    )


def _decibel(row: Row) -> float:
    """Return the PSNR against every step; that of clips which are all equal is infinite."""
    return math.inf if row["psnr_base"] is None else row["psnr_base"]
