"""Parts of a model that work in float32 whatever their weights are stored in."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

# torch 2.8 has no shape rule for a product with `out_dtype`: it can't be compiled. 2.11 has one.
HAS_WIDE_PRODUCT = torch.__version__ >= "2.11"


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
