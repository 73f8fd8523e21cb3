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


@pytest.mark.parametrize("form", ["scenario", "names", "clips"])
@pytest.mark.parametrize("place", ["descriptions.csv", "descriptions/descriptions_original.csv"])
def test_of_two_takes_of_a_scene_the_first_is_generated(
    sample: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, place: str
):
    clips = tmp_path / "split-videos" / "conditioning" / "24FPS"
    clips.mkdir(parents=True)
    rows = {
        "scenario": "{n}_perspective-left_take-{take}_trimmed-{what}.mp4,A {what}.,{n}_{what}.mp4",
        "names": ",A {what}.,{n}_take-{take}_{what}.mp4",
        "clips": ",A {what}.,{n}_{what}.mp4",
    }
    lines, expected = ["scenario,description,generated_video_name"], []
    for number, what, take in ((1, "roll", 1), (2, "fall", 1), (199, "roll", 2), (200, "fall", 2)):
        clip = f"{number:04d}_conditioning-videos_24FPS_take-{take}_trimmed-{what}.mp4"
        (clips / clip).touch()
        lines.append(rows[form].format(n=f"{number:04d}", what=what, take=take))
        if take == 1:
            expected.append(lines[-1].split(",")[-1].removesuffix(".mp4"))
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("\n".join(lines) + "\n")
    with caplog.at_level("INFO"):
        tasks = list_tasks(sample, "magi1", "--physics-iq", str(tmp_path))
    assert [task.name for task in tasks] == expected
    assert caplog.messages == [
        f"{tmp_path / place}: 2 of 4 rows are left out: Physics-IQ generates take-1 only"
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["0199_take-2_a.mp4,x,0199_a.mp4"], "has no row of take-1, which alone is generated"),
        (
            ["t,x,0001_a.mp4", "t,y,0001_a.mp4"],
            "row 3, column generated_video_name: 0001_a is",
        ),
        (["t,x,0001_a.mp4", "t, ,0001_b.mp4"], "row 3, column description is empty: fill it in"),
    ],
)
def test_a_table_of_physics_iq_that_says_nothing_clear_is_refused(
    sample: ModuleType, tmp_path: Path, rows: list[str], said: str
):
    (tmp_path / "conditioning").mkdir()
    (tmp_path / "conditioning" / "0001_x.mp4").touch()
    head = "scenario,description,generated_video_name"
    (tmp_path / "descriptions.csv").write_text("\n".join([head, *rows]))
    with pytest.raises(ValueError, match=said):
        list_tasks(sample, "magi1", "--physics-iq", str(tmp_path))


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
        (["magi1", "--prompts", "nowhere"], r"nowhere: cannot be read \(No such file"),
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
    tasks = importlib.import_module("flowcache.bench.tasks")
    for name in ("a/b", ".a", "", "x" * 300):
        with pytest.raises(ValueError, match="can't be the name of a video"):
            tasks.check_names([make_task(name)])
    with pytest.raises(ValueError, match="two videos would be named a"):
        tasks.check_names([make_task("a"), make_task("a")])


@pytest.mark.usefixtures("sample")  # it puts scripts/ on the path
def test_scripts_import_the_plan_of_physics_iq_from_sampling(tmp_path: Path):
    sources, tasks = (importlib.import_module(f"sampling.{name}") for name in ("sources", "tasks"))
    plan = sources.from_physics_iq(
        write_physics_iq(tmp_path), sources.Run(tasks.Task("", "magi1", "auto", "vanilla", "", 0))
    )
    assert all(isinstance(task, tasks.Task) for task in plan)
    assert plan
