"""Which tokens of a chunk are computed, where not all of them need to be.

A policy says *when* a chunk is computed, `flowcache.predict` *what* the others get; a token choice
says *which* of its tokens go through the blocks. Only their queries run; they see the whole prefix,
in which the keys and values of the other tokens are those of their last computed step. Each
guidance branch has a choice of its own.

To add a choice: write its class, whose fields name the settings that it takes, and list it in
`TOKENS`. A setting that no other choice has is one more field of `TokenRule`, with its bounds.

Axes: F latent frames of a chunk, P tokens of a frame, S tokens (F * P), D channels.

Source: MotionCache (arXiv 2605.01725), in its two published forms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from flowcache.bounds import MAX_STEPS, Bounds, OneOf, OwnSteps, Share, made_of
from flowcache.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from flowcache.policies import Decision, Decisions
    from flowcache.schedule import Tick

Weighed: TypeAlias = Literal["hidden", "latent"]
"""Whose motion weighs tokens: what the blocks put out, or the noisy latent after the step."""


def motion_weights(x_FPD: Tensor, *, before_PD: Tensor | None, least: float) -> Tensor:
    """Return the weight of each token, `[F, P]` in least..1: how much it moved, scaled by frame.

    The motion of a token is the mean difference to the same token of the frame before. In each
    frame the least motion gets `least` and the largest 1; where all move alike, all get 1.

    Example, one channel and `least` 0.6: the frame 0 0 0 followed by 1 3 5 gives 0.6 0.8 1.0.

    Args:
        before_PD: the frame before the first one; None: that one moves as the one behind it does.
    """
    import torch

    x = x_FPD.float()
    frames = x if before_PD is None else torch.cat([before_PD.float().unsqueeze(0), x])
    if len(frames) == 1:
        return torch.ones_like(x[..., 0])
    # MotionCache divides by the mean size of the frame before, which the scaling takes out again
    motion_FP = (frames[1:] - frames[:-1]).abs().mean(dim=-1)
    if before_PD is None:
        motion_FP = torch.cat([motion_FP[:1], motion_FP])
    low, high = motion_FP.aminmax(dim=1, keepdim=True)
    share = ((motion_FP - low) / (high - low)).where(high > low, 1.0)
    return least + (1 - least) * share


@dataclass
class TokenChoice(ABC):
    """Chooses in one guidance branch which tokens of each chunk are computed."""

    weighed: Weighed
    least_weight: float
    weights: dict[int, Tensor] = field(default_factory=dict, init=False)
    """Chunk -> weight of each token, `[F, P]`."""
    last_frames: dict[int, Tensor] = field(default_factory=dict, init=False)
    """Chunk -> what was seen last of its last frame, `[P, D]`."""

    @abstractmethod
    def choose(self, tick: Tick, plan: Decisions, *, stored: Collection[int]) -> Decisions:
        """Return the decisions of a policy, with the tokens that are computed.

        Args:
            stored: chunks with a stored result; the others have to be computed as a whole.
        """

    def see(self, chunk: int, x_FPD: Tensor) -> None:
        """Weigh the tokens of a chunk anew, after a step, by what `weighed` names.

        Noisy latents of two chunks are of two noise levels: there, the first frame has weight 1.
        """
        is_hidden = self.weighed == "hidden"
        before_PD = self.last_frames.get(chunk - 1) if is_hidden else None
        weight_FP = motion_weights(x_FPD, before_PD=before_PD, least=self.least_weight)
        if is_hidden:
            self.last_frames[chunk] = x_FPD[-1].clone()
        else:
            weight_FP[0] = 1
        self.weights[chunk] = weight_FP

    def drop(self, chunk: int) -> None:
        """Forget a chunk that is clean, but for its last frame, which the next one needs."""
        self.weights.pop(chunk, None)
        self.last_frames.pop(chunk - 1, None)


@dataclass
class MotionTokens(TokenChoice):
    """Compute a token when its weighted distances since its last computed step reach a threshold.

    The distances are those that FlowCache compares. A chunk is computed as a whole in its first
    `warmup_steps` own steps and in the last tick. Then it is coarse: all weights count as 1, which
    is FlowCache, in its first `coarse_steps` own steps and until it was computed `coarse_updates`
    times after the warm-up. From there on each token has a sum of its own.

    Example: threshold 0.1, weights 0.6, 0.8 and 1.0. Distances of 0.06 and 0.05 make the sums
    0.066, 0.088 and 0.11: the third token is computed, and its sum is 0 again. A further 0.05 makes
    0.096, 0.128 and 0.05: the second one is.
    """

    threshold: float
    warmup_steps: int
    vote: float | None
    """A place is computed in all frames if more than this share of them ask; None: no vote."""
    least_share: float
    """If fewer tokens are to be computed, none is, and all sums stay."""
    coarse_updates: int
    coarse_steps: int
    compute_last_step: bool = True
    rescale: Callable[[float], float] = lambda distance: distance
    sums: dict[int, float | Tensor] = field(default_factory=dict, init=False)
    """Chunk -> sum of its tokens, `[F, P]`; a number where all have the same one."""
    updates: dict[int, int] = field(default_factory=dict, init=False)
    """Chunk -> how often it was computed after the warm-up while it was coarse."""

    def choose(self, tick: Tick, plan: Decisions, *, stored: Collection[int]) -> Decisions:
        made: Decisions = {}
        for chunk, step in tick.steps.items():
            is_forced = tick.is_forced(
                chunk, warmup_steps=self.warmup_steps, with_last=self.compute_last_step
            )
            is_forced |= chunk not in stored or tick.is_last
            made[chunk] = self._decide(chunk, step, plan[chunk], is_forced=is_forced)
        return made

    def drop(self, chunk: int) -> None:
        super().drop(chunk)
        self.sums.pop(chunk, None)
        self.updates.pop(chunk, None)

    def _decide(self, chunk: int, step: int, decision: Decision, *, is_forced: bool) -> Decision:
        if is_forced or decision.distance is None:
            self.sums[chunk] = 0.0
            return replace(decision, is_computed=True)
        before, added = self.sums[chunk], self.rescale(decision.distance)
        count = self.updates.get(chunk, 0)
        if isinstance(before, float) and (step < self.coarse_steps or count < self.coarse_updates):
            total = before + added
            # "not below": a distance that is not a number must lead to a computation
            is_computed = not total < self.threshold
            self.sums[chunk] = 0.0 if is_computed else total
            self.updates[chunk] = count + is_computed
            return replace(decision, is_computed=is_computed, accumulated=total)
        sum_FP = before + added * self.weights[chunk]
        asked_FP = self._voted(~(sum_FP < self.threshold))
        rows = asked_FP.flatten().nonzero().flatten()
        total, size = float(sum_FP.max()), asked_FP.numel()
        is_computed = len(rows) > 0 and len(rows) >= self.least_share * size
        self.sums[chunk] = sum_FP.masked_fill(asked_FP, 0.0) if is_computed else sum_FP
        chosen = rows if is_computed and len(rows) < size else None
        return replace(decision, is_computed=is_computed, accumulated=total, rows=chosen)

    def _voted(self, asked_FP: Tensor) -> Tensor:
        if self.vote is None:
            return asked_FP
        return (asked_FP.float().mean(dim=0) > self.vote).expand_as(asked_FP)


@dataclass
class TopTokens(TokenChoice):
    """In some of the computed own steps, compute a share of the tokens: those that need it most.

    These are the tokens with the largest weight times age, the steps since a token was computed.
    Of a policy's computed steps those in `steps` are made so; the first and the last own step are
    not. Example: half of the tokens with weights 0.6, 0.7, 0.9 and 1.0. One step after a whole one
    the last two are computed; one later, when the first two are two steps old, these are.
    """

    steps: Collection[int]
    share: float
    ages: dict[int, float | Tensor] = field(default_factory=dict, init=False)
    """Chunk -> steps since each token was computed, `[F, P]`; a number where all are alike."""

    def choose(self, tick: Tick, plan: Decisions, *, stored: Collection[int]) -> Decisions:
        made: Decisions = {}
        for chunk, step in tick.steps.items():
            decision, made[chunk] = plan[chunk], plan[chunk]
            age = self.ages.get(chunk, 0.0) + 1
            is_last = step == tick.num_steps - 1
            if not decision.is_computed:
                self.ages[chunk] = age
            elif step not in self.steps or chunk not in stored or is_last or tick.is_last:
                self.ages[chunk] = 0.0
            else:
                urge_S = (self.weights[chunk] * age).flatten()
                rows = urge_S.topk(max(round(self.share * len(urge_S)), 1)).indices.sort().values
                age_S = (urge_S.new_ones(len(urge_S)).view_as(self.weights[chunk]) * age).flatten()
                self.ages[chunk] = age_S.index_fill(0, rows, 0.0).view_as(self.weights[chunk])
                made[chunk] = replace(decision, rows=rows if len(rows) < len(urge_S) else None)
        return made

    def drop(self, chunk: int) -> None:
        super().drop(chunk)
        self.ages.pop(chunk, None)


# Tokens and latent pixels -------------------------------------------------------------------------


def patches_of(latents_CFhw: Tensor, *, size: int) -> Tensor:
    """Return the numbers of the latent in each token of `size` x `size` pixels, `[F, P, D]`."""
    parts = latents_CFhw.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # C F rows q columns p
    return parts.permute(1, 2, 4, 0, 3, 5).flatten(3).flatten(1, 2)


def chosen_tokens(rows: Tensor, *, num_frames: int, num_tokens: int) -> Tensor:
    """Return for each token of a chunk whether it is one of some, `[F, P]`.

    Args:
        rows: their places among the `num_tokens` of the chunk.
    """
    none = rows.new_zeros(num_tokens).bool()
    return none.index_fill(0, rows, True).unflatten(0, (num_frames, -1))


def pixels_of(is_own_FP: Tensor, *, size: int, like: Tensor) -> Tensor:
    """Return for each latent pixel whether its token is one of some, `[1, F, h, w]`.

    Args:
        like: latents `[C, F, h, w]`.
    """
    by_row = is_own_FP.unflatten(1, (-1, like.shape[-1] // size)).unsqueeze(0)
    return by_row.repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)


# Settings -----------------------------------------------------------------------------------------

TOKENS: Mapping[str, type[TokenChoice] | None] = MappingProxyType(
    {"all": None, "motion": MotionTokens, "top": TopTokens}
)
"""What `reuse.tokens.choice` names."""


@dataclass(frozen=True)
class TokenRule:
    """Which tokens of a chunk are computed; the defaults are those published for SkyReels-V2."""

    choice: Annotated[str, OneOf(tuple(TOKENS))] = "all"
    weighed: Weighed = "hidden"
    least_weight: Share = 0.6
    vote: Annotated[float | None, Bounds(0, 1)] = 0.5
    least_share: Share = 0.4
    coarse_updates: Annotated[int, Bounds(0, MAX_STEPS)] = 6
    coarse_steps: Annotated[int, Bounds(0, MAX_STEPS)] = 0
    steps: OwnSteps = None
    share: Annotated[float, Bounds(0, 1, is_open=True)] = 0.5

    @property
    def is_on(self) -> bool:
        """Whether any chunk is computed in part."""
        return TOKENS[self.choice] is not None


PUBLISHED_FOR_LATENTS = TokenRule(
    weighed="latent", vote=None, least_share=0.0, coarse_updates=0, coarse_steps=20
)
"""The defaults of MAGI-1, as published for it."""


def tokens_of(rule: Any, calibration: Any) -> TokenChoice | None:
    """Return the choice of one guidance branch, or None where all tokens are computed.

    Args:
        rule: a `ReuseRule`.
        calibration: a `Calibration`, for its rescaling.
    """
    kind = TOKENS[rule.tokens.choice]
    return None if kind is None else made_of(kind, rule, calibration, rule.tokens)


def check_tokens(rule: Any, *, num_steps: int, level: str, compress: str) -> None:
    """Check that a choice of tokens fits the other settings of a run.

    Args:
        rule: a `ReuseRule`.
        level: of what is predicted, see `flowcache.predict.Level`.
        compress: the strategy of the KV cache.
    """
    own: TokenRule = rule.tokens
    if not own.is_on:
        return
    name = f"reuse.tokens.choice={own.choice}"
    if own.choice == "motion" and rule.policy != "flowcache":
        raise UserError(
            f"{name} sums the distances that FlowCache compares: set reuse.policy=flowcache, not "
            f"{rule.policy}, or reuse.tokens.choice=top"
        )
    if own.choice == "top" and not own.steps:
        raise UserError(
            f"{name} needs reuse.tokens.steps: the own steps, of those that reuse.policy computes, "
            "in which only a share of the tokens is computed"
        )
    wrong = [step for step in own.steps or () if not 0 <= step < num_steps]
    if wrong:
        raise UserError(
            f"reuse.tokens.steps are own steps of a chunk, 0..{num_steps - 1}: {wrong[0]} is none"
        )
    if own.weighed == "hidden" and level != "tokens":
        raise UserError(
            f"reuse.tokens.weighed=hidden needs what the blocks put out in every step, but "
            f"reuse.predict={rule.predict} skips it: set reuse.tokens.weighed=latent"
        )
    if compress != "none":
        raise UserError(
            f"{name} computes queries of some tokens, and kv.compress={compress} scores keys by "
            "those of all: set kv.compress=none, or reuse.tokens.choice=all"
        )
    if rule.guidance_every > 1 or rule.guidance_steps is not None:
        raise UserError(
            f"{name} computes some tokens in every guidance pass: leave out reuse.guidance_every "
            "and reuse.guidance_steps"
        )


def unused_settings(rule: TokenRule, default: TokenRule) -> str | None:
    """Say which settings were given that change nothing, since all tokens are computed; or None."""
    if rule.is_on:
        return None
    own, usual = asdict(rule), asdict(default)
    names = [f"reuse.tokens.{name}" for name in own if own[name] != usual[name]]
    if not names:
        return None
    return (
        f"{', '.join(names)} changes nothing, as reuse.tokens.choice={rule.choice} computes all "
        "tokens: choose motion or top, or leave them out"
    )


def check_one_process(rule: TokenRule, *, num_processes: int) -> None:
    """Refuse to divide a run whose chunks are computed in part."""
    if rule.is_on and num_processes > 1:
        raise UserError(
            f"reuse.tokens.choice={rule.choice} needs all tokens of a chunk in one process, but "
            f"{num_processes} run: start one, or set reuse.tokens.choice=all"
        )
