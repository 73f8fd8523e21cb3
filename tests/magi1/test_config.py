"""JSON configs of the release: read as they are, or refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flowcache.errors import UserError
from magi1.config import (
    EngineConfig,
    ModelConfig,
    RuntimeConfig,
    check_model,
    check_runtime,
    read_config,
)

RUNTIME = {
    "cfg_number": 3,
    "cfg_t_range": [0.0, 0.0217, 0.1, 0.3, 0.999],
    "prev_chunk_scales": [1.5, 1.5, 1.5, 1.0, 1.0],
    "text_scales": [7.5, 7.5, 7.5, 0.0, 0.0],
    "noise2clean_kvrange": [5, 4, 3, 2],
    "clean_chunk_kvrange": 1,
    "clean_t": 0.9999,
    "seed": 1234,
    "num_frames": 96,
    "video_size_h": 720,
    "video_size_w": 720,
    "num_steps": 64,
    "window_size": 4,
    "fps": 24,
    "chunk_width": 6,
    "load": "./downloads/4.5B_base",
    "t5_pretrained": "./downloads/t5_pretrained",
    "t5_device": "cpu",
    "vae_pretrained": "./downloads/vae",
    "scale_factor": 0.18215,
    "temporal_downsample_factor": 4,
}
ENGINE = {
    "distributed_backend": "nccl",
    "distributed_timeout_minutes": 15,
    "pp_size": 1,
    "cp_size": 1,
    "cp_strategy": "cp_ulysses",
    "ulysses_overlap_degree": 1,
    "fp8_quant": False,
    "distill_nearly_clean_chunk_threshold": 0.3,
    "shortcut_mode": "8,16,16",
    "distill": False,
    "kv_offload": True,
    "enable_cuda_graph": False,
}


@pytest.fixture
def document(model_4_5b: ModelConfig) -> dict[str, dict[str, Any]]:
    return {
        "model_config": dataclasses.asdict(model_4_5b),
        "runtime_config": dict(RUNTIME),
        "engine_config": dict(ENGINE),
    }


def write(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(document, indent=4))
    return path


def test_the_released_fields_are_read_with_their_types(
    document: dict[str, Any], tmp_path: Path, model_4_5b: ModelConfig
):
    config = read_config(write(tmp_path, document))
    assert config.model_config == model_4_5b
    assert config.runtime_config.noise2clean_kvrange == (5, 4, 3, 2)
    assert config.runtime_config.load == "./downloads/4.5B_base"
    assert config.engine_config.distill_nearly_clean_chunk_threshold == 0.3


def test_numbers_in_exponent_notation_are_numbers(document: dict[str, Any], tmp_path: Path):
    text = json.dumps(document).replace("1e-06", "1e-6").replace("0.9999", "9999E-4")
    (tmp_path / "config.json").write_text(text)
    config = read_config(tmp_path / "config.json")
    assert config.model_config.layernorm_epsilon == 1e-6
    assert config.runtime_config.clean_t == 0.9999


@pytest.mark.parametrize(
    ("section", "field"),
    [("model_config", "kv_channels"), ("runtime_config", "load"), ("engine_config", "distill")],
)
def test_a_missing_field_is_named(
    section: str, field: str, document: dict[str, Any], tmp_path: Path
):
    del document[section][field]
    with pytest.raises(UserError, match=rf"^{section}\.{field} has no value"):
        read_config(write(tmp_path, document))


def test_an_unknown_field_is_named(document: dict[str, Any], tmp_path: Path):
    document["engine_config"]["turbo"] = True
    with pytest.raises(UserError, match=r"config\.json: unknown key 'engine_config\.turbo'"):
        read_config(write(tmp_path, document))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("run", {"num_steps": 30}, "num_steps is 30, but must divide by 4"),
        ("run", {"video_size_w": 728}, "video_size_w is 728, but must be a positive multiple"),
        ("run", {"cfg_number": 2}, "cfg_number is 2, but must be 3 for a base model"),
        ("engine", {"distill": True}, "cfg_number is 3, but must be 1 for a distilled model"),
        ("run", {"noise2clean_kvrange": (5, 4, 3)}, "the 3 entries of noise2clean_kvrange"),
        ("run", {"clean_chunk_kvrange": 0}, "clean_chunk_kvrange is 0, but must be a count"),
        ("run", {"text_scales": (7.5,)}, "text_scales is (7.5,), but needs 5 entries"),
        ("run", {"t5_device": "gpu"}, "t5_device is 'gpu', but must be cpu, cuda or cuda:0"),
        ("run", {"window_size": 0}, "window_size must be in 1..1000, not 0"),
        ("model", {"num_query_groups": 5}, "num_query_groups is 5, but must divide 24 heads"),
        ("model", {"kv_channels": 64}, "kv_channels is 64, but 24 heads must make 3072"),
        ("model", {"apply_layernorm_1p": False}, "apply_layernorm_1p is False, but only True"),
        ("model", {"num_layers": 0}, "num_layers must be in 1..256, not 0"),
        ("model", {"num_layers": 10**9}, "num_layers must be in 1..256, not 1000000000"),
        ("model", {"hidden_size": 10**18}, "hidden_size must be in 1..131072, not 10"),
    ],
)
def test_a_value_that_breaks_a_rule_is_named_with_the_rule(
    section: str, change: dict[str, Any], message: str, model_4_5b: ModelConfig
):
    runtime = {k: tuple(v) if isinstance(v, list) else v for k, v in RUNTIME.items()}
    parts: dict[str, Any] = {
        "model": model_4_5b,
        "run": RuntimeConfig(**runtime),
        "engine": EngineConfig(**ENGINE),
    }
    parts[section] = dataclasses.replace(parts[section], **change)
    with pytest.raises(UserError) as caught:
        check_model(parts["model"], source="4.5B.json")
        check_runtime(parts["run"], parts["engine"], source="4.5B.json")
    assert str(caught.value).startswith("4.5B.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_checks_apply_to_files_and_overrides(document: dict[str, Any], tmp_path: Path):
    path = write(tmp_path, document)
    with pytest.raises(UserError, match="num_steps is 30, but must divide by 4"):
        read_config(path, overrides=["runtime_config.num_steps=30"])
    with pytest.raises(UserError, match=r"model_config\.num_layers is 'many', but must be int"):
        read_config(path, overrides=["model_config.num_layers=many"])
