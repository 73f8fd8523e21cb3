"""Score the tokens of a KV cache: importance, redundancy, and weights by position.

All scores are float32 and are made in bounded extra memory.

Axes: Q query tokens, L clean key tokens, X query heads of a group times queries, H query heads, G
KV heads (query head j reads KV head ``j // (H // G)``), D head width. Everything is unbatched.

Source: FlowCache, arXiv 2602.10825, section on KV cache compression; R-KV, arXiv 2505.24133.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from flowcache.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# torch is imported where tensors are made: a wrong setting is refused before torch is loaded

Received: TypeAlias = Callable[["Tensor", "Tensor"], "Tensor"]
"""`(q [Q, G, D], k [L, G, D]) -> attention that each key receives on average [G, L]`."""
SCORING_BLOCK_BYTES = 256 * 2**20
"""Largest scratch memory of one block of attention logits."""
LEAST_VALUE_WIDTH = 16
"""Of the values of PyTorch's flexible attention."""
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
    q_QHD: Tensor,
    k_LGD: Tensor,
    *,
    kernel: int = 7,
    max_bytes: int = SCORING_BLOCK_BYTES,
    received: Received | None = None,
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
    from torch.nn.functional import max_pool1d

    if received is not None and q_QHD.shape[1] == k_LGD.shape[1]:
        received_GL = received(q_QHD, k_LGD)
    else:
        received_GL = attention_received(q_QHD, k_LGD, max_bytes=max_bytes)
    return max_pool1d(received_GL, kernel, stride=1, padding=kernel // 2)


def attention_received(
    q_QHD: Tensor, k_LGD: Tensor, *, max_bytes: int = SCORING_BLOCK_BYTES
) -> Tensor:
    """Return the attention each key receives from a query on average, float32 [G, L], in blocks."""
    import torch

    (num_queries, num_heads, head_dim), (num_keys, kv_heads, _) = q_QHD.shape, k_LGD.shape
    group = num_heads // kv_heads
    assert group * kv_heads == num_heads, f"{num_heads} query heads over {kv_heads} KV heads"
    sizes = {"kv_heads": kv_heads, "group": group, "head_dim": head_dim}
    heads, queries, _ = _importance_blocks(num_queries, num_keys, **sizes, max_bytes=max_bytes)
    received_GL = torch.empty(kv_heads, num_keys, dtype=torch.float32, device=k_LGD.device)
    for g in range(0, kv_heads, heads):
        received_GL[g : g + heads] = _received_by_heads(
            q_QHD[:, g * group : (g + heads) * group],
            k_LGD[:, g : g + heads],
            queries_per_block=queries,
        )
    return received_GL


def attention_received_by_sums(q_QHD: Tensor, k_LGD: Tensor) -> Tensor:
    """Return what `attention_received` does, by two attentions of which only the sums are wanted.

    With ``Z_q = sum_j exp(l_qj)`` a key receives ``sum_q exp(l_qj - log Z_q)``: the sums of an
    attention of keys to queries, whose logits are lowered by what the first attention summed to.
    Once this is compiled no logit reaches memory, products of 16-bit numbers are summed in float32,
    and there are two and a quarter products of queries and keys: the values nobody asks for have
    the least width that there is, an eighth of 128.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    q_1GQD, k_1GLD = (x.transpose(0, 1).unsqueeze(0) for x in (q_QHD, k_LGD))
    unused_q, unused_k = (x.new_zeros(*x.shape[:3], LEAST_VALUE_WIDTH) for x in (q_1GQD, k_1GLD))
    only_sums = AuxRequest(lse=True)
    _, by_query = flex_attention(q_1GQD, k_1GLD, unused_k, return_aux=only_sums)

    assert by_query.lse is not None
    log_sum_GQ = by_query.lse[0]

    def lowered(score: Tensor, _batch: Tensor, head: Tensor, _key: Tensor, query: Tensor) -> Tensor:
        return score - log_sum_GQ[head, query]

    _, by_key = flex_attention(k_1GLD, q_1GQD, unused_q, score_mod=lowered, return_aux=only_sums)
    assert by_key.lse is not None
    return by_key.lse[0].exp() / len(q_QHD)


def _received_by_heads(q_QHD: Tensor, k_LGD: Tensor, *, queries_per_block: int) -> Tensor:
    """Return the attention that the keys of some heads receive, [G, L]."""
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
