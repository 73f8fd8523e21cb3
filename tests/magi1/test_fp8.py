"""8-bit linear layers: the reference's numbers, and the native kernel against the emulation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close

from magi1.fp8 import FP8, Fp8Linear, SmoothFp8Linear, emulated_product, native_product, quantise

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(
    ("kind", "layer_type"), [("per_tensor", Fp8Linear), ("smooth", SmoothFp8Linear)]
)
def test_a_layer_gives_the_reference_numbers(
    kind: str, layer_type: type[Fp8Linear], golden: Callable[[str], Any]
):
    want = golden("fp8_linear").under(kind)
    layer = layer_type(*reversed(want["weight"].shape[1:]))
    names = [name for name, _ in layer.named_parameters()]
    layer.load_state_dict({name: want[name] for name in names})
    assert torch.equal(layer.weight.view(torch.uint8).long(), want["weight_bits"])
    x = want["x"].to(torch.bfloat16)
    assert torch.equal(layer.quantised(x).float(), want["xq"])
    product = emulated_product(
        layer.quantised(x)[:, 0],
        layer.weight[0],
        x_scale=layer.input_scale[0],
        w_scale=layer.weight_scale[0],
    )
    assert_close(product, want["out_f32"][:, 0], ulps=16)
    # a last bit of the float32 sum may turn a rounding to bfloat16
    assert_close(layer(x), want["out_bf16"], ulps=1)


def test_values_beyond_the_range_are_clamped():
    x = torch.tensor([-1e9, 448.0, 460.0, 1.0])
    assert quantise(x, torch.ones(1)).float().tolist() == [-448.0, 448.0, 448.0, 1.0]


def test_rounding_goes_through_bfloat16():
    # 1.0634 rounds up to 1.125 in 8 bits, but first down to 1.0625 in bfloat16, then to even: 1.0
    assert quantise(torch.tensor([1.0634]), torch.ones(1)).item() == 1.0
    assert torch.tensor([1.0634]).to(FP8).item() == 1.125


def test_the_native_kernel_agrees_with_the_emulation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, generator=generator).to(FP8)
    weight = torch.randn(48, 32, generator=generator).to(FP8)
    scales = {"x_scale": torch.tensor(0.3), "w_scale": torch.tensor(0.02)}
    native = native_product(x, weight, **scales)
    emulated = emulated_product(x, weight, **scales)
    assert_close(native, emulated, ulps=1)  # of bfloat16: one rounding
