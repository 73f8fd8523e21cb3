"""What the plan says at the real sizes, and closed-form FLOPs against the published figures."""

from collections.abc import Callable

import pytest
import torch

from flowcache.runtime.model import Work
from magi1.config import ModelConfig, RunConfig
from magi1.dit import published_block_flops, published_clip_flops
from magi1.model import MODEL
from magi1.schedule import Clip, Clock
from magi1.work import clip_of, clip_work, layout_of

Configure = Callable[..., RunConfig]

CHUNK_TOKENS = 6 * 45 * 45
"""Of a chunk at 720 x 720."""
CHUNK_KV_BYTES = CHUNK_TOKENS * 2 * 8 * 128 * 34 * 2
"""Keys and values of a chunk: 8 heads of 128 in 34 layers, two bytes each."""


def plan_of(config: RunConfig) -> Work:
    options = {"num_prefix": 0, "prompt_tokens": 100, "has_special_tokens": False}
    return clip_work(config, **options, dtype=torch.bfloat16)


def test_a_compressed_cache_does_not_grow_with_the_video(configure: Configure):
    short, long = (
        plan_of(configure("flowcache_fast", f"runtime_config.num_frames={frames}"))
        for frames in (240, 1000)
    )
    assert short.kv_bytes == long.kv_bytes == 5 * CHUNK_KV_BYTES
    assert short.scoring_bytes == long.scoring_bytes
    assert 0 < short.query_bytes < short.scoring_bytes < 1e9
    assert short.stored_bytes == long.stored_bytes > 0
    assert plan_of(configure("vanilla")).kv_bytes == 10 * CHUNK_KV_BYTES
    two = plan_of(configure("vanilla", model="4.5B_base"))
    assert two.kv_bytes == 2 * 10 * CHUNK_KV_BYTES
    assert (len(two.passes), two.num_caches) == (3, 2)


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


@pytest.mark.parametrize("preset", ["vanilla", "vanilla_window", "vanilla_no_nearly_clean"])
def test_the_planned_flops_are_the_published_ones_and_a_little_more(
    configure: Configure, preset: str
):
    config = configure(preset, "passes.clean_pass=false")
    published = published_clip_flops(
        config.model_config,
        clip=clip_of(config, num_prefix=0),
        clock=Clock.of(config),
        chunk_tokens=layout_of(config).chunk_tokens,
        nearly_clean_pass=config.passes.nearly_clean_pass,
    )
    # left out there: embeddings, gates, attention to the text, the output
    assert 1 < plan_of(config).flops / published < 1.01


def test_weights_are_counted_as_they_are_stored(configure: Configure):
    plan = plan_of(configure("vanilla"))
    # 2 bytes each, but for embedders, output and norms in float32
    assert 2 * 4_459_898_128 < plan.weight_bytes < 2.02 * 4_459_898_128
    quantised = plan_of(configure("vanilla", model="4.5B_distill_quant"))
    assert quantised.weight_bytes < 0.6 * plan.weight_bytes


def test_the_plan_says_what_is_rounded(configure: Configure):
    config = configure("vanilla", "runtime_config.num_frames=100")
    said = "\n".join(MODEL.lines(config, plan_of(config)))
    assert "120 frames of 720x720 at 24 fps (100 asked, 120 made: whole chunks)" in said
    assert "asked" not in "\n".join(MODEL.lines(configure(), plan_of(configure())))
