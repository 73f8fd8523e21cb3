"""Where prompts come from, and what is said of mistakes in them."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from sampling_cases import (
    list_tasks,
    make_task,
    write_physics_iq,
    write_vbench,
)


def test_videos_of_vbench_have_its_names_and_a_prompt_of_two_dimensions_once(
    sample: ModuleType, tmp_path: Path
):
    folder = str(write_vbench(tmp_path / "VBench" / "prompts"))
    arguments = ["magi1", "--vbench", folder, "--dimensions", "color,scene", "--seed", "3"]
    tasks = list_tasks(sample, *arguments, "--per-prompt", "2")
    assert [(task.name, task.prompt, task.seed) for task in tasks] == [
        ("a red bird-0", "a red bird", 3),
        ("a red bird-1", "a red bird", 4),
        ("a white cat-0", "a white cat", 3),
        ("a white cat-1", "a white cat", 4),
        ("an alley-0", "an alley", 3),
        ("an alley-1", "an alley", 4),
    ]
    checkout = [*arguments[:1], "--vbench", str(tmp_path / "VBench"), *arguments[3:]]
    assert [task.name for task in list_tasks(sample, *checkout)] == [
        *("a red bird-0", "a white cat-0", "an alley-0")
    ]


def test_clips_of_physics_iq_are_continued_under_the_names_of_its_evaluation(
    sample: ModuleType, tmp_path: Path
):
    tasks = list_tasks(sample, "magi1", "--physics-iq", str(write_physics_iq(tmp_path)))
    assert [(task.name, task.prompt) for task in tasks] == [
        ("0001_perspective-left_trimmed-ball", "A ball, left."),
        ("0002_perspective-right_trimmed-ball", "A ball, right."),
    ]
    assert [Path(task.video).name[:4] for task in tasks] == ["0001", "0002"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["magi1", "--vbench", "nowhere"], "nowhere: holds no prompts_per_dimension folder: down"),
        (
            ["magi1", "--vbench", "v", "--dimensions", "taste"],
            "'taste' is no dimension .* color, s",
        ),
        (["magi1", "--physics-iq", "nowhere"], "nowhere: holds no descriptions.csv: download"),
        (["wan", "--prompts", "p.txt"], "the first argument must be skyreels_v2 or magi1, not wan"),
        (["magi1", "--prompts", "nowhere"], "nowhere: can't be read as text"),
        (
            ["magi1", "--prompts", "p.txt", "--per-prompt", "0"],
            "--per-prompt must be 1 to 10000",
        ),
        (["magi1", "--protocol", "x.yaml"], "--protocol says family and settings"),
        (["magi1", "--prompts", "p.txt", "--num-prompts", "1"], "--num-prompts is of a protocol"),
        (["--protocol", "x.yaml"], "x.yaml: no such file"),
        (["--protocol", "x.yaml", "--seed", "3"], "--protocol says the seed: leave out --seed"),
        (["skyreels_v2", "--prompts", "p.txt", "--preset", "x"], "preset 'x' is unknown"),
        (["skyreels_v2", "--prompts", "p.txt", "num_step=3"], "unknown key 'num_step', did you"),
    ],
)
def test_what_is_given_wrong_is_said_in_one_line(
    sample: ModuleType,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    write_vbench(tmp_path / "v")
    Path("p.txt").write_text("a cat\n")
    assert sample.main([*arguments, "--out", "out"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert importlib.import_module("re").search(message, lines[0]), lines[0]


def test_names_that_no_file_can_have_are_refused():
    tasks = importlib.import_module("sampling.tasks")
    for name in ("a/b", ".a", "", "x" * 300):
        with pytest.raises(ValueError, match="can't be the name of a video"):
            tasks.check_names([make_task(name)])
    with pytest.raises(ValueError, match="two videos would be named a"):
        tasks.check_names([make_task("a"), make_task("a")])
