"""8-bit linears: how far from plain ones, which ones, how many bytes, and what is refused."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from closeness import assert_close
from tiny_magi1 import config_document
from torch import Tensor, nn

from flowcache.errors import UserError
from flowcache.runtime.config import QuantizeName
from flowcache.runtime.memory import META, LiveBytes, weight_bytes
from flowcache.runtime.offload import plain_tensors
from flowcache.runtime.quantize import check, linears, quantize, quantize_empty, saved_bytes
from flowcache.wan import dit as wan
from flowcache.wan.rounded import RoundedDiT
from magi1 import dit as magi
from magi1.config import ModelConfig

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
TOLERANCES: dict[QuantizeName, float] = {
    "int8_weight": 0.02,
    "int8_dynamic": 0.03,
    "fp8_weight": 0.05,
}
"""Mode -> largest relative error of the velocity of a tiny random model."""
AMPLIFIED = {"magi1": 2.5}
"""Model -> how much more: what a branch of MAGI-1 adds is small before it is normed."""


@dataclass(frozen=True)
class Tiny:
    """A tiny random transformer, and what is quantised of it."""

    network: nn.Module
    parts: list[nn.Module]
    velocity: Callable[..., Tensor]


def wan_of(dit: wan.DiT) -> Tiny:
    """Return a Wan transformer and its velocity for `num_frames` latent frames."""
    draw, config = torch.Generator().manual_seed(1), dit.config
    x = torch.randn(1, 16, 3, 4, 6, generator=draw)
    text = torch.randn(1, config.text_len, config.text_dim, generator=draw)
    t = torch.tensor([[900.0, 500.0, 100.0]])

    def velocity(num_frames: int = 3) -> Tensor:
        return dit(x[:, :, :num_frames], t[:, :num_frames], text)

    return Tiny(dit, list(dit.blocks), velocity)


def magi_of(dtype: torch.dtype) -> Tiny:
    """Return a MAGI-1 transformer and its velocity for `num_frames` chunks of a latent each."""
    torch.manual_seed(0)
    dit = magi.DiT(ModelConfig(**config_document()["model_config"]))
    magi.set_precision(dit, dtype)
    x, text = torch.randn(1, 4, 3, 4, 6), torch.randn(1, 5, 12)
    t = torch.tensor([[0.1, 0.5, 0.9]])

    def velocity(num_frames: int = 3) -> Tensor:
        return dit(x[:, :, :num_frames], t[:, :num_frames], text)

    return Tiny(dit, magi.quantised_parts(dit.videodit_blocks.layers), velocity)


@pytest.fixture
def tiny(make_dit: Callable[..., wan.DiT]) -> Callable[..., Tiny]:
    """Return what makes a transformer by its name, without gradients."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> Tiny:
        if name == "magi1":
            made = magi_of(dtype)
        elif name == "wan":
            made = wan_of(make_dit().to(dtype))
        else:
            plain = make_dit()
            rounded = RoundedDiT(plain.config)
            rounded.load_state_dict(plain.state_dict())
            made = wan_of(rounded.to(dtype))
        made.network.eval().requires_grad_(False)
        return made

    return make


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["wan", "rounded", "magi1"])
@pytest.mark.parametrize("mode", TOLERANCES)
def test_a_quantised_model_is_near_the_plain_one(
    tiny: Callable[..., Tiny], mode: QuantizeName, name: str, dtype: torch.dtype
):
    plain, made = tiny(name, dtype), tiny(name, dtype)
    quantize(made.network, made.parts, mode, device=CPU)
    tolerance = TOLERANCES[mode] * AMPLIFIED.get(name, 1)
    assert 0 < relative_error(made.velocity(), plain.velocity()) < tolerance


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("name", ["wan", "magi1"])
def test_8_bit_floating_point_weights_are_rounded_row_by_row(tiny: Callable[..., Tiny], name: str):
    emulated, made = tiny(name), tiny(name)
    quantize(made.network, made.parts, "fp8_weight", device=CPU)
    for layer in linears(emulated.parts):
        scale = layer.weight.abs().amax(dim=1, keepdim=True) / 448  # largest value of the format
        rounded = (layer.weight / scale).to(torch.float8_e4m3fn)
        layer.weight.data = rounded.float() * scale
    assert_close(made.velocity(), emulated.velocity(), ulps=64)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("mode", TOLERANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["wan", "magi1"])
def test_the_parts_linears_and_nothing_else_take_a_byte_per_weight(
    tiny: Callable[..., Tiny], name: str, dtype: torch.dtype, mode: QuantizeName
):
    made = tiny(name, dtype)
    planned = weight_bytes(made.network) - saved_bytes(made.parts, mode, dtype=dtype)
    own = {id(layer) for layer in linears(made.parts)}
    quantize(made.network, made.parts, mode, device=CPU)
    held = 0
    for module in made.network.modules():
        for key, parameter in module.named_parameters(recurse=False):
            stored = list(plain_tensors(parameter.data))
            held += sum(tensor.nbytes for tensor in stored)
            if id(module) in own and key == "weight":
                assert stored[0].nbytes == parameter.numel()
            else:
                assert type(parameter.data) is Tensor
    assert held == planned < weight_bytes(made.network)


def test_gates_stay_as_they_are():
    names = {
        name
        for name, module in magi.DiT(ModelConfig(**config_document()["model_config"]))
        .videodit_blocks.layers[0]
        .named_modules()
        if isinstance(module, nn.Linear)
    }
    made = magi_of(torch.float32)
    found = {id(layer) for layer in linears(made.parts)}
    left = {name for name, module in made.network.named_modules() if id(module) in found}
    first = {name.removeprefix("videodit_blocks.layers.0.") for name in left if ".0." in name}
    assert names - first == {"ada_modulate_layer.proj.0"}


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("mode", [*TOLERANCES, "fp8_dynamic"])
def test_an_empty_layer_is_traced_with_what_its_product_holds(mode: QuantizeName):
    """A weight that is widened, or activations in 8 bits and sums in 32, are held for a moment."""

    def peak(quantised: QuantizeName | None) -> int:
        with META:
            layer = nn.Sequential(nn.Linear(1024, 64, bias=False)).to(torch.bfloat16)
        if quantised is not None:
            quantize_empty(layer, [layer], quantised)
        x = torch.empty(32, 1024, dtype=torch.bfloat16, device=META)
        with torch.no_grad(), LiveBytes() as live:
            layer(x)
            return live.peak

    plain, widened = peak(None), 1024 * 64 * 2
    assert plain == 32 * 64 * 2
    if mode.endswith("_weight"):
        assert plain + widened <= peak(mode) <= 5 * (plain + widened)
    else:
        assert peak(mode) >= 32 * 1024 * (1 + 4)


@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["wan", "magi1"])
def test_compiled_blocks_with_8_bit_weights_equal_plain_ones(tiny: Callable[..., Tiny], name: str):
    made = tiny(name)
    quantize(made.network, made.parts, "int8_weight", device=CPU)
    plain = made.velocity()
    torch.compiler.reset()
    made.network.parts = (wan if name == "wan" else magi).compiled_parts()
    made.velocity(num_frames=2)
    # another length must not compile again
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(made.velocity(), plain, ulps=128)


def sized(**sizes: int) -> list[nn.Module]:
    """Return the blocks of an empty Wan transformer."""
    return list(wan.empty_dit(wan.DiTConfig(num_layers=1, **sizes), torch.bfloat16).blocks)


def test_8_bit_products_are_refused_where_there_are_none(monkeypatch: pytest.MonkeyPatch):
    parts, cuda = sized(dim=1536, ffn_dim=8960), torch.device("cuda")
    with pytest.raises(UserError, match=r"fp8_dynamic needs an NVIDIA GPU.*which cpu is not"):
        check("fp8_dynamic", parts, device=CPU, dtype=torch.bfloat16)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    with pytest.raises(UserError, match="needs dtype=bfloat16, not float32"):
        check("fp8_dynamic", parts, device=cuda, dtype=torch.float32)
    check("fp8_dynamic", parts, device=cuda, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("mode", "ffn_dim", "message"),
    [
        ("fp8_dynamic", 48, "widths that divide by 16, not 24 as of this model"),
        ("int8_dynamic", 44, "widths that divide by 8, not 44 as of this model"),
    ],
)
def test_widths_that_products_cannot_take_are_refused(
    monkeypatch: pytest.MonkeyPatch, mode: QuantizeName, ffn_dim: int, message: str
):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    parts = sized(dim=24, ffn_dim=ffn_dim, num_heads=2)
    with pytest.raises(UserError, match=f"{message}: use quantize=fp8_weight"):
        check(mode, parts, device=torch.device("cuda"), dtype=torch.bfloat16)
    check("fp8_weight", parts, device=CPU, dtype=torch.bfloat16)
