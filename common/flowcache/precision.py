"""Parts of a model that work in float32 whatever their weights are stored in."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional


def linear_in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer to `x` in float32 and return float32."""
    assert isinstance(layer, nn.Linear)
    bias = cast("Tensor | None", layer.bias)
    return functional.linear(
        x.float(), layer.weight.float(), None if bias is None else bias.float()
    )
