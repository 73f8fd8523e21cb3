"""VBench: its videos' names, its environment, its results in the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sampling_cases import (
    SCRIPTS,
)


def test_the_results_of_vbench_become_one_small_file(tmp_path: Path):
    for dimension, score in (("color", 0.9), ("scene", 0.5)):
        folder = tmp_path / "vbench" / dimension
        folder.mkdir(parents=True)
        result = {dimension: [score, [{"video_path": "a.mp4", "video_results": score}]]}
        (folder / "results_eval_results.json").write_text(json.dumps(result))
    command = [sys.executable, str(SCRIPTS / "vbench" / "collect.py"), str(tmp_path / "vbench")]
    subprocess.run([*command, str(tmp_path / "vbench.json")], check=True)
    content = json.loads((tmp_path / "vbench.json").read_text())
    assert content["mean_percent"] == pytest.approx(70)
    assert content["dimensions"] == {"color": 0.9, "scene": 0.5}
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / "vbench" / "collect.py"), str(tmp_path / "no"), "x.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "holds no */*_eval_results.json" in run.stderr


def test_the_evaluation_says_what_is_missing(tmp_path: Path):
    script = str(SCRIPTS / "vbench" / "evaluate.sh")
    for arguments, message in (
        ([], "give the folder of the videos"),
        ([str(tmp_path)], "holds no VBench: run bash scripts/vbench/setup.sh first"),
    ):
        run = subprocess.run(
            ["bash", script, *arguments],
            env=os.environ | {"VBENCH_VENV": str(tmp_path / "none")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 2
        assert message in run.stderr
