"""What the plan says at the real sizes; that it counts what a run does is in `test_run`."""

from collections.abc import Callable

import pytest
import torch

from flowcache.runtime.model import Work
from magi1.config import RunConfig
from magi1.dit import published_clip_flops
from magi1.model import MODEL
from magi1.schedule import Clock
from magi1.work import clip_of, clip_work, layout_of

Configure = Callable[..., RunConfig]

CHUNK_KV_BYTES = 12150 * 2 * 8 * 128 * 34 * 2
"""Keys and values of a chunk: 8 heads of 128 in 34 layers, two bytes each."""


def plan_of(config: RunConfig) -> Work:
    return clip_work(
        config,
        num_prefix=0,
        prompt_tokens=100,
        has_special_tokens=False,
        dtype=torch.bfloat16,
    )


def test_a_compressed_cache_does_not_grow_with_the_video(configure: Configure):
    short, long = (
        plan_of(configure("flowcache_fast", f"runtime_config.num_frames={frames}"))
        for frames in (240, 1000)
    )
    assert short.kv_bytes == long.kv_bytes == 5 * CHUNK_KV_BYTES
    assert short.scoring_bytes == long.scoring_bytes
    assert 0 < short.scoring_bytes < 1e9
    assert short.stored_bytes == long.stored_bytes > 0
    assert plan_of(configure("vanilla")).kv_bytes == 10 * CHUNK_KV_BYTES


def test_a_base_model_has_two_caches(configure: Configure):
    config = configure("vanilla", model="4.5B_base")
    plan = plan_of(config)
    assert plan.kv_bytes == 2 * 10 * CHUNK_KV_BYTES
    assert (len(plan.passes), plan.num_caches) == (3, 2)


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
