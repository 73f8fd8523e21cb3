"""What commands print and write, as text. The command below writes the files anew; read the diff.

    python -m pytest tests/snapshots -m "slow or not slow" --force-regen

Numbers that depend on the processor (seconds, measured memory, distances, floats of a run) are left
out: two runs of different commits are compared bit for bit by scripts/compare_commits.py.
"""

import json
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_regressions.file_regression import FileRegressionFixture

REPOSITORY = Path(__file__).parents[2]
FOLDERS = {
    "skyreels_v2": REPOSITORY / "FlowCache4SkyReels-V2",
    "magi1": REPOSITORY / "FlowCache4MAGI-1",
}
PRESETS = [
    (model, path.stem)
    for model, folder in FOLDERS.items()
    for path in sorted((folder / "configs").glob("*.yaml"))
]
RELEASED = {"skyreels_v2": "df-1.3b-540p", "magi1": "4.5B_distill"}
"""A model that is planned by its sizes."""
PROMPT = "a red circle moving right on a black background"
SHORT = {
    "skyreels_v2": ("num_frames=57", "base_num_frames=37", "overlap_history=17", "num_steps=12"),
    "magi1": ("runtime_config.num_frames=96", "runtime_config.num_steps=16"),
}
COMMANDS = {
    **{model: f"-m {model}" for model in FOLDERS},
    "generate_video_df": "FlowCache4SkyReels-V2/generate_video_df.py",
    "generate_video": "FlowCache4SkyReels-V2/generate_video.py",
    "entry": "FlowCache4MAGI-1/inference/pipeline/entry.py",
    **{path.stem: f"scripts/{path.name}" for path in sorted((REPOSITORY / "scripts").glob("*.py"))},
}
"""Name -> what Python runs, from the repository's folder."""
COUNTED = re.compile(r"seconds|environment|probe|timeline|peak_memory|alarms|version|commit")
"""In a key: another value on another machine."""
PROTOCOL = Path(__file__).with_name("small.yaml")
BENCHED = {
    "skyreels_v2": ("vanilla", "num_frames=9", "base_num_frames=9", "num_steps=6"),
    "magi1": ("vanilla", "runtime_config.num_frames=24", "runtime_config.num_steps=8"),
}
"""Model -> a method without reuse and settings that make it take seconds."""
LISTS = {
    "flops_paper": ("flops.py", "--paper"),
    "flops": ("flops.py", "df-1.3b-540p", "--preset", "flowcache_slow"),
}
NUMBER = re.compile(r"(?<![\w.])\d[\d.,]*(e[+-]?\d+)?(?![\w.])")
DIGEST = re.compile(r"\b[0-9a-f]{40,}\b")

Run = Callable[..., str]
"""`(command, *arguments) -> standard output`"""


@pytest.fixture(name="run")
def _run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Run]:
    """Return what runs a command in this process, which saves it importing PyTorch."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # no weights for LPIPS
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    # commands change how the process ends
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(command: str, *arguments: str) -> str:
        code: object = 0
        try:
            if command.startswith("-m "):
                monkeypatch.setattr(sys, "argv", [command, *arguments])
                runpy.run_module(command.removeprefix("-m "), run_name="__main__", alter_sys=True)
            else:
                monkeypatch.setattr(sys, "argv", [str(REPOSITORY / command), *arguments])
                runpy.run_path(str(REPOSITORY / command), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        out, err = capfd.readouterr()
        assert code in (0, None), err
        return without_places(out, tmp_path)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def without_places(text: str, *folders: Path) -> str:
    """Return a text with the folders of this machine left out of its paths."""
    for folder in (*folders, REPOSITORY):
        text = text.replace(f"{folder}/", "").replace(f"{folder}", ".")
    return text


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse wraps usage in another way")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command(name: str, run: Run, file_regression: FileRegressionFixture):
    file_regression.check(run(COMMANDS[name], "--help"))


@pytest.mark.parametrize("model", FOLDERS)
def test_the_settings_of_a_model(model: str, run: Run, file_regression: FileRegressionFixture):
    file_regression.check(run(f"-m {model}", "--model", "demo", "--list-settings"))


@pytest.mark.parametrize(("model", "preset"), PRESETS)
def test_the_plan_of_a_demo(
    model: str, preset: str, run: Run, tmp_path: Path, file_regression: FileRegressionFixture
):
    file_regression.check(plan(run, tmp_path, model, "demo", preset))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "preset"), [each for each in PRESETS if "tuned" not in each[1]])
def test_the_plan_at_a_released_size(
    model: str, preset: str, run: Run, tmp_path: Path, file_regression: FileRegressionFixture
):
    """A tuned preset is left out: its profile is the demo's."""
    file_regression.check(plan(run, tmp_path, model, RELEASED[model], preset))


def plan(run: Run, folder: Path, model: str, checkpoint: str, preset: str) -> str:
    """Return what --dry-run prints."""
    where = ["--model", checkpoint, "--preset", preset, "--out", str(folder / "o.mp4")]
    return run(f"-m {model}", *where, "--prompt", PROMPT, "--dry-run", "device=cpu")


@pytest.mark.parametrize("model", FOLDERS)
def test_the_files_of_a_run(
    model: str, run: Run, tmp_path: Path, file_regression: FileRegressionFixture
):
    out = tmp_path / "o.mp4"
    where = ["--model", "demo", "--preset", "flowcache_fast", "--out", str(out), "--record"]
    run(f"-m {model}", *where, "--prompt", PROMPT, "device=cpu", *SHORT[model])
    files = {}
    for suffix in (".json", ".record.json"):
        text = without_places(out.with_suffix(suffix).read_text(), tmp_path)
        files[suffix] = shape(json.loads(text))
    file_regression.check(json.dumps(files, indent=1, ensure_ascii=False), extension=".json")


@pytest.mark.parametrize("name", LISTS)
def test_what_is_listed_without_a_run(name: str, run: Run, file_regression: FileRegressionFixture):
    script, *arguments = LISTS[name]
    file_regression.check(run(f"scripts/{script}", *arguments))


def test_the_table_of_a_protocol(run: Run, tmp_path: Path, file_regression: FileRegressionFixture):
    out = tmp_path / "out"
    where = ["--protocol", str(PROTOCOL), "--out", str(out)]
    run("scripts/sample.py", *where)
    table = run("scripts/reproduce.py", *where, "--device", "cpu")
    header, *_ = (out / "table.csv").read_text().splitlines()
    file_regression.check(f"{without_numbers(table)}\n{header}\n", extension=".md")


@pytest.mark.parametrize("model", BENCHED)
def test_the_table_of_all_methods(
    model: str, run: Run, tmp_path: Path, file_regression: FileRegressionFixture
):
    method, *settings = BENCHED[model]
    where = ["--architecture", model, "--prompts", "1", "--out", str(tmp_path), "--methods", method]
    run("scripts/bench_demo.py", "device=cpu", *settings, *where)
    tables = sorted(tmp_path.rglob("*.md"))
    assert tables
    text = "\n".join(path.read_text() for path in tables)
    file_regression.check(without_numbers(without_places(text, tmp_path)), extension=".md")


def without_numbers(markdown: str) -> str:
    """Return a table with `#` for every number; what was measured where is left out altogether."""
    lines = [
        NUMBER.sub("#", DIGEST.sub("#", re.sub(r"commit \S+", "commit #", line)))
        for line in markdown.splitlines()
    ]
    return "\n".join(lines) + "\n"


def shape(value: Any, *, is_setting: bool = False) -> Any:
    """Return a JSON value with its names alone: types in place of numbers, no lengths of lists.

    Settings stay: they are given, not computed. Of a list each different shape is shown once, in
    alphabetical order, since processors may differ in which decision comes first.
    """
    if isinstance(value, dict):
        return {
            "NUMBER" if key.isdecimal() else key: type(own).__name__
            if COUNTED.search(key)
            else shape(own, is_setting=is_setting or key == "config")
            for key, own in value.items()
        }
    if is_setting:
        return value
    if isinstance(value, list):
        if not any(isinstance(item, (dict, list)) for item in value):
            return [type(item).__name__ if _is_number(item) else item for item in value]
        shapes = {json.dumps(shape(item), ensure_ascii=False) for item in value}
        return [json.loads(text) for text in sorted(shapes)]
    return type(value).__name__ if _is_number(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))
