"""Models loaded once, what a video is made from, and the GPUs."""

import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling_cases import FOLDERS, SHORT, make_task

from flowcache.bench import render as renderer
from flowcache.bench.render import Renderer
from flowcache.bench.tasks import sketch_of
from flowcache.runtime.model import load_model
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import read_settings
from magi1.checkpoint import Checkpoint
from skyreels_v2.model import FOLDERS as CHECKPOINTS


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
    ranks: Ranks = field(default_factory=Ranks)


def test_a_model_is_loaded_once_for_all_prompts_seeds_and_methods(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    loads: list[str] = []
    rendered: list[Job] = []

    def prepare(model: Any, request: Any) -> Job:
        config = read_settings(model, request)
        files = Checkpoint(config, (Path("dit"),), Path("vae"), Path("t5"))
        encoder = {"name": "magi1", "load_text": lambda _job: None, "identity": model.identity}
        encoder["residence"] = model.residence
        source, work = SimpleNamespace(files=files), SimpleNamespace(kv_bytes=1)
        device, own = torch.device("cpu"), SimpleNamespace(**encoder)
        return Job(config, source, own, device, torch.float32, work)

    def load(job: Any, **_: Any) -> None:
        loads.append(job.config.runtime_config.scale_factor)

    monkeypatch.setattr(renderer, "prepare", prepare)
    monkeypatch.setattr("flowcache.runtime.run.load_networks", load)
    monkeypatch.setattr(renderer, "encode_inputs", lambda *_, **__: None)
    monkeypatch.setattr(renderer, "render", lambda job, *_, **__: rendered.append(job) or {})
    maker = Renderer("cpu")
    task = make_task("a", family="magi1", model="4.5B_distill")
    for changes in ({}, {"preset": "flowcache_fast"}, {"prompt": "other"}, {"seed": 5}):
        maker.render(replace(task, **changes), tmp_path)
    assert len(loads) == 1
    assert not any(job.keeps_partial for job in rendered)
    maker.render(replace(task, settings=("runtime_config.scale_factor=0.5",)), tmp_path)
    assert len(loads) == 2
    for number, setting in enumerate(("attention_kernel=torch", "compile=true", "offload=true")):
        maker.render(replace(task, settings=(setting,)), tmp_path)
        assert len(loads) == 3 + number


def write_preset(path: Path, name: str) -> Path:
    path.write_text((load_model("skyreels_v2").presets / f"{name}.yaml").read_text())
    return path


def test_what_a_video_is_made_from_is_known_by_contents_not_by_names(tmp_path: Path):
    model = shutil.copytree(FOLDERS["skyreels_v2"] / "demo", tmp_path / "model")
    preset = write_preset(tmp_path / "own.yaml", "flowcache_fast")

    def origin(**changes: Any) -> dict[str, str]:
        given = {"settings": SHORT, "model": str(model), "preset": str(preset), **changes}
        return dict(Renderer("cpu").check(make_task("a", **given)))

    first = origin()
    assert origin(prompt="other", seed=5) == first
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    assert origin(model=str(moved)) == first
    preset.write_text(preset.read_text() + "guidance: 3.5\n")
    edited = origin()
    assert edited["resolved_settings"] != first["resolved_settings"]
    assert edited == {**first, "resolved_settings": edited["resolved_settings"]}
    path = CHECKPOINTS.find(str(moved)).dit.files[0]
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1  # as training does
    save_file(weights, path)
    assert origin(model=str(moved))["checkpoint"] != first["checkpoint"]
    for part in ("vae", "text_encoder", "tokenizer"):
        path = sorted((moved / part).glob("*.*"))[-1]
        path.write_bytes(path.read_bytes() + b" ")
        assert sketch_of(moved / part) != first[part] == sketch_of(model / part)


def test_a_preset_that_is_edited_meanwhile_is_refused(tmp_path: Path):
    preset = write_preset(tmp_path / "own.yaml", "vanilla")
    maker, task = Renderer("cpu"), make_task("a", settings=SHORT, preset=str(preset))
    origin = maker.check(task)
    for changes in ({}, {"prompt": "other"}, {"seed": 5}):
        job = maker._prepare(replace(task, **changes), tmp_path)
        assert renderer.hash_settings(job) == origin["resolved_settings"]
    preset.write_text(preset.read_text() + "guidance: 3.5\n")
    with pytest.raises(ValueError, match="has changed since the start"):
        maker.render(task, tmp_path)


def test_a_sketch_depends_on_names_sizes_and_contents(tmp_path: Path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    path = folder / "model.bin"
    path.write_bytes(os.urandom(3 * 2**20))
    (folder / "config.json").write_text("{}")
    first = sketch_of(folder)
    path.rename(folder / "other.bin")
    assert sketch_of(folder) != first
    (folder / "other.bin").rename(path)
    assert sketch_of(folder) == first
    content = bytearray(path.read_bytes())
    content[2**20 + 5] ^= 1  # of so small a file every byte counts
    path.write_bytes(content)
    assert sketch_of(folder) != first
    assert sketch_of(path) != sketch_of(folder / "config.json")


def test_the_clocks_of_every_gpu_are_read_with_their_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert renderer.describe_gpus() == []
    tool = tmp_path / "nvidia-smi"
    line = "NVIDIA A800, 550.54, 81920 MiB, 1410 MHz, 1410 MHz, 1593 MHz, 61, 400.00 W"
    tool.write_text(f'#!/bin/sh\n[ "$2" = --format=csv,noheader ] && echo "{line}\n{line}"\n')
    tool.chmod(0o755)
    found = renderer.describe_gpus()
    assert len(found) == 2
    assert list(found[0]) == list(renderer.GPU_FIELDS)
    assert found[1]["clocks.sm"] == "1410 MHz"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert renderer.describe_gpus() == []
