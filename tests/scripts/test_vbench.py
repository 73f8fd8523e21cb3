"""VBench: its videos' names, its environment, its results in the table.

VBench itself is replaced by a package that reads and writes files as VBench 0.1.5 does (names from
`{prompt}-{i}` with the suffix of the first file it lists, results and prompts in one folder), but
for one slow test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reproduce
import sample
from sampling_cases import REPOSITORY, SCRIPTS

from flowcache.bench.tasks import Task
from flowcache.runtime.video import read_video

FAKE_VBENCH = """import json, os
class VBench:
    def __init__(self, device, full_info, out):
        assert device.type in ("cpu", "cuda")
        self.full_info, self.out = full_info, out
        os.makedirs(out, exist_ok=True)
    def evaluate(self, *, videos_path, name, dimension_list, **_):
        (dimension,) = dimension_list
        if dimension == "broken":
            raise NotImplementedError(dimension)
        names = os.listdir(videos_path)
        suffix = os.path.splitext(names[0])[1]
        found = [each for each in json.load(open(self.full_info)) if dimension in each["dimension"]]
        for each in found:
            wanted = [each["prompt_en"] + f"-{i}{suffix}" for i in range(5)]
            paths = [os.path.join(videos_path, one) for one in wanted if one in names]
            assert all(open(path, "rb").read() for path in paths)
            each["video_list"] = paths
        start = os.path.join(self.out, name)
        value = lambda n: {"color": 0.9, "scene": 0.3 + 0.4 * bool(n)}[dimension]
        results = [
            {"video_path": path, "video_results": value(n)}
            for n, each in enumerate(found) for path in each["video_list"]
        ]
        score = {"color": 0.9, "scene": 0.5}[dimension]
        json.dump({dimension: [score, results]}, open(start + "_eval_results.json", "w"))
        json.dump(found, open(start + "_full_info.json", "w"))
"""

PROMPTS = {
    "color": [
        'A corgi\'s head depicted as an "explosion" of a nebula, 100 % $HOME `x` #1; ü & more?',
        "Snow rocky mountains peaks canyon. " + "the canyons twist and bend, " * 6,
        "a white cat",
    ],
    "scene": ["a white cat", "alley"],
}


@pytest.fixture(name="environment")
def _environment(tmp_path: Path) -> dict[str, str]:
    """The variables of an environment in which VBench is there."""
    venv, package = tmp_path / "a venv", tmp_path / "packages" / "vbench"
    (venv / "bin").mkdir(parents=True)
    package.mkdir(parents=True)
    rows: dict[str, list[str]] = {}
    for dimension, texts in PROMPTS.items():
        for text in texts:
            rows.setdefault(text.strip(), []).append(dimension)
    content = [{"prompt_en": text, "dimension": dimensions} for text, dimensions in rows.items()]
    (package / "VBench_full_info.json").write_text(json.dumps(content))
    (package / "__init__.py").write_text(FAKE_VBENCH)
    (package / "distributed.py").write_text("def dist_init(): raise AssertionError\n")
    (venv / "bin" / "vbench").write_text("#!/bin/sh\nexit 1\n")
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in (venv / "bin").iterdir():
        program.chmod(0o755)
    return dict(os.environ) | {
        "VBENCH_VENV": str(venv),
        "DIMENSIONS": "color scene",
        "PYTHONPATH": str(package.parent),
    }


@pytest.fixture(name="sampled")
def _sampled(fake: list[Task], tmp_path: Path) -> Path:
    """Two files per prompt under the names that sample.py gives, with receipts."""
    for dimension, texts in PROMPTS.items():
        path = Path(f"VBench/prompts/prompts_per_dimension/{dimension}.txt")
        path.write_text("\n".join(texts) + "\n")
    out = tmp_path / "the videos"
    arguments = ["magi1", "--vbench", "VBench/prompts", "--dimensions", "color,scene"]
    assert sample.main([*arguments, "--per-prompt", "2", "--out", str(out)]) == 0
    assert len(fake) == 8
    return out


def evaluate(*arguments: object, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = str(SCRIPTS / "vbench" / "evaluate.sh")
    return subprocess.run(
        ["bash", script, *map(str, arguments)],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_sample_names_vbench_finds_and_its_score_gets_into_the_table(
    sampled: Path, environment: dict[str, str], copy: Path
):
    target = copy / "out" / "videos" / "half"
    run = evaluate(sampled, target, variables=environment)
    assert run.returncode == 0, run.stderr
    content = json.loads((sampled / "vbench.json").read_text())
    assert content["mean_percent"] == pytest.approx(70)
    assert content["dimensions"] == {
        "color": {"score": 0.9, "half_interval_95": 0.0, "num_prompts": 3, "num_videos": 6},
        # of .3 and .7: 1.95996 times their deviation .2828 / sqrt 2
        "scene": {
            "score": 0.5,
            "half_interval_95": pytest.approx(0.391993, abs=1e-6),
            "num_prompts": 2,
            "num_videos": 4,
        },
    }
    assert content["half_interval_95_percent"] == pytest.approx(39.1993 / 2, abs=1e-3)
    assert "scene: 50.00 +- 39.20 % (2 prompts)" in run.stdout
    arguments = ["--protocol", str(copy / "small.yaml"), "--out", str(copy / "out")]
    assert reproduce.main(arguments) == 0
    rows = json.loads((copy / "out" / "table.json").read_text())["rows"]
    assert {row["method"]: row["figures"]["vbench"] for row in rows} == {
        "Vanilla": None,
        "every 2nd": pytest.approx(70),
        "the same | again": None,
    }
    assert reproduce.main(["--verify", str(copy / "out")]) == 0


def test_a_part_of_the_prompts_is_scored_alone_and_keeps_to_them(
    fake: list[Task], environment: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    for dimension, texts in PROMPTS.items():
        path = Path(f"VBench/prompts/prompts_per_dimension/{dimension}.txt")
        path.write_text("\n".join(texts) + "\n")
    out = tmp_path / "part"
    arguments = ["magi1", "--vbench", "VBench/prompts", "--out", str(out), "--dimensions"]
    assert sample.main([*arguments, "color", "--num-prompts", "2"]) == 0
    assert sample.main([*arguments, "scene", "--num-prompts", "1"]) == 0
    first, second, third = (text.strip() for text in PROMPTS["color"])
    kept = {"color": [first, second], "scene": [third]}
    assert json.loads((out / "vbench_prompts.json").read_text()) == kept
    assert len(fake) == 3
    run = evaluate(out, variables=environment)
    assert run.returncode == 0, run.stderr
    dimensions = json.loads((out / "vbench.json").read_text())["dimensions"]
    assert {key: each["num_prompts"] for key, each in dimensions.items()} == {
        "color": 2,
        "scene": 1,
    }
    assert dimensions["scene"]["half_interval_95"] is None
    (out / f"{second}-0.mp4").unlink()
    run = evaluate(out, variables=environment)
    assert run.returncode == 2
    assert "1 of 2 prompts of color have no video" in run.stderr
    # all prompts again: the note goes
    assert sample.main([*arguments, "color,scene"]) == 0
    assert json.loads((out / "vbench_prompts.json").read_text()) == {}
    capfd.readouterr()
    assert sample.main([*arguments, "color", "--num-prompts", "4"]) == 2
    said = "--num-prompts must be 1 to 3, the prompts of color, not 4"
    assert said in capfd.readouterr().err


VENV = Path(os.environ.get("VBENCH_VENV", REPOSITORY / ".venv-vbench"))


@pytest.mark.slow
@pytest.mark.skipif(
    not (VENV / "vbench.stamp").is_file(),
    reason="needs VBench: DETECTRON2= bash scripts/vbench/setup.sh",
)
def test_vbench_itself_scores_clips_of_the_demo(tmp_path: Path):
    """Its dimension without a model: 1 - the mean absolute change between frames / 255."""
    (package,) = VENV.glob("lib/python*/site-packages/vbench")
    rows = json.loads((package / "VBench_full_info.json").read_text())
    folder = tmp_path / "prompts" / "prompts_per_dimension"
    folder.mkdir(parents=True)
    texts = [row["prompt_en"] for row in rows if "temporal_flickering" in row["dimension"]]
    (folder / "temporal_flickering.txt").write_text("\n".join(texts) + "\n")
    out = tmp_path / "videos"
    given = ["--dimensions", "temporal_flickering", "--num-prompts", "3", "--out", str(out)]
    given += ["--vbench", str(folder.parent), "--model", "demo", "num_frames=33", "num_steps=8"]
    assert sample.main(["skyreels_v2", *given]) == 0
    variables = dict(os.environ) | {"DIMENSIONS": "temporal_flickering"}
    run = evaluate(out, variables=variables | {"VBENCH_VENV": str(VENV), "PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr
    expected: list[float] = []
    for path in out.glob("*.mp4"):
        frames_THW3 = read_video(path)[0].astype(np.float64)
        expected.append(1 - np.abs(np.diff(frames_THW3, axis=0)).mean() / 255)
    content = json.loads((out / "vbench.json").read_text())
    assert len(expected) == 3
    # another decoder's colours
    assert content["mean_percent"] == pytest.approx(100 * np.mean(expected), abs=0.05)
    half = 100 * 1.95996 * np.std(expected, ddof=1) / np.sqrt(3)
    assert content["half_interval_95_percent"] == pytest.approx(half, abs=0.05)


def test_an_evaluation_that_fails_or_lacks_a_video_leaves_no_score(
    sampled: Path, environment: dict[str, str]
):
    run = evaluate(sampled, variables=environment | {"DIMENSIONS": "color broken"})
    assert run.returncode != 0
    for path in sampled.glob("alley-*"):
        path.unlink()
    run = evaluate(sampled, variables=environment)
    assert run.returncode == 2
    assert "1 of 2 prompts of scene have no video, as in 'alley'" in run.stderr
    assert not (sampled / "vbench.json").exists()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "holds no *_eval_results.json: evaluate color"),
        ({"color": [1.5, []]}, "color is 1.5, but must be in 0..1"),
        ({"color": [float("nan"), []]}, "color is nan, but must be in 0..1"),
        ({"scene": [0.5, []]}, "KeyError: 'color'"),
    ],
)
def test_results_that_are_no_score_are_refused(tmp_path: Path, result: Any, message: str):
    folder = tmp_path / "color"
    folder.mkdir()
    if result is not None:
        (folder / "a_eval_results.json").write_text(json.dumps(result))
        (folder / "a_full_info.json").write_text("[]")
    command = [sys.executable, str(SCRIPTS / "vbench" / "collect.py"), str(tmp_path)]
    run = subprocess.run(
        [*command, str(tmp_path / "x.json"), "color"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert message in run.stderr
    assert not (tmp_path / "x.json").exists()


def test_the_evaluation_says_what_is_missing(tmp_path: Path):
    variables = dict(os.environ) | {"VBENCH_VENV": str(tmp_path / "none")}
    for arguments, message in (
        ([], "give the folder of the videos"),
        ([tmp_path, tmp_path / "no"], "no: no such folder: make the table's videos first"),
        ([tmp_path], "holds no VBench: run bash scripts/vbench/setup.sh first"),
    ):
        run = evaluate(*arguments, variables=variables)
        assert run.returncode == 2
        assert message in run.stderr


def test_the_environment_is_made_once_and_a_failure_is_tried_again(tmp_path: Path):
    """Python is replaced by a program that notes what it is asked for."""
    tools, venv, said = tmp_path / "tools", tmp_path / "venv", tmp_path / "said"
    tools.mkdir()
    note = f'echo "$@" >> "{said}"\n'
    for name in ("wget", "unzip", "git"):
        (tools / name).write_text("#!/bin/sh\n")
    (tools / "python-old").write_text(
        f'#!/bin/sh\n{note}mkdir -p "$3/bin"; cp "{tools}/pip-stand-in" "$3/bin/python"\n'
    )
    stand_in = '#!/bin/sh\n{note}case "$*" in *vbench==*) exit {code};; esac\n'
    for tool in tools.iterdir():
        tool.chmod(0o755)
    variables = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "VBENCH_VENV": str(venv),
        "PYTHON": "python-old",
    }

    def start(code: int, **more: str) -> int:
        (tools / "pip-stand-in").write_text(stand_in.format(note=note, code=code))
        (tools / "pip-stand-in").chmod(0o755)
        said.write_text("")
        command = ["bash", str(SCRIPTS / "vbench" / "setup.sh")]
        return subprocess.run(command, env=variables | more, check=False).returncode

    assert start(1) == 1
    assert start(0) == 0
    words = said.read_text().splitlines()
    assert words[0] == f"-m venv {venv}"
    assert words[1] == "-m pip install torch==2.1.2 torchvision==0.16.2 numpy<2 setuptools<81 wheel"
    assert words[2] == "-m pip install vbench==0.1.5"
    assert words[3].startswith("-m pip install --no-build-isolation detectron2@git+https://")
    assert start(0) == 0
    assert said.read_text() == ""
    assert start(0, DETECTRON2="") == 0
    assert "detectron2" not in said.read_text()
    assert start(0, PYTHON="python-none", DETECTRON2="") == 0  # made already
    assert start(0, PYTHON="python-none") == 2
