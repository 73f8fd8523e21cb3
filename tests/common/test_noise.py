"""The one source of randomness."""

import torch

from flowcache.runtime.noise import seeded_noise


def test_a_seeded_draw_repeats():
    first, second = (seeded_noise(7, device=torch.device("cpu")) for _ in range(2))
    a, b = first((2, 3), torch.float32), first((2, 3), torch.float32)
    assert torch.equal(a, second((2, 3), torch.float32))
    assert not torch.equal(a, b)
