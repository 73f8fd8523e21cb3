import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowcache.attention import (
    SDPA,
    AttentionShape,
    Kernel,
    Seconds,
    available_kernels,
    choose_kernel,
    choose_kernels,
    describe_choice,
)
from flowcache.errors import UserError

pytestmark = pytest.mark.numeric

CUDA = torch.device("cuda")
"""Only named: nothing is put there."""
HALF = torch.bfloat16

FAKE_KERNEL = """
def flash_attn_func(q, k, v):
    return {result}
"""


def by_definition(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor) -> Tensor:
    """Attend with query head j reading key/value head j // (H // G)."""
    group = q_BQHD.shape[2] // k_BKGD.shape[2]
    out = torch.zeros_like(q_BQHD)
    for head in range(q_BQHD.shape[2]):
        q, k, v = q_BQHD[:, :, head], k_BKGD[:, :, head // group], v_BKGD[:, :, head // group]
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        out[:, :, head] = weights @ v
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_equals_its_definition_with_shared_key_heads(kv_heads: int):
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 6, 8, generator=draw)
    k, v = torch.randn(2, 2, 7, kv_heads, 8, generator=draw)
    assert_close(SDPA(q, k, v), by_definition(q, k, v), ulps=64)


def test_the_output_keeps_the_dtype_of_the_queries():
    x = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16)
    assert SDPA(x, x, x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("cuda", torch.float32),
        pytest.param(
            *("cuda", torch.bfloat16),
            marks=pytest.mark.skipif(
                any(importlib.util.find_spec(n) for n in ("flash_attn", "flash_attn_interface")),
                reason="flash-attn is installed",
            ),
        ),
    ],
)
def test_torch_serves_where_flash_attn_cannot(device: str, dtype: torch.dtype):
    assert choose_kernel(torch.device(device), dtype=dtype) is SDPA


@pytest.mark.parametrize(
    ("module", "result", "name"),
    [
        ("flash_attn", "q + k + v", "flash-attn 2"),
        ("flash_attn_interface", "q + k + v", "flash-attn 3"),
        ("flash_attn_interface", "(q + k + v, None)", "flash-attn 3"),
    ],
)
def test_flash_attn_is_chosen_where_it_is_importable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, result: str, name: str
):
    (tmp_path / f"{module}.py").write_text(FAKE_KERNEL.format(result=result))
    monkeypatch.syspath_prepend(tmp_path)
    # drops the stand-in again at the end
    monkeypatch.delitem(importlib.import_module("sys").modules, module, raising=False)
    kernel = choose_kernel(CUDA, dtype=torch.bfloat16)
    assert kernel.name == name
    x = torch.ones(1, 2, 1, 4)
    assert torch.equal(kernel(x, x, x), 3 * x)


SHAPE = AttentionShape(num_queries=64, num_keys=256, num_heads=6, kv_heads=2, head_width=16)


def timed(**milliseconds: float) -> Seconds:
    """Stand in for the probe: the kernels not named can't do the shape."""
    names = {kernel.name: key for key, kernel in available_kernels(CUDA, dtype=HALF).items()}

    def seconds(kernel: Kernel, *_: object) -> float:
        return milliseconds.get(names[kernel.name], math.inf) / 1000

    return seconds


def test_the_fastest_kernel_of_the_probe_is_taken_and_all_times_are_told():
    seconds = timed(cudnn=2.0, flash=1.5, efficient=9.0)
    kernel = choose_kernel(CUDA, dtype=HALF, shape=SHAPE, seconds=seconds)
    assert kernel.name == "torch SDPA, flash"
    assert [name.split()[-1] for name, _ in kernel.probed] == ["flash", "cudnn", "efficient"]
    assert describe_choice(kernel, SDPA) == (
        "attention     torch SDPA, flash (probed: torch SDPA, flash 1.5 ms, torch SDPA, cudnn 2 ms,"
        " torch SDPA, efficient 9 ms); to the prompt torch scaled_dot_product_attention"
    )


def test_attention_to_the_prompt_is_probed_at_its_own_shape():
    def seconds(kernel: Kernel, shape: AttentionShape, *_: object) -> float:
        if not kernel.name.endswith(("flash", "cudnn")):
            return math.inf
        is_flash = kernel.name.endswith("flash")
        return 1.0 if is_flash == (shape.num_keys > 10) else 2.0

    own, cross = choose_kernels(CUDA, dtype=HALF, shape=SHAPE, num_text=7, seconds=seconds)
    assert own.name == "torch SDPA, flash"
    assert cross.name == "torch SDPA, cudnn"
    assert dict(own.probed)["torch SDPA, cudnn"] == 2.0
    assert dict(cross.probed)["torch SDPA, flash"] == 2.0


@pytest.mark.parametrize(("num_keys", "name"), [(128, "cudnn"), (129, "flash")])
def test_self_attention_is_probed_for_few_and_for_many_keys(
    num_keys: int, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Between 64 keys and 256 the border is their geometric mean."""

    def seconds(kernel: Kernel, shape: AttentionShape, *_: object) -> float:
        faster = "cudnn" if shape.num_keys == 64 else "flash"
        return 1.0 if kernel.name.endswith(faster) else 2.0

    ran: list[str] = []
    monkeypatch.setattr(Kernel, "__call__", lambda self, *_: ran.append(self.name))
    own, _ = choose_kernels(CUDA, dtype=HALF, shape=SHAPE, num_text=7, seconds=seconds)
    assert own.name == "torch SDPA, cudnn up to 128 keys, torch SDPA, flash above"
    own.run(torch.zeros(1), torch.zeros(1, num_keys), torch.zeros(1))
    assert ran == [f"torch SDPA, {name}"]


def test_a_coarse_kernel_is_taken_where_it_is_asked_for_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "sageattention.py").write_text(
        "def sageattn(q, k, v, tensor_layout):\n    return {'NHD': 2}[tensor_layout] * q\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.import_module("sys").modules, "sageattention", raising=False)
    assert "sage" in available_kernels(CUDA, dtype=HALF)
    assert "sage" not in available_kernels(CUDA, dtype=torch.float32)

    def seconds(kernel: Kernel, *_: object) -> float:
        return 1.0 if kernel.name == "SageAttention" else 2.0

    auto = choose_kernel(CUDA, dtype=HALF, shape=SHAPE, seconds=seconds)
    assert auto.name != "SageAttention"
    asked = choose_kernel(CUDA, dtype=HALF, shape=SHAPE, wanted="sage", seconds=seconds)
    assert asked.name == "SageAttention"
    x = torch.ones(1, 2, 1, 4)
    assert torch.equal(asked(x, x, x), 2 * x)


def test_without_cuda_both_attentions_are_the_same_function():
    own, cross = choose_kernels(torch.device("cpu"), dtype=torch.float32, shape=SHAPE, num_text=7)
    assert own is cross is SDPA


@pytest.mark.parametrize(("sparing", "name"), [({"flash": 5.0}, "flash"), ({}, "math")])
def test_the_kernel_that_keeps_all_products_in_memory_is_the_last_resort(
    sparing: dict[str, float], name: str
):
    kernel = choose_kernel(CUDA, dtype=HALF, shape=SHAPE, seconds=timed(math=1.0, **sparing))
    assert [name for name, _ in kernel.probed] == [f"torch SDPA, {name}"]


def test_a_wanted_kernel_is_taken_and_no_other_is_tried():
    seconds = timed(efficient=9.0, flash=1.0)
    kernel = choose_kernel(CUDA, dtype=HALF, shape=SHAPE, wanted="efficient", seconds=seconds)
    assert kernel.probed == (("torch SDPA, efficient", 0.009),)


def test_nothing_is_tried_where_there_is_no_choice():
    def never(*_: object) -> float:
        raise AssertionError("no probe is needed")

    assert choose_kernel(torch.device("cpu"), dtype=HALF, shape=SHAPE, seconds=never) is SDPA
    kernel = choose_kernel(CUDA, dtype=HALF, shape=SHAPE, wanted="torch", seconds=never)
    assert kernel is SDPA


@pytest.mark.parametrize(
    ("device", "options", "words"),
    [
        ("cpu", {"wanted": "cudnn"}, r"attention_kernel=cudnn is not available on cpu .*torch$"),
        ("cuda", {"shape": SHAPE}, r"64 queries and 256 keys of width 16.*=torch"),
        (
            *("cuda", {"shape": SHAPE, "wanted": "cudnn"}),
            r"attention_kernel=cudnn is none that .* can do 64 .*=auto",
        ),
    ],
)
def test_a_kernel_that_cannot_run_here_or_do_the_shape_is_refused(
    device: str, options: dict[str, Any], words: str
):
    with pytest.raises(UserError, match=words):
        choose_kernel(torch.device(device), dtype=HALF, seconds=timed(), **options)


def test_the_math_backend_of_torch_gives_what_the_definition_gives():
    kernel = available_kernels(CUDA, dtype=HALF)["math"]
    q, k, v = SHAPE.tensors(device=torch.device("cpu"), dtype=torch.float32)
    assert_close(kernel(q, k, v), by_definition(q, k, v), ulps=64)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_a_backend_of_torch_gives_the_shape_of_the_queries(name: str):
    kernel = available_kernels(CUDA, dtype=HALF)[name]
    q, k, v = SHAPE.tensors(device=torch.device("meta"), dtype=HALF)
    out = kernel(q, k, v)
    assert out.shape == q.shape
    assert out.dtype == HALF


def test_a_kernel_leaves_the_choice_of_other_threads_alone():
    kernel = available_kernels(CUDA, dtype=HALF)["math"]
    seen: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(torch.backends.cuda.flash_sdp_enabled())
            return func(*args, **(kwargs or {}))

    with Watch():
        kernel(*SHAPE.tensors(device=torch.device("cpu"), dtype=torch.float32))
    assert seen
    assert all(seen)


@pytest.mark.parametrize("problem", ["raise ImportError('undefined symbol: x')", "x = 1"])
def test_a_flash_attn_that_does_not_work_here_is_passed_over_with_a_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    problem: str,
):
    (tmp_path / "flash_attn.py").write_text(problem)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.import_module("sys").modules, "flash_attn", raising=False)
    assert "flash_attn_2" not in available_kernels(CUDA, dtype=HALF)
    assert "flash-attn 2 is installed but can't be used" in caplog.text


@pytest.mark.gpu
def test_the_probe_times_real_kernels():
    kernel = choose_kernel(CUDA, dtype=torch.bfloat16, shape=SHAPE)
    assert kernel.probed
    assert kernel.name == kernel.probed[0][0]
    q, k, v = SHAPE.tensors(device=CUDA, dtype=torch.bfloat16)
    assert_close(kernel(q, k, v), SDPA(q, k, v), ulps=4)  # of bfloat16
