"""Settings that every model's run has, with their checks and what they stand for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Annotated, Literal, TypeAlias

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
from flowcache.planned import GuardedPlan, MagCache, Planned
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
from flowcache.runtime.bounds import IS_PATH, Bounds
from flowcache.runtime.profile import Profile
from flowcache.runtime.profiled import follows_profile, profile_of

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
"""Denoising steps of a chunk. Source: the timesteps that the models were trained with."""
MAX_FRAMES = 1_000_000
"""Of a video: eleven hours at 24 frames per second."""
MAX_CHUNK_STEPS = 1_000_000
"""Steps of all chunks, which are planned one by one: four hours of video in MAGI-1's 64 steps."""
MAX_PASS_TOKENS = 2**20
"""Tokens that attend to each other in one pass; 97 frames of 4K are 810,000 in SkyReels-V2."""

Seed: TypeAlias = Annotated[int, Bounds(0, MAX_SEED)]
Frames: TypeAlias = Annotated[int, Bounds(1, MAX_FRAMES)]
Pixels: TypeAlias = Annotated[int, Bounds(16, 4096)]
Fps: TypeAlias = Annotated[int, Bounds(1, 1000)]
NumSteps: TypeAlias = Annotated[int, Bounds(1, MAX_STEPS)]
OwnSteps: TypeAlias = Annotated[list[int] | None, Bounds(0, MAX_STEPS - 1)]
Threshold: TypeAlias = Annotated[float, Bounds(0, 10**9)]
Share: TypeAlias = Annotated[float, Bounds(0, 1)]
Place: TypeAlias = Annotated[str | None, IS_PATH]
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
    profile: Place = None
    threshold: Threshold = 0.1
    warmup_steps: Annotated[int, Bounds(0, MAX_STEPS)] = 5
    every: Annotated[int, Bounds(1, MAX_STEPS)] = 2
    steps: OwnSteps = None
    most_reuses: Annotated[int, Bounds(0, MAX_STEPS)] = 8
    compute_last_step: bool = True
    extrapolate: Annotated[float, Bounds(-100, 100)] = 0.0
    order: Annotated[int, Bounds(1, MAX_ORDER)] = 1
    guidance_every: Annotated[int, Bounds(1, MAX_STEPS)] = 1
    guidance_steps: OwnSteps = None


@dataclass(frozen=True)
class KVRule:
    """Which clean tokens the KV cache keeps; each model adds how many."""

    compress: Literal["none", "importance", "recent", "sink_recent"] = "none"
    mix: Share = 0.07
    kernel: Annotated[int, Bounds(1, 1001)] = 7
    granularity: Granularity = "token"
    queries: Granularity = "chunk"
    weighting: str = "none"
    power: Annotated[float, Bounds(0, 100, is_open=True)] = 3.0
    order: Order = "position"
    sink_frames: Annotated[int, Bounds(1, MAX_FRAMES)] = 1


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
    """Check that the rules when chunks are computed fit each other and the number of steps.

    Args:
        num_steps: steps of a chunk.
        least_warmup: least number of warm-up steps.

    Raises:
        UserError: they don't.
    """
    if rule.warmup_steps < least_warmup:
        raise UserError(
            f"reuse.warmup_steps must be {least_warmup} or more, not {rule.warmup_steps}"
        )
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


def check_prompt(name: str, prompt: str) -> None:
    """Check that a prompt says something.

    Raises:
        UserError: it is empty.
    """
    if not prompt.strip():
        raise UserError(f"{name} is empty: say what the video shows")


def check_work(*, num_chunks: int, num_steps: int) -> None:
    """Refuse a video so long that planning it, step by step, would fill time and memory.

    Args:
        num_chunks: of all windows of the video, given ones included.
        num_steps: ticks that each chunk adds at most, or its own steps: the larger number.

    Raises:
        UserError: it is too long.
    """
    if num_chunks * num_steps > MAX_CHUNK_STEPS:
        raise UserError(
            f"{num_chunks} chunks of {num_steps} steps are {num_chunks * num_steps} steps, at "
            f"most {MAX_CHUNK_STEPS} are planned: make a shorter video (num_frames), or use larger "
            "chunks or fewer steps"
        )


def check_pass(num_tokens: int, *, sizes: str) -> None:
    """Refuse a pass over more tokens than any model and device can do.

    Args:
        num_tokens: that go through the blocks at once, at least.
        sizes: the settings that make it smaller.

    Raises:
        UserError: there are too many.
    """
    if num_tokens > MAX_PASS_TOKENS:
        raise UserError(
            f"one pass would have {num_tokens} tokens, at most {MAX_PASS_TOKENS} are possible: "
            f"lower {sizes}"
        )
