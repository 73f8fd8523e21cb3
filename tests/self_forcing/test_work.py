"""Plans: chunks, calls and FLOPs against the published figures."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from flowcache.errors import UserError
from flowcache.runtime.config import load_config
from flowcache.runtime.model import Work
from flowcache.wan.dit import blocks_flops, embed_flops
from self_forcing.checkpoint import SIZES
from self_forcing.config import RunConfig
from self_forcing.released import PRESETS
from self_forcing.work import chunks_of, work_of

FRAME_TOKENS = 1560


def config_of(preset: str, *settings: str) -> RunConfig:
    layers = [PRESETS / "base.yaml", PRESETS / f"{preset}.yaml"]
    return load_config(RunConfig, layers, overrides=["prompt=a cat", *settings])


def planned(preset: str, *settings: str) -> Work:
    return work_of(config_of(preset, *settings), SIZES, dtype=torch.bfloat16)


def last_clean_pass(work: Work) -> int:
    """Return what upstream adds: the last chunk's clean pass, which nobody sees."""
    (part,) = work.segments
    frames, size = part.cut[-1].stop, len(part.cut[-1])
    cost = blocks_flops(SIZES, queries=size * FRAME_TOKENS, keys=frames * FRAME_TOKENS)
    return cost * len(work.branches)


@pytest.mark.parametrize(
    ("preset", "teraflops"),
    [
        ("self_forcing", 990),
        ("ar_chunkwise", 20_203),
        ("causal_forcing_framewise", 943),
        ("causal_forcing_2step", 575),
        ("causal_forcing_1step", 391),
    ],
)
def test_flops_are_the_published_ones(preset: str, teraflops: int):
    work = planned(preset)
    assert (work.flops + last_clean_pass(work)) / 1e12 == pytest.approx(teraflops, rel=3e-3)


def test_one_call_of_every_chunk_is_198_teraflops():
    calls = [
        blocks_flops(SIZES, queries=3 * FRAME_TOKENS, keys=(3 * chunk + 3) * FRAME_TOKENS)
        for chunk in range(7)
    ]
    assert [round(call / 1e12, 1) for call in calls] == [16.2, 20.2, 24.3, 28.3, 32.3, 36.4, 40.4]
    assert sum(calls) / 1e12 == pytest.approx(198.1, abs=0.05)


def test_a_clean_pass_costs_embedding_and_blocks_alone():
    tokens = 3 * FRAME_TOKENS
    whole, skipped = planned("self_forcing"), planned("self_forcing", "clean_pass=skipped")
    passes = [
        embed_flops(SIZES, num_frames=3, frame_tokens=FRAME_TOKENS)
        + blocks_flops(SIZES, queries=tokens, keys=(chunk + 1) * tokens)
        for chunk in range(6)  # the last one of 7 has none
    ]
    assert whole.flops - skipped.flops == sum(passes)


def test_the_cache_of_a_clip_has_the_published_size():
    assert planned("self_forcing").kv_bytes / 1e9 == pytest.approx(6.04, abs=0.005)
    window = ("window=12", "sink=3", "num_frames=957")
    assert planned("self_forcing", *window).kv_bytes / 1e9 == pytest.approx(3.45, abs=0.005)
    assert planned("ar_chunkwise").kv_bytes == 2 * planned("self_forcing").kv_bytes


def test_latent_frames_are_cut_into_chunks():
    assert chunks_of(7, size=3, is_first_alone=True) == [range(1), range(1, 4), range(4, 7)]
    assert chunks_of(6, size=3) == [range(3), range(3, 6)]


def test_the_frames_of_a_chunk_follow_each_other():
    (part,) = planned("self_forcing", "num_frames=33").segments
    assert part.frames == [[0, 9], [9, 21], [21, 33]]


@pytest.mark.parametrize(
    ("preset", "settings", "words"),
    [
        ("self_forcing", ["num_frames=34"], "num_frames is 34, .*: use 33"),
        ("self_forcing", ["num_frames=5"], "chunks of 3 latent frames: use 9"),
        ("self_forcing", ["first_frame_alone=true"], "after a single one: use 85"),
        ("self_forcing", ["image=a.png"], "image is one latent frame, but chunks have 3"),
        ("self_forcing", ["video=a.mp4"], "video needs overlap_history"),
        ("self_forcing", ["num_steps=3"], "num_steps is 3, but step_list names 4"),
        ("self_forcing", ["guidance=5"], "guidance is 5, but a few-step model .* leave guidance"),
        ("self_forcing", ["step_list=[250,1000]"], "must fall from the first step"),
        ("self_forcing", ["step_list=[]"], "must fall from the first step"),
        ("self_forcing", ["step_list=[2000]"], "step_list must be in 0..1000"),
        ("self_forcing", ["window=5", "sink=3"], "window is 5 latent frames, fewer than the 6"),
        ("self_forcing", ["sink=3"], "need a window"),
        ("self_forcing", ["num_frames=12009"], "positions for 1024: set positions=relative"),
        ("self_forcing", ["num_frames=12009", "positions=relative"], "for 1024: set window"),
        ("self_forcing", ["height=488"], "height must be a multiple of 16"),
        ("self_forcing", ["reuse.policy=flowcache"], "save where there are many steps"),
        ("self_forcing", ["reuse.guidance_every=2"], "save where there are many steps"),
        ("ar_chunkwise", ["reuse.warmup_steps=0"], "warmup_steps must be 1 or more"),
        ("ar_chunkwise", ["reuse.guidance_every=2"], "set reuse.predict to velocity"),
        ("ar_chunkwise", ["reuse.guidance_every=2", "guidance=1"], "has that one pass only"),
        ("ar_chunkwise", ["reuse.steps=[50]"], "own steps of a chunk, 0..49: 50 is none"),
        ("self_forcing", ["kv.compress=importance"], "needs a window"),
        ("self_forcing", ["kv.compress=forcing_kv", "window=9"], "leave out window"),
        (
            "self_forcing",
            ["kv.compress=window", "window=9", "sink=1"],
            "leave out rolling, and sink",
        ),
        ("self_forcing", ["kv.compress=density", "window=9"], "set positions=relative"),
        ("self_forcing", ["kv.compress=deep_forcing", "window=7"], "1 sink and 4 recent frames"),
        (
            "self_forcing",
            ["kv.compress=density", "window=6", "positions=relative"],
            "does not hold 4 recent",
        ),
        ("long", ["kv.compress=window"], "leave out rolling"),
        ("long", ["clean_pass=merged"], "without rolling"),
        ("long", ["reuse_blocks=true"], "without rolling"),
        ("ar_chunkwise", ["reuse_blocks=true"], "works with a step_list"),
        ("self_forcing", ["reuse_blocks=true", "clean_pass=skipped"], "separate or refined"),
        ("ar_chunkwise", ["clean_pass=skipped"], "works with a step_list"),
        ("self_forcing", ["clean_pass=merged", "positions=relative"], "positions=absolute"),
        ("self_forcing", ["clean_pass=skipped", "context_noise=9"], "could apply"),
        ("self_forcing", ["clean_pass=refined", "refine_noise=0"], "above 0"),
        ("long", ["prompt=a cat || 9: a dog"], "do not work with rolling"),
        ("self_forcing", ["prompts=[[3, a dog]]"], "the first must begin at 0"),
        ("self_forcing", ["prompts=[[0, a cat], [6, a], [6, b]]"], "later than the one before"),
        ("self_forcing", ["prompts=[]"], "the first must begin at 0"),
        ("self_forcing", ["prompt=a cat || 9:"], "prompt of latent frame 9 is empty"),
        ("self_forcing", ["prompt=a cat || 19: a dog"], "19 begins with no chunk of its own"),
        ("self_forcing", ["prompt=a || 4: b || 5: c"], "5 begins with no chunk of its own"),
        ("self_forcing", ["recache=true"], "recache makes the keys"),
        ("ar_chunkwise", ["first_chunk_step_list=[1000]"], "needs a step_list"),
        ("long", ["window=12"], "fewer than the 15"),
        ("long", ["step_list=null"], "rolling needs one step_list"),
        ("long", ["image=a.png"], "rolling takes no image"),
        ("long", ["window=null"], "need a window"),
    ],
)
def test_what_does_not_fit_is_refused(preset: str, settings: list[str], words: str):
    with pytest.raises(UserError, match=words):
        planned(preset, *settings)


def test_guidance_is_that_of_the_setting_and_three_by_default():
    assert planned("ar_chunkwise").loop.guidance == 3
    assert planned("ar_chunkwise", "guidance=4.5").loop.guidance == 4.5
    assert planned("ar_chunkwise", "guidance=1").branches == ("cond",)


def test_any_length_is_planned_with_relative_positions_and_a_window():
    config = config_of("self_forcing", "num_frames=8001", "positions=relative", "window=12")
    work = work_of(replace(config, num_frames=7941), SIZES, dtype=torch.bfloat16)
    assert work.kv_bytes == planned("self_forcing", "window=12").kv_bytes


@pytest.mark.parametrize("name", ["window", "importance", "deep_forcing", "forcing_kv"])
def test_a_strategy_bounds_memory_at_any_length(name: str):
    window = [] if name == "forcing_kv" else ["window=12"]
    settings = [f"kv.compress={name}", *window, "positions=relative"]
    short, long = (planned("self_forcing", f"num_frames={n}", *settings) for n in (177, 7941))
    assert short.kv_bytes == long.kv_bytes <= planned("self_forcing", "window=12").kv_bytes
    assert (short.scoring_bytes > 0) == (name in ("importance", "deep_forcing"))


def test_a_prompt_begins_with_the_next_chunk():
    work = planned("self_forcing", "prompt=a cat || 4: a dog || 18: a bird")
    assert work.loop.switches == (2, 6)
    config = config_of("self_forcing", "prompt=a cat|| 120:  a dog: big | small")
    assert config.scenes == [(0, "a cat"), (120, "a dog: big | small")]
    assert config_of("self_forcing", "prompts=[[0, a], [7, b]]").scenes == [(0, "a"), (7, "b")]


def test_every_preset_is_planned():
    plans: dict[str, Any] = {path.stem: planned(path.stem) for path in PRESETS.glob("*.yaml")}
    assert all(work.flops > 0 for work in plans.values())


def test_a_merged_clean_pass_holds_one_more_chunk_that_is_not_quantised():
    separate, merged = (
        planned("self_forcing", "kv.dtype=int4", f"clean_pass={how}")
        for how in ("separate", "merged")
    )
    chunk_bytes = 2 * 3 * FRAME_TOKENS * SIZES.dim * SIZES.num_layers * torch.bfloat16.itemsize
    assert merged.kv_bytes - separate.kv_bytes == chunk_bytes
    assert merged.kv_device_bytes - separate.kv_device_bytes == chunk_bytes
    assert merged.kv_read_bytes == separate.kv_read_bytes
