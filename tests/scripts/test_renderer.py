"""Models loaded once, and what a video is made from."""

import importlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sampling_cases import (
    FOLDERS,
    SHORT,
    make_task,
)


@dataclass(frozen=True)
class Job:
    """What the renderer reads of a job."""

    config: Any
    checkpoint: Any
    device: torch.device
    dtype: torch.dtype
    plan: Any
    keeps_partial: bool = True


def test_a_model_is_loaded_once_for_all_prompts_seeds_and_methods(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    run = importlib.import_module("magi1.run")
    checkpoint = importlib.import_module("magi1.checkpoint").Checkpoint
    loads: list[str] = []

    def prepare(request: Any) -> Job:
        _, _, config = run.read_settings(request)
        return Job(
            config=config,
            checkpoint=checkpoint(config, (Path("dit"),), Path("vae"), Path("t5")),
            device=torch.device("cpu"),
            dtype=torch.float32,
            plan=SimpleNamespace(kv_bytes=1),
        )

    def load(job: Any, **_: Any) -> None:
        loads.append(job.config.runtime_config.scale_factor)

    monkeypatch.setattr(run, "prepare", prepare)
    monkeypatch.setattr(run, "load_models", load)
    monkeypatch.setattr(run, "load_text", lambda _job: None)
    monkeypatch.setattr(run, "encode_inputs", lambda *_, **__: None)
    rendered: list[Job] = []
    monkeypatch.setattr(run, "render", lambda job, *_, **__: rendered.append(job) or {})
    renderer = importlib.import_module("sampling.renderer").Renderer("cpu")
    task = replace(make_task("a"), family="magi1", model="4.5B_distill")
    others = {"preset": "flowcache_fast"}, {"prompt": "other"}, {"seed": 5}
    for changes in ({}, *others):
        renderer.render(replace(task, **changes), tmp_path)
    assert len(loads) == 1
    assert not any(job.keeps_partial for job in rendered)
    renderer.render(replace(task, settings=("runtime_config.scale_factor=0.5",)), tmp_path)
    assert len(loads) == 2


def test_what_a_video_is_made_from_is_told_by_contents_not_by_names(tmp_path: Path):
    renderer = importlib.import_module("sampling.renderer")
    presets = importlib.import_module("skyreels_v2.run").PRESETS
    model = tmp_path / "model"
    shutil.copytree(FOLDERS["skyreels_v2"] / "demo", model)
    preset = tmp_path / "own.yaml"
    preset.write_text((presets / "flowcache_fast.yaml").read_text())

    def origin(**changes: Any) -> dict[str, str]:
        task = replace(make_task("a", settings=SHORT), model=str(model), preset=str(preset))
        return renderer.Renderer("cpu").check(replace(task, **changes))

    first = origin()
    assert origin(prompt="other", seed=5) == first
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    assert origin(model=str(moved)) == first
    preset.write_text(preset.read_text() + "guidance: 3.5\n")
    edited = origin()
    assert edited["resolved_settings"] != first["resolved_settings"]
    assert edited["checkpoint"] == first["checkpoint"]
    spoil_weights(moved)
    assert origin(model=str(moved))["checkpoint"] != first["checkpoint"]
    for part in ("vae", "text_encoder", "tokenizer"):
        other = tmp_path / f"other {part}"
        shutil.copytree(model, other)
        path = sorted((other / part).glob("*.*"))[-1]
        path.write_bytes(path.read_bytes() + b" ")
        found = importlib.import_module("sampling.tasks").sketch_of(other / part)
        assert first[part] != found
        assert first[part] == origin()[part]


def spoil_weights(model: Path) -> None:
    """Change a weight of a transformer, as training does."""
    storage = importlib.import_module("safetensors.torch")
    path = importlib.import_module("skyreels_v2.checkpoint").find(str(model)).dit_files[0]
    weights = storage.load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1
    storage.save_file(weights, path)


def test_a_preset_that_is_edited_meanwhile_is_refused(tmp_path: Path):
    preset = tmp_path / "own.yaml"
    presets = importlib.import_module("skyreels_v2.run").PRESETS
    preset.write_text((presets / "vanilla.yaml").read_text())
    renderer = importlib.import_module("sampling.renderer").Renderer("cpu")
    task = replace(make_task("a", settings=SHORT), preset=str(preset))
    renderer.check(task)
    preset.write_text(preset.read_text() + "guidance: 3.5\n")
    with pytest.raises(ValueError, match="has changed since the start"):
        renderer.render(task, tmp_path)
