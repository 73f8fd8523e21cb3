"""The command that counts FLOPs: published figures, their parts, runs of released models."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[2] / "scripts" / "flops.py"


@pytest.fixture(name="script", scope="module")
def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flops_script", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_table_holds_the_published_figures_and_their_parts(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
):
    assert script.main(["--paper"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    counted = [re.sub(r"[^\d.TPF]", "", row[2]) for row in rows]
    assert counted == [
        *("98.76TF", "61.68TF"),
        *("306.0PF", "280.3PF", "207.3PF", "181.6PF", "139.2PF"),
        *("420.73TF", "612.50TF"),
        *("113.6PF", "165.4PF", "79.7PF"),
    ]
    published = {row[2]: row[3].strip(" |") for row in rows if row[3:] and row[3].strip(" |")}
    assert published == {"306.0 PF": "306 PF", "139.2 PF": "139 PF", "113.6 PF": "113 PF"}


def test_the_two_windows_take_70_and_65_ticks(script: ModuleType):
    assert script.skyreels_ticks() == 70 + 65


@pytest.mark.parametrize(
    ("arguments", "pflops"),
    [
        (["df-1.3b-540p"], 165),
        (["df-1.3b-540p", "--preset", "flowcache_slow"], 79.5),
    ],
)
def test_a_released_model_is_counted_without_its_files(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], pflops: float
):
    assert script.main(arguments) == 0
    found = re.search(r"([\d.]+) PFLOP if every step is computed", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) == pytest.approx(pflops, rel=0.003)


def test_every_example_of_the_help_runs(script: ModuleType, capsys: pytest.CaptureFixture[str]):
    lines = [line.strip() for line in script.EXAMPLES.splitlines() if "scripts/flops.py" in line]
    assert len(lines) >= 3
    for line in lines:
        assert script.main(line.split()[2:]) == 0, line
    assert capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(line in text for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --paper or a model"),
        (["--paper", "df-1.3b-540p"], "either --paper or a model"),
        (["4.5B_distill"], "4.5B_distill is no released model of SkyReels-V2"),
        (["df-1.3b-540p", "num_frames=98"], "num_frames must be 4 n + 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
):
    assert script.main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
