"""Closed-form FLOPs against the published figures."""

import pytest

from magi1.config import ModelConfig
from magi1.dit import published_block_flops, published_clip_flops
from magi1.schedule import Clip, Clock

CHUNK_TOKENS = 6 * 45 * 45
"""Of a chunk at 720 x 720."""


@pytest.mark.parametrize(
    ("num_frames", "reaches", "nearly_clean_pass", "pflops"),
    [
        (240, (), True, 306.0),
        (240, (), False, 280.3),
        (240, (5, 4, 3, 2), True, 207.3),
        (240, (5, 4, 3, 2), False, 181.6),
        (168, (5, 4, 3, 2), True, 139.2),
    ],
)
def test_the_real_sizes_cost_what_was_published(
    num_frames: int,
    reaches: tuple[int, ...],
    nearly_clean_pass: bool,
    pflops: float,
    model_4_5b: ModelConfig,
):
    total = published_clip_flops(
        model_4_5b,
        clip=Clip(num_frames),
        clock=Clock(num_steps=64, window=4, reaches=reaches),
        chunk_tokens=CHUNK_TOKENS,
        nearly_clean_pass=nearly_clean_pass,
    )
    assert round(total / 1e15, 1) == pflops


def test_a_chunk_costs_what_was_published(model_4_5b: ModelConfig):
    alone, seen = (
        published_block_flops(model_4_5b, queries=CHUNK_TOKENS, keys=keys)
        for keys in (0, CHUNK_TOKENS)
    )
    assert round(alone / 1e12, 2) == 98.76
    assert round((seen - alone) / 1e12, 2) == 61.68
