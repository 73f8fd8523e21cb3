"""How the launchers start several processes, and what they tell when one fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowcache.cli import EXIT_USER_ERROR, Parser
from flowcache.launch import main

PROCESS = """
import os, sys
if os.environ["RANK"] == "0":
    sys.stderr.write("error: ...\\n")
    sys.exit(int(sys.argv[1]))
"""


def launch(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    return subprocess.run(
        [sys.executable, "-m", "flowcache.launch", "2", str(script), *arguments],
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_mistake_of_the_user_is_what_the_first_process_says_and_no_more(tmp_path: Path):
    done = launch(tmp_path, "2")
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_USER_ERROR, "", "error: ...\n")


@pytest.mark.slow
def test_what_else_ends_a_process_is_told_by_torchrun(tmp_path: Path):
    done = launch(tmp_path, "3")
    assert done.returncode == 1
    assert "exitcode  : 3" in done.stderr


@pytest.mark.parametrize("num", ["0", "two", "-1", ""])
def test_a_number_of_processes_that_is_none_is_refused(
    num: str, capsys: pytest.CaptureFixture[str]
):
    assert main([num, "-m", "magi1"]) == EXIT_USER_ERROR
    told = f"error: GPUS={num} must be a whole number of processes, 1 or more\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(("rank", "code", "lines"), [("0", EXIT_USER_ERROR, 1), ("1", 0, 0)])
def test_wrong_arguments_are_told_by_the_first_process_alone(
    rank: str,
    code: int,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        Parser().parse_args(["--unknown"])
    assert (ended.value.code or 0) == code
    assert capsys.readouterr().err.count("\n") == lines
