"""What the tests of the scripts share: the scripts on the path, small results to look at."""

import importlib
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from sampling_cases import (
    PROMPTS,
    SCRIPTS,
    make_file,
    write_physics_iq,
    write_protocol,
    write_vbench,
)

sys.path.append(str(SCRIPTS))

from flowcache.bench.render import Renderer
from flowcache.bench.tasks import VBENCH_DIMENSIONS, Task


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Leave the signals as they were."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(name="prompts")
def _prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(name="fake")
def _fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Task]:
    """Make files instead of videos in a folder with all data sets; returns the tasks made."""
    made: list[Task] = []

    def render(_self: Any, task: Task, folder: Path) -> dict[str, Any]:
        made.append(task)
        return make_file(task, folder)

    def check(self: Renderer, task: Task, **_: Any) -> dict[str, str]:
        self.costs[task.kind] = 1.0
        return {}

    monkeypatch.setattr(Renderer, "render", render)
    monkeypatch.setattr(Renderer, "check", check)
    monkeypatch.chdir(tmp_path)
    write_vbench(Path("VBench/prompts"))
    for dimension in VBENCH_DIMENSIONS:
        path = Path(f"VBench/prompts/prompts_per_dimension/{dimension}.txt")
        if not path.exists():
            path.write_text("a dog\n")
    write_physics_iq(Path("physics-IQ"))
    Path("prompts.txt").write_text("a cat\n")
    shutil.copytree(SCRIPTS / "protocols", "scripts/protocols")
    return made


@pytest.fixture(name="made", scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A protocol with its result folder, made once and left alone, without weights for LPIPS."""
    folder = tmp_path_factory.mktemp("table")
    given = ["--protocol", str(write_protocol(folder / "small.yaml")), "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        for script in ("sample", "reproduce"):
            assert importlib.import_module(script).main(given) == 0
        yield folder


@pytest.fixture(name="copy")
def _copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage."""
    monkeypatch.setenv("TORCH_HOME", str(made / "torch"))
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"
