"""How commands end: real signals to real processes, which import nothing large."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from signals import heed_signals

from flowcache.runtime.ending import (
    SIGNALS,
    Ending,
    Stopped,
    check_stopped,
    current,
    message,
    undisturbed,
)

START = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
import flowcache.runtime.ending as ending
from flowcache.runtime.ending import Ending, Starter, Stopped, check_stopped, undisturbed

ending.STUCK_SECONDS, ending.POLL_SECONDS = 0.5, 0.1

def ready():
    print("ready", flush=True)

def run(command, **options):
    try:
        with Ending(**options) as own:
            command(own)
    except Stopped as stopped:
        print(stopped)
        sys.exit(stopped.exit_code)
"""

WAITS = "run(lambda own: (ready(), time.sleep(60)))"
AT_FORK = """
def end():
    os.kill(os.getpid(), signal.SIGTERM)

def command(own):
    ready()
    os.register_at_fork(after_in_parent=end)
    if os.fork() == 0:
        os._exit(0)
    time.sleep(60)

run(command)
"""
FINALIZER = """
class Thing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def command(own):
    ready()
    thing = Thing()
    del thing
    time.sleep(60)

run(command)
"""
SWALLOWED = """
def command(own):
    ready()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except BaseException:
        pass
    check_stopped()
    print("went on")

run(command)
"""
SWALLOWED_AT_THE_END = SWALLOWED.replace("    check_stopped()\n    print", "    time.sleep(0)  #")


def start(code: str, folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", START + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        preexec_fn=heed_signals,
    )
    assert says(process, "ready\n")
    return process


def says(process: "subprocess.Popen[str]", text: str) -> bool:
    """Wait for the next words of a process; what `readline` buffers, `communicate` would lose."""
    assert process.stdout is not None
    return all(os.read(process.stdout.fileno(), 1).decode() == letter for letter in text)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_with_its_code_and_one_line(number: signal.Signals, tmp_path: Path):
    process = start(WAITS, tmp_path)
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("interrupted\n", "")
    assert process.returncode == 128 + number


@pytest.mark.parametrize("code", [AT_FORK, FINALIZER, SWALLOWED, SWALLOWED_AT_THE_END])
def test_a_signal_is_not_lost_where_its_exception_is_ignored(code: str, tmp_path: Path):
    process = start(code, tmp_path)
    assert process.communicate(timeout=20) == ("interrupted\n", "")
    assert process.returncode == 128 + signal.SIGTERM


def test_a_command_that_waits_in_c_code_ends_and_names_what_it_has_written(tmp_path: Path):
    code = """
def command(own):
    Path(".a.part.mp4").write_text("frames")
    Path(".empty.part.mp4").touch()
    own.begin(Path(".a.part.mp4"), Path("a.partial.mp4"))
    own.begin(Path(".empty.part.mp4"), Path("empty.partial.mp4"))
    Path("a.partial.mp4").write_text("of an earlier run")
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    ready()
    lock(mutex)  # for ever, whatever signals come

run(command)
"""
    process = start(code, tmp_path)
    time.sleep(0.5)  # until it waits
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert (out, process.returncode) == ("", 128 + signal.SIGTERM)
    assert err == "\ninterrupted: what was written so far is in a.partial-001.mp4\n"
    assert (tmp_path / "a.partial-001.mp4").read_text() == "frames"
    assert (tmp_path / "a.partial.mp4").read_text() == "of an earlier run"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_second_signal_ends_at_once_but_not_the_same_one_sent_to_the_group(tmp_path: Path):
    code = """
ending.REPEAT_SECONDS = 0.5
def command(own):
    try:
        ready()
        time.sleep(60)
    finally:
        print("cleans", flush=True)
        time.sleep(1)
        print("cleaned", flush=True)
        time.sleep(60)

run(command)
"""
    process = start(code, tmp_path)
    process.terminate()
    assert says(process, "cleans\n")
    process.terminate()  # as `timeout` does
    assert says(process, "cleaned\n")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT


HANGS = """
ending.END_SECONDS = 1
def command(own):
    try:
        ready()
        time.sleep(60)
    finally:
        time.sleep(60)

run(command)
"""
SECTION = """
def command(own):
    with undisturbed():
        with undisturbed():
            ready()
            time.sleep(1)
        print("whole", flush=True)
    print("went on", flush=True)

run(command)
"""
IGNORES = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
run(lambda own: (ready(), time.sleep(0.5), print("done")))
"""


@pytest.mark.parametrize(
    ("code", "sent", "said", "exit_code"),
    [
        pytest.param(HANGS, ["SIGTERM"], ("", "\ninterrupted\n"), 143, id="a clean-up that hangs"),
        pytest.param(SECTION, ["SIGTERM"], ("whole\ninterrupted\n", ""), 143, id="undisturbed"),
        pytest.param(IGNORES, ["SIGINT", "SIGHUP"], ("done\n", ""), 0, id="ignored on purpose"),
    ],
)
def test_what_a_signal_does(
    code: str, sent: list[str], said: tuple[str, str], exit_code: int, tmp_path: Path
):
    process = start(code, tmp_path)
    for name in sent:
        process.send_signal(signal.Signals[name])
    assert process.communicate(timeout=20) == said
    assert process.returncode == exit_code


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path):
    child = START + "run(lambda own: time.sleep(60), starter=Starter(os.getppid()))"
    code = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=open("said", "w"))
time.sleep(1)
Path("child").write_text(str(child.pid))
ready()
time.sleep(60)
"""
    process = start(code, tmp_path)
    process.kill()
    process.communicate(timeout=20)
    pid = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() or not (tmp_path / "said").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "said").read_text() == "the process that started this one has ended\n"


def test_handlers_are_restored_and_belong_to_one_command():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Ending() as ending:
        assert current() is ending
        check_stopped()
        with undisturbed():
            assert ending.depth == 1
        with Ending() as inner:
            assert current() is inner
        assert current() is ending
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert current() is None
    check_stopped()


def test_unfinished_files_are_named_whatever_ends_a_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    part = tmp_path / "part"
    for error in (ValueError, Stopped):
        part.write_text("frames")
        with pytest.raises(error), Ending() as ending:
            ending.begin(part, tmp_path / "a.partial.mp4")
            raise ValueError if error is ValueError else Stopped(15, "interrupted")
    assert caplog.messages == [f"what was written so far is in {tmp_path}/a.partial.mp4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a.partial-001.mp4", "a.partial.mp4")
    ]


def test_a_message_is_one_line():
    assert message("interrupted", []) == "interrupted"
    assert message("interrupted", ["a", "b"]) == "interrupted: a; b"
    assert message("", ["a"]) == "a"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_temporary_folder_does_not_stay(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = """
def command(own):
    with ending.temporary_folder() as folder:
        (folder / "shard").write_text("large")
        ready()
        time.sleep(60)

run(command)
"""
    first, second = start(code, tmp_path), start(code, tmp_path)
    first.send_signal(number)
    first.communicate(timeout=20)
    assert len(list(tmp_path.iterdir())) == (2 if number == signal.SIGKILL else 1)
    third = start(code, tmp_path)  # removes what was left, and nothing that is in use
    assert len(list(tmp_path.glob("*/shard"))) == 2
    for process in (second, third):
        process.terminate()
        process.communicate(timeout=20)
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_goes_where_the_command_waits_in_c_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = """
def command(own):
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    with ending.temporary_folder() as folder:
        ready()
        lock(mutex)

run(command)
"""
    process = start(code, tmp_path)
    time.sleep(0.5)  # until it waits
    process.terminate()
    assert process.communicate(timeout=20) == ("", "\ninterrupted\n")
    assert list(tmp_path.iterdir()) == []
