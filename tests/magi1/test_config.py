"""Settings: JSON configs of the release, presets, and one line for every mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowcache.compress import strategy_of
from flowcache.errors import UserError
from flowcache.policies import POLICIES, FlowCache
from magi1.checkpoint import find_model, find_path
from magi1.config import ModelConfig, RunConfig, read_config
from magi1.dit import DiT
from magi1.model import MODEL
from magi1.released import CONFIGS, DEMOS, PRESETS, RELEASED
from magi1.work import budget_of, clip_of, dtype_of, layout_of, loop_of, policy_of

Configure = Callable[..., RunConfig]
NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


# The release's JSON -------------------------------------------------------------------------


def test_the_released_fields_are_read_with_their_types(model_4_5b: ModelConfig):
    config = read_config(CONFIGS / "4.5B_base.json")
    assert config.model_config == model_4_5b
    assert config.runtime_config.noise2clean_kvrange == (5, 4, 3, 2)
    assert config.runtime_config.text_scales == (7.5, 7.5, 7.5, 0.0, 0.0)
    assert config.engine_config.distill_nearly_clean_chunk_threshold == 0.3


def test_numbers_in_exponent_notation_are_numbers_and_overrides_are_checked(tmp_path: Path):
    document = json.loads((CONFIGS / "4.5B_base.json").read_text())
    text = json.dumps(document).replace("1e-06", "1e-6").replace("0.9999", "9999E-4")
    assert "9999E-4" in text
    path = tmp_path / "config.json"
    path.write_text(text)
    config = read_config(path)
    assert config.model_config.layernorm_epsilon == 1e-6
    assert config.runtime_config.clean_t == 0.9999
    with pytest.raises(UserError, match="num_steps is 30, but must divide by 4"):
        read_config(path, overrides=["runtime_config.num_steps=30"])


@pytest.mark.parametrize(
    ("model", "num_tensors", "num_values"),
    [
        ("4.5B_base", 898, 4_459_898_128),
        ("4.5B_distill_quant", 1410, 4_460_979_760),
        ("24B_base", 1262, 23_899_281_936),
    ],
)
def test_the_released_configs_describe_the_released_weights(
    model: str, num_tensors: int, num_values: int
):
    config = read_config(CONFIGS / f"{model}.json")
    with torch.device("meta"):
        dit = DiT(config.model_config, is_fp8=config.engine_config.fp8_quant)
    state = dit.state_dict()
    assert len(state) == num_tensors
    assert sum(value.numel() for value in state.values()) == num_values


# Mistakes -----------------------------------------------------------------------------------

WRONG = {
    "4.5B_distill": [
        ("runtime_config.seed=-1", "runtime_config.seed must be in 0"),
        ("runtime_config.cfg_number=3", "cfg_number is 3, but must be 1 for a distilled model"),
        ("prompt= ", "prompt is empty"),
        ("prefix_frames=30", "prefix_frames must be a positive multiple of 4"),
        ("passes.prev_share=1.5", "passes.prev_share must be in 0..1, not 1.5"),
        ("reuse.threshold=-1", "reuse.threshold must be in 0..1000000000, not -1"),
        ("reuse.warmup_steps=-1", "reuse.warmup_steps must be in 0..1000, not -1"),
        ("reuse.every=0", "reuse.every must be in 1..1000, not 0"),
        ("reuse.steps=[64]", "reuse.steps are own steps of a chunk, 0..63: 64 is none"),
        ("reuse.guidance_every=2", "this run has that one pass only (a distilled model"),
        ("kv.mix=2", "kv.mix must be in 0..1, not 2"),
        ("kv.compress=importance kv.total_chunks=4", "must be above runtime_config.window_size 4"),
        ("image=a.png video=b.mp4", "image and video cannot both be the start"),
        ("runtime_config.fps=12", "VAE tiles of fps // 2 = 6 frames hold 1 latents"),
        ("runtime_config.chunk_width=4", "of runtime_config.chunk_width=4 so that a single one"),
    ],
    "4.5B_base": [
        ("runtime_config.num_steps=30", "num_steps is 30, but must divide by 4"),
        ("runtime_config.video_size_h=700", "video_size_h is 700, but must be a positive multiple"),
        ("runtime_config.video_size_w=728", "video_size_w is 728, but must be a positive multiple"),
        ("runtime_config.cfg_number=2", "cfg_number is 2, but must be 3 for a base model"),
        ("engine_config.distill=true", "cfg_number is 3, but must be 1 for a distilled model"),
        ("runtime_config.cfg_t_range=[]", "cfg_t_range is (), but must rise, from 0 on"),
        ("runtime_config.cfg_t_range=[0.1,0.2,0.3,0.4,0.5]", "but must rise, from 0 on"),
        ("runtime_config.cfg_t_range=[0,0.2,0.1,0.4,0.5]", "but must rise, from 0 on"),
        ("runtime_config.noise2clean_kvrange=[5,4,3]", "the 3 entries of noise2clean_kvrange"),
        ("runtime_config.clean_chunk_kvrange=0", "clean_chunk_kvrange is 0, but must be a count"),
        ("runtime_config.text_scales=[7.5]", "text_scales is (7.5,), but needs 5 entries"),
        ("runtime_config.prev_chunk_scales=[1]", "prev_chunk_scales is (1.0,), but needs 5"),
        ("runtime_config.t5_device=gpu", "t5_device is 'gpu', but must be cpu, cuda or cuda:0"),
        ("runtime_config.window_size=0", "window_size must be in 1..1000, not 0"),
        ("model_config.num_query_groups=5", "num_query_groups is 5, but must divide 24 heads"),
        ("model_config.kv_channels=64", "kv_channels is 64, but 24 heads must make 3072"),
        ("model_config.layernorm_epsilon=.inf", "layernorm_epsilon must be a finite number"),
        ("model_config.apply_layernorm_1p=false", "apply_layernorm_1p is False, but only True"),
        (
            "model_config.num_layers=many",
            "model_config.num_layers is 'many', but must be a whole number",
        ),
        ("model_config.num_layers=0", "num_layers must be in 1..256, not 0"),
        ("model_config.num_layers=1000000000", "num_layers must be in 1..256, not 1000000000"),
        ("model_config.hidden_size=1000000000000", "hidden_size must be in 1..131072, not 10"),
        ("model_config.out_channels=32", "out_channels is 32, but must be in_channels, 16"),
    ],
    "4.5B_distill_quant": [("dtype=float32", "works in bfloat16")],
}
"""Model -> settings that break a rule, and what the error says."""


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [(model, *row) for model, rows in WRONG.items() for row in rows],
)
def test_a_wrong_value_is_named_with_its_rule(
    configure: Configure, model: str, settings: str, message: str
):
    given = [settings] if settings == "prompt= " else settings.split()
    with pytest.raises(UserError) as caught:
        configure("base", *given, model=model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# What they mean -----------------------------------------------------------------------------


def test_a_chunks_own_last_step_is_reused_unless_asked_otherwise(configure: Configure):
    settings = ("reuse.policy=flowcache",)
    assert policy_of(configure("base", *settings)) == FlowCache(0.01, 5, compute_last_step=False)
    forced = configure("base", *settings, "reuse.compute_last_step=true")
    assert policy_of(forced) == FlowCache(0.01, 5, compute_last_step=True)


def test_the_cpu_computes_in_float32_unless_told_otherwise(configure: Configure):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert dtype_of(configure(), cpu) == torch.float32
    assert dtype_of(configure(), cuda) == torch.bfloat16
    assert dtype_of(configure("base", "dtype=float16"), cpu) == torch.float16
    assert dtype_of(configure(model="4.5B_distill_quant"), cpu) == torch.bfloat16


@pytest.mark.parametrize("preset", NAMES)
def test_every_preset_is_in_order_for_every_released_model(configure: Configure, preset: str):
    for model in RELEASED:
        config = configure(preset, model=model)
        if not config.reuse.needs_profile:  # a profile comes with its checkpoint
            assert isinstance(policy_of(config), POLICIES[config.reuse.policy])
        assert loop_of(config).guidance is None or "base" in model


def test_guidance_is_the_largest_scale_of_the_text(configure: Configure, tmp_path: Path):
    released = configure(model="4.5B_base")
    preset = tmp_path / "mine.yaml"
    preset.write_text("guidance: 5.0")
    for config in (
        configure("base", "guidance=5", model="4.5B_base"),
        configure(str(preset), model="4.5B_base"),
    ):
        was, now = loop_of(released).guidance, loop_of(config).guidance
        assert was is not None
        assert now is not None
        assert was.text_scales == (7.5, 7.5, 7.5, 0, 0)
        assert now.text_scales == (5, 5, 5, 0, 0)
        assert now.prev_scales == was.prev_scales
        assert MODEL.setting(config) != MODEL.setting(released)  # a profile is for one guidance
    same = configure("base", "guidance=7.5", model="4.5B_base")
    assert loop_of(same) == loop_of(released)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("4.5B_distill", ["guidance=5"], "guidance is 5, but a distilled model makes one pass"),
        ("4.5B_base", ["guidance=0.5"], r"guidance must be in 1\.\.1000, not 0.5"),
        (
            "4.5B_base",
            ["guidance=nan"],
            "guidance is 'nan', but must be a number or null, in 1..1000",
        ),
        (
            "4.5B_base",
            ["guidance=5", "runtime_config.text_scales=[0, 0, 0, 0, 0]"],
            "of which none is above 0",
        ),
    ],
)
def test_guidance_that_a_model_cannot_have_is_refused(
    configure: Configure, model: str, settings: list[str], words: str
):
    with pytest.raises(UserError, match=words):
        configure("base", *settings, model=model)


def test_the_published_values_are_set(configure: Configure):
    for name, threshold in (("slow", 0.01), ("fast", 0.015)):
        for preset in (f"flowcache_{name}", f"teacache_{name}"):
            config = configure(preset)
            run = config.runtime_config
            assert (run.video_size_h, run.video_size_w, run.num_frames) == (720, 720, 240)
            assert (run.num_steps, run.window_size, run.seed) == (64, 4, 1234)
            assert run.noise2clean_kvrange == ()
            assert (config.reuse.threshold, config.reuse.warmup_steps) == (threshold, 5)
        kv = configure(f"flowcache_{name}").kv
        assert (kv.compress, kv.total_chunks, kv.mix, kv.kernel) == ("importance", 5, 0.07, 7)
        assert (kv.granularity, kv.queries, kv.order) == ("token", "frame", "score")
    assert configure("vanilla_window").runtime_config.noise2clean_kvrange == (5, 4, 3, 2)


def test_a_compressed_cache_has_its_budget(configure: Configure):
    config = configure("flowcache_fast")
    budget = budget_of(config)
    assert budget is not None
    assert budget.total_chunks == 5
    # 45 x 45 tokens, 6 latents in a chunk
    assert layout_of(config).chunk_tokens == 12150
    assert budget_of(configure("vanilla")) is None
    assert strategy_of(configure("vanilla").kv) is None
    assert clip_of(config, num_prefix=0).num_chunks == 10
    configure("flowcache_fast_nocompress", "kv.total_chunks=4")


# Models by name -----------------------------------------------------------------------------


def test_a_model_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="5B: no such file or folder"):
        find_model("5B")
    with pytest.raises(UserError, match=r"must hold one \*config\.json, found none"):
        find_model(str(tmp_path))
    (tmp_path / "a_config.json").write_text("{}")
    (tmp_path / "._a_config.json").write_bytes(b"\0\5\x16\7")  # as macOS leaves on foreign disks
    assert find_model(str(tmp_path)).layers[0] == tmp_path / "a_config.json"
    (tmp_path / "b_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"found a_config\.json, b_config\.json"):
        find_model(str(tmp_path))
    assert find_model(str(tmp_path / "a_config.json")).layers[0] == tmp_path / "a_config.json"
    assert not set(DEMOS) & set(RELEASED)


def test_auto_is_the_distilled_model_where_there_is_cuda_else_the_demo():
    found = find_model("auto", has_cuda=True)
    assert (found.name, found.download) == ("4.5B_distill", "missing")
    assert find_model("auto", has_cuda=False) == find_model("demo")
    assert find_model("4.5B_distill").download == "never"


def test_a_path_is_looked_for_from_here_and_then_beside_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, here = tmp_path / "model", tmp_path / "here"
    for folder in (model / "ckpt", here / "ckpt"):
        folder.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    source = find_model(str(model))
    monkeypatch.chdir(tmp_path)
    assert find_path("ckpt", source) == str(model / "ckpt")
    monkeypatch.chdir(here)
    assert find_path("ckpt", source) == "ckpt"
    assert find_path("other", source) == "other"
