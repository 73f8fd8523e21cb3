"""The only place that chooses an attention kernel.

Shapes: B batch, Q queries, K keys, H query heads, G key/value heads (H a multiple of G), D width.
Heads that share keys read them where they are: no kernel repeats them.
"""

import importlib
import importlib.util
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda as cuda_backends
from torch.nn import functional

from flowcache.errors import UserError, first_line

logger = logging.getLogger(__name__)

COARSE = ("sage",)
"""Kernels that are less exact than their inputs: only taken where they are asked for."""
PROBE_RUNS = 5
"""Timed runs of a kernel, of which the median counts; two more warm it up."""


@dataclass(frozen=True)
class Kernel:
    """An attention function and the name that reports show for it."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    suits: Callable[[Tensor, Tensor, Tensor], bool] = lambda _q, _k, _v: True
    """Whether it can do tensors of these shapes and this dtype, where it does not say so itself."""
    probed: tuple[tuple[str, float], ...] = ()
    """Kernels that were tried before this one was taken, with their seconds; the fastest first."""

    def __call__(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> Tensor:
        """Attend every query to every key, scaled by 1/sqrt(D), without a mask.

        Returns: `[B, Q, H, D]` in the dtype of `q_BQHD`.
        """
        return self.run(q_BQHD, k_BKGD, v_BKGD)


@dataclass(frozen=True)
class AttentionShape:
    """A kind of attention that a run spends its time on, at its largest."""

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


SDPA = Kernel("torch scaled_dot_product_attention", _sdpa)


# Backends of SDPA one by one ----------------------------------------------------------------------


def _backend(name: str, can_use: Any = None, *rest: Any, **options: Any) -> Kernel:
    """Return one backend of SDPA.

    It is called directly: `torch.nn.attention.sdpa_kernel` switches the others off for the whole
    process, and a thread that decodes meanwhile may need one of those.

    Args:
        can_use: asks PyTorch whether the backend can do some tensors: the kernel may not check.
        rest: what its function takes after queries, keys and values.
    """
    function = "attention_math" if name == "math" else f"{name}_attention"

    def run(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> Tensor:
        attend = getattr(torch.ops.aten, f"_scaled_dot_product_{function}")
        out, *_ = attend(*_heads_first(q_BQHD, k_BKGD, v_BKGD), *rest, **options)
        return out.transpose(1, 2)

    def suits(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> bool:
        has_groups = q_BQHD.shape[2] != k_BKGD.shape[2]
        q, k, v = _heads_first(q_BQHD, k_BKGD, v_BKGD)
        params = cuda_backends.SDPAParams(q, k, v, None, 0.0, False, has_groups)
        return can_use is None or can_use(params, False)

    return Kernel(f"torch SDPA, {name}", run, suits)


def _heads_first(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in (q_BQHD, k_BKGD, v_BKGD)]


def _backends() -> dict[str, Kernel]:
    return {
        "cudnn": _backend("cudnn", cuda_backends.can_use_cudnn_attention, None, False),
        "flash": _backend("flash", cuda_backends.can_use_flash_attention),
        "efficient": _backend("efficient", cuda_backends.can_use_efficient_attention, None, False),
        "math": _backend("math", enable_gqa=True),
    }


def _flash_attn() -> dict[str, Kernel]:
    """Return the functions of the flash-attn packages that are installed and can be imported."""
    found: dict[str, Kernel] = {}
    for key, module, name in (
        ("flash_attn_3", "flash_attn_interface", "flash-attn 3"),
        ("flash_attn_2", "flash_attn", "flash-attn 2"),
    ):
        if importlib.util.find_spec(module) is None:
            continue
        try:
            run = importlib.import_module(module).flash_attn_func
        except (ImportError, OSError, AttributeError) as error:  # built for another torch, mostly
            logger.warning("%s is installed but can't be used: %s", name, first_line(error))
            continue
        found[key] = Kernel(name, partial(_output_of, run))
    return found


def _sage() -> dict[str, Kernel]:
    """Return SageAttention, whose products of queries and keys are 8-bit, where it is installed."""
    if importlib.util.find_spec("sageattention") is None:
        return {}
    run = importlib.import_module("sageattention").sageattn
    return {"sage": Kernel("SageAttention", partial(run, tensor_layout="NHD"))}


def _output_of(run: Callable[..., Any], *qkv: Tensor) -> Tensor:
    """Attend; some flash-attn 3 releases also return the log-sum-exp."""
    result = run(*qkv)
    return result[0] if isinstance(result, tuple) else result


# Choice -------------------------------------------------------------------------------------------


def available_kernels(device: torch.device, *, dtype: torch.dtype) -> dict[str, Kernel]:
    """Return the kernels that may run on a device, by their names in the settings."""
    if device.type != "cuda":
        return {"torch": SDPA}
    # flash-attn needs 16-bit inputs, laid out as ours
    is_half = dtype in (torch.bfloat16, torch.float16)
    installed = _flash_attn() | _sage() if is_half else {}
    return installed | {"torch": SDPA} | _backends()


def check_available(wanted: str, device: torch.device, *, dtype: torch.dtype) -> None:
    """Check that a kernel is there, whether or not it can do the shape of a run."""
    kernels = {} if wanted == "auto" else available_kernels(device, dtype=dtype)
    if kernels and wanted not in kernels:
        raise UserError(
            f"attention_kernel={wanted} is not available on {device.type} with "
            f"{str(dtype).removeprefix('torch.')}: use auto, or one of {', '.join(kernels)}"
        )


Seconds = Callable[[Kernel, AttentionShape, torch.device, torch.dtype], float]
"""Measures a kernel; infinite if it can't do the shape."""


def measure(
    kernel: Kernel, shape: AttentionShape, device: torch.device, dtype: torch.dtype
) -> float:
    """Return the median seconds of a kernel on a CUDA device, infinite if it refuses the shape."""
    q, k, v = shape.tensors(device=device, dtype=dtype)
    if not kernel.suits(q, k, v):
        return math.inf
    seconds: list[float] = []
    try:
        for _ in range(2 + PROBE_RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)
            start.record(stream)
            kernel(q, k, v)
            end.record(stream)
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
    except RuntimeError as error:  # out of memory included
        logger.debug("%s refuses %s: %s", kernel.name, shape, error)
        return math.inf
    return statistics.median(seconds[2:])


def choose_kernel(
    device: torch.device,
    *,
    dtype: torch.dtype,
    shape: AttentionShape | None = None,
    wanted: str = "auto",
    seconds: Seconds = measure,
) -> Kernel:
    """Pick the fastest kernel for a shape by a short probe; without CUDA, PyTorch's own choice.

    Args:
        shape: None: no probe, the first of flash-attn 3, flash-attn 2 and PyTorch's own choice.
        wanted: a name of `available_kernels`, or auto.
    """
    kernels = available_kernels(device, dtype=dtype)
    if wanted != "auto":
        check_available(wanted, device, dtype=dtype)
    kernels = {
        name: kernel
        for name, kernel in kernels.items()
        if name == wanted or (wanted == "auto" and name not in COARSE)
    }
    first, *_ = kernels.values()
    if device.type != "cuda" or shape is None or wanted == "torch":
        return first
    # What PyTorch would choose is among its backends. The math one keeps queries x keys in memory:
    # it is tried where nothing else works.
    sparing = [name for name in kernels if name not in ("torch", "math")]
    for names in (sparing, [name for name in kernels if name == "math"]):
        times = {name: seconds(kernels[name], shape, device, dtype) for name in names}
        order = sorted((n for n in times if times[n] < math.inf), key=times.__getitem__)
        if order:
            probed = tuple((kernels[name].name, times[name]) for name in order)
            return replace(kernels[order[0]], probed=probed)
    what = "no attention kernel" if wanted == "auto" else f"attention_kernel={wanted} is none that"
    raise UserError(
        f"{what} on {device} can do {shape.num_queries} queries and {shape.num_keys} keys of width "
        f"{shape.head_width}: set attention_kernel={'torch' if wanted == 'auto' else 'auto'}"
    )


def choose_kernels(
    device: torch.device,
    *,
    dtype: torch.dtype,
    shape: AttentionShape,
    num_text: int,
    wanted: str = "auto",
    seconds: Seconds = measure,
) -> tuple[Kernel, Kernel]:
    """Pick the fastest kernels for self-attention and for attention to the prompt.

    Self-attention is probed at its largest shape and, where chunks see earlier ones, at the first
    chunk's, which sees itself alone.
    """

    def choose(num_keys: int) -> Kernel:
        at = replace(shape, num_keys=num_keys)
        return choose_kernel(device, dtype=dtype, shape=at, wanted=wanted, seconds=seconds)

    most, least = shape.num_keys, min(shape.num_queries, shape.num_keys)
    own = choose(most)
    if least < most:
        own = by_length(choose(least), own, limit=math.isqrt(least * most))
    return own, choose(max(num_text, 1))


def by_length(few: Kernel, many: Kernel, *, limit: int) -> Kernel:
    """Return a kernel that is one of two by the number of keys, up to a limit and above it."""
    if few.name == many.name:
        return many

    def run(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> Tensor:
        return (few if k_BKGD.shape[1] <= limit else many)(q_BQHD, k_BKGD, v_BKGD)

    name = f"{few.name} up to {limit} keys, {many.name} above"
    return Kernel(name, run, probed=many.probed)


def describe_choice(kernel: Kernel, cross_kernel: Kernel) -> str:
    """Return a line on which kernels were taken, and how long those took that were tried."""

    def described(kernel: Kernel) -> str:
        tried = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in kernel.probed)
        return kernel.name + (f" (probed: {tried})" if tried else "")

    return f"attention     {described(kernel)}; to the prompt {described(cross_kernel)}"
