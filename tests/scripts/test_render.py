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

from flowcache.runtime.model import load_model
from flowcache.runtime.run import read_settings


@dataclass(frozen=True)
class Job:
    """What the renderer reads of a job."""

    config: Any
    source: Any
    model: Any
    device: torch.device
    dtype: torch.dtype
    work: Any
    before: None = None
    keeps_partial: bool = True


def test_a_model_is_loaded_once_for_all_prompts_seeds_and_methods(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    renderer = importlib.import_module("flowcache.bench.render")
    checkpoint = importlib.import_module("magi1.checkpoint").Checkpoint
    loads: list[str] = []

    def prepare(model: Any, request: Any) -> Job:
        config = read_settings(model, request)
        files = checkpoint(config, (Path("dit"),), Path("vae"), Path("t5"))
        return Job(
            config=config,
            source=SimpleNamespace(files=files),
            model=SimpleNamespace(
                name="magi1", load_text=lambda _job: None, identity=model.identity
            ),
            device=torch.device("cpu"),
            dtype=torch.float32,
            work=SimpleNamespace(kv_bytes=1),
        )

    def load(job: Any, **_: Any) -> None:
        loads.append(job.config.runtime_config.scale_factor)

    monkeypatch.setattr(renderer, "prepare", prepare)
    monkeypatch.setattr(renderer, "load_networks", load)
    monkeypatch.setattr(renderer, "encode_inputs", lambda *_, **__: None)
    rendered: list[Job] = []
    monkeypatch.setattr(renderer, "render", lambda job, *_, **__: rendered.append(job) or {})
    maker = renderer.Renderer("cpu")
    task = replace(make_task("a"), family="magi1", model="4.5B_distill")
    others = {"preset": "flowcache_fast"}, {"prompt": "other"}, {"seed": 5}
    for changes in ({}, *others):
        maker.render(replace(task, **changes), tmp_path)
    assert len(loads) == 1
    assert not any(job.keeps_partial for job in rendered)
    maker.render(replace(task, settings=("runtime_config.scale_factor=0.5",)), tmp_path)
    assert len(loads) == 2


def test_what_a_video_is_made_from_is_told_by_contents_not_by_names(tmp_path: Path):
    renderer = importlib.import_module("flowcache.bench.render")
    presets = load_model("skyreels_v2").presets
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
        found = importlib.import_module("flowcache.bench.tasks").sketch_of(other / part)
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
    presets = load_model("skyreels_v2").presets
    preset.write_text((presets / "vanilla.yaml").read_text())
    renderer = importlib.import_module("flowcache.bench.render").Renderer("cpu")
    task = replace(make_task("a", settings=SHORT), preset=str(preset))
    renderer.check(task)
    preset.write_text(preset.read_text() + "guidance: 3.5\n")
    with pytest.raises(ValueError, match="has changed since the start"):
        renderer.render(task, tmp_path)
