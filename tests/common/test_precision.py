import pytest
import torch
from torch import nn

from flowcache.precision import linear_in_float32


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_layer_of_coarse_weights_computes_in_float32(has_bias: bool):
    torch.manual_seed(0)
    layer = nn.Linear(64, 8, bias=has_bias).bfloat16()
    x = torch.randn(5, 64).bfloat16()
    found = linear_in_float32(layer, x)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if has_bias else 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    # a layer that computes in its weights' dtype is a thousand times less exact
    assert (layer(x).double() - exact).abs().max() > 1e-3
    assert layer.weight.dtype == torch.bfloat16
