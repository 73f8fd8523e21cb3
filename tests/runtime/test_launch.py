"""How the launchers start several processes, and what they say when one fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from signals import heed_signals

from flowcache.launch import main
from flowcache.runtime.cli import Parser
from flowcache.runtime.ending import EXIT_USER_ERROR

PROCESS = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
Path(f"pid{rank}").write_text(str(os.getpid()))
"""


def start(tmp_path: Path, process: str) -> "subprocess.Popen[str]":
    """Start two processes of a script that imports nothing large."""
    script = tmp_path / "process.py"
    script.write_text(PROCESS + process)
    return subprocess.Popen(
        [sys.executable, "-m", "flowcache.launch", "2", str(script)],
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=heed_signals,
    )


def pids(tmp_path: Path) -> list[int]:
    deadline = time.monotonic() + 60
    paths = [tmp_path / f"pid{rank}" for rank in range(2)]
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(path.read_text()) for path in paths]


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("process", "code", "said"),
    [
        (
            "sys.exit(0)",
            0,
            "",
        ),
        (
            "if rank == '0':\n    sys.stderr.write('error: ...\\n')\n    sys.exit(2)\n"
            "time.sleep(60)",
            EXIT_USER_ERROR,
            "error: ...\n",
        ),
        (
            "if rank == '1':\n    sys.exit(3)\ntime.sleep(60)",
            3,
            "error: process 1 of 2 ended with exit code 3; why stands above\n",
        ),
        (
            # the other one notices and ends, too
            "if rank == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(75)",
            128 + signal.SIGKILL,
            "error: process 1 of 2 was ended by SIGKILL (by the system, if memory was short), so "
            "the others ended, too\n",
        ),
    ],
)
def test_what_ends_a_process_ends_all_and_is_one_line(
    process: str, code: int, said: str, tmp_path: Path
):
    done = start(tmp_path, process)
    out, err = done.communicate(timeout=100)
    assert (done.returncode, out, err) == (code, "", said)
    assert not any(map(is_there, pids(tmp_path)))


def test_what_a_killed_process_was_writing_is_kept_and_named(tmp_path: Path):
    process = """
if rank == "0":
    from flowcache.runtime.ending import Ending, Starter
    parent, notes, _ = map(int, os.environ["FLOWCACHE_LAUNCHER"].split(","))
    with Ending(Starter(parent, says_why=True, notes=notes)) as ending:
        for name in "abc":
            Path(f".{name}.part").write_text("frames")
            ending.begin(Path(f".{name}.part"), Path(f"{name}.partial.mp4"))
        ending.finish(Path(".b.part"))
        os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    done = start(tmp_path, process)
    err = done.communicate(timeout=100)[1]
    assert done.returncode == 128 + signal.SIGKILL
    assert err.splitlines() == [
        "",  # after a progress bar that was never closed
        "what was written so far is in a.partial.mp4",
        "what was written so far is in c.partial.mp4",
        "error: process 0 of 2 was ended by SIGKILL (by the system, if memory was short), so the "
        "others ended, too",
    ]
    assert (tmp_path / "a.partial.mp4").exists()
    assert (tmp_path / "c.partial.mp4").exists()
    assert (tmp_path / ".b.part").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_ends_all(number: signal.Signals, tmp_path: Path):
    done = start(tmp_path, "time.sleep(60)")
    running = pids(tmp_path)
    os.killpg(done.pid, number)  # as Ctrl-C in a terminal
    assert done.communicate(timeout=60) == ("", "interrupted\n")
    assert done.returncode == 128 + number
    assert not any(map(is_there, running))


@pytest.mark.parametrize("num", ["0", "two", "-1", "", "1" * 5000, "٣"])
def test_a_number_of_processes_that_is_none_is_refused(
    num: str, capsys: pytest.CaptureFixture[str]
):
    assert main([num, "-m", "magi1"]) == EXIT_USER_ERROR
    told = f"error: GPUS={num} must be a whole number of processes, 1 or more\n"
    assert capsys.readouterr().err == told


def test_a_launcher_without_a_command_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["2"]) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: nothing to start: ")


@pytest.mark.parametrize(
    ("rank", "code", "lines"), [("0", EXIT_USER_ERROR, 1), ("1", 0, 0), ("x", EXIT_USER_ERROR, 1)]
)
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
