"""What tuning needs of a model, whichever it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flowcache.policies import Observe
from flowcache.predict import Quantity
from flowcache.runtime.profile import Setting
from flowcache.runtime.run import Clip
from flowcache.tune.gram import calibration_bytes

EXACT_BYTES = 256_000_000
"""Up to this much memory, velocities are held as they are; above, as sketches."""
GUIDED, CONDITIONAL = "guided", "cond"
"""Branches as the samplers show them."""
SKETCH_WIDTH = 16_384
"""Numbers of a sketch: squared errors are right to about 1 %."""


@dataclass(frozen=True)
class Words:
    """What the settings and presets of a model call what all models have."""

    content: tuple[str, ...]
    """Settings that make the content of a chunk the signal of its policy."""
    published: Quantity
    """What the published method reuses."""
    whole_window: str
    """Preset of TeaCache, with the attention of the tuned one."""


@dataclass(frozen=True)
class Work:
    """The size of one clip, by arithmetic."""

    num_steps: int
    warmup_steps: int
    """First own steps that an adaptive policy of the preset always computes."""
    compute_last_step: bool
    """Whether FlowCache computes a chunk's own last step in any case."""
    num_elements: int
    """Numbers in the latent of the largest chunk."""
    num_active: int
    """Chunks that are active at once at most."""
    flops: int
    """Of a clip with every step computed."""
    num_passes: int = 1
    """Guidance passes of a step."""
    compresses_kv: bool = False
    """Whether the KV cache drops clean tokens."""
    holds_guidance: bool = False
    """Whether plans may run the conditional pass alone: its velocities are recorded, too."""

    @property
    def branches(self) -> tuple[str, ...]:
        """Return the velocities that are recorded; the guided one is what moves the latent."""
        return (GUIDED, CONDITIONAL) if self.holds_guidance else (GUIDED,)

    @property
    def sketch_width(self) -> int | None:
        """Return how wide sketches must be; None: velocities fit as they are."""
        return None if self._bytes(None) <= EXACT_BYTES else SKETCH_WIDTH

    @property
    def calibration_bytes(self) -> int:
        """Return the memory that calibrating needs beside the run."""
        return self._bytes(self.sketch_width)

    def _bytes(self, width: int | None) -> int:
        return calibration_bytes(
            num_elements=self.num_elements,
            num_steps=self.num_steps,
            num_branches=len(self.branches),
            num_active=self.num_active,
            width=width,
        )


class Subject(Protocol):
    """A model with its preset: makes clips with any reuse policy."""

    preset: str
    words: Words

    def work(self) -> Work:
        """Return the size of one clip."""
        ...

    def load(self) -> None:
        """Load the model; nothing of it is needed before."""
        ...

    def setting(self) -> Setting:
        """Return what a profile must fit."""
        ...

    def fingerprint(self) -> str:
        """Return the hash of the model that a profile must fit."""
        ...

    def render(
        self,
        settings: Sequence[str],
        *,
        prompt: str,
        seed: int,
        preset: str | None = None,
        observe: Observe | None = None,
    ) -> Clip:
        """Make a clip.

        Args:
            settings: `key=value` changes.
            preset: instead of the subject's own.
            observe: is shown every computed velocity.
        """
        ...
