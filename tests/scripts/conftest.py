"""What the tests of the scripts share: the scripts on the path, small results to look at."""

import importlib
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from sampling_cases import (
    PROMPTS,
    SCRIPTS,
    make_file,
    make_table,
    write_physics_iq,
    write_protocol,
    write_vbench,
)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Find the scripts' own packages, and leave the signals as they were."""
    monkeypatch.syspath_prepend(SCRIPTS)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(name="sample")
def _sample() -> ModuleType:
    return importlib.import_module("sample")


@pytest.fixture(name="reproduce")
def _reproduce() -> ModuleType:
    return importlib.import_module("reproduce")


@pytest.fixture(name="prompts")
def _prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(name="fake")
def _fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Make files instead of videos in a folder with all data sets; returns the tasks made."""
    renderer = importlib.import_module("flowcache.bench.render").Renderer
    made: list[Any] = []

    def render(_self: Any, task: Any, folder: Path) -> dict[str, Any]:
        made.append(task)
        return make_file(task, folder)

    monkeypatch.setattr(renderer, "render", render)
    monkeypatch.setattr(renderer, "check", lambda _self, _task, **_: {})
    monkeypatch.chdir(tmp_path)
    write_vbench(Path("VBench/prompts"))
    for dimension in importlib.import_module("flowcache.bench.prompts").VBENCH_DIMENSIONS:
        path = Path(f"VBench/prompts/prompts_per_dimension/{dimension}.txt")
        if not path.exists():
            path.write_text("a dog\n")
    write_physics_iq(Path("physics-IQ"))
    Path("prompts.txt").write_text("a cat\n")
    shutil.copytree(SCRIPTS / "protocols", "scripts/protocols")
    return made


@pytest.fixture(name="made", scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A result folder, made once and left alone, without weights for LPIPS."""
    folder = tmp_path_factory.mktemp("table")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        assert make_table(write_protocol(folder / "small.yaml"), folder / "out") == (0, 0)
        yield folder


@pytest.fixture(name="copy")
def _copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage."""
    monkeypatch.setenv("TORCH_HOME", str(made / "torch"))
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"
