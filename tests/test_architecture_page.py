"""docs/architecture.md: its recipe is followed literally, its drawing is that of the files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowcache.report.architecture import FLOORS, WAYS, draw_architecture

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
PROMPT = "a red circle moving right on a black background"


def python_blocks(heading: str) -> list[str]:
    """Return the Python blocks below a heading of the page."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(name="copy", scope="module")
def _copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shared package with the policy of the page."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(
        REPOSITORY / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__")
    )
    path = folder / "common" / "flowcache" / "policies.py"
    written, listed = python_blocks("Add a policy")
    text = path.read_text(encoding="utf-8")
    before, entry = "\n\n# Settings ---", '        "vanilla": Vanilla,\n'
    assert before in text
    assert entry in text
    text = text.replace(before, f"\n\n{written}{before}").replace(entry, entry + listed)
    path.write_text(text, encoding="utf-8")
    return folder


def run(copy: Path, model: str, *arguments: str) -> str:
    models = [path.parents[1] for path in REPOSITORY.glob("FlowCache4*/*/model.py")]
    done = subprocess.run(
        [sys.executable, "-m", model, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [copy / "common", *models]))},
        capture_output=True,
        text=True,
        check=False,
        cwd=copy,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("model", ["skyreels_v2", "magi1"])
def test_the_policy_of_the_page_is_a_setting_of_both_models(copy: Path, model: str):
    assert "every_other" in run(copy, model, "--list-settings")
    where = ["--model", "demo", "--preset", "stride", "--prompt", PROMPT, "--dry-run"]
    plan = run(copy, model, *where, "--out", str(copy), "reuse.policy=every_other")
    assert "every_other reuse" in plan


def test_every_station_is_a_file_of_a_room():
    rooms = {room.folder for floor in FLOORS for room in floor}
    for stations in WAYS.values():
        for station in stations:
            assert (REPOSITORY / station).is_file(), station
            assert str(Path(station).parent) in rooms, station


def test_the_kept_drawing_is_that_of_the_files():
    """If not: python scripts/make_figures.py architecture"""
    kept = REPOSITORY / "assets" / "architecture.svg"
    assert kept.read_text(encoding="utf-8") == draw_architecture()


def test_every_folder_of_the_shared_package_is_a_room():
    rooms = {room.folder for floor in FLOORS for room in floor}
    for folder in (REPOSITORY / "common" / "flowcache").iterdir():
        if folder.is_dir() and list(folder.glob("*.py")):
            assert str(folder.relative_to(REPOSITORY)) in rooms, folder
