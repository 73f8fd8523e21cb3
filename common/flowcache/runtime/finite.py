"""Values that are not finite: found where results are read from the device anyway.

A check is computed on the device along with the result and read with it, so that nothing waits for
it. Which weight is to blame is looked up only after a check has failed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from flowcache.errors import UserError

Modules = Mapping[str, nn.Module]
"""Loaded models by what messages call them."""


@dataclass(frozen=True)
class Decoded:
    """New pixel frames, and whether the latents that they show are finite."""

    frames: Tensor
    """`[3, T, H, W]`, about -1..1."""
    is_latent_finite: Tensor
    """A boolean on the device, still unread."""

    @classmethod
    def joined(cls, parts: Sequence["Decoded"]) -> "Decoded":
        """Return parts that follow each other as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.frames for part in parts], dim=1),
            torch.stack([part.is_latent_finite for part in parts]).all(),
        )


def all_finite(x: Tensor) -> Tensor:
    """Return whether all values are finite, as a boolean on the device of the values."""
    return x.isfinite().all()


class NotFiniteError(UserError):
    """A result holds values that are not finite."""

    def __init__(self, place: str, *, modules: Modules | None = None) -> None:
        """Say where they are, and why.

        Args:
            place: names the result, in plural.
            modules: what made it; the first weight that is not finite is named.
        """
        self.place = place
        super().__init__(f"{place} hold values that are not finite{_cause(modules)}")

    def caused_by(self, modules: Modules) -> "NotFiniteError":
        """Return the same error with its cause."""
        return NotFiniteError(self.place, modules=modules)


def check_finite(x: Tensor, place: str, *, modules: Modules | None = None) -> Tensor:
    """Return a result that was read already.

    Args:
        place: names it, in plural.
        modules: what made it.

    Raises:
        NotFiniteError: a value is not finite.
    """
    if not bool(all_finite(x)):
        raise NotFiniteError(place, modules=modules)
    return x


def broken_weight(modules: Modules) -> str | None:
    """Name the first weight that holds a value that is not finite; None: all are finite."""
    for owner, module in modules.items():
        for name, weight in chain(module.named_parameters(), module.named_buffers()):
            # types of one byte know no `isfinite`
            values = weight.float() if weight.dtype.itemsize == 1 else weight
            if not bool(all_finite(values)):
                return f"{name} of the {owner}"
    return None


def _cause(modules: Modules | None) -> str:
    if modules is None:
        return ""
    weight = broken_weight(modules)
    if weight is not None:
        return f"; so does its weight {weight}: the file is damaged, download it again"
    return (
        f", though all weights of {' and '.join(modules)} are finite: a number grew too large; try "
        "dtype=float32 or bfloat16, or other settings"
    )
