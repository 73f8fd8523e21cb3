"""Blocks that add what they added in the chunk before: what is compared, and when it is reused."""

import math

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.block_reuse import BlockReuse, looked_at

pytestmark = pytest.mark.numeric

SIZE = (1, 1, 1)


def turned(cosine: float, *, length: float = 1.0) -> Tensor:
    """Return a token of some length at some angle to (1, 0)."""
    return torch.tensor([[cosine, math.sqrt(1 - cosine**2)]]) * length


def asked(blocks: BlockReuse, x: Tensor, *, block: int = 1, step: int = 0) -> bool:
    """Send a token through a block that adds one; return whether it was computed."""
    calls = list[bool]()

    def compute() -> Tensor:
        calls.append(True)
        return x + 1

    made = blocks.through(x, step=step, block=block, size=SIZE, compute=compute)
    assert_close(made, x + 1, ulps=8)
    return bool(calls)


def test_a_grid_of_tokens_and_the_mean_are_looked_at():
    """Of 3 frames, 1 row and 4 columns: the outer frames, every column, each four times."""
    x = torch.arange(12.0).unsqueeze(1)
    rows = [[column + frame for column in (0, 1, 2, 3)] * 4 for frame in (0, 8)]
    expected = [*rows[0], *rows[1], 5.5]
    assert looked_at(x, size=(3, 1, 4)).flatten().tolist() == expected


def test_an_input_alike_is_reused_and_the_bar_follows_the_likeness():
    """The docstring's numbers: 0.999, then 0.98 with a bar of 0.979, then one of 0.9733."""
    blocks = BlockReuse()
    assert asked(blocks, turned(1.0))
    assert not asked(blocks, turned(0.999))
    assert not asked(blocks, turned(0.98))
    assert asked(blocks, turned(0.973))
    blocks = BlockReuse()
    for cosine in (1.0, 0.999, 0.98):
        asked(blocks, turned(cosine))
    assert not asked(blocks, turned(0.9735))


def test_steps_and_blocks_are_kept_apart_and_the_first_block_is_computed():
    blocks = BlockReuse()
    assert asked(blocks, turned(1.0))
    assert asked(blocks, turned(1.0), step=1)
    assert asked(blocks, turned(1.0), block=2)
    assert [asked(blocks, turned(1.0), block=0) for _ in range(2)] == [True, True]
    assert not asked(blocks, turned(1.0))


def test_a_token_that_grew_threefold_is_computed():
    blocks = BlockReuse()
    asked(blocks, turned(1.0))
    assert not asked(blocks, turned(1.0, length=2.9))
    assert asked(blocks, turned(1.0, length=3.1))


def test_a_chunk_of_another_size_is_computed():
    blocks = BlockReuse()
    asked(blocks, turned(1.0))
    two = turned(1.0).expand(2, -1)
    made = blocks.through(two, step=0, block=1, size=(2, 1, 1), compute=lambda: two + 1)
    assert torch.equal(made, two + 1)
    assert blocks.num_reused == 0
