"""VBench: its videos' names, its environment, its results in the table.

VBench itself is replaced by a program that reads and writes files as VBench 0.1.5 does: names from
`{prompt}-{i}` with the suffix of the first file it lists, results and prompts in one folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reproduce
import sample
from sampling_cases import SCRIPTS

from flowcache.bench.tasks import Task

FAKE_VBENCH = """#!{python}
import json, os, subprocess, sys
words = sys.argv[1:]
if "vbench.launch.evaluate" not in words:
    sys.exit(subprocess.run([{python!r}, *words]).returncode)
assert words[:3] == ["-m", "torch.distributed.run", "--standalone"]
words = words[words.index("vbench.launch.evaluate") + 1:]
given = dict(zip(words[::2], words[1::2]))
folder, dimension = given["--videos_path"], given["--dimension"]
out = given["--output_path"]
if dimension == "broken":
    sys.exit(1)
names = os.listdir(folder)
suffix = os.path.splitext(names[0])[1]
found = []
for prompt in json.load(open({prompts!r}))[dimension]:
    wanted = [f"{{prompt}}-{{i}}{{suffix}}" for i in range(5)]
    paths = [os.path.join(folder, name) for name in wanted if name in names]
    assert all(open(path, "rb").read() for path in paths)
    found.append({{"prompt_en": prompt, "dimension": [dimension], "video_list": paths}})
os.makedirs(out, exist_ok=True)
start = os.path.join(out, "results_2026-01-02-03:04:05")
each = [{{"video_path": path, "video_results": 0.5}} for one in found for path in one["video_list"]]
score = {{"color": 0.9, "scene": 0.5}}[dimension]
json.dump({{dimension: [score, each]}}, open(start + "_eval_results.json", "w"))
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
    venv, prompts = tmp_path / "a venv", tmp_path / "prompts.json"
    (venv / "bin").mkdir(parents=True)
    prompts.write_text(
        json.dumps({key: [text.strip() for text in texts] for key, texts in PROMPTS.items()})
    )
    (venv / "bin" / "vbench").write_text("#!/bin/sh\nexit 1\n")
    code = FAKE_VBENCH.format(python=sys.executable, prompts=str(prompts))
    (venv / "bin" / "python").write_text(code)
    for program in (venv / "bin").iterdir():
        program.chmod(0o755)
    return dict(os.environ) | {"VBENCH_VENV": str(venv), "DIMENSIONS": "color scene"}


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
        "color": {"score": 0.9, "num_prompts": 3, "num_videos": 6},
        "scene": {"score": 0.5, "num_prompts": 2, "num_videos": 4},
    }
    arguments = ["--protocol", str(copy / "small.yaml"), "--out", str(copy / "out")]
    assert reproduce.main(arguments) == 0
    rows = json.loads((copy / "out" / "table.json").read_text())["rows"]
    assert {row["method"]: row["figures"]["vbench"] for row in rows} == {
        "Vanilla": None,
        "every 2nd": pytest.approx(70),
        "the same | again": None,
    }
    assert reproduce.main(["--verify", str(copy / "out")]) == 0


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
