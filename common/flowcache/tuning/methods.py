"""What is compared: each a policy with a predictor, as settings of a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flowcache.policies import MagCache, ReuseRule
from flowcache.schedule import staggered
from flowcache.tuning.plan import Plan
from flowcache.tuning.runs import Words

REFERENCE = "every step computed"
NUM_THRESHOLDS = 400
"""Thresholds among which the one is sought that computes a given number of steps."""

OWN_SIGNAL = ("reuse.policy=flowcache", "reuse.warmup_steps=1000", "reuse.predict=velocity")
"""Every step is computed, and the distance of the preset's own signal is recorded."""

WHOLE_KV = "whole KV cache"
"""The preset with every step computed and no token dropped from its KV cache."""

VELOCITY = ("reuse.predict=velocity", "reuse.extrapolate=0")
AS_TUNED = "as tuned"
TRENDS: Mapping[str, tuple[str, ...]] = {
    "velocity": VELOCITY,
    "velocity + 0.5": ("reuse.predict=velocity", "reuse.extrapolate=0.5"),
}


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    settings: tuple[str, ...]
    preset: str | None = None
    """Instead of the one that is tuned."""
    policy: str = ""
    """What it is drawn as; "": it is not drawn."""
    predictor: str = ""


def whole_kv() -> Method:
    """Return the preset with every step computed and without KV compression."""
    return Method(WHOLE_KV, (*OWN_SIGNAL, "kv.compress=none"))


def published(words: Words) -> tuple[str, ...]:
    """Return settings of the published predictor."""
    return (f"reuse.predict={words.published}", "reuse.extrapolate=0")


def predictors(words: Words) -> dict[str, tuple[str, ...]]:
    """Return what replaces a reused step: as published, and the velocity."""
    return {words.published.replace("_", " "): published(words), **TRENDS}


def planned(plan: Plan) -> Method:
    """Return a plan with its own predictor, and its guidance."""
    predictor, steps = plan.predictor, guidance_steps(plan)
    settings = [
        f"reuse.predict={predictor.quantity}",
        f"reuse.extrapolate={predictor.factor if predictor.order else 0.0:.6g}",
        f"reuse.order={max(predictor.order, 1)}",
    ]
    if steps is not None:
        settings.append(f"reuse.guidance_steps=[{','.join(map(str, steps))}]")
    return Method(
        f"planned {plan.num_computed}, {predictor_name(plan)}",
        (*_steps(plan.steps), *settings),
        policy="planned",
        predictor=AS_TUNED,
    )


def searched(plan: Plan) -> Method:
    """Return a plan that a search has tried, under a name that no other plan has."""
    method = planned(plan)
    return replace(method, name=f"searched {' '.join(method.settings)}")


def reusing(plan: Plan, quantity: str) -> Method:
    """Return a plan that reuses another quantity, along the same share of its trend."""
    method = planned(plan)
    return replace(
        method,
        name=f"reusing {quantity} {' '.join(method.settings)}",
        settings=(*method.settings, f"reuse.predict={quantity}"),
    )


def predictor_name(plan: Plan) -> str:
    """Say what replaces a reused step, and how many steps run the conditional pass alone."""
    predictor, name = plan.predictor, plan.predictor.quantity
    if predictor.order:
        name += f" + {predictor.factor:.2f}{' of order 2' if predictor.order == 2 else ''}"
    return f"{name}, {len(plan.conditional)} with one pass" if plan.conditional else name


def guidance_steps(plan: Plan) -> list[int] | None:
    """Return the steps that run all passes; those off the plan do, if a guard computes them."""
    if not plan.conditional:
        return None
    return [step for step in range(plan.steps[-1] + 1) if step not in plan.conditional]


def held(plan: Plan) -> Method:
    """Return a plan whose reused steps hold the last velocity."""
    name = f"planned {plan.num_computed}, velocity"
    return Method(name, (*_steps(plan.steps), *VELOCITY), policy="planned", predictor="velocity")


def guarded(plan: Plan, profile: Path, words: Words) -> Method:
    """Return a plan that computes more where a chunk changes as no calibration clip did."""
    return Method(
        f"guarded {plan.num_computed}, {predictor_name(plan)}",
        ("reuse.policy=guarded", f"reuse.profile={profile}", *words.content),
        policy="guarded",
        predictor=AS_TUNED,
    )


def even_steps(num_computed: int, *, num_steps: int) -> list[int]:
    """Return own steps evenly spread from the first to the last one."""
    span = num_steps - 1
    return [round(i * span / (num_computed - 1)) for i in range(num_computed)]


def strides(num_computed: int, *, num_steps: int) -> list[Method]:
    """Return an even spacing of so many steps, with each velocity predictor."""
    steps = _steps(even_steps(num_computed, num_steps=num_steps))
    return _with_each(TRENDS, f"even {num_computed}", steps, policy="stride")


def adaptive(threshold: float, words: Words) -> list[Method]:
    """Return FlowCache with a threshold, with each predictor."""
    settings = ("reuse.policy=flowcache", f"reuse.threshold={threshold:.4g}")
    name = f"FlowCache {threshold:.4g}"
    return _with_each(predictors(words), name, settings, policy="FlowCache")


def magcache(threshold: float, profile: Path, words: Words) -> list[Method]:
    """Return MagCache with a threshold, as published and with a velocity along its trend."""
    settings = (
        "reuse.policy=magcache",
        f"reuse.profile={profile}",
        f"reuse.threshold={threshold:.4g}",
    )
    own = {name: each for name, each in predictors(words).items() if each != VELOCITY}
    return _with_each(own, f"MagCache {threshold:.4g}", settings, policy="MagCache")


def whole_window(words: Words) -> list[Method]:
    """Return TeaCache at the threshold of its preset, with each predictor."""
    methods = _with_each(predictors(words), "TeaCache", (), policy="TeaCache")
    return [replace(method, preset=words.whole_window) for method in methods]


def _with_each(
    own: Mapping[str, tuple[str, ...]], name: str, settings: tuple[str, ...], *, policy: str
) -> list[Method]:
    """Return a policy with each of some predictors."""
    return [
        Method(f"{name}, {predictor}", (*settings, *each), policy=policy, predictor=predictor)
        for predictor, each in own.items()
    ]


def closest_threshold(
    increments: Sequence[Sequence[float]],
    *,
    num_computed: float,
    warmup_steps: int,
    compute_last_step: bool,
) -> tuple[float, float]:
    """Return FlowCache's threshold that computes nearest to so many own steps of a chunk.

    Args:
        increments: by chunk, what each own step from the second one adds to the accumulator.
        compute_last_step: whether a chunk's own last step is always computed. Where it is not, the
            last tick of a run still is, which is not counted.

    Returns:
        the threshold, and the mean number of steps that it computes.
    """
    most = max(sum(abs(value) for value in chunk) for chunk in increments)

    def count(threshold: float) -> float:
        counts = [
            _count(chunk, threshold, warmup_steps, compute_last_step=compute_last_step)
            for chunk in increments
        ]
        return sum(counts) / len(counts)

    return _closest(most, count, num_computed)


def closest_magcache(
    ratios: Sequence[float], *, num_computed: float, warmup_steps: int
) -> tuple[float, float]:
    """Return MagCache's threshold that computes nearest to so many own steps of a chunk.

    Args:
        ratios: of magnitudes, by own step; see `MagCache`.
    """
    most = sum(abs(1 - math.prod(ratios[1 : i + 1])) for i in range(1, len(ratios)))

    def count(threshold: float) -> int:
        policy = MagCache(ratios, threshold, warmup_steps, ReuseRule.most_reuses)
        ticks = staggered([0], num_steps=len(ratios), lag=0)
        return sum(
            policy.plan(tick, {}, stored=[0] if tick.index else [])[0].is_computed for tick in ticks
        )

    return _closest(most, count, num_computed)


def _closest(
    most: float, count: Callable[[float], float], num_computed: float
) -> tuple[float, float]:
    """Return which of the thresholds up to `most` makes the count nearest, and the count."""
    grid = [most * 10 ** (-4 * (1 - i / NUM_THRESHOLDS)) for i in range(NUM_THRESHOLDS + 1)]
    counts = {threshold: count(threshold) for threshold in grid}
    best = min(counts, key=lambda threshold: abs(counts[threshold] - num_computed))
    return best, counts[best]


def _count(
    increments: Sequence[float], threshold: float, warmup_steps: int, *, compute_last_step: bool
) -> int:
    """Count the own steps that FlowCache computes, the first one included."""
    computed, total = 1, 0.0
    for step, increment in enumerate(increments, start=1):
        total += increment
        is_forced_last = compute_last_step and step == len(increments)
        if step < warmup_steps or is_forced_last or not total < threshold:
            computed, total = computed + 1, 0.0
    return computed


def _steps(steps: Sequence[int]) -> tuple[str, ...]:
    return ("reuse.policy=stride", f"reuse.steps=[{','.join(map(str, steps))}]")
