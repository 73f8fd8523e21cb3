"""Guidance that is held: in some computed steps only the conditional pass runs.

What the other passes add to the conditional velocity is a difference, as uncond - cond or
guided - cond. It is kept from the last step that computed all passes, and added to the conditional
velocity of the steps that compute that one pass only.

Example with `every=3` and own steps 0 1 2 4 5 7 of 8 computed: steps 0, 4 and 7 (the last one)
compute all passes, steps 1, 2 and 5 the conditional one.

Source: FasterCache (arXiv 2410.19355) reuses the difference of the passes as well, corrected by
frequency; here it is held as it is.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class _Held:
    difference: Tensor
    scales: tuple[float, ...]
    num_uses: int = 0


@dataclass
class HeldGuidance:
    """Which computed steps run the conditional pass alone, and what stands for the others.

    The last own step computes all passes, and so does a step without a difference of its scales.
    """

    steps: Collection[int] | None = None
    """Own steps that run all passes if they are computed; None: every one."""
    every: int = 1
    """Of a chunk's computed steps in a row, the first of so many runs all passes."""
    differences: dict[int, _Held] = field(default_factory=dict)

    @property
    def is_on(self) -> bool:
        """Whether any difference is ever held."""
        return self.steps is not None or self.every > 1

    def is_held(
        self, chunk: int, step: int, *, num_steps: int, scales: tuple[float, ...] = ()
    ) -> bool:
        """Tell whether a chunk, if it is computed in an own step, runs the conditional pass alone.

        Args:
            scales: of the guidance in this step; a difference made with others is not held.
        """
        held = self.differences.get(chunk)
        if held is None or step == num_steps - 1 or held.scales != scales:
            return False
        if self.steps is not None:
            return step not in self.steps
        return held.num_uses + 1 < self.every

    def put(self, chunk: int, difference: Tensor, *, scales: tuple[float, ...] = ()) -> None:
        """Keep the difference of a step that ran all passes."""
        if self.is_on:
            self.differences[chunk] = _Held(difference, scales)

    def take(self, chunk: int) -> Tensor:
        """Return the difference that stands in for a step's other passes."""
        held = self.differences[chunk]
        held.num_uses += 1
        return held.difference

    def drop(self, chunk: int) -> None:
        """Forget a chunk that is clean."""
        self.differences.pop(chunk, None)
