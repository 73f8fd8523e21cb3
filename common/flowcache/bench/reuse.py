"""The table of reuse rules: every policy with the predictors that make sense, at three budgets.

Left out, because nobody would want it or nothing is learnt from it: TeaCache, MagCache, a content
signal and a guard at the low and the high budget (the middle one ranks them); published predictors
of stride and plans (velocities are better at the same cost); a held velocity of anything but a plan
(extrapolation costs nothing); FlowCache with a velocity at the low and the high budget; KV
compression and full attention (`--table methods` has them).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowcache.bench.budgets import HIGH, LOW, MID, Budgets
from flowcache.bench.methods import Comparison, Group, Method
from flowcache.tune.methods import AS_TUNED, VELOCITY, published
from flowcache.tune.runs import Words

FAITHFUL, TUNED = "FlowCache-fast", "planned"
TREND = "velocity + trend"


def trend(factor: float, *, order: int = 1) -> tuple[str, ...]:
    """Return settings of an extrapolated velocity."""
    return ("reuse.predict=velocity", f"reuse.extrapolate={factor:.4g}", f"reuse.order={order}")


def reuse_methods(comparison: Comparison, budgets: Budgets, folder: Path) -> tuple[Method, ...]:
    """Return the rows of the table.

    Args:
        folder: where the budgets' profiles are.
    """
    rows = _Rows(comparison, budgets, folder)
    return (
        *comparison.computed,
        *(rows.adaptive("flowcache", level, is_published=True) for level in (LOW, MID, HIGH)),
        rows.adaptive("flowcache", MID, is_published=False),
        *(
            rows.adaptive(rule, MID, is_published=is_published)
            for rule in rule_names(comparison.words)
            if rule != "flowcache"
            for is_published in (True, False)
        ),
        *(rows.stride(level) for level in (LOW, MID, HIGH)),
        *(rows.planned(level, AS_TUNED, ()) for level in (LOW, MID, HIGH)),
        rows.planned(MID, "velocity", VELOCITY),
        rows.planned(MID, "velocity + parabola", trend(rows.parabola_factor(MID), order=2)),
        *([rows.planned(MID, "clean estimate", CLEAN)] if comparison.has_clean else []),
        *(
            rows.planned(level, "guidance held", HELD_GUIDANCE)
            for level in (MID, HIGH)
            if comparison.has_guidance
        ),
        rows.guarded(MID),
    )


HELD_GUIDANCE = ("reuse.guidance_steps=null", "reuse.guidance_every=2")
"""Every second computed step runs the pass with text alone: a plan costs a quarter less."""
CLEAN = ("reuse.predict=clean", "reuse.extrapolate=0")
NAMES = {
    "flowcache": "FlowCache",
    "content": "FlowCache, content signal",
    "teacache": "TeaCache",
    "magcache": "MagCache",
}


def rule_names(words: Words) -> list[str]:
    """Return the adaptive rules of a model; a content signal may be the published one."""
    return [name for name in NAMES if name != "content" or words.content]


def rule_settings(rule: str, words: Words, *, preset: str, profile: Path) -> tuple[str, list[str]]:
    """Return the preset of an adaptive rule and its settings but the threshold."""
    if rule == "teacache":
        return words.whole_window, []
    if rule == "magcache":
        return preset, ["reuse.policy=magcache", f"reuse.profile={profile}"]
    return preset, list(words.content) if rule == "content" else []


@dataclass(frozen=True)
class _Rows:
    """Makes rows of one table."""

    comparison: Comparison
    budgets: Budgets
    folder: Path

    def adaptive(self, rule: str, level: str, *, is_published: bool) -> Method:
        words, found = self.comparison.words, self.budgets.rule(rule, level)
        preset, settings = rule_settings(
            rule, words, preset=self.comparison.preset, profile=self._profile(level)
        )
        if found.threshold is not None:
            settings.append(f"reuse.threshold={found.threshold:.6g}")
        is_fast = rule == "flowcache" and level == MID
        name = FAITHFUL if is_fast else f"{NAMES[rule]} ({level})"
        predictor = words.published.replace("_", " ") if is_published else TREND
        predict = published(words) if is_published else trend(found.factor)
        group = Group(NAMES[rule], predictor, level)
        return self._row(name, (*settings, *predict), group, preset=preset)

    def stride(self, level: str) -> Method:
        own = self.budgets.levels[level]
        steps = f"reuse.steps=[{','.join(map(str, own.even_steps))}]"
        settings = ("reuse.policy=stride", steps, *trend(own.even_factor))
        return self._row(f"stride ({level})", settings, Group("stride", TREND, level))

    def planned(self, level: str, predictor: str, settings: Sequence[str]) -> Method:
        given = ("reuse.policy=planned", f"reuse.profile={self._profile(level)}", *settings)
        return self._row(f"{TUNED} ({level})", given, Group(TUNED, predictor, level))

    def guarded(self, level: str) -> Method:
        profile = f"reuse.profile={self._profile(level)}"
        given = ("reuse.policy=guarded", profile, *self.comparison.words.content)
        return self._row(f"guarded ({level})", given, Group("guarded", AS_TUNED, level))

    def parabola_factor(self, level: str) -> float:
        return self.budgets.levels[level].parabola_factor

    def _profile(self, level: str) -> Path:
        return self.folder / self.budgets.levels[level].profile

    def _row(
        self, name: str, settings: Sequence[str], group: Group, *, preset: str | None = None
    ) -> Method:
        return Method(
            f"{name}, {group.predictor}",
            preset or self.comparison.preset,
            tuple(settings),
            self.comparison.computed[-1].name,
            group,
        )
