"""All randomness of a run comes from one seeded source."""

from collections.abc import Callable

import torch
from torch import Tensor

Draw = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""`(shape, dtype) -> standard normal noise` on the device of the run."""


def seeded_noise(seed: int, *, device: torch.device) -> Draw:
    """Return a source of normal noise that gives the same sequence for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    return draw
