"""How a window is denoised: steps, attention, guidance passes, what goes through the blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flowcache.kv import KVCache
from flowcache.policies import Decision, ReusePolicy
from flowcache.predict import Quantity, ResultStore
from flowcache.schedule import Tick, staggered
from flowcache.wan.dit import Embedded
from flowcache.wan.layers import ContextKV
from skyreels_v2.window import Window

Signal = Literal["timestep", "timestep_embedding", "content"]

WHOLE_WINDOW = -1
"""Unit id under which results of the whole window are stored."""


@dataclass(frozen=True)
class Sampling:
    """How a window is denoised."""

    num_steps: int
    shift: float
    guidance: float
    lag: int
    attention: Literal["full", "causal"]
    clean_pass: bool
    fps: int
    addnoise: int = 0
    """Timestep, 0..60, to which the prefix is noised while it conditions the rest."""
    signal: Signal = "timestep"
    quantity: Quantity = "residual"
    """What a reused chunk gets again."""
    batch_branches: bool = False
    """Compute the guidance branches in one batch: fewer, larger operations, more memory."""
    together_tokens: int = 4096
    """Chunks of one tick with at most so many tokens together go through the blocks at once."""

    def ticks(self, window: Window) -> list[Tick]:
        """Return the passes that denoise a window."""
        return staggered(window.generated, num_steps=self.num_steps, lag=self.lag)


@dataclass
class Branch:
    """One guidance pass of one window: its prompt, decisions, stored results, keys and values."""

    context: list[ContextKV]
    policy: ReusePolicy
    results: ResultStore
    caches: list[KVCache]
    """One per layer; empty with full attention."""


@dataclass(frozen=True)
class Noisy:
    """Latent frames on their way to data."""

    latents: Tensor
    """`[C, F, h, w]`."""
    sigma: Tensor
    """Noise level of each frame, `[F]`."""
    embedded: Embedded

    def frames(self, start: int, stop: int) -> "Noisy":
        """Return some of the frames."""
        own = slice(start, stop)
        return Noisy(self.latents[:, own], self.sigma[own], self.embedded.frames(start, stop))


@dataclass(frozen=True)
class Unit:
    """What goes through the blocks together: one chunk, or the whole window."""

    id: int
    frames: tuple[int, int]
    """Where its frames stand among the embedded ones, (start, stop)."""

    def chunks(self, tick: Tick) -> list[int]:
        """Return the active chunks in it."""
        return list(tick.steps) if self.id == WHOLE_WINDOW else [self.id]

    def is_computed(self, decisions: Mapping[int, Decision]) -> bool:
        """Tell whether a branch's decisions want it computed."""
        if self.id == WHOLE_WINDOW:
            return any(decision.is_computed for decision in decisions.values())
        return decisions[self.id].is_computed
