import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowcache.attention import SDPA
from flowcache.runtime.flops import attention, linear


def test_two_operations_are_counted_per_multiply_add():
    assert linear(3, d_in=5, d_out=7) == 2 * 3 * 5 * 7
    assert attention(3, keys=4, width=6) == 2 * (3 * 4 * 6) + 2 * (3 * 4 * 6)


@pytest.mark.parametrize("rows", [1, 17])
def test_linear_equals_torchs_counter(rows: int):
    layer = torch.nn.Linear(11, 13)
    with FlopCounterMode(display=False) as counter:
        layer(torch.ones(rows, 11))
    assert linear(rows, d_in=11, d_out=13) == counter.get_total_flops()


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 9), (1, 12)])
def test_attention_equals_torchs_counter(queries: int, keys: int):
    q, k, v = torch.randn(1, queries, 3, 8), torch.randn(1, keys, 3, 8), torch.randn(1, keys, 3, 8)
    # torch does not count its fused CPU kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        SDPA(q, k, v)
    assert attention(queries, keys=keys, width=3 * 8) == counter.get_total_flops()
