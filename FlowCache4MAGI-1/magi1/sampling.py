"""How a clip is denoised: the settings of MAGI-1's loop, as `sampler` takes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowcache.compress import SCORED, CompressionStrategy, TokenLayout
from flowcache.quantization import KVFormat
from magi1.config import Quantity, ReleaseConfig
from magi1.schedule import Clip, Clock

ALL_BRANCHES = "all"
"""Branch under which the one decision for all guidance passes is recorded."""
GUIDANCE = "guidance"
"""Branch under which the passes without text are recorded where they are held."""
RANGE_SLACK = 1e-7
"""A timestep this little below a range's lower end belongs to it."""


@dataclass(frozen=True)
class Guidance:
    """How the three passes of a base model are weighted, by timestep.

    `(1 - prev) * alone + (prev - text) * no_text + text * with_text`: the chunk alone and without
    text, with the chunks before it, and with its text as well.
    """

    t_range: tuple[float, ...]
    """Lower ends of the ranges of timesteps in which the scales are these."""
    prev_scales: tuple[float, ...]
    text_scales: tuple[float, ...]

    def scales(self, t: float) -> tuple[float, float]:
        """Return `prev` and `text` at a timestep."""
        place = sum(low - RANGE_SLACK < t for low in self.t_range) - 1
        return self.prev_scales[place], self.text_scales[place]


@dataclass(frozen=True)
class KVBudget:
    """A bound on the KV cache and the rule that picks which clean tokens stay."""

    total_chunks: int
    """Chunks that the cache holds, active ones included."""
    strategy: CompressionStrategy
    layout: TokenLayout

    def seen_queries(self, q_SHC: Tensor) -> Tensor:
        """Return a copy of the queries that the strategy looks at (none, if it looks at none)."""
        if isinstance(self.strategy, SCORED):
            return self.strategy.seen_queries(q_SHC, self.layout).clone()
        return q_SHC[:0]


@dataclass(frozen=True)
class Sampling:
    """How a clip is denoised.

    Attributes:
        clock: when each chunk takes which step.
        guidance: three passes with these weights; None: one pass (distilled models).
        is_distilled: whether the model is given the step size.
        clean_t: timestep at which clean chunks are shown to the model.
        clean_pass: whether a chunk that became clean goes through the model once more, without its
            text, for its keys. Else they stay those of its last computed step, as in FlowCache.
        nearly_clean_pass: whether the oldest chunk, once nearly clean, is computed a second time
            without the chunks before it (one pass only).
        prev_share: weight of the chunk that saw the ones before it in the mean with the copy that
            saw none.
        quantity: what a reused chunk gets again.
        budget: bound of the KV cache; None: all chunks stay.
        kv_format: how clean keys and values are quantised; None: they stay as they are.
        kv_storage: where the KV cache lies; None: on the device.
    """

    clock: Clock
    guidance: Guidance | None
    is_distilled: bool
    clean_t: float = 0.9999
    clean_pass: bool = True
    nearly_clean_pass: bool = True
    prev_share: float = 0.7
    quantity: Quantity = "latent_update"
    budget: KVBudget | None = None
    kv_format: KVFormat | None = None
    kv_storage: torch.device | None = None

    @classmethod
    def of(cls, config: ReleaseConfig) -> "Sampling":
        """Return what a config of the release describes."""
        run = config.runtime_config
        guidance = Guidance(run.cfg_t_range, run.prev_chunk_scales, run.text_scales)
        return cls(
            clock=Clock.of(config),
            guidance=guidance if run.cfg_number > 1 else None,
            is_distilled=config.engine_config.distill,
            clean_t=run.clean_t,
        )

    @property
    def passes(self) -> tuple[str, ...]:
        """The guidance passes by name: with text; without; the chunk alone and without."""
        return ("cond",) if self.guidance is None else ("cond", "prev", "alone")

    def has_pass_alone(self, t: float) -> bool:
        """Tell whether the pass of a chunk alone has any weight in the guidance at a timestep."""
        return self.guidance is not None and self.guidance.scales(t)[0] != 1

    def is_computed_twice(self, step: int) -> bool:
        """Tell whether the oldest chunk is also computed without the chunks before it."""
        is_on = self.nearly_clean_pass and self.guidance is None
        return is_on and self.clock.is_nearly_clean(step)


def cache_chunks(clip: Clip, *, total_chunks: int | None) -> int:
    """Return how many chunks a KV cache must hold; `total_chunks` is the budget, None: all."""
    if total_chunks is None:
        return clip.num_chunks
    # given chunks go in all at once
    return max(clip.num_given, min(clip.num_chunks, total_chunks))
