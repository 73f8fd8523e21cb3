"""How a clip is denoised: guidance passes, clean passes, the bound of the KV cache.

Axes: S tokens of a chunk, H query heads, C head width.
"""

from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from torch import Tensor

from flowcache.bounds import OneOf
from flowcache.compress import CompressionStrategy, ImportanceRedundancy, TokenLayout
from flowcache.kv import KVCache
from magi1.config import MagiConfig, ModelConfig
from magi1.schedule import Clip

Quantity: TypeAlias = Annotated[str, OneOf(("latent_update", "velocity", "clean"))]
"""What a reused chunk gets again: the last change of its latents, as published, with the step size
of then; or the last velocity, times the step size of now; or the velocity that leads to the clean
estimate of then."""

RANGE_SLACK = 1e-7
"""A timestep this little below a range's lower end belongs to it."""


@dataclass(frozen=True)
class Guidance:
    """How the three passes of a base model are weighted, by timestep.

    `(1 - prev) * alone + (prev - text) * no_text + text * with_text`: the chunk alone and without
    text, with the chunks before it, and with its text as well.

    Attributes:
        t_range: lower ends of the ranges of timesteps.
        prev_scales: `prev` in each range.
        text_scales: `text` in each range.
    """

    t_range: tuple[float, ...]
    prev_scales: tuple[float, ...]
    text_scales: tuple[float, ...]

    def scales(self, t: float) -> tuple[float, float]:
        """Return `prev` and `text` at a timestep."""
        place = sum(low - RANGE_SLACK < t for low in self.t_range) - 1
        return self.prev_scales[place], self.text_scales[place]


@dataclass(frozen=True)
class Sampling:
    """How a clip is denoised.

    Attributes:
        guidance: three passes with these weights; None: one pass (distilled models).
        is_distilled: whether the model is told the step size.
        clean_t: timestep at which clean chunks are shown to the model.
        clean_pass: whether a chunk that became clean goes through the model once more, without its
            text, for its keys. Else they stay those of its last computed step, as in FlowCache.
        nearly_clean_pass: whether the oldest chunk, once nearly clean, is computed a second time
            without the chunks before it (one pass only).
        prev_share: weight of the chunk that saw the ones before it in the mean with the copy that
            saw none.
        quantity: see `Quantity`.
    """

    guidance: Guidance | None
    is_distilled: bool
    clean_t: float = 0.9999
    clean_pass: bool = True
    nearly_clean_pass: bool = True
    prev_share: float = 0.7
    quantity: Quantity = "latent_update"

    @property
    def passes(self) -> tuple[str, ...]:
        """The guidance passes by name: with text; without; the chunk alone and without."""
        return ("cond",) if self.guidance is None else ("cond", "prev", "alone")

    @property
    def has_nearly_clean_pass(self) -> bool:
        """Whether a nearly clean chunk is ever computed a second time."""
        return self.nearly_clean_pass and self.guidance is None

    def has_pass_alone(self, t: float) -> bool:
        """Tell whether the pass of a chunk alone has any weight in the guidance at a timestep."""
        return self.guidance is not None and self.guidance.scales(t)[0] != 1

    @classmethod
    def of(cls, config: MagiConfig) -> "Sampling":
        """Return what a config of the release describes."""
        run = config.runtime_config
        guidance = Guidance(run.cfg_t_range, run.prev_chunk_scales, run.text_scales)
        return cls(
            guidance=guidance if run.cfg_number > 1 else None,
            is_distilled=config.engine_config.distill,
            clean_t=run.clean_t,
        )


@dataclass(frozen=True)
class KVBudget:
    """A bound on the KV cache and the rule that picks which clean tokens stay.

    Attributes:
        total_chunks: chunks that the cache holds, active ones included.
        strategy: picks the tokens.
        layout: tokens of a frame and a chunk.
    """

    total_chunks: int
    strategy: CompressionStrategy
    layout: TokenLayout

    def seen_queries(self, q_SHC: Tensor) -> Tensor:
        """Return a copy of the queries that the strategy looks at (none, if it looks at none)."""
        if isinstance(self.strategy, ImportanceRedundancy):
            return self.strategy.seen_queries(q_SHC, self.layout).clone()
        return q_SHC[:0]


def cache_chunks(clip: Clip, *, total_chunks: int | None) -> int:
    """Return how many chunks a KV cache must hold.

    Args:
        total_chunks: the budget; None: all chunks stay.
    """
    if total_chunks is None:
        return clip.num_chunks
    # given chunks go in all at once
    return max(clip.num_given, min(clip.num_chunks, total_chunks))


def cache_bytes(
    config: ModelConfig,
    *,
    clip: Clip,
    chunk_tokens: int,
    total_chunks: int | None,
    num_branches: int = 1,
) -> int:
    """Return the size of the keys and values of a run, in bytes.

    Args:
        chunk_tokens: tokens of a chunk.
        total_chunks: see `cache_chunks`.
        num_branches: guidance passes with a cache: 1 for distilled models, 2 for base models.
    """
    tokens = cache_chunks(clip, total_chunks=total_chunks) * chunk_tokens
    values = 2 * tokens * config.num_query_groups * config.kv_channels
    return num_branches * config.num_layers * values * config.dtype.itemsize


@dataclass
class Branch:
    """One guidance pass through the KV cache.

    Attributes:
        is_null: whether the caption counts as dropped.
        caches: keys and values, by layer.
        queries: of the chunk computed last, by layer; empty without a KV budget.
    """

    is_null: bool
    caches: list[KVCache]
    queries: dict[int, Tensor] = field(default_factory=dict)

    def settle(self, num_tokens: int, *, chunk: int) -> None:
        """Declare the keys of the oldest active chunk final."""
        for cache in self.caches:
            cache.settle(num_tokens, chunk=chunk)
