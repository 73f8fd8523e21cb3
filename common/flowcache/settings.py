"""Settings that every model's run has, with their checks and what they stand for."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from flowcache.compress import (
    CompressionStrategy,
    Granularity,
    ImportanceRedundancy,
    Order,
    Recent,
    SinkRecent,
)
from flowcache.errors import UserError
from flowcache.guidance import HeldGuidance
from flowcache.results import MAX_ORDER, ResultStore
from flowcache.reuse import (
    FlowCache,
    Rescale,
    ReusePolicy,
    Stride,
    TeaCache,
    Vanilla,
    identity,
)
from flowcache.tune.applied import follows_profile, profile_of
from flowcache.tune.policies import GuardedPlan, MagCache, Planned
from flowcache.tune.profile import Profile

MAX_PROMPT_CHARACTERS = 10_000
MAX_SEED = 2**63 - 1
POLICIES: Mapping[str, type[ReusePolicy]] = MappingProxyType(
    {
        "vanilla": Vanilla,
        "teacache": TeaCache,
        "flowcache": FlowCache,
        "stride": Stride,
        "planned": Planned,
        "guarded": GuardedPlan,
        "magcache": MagCache,
    }
)
"""What `reuse.policy` names."""


@dataclass(frozen=True)
class ReuseRule:
    """When a chunk is computed; each model adds what it compares and what it reuses."""

    policy: Literal[
        "vanilla", "teacache", "flowcache", "stride", "planned", "guarded", "magcache"
    ] = "vanilla"
    profile: str | None = None
    threshold: float = 0.1
    warmup_steps: int = 5
    every: int = 2
    steps: list[int] | None = None
    most_reuses: int = 8
    compute_last_step: bool = True
    extrapolate: float = 0.0
    order: int = 1
    guidance_every: int = 1
    guidance_steps: list[int] | None = None


@dataclass(frozen=True)
class KVRule:
    """Which clean tokens the KV cache keeps; each model adds how many."""

    compress: Literal["none", "importance", "recent", "sink_recent"] = "none"
    mix: float = 0.07
    kernel: int = 7
    granularity: Granularity = "token"
    queries: Granularity = "chunk"
    weighting: str = "none"
    power: float = 3.0
    order: Order = "position"
    sink_frames: int = 1


def policy_maker(rule: ReuseRule, *, rescale: Rescale = identity) -> Callable[[], ReusePolicy]:
    """Return what makes a reuse policy.

    Args:
        rescale: from a distance of signals to what is accumulated.

    Raises:
        UserError: the profile that the policy follows is missing or damaged.
    """
    if follows_profile(rule):
        _, profile = profile_of(rule)
        return _profile_policy(rule, profile)
    if rule.policy == "vanilla":
        return Vanilla
    if rule.policy == "stride":
        return partial(Stride, every=rule.every, warmup_steps=rule.warmup_steps, steps=rule.steps)
    if rule.policy == "teacache":
        return partial(TeaCache, rule.threshold, rule.warmup_steps, rescale)
    return partial(
        FlowCache,
        rule.threshold,
        rule.warmup_steps,
        rescale,
        compute_last_step=rule.compute_last_step,
    )


def _profile_policy(rule: ReuseRule, profile: Profile) -> Callable[[], ReusePolicy]:
    plans, observed = profile.reuse.plans, profile.observed
    if rule.policy == "planned":
        return partial(Planned, plans)
    if rule.policy == "guarded":
        return partial(GuardedPlan, plans, observed.distance_low, observed.distance_high)
    return partial(
        MagCache,
        observed.magnitude_ratios,
        threshold=rule.threshold,
        warmup_steps=rule.warmup_steps,
        most_reuses=rule.most_reuses,
    )


def store_of(rule: ReuseRule) -> ResultStore:
    """Return a new store of the results that reused steps are made from."""
    return ResultStore(rule.extrapolate, order=rule.order)


def stored_results(rule: ReuseRule) -> int:
    """Return how many results of a chunk such a store holds."""
    return 1 + rule.order if rule.extrapolate else 1


def guidance_of(rule: ReuseRule) -> HeldGuidance:
    """Return a new record of which steps run the conditional pass alone."""
    return HeldGuidance(rule.guidance_steps, every=rule.guidance_every)


def check_guidance(rule: ReuseRule, *, num_passes: int) -> None:
    """Check that there is guidance, if its difference is to be held.

    Args:
        num_passes: guidance passes of the run.

    Raises:
        UserError: there is none.
    """
    if guidance_of(rule).is_on and num_passes == 1:
        raise UserError(
            "reuse.guidance_every and reuse.guidance_steps hold what guidance adds to the "
            "conditional pass, but this run has that one pass only (a distilled model, or no "
            "guidance): leave them out"
        )


def threshold_of(rule: ReuseRule) -> float | None:
    """Return the threshold of an adaptive policy, or None."""
    return rule.threshold if rule.policy in ("teacache", "flowcache", "magcache") else None


def strategy_of(rule: KVRule) -> CompressionStrategy | None:
    """Return what picks the clean tokens that stay, or None where all do.

    Raises:
        UserError: a setting of the strategy is not possible.
    """
    if rule.compress == "none":
        return None
    if rule.compress == "recent":
        return Recent()
    if rule.compress == "sink_recent":
        return SinkRecent(sink_frames=rule.sink_frames)
    return ImportanceRedundancy(
        mix=rule.mix,
        kernel=rule.kernel,
        granularity=rule.granularity,
        queries=rule.queries,
        weighting=rule.weighting,
        power=rule.power,
        order=rule.order,
    )


def check_reuse(rule: ReuseRule, *, num_steps: int, least_warmup: int) -> None:
    """Check when chunks are to be computed.

    Args:
        num_steps: steps of a chunk.
        least_warmup: least number of warm-up steps.

    Raises:
        UserError: a value is out of its range.
    """
    check_least("reuse.threshold", rule.threshold, 0)
    check_least("reuse.warmup_steps", rule.warmup_steps, least_warmup)
    check_least("reuse.every", rule.every, 1)
    check_least("reuse.most_reuses", rule.most_reuses, 0)
    if not 1 <= rule.order <= MAX_ORDER:
        raise UserError(
            f"reuse.order is the degree of extrapolation and must be in 1..{MAX_ORDER}, not "
            f"{rule.order}; to hold the last result, set reuse.extrapolate=0"
        )
    check_least("reuse.guidance_every", rule.guidance_every, 1)
    if rule.guidance_every > 1 and rule.guidance_steps is not None:
        raise UserError(
            f"reuse.guidance_every={rule.guidance_every} and reuse.guidance_steps both say which "
            "steps run all passes: give one of them"
        )
    for name in ("steps", "guidance_steps"):
        wrong = [step for step in getattr(rule, name) or () if not 0 <= step < num_steps]
        if wrong:
            raise UserError(
                f"reuse.{name} are own steps of a chunk, 0..{num_steps - 1}: {wrong[0]} is none"
            )


def check_mix(rule: KVRule) -> None:
    """Check the share of importance.

    Raises:
        UserError: it is no share.
    """
    if not 0 <= rule.mix <= 1:
        raise UserError(f"kv.mix is a share and must be in 0..1, not {rule.mix:g}")


def check_finite(section: Any, *, prefix: str = "") -> None:
    """Refuse an infinite value in a section or one of its sections.

    Raises:
        UserError: naming the key.
    """
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            check_finite(value, prefix=f"{prefix}{entry.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}{entry.name} must be a finite number, not {value:g}")


def check_prompt(name: str, prompt: str, *, may_be_empty: bool) -> None:
    """Check that a prompt says something, is text, and is not a book.

    Raises:
        UserError: it is not so.
    """
    if not may_be_empty and not prompt.strip():
        raise UserError(f"{name} is empty: say what the video shows")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"{name} is not valid UTF-8 text: check the encoding of your terminal")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"{name} has {len(prompt)} characters, at most {MAX_PROMPT_CHARACTERS} are allowed "
            "(the model reads some hundred tokens): shorten it"
        )


def check_seed(name: str, seed: int) -> None:
    """Check that a seed fits a random number generator.

    Raises:
        UserError: it does not.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"{name} must be in 0..{MAX_SEED}, not {seed}")


def check_least(name: str, value: float, least: float) -> None:
    """Check that a number is not below its least value.

    Raises:
        UserError: it is, or it is no number.
    """
    if not value >= least:
        raise UserError(f"{name} must be {least:g} or more, not {value:g}")
