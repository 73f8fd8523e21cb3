"""Choose which clean tokens of a KV cache are worth keeping.

A strategy looks at the keys of the clean tokens, and at the queries of the chunk being denoised,
and returns for every KV head the indices to keep. Keys are stored after rotary embedding, so
dropping a token moves no other token's position. `ImportanceRedundancy` scores them: all scores
are float32 and are made in bounded extra memory.

To add a strategy: write its class, whose fields name the settings that it takes, and list it in
`STRATEGIES`. A setting that no other strategy has is one more field of `KVRule`.

Axes: Q query tokens, B query tokens of one block, L clean key tokens, K kept tokens, N groups of
tokens, X tokens of a group (in scores: query heads of a group times queries), H query heads, G KV
heads (query head j reads KV head ``j // (H // G)``), D head width. Everything is unbatched.

Source: FlowCache, arXiv 2602.10825, section on KV cache compression; R-KV, arXiv 2505.24133.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeAlias

from flowcache.bounds import MAX_FRAMES, Bounds, OneOf, Share, made_of
from flowcache.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# torch is imported where tensors are made: a wrong setting is refused before torch is loaded

Granularity: TypeAlias = Literal["token", "frame", "chunk"]
Order: TypeAlias = Literal["position", "score"]

LAST_QUERY_TOKENS = 50
"""Queries looked at when ``queries="token"``. Source: the published FlowCache compressor."""
SCORING_BLOCK_BYTES = 256 * 2**20
"""Largest scratch memory of one block of attention logits."""
EXCLUDED_SCORE = -1e6
"""Score of a token that ``weighting="hard"`` rules out. Source: the published compressor."""

WEIGHTINGS = ("none", "hard", "exponential", "polynomial", "upper_convex_polynomial", "gaussian")
WEIGHTING_ALIASES = {
    "no_weight": "none",
    "hard_code": "hard",
    "upper_convex": "upper_convex_polynomial",
}
"""The published compressor's names."""


def canonical_weighting(name: str) -> str:
    """Return the name in `WEIGHTINGS` that ``name`` or its alias means."""
    canonical = WEIGHTING_ALIASES.get(name, name)
    if canonical not in WEIGHTINGS:
        raise UserError(
            f"unknown position weighting {name!r}; choose one of {', '.join(WEIGHTINGS)}"
        )
    return canonical


@dataclass(frozen=True)
class TokenLayout:
    """How clean tokens group into latent frames and chunks."""

    frame_tokens: int
    chunk_tokens: int
    """A multiple of `frame_tokens`."""

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
    """Return how many of `num_keys` clean tokens a strategy keeps; no key is needed for that."""
    import torch

    k_LGD = torch.empty(num_keys, 1, 1, device="meta")
    q_QHD = torch.empty(layout.chunk_tokens, 1, 1, device="meta")
    return len(strategy.keep(q_QHD, k_LGD, budget=budget, layout=layout))


def best(score_GN: Tensor, count: int, *, group_tokens: int = 1, order: Order) -> Tensor:
    """Return the token indices of the ``count`` best groups per head, int64 [K, G].

    Groups stay whole: ``K = count * group_tokens``. Of equal scores the older group wins. Example
    with scores [[0.2, 0.1, 0.3]], count 2 and two tokens per group: [0, 1, 4, 5] by position (age),
    [4, 5, 0, 1] by score (the best group first).
    """
    import torch

    group_GN = score_GN.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    if order == "position":
        group_GN = group_GN.sort(dim=-1).values
    offset_X = torch.arange(group_tokens, device=score_GN.device)
    index_GNX = group_GN.unsqueeze(-1) * group_tokens + offset_X
    return index_GNX.flatten(1).transpose(0, 1)


def gather(x_LGD: Tensor, indices_KG: Tensor) -> Tensor:
    """Return the rows that each head keeps, [K, G, D] (a copy of K or of V)."""
    return x_LGD.gather(0, indices_KG.unsqueeze(-1).expand(-1, -1, x_LGD.shape[-1]))


@dataclass(frozen=True)
class ImportanceRedundancy:
    """Keep the keys that are attended to and unlike the others, each KV head its own.

    ``score = mix * importance - (1 - mix) * redundancy``. Both terms sum to about 1 over the keys.
    """

    mix: float = 0.07
    """Share of importance, 0 to 1. Source: arXiv 2602.10825."""
    kernel: int = 7
    """Width of the max-pooling of importance (tokens, odd)."""
    granularity: Granularity = "token"
    """What is kept whole; a frame or chunk has the mean score of its tokens."""
    queries: Granularity = "chunk"
    """Which queries count: the last 50 tokens, the last frame, or all given."""
    weighting: str = "none"
    """Preference by age, a name of `WEIGHTINGS`; only with granularity ``token``."""
    power: float = 3.0
    """Exponent of the polynomial weightings."""
    order: Order = "position"
    """Of the kept tokens: by age, or, as published, the best first. It matters to the next
    compression only, which pools importance over neighbours."""
    max_bytes: int = SCORING_BLOCK_BYTES

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"kernel must be odd and positive, got {self.kernel}; 7 is published")
        if canonical_weighting(self.weighting) != "none" and self.granularity != "token":
            raise UserError(
                f"weighting {self.weighting!r} needs granularity token, got {self.granularity}; "
                "choose weighting none or granularity token"
            )

    def seen_queries(self, q_QHD: Tensor, layout: TokenLayout, /) -> Tensor:
        """Return the queries that importance looks at."""
        if self.queries == "token":
            return q_QHD[-LAST_QUERY_TOKENS:]
        if self.queries == "frame":
            return q_QHD[-layout.frame_tokens :]
        return q_QHD

    def score(self, q_QHD: Tensor, k_LGD: Tensor, /, *, layout: TokenLayout) -> Tensor:
        """Return the score that is ranked, float32 [G, N], one per token, frame or chunk."""
        seen_QHD, max_bytes = self.seen_queries(q_QHD, layout), self.max_bytes
        score_GL = redundancy(k_LGD, max_bytes=max_bytes) * (self.mix - 1)
        score_GL += self.mix * importance(seen_QHD, k_LGD, kernel=self.kernel, max_bytes=max_bytes)
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
        """Return the best tokens per head, int64 [K, G]; see `CompressionStrategy.keep`."""
        if budget >= k_LGD.shape[0]:
            return _rows(range(k_LGD.shape[0]), like=k_LGD)
        group_tokens = layout.tokens_per(self.granularity)
        count = _whole_groups(budget, group_tokens, what=self.granularity)
        score_GN = self.score(q_QHD, k_LGD, layout=layout)
        return best(score_GN, count, group_tokens=group_tokens, order=self.order)


@dataclass(frozen=True)
class Recent:
    """Keep the newest whole chunks.

    Example: of 25 clean tokens, 10 per chunk, a budget of 19 keeps 15 to 24; one of 0 keeps none.

    Source: ``noise2clean_kvrange`` of MAGI-1 and ``--use_kvrange`` of FlowCache's SkyReels-V2.
    """

    def keep(self, _q_QHD: Tensor, k_LGD: Tensor, /, *, budget: int, layout: TokenLayout) -> Tensor:
        """Return the newest tokens, int64 [K, G]; see `CompressionStrategy.keep`."""
        num_keys, chunk_tokens = k_LGD.shape[0], layout.chunk_tokens
        kept = num_keys
        if budget < num_keys:
            kept = _whole_groups(budget, chunk_tokens, what="chunk") * chunk_tokens
        return _rows(range(num_keys - kept, num_keys), like=k_LGD)


@dataclass(frozen=True)
class SinkRecent:
    """Keep the oldest frames of the video as attention sink, and the newest whole frames.

    The sink stays first, so the next compression keeps the same one. Example: of 30 clean tokens, 5
    per frame, one sink frame and a budget of 17 keep 0 to 4 and 20 to 29.

    Source: attention sinks, arXiv 2309.17453.
    """

    sink_frames: int = 1
    """Latent frames kept from the start of the clean tokens."""

    def keep(self, _q_QHD: Tensor, k_LGD: Tensor, /, *, budget: int, layout: TokenLayout) -> Tensor:
        """Return sink and newest tokens, int64 [K, G]; see `CompressionStrategy.keep`."""
        num_keys, frame_tokens = k_LGD.shape[0], layout.frame_tokens
        if budget >= num_keys:
            return _rows(range(num_keys), like=k_LGD)
        sink = self.sink_frames * frame_tokens
        recent = (budget - sink) // frame_tokens * frame_tokens
        if recent < frame_tokens:
            raise UserError(
                f"a budget of {budget} tokens does not hold {self.sink_frames} sink frames and "
                f"one more of {frame_tokens} tokens each; raise the budget or lower sink_frames"
            )
        return _rows(range(sink), range(num_keys - recent, num_keys), like=k_LGD)


def _whole_groups(budget: int, group_tokens: int, *, what: str) -> int:
    if budget < 0 or 0 < budget < group_tokens:
        raise UserError(
            f"the budget must be 0 or hold a whole {what} of {group_tokens} tokens, got {budget}; "
            "raise the budget"
        )
    return budget // group_tokens


def _rows(*spans: range, like: Tensor) -> Tensor:
    """Return these tokens as indices [K, G], the same for all heads of keys `[L, G, D]`."""
    import torch

    parts = [torch.arange(span.start, span.stop, device=like.device) for span in spans]
    return torch.cat(parts).unsqueeze(-1).expand(-1, like.shape[1])


# Settings -----------------------------------------------------------------------------------------

STRATEGIES: Mapping[str, type[CompressionStrategy] | None] = MappingProxyType(
    {
        "none": None,
        "importance": ImportanceRedundancy,
        "recent": Recent,
        "sink_recent": SinkRecent,
    }
)
"""What `kv.compress` names."""

KV_DTYPES = ("model", "fp8", "int8", "int4", "int2")
QUANTIZERS = ("token", "kivi", "hadamard", "kmeans")
"""What `kv.dtype` and `kv.quantizer` name, see `quantization`."""
QUANTIZATION_SETTINGS = (
    *("dtype", "quantizer", "group_size", "centroids", "stages", "centred", "keep_last"),
    "bias_correction",
)
"""Of `KVRule`: how the tokens that stay are quantised."""


@dataclass(frozen=True)
class KVRule:
    """Which clean tokens the KV cache keeps, and in how many bits; each model adds how many."""

    compress: Annotated[str, OneOf(tuple(STRATEGIES))] = "none"
    mix: Share = 0.07
    kernel: Annotated[int, Bounds(1, 1001)] = 7
    granularity: Granularity = "token"
    queries: Granularity = "chunk"
    weighting: str = "none"
    power: Annotated[float, Bounds(0, 100, is_open=True)] = 3.0
    order: Order = "position"
    sink_frames: Annotated[int, Bounds(1, MAX_FRAMES)] = 1
    dtype: Annotated[str, OneOf(KV_DTYPES)] = "model"
    quantizer: Annotated[str, OneOf(QUANTIZERS)] = "token"
    group_size: Annotated[int | None, Bounds(4, 1024)] = None
    centroids: Annotated[int, Bounds(1, 256)] = 256
    stages: Annotated[int, Bounds(1, 8)] = 1
    centred: bool = True
    keep_last: bool = False
    bias_correction: bool = False


def strategy_of(rule: KVRule) -> CompressionStrategy | None:
    """Return what picks the clean tokens that stay, or None where all do."""
    strategy = STRATEGIES[rule.compress]
    return None if strategy is None else made_of(strategy, rule)


# Scores -------------------------------------------------------------------------------------------


def _importance_blocks(
    num_queries: int, num_keys: int, *, kv_heads: int, group: int, head_dim: int, max_bytes: int
) -> tuple[int, int, int]:
    """Return KV heads and queries per block of `importance`, and the block's scratch bytes.

    Scratch is float32: per head a copy of its keys; per query the logits of the group's heads and
    one row more (the group's maximum, then the softmax), and the query itself. As many queries as
    fit for one head, then as many heads as fit; at least one of each.
    """
    per_head = 4 * num_keys * head_dim
    per_query = 4 * ((group + 1) * num_keys + 2 * group * head_dim)
    queries = min(max((max_bytes - per_head) // per_query, 1), num_queries)
    head_bytes = per_head + queries * per_query
    heads = min(max(max_bytes // head_bytes, 1), kv_heads)
    return heads, queries, heads * head_bytes


def _redundancy_blocks(
    num_keys: int, *, kv_heads: int, head_dim: int, max_bytes: int
) -> tuple[int, int]:
    """Return KV heads per block of `redundancy`, and its scratch: float32 keys and unit keys."""
    per_head = 2 * 4 * num_keys * head_dim
    heads = min(max(max_bytes // per_head, 1), kv_heads)
    return heads, heads * per_head


def importance(
    q_QHD: Tensor, k_LGD: Tensor, *, kernel: int = 7, max_bytes: int = SCORING_BLOCK_BYTES
) -> Tensor:
    """Score every clean key by the attention it receives, float32 [G, L].

    ``Imp_j = max_pool1d(mean_q softmax_j(max_{h in group} q_h . k_j / sqrt(D)))`` with stride 1
    and padding ``kernel // 2``; the softmax runs over clean keys only. All is float32: with 20,000
    keys a score is about 5e-5 and neighbours differ in its fourth digit. The Q x L matrix is never
    formed: blocks of heads and queries take turns in ``max_bytes`` of scratch.

    With D = 1, ``q = [1]``, ``k = [0, log 3]`` and kernel 1 the logits are [0, log 3], so the
    importance is [0.25, 0.75]; kernel 3 spreads the larger one to its neighbour: [0.75, 0.75].

    Source: arXiv 2602.10825, KV compression; the maximum over a group is R-KV's rule for
    grouped-query attention.
    """
    import torch
    from torch.nn.functional import max_pool1d

    (num_queries, num_heads, head_dim), (num_keys, kv_heads, _) = q_QHD.shape, k_LGD.shape
    group = num_heads // kv_heads
    assert group * kv_heads == num_heads, f"{num_heads} query heads over {kv_heads} KV heads"
    sizes = {"kv_heads": kv_heads, "group": group, "head_dim": head_dim}
    heads, queries, _ = _importance_blocks(num_queries, num_keys, **sizes, max_bytes=max_bytes)
    received_GL = torch.empty(kv_heads, num_keys, dtype=torch.float32, device=k_LGD.device)
    for g in range(0, kv_heads, heads):
        received_GL[g : g + heads] = _attention_received(
            q_QHD[:, g * group : (g + heads) * group],
            k_LGD[:, g : g + heads],
            queries_per_block=queries,
        )
    return max_pool1d(received_GL, kernel, stride=1, padding=kernel // 2)


def _attention_received(q_QHD: Tensor, k_LGD: Tensor, *, queries_per_block: int) -> Tensor:
    """Return the attention each key receives from a query on average, [G, L]."""
    (num_queries, num_heads, head_dim), (num_keys, kv_heads, _) = q_QHD.shape, k_LGD.shape
    k_GDL = k_LGD.permute(1, 2, 0).float()
    total_GL = k_GDL.new_zeros(kv_heads, num_keys)
    for q_BHD in q_QHD.split(queries_per_block):
        q_GXD = q_BHD.transpose(0, 1).reshape(kv_heads, -1, head_dim).float() * head_dim**-0.5
        logits_GBL = q_GXD.bmm(k_GDL)
        if num_heads > kv_heads:
            logits_GBL = logits_GBL.unflatten(1, (-1, len(q_BHD))).amax(dim=1)
        total_GL += logits_GBL.softmax(dim=-1).sum(dim=1)
    return total_GL / num_queries


def redundancy(k_LGD: Tensor, *, max_bytes: int = SCORING_BLOCK_BYTES) -> Tensor:
    """Score every clean key by its likeness to the other keys, float32 [G, L], rows sum to 1.

    ``Red_j = softmax_j((1 / L) sum_{i != j} cos(k_i, k_j))``. With unit keys ``u`` the sum is
    ``u_j . (sum_i u_i) - |u_j|^2``, exact, so that time and memory are linear in L.

    Three unit keys [1, 0], [1, 0], [0, 1] have cosine sums [1, 1, 0]; over L = 3 that is
    [1/3, 1/3, 0], and the softmax gives [0.368, 0.368, 0.264].
    """
    import torch

    num_keys, kv_heads, head_dim = k_LGD.shape
    heads, _ = _redundancy_blocks(
        num_keys, kv_heads=kv_heads, head_dim=head_dim, max_bytes=max_bytes
    )
    cosine_GL = torch.empty(kv_heads, num_keys, dtype=torch.float32, device=k_LGD.device)
    for g in range(0, kv_heads, heads):
        cosine_GL[g : g + heads] = _mean_cosine(k_LGD[:, g : g + heads])
    return cosine_GL.softmax(dim=-1)


def _mean_cosine(k_LGD: Tensor) -> Tensor:
    """Return the sum of every key's cosines to the others, over L, [G, L]."""
    import torch
    from torch.nn.functional import normalize

    unit_GLD = normalize(k_LGD.transpose(0, 1).float(), dim=-1)
    with_all_GL = unit_GLD.bmm(unit_GLD.sum(dim=1).unsqueeze(-1)).squeeze(-1)
    with_itself_GL = torch.linalg.vector_norm(unit_GLD, dim=-1).square()
    return (with_all_GL - with_itself_GL) / len(k_LGD)


def position_weights(
    num_tokens: int, weighting: str, *, power: float = 3.0, device: torch.device | None = None
) -> Tensor:
    """Return the factor of each of two or more clean tokens by age, float32 [L], oldest first.

    With ``p`` from 0 (oldest) to 1 (newest) and ``g(p) = exp(-8 (p (L - 1) / L)^2)``:

        none, hard                 1
        exponential                0.1 + 0.9 (1 - e^(-2 p)) / (1 - e^(-2))     old 0.1, new 1
        polynomial                 0.1 + 0.9 p^power                           old 0.1, new 1
        upper_convex_polynomial    2 (1 - (1 - p)^power)                       old 0, new 2
        gaussian                   0.1 + 0.9 (g(p) - g(1)) / (1 - g(1))        old 1, new 0.1

    Example: polynomial with power 3 over three tokens is [0.1, 0.2125, 1].

    Source: the published FlowCache compressor, score weighting methods.
    """
    import torch

    name = canonical_weighting(weighting)
    assert num_tokens >= 2, f"position weights need two tokens or more, got {num_tokens}"
    p_L = torch.linspace(0.0, 1.0, num_tokens, dtype=torch.float32, device=device)
    if name == "exponential":
        return 0.1 + 0.9 * torch.expm1(-2 * p_L) / math.expm1(-2)
    if name == "polynomial":
        return 0.1 + 0.9 * p_L**power
    if name == "upper_convex_polynomial":
        return 2 * (1 - (1 - p_L) ** power)
    if name == "gaussian":
        last = (num_tokens - 1) / num_tokens
        bell_L = torch.exp(-8 * (p_L * last) ** 2)
        floor = math.exp(-8 * last**2)
        return 0.1 + 0.9 * (bell_L - floor) / (1 - floor)
    return torch.ones_like(p_L)


def weigh(score_GL: Tensor, weighting: str, *, chunk_tokens: int, power: float = 3.0) -> Tensor:
    """Return token scores weighted by age, float32 [G, L], non-negative but for excluded tokens.

    Every head's minimum is subtracted first, so that a factor below 1 always lowers a score.
    ``hard`` gives the first ``chunk_tokens`` tokens `EXCLUDED_SCORE`: they only fill up a budget
    that holds all the other tokens, oldest first.

    Source: the published FlowCache compressor, score weighting methods.
    """
    positive_GL = score_GL - score_GL.amin(dim=-1, keepdim=True)
    if canonical_weighting(weighting) == "hard":
        positive_GL[:, :chunk_tokens] = EXCLUDED_SCORE
        return positive_GL
    weights_L = position_weights(score_GL.shape[-1], weighting, power=power, device=score_GL.device)
    return positive_GL * weights_L


def scoring_bytes(
    num_queries: int,
    num_keys: int,
    *,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    max_bytes: int = SCORING_BLOCK_BYTES,
) -> int:
    """Return an upper bound on the extra memory of `ImportanceRedundancy.keep`, in bytes.

    The larger of the scratch of `importance` and of `redundancy`, which run one after the other,
    and 80 bytes per KV head and key: the score rows (8 float32) and the sorting (6 int64).
    """
    group = num_heads // kv_heads
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "max_bytes": max_bytes}
    *_, of_importance = _importance_blocks(num_queries, num_keys, group=group, **sizes)
    _, of_redundancy = _redundancy_blocks(num_keys, **sizes)
    return max(of_importance, of_redundancy) + 80 * kv_heads * num_keys
