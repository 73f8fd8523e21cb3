"""8-bit linears: how far from plain ones, which ones, how many bytes, and what is refused."""

import math
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn

from flowcache.errors import UserError
from flowcache.runtime.config import QuantizeName
from flowcache.runtime.metrics import psnr
from flowcache.runtime.video import read_video
from flowcache.wan.dit import DiT, DiTConfig, compiled_parts
from flowcache.wan.quantize import check, linears, quantize, weight_bytes

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
TOLERANCES: dict[QuantizeName, float] = {
    "int8_weight": 0.02,
    "int8_dynamic": 0.03,
    "fp8_weight": 0.05,
}
"""Mode -> largest relative error of the velocity of a tiny random model."""


def velocity(dit: DiT, *, num_frames: int = 3) -> Tensor:
    draw, config = torch.Generator().manual_seed(1), dit.config
    x = torch.randn(1, 16, num_frames, 4, 6, generator=draw)
    text = torch.randn(1, config.text_len, config.text_dim, generator=draw)
    return dit(x, torch.tensor([[900.0, 500.0, 100.0]])[:, :num_frames], text)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("mode", TOLERANCES)
def test_a_quantised_model_is_near_the_plain_one(make_dit: Callable[..., DiT], mode: QuantizeName):
    plain, dit = make_dit(), make_dit()
    quantize(dit, mode, device=CPU)
    assert 0 < relative_error(velocity(dit), velocity(plain)) < TOLERANCES[mode]


@pytest.mark.usefixtures("torchao")
def test_8_bit_floating_point_weights_are_rounded_row_by_row(make_dit: Callable[..., DiT]):
    emulated, dit = make_dit(), make_dit()
    quantize(dit, "fp8_weight", device=CPU)
    for layer in linears(emulated):
        scale = layer.weight.abs().amax(dim=1, keepdim=True) / 448  # largest value of the format
        rounded = (layer.weight / scale).to(torch.float8_e4m3fn)
        layer.weight.data = rounded.float() * scale
    assert_close(velocity(dit), velocity(emulated), ulps=64)


@pytest.mark.usefixtures("torchao")
def test_the_blocks_linears_and_nothing_else_take_a_byte_per_weight(
    make_dit: Callable[..., DiT],
):
    dit = make_dit()
    planned = weight_bytes(dit, "int8_weight", dtype=torch.float32)
    plain = weight_bytes(dit, None, dtype=torch.float32)
    quantize(dit, "int8_weight", device=CPU)
    held = 0
    for name, parameter in dit.named_parameters():
        is_linear = isinstance(dit.get_submodule(name.rpartition(".")[0]), nn.Linear)
        if name.startswith("blocks.") and is_linear and name.endswith(".weight"):
            stored: Any = parameter.data
            held += stored.qdata.nbytes + stored.scale.nbytes
            assert stored.qdata.nbytes == parameter.numel()
        else:
            assert type(parameter.data) is Tensor
            held += parameter.nbytes
    assert held == planned < plain


@pytest.mark.usefixtures("torchao")
def test_a_run_with_8_bit_weights_shows_nearly_the_same_video(make: Callable[..., Any]):
    plain, quantised = make(), make("quantize=int8_weight")
    assert quantised.report["config"]["quantize"] == "int8_weight"
    assert plain.report["config"]["quantize"] is None
    shown = [torch.from_numpy(read_video(made.path)[0]) for made in (quantised, plain)]
    assert 25 < psnr(*shown) < math.inf


@pytest.mark.usefixtures("torchao")
def test_8_bit_weights_leave_the_device_and_come_back(make: Callable[..., Any]):
    stays, moves = make("quantize=int8_weight"), make("quantize=int8_weight", "offload=true")
    assert torch.equal(*(torch.from_numpy(read_video(made.path)[0]) for made in (stays, moves)))


@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_blocks_with_8_bit_weights_equal_plain_ones(make_dit: Callable[..., DiT]):
    dit = make_dit()
    quantize(dit, "int8_weight", device=CPU)
    plain = velocity(dit)
    torch.compiler.reset()
    dit.parts = compiled_parts()
    velocity(dit, num_frames=2)
    # another length must not compile again
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(velocity(dit), plain, ulps=128)


def test_what_is_missing_is_told_in_one_line_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any]
):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"^[^\n]*needs the package torchao: pip install torchao=="):
        make("quantize=int8_weight")


def test_8_bit_products_are_refused_without_a_gpu_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
):
    sizes = DiTConfig(dim=1536, ffn_dim=8960)
    with pytest.raises(UserError, match=r"fp8_dynamic needs an NVIDIA GPU.*which cpu is not"):
        check("fp8_dynamic", sizes, device=CPU, dtype=torch.bfloat16)
    cuda = torch.device("cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    with pytest.raises(UserError, match="needs dtype=bfloat16, not float32"):
        check("fp8_dynamic", sizes, device=cuda, dtype=torch.float32)
    with pytest.raises(UserError, match="widths that divide by 16, not 24 and 48"):
        check("fp8_dynamic", DiTConfig(dim=24, ffn_dim=48), device=cuda, dtype=torch.bfloat16)
