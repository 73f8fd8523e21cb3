"""Choose which clean tokens of a KV cache are worth keeping.

A strategy looks at the keys of the clean tokens, and at the queries of the chunk being denoised,
and returns for every KV head the indices to keep. Keys are stored after rotary embedding, so
dropping a token moves no other token's position.

Axes: Q query tokens, L clean key tokens, K kept tokens, N groups of tokens, X tokens of a group,
H query heads, G KV heads, D head width. Everything is unbatched.

Source: FlowCache, arXiv 2602.10825, section on KV cache compression; R-KV, arXiv 2505.24133.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.scoring import (
    SCORING_BLOCK_BYTES,
    canonical_weighting,
    importance,
    redundancy,
    weigh,
)

Granularity: TypeAlias = Literal["token", "frame", "chunk"]
Order: TypeAlias = Literal["position", "score"]

LAST_QUERY_TOKENS = 50
"""Queries looked at when ``queries="token"``. Source: the published FlowCache compressor."""


@dataclass(frozen=True)
class TokenLayout:
    """How clean tokens group into frames and chunks.

    Attributes:
        frame_tokens: Tokens of one latent frame.
        chunk_tokens: Tokens of one chunk, a multiple of ``frame_tokens``.
    """

    frame_tokens: int
    chunk_tokens: int

    def __post_init__(self) -> None:
        if self.frame_tokens < 1 or self.chunk_tokens < 1 or self.chunk_tokens % self.frame_tokens:
            raise UserError(
                f"chunk_tokens must be a positive multiple of frame_tokens, got {self.chunk_tokens}"
                f" and {self.frame_tokens}; use latent frames per chunk x tokens per latent frame"
            )

    def tokens_per(self, granularity: Granularity) -> int:
        """Return the tokens of one token, frame or chunk."""
        return {"token": 1, "frame": self.frame_tokens, "chunk": self.chunk_tokens}[granularity]


class CompressionStrategy(Protocol):
    """What a KV cache asks when its clean tokens exceed the budget."""

    def keep(self, q_QHD: Tensor, k_LGD: Tensor, /, *, budget: int, layout: TokenLayout) -> Tensor:
        """Return the indices [K, G] (int64, K <= budget) of the clean tokens to keep.

        With ``budget >= L`` the answer is every token in position order.
        """
        ...


def kept_tokens(
    strategy: CompressionStrategy, *, num_keys: int, budget: int, layout: TokenLayout
) -> int:
    """Return how many of `num_keys` clean tokens a strategy keeps; no key is needed for that.

    Raises:
        UserError: as the strategy's `keep`, before there is a run.
    """
    k_LGD = torch.empty(num_keys, 1, 1, device="meta")
    q_QHD = torch.empty(layout.chunk_tokens, 1, 1, device="meta")
    return len(strategy.keep(q_QHD, k_LGD, budget=budget, layout=layout))


def best(score_GN: Tensor, count: int, *, group_tokens: int = 1, order: Order) -> Tensor:
    """Return the token indices of the ``count`` best groups per head, int64 [K, G].

    Groups stay whole: ``K = count * group_tokens``. Of equal scores the older group wins.
    Order ``position`` sorts the kept groups by age, ``score`` puts the best group first.

    Scores [[0.1, 0.3, 0.2]], count 2, two tokens per group: [2, 3, 4, 5] for head 0 in both
    orders; with scores [[0.2, 0.1, 0.3]] [0, 1, 4, 5] by position and [4, 5, 0, 1] by score.
    """
    group_GN = score_GN.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    if order == "position":
        group_GN = group_GN.sort(dim=-1).values
    offset_X = torch.arange(group_tokens, device=score_GN.device)
    index_GNX = group_GN.unsqueeze(-1) * group_tokens + offset_X
    return index_GNX.flatten(1).transpose(0, 1)


def gather(x_LGD: Tensor, indices_KG: Tensor) -> Tensor:
    """Return the rows that each head keeps, [K, G, D] (a copy of K or of V)."""
    head_dim = x_LGD.shape[-1]
    return x_LGD.gather(0, indices_KG.unsqueeze(-1).expand(-1, -1, head_dim))


@dataclass(frozen=True)
class ImportanceRedundancy:
    """Keep the keys that are attended to and unlike the others, each KV head its own.

    ``score = mix * importance - (1 - mix) * redundancy``. Both terms sum to about 1 over the keys.

    Attributes:
        mix: Share of importance, 0 to 1. Source: 0.07 in arXiv 2602.10825.
        kernel: Width of the max-pooling of importance (tokens, odd).
        granularity: What is kept whole; a frame or chunk has the mean score of its tokens.
        queries: Which queries count: the last 50 tokens, the last frame, or all given.
        weighting: Preference by age, a name of `WEIGHTINGS`; only with granularity ``token``.
        power: Exponent of the polynomial weightings.
        order: Order of the kept tokens. ``position`` keeps them by age; ``score``, as published,
            puts the best first. It matters to the next compression only, which pools importance
            over neighbours.
        max_bytes: Scratch memory of one block of logits (bytes).
    """

    mix: float = 0.07
    kernel: int = 7
    granularity: Granularity = "token"
    queries: Granularity = "chunk"
    weighting: str = "none"
    power: float = 3.0
    order: Order = "position"
    max_bytes: int = SCORING_BLOCK_BYTES

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise UserError(f"mix must lie in 0..1, got {self.mix}; 0.07 is the published value")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"kernel must be odd and positive, got {self.kernel}; 7 is published")
        for name, value, known in (
            ("granularity", self.granularity, get_args(Granularity)),
            ("queries", self.queries, get_args(Granularity)),
            ("order", self.order, get_args(Order)),
        ):
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.power <= 0:
            raise UserError(f"power must be above 0, got {self.power}; 3 is the published value")
        if self.max_bytes < 1:
            raise UserError(f"max_bytes must be positive, got {self.max_bytes}")
        if canonical_weighting(self.weighting) != "none" and self.granularity != "token":
            raise UserError(
                f"weighting {self.weighting!r} needs granularity token, got {self.granularity}; "
                "choose weighting none or granularity token"
            )

    def seen_queries(self, q_QHD: Tensor, layout: TokenLayout, /) -> Tensor:
        """Return the queries that importance looks at: the last tokens, last frame, or all."""
        if self.queries == "token":
            return q_QHD[-LAST_QUERY_TOKENS:]
        if self.queries == "frame":
            return q_QHD[-layout.frame_tokens :]
        return q_QHD

    def score(self, q_QHD: Tensor, k_LGD: Tensor, /, *, layout: TokenLayout) -> Tensor:
        """Return the score that is ranked, float32 [G, N], one per token, frame or chunk.

        Raises:
            UserError: The clean tokens are no whole number of frames or chunks.
        """
        seen_QHD = self.seen_queries(q_QHD, layout)
        score_GL = redundancy(k_LGD, max_bytes=self.max_bytes) * (self.mix - 1)
        score_GL += self.mix * importance(
            seen_QHD, k_LGD, kernel=self.kernel, max_bytes=self.max_bytes
        )
        if canonical_weighting(self.weighting) != "none":
            return weigh(
                score_GL, self.weighting, chunk_tokens=layout.chunk_tokens, power=self.power
            )
        group_tokens = layout.tokens_per(self.granularity)
        if score_GL.shape[-1] % group_tokens:
            raise UserError(
                f"granularity {self.granularity} needs clean tokens in multiples of "
                f"{group_tokens}, got {score_GL.shape[-1]}; choose granularity token"
            )
        return score_GL.unflatten(-1, (-1, group_tokens)).mean(dim=-1)

    def keep(self, q_QHD: Tensor, k_LGD: Tensor, /, *, budget: int, layout: TokenLayout) -> Tensor:
        """Return the best tokens per head, int64 [K, G]; see `CompressionStrategy.keep`.

        Raises:
            UserError: The budget holds no whole frame or chunk, or the clean tokens are no whole
                number of them.
        """
        if budget >= k_LGD.shape[0]:
            return _same_for_all_heads(torch.arange(k_LGD.shape[0], device=k_LGD.device), k_LGD)
        group_tokens = layout.tokens_per(self.granularity)
        count = _whole_groups(budget, group_tokens, what=self.granularity)
        score_GN = self.score(q_QHD, k_LGD, layout=layout)
        return best(score_GN, count, group_tokens=group_tokens, order=self.order)


@dataclass(frozen=True)
class Recent:
    """Keep the newest whole chunks. Queries do not matter.

    Source: ``noise2clean_kvrange`` of MAGI-1 and ``--use_kvrange`` of FlowCache's SkyReels-V2.
    """

    def keep(self, _q_QHD: Tensor, k_LGD: Tensor, /, *, budget: int, layout: TokenLayout) -> Tensor:
        """Return the newest tokens, int64 [K, G]; see `CompressionStrategy.keep`.

        A budget of 0 keeps nothing. With 25 clean tokens, 10 per chunk and a budget of 19, K is
        10 and the indices are 15 to 24.

        Raises:
            UserError: The budget is positive but smaller than a chunk.
        """
        num_keys, chunk_tokens = k_LGD.shape[0], layout.chunk_tokens
        kept = num_keys
        if budget < num_keys:
            kept = _whole_groups(budget, chunk_tokens, what="chunk") * chunk_tokens
        return _same_for_all_heads(
            torch.arange(num_keys - kept, num_keys, device=k_LGD.device), k_LGD
        )


@dataclass(frozen=True)
class SinkRecent:
    """Keep the oldest frames of the video as attention sink, and the newest whole frames.

    Attributes:
        sink_frames: Latent frames kept from the start of the clean tokens. They stay first, so
            the next compression keeps the same ones.

    Source: attention sinks, arXiv 2309.17453.
    """

    sink_frames: int = 1

    def __post_init__(self) -> None:
        if self.sink_frames < 1:
            raise UserError(
                f"sink_frames must be at least 1, got {self.sink_frames}; use strategy recent "
                "for no sink"
            )

    def keep(self, _q_QHD: Tensor, k_LGD: Tensor, /, *, budget: int, layout: TokenLayout) -> Tensor:
        """Return sink and newest tokens, int64 [K, G]; see `CompressionStrategy.keep`.

        With 30 clean tokens, 5 per frame, one sink frame and a budget of 17 the indices are
        0 to 4 and 20 to 29.

        Raises:
            UserError: The budget does not hold the sink and one more frame.
        """
        num_keys, frame_tokens = k_LGD.shape[0], layout.frame_tokens
        if budget >= num_keys:
            return _same_for_all_heads(torch.arange(num_keys, device=k_LGD.device), k_LGD)
        sink = self.sink_frames * frame_tokens
        recent = (budget - sink) // frame_tokens * frame_tokens
        if recent < frame_tokens:
            raise UserError(
                f"a budget of {budget} tokens does not hold {self.sink_frames} sink frames and "
                f"one more of {frame_tokens} tokens each; raise the budget or lower sink_frames"
            )
        newest = torch.arange(num_keys - recent, num_keys, device=k_LGD.device)
        return _same_for_all_heads(
            torch.cat([torch.arange(sink, device=k_LGD.device), newest]), k_LGD
        )


def _whole_groups(budget: int, group_tokens: int, *, what: str) -> int:
    if budget < 0 or 0 < budget < group_tokens:
        raise UserError(
            f"the budget must be 0 or hold a whole {what} of {group_tokens} tokens, got {budget}; "
            "raise the budget"
        )
    return budget // group_tokens


def _same_for_all_heads(index_K: Tensor, k_LGD: Tensor) -> Tensor:
    return index_K.unsqueeze(-1).expand(-1, k_LGD.shape[1])
