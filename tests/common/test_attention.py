import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowcache.attention import SDPA, choose_kernel

CUDA = torch.device("cuda")
"""Only named: nothing is put there."""

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
    torch.testing.assert_close(SDPA(q, k, v), by_definition(q, k, v), rtol=0, atol=1e-6)


def test_one_key_gives_its_value_whatever_the_query():
    v = torch.tensor([[[[3.0, -4.0]]]])
    assert torch.equal(SDPA(torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 2), v), v)


def test_the_output_keeps_the_dtype_of_the_queries():
    x = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16)
    assert SDPA(x, x, x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_is_served_by_torch(dtype: torch.dtype):
    assert choose_kernel(torch.device("cpu"), dtype=dtype) is SDPA


def test_float32_on_cuda_is_served_by_torch():
    assert choose_kernel(CUDA, dtype=torch.float32) is SDPA


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_interface")),
    reason="flash-attn is installed",
)
def test_half_precision_on_cuda_is_served_by_torch_without_flash_attn():
    assert choose_kernel(CUDA, dtype=torch.bfloat16) is SDPA


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
