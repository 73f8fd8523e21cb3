"""Small numeric tools: seeded noise, copies without waiting, float32, GPU memory, FLOP formulas.

On CUDA a float32 matrix product is one; a float32 convolution is TF32 by default, whose factors
have 10 bits of mantissa. The rule here: a run in float32 has no TF32, so that it can be compared
with a reference. In a run in 16 bits the float32 VAE and patch convolutions are TF32, as in the
released code: finer than the 7 bits of bfloat16 around them, and about six times faster.

FLOPs are those of the matrix products; a multiply-add counts 2. Norms, activations and rotations
are left out, as in the published figures: at the real sizes they are below 0.1 %.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Draw = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""`(shape, dtype) -> standard normal noise` on the device of the run."""
ALLOCATOR = "expandable_segments:True"
"""Segments of GPU memory that grow: no unusable gaps between those of encoder, blocks, decoder."""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# torch 2.8 has no shape rule for a product with `out_dtype`: it can't be compiled. 2.11 has one.
HAS_WIDE_PRODUCT = torch.__version__ >= "2.11"


def seeded_noise(seed: int, *, device: torch.device) -> Draw:
    """Return a source of normal noise: all randomness of a run."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    return draw


def on_device(
    values: Sequence[int] | Sequence[float], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return numbers as a tensor on a device.

    A copy from ordinary memory to CUDA waits for all that is queued there; one from pinned memory
    does not, and PyTorch keeps that memory until it is done.
    """
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def linear_in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer to `x` in float32 and return float32.

    On CUDA 16-bit numbers are multiplied as they are and summed in float32: that is as exact, for
    such a product is a float32 number, and ten times faster than first making them wider.
    """
    assert isinstance(layer, nn.Linear)
    bias = cast("Tensor | None", layer.bias)
    wide_bias = None if bias is None else bias.float()
    is_half = x.dtype == layer.weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if not (HAS_WIDE_PRODUCT and x.is_cuda and is_half and x.ndim > 1):
        return functional.linear(x.float(), layer.weight.float(), wide_bias)
    y = torch.mm(x.flatten(0, -2), layer.weight.t(), out_dtype=torch.float32)
    y = y.unflatten(0, x.shape[:-1])
    return y if wide_bias is None else y + wide_bias


def set_float32_precision(dtype: torch.dtype) -> None:
    """Set for the whole process what float32 products are on CUDA; the only place that does."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32


def set_allocator() -> None:
    """Choose how GPU memory is cut into pieces, unless the user did; before any is taken."""
    if any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        return
    # A call, since the variable may have been read when torch was imported. No public one exists.
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    name = "accelerator_setAllocatorSettings"
    if version < (2, 9):
        name = "cuda_cudaCachingAllocator_set_allocator_settings"
    getattr(importlib.import_module("torch._C"), f"_{name}")(ALLOCATOR)


def release_cache(device: torch.device) -> None:
    """Give back GPU memory that no tensor uses, between stages of a run."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def linear_flops(rows: int, *, d_in: int, d_out: int) -> int:
    """Return the FLOPs of `rows` vectors times a `[d_in, d_out]` matrix."""
    return 2 * rows * d_in * d_out


def attention_flops(queries: int, *, keys: int, width: int) -> int:
    """Return the FLOPs of q k^T and of the weighted sum of v; `width` is heads x head width."""
    return 4 * queries * keys * width
