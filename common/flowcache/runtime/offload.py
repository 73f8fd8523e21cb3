"""Networks that take turns on a device, their weights kept on the host."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

BLOCK_BYTES = 2**28
"""Of pinned memory that are asked for at once: PyTorch rounds what it pins up to a power of two."""
ALIGNMENT = 64
"""Bytes at whose multiples a weight starts in a block."""


class HostWeights:
    """The weights of a network on the host, from which it comes back to its device.

    A run changes no weight, so that leaving the device copies nothing. Coming back is one copy,
    from pinned memory where the device is CUDA, which keeps the host waiting for nothing.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        """Copy the weights to the host; the network stays where it is.

        Args:
            device: where the network works; on the host itself nothing is copied, now or later.
        """
        self._device = device
        owners = [
            (module, name, parameter)
            for module in network.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        on_host = [parameter.data for *_, parameter in owners]
        if device.type != "cpu":
            on_host = _on_host(on_host, is_pinned=device.type == "cuda")
        self._held = [
            (module, name, nn.Parameter(copy, requires_grad=False))
            for (module, name, _), copy in zip(owners, on_host, strict=True)
        ]

    def leave(self) -> None:
        """Put the network on the host."""
        for module, name, parameter in self._held:
            setattr(module, name, parameter)

    def come(self) -> None:
        """Put the network on its device."""
        for module, name, parameter in self._held:
            moved = parameter.data.to(self._device, non_blocking=True)
            setattr(module, name, nn.Parameter(moved, requires_grad=False))


@contextmanager
def aside(weights: HostWeights | None) -> Generator[None, None, None]:
    """Keep a network off its device while the body runs; None: nothing is moved."""
    if weights is None:
        yield
        return
    weights.leave()
    try:
        yield
    finally:
        weights.come()


def _on_host(tensors: Sequence[Tensor], *, is_pinned: bool) -> list[Tensor]:
    """Return copies in the memory of the host, many in each block of it.

    Tensors that consist of several, as quantised ones, are copied as they are, not pinned.
    """
    copies: list[Tensor] = []
    block, used = torch.empty(0, dtype=torch.uint8), 0
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            copies.append(tensor.to("cpu"))
            continue
        if used + tensor.nbytes > len(block):
            size = max(BLOCK_BYTES, tensor.nbytes)
            block, used = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned), 0
        view = block[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(view.copy_(tensor))
        used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return copies
