import pytest
import torch

from flowcache.runtime.transfer import on_device


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
