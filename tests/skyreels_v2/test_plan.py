from dataclasses import replace
from itertools import product

import pytest
import torch

from flowcache.policies import FlowCache
from flowcache.predict import PREDICTORS
from flowcache.runtime.config import find_preset, load_config
from flowcache.runtime.model import Work
from flowcache.wan.calibration import policies_of
from flowcache.wan.dit import DiTConfig, blocks_flops, context_flops, embed_flops, head_flops
from skyreels_v2.config import RunConfig
from skyreels_v2.model import MODEL
from skyreels_v2.released import PRESETS
from skyreels_v2.work import compression_of, held_of, work_of

DF_13B = DiTConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, inject_sample_info=True)
"""The 1.3B diffusion forcing model."""
TWO_LAYERS = replace(DF_13B, num_layers=2)

FRAME = 34 * 60
"""Tokens of a latent frame at 540P."""
NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


def config_of(preset: str, *settings: str) -> RunConfig:
    layers = [PRESETS / "base.yaml", find_preset(PRESETS, preset)]
    return load_config(RunConfig, layers, overrides=["prompt=a swan", *settings])


def plan_of(preset: str, *settings: str, model: DiTConfig = DF_13B) -> Work:
    return work_of(config_of(preset, *settings), model, dtype=torch.bfloat16)


def test_the_kv_cache_of_97_frames_at_540p_stays_below_18_9_gigabytes():
    plan = plan_of("flowcache_slow", "num_frames=97")
    # keys and values, 25 latent frames, 30 layers, 2 branches, 2 bytes
    assert plan.kv_bytes == 2 * 25 * FRAME * 1536 * 30 * 2 * 2
    assert plan.kv_bytes <= 18.9e9
    assert 0 < plan_of("flowcache_kvcompress", "num_frames=97").scoring_bytes < 1e9


def test_a_kv_cache_never_holds_more_than_clean_and_active_chunks():
    # chunks of 5 with lag 5 and 50 steps: all five are active at once, one chunk enters per 5 ticks
    assert plan_of("vanilla_causal", "num_frames=97").segments[0].kv_tokens == 25 * FRAME
    # 2 steps, lag 2: one after the other, so at most the clean ones and the active one
    one_by_one = plan_of("vanilla_causal", "num_frames=97", "num_steps=2", "ar_step=2")
    assert one_by_one.segments[0].kv_tokens == 25 * FRAME
    kept = plan_of(
        "vanilla_causal",
        *("num_frames=97", "num_steps=2", "ar_step=2", "kv.compress=recent", "kv.budget_chunks=1"),
    )
    # before a chunk enters, one of the budget's chunk and the one that just became clean leaves
    assert kept.segments[0].kv_tokens == 2 * 5 * FRAME


def test_full_attention_has_no_kv_cache_and_weights_are_in_the_dtype_of_the_run():
    plan = plan_of("vanilla")
    assert plan.kv_bytes == plan.scoring_bytes == 0
    assert plan.weight_bytes == 2 * 1_435_525_696


def test_a_synchronous_window_costs_its_forwards():
    plan = plan_of("vanilla", "num_frames=97", "ar_step=0", "num_steps=10", model=TWO_LAYERS)
    tokens = 25 * FRAME
    forward = blocks_flops(TWO_LAYERS, queries=tokens, keys=tokens)
    forward += head_flops(TWO_LAYERS, queries=tokens)
    embed = embed_flops(TWO_LAYERS, num_frames=25, frame_tokens=FRAME)
    assert plan.num_ticks == 10
    assert plan.flops == 10 * (embed + 2 * forward) + 2 * context_flops(TWO_LAYERS)


def test_causal_chunks_cost_what_they_see():
    plan = plan_of(
        "vanilla_causal",
        *("num_frames=17", "causal_block_size=2", "ar_step=0", "num_steps=4", "guidance=1"),
        model=TWO_LAYERS,
    )
    # 5 latent frames: chunks of 2, 2 and 1, each sees itself and the ones before
    seen = {2: [2, 4], 1: [5]}
    tick = embed_flops(TWO_LAYERS, num_frames=5, frame_tokens=FRAME)
    for queries, keys in ((size, k) for size, all_keys in seen.items() for k in all_keys):
        tick += blocks_flops(TWO_LAYERS, queries=queries * FRAME, keys=keys * FRAME)
        tick += head_flops(TWO_LAYERS, queries=queries * FRAME)
    assert plan.flops == 4 * tick + context_flops(TWO_LAYERS)


def test_a_long_video_is_planned_in_segments():
    plan = plan_of("vanilla", model=TWO_LAYERS)  # 177 frames, windows of 97, 17 shared
    assert [segment.cut.num_frames for segment in plan.segments] == [25, 25]
    # 50 steps, 5 and 4 chunks to denoise, each 5 steps behind the one before: the published 70, 65
    assert [len(segment.ticks) for segment in plan.segments] == [70, 65]


@pytest.mark.parametrize(
    ("settings", "shown", "encoded"),
    [
        # one chunk of five latent frames becomes clean at a time; the second window is given 17
        (("num_frames=177", "overlap_history=17"), 4 * 5, 17),
        # all but the given frame become clean together
        (("num_frames=97", "ar_step=0", "image=a.png"), 4 * 24, 1),
    ],
)
def test_memory_holds_the_pixels_that_are_made_and_given_at_once(
    settings: tuple[str, ...], shown: int, encoded: int
):
    config = config_of("vanilla_causal", *settings)
    plan = work_of(config, TWO_LAYERS, dtype=torch.bfloat16)
    held = held_of(config, plan, TWO_LAYERS)
    assert (held.shown_frames, held.encoded_frames) == (shown, encoded)


def test_a_second_branch_doubles_all_but_the_embedding():
    settings = ("num_frames=97", "attention=causal")
    one = plan_of("vanilla", *settings, "guidance=1", model=TWO_LAYERS)
    two = plan_of("vanilla", *settings, model=TWO_LAYERS)
    assert (one.num_caches, two.num_caches) == (1, 2)
    assert two.kv_bytes == 2 * one.kv_bytes
    assert one.flops < two.flops < 2 * one.flops


@pytest.mark.parametrize("preset", NAMES)
def test_every_preset_plans_with_every_policy_and_predictor(preset: str):
    policies = ("vanilla", "teacache", "flowcache", "stride")
    base = config_of(preset)
    for policy, quantity in product(policies, PREDICTORS):
        # which tokens are computed is chosen with some policies and predictors alone
        tokens = replace(base.reuse.tokens, choice="all")
        reuse = replace(base.reuse, policy=policy, predict=quantity, tokens=tokens)
        config = replace(base, reuse=reuse)
        plan = work_of(config, TWO_LAYERS, dtype=torch.bfloat16)
        assert plan.num_ticks == 135
        assert (plan.kv_bytes > 0) == (config.attention == "causal")
        assert plan.stored_bytes > 0  # also where none is asked for
        compression = compression_of(config, frame_tokens=plan.frame_tokens)
        assert (compression is None) == (config.kv.compress == "none")
        made = policies_of(config, TWO_LAYERS)
        first, second = (made(segment=0, branch=name) for name in ("cond", "uncond"))
        assert first is not second  # no state is shared


@pytest.mark.parametrize("is_forced", [True, False])
def test_a_chunks_own_last_step_is_computed_unless_asked_otherwise(is_forced: bool):
    settings = ["reuse.policy=flowcache", "reuse.rescale=none"]
    settings += [] if is_forced else ["reuse.compute_last_step=false"]
    made = policies_of(config_of("vanilla_causal", *settings), TWO_LAYERS)
    assert made(segment=0, branch="cond") == FlowCache(0.1, 5, compute_last_step=is_forced)


@pytest.mark.parametrize("preset", NAMES)
def test_the_plan_is_told_in_lines(preset: str):
    config = config_of(preset)
    plan = work_of(config, TWO_LAYERS, dtype=torch.bfloat16)
    text = "\n".join(MODEL.lines(config, plan))
    assert "177 frames of 960x544 at 24 fps, seed 1024" in text
    assert "2: 5 chunks (5 of 5 latent frames), 4 chunks (4 of 5 latent frames)" in text
    assert "2040 per latent frame, 51000 in the first window" in text
    for word in ("ticks", "PFLOP", "weights", "KV cache", "KV scoring", "stored", "activations"):
        assert word in text
    assert f"{plan.flops / 1e15:.4g} PFLOP" in text
