"""Choose which clean tokens of a KV cache are worth keeping.

A strategy looks at the keys of the clean tokens, and at the queries of the chunk being denoised,
and returns for every KV head the indices to keep. Keys are stored after rotary embedding, so
dropping a token moves no other token's position. `ImportanceRedundancy` scores them, see `scores`.

To add a strategy: write its class, whose fields name the settings that it takes, and list it in
`STRATEGIES`. A setting that no other strategy has is one more field of `KVRule`.

Axes: Q query tokens, L clean key tokens, K kept tokens, N groups of tokens, X tokens of a group, H
query heads, G KV heads (query head j reads KV head ``j // (H // G)``), D head width. Everything is
unbatched.

Source: FlowCache, arXiv 2602.10825, section on KV cache compression; R-KV, arXiv 2505.24133.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeAlias, TypeGuard

from flowcache.bounds import MAX_FRAMES, Bounds, OneOf, Share, made_of, names_of
from flowcache.errors import UserError
from flowcache.head_classes import DummyForcing, ForcingKV, HeadClasses
from flowcache.scores import (
    SCORING_BLOCK_BYTES,
    Received,
    canonical_weighting,
    importance,
    redundancy,
    weigh,
)

if TYPE_CHECKING:
    from torch import Tensor

# torch is imported where tensors are made: a wrong setting is refused before torch is loaded

Granularity: TypeAlias = Literal["token", "frame", "chunk"]
Order: TypeAlias = Literal["position", "score"]

LAST_QUERY_TOKENS = 50
"""Queries looked at when ``queries="token"``. Source: the published FlowCache compressor."""


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
    received: Received | None = None
    """Sums attention over queries where every query head has a key head; None: block by block."""

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
        score_GL = redundancy(k_LGD, max_bytes=self.max_bytes) * (self.mix - 1)
        score_GL += self.mix * importance(
            self.seen_queries(q_QHD, layout),
            k_LGD,
            kernel=self.kernel,
            max_bytes=self.max_bytes,
            received=self.received,
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
        """Return the best tokens per head, int64 [K, G]; see `CompressionStrategy.keep`."""
        if budget >= k_LGD.shape[0]:
            return _rows(range(k_LGD.shape[0]), like=k_LGD)
        group_tokens = layout.tokens_per(self.granularity)
        count = _whole_groups(budget, group_tokens, what=self.granularity)
        score_GN = self.score(q_QHD, k_LGD, layout=layout)
        return best(score_GN, count, group_tokens=group_tokens, order=self.order)


@dataclass(frozen=True)
class DeepForcing:
    """Keep a sink of first frames, the newest frames, and the tokens between that queries want.

    ``phi_j = sum over queries of q . k_j`` without a softmax, for every KV head; its heads' queries
    add up. As ``phi_j = (sum of q) . k_j`` time and memory are linear in L.

    Example with D = 1, one token per frame, queries 1 and 2, keys 5 1 -1 2 0 9, one sink and one
    recent frame and a budget of 4: between the ends phi is 3 -3 6 0, so that 0 1 3 5 stay.

    Source: Deep Forcing, arXiv 2512.05081: a window of 16 to 21 frames, sink 10, recent 4.
    """

    sink_frames: int = 1
    """Latent frames kept from the start of the clean tokens."""
    recent_frames: int = 4
    """Newest latent frames that are kept."""

    def seen_queries(self, q_QHD: Tensor, _layout: TokenLayout, /) -> Tensor:
        """Return the queries that the score looks at: all."""
        return q_QHD

    def keep(self, q_QHD: Tensor, k_LGD: Tensor, /, *, budget: int, layout: TokenLayout) -> Tensor:
        """Return sink, wanted and newest tokens, int64 [K, G]; see `CompressionStrategy.keep`."""
        import torch

        num_keys, kv_heads, _ = k_LGD.shape
        if budget >= num_keys:
            return _rows(range(num_keys), like=k_LGD)
        sink, recent = (n * layout.frame_tokens for n in (self.sink_frames, self.recent_frames))
        count = budget - sink - recent
        if count < 0:
            raise UserError(
                f"a budget of {budget} tokens does not hold {self.sink_frames} sink and "
                f"{self.recent_frames} recent frames of {layout.frame_tokens} tokens each; raise "
                "the budget, or lower sink_frames or recent_frames"
            )
        first = num_keys - recent
        wanted_GD = q_QHD.float().sum(dim=0).unflatten(0, (kv_heads, -1)).sum(dim=1)
        phi_GL = (k_LGD[sink:first].float() * wanted_GD).sum(dim=-1).transpose(0, 1)
        ends = [_rows(range(sink), like=k_LGD), _rows(range(first, num_keys), like=k_LGD)]
        return torch.cat([ends[0], sink + best(phi_GL, count, order="position"), ends[1]])


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


@dataclass(frozen=True)
class Window:
    """Keep the newest whole frames.

    Example: of 25 clean tokens, 5 per frame, a budget of 12 keeps 15 to 24.

    Source: the sliding window of Self-Forcing, arXiv 2506.08009.
    """

    def keep(self, q_QHD: Tensor, k_LGD: Tensor, /, *, budget: int, layout: TokenLayout) -> Tensor:
        """Return the newest tokens, int64 [K, G]; see `CompressionStrategy.keep`."""
        return SinkRecent(0).keep(q_QHD, k_LGD, budget=budget, layout=layout)


DENSITY_FLOOR = 1e-6
"""Least density at insertion. Source: DensityKV."""


@dataclass
class Density:
    """Keep the newest frames, and a bank of older tokens in which none is crowded.

    The kernel of two keys is ``(1 + |a - b|^2 / sigma^2)^-2`` with ``sigma^2 = D / 2``, and the
    density of a key the sum of its kernels with all keys of the bank, itself included. Keys are
    compared as if all were in one frame. Each token remembers its density at insertion.

    Tokens that leave the newest frames come into the bank, the ones first that are least like it:
    by ``max_j kernel / density_j``. Free places are taken; beyond them as many come, the same
    number in all heads, as leave room for evicting all that have become twice as dense as when they
    were inserted. Evicted are those, then the densest.

    It is stateful: one instance per cache.

    Source: DensityKV, arXiv 2608.27922: a bank of 9,360 tokens, five recent frames.
    """

    recent_frames: int = 4
    """Newest latent frames that are kept."""
    inserted_GB: Tensor | None = field(default=None, init=False, compare=False)
    """Density at insertion of the bank's tokens, the first ones of the cache."""

    def keep(self, _q_QHD: Tensor, k_LGD: Tensor, /, *, budget: int, layout: TokenLayout) -> Tensor:
        """Return bank and newest tokens, int64 [K, G]; see `CompressionStrategy.keep`."""
        import torch

        num_keys, recent = len(k_LGD), self.recent_frames * layout.frame_tokens
        if budget >= num_keys:
            return _rows(range(num_keys), like=k_LGD)
        self.check(budget, layout)
        k_GLD = k_LGD.transpose(0, 1)[:, : num_keys - recent].float()
        bank_GB = self._bank(k_GLD, budget - recent)
        index_BG = bank_GB.transpose(0, 1)
        newest = _rows(range(num_keys - recent, num_keys), like=k_LGD)
        return torch.cat([index_BG, newest])

    def check(self, budget: int, layout: TokenLayout) -> None:
        """Check that a budget holds the newest frames."""
        if budget < self.recent_frames * layout.frame_tokens:
            raise UserError(
                f"a budget of {budget} tokens does not hold {self.recent_frames} recent frames of "
                f"{layout.frame_tokens} tokens each; raise the budget or lower recent_frames"
            )

    def _bank(self, k_GLD: Tensor, capacity: int) -> Tensor:
        """Return the places of the tokens that are in the bank from now on, [G, B]."""
        import torch

        heads, old_GB = len(k_GLD), self.inserted_GB
        old_GB = k_GLD.new_zeros(heads, 0) if old_GB is None else old_GB
        size = old_GB.shape[1]
        order_GN = self._novel_first(k_GLD, old_GB)
        new_GND = k_GLD[:, size:].gather(1, _wide(order_GN, k_GLD))
        count, out_GE = self._admitted(k_GLD[:, :size], new_GND, old_GB, capacity)
        stays_GB = torch.ones(heads, size, dtype=torch.bool, device=k_GLD.device)
        stays_GB.scatter_(1, out_GE, value=False)
        kept_GB = stays_GB.nonzero()[:, 1].view(heads, -1)
        new_GN = (size + order_GN[:, :count]).sort(dim=-1).values
        place_GB = torch.cat([kept_GB, new_GN], dim=1)
        bank_GBD = k_GLD.gather(1, _wide(place_GB, k_GLD))
        fresh = [_kernel(bank[kept_GB.shape[1] :], bank).sum(dim=-1) for bank in bank_GBD]
        fresh_GN = torch.stack(fresh).clamp(min=DENSITY_FLOOR)
        self.inserted_GB = torch.cat([old_GB.gather(1, kept_GB), fresh_GN], dim=1)
        return place_GB

    def _novel_first(self, k_GLD: Tensor, old_GB: Tensor) -> Tensor:
        """Return the tokens that want into the bank, the ones first that are least like it."""
        import torch

        size = old_GB.shape[1]
        if not size:
            return torch.arange(k_GLD.shape[1], device=k_GLD.device).expand(len(k_GLD), -1)
        pairs = zip(k_GLD, old_GB, strict=True)  # head by head: pairs of tokens take much memory
        like = [(_kernel(k[size:], k[:size]) / old).amax(dim=-1) for k, old in pairs]
        return torch.stack(like).argsort(dim=-1, stable=True)

    def _admitted(
        self, bank_GBD: Tensor, new_GND: Tensor, old_GB: Tensor, capacity: int
    ) -> tuple[int, Tensor]:
        """Return how many of the ordered tokens come in, and the places [G, E] of those evicted."""
        import torch

        new_GND = new_GND[:, :capacity]
        size, wanting = old_GB.shape[1], new_GND.shape[1]
        free = min(wanting, capacity - size)
        none_GE = old_GB.new_zeros(len(old_GB), 0, dtype=torch.int64)
        if not size or free == wanting:
            return free, none_GE
        density_GB = torch.stack([_kernel(bank, bank).sum(dim=-1) for bank in bank_GBD])
        rows = [*zip(bank_GBD, new_GND, density_GB, old_GB, strict=True)]
        crowded = [
            (density + _kernel(new, bank).cumsum(dim=0) >= 2 * old).sum(dim=-1)
            for bank, new, density, old in rows
        ]
        room_N = torch.arange(1, wanting + 1, device=old_GB.device) - (capacity - size)
        fits_N = (torch.stack(crowded) <= room_N).all(dim=0) & (room_N > 0)
        count = max([free, *(fits_N.nonzero().flatten() + 1).tolist()[-1:]])
        if count == free:
            return free, none_GE
        last = [d + _kernel(new[:count], bank).sum(dim=0) for bank, new, d, _ in rows]
        last_GB = torch.stack(last)
        # the crowded ones first, then the densest
        rank_GB = last_GB + (last_GB >= 2 * old_GB) * (last_GB.amax() + 1)
        evicted = count - (capacity - size)
        return count, rank_GB.argsort(dim=-1, descending=True, stable=True)[:, :evicted]


def _wide(index_GN: Tensor, like_GLD: Tensor) -> Tensor:
    return index_GN.unsqueeze(-1).expand(-1, -1, like_GLD.shape[-1])


def _kernel(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Return the kernel of all pairs of keys of one head, [N, M]; see `Density`."""
    import torch

    square = torch.cdist(a_ND, b_MD, compute_mode="donot_use_mm_for_euclid_dist").square()
    return (1 + square * (2 / a_ND.shape[-1])) ** -2


def scoring_queries(strategy: CompressionStrategy | HeadClasses | None, layout: TokenLayout) -> int:
    """Return how many queries of a chunk score the keys; 0 without scores."""
    import torch

    if not isinstance(strategy, SCORED):
        return 0
    sample = torch.empty(layout.chunk_tokens, 1, 1, device="meta")
    return len(strategy.seen_queries(sample, layout))


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

SCORED = (ImportanceRedundancy, DeepForcing)
"""The strategies that look at queries."""
STRATEGIES: Mapping[str, type[CompressionStrategy] | type[HeadClasses] | None] = MappingProxyType(
    {
        "none": None,
        "importance": ImportanceRedundancy,
        "recent": Recent,
        "sink_recent": SinkRecent,
        "window": Window,
        "deep_forcing": DeepForcing,
        "density": Density,
        "dummy_forcing": DummyForcing,
        "forcing_kv": ForcingKV,
    }
)
"""What `kv.compress` names."""


def _is_plain(strategy: type[object]) -> TypeGuard[type[CompressionStrategy]]:
    """Tell whether keys and queries are all that a strategy needs of a cache."""
    return strategy is not Density and not issubclass(strategy, HeadClasses)


PlainStrategy: TypeAlias = Annotated[
    str, OneOf(tuple(name for name, made in STRATEGIES.items() if made is None or _is_plain(made)))
]
"""What `kv.compress` names where a cache holds rotated keys, for all heads alike."""

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
    recent_frames: Annotated[int, Bounds(1, MAX_FRAMES)] = 4
    dtype: Annotated[str, OneOf(KV_DTYPES)] = "model"
    quantizer: Annotated[str, OneOf(QUANTIZERS)] = "token"
    group_size: Annotated[int | None, Bounds(4, 1024)] = None
    centroids: Annotated[int, Bounds(1, 256)] = 256
    stages: Annotated[int, Bounds(1, 8)] = 1
    centred: bool = True
    keep_last: bool = False
    bias_correction: bool = False


def strategy_of(rule: KVRule, *, received: Received | None = None) -> CompressionStrategy | None:
    """Return what picks the clean tokens that stay, or None where all do.

    Args:
        received: see `ImportanceRedundancy`.

    Raises:
        UserError: the strategy needs more of a cache than keys and queries.
    """
    strategy = STRATEGIES[rule.compress]
    if strategy is None:
        return None
    if not _is_plain(strategy):
        others = names_of(PlainStrategy) or ()
        raise UserError(
            f"kv.compress={rule.compress} needs more than this model's cache holds (keys before "
            f"rotation, or a cache per class of heads): use one of {', '.join(others)}"
        )
    made = made_of(strategy, rule)
    is_scored = isinstance(made, ImportanceRedundancy)
    return replace(made, received=received) if is_scored else made


def any_strategy_of(rule: KVRule) -> CompressionStrategy | HeadClasses | None:
    """Return a new strategy, or None, for a cache that has what all of them need."""
    strategy = STRATEGIES[rule.compress]
    return None if strategy is None else made_of(strategy, rule)
