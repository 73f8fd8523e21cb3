from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_close, num_ulps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flowcache.attention import SDPA
from flowcache.runtime import ops
from flowcache.runtime.ops import (
    HAS_WIDE_PRODUCT,
    attention_flops,
    linear_flops,
    linear_in_float32,
    on_device,
    seeded_noise,
    set_allocator,
    set_float32_precision,
)

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_layer_of_coarse_weights_computes_in_float32(has_bias: bool):
    torch.manual_seed(0)
    layer = nn.Linear(64, 8, bias=has_bias).bfloat16()
    x = torch.randn(5, 64).bfloat16()
    found = linear_in_float32(layer, x)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if has_bias else 0)
    assert found.dtype == torch.float32
    assert_close(found, exact, ulps=16)
    # a layer that computes in its weights' dtype is tens of thousands of times less exact
    assert num_ulps(layer(x), exact, dtype=torch.float32) > 10_000
    assert layer.weight.dtype == torch.bfloat16


class Watch(TorchDispatchMode):
    """Notes the operations that are called while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("dtype", "is_narrow"), [(torch.bfloat16, True), (torch.float32, False)])
def test_on_cuda_16_bit_numbers_are_not_made_wider_first(
    has_bias: bool, dtype: torch.dtype, is_narrow: bool
):
    # tensors without values: no device is needed
    with FakeTensorMode(), torch.no_grad(), Watch() as watch:
        layer = nn.Linear(64, 8, bias=has_bias, device="meta")
        layer.weight = nn.Parameter(torch.empty(8, 64, device="cuda", dtype=dtype))
        if has_bias:
            layer.bias = nn.Parameter(torch.empty(8, device="cuda", dtype=dtype))
        x = torch.empty(2, 5, 64, device="cuda", dtype=dtype)
        watch.made.clear()
        found = linear_in_float32(layer, x)
    assert found.shape == (2, 5, 8)
    assert found.dtype == torch.float32
    assert ("aten.mm.dtype" in watch.made) == (is_narrow and HAS_WIDE_PRODUCT)
    is_widened = has_bias or not HAS_WIDE_PRODUCT  # the bias alone, or all
    assert ("aten._to_copy.default" in watch.made) == (is_narrow and is_widened)


@pytest.mark.gpu
def test_16_bit_products_on_cuda_are_those_of_float32():
    torch.manual_seed(0)
    layer = nn.Linear(512, 256).bfloat16().cuda()
    x = torch.randn(3, 40, 512, device="cuda").bfloat16()
    exact = functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert_close(linear_in_float32(layer, x), exact, ulps=64)


@pytest.mark.parametrize(
    ("dtype", "is_tf32"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)]
)
def test_a_run_in_float32_has_no_shorter_products_and_no_run_has_in_linear_layers(
    dtype: torch.dtype, is_tf32: bool
):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32, matmul.allow_tf32 = not is_tf32, True
        set_float32_precision(dtype)
        assert cudnn.allow_tf32 is is_tf32
        assert matmul.allow_tf32 is False
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, ["expandable_segments:True"]),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, []),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, []),
    ],
)
@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("2.8.0+cu128", "_cuda_cudaCachingAllocator_set_allocator_settings"),
        ("2.13.0+cu130", "_accelerator_setAllocatorSettings"),
    ],
)
def test_segments_of_gpu_memory_grow_unless_the_user_chose_something_else(
    variables: dict[str, str],
    asked: list[str],
    version: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
):
    told: list[str] = []
    for variable in ops.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch, "__version__", version)
    fake = SimpleNamespace(import_module=lambda _: SimpleNamespace(**{name: told.append}))
    monkeypatch.setattr(ops, "importlib", fake)
    set_allocator()
    assert told == asked


def test_the_pinned_torch_knows_the_allocator_setting():
    assert callable(torch._C._accelerator_setAllocatorSettings)


# Noise --------------------------------------------------------------------------------------------


"""The one source of randomness."""


def test_a_seeded_draw_repeats():
    first, second = (seeded_noise(7, device=torch.device("cpu")) for _ in range(2))
    a, b = first((2, 3), torch.float32), first((2, 3), torch.float32)
    assert torch.equal(a, second((2, 3), torch.float32))
    assert not torch.equal(a, b)


# Transfer -----------------------------------------------------------------------------------------


def test_numbers_become_a_tensor_of_the_dtype():
    made = on_device([1, 2, 999], dtype=torch.float32, device=torch.device("cpu"))
    assert torch.equal(made, torch.tensor([1.0, 2.0, 999.0]))


@pytest.mark.gpu
def test_nothing_waits_for_a_copy_to_cuda():
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = on_device([0.5, 0.25], dtype=torch.float32, device=torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made.tolist() == [0.5, 0.25]


# Flops --------------------------------------------------------------------------------------------


def test_two_operations_are_counted_per_multiply_add():
    assert linear_flops(3, d_in=5, d_out=7) == 2 * 3 * 5 * 7
    assert attention_flops(3, keys=4, width=6) == 2 * (3 * 4 * 6) + 2 * (3 * 4 * 6)


@pytest.mark.parametrize("rows", [1, 17])
def test_linear_equals_torchs_counter(rows: int):
    layer = torch.nn.Linear(11, 13)
    with FlopCounterMode(display=False) as counter:
        layer(torch.ones(rows, 11))
    assert linear_flops(rows, d_in=11, d_out=13) == counter.get_total_flops()


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 9), (1, 12)])
def test_attention_equals_torchs_counter(queries: int, keys: int):
    q, k, v = torch.randn(1, queries, 3, 8), torch.randn(1, keys, 3, 8), torch.randn(1, keys, 3, 8)
    # torch does not count its fused CPU kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        SDPA(q, k, v)
    assert attention_flops(queries, keys=keys, width=3 * 8) == counter.get_total_flops()


@torch.no_grad()
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("rows", [3, 64])
def test_a_large_product_on_a_cpu_is_that_of_pytorch(rows: int, gelu: Any):
    torch.manual_seed(0)
    layer = ops.Linear(128, 256, gelu=gelu)
    x = torch.randn(2, rows, 128)
    wanted = functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    if gelu is not None:
        wanted = functional.gelu(wanted, approximate=gelu)
    with FlopCounterMode(display=False) as counter:
        found = layer(x)
    assert_close(found, wanted, ulps=16)
    assert counter.get_total_flops() == linear_flops(2 * rows, d_in=128, d_out=256)


@pytest.mark.parametrize(
    ("changed", "is_own"),
    [
        pytest.param({}, True, id="float32"),
        pytest.param({"dtype": torch.bfloat16}, False, id="16 bits"),
        pytest.param({"requires_grad": True}, False, id="gradients"),
        pytest.param({"device": "meta"}, False, id="no values"),
    ],
)
def test_only_plain_float32_products_take_the_other_library(changed: dict[str, Any], is_own: bool):
    options = {"dtype": torch.float32, "device": "cpu", **changed}
    needs_grad = options.pop("requires_grad", False)
    x, weight = torch.zeros(64, 256, **options), torch.zeros(128, 256, **options)
    with torch.set_grad_enabled(needs_grad), Watch() as watch:
        ops.linear(x, weight)
        ops.conv3d(
            torch.zeros(1, 2, 3, 4, 4, **options),
            torch.zeros(2, 2, 3, 3, 3, **options),
            None,
            stride=(1, 1, 1),
            padding=(0, 1, 1),
        )
    found = [name for name in watch.made if "linear_pointwise" in name or "mkldnn_conv" in name]
    assert len(found) == (2 if is_own and torch.backends.mkldnn.is_available() else 0)


def test_memory_that_a_loaded_model_holds_counts_as_usable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 50)
    assert ops.usable_bytes(torch.device("cuda")) == 70
