"""When each chunk takes which of its own denoising steps.

One function covers the published schedules: chunk i runs `lag` steps behind chunk i-1.
`lag = 0` is synchronous diffusion forcing, `lag = ar_step` asynchronous SkyReels-V2,
`lag = num_steps // window` MAGI-1, `lag = num_steps` strictly one chunk after another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowcache.errors import UserError


@dataclass(frozen=True)
class Tick:
    """One pass over the active chunks."""

    index: int
    num_ticks: int
    num_steps: int
    steps: Mapping[int, int]
    """Active chunk -> its own step, 0..num_steps-1, in ascending chunk order."""

    @property
    def is_last(self) -> bool:
        return self.index == self.num_ticks - 1

    @property
    def entering(self) -> tuple[int, ...]:
        """Chunks that take their first step in this tick."""
        return tuple(chunk for chunk, step in self.steps.items() if step == 0)

    @property
    def finishing(self) -> tuple[int, ...]:
        """Chunks that take their last step in this tick and are clean after it."""
        return tuple(chunk for chunk, step in self.steps.items() if step == self.num_steps - 1)

    def is_forced(self, chunk: int, *, warmup_steps: int, with_last: bool) -> bool:
        """Tell whether a chunk takes one of its first own steps, or its last one if that counts."""
        step = self.steps[chunk]
        return step < warmup_steps or (with_last and step == self.num_steps - 1)


def staggered(chunks: Sequence[int], *, num_steps: int, lag: int) -> list[Tick]:
    """Return the ticks that denoise `chunks`, each `lag` steps behind the one before it.

    A lag above `num_steps` means the same as `num_steps`: a chunk starts when the previous one is
    clean. With 3 chunks, 4 steps and lag 2 the steps taken per tick are

        tick    0  1  2  3  4  5  6  7
        chunk 0 0  1  2  3
        chunk 1       0  1  2  3
        chunk 2             0  1  2  3

    Args:
        chunks: ids of the chunks to denoise, ascending (given clean chunks left out).
        num_steps: denoising steps of one chunk, at least 1.
        lag: own steps between neighbouring chunks, at least 0.
    """
    if num_steps < 1:
        raise UserError(f"the number of denoising steps must be at least 1, not {num_steps}")
    if lag < 0:
        raise UserError(f"the lag between chunks must be 0 or more steps, not {lag}")
    if not chunks:
        return []
    stagger = min(lag, num_steps)
    num_ticks = num_steps + (len(chunks) - 1) * stagger

    def steps(index: int) -> dict[int, int]:
        """Return the active chunks alone: a long video has many more."""
        first, stop = 0, len(chunks)
        if stagger:
            first = max(-(-(index - num_steps + 1) // stagger), 0)
            stop = min(index // stagger + 1, stop)
        return {chunks[place]: index - place * stagger for place in range(first, stop)}

    return [Tick(index, num_ticks, num_steps, steps(index)) for index in range(num_ticks)]
