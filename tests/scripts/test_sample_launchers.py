"""The launchers of VBench and Physics-IQ in the model folders."""

import importlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sampling_cases import (
    FOLDERS,
    SCRIPTS,
)

from flowcache.runtime.model import load_model

LAUNCHERS = [
    (family, f"{method}_{benchmark}")
    for family in FOLDERS
    for method in ("vanilla", "teacache", "flowcache")
    for benchmark in ("vbench", "physicsiq")
]

Launch = Callable[..., list[str]]


@pytest.fixture(name="launch")
def _launch(tmp_path: Path) -> Launch:
    """Return what runs a launcher and gives what it hands to Python."""
    copy, tools = tmp_path / "a copy", tmp_path / "tools"
    tools.mkdir()
    (copy / "scripts" / "sampling").mkdir(parents=True)
    shutil.copy(SCRIPTS / "sampling" / "launch.sh", copy / "scripts" / "sampling")
    (copy / "scripts" / "setup.sh").write_text(f'export PATH="{tools}:$PATH"\n')
    for folder in FOLDERS.values():
        shutil.copytree(folder / "scripts" / "sample", copy / folder.name / "scripts" / "sample")
    path = tools / "python"
    path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" python "$@" > "{tmp_path}/said"\n')
    path.chmod(0o755)

    def run(family: str, name: str, **variables: str) -> list[str]:
        path = copy / FOLDERS[family].name / "scripts" / "sample" / f"{name}.sh"
        clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        subprocess.run(["bash", str(path)], env=clean | variables, cwd=tmp_path, check=True)
        return (tmp_path / "said").read_text().split("\0")[:-1]

    return run


@pytest.mark.parametrize(("family", "name"), LAUNCHERS)
def test_a_launcher_makes_its_videos(
    sample: ModuleType, fake: list[Any], launch: Launch, family: str, name: str
):
    words = launch(family, name, GPUS="1")
    assert words[0] == "python"
    assert sample.main(words[2:]) == 0
    method, benchmark = name.split("_")
    assert {task.family for task in fake} == {family}
    assert all(task.preset.startswith(method) for task in fake)
    assert all((task.video is not None) == (benchmark == "physicsiq") for task in fake)
    presets = load_model(family).presets
    config = importlib.import_module("flowcache.runtime.config")
    for task in fake:  # the settings exist and fit
        preset = config.find_preset(presets, task.preset)
        assert preset.is_file()


def test_a_launcher_starts_as_many_processes_as_it_is_told(launch: Launch):
    words = launch("skyreels_v2", "flowcache_vbench", GPUS="4", PER_PROMPT="5", DIMENSIONS="color")
    assert words[:4] == ["python", "-m", "flowcache.launch", "4"]
    assert Path(words[4]).name == "sample.py"
    assert words[words.index("--per-prompt") + 1] == "5"
    assert words[words.index("--dimensions") + 1] == "color"
