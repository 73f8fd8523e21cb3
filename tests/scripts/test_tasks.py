"""Lists of videos: where prompts come from, what is refused, and alarms of what was made."""

import json
import re
from pathlib import Path

import pytest
import sample
from sampling.sources import Run, from_physics_iq
from sampling.tasks import Task
from sampling_cases import make_task, write_physics_iq, write_vbench

from flowcache.bench.tasks import alarms, check_names


def list_tasks(*arguments: str) -> list[Task]:
    options = sample.make_parser().parse_intermixed_args([*arguments, "--out", "o"])
    return sample.list_tasks(options, sample.vbench_prompts(options))


def test_videos_of_vbench_have_its_names_and_a_prompt_of_two_dimensions_once(tmp_path: Path):
    folder = str(write_vbench(tmp_path / "VBench" / "prompts"))
    arguments = ["--dimensions", "color,scene", "--seed", "3"]
    tasks = list_tasks("magi1", "--vbench", folder, *arguments, "--per-prompt", "2")
    assert [(task.name, task.prompt, task.seed) for task in tasks] == [
        (f"{prompt}-{i}", prompt, 3 + i)
        for prompt in ("a red bird", "a white cat", "an alley")
        for i in (0, 1)
    ]
    checkout = list_tasks("magi1", "--vbench", str(tmp_path / "VBench"), *arguments)
    assert [task.name for task in checkout] == ["a red bird-0", "a white cat-0", "an alley-0"]


def test_clips_of_physics_iq_are_continued_under_the_names_of_its_evaluation(tmp_path: Path):
    tasks = list_tasks("magi1", "--physics-iq", str(write_physics_iq(tmp_path)))
    assert [(task.name, task.prompt) for task in tasks] == [
        ("0001_perspective-left_trimmed-ball", "A ball, left."),
        ("0002_perspective-right_trimmed-ball", "A ball, right."),
    ]
    assert [Path(task.video or "").name[:4] for task in tasks] == ["0001", "0002"]
    # by the names that scripts outside the repository import
    template = Task("", "magi1", "auto", "flowcache_fast", "", 0)
    assert from_physics_iq(tmp_path, Run(template)) == tasks


def test_other_descriptions_of_physics_iq_are_used_and_kept_with_the_videos(
    fake: list[Task], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    table, out = tmp_path / "verified.csv", tmp_path / "out"
    given = ["magi1", "--out", str(out)]
    original = Path("physics-IQ/descriptions.csv").read_text()
    table.write_text(original.replace("A ball", "Static shot. A ball"))
    arguments = [*given, "--physics-iq", "physics-IQ", "--descriptions", str(table)]
    assert sample.main(arguments) == 0
    prompts = [task.prompt for task in fake]
    assert prompts == ["Static shot. A ball, left.", "Static shot. A ball, right."]
    assert (out / "descriptions.csv").read_text() == table.read_text()
    assert sample.main(arguments) == 0
    assert len(fake) == 2
    capfd.readouterr()
    assert sample.main(arguments[:-2]) == 2
    said = "descriptions.csv differs from physics-IQ/descriptions.csv and is kept: choose another"
    assert said in capfd.readouterr().err
    assert (out / "descriptions.csv").read_text() == table.read_text()
    assert sample.main([*given, "--prompts", "prompts.txt", "--descriptions", str(table)]) == 2
    assert "--descriptions are of Physics-IQ: give --physics-iq, too" in capfd.readouterr().err


@pytest.mark.parametrize("form", ["scenario", "names", "clips"])
@pytest.mark.parametrize("place", ["descriptions.csv", "descriptions/descriptions_original.csv"])
def test_of_two_takes_of_a_scene_the_first_is_generated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, place: str
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
        tasks = list_tasks("magi1", "--physics-iq", str(tmp_path))
    assert [task.name for task in tasks] == expected
    assert caplog.messages == [
        f"{tmp_path / place}: 2 of 4 rows are left out: Physics-IQ generates take-1 only"
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["0199_take-2_a.mp4,x,0199_a.mp4"], "has no row of take-1, which alone is generated"),
        (["t,x,0001_a.mp4", "t,y,0001_a.mp4"], "row 3, column generated_video_name: 0001_a is"),
        (["t,x,0001_a.mp4", "t, ,0001_b.mp4"], "row 3, column description is empty: fill it in"),
        (["t,x,0002_a.mp4"], r"no conditioning clip 0002_\*\.mp4: download"),
    ],
)
def test_a_table_of_physics_iq_that_says_nothing_clear_is_refused(
    tmp_path: Path, rows: list[str], said: str
):
    (tmp_path / "conditioning").mkdir()
    (tmp_path / "conditioning" / "0001_x.mp4").touch()
    head = "scenario,description,generated_video_name"
    (tmp_path / "descriptions.csv").write_text("\n".join([head, *rows]))
    with pytest.raises(ValueError, match=said):
        list_tasks("magi1", "--physics-iq", str(tmp_path))


PROMPTS = ("magi1", "--prompts", "p.txt")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["magi1", "--vbench", "nowhere"], "nowhere: holds no prompts_per_dimension folder: down"),
        (["magi1", "--vbench", "v", "--dimensions", "x"], "'x' is no dimension .* color, scene"),
        (["magi1", "--physics-iq", "nowhere"], "nowhere: holds no descriptions.csv: download"),
        (
            ["wan", *PROMPTS[1:]],
            "the first argument must be skyreels_v2 or magi1 or self_forcing, not wan",
        ),
        (["magi1", "--prompts", "nowhere"], r"nowhere: cannot be read \(No such file"),
        ([*PROMPTS, "--per-prompt", "0"], "--per-prompt must be 1 to 10000, not 0"),
        ([*PROMPTS, "--per-prompt", "1000000000"], "--per-prompt must be 1 to 10000, not 10000"),
        ([*PROMPTS, "--seed", "-1"], "--seed must be 0 to 9223372036854775807"),
        ([*PROMPTS, "--seed", str(2**63)], "--seed must be 0 to 9223372036854775807"),
        (
            [*PROMPTS, "--seed", str(2**63 - 1), "--per-prompt", "2"],
            "--seed must be 0 to 9223372036854775806",
        ),
        ([*PROMPTS, "--replicas", "2"], "--replicas is how many models --ray loads: give --ray"),
        ([*PROMPTS, "--ray", "--replicas", "0"], "--replicas must be 1 to 10000, not 0"),
        ([*PROMPTS, "--num-prompts", "1"], "--num-prompts is of a protocol"),
        ([*PROMPTS, "--dimensions", "color"], "--dimensions are of VBench: give --vbench, too"),
        (["magi1", "--protocol", "x.yaml"], "--protocol says family and settings"),
        (["--protocol", "x.yaml"], "x.yaml: no such file"),
        (["--protocol", "x.yaml", "--seed", "3"], "--protocol says the seed: leave out --seed"),
        ([*PROMPTS, "--preset", "x"], "preset 'x' is unknown"),
        ([*PROMPTS, "num_step=3"], "unknown key 'num_step'"),
    ],
)
def test_what_is_given_wrong_is_said_in_one_line_before_any_work(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
):
    monkeypatch.chdir(tmp_path)
    write_vbench(tmp_path / "v")
    Path("p.txt").write_text("a cat\n")
    assert sample.main([*arguments, "--out", "out"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(f"error: .*{said}", line), line
    assert list(tmp_path.rglob("*.mp4")) == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        *((name, "can't be the name of a video") for name in (["a/b"], [".a"], [""], ["x" * 300])),
        (["a", "a"], "two videos would be named a"),
    ],
)
def test_names_that_no_file_can_have_are_refused(names: list[str], said: str):
    with pytest.raises(ValueError, match=said):
        check_names([make_task(name) for name in names])


def test_videos_with_alarms_are_named(tmp_path: Path):
    reports = {"black": {"alarms": ["constant: of one colour"]}, "good": {"alarms": []}, "old": {}}
    for name, report in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    assert alarms(map(make_task, reports), tmp_path) == ["ALARM black: constant: of one colour"]
