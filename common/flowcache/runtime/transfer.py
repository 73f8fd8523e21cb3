"""Small tensors made from plain numbers, on a device, without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(
    values: Sequence[int] | Sequence[float], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return numbers as a tensor on a device.

    A copy from ordinary memory to CUDA waits for all that is queued there; one from pinned memory
    does not, and PyTorch keeps that memory until it is done.
    """
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
