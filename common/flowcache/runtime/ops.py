"""Small numeric tools: seeded noise, copies without waiting, float32, GPU memory, FLOP formulas.

On CUDA a float32 matrix product is one; a float32 convolution is TF32 by default, whose factors
have 10 bits of mantissa. The rule here: a run in float32 has no TF32, so that it can be compared
with a reference. In a run in 16 bits the float32 VAE and patch convolutions are TF32, as in the
released code: finer than the 7 bits of bfloat16 around them, and about six times faster.

FLOPs are those of the matrix products; a multiply-add counts 2. Norms, activations and rotations
are left out, as in the published figures: at the real sizes they are below 0.1 %.
"""

import importlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

Draw = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""`(shape, dtype) -> standard normal noise` on the device of the run."""
ALLOCATOR = "expandable_segments:True"
"""Segments of GPU memory that grow: no unusable gaps between those of encoder, blocks, decoder."""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# torch 2.8 has no shape rule for a product with `out_dtype`: it can't be compiled. 2.11 has one.
HAS_WIDE_PRODUCT = torch.__version__ >= "2.11"
Gelu = Literal["none", "tanh"]
"""Exact, or by tanh, as PyTorch calls them."""
ONEDNN_PRODUCTS = 2**20
"""Multiplications from which oneDNN saves more than its start takes (10 microseconds)."""


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


class Linear(nn.Linear):
    """A linear layer, and GELU behind it where asked; see `linear`."""

    def __init__(
        self, d_in: int, d_out: int, *, bias: bool = True, gelu: Gelu | None = None
    ) -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.gelu: Gelu | None = gelu

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return linear(input, self.weight, self.bias, gelu=self.gelu)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: Gelu | None = None
) -> Tensor:
    """Apply a linear layer and, where asked, GELU; in float32 on a CPU with oneDNN.

    PyTorch itself takes MKL, which on processors that are not Intel's does without AVX-512: half
    the speed. oneDNN also applies GELU while it writes the product.
    """
    is_large = x.numel() // x.shape[-1] * weight.numel() >= ONEDNN_PRODUCTS
    if is_large and _has_onednn(x, weight):
        kind = "none" if gelu is None else "gelu"
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, kind, [], gelu or "")
    y = functional.linear(x, weight, bias)
    return y if gelu is None else functional.gelu(y, approximate=gelu)


def linear_in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer to `x` in float32 and return float32.

    On CUDA 16-bit numbers are multiplied as they are and summed in float32: that is as exact, for
    such a product is a float32 number, and ten times faster than first making them wider.
    """
    assert isinstance(layer, nn.Linear)
    bias = cast("Tensor | None", layer.bias)
    if is_traceable_wrapper_subclass(layer.weight):  # 8-bit weights: a product of their own, in
        return functional.linear(x, layer.weight, bias).float()  # the type of x
    wide_bias = None if bias is None else bias.float()
    is_half = x.dtype == layer.weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if not (HAS_WIDE_PRODUCT and x.is_cuda and is_half and x.ndim > 1):
        return linear(x.float(), layer.weight.float(), wide_bias)
    y = torch.mm(x.flatten(0, -2), layer.weight.t(), out_dtype=torch.float32)
    y = y.unflatten(0, x.shape[:-1])
    return y if wide_bias is None else y + wide_bias


def conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Convolve `[B, C, T, h, w]`, on a CPU with oneDNN.

    PyTorch itself asks a rule made for pictures: it looks at the product of the first four axes,
    so that a single video of few channels gets a kernel several times slower.
    """
    if _has_onednn(x, weight):
        ones = [1] * len(stride)
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, ones, 1)
    return functional.conv3d(x, weight, bias, tuple(stride), tuple(padding))


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` that calls `conv3d`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        padding = cast("tuple[int, ...]", self.padding)
        return conv3d(input, self.weight, self.bias, stride=self.stride, padding=padding)


def _has_onednn(x: Tensor, weight: Tensor) -> bool:
    """Tell whether oneDNN can multiply plain float32 tensors of a CPU, without gradients."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        # subclasses (8-bit weights, tensors without values) have ways of their own
        and {type(x), type(weight)} <= {Tensor, nn.Parameter}
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _count_linear(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Tell PyTorch's counter what `linear` costs."""
    return linear_flops(math.prod(x_shape[:-1]), d_in=weight_shape[1], d_out=weight_shape[0])


@register_flop_formula(torch.ops.aten.mkldnn_convolution)
def _count_conv3d(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *_: Any,
    out_shape: Sequence[int],
    **__: Any,
) -> int:
    """Tell PyTorch's counter what `conv3d` costs."""
    return conv_flop_count(list(x_shape), list(weight_shape), list(out_shape))


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


def usable_bytes(device: torch.device) -> int:
    """Return what of a GPU's memory this process may use: what is free, and what it holds."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)  # of a model that stays loaded, for example


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
