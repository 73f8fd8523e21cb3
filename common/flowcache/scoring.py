"""Score the clean keys of a KV cache: importance, redundancy, age.

All scores are float32 and are made in bounded extra memory.

Axes: Q query tokens, B query tokens of one block, L clean key tokens, H query heads, G KV heads
(query head j reads KV head ``j // (H // G)``), X query heads of a group times queries, D head
width. Everything is unbatched.

Source: FlowCache, arXiv 2602.10825, section on KV cache compression; R-KV, arXiv 2505.24133.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from flowcache.errors import UserError

SCORING_BLOCK_BYTES = 256 * 2**20
"""Largest scratch memory of one block of attention logits, in bytes."""

EXCLUDED_SCORE = -1e6
"""Score of a token that ``weighting="hard"`` rules out. Source: the published compressor."""

WEIGHTINGS = (
    "none",
    "hard",
    "exponential",
    "polynomial",
    "upper_convex_polynomial",
    "gaussian",
)
WEIGHTING_ALIASES = {
    "no_weight": "none",
    "hard_code": "hard",
    "upper_convex": "upper_convex_polynomial",
}


def canonical_weighting(name: str) -> str:
    """Return the name in `WEIGHTINGS` that ``name`` or its alias stands for.

    Raises:
        UserError: The name is unknown.
    """
    canonical = WEIGHTING_ALIASES.get(name, name)
    if canonical not in WEIGHTINGS:
        known = ", ".join(WEIGHTINGS)
        raise UserError(f"unknown position weighting {name!r}; choose one of {known}")
    return canonical


def _scratch_bytes(num_keys: int, head_dim: int, group: int) -> tuple[int, int]:
    """Return scratch bytes (per KV head, per KV head and query) of `importance`, all float32.

    Per head one copy of its keys; per query the logits of the group's query heads and one row
    more (the group's maximum while it is formed, afterwards the softmax), and the query itself.
    """
    return 4 * num_keys * head_dim, 4 * ((group + 1) * num_keys + 2 * group * head_dim)


def _block_sizes(
    num_queries: int, num_keys: int, *, kv_heads: int, group: int, head_dim: int, max_bytes: int
) -> tuple[int, int]:
    """Return (KV heads, queries) per block so that a block's scratch fits ``max_bytes``.

    As many queries as fit for one head, then as many heads as fit with all those queries. At
    least one of each, even where ``max_bytes`` is too small for that.
    """
    per_head, per_query = _scratch_bytes(num_keys, head_dim, group)
    queries = min(max((max_bytes - per_head) // per_query, 1), num_queries)
    heads = min(max(max_bytes // (per_head + queries * per_query), 1), kv_heads)
    return heads, queries


def _unit_key_bytes(num_keys: int, head_dim: int) -> int:
    """Return scratch bytes per KV head of `redundancy`: float32 keys and unit keys."""
    return 2 * 4 * num_keys * head_dim


def _unit_key_heads(unit_bytes: int, *, kv_heads: int, max_bytes: int) -> int:
    return min(max(max_bytes // unit_bytes, 1), kv_heads)


def importance(
    q_QHD: Tensor, k_LGD: Tensor, *, kernel: int = 7, max_bytes: int = SCORING_BLOCK_BYTES
) -> Tensor:
    """Score every clean key by the attention it receives, float32 [G, L].

    ``Imp_j = max_pool1d(mean_q softmax_j(max_{h in group} q_h . k_j / sqrt(D)))`` with stride 1
    and padding ``kernel // 2``; the softmax runs over clean keys only. Products, softmax and mean
    are float32 whatever the dtype of the inputs: with 20,000 keys a score is about 5e-5 and
    neighbours differ in its fourth digit. Before pooling a head's scores sum to 1. The Q x L
    matrix is never formed: blocks of heads and queries take turns in ``max_bytes`` of scratch.

    With D = 1, ``q = [1]``, ``k = [0, log 3]`` and kernel 1 the logits are [0, log 3], so the
    importance is [0.25, 0.75]; kernel 3 spreads the larger one to its neighbour: [0.75, 0.75].

    Args:
        q_QHD: Queries after rotary embedding.
        k_LGD: Clean keys after rotary embedding.
        kernel: Width of the max-pooling over neighbouring keys (tokens, odd); 1 is no pooling.
        max_bytes: Scratch memory per block (bytes); see `scoring_bytes` for the total.

    Source: arXiv 2602.10825, KV compression; the maximum over a group is R-KV's rule for
    grouped-query attention.
    """
    (num_queries, num_heads, head_dim), (num_keys, kv_heads, _) = q_QHD.shape, k_LGD.shape
    group = num_heads // kv_heads
    assert group * kv_heads == num_heads, f"{num_heads} query heads over {kv_heads} KV heads"
    heads, queries = _block_sizes(
        num_queries,
        num_keys,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        max_bytes=max_bytes,
    )
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
    total_GL = torch.zeros(kv_heads, num_keys, dtype=torch.float32, device=k_LGD.device)
    for q_BHD in q_QHD.split(queries_per_block):
        q_GXD = q_BHD.transpose(0, 1).reshape(kv_heads, -1, head_dim).float() * head_dim**-0.5
        logits_GBL = torch.bmm(q_GXD, k_GDL)
        if num_heads > kv_heads:
            logits_GBL = logits_GBL.unflatten(1, (-1, len(q_BHD))).amax(dim=1)
        total_GL += logits_GBL.softmax(dim=-1).sum(dim=1)
    return total_GL / num_queries


def redundancy(k_LGD: Tensor, *, max_bytes: int = SCORING_BLOCK_BYTES) -> Tensor:
    """Score every clean key by its likeness to the other keys, float32 [G, L], rows sum to 1.

    ``Red_j = softmax_j((1 / L) sum_{i != j} cos(k_i, k_j))``. With unit keys ``u`` the sum is
    ``u_j . (sum_i u_i) - |u_j|^2``, exact, so that time and memory are linear in L. The term
    ``|u_j|^2`` is 1, or 0 for an all-zero key.

    Three unit keys [1, 0], [1, 0], [0, 1] have cosine sums [1, 1, 0]; over L = 3 that is
    [1/3, 1/3, 0], and the softmax gives [0.368, 0.368, 0.264].

    Args:
        k_LGD: Clean keys.
        max_bytes: Scratch memory for unit keys (bytes).
    """
    num_keys, kv_heads, head_dim = k_LGD.shape
    unit_bytes = _unit_key_bytes(num_keys, head_dim)
    heads = _unit_key_heads(unit_bytes, kv_heads=kv_heads, max_bytes=max_bytes)
    cosine_GL = torch.empty(kv_heads, num_keys, dtype=torch.float32, device=k_LGD.device)
    for g in range(0, kv_heads, heads):
        cosine_GL[g : g + heads] = _mean_cosine(k_LGD[:, g : g + heads])
    return cosine_GL.softmax(dim=-1)


def _mean_cosine(k_LGD: Tensor) -> Tensor:
    """Return the sum of every key's cosines to the others, over L, [G, L]."""
    unit_GLD = normalize(k_LGD.transpose(0, 1).float(), dim=-1)
    with_all_GL = torch.bmm(unit_GLD, unit_GLD.sum(dim=1).unsqueeze(-1)).squeeze(-1)
    with_itself_GL = torch.linalg.vector_norm(unit_GLD, dim=-1).square()
    return (with_all_GL - with_itself_GL) / len(k_LGD)


def position_weights(
    num_tokens: int, weighting: str, *, power: float = 3.0, device: torch.device | None = None
) -> Tensor:
    """Return the factor of every clean token by its age, float32 [L], oldest token first.

    With ``p`` from 0 (oldest) to 1 (newest) and ``g(p) = exp(-8 (p (L - 1) / L)^2)``:

        none, hard                 1
        exponential                0.1 + 0.9 (1 - e^(-2 p)) / (1 - e^(-2))     old 0.1, new 1
        polynomial                 0.1 + 0.9 p^power                           old 0.1, new 1
        upper_convex_polynomial    2 (1 - (1 - p)^power)                       old 0, new 2
        gaussian                   0.1 + 0.9 (g(p) - g(1)) / (1 - g(1))        old 1, new 0.1

    ``gaussian`` is the only one that favours old tokens. Example: polynomial with power 3 over
    three tokens is [0.1, 0.2125, 1].

    Args:
        num_tokens: L, at least 2 (one token needs no weighing).
        weighting: A name of `WEIGHTINGS` or an alias.
        power: Exponent of the two polynomial weightings (dimensionless, above 0).
        device: Where the weights are made.

    Source: the published FlowCache compressor, score weighting methods.
    """
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
    """Return token scores favoured by age, float32 [G, L], non-negative but for excluded tokens.

    Every head's minimum is subtracted first, so that a factor below 1 always lowers a score.
    ``hard`` gives the first ``chunk_tokens`` tokens `EXCLUDED_SCORE`: they only fill up a budget
    that holds all the other tokens, oldest first.

    Source: the published FlowCache compressor, score weighting methods.
    """
    positive_GL = score_GL - score_GL.amin(dim=-1, keepdim=True)
    if canonical_weighting(weighting) == "hard":
        positive_GL[:, :chunk_tokens] = EXCLUDED_SCORE
        return positive_GL
    num_tokens = score_GL.shape[-1]
    return positive_GL * position_weights(
        num_tokens, weighting, power=power, device=score_GL.device
    )


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
    heads, queries = _block_sizes(
        num_queries,
        num_keys,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        max_bytes=max_bytes,
    )
    per_head, per_query = _scratch_bytes(num_keys, head_dim, group)
    unit_keys = _unit_key_bytes(num_keys, head_dim)
    unit_heads = _unit_key_heads(unit_keys, kv_heads=kv_heads, max_bytes=max_bytes)
    return (
        max(heads * (per_head + queries * per_query), unit_heads * unit_keys)
        + 80 * kv_heads * num_keys
    )
