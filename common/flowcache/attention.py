"""The only place that chooses an attention kernel.

Shapes: B batch, Q queries, K keys, H query heads, G key/value heads (H a multiple of G), D width.
Heads that share keys read them where they are: no kernel repeats them.
"""

import importlib.util
import logging
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowcache.errors import UserError

logger = logging.getLogger(__name__)

KernelName = Literal[
    "auto", "flash_attn_3", "flash_attn_2", "cudnn", "flash", "efficient", "math", "torch"
]
"""What `attention_kernel` may be: auto probes; torch leaves the choice to PyTorch."""

PROBE_RUNS = 5
"""Timed runs of a kernel, of which the median counts; two more warm it up."""


@dataclass(frozen=True)
class Kernel:
    """An attention function and the name that reports show for it."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    probed: tuple[tuple[str, float], ...] = ()
    """Kernels that were tried before this one was taken, with their seconds; the fastest first."""

    def __call__(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> Tensor:
        """Attend every query to every key, scaled by 1/sqrt(D), without a mask.

        Returns: `[B, Q, H, D]` in the dtype of `q_BQHD`.
        """
        return self.run(q_BQHD, k_BKGD, v_BKGD)


@dataclass(frozen=True)
class AttentionShape:
    """The self-attention that a run spends its time on."""

    num_queries: int
    num_keys: int
    num_heads: int
    kv_heads: int
    head_width: int

    def tensors(self, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return random queries, keys and values of this shape."""
        q = (1, self.num_queries, self.num_heads, self.head_width)
        kv = (2, 1, self.num_keys, self.kv_heads, self.head_width)
        k, v = torch.randn(kv, device=device, dtype=dtype)
        return torch.randn(q, device=device, dtype=dtype), k, v


def _sdpa(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> Tensor:
    out_BHQD = functional.scaled_dot_product_attention(
        q_BQHD.transpose(1, 2),
        k_BKGD.transpose(1, 2),
        v_BKGD.transpose(1, 2),
        enable_gqa=q_BQHD.shape[2] != k_BKGD.shape[2],
    )
    return out_BHQD.transpose(1, 2)


def _sdpa_by(backend: SDPBackend, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(q_BQHD, k_BKGD, v_BKGD)


SDPA = Kernel("torch scaled_dot_product_attention", _sdpa)
_BACKENDS: Mapping[str, SDPBackend] = MappingProxyType(
    {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
)


def available_kernels(device: torch.device, *, dtype: torch.dtype) -> dict[str, Kernel]:
    """Return the kernels that may run on a device, by their names in the settings.

    flash-attn needs CUDA and 16-bit inputs; its inputs are laid out as ours, so nothing is copied.
    """
    if device.type != "cuda":
        return {"torch": SDPA}
    kernels: dict[str, Kernel] = {}
    if dtype in (torch.bfloat16, torch.float16):
        if importlib.util.find_spec("flash_attn_interface") is not None:
            from flash_attn_interface import (  # pyright: ignore[reportMissingImports]
                flash_attn_func as flash3,
            )

            kernels["flash_attn_3"] = Kernel(
                "flash-attn 3", lambda q, k, v: _first(flash3(q, k, v))
            )
        if importlib.util.find_spec("flash_attn") is not None:
            from flash_attn import (  # pyright: ignore[reportMissingImports]
                flash_attn_func as flash2,
            )

            kernels["flash_attn_2"] = Kernel("flash-attn 2", flash2)
    kernels["torch"] = SDPA
    for name, backend in _BACKENDS.items():
        kernels[name] = Kernel(f"torch SDPA, {name}", partial(_sdpa_by, backend))
    return kernels


Seconds = Callable[[Kernel, AttentionShape, torch.device, torch.dtype], float]
"""Measures a kernel; infinite if it can't do the shape."""


def measure(
    kernel: Kernel, shape: AttentionShape, device: torch.device, dtype: torch.dtype
) -> float:
    """Return the median seconds of a kernel on a CUDA device, infinite if it refuses the shape."""
    q, k, v = shape.tensors(device=device, dtype=dtype)
    seconds: list[float] = []
    try:
        for _ in range(2 + PROBE_RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            kernel(q, k, v)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
    except RuntimeError as error:  # out of memory included, with which the math kernel may end
        logger.debug("%s refuses %s: %s", kernel.name, shape, error)
        return math.inf
    return statistics.median(seconds[2:])


def choose_kernel(
    device: torch.device,
    *,
    dtype: torch.dtype,
    shape: AttentionShape | None = None,
    wanted: KernelName = "auto",
    seconds: Seconds = measure,
) -> Kernel:
    """Pick the fastest kernel for a shape by a short probe; where only one can run, without.

    Args:
        shape: None: no probe, the first of flash-attn 3, flash-attn 2 and PyTorch's own choice.
        wanted: `attention_kernel` of the settings.

    Raises:
        UserError: the wanted kernel can't run here.
    """
    kernels = available_kernels(device, dtype=dtype)
    if wanted != "auto":
        if wanted not in kernels:
            raise UserError(
                f"attention_kernel={wanted} is not available on {device.type} with "
                f"{str(dtype).removeprefix('torch.')}: use auto, or one of {', '.join(kernels)}"
            )
        return kernels[wanted]
    first, *others = kernels.values()
    if not others or shape is None:
        return first
    # what PyTorch would choose is among its backends
    probed = {n: seconds(k, shape, device, dtype) for n, k in kernels.items() if n != "torch"}
    if min(probed.values()) == math.inf:
        raise UserError(
            f"no attention kernel on {device} can do {shape.num_queries} queries and "
            f"{shape.num_keys} keys of width {shape.head_width}: set attention_kernel=torch"
        )
    order = sorted(probed, key=lambda name: probed[name])
    times = tuple((kernels[n].name, probed[n]) for n in order if probed[n] < math.inf)
    return replace(kernels[order[0]], probed=times)


def describe_choice(kernel: Kernel) -> str:
    """Say which kernel was taken, and how long those took that were tried."""
    tried = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in kernel.probed)
    return f"attention     {kernel.name}" + (f" (probed: {tried})" if tried else "")


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output alone: some flash-attn 3 releases also return the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result
