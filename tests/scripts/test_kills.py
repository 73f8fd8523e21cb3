"""Kills at random moments: nothing is left running, half written, or different afterwards.

    python -m pytest -n 0 -m slow tests/scripts/test_kills.py --kills 200

Runs are short, so that their moments are spread evenly over start, loading, denoising and writing.
"""

import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from sampling_cases import REPOSITORY, SCRIPTS, SHORT, videos
from signals import ASKED, MARK, heed_signals, living

from flowcache.runtime.video import probe

END_SECONDS = 60
INTERPRETER_SECONDS = 0.15
"""Processor time of Python's own start: there Ctrl-C is a traceback before a line of ours runs."""
PROMPT = ("--prompt", "a red circle moving right on a black background")
MAGI = ("runtime_config.num_frames=120", "runtime_config.num_steps=8")
MODELS = ("FlowCache4MAGI-1", "FlowCache4SkyReels-V2")
LAUNCH = ("-m", "flowcache.launch", "2")
PROMPTS = "a red circle moving right on a black background\na blue square\na green circle\n"


@dataclass(frozen=True)
class Kind:
    """A way to make videos."""

    name: str
    command: Sequence[str]
    """What follows `python`, but the output."""
    is_set: bool = False
    """Whether it makes many videos, and is started again until all are there."""

    @property
    def is_launched(self) -> bool:
        return self.command[:3] == LAUNCH

    def arguments(self, folder: Path) -> list[str]:
        if not self.is_set:
            return [*self.command, "--out", str(folder / "v.mp4")]
        prompts = folder.parent / "prompts.txt"
        prompts.write_text(PROMPTS)
        given = ["--prompts", str(prompts), "--out", str(folder)]
        return [*self.command[:6], *given, *self.command[6:]]


KINDS = (
    Kind("magi1", ("-m", "magi1", "--model", "demo", *PROMPT, *MAGI)),
    Kind("skyreels_v2", ("-m", "skyreels_v2", "--model", "demo", *PROMPT, *SHORT)),
    Kind("magi1 by two", (*LAUNCH, "-m", "magi1", "--model", "demo", *PROMPT, *MAGI)),
    Kind(
        "sampling by two",
        (*LAUNCH, str(SCRIPTS / "sample.py"), "skyreels_v2", "--model=demo", *SHORT),
        is_set=True,
    ),
)


@dataclass
class Run:
    """A run that is to be killed."""

    kind: Kind
    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self) -> "subprocess.Popen[str]":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.said = (self.folder.parent / "said").open("w+")
        code = [str(REPOSITORY / name) for name in ("common", *MODELS)]
        return subprocess.Popen(
            [sys.executable, *self.kind.arguments(self.folder)],
            env=os.environ
            | {MARK: self.mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            | {"PYTHONPATH": os.pathsep.join(code)},
            stdout=subprocess.DEVNULL,
            stderr=self.said,
            text=True,
            start_new_session=True,
            preexec_fn=heed_signals,
        )

    def living(self) -> list[psutil.Process]:
        """Return all its processes."""
        return living(self.mark)

    def text(self) -> str:
        self.said.seek(0)
        return self.said.read()


def cpu_seconds_of_ended() -> float:
    """Return the processor time of all commands that have ended: independent of what else runs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a running command, in seconds."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        command = psutil.Process(pid)
        for process in [command, *command.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])
    return total


def wait_until_none_is_left(run: Run) -> None:
    start = time.monotonic()
    while living := run.living():
        assert time.monotonic() - start < END_SECONDS, f"left after 60 s: {living}\n{run.text()}"
        time.sleep(0.1)


def kill(run: Run, process: "subprocess.Popen[str]", dice: random.Random) -> str:
    """Send a signal to the command or one of the processes that it started; return what it was."""
    number = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, *ASKED])
    if number == signal.SIGINT and cpu_seconds(process.pid) < INTERPRETER_SECONDS:
        number = signal.SIGTERM
    workers = [
        each
        for each in run.living()
        if run.kind.is_launched and each.pid != process.pid and "RANK" in each.environ()
    ]
    if number == signal.SIGKILL and workers and dice.random() < 0.6:
        rank = dice.choice(workers)
        which = f"process {rank.environ()['RANK']}"
        rank.kill()
    else:
        which = "launcher" if run.kind.is_launched else "command"
        process.send_signal(number)
    return f"{number.name} of the {which}"


def check_folder(run: Run, *, was_killed: bool) -> None:
    """Check every file: complete ones have their JSON, partial ones are called so."""
    num_complete = 0
    for path in sorted(run.folder.glob("*.mp4")):
        if ".partial" in path.name or path.name.startswith("."):
            is_readable = ".partial" in path.name and probe(path).num_frames > 0
            assert is_readable or (was_killed and path.name.startswith(".")), path
            path.unlink()
            continue
        report = json.loads(path.with_suffix(".json").read_text())
        assert probe(path).num_frames == report["num_frames"]
        num_complete += 1
    assert run.kind.is_set or not list(run.folder.glob("*.json")) or num_complete


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_kills_at_random_moments_leave_nothing_behind(
    tmp_path: Path, request: pytest.FixtureRequest
):
    dice = random.Random(11)
    whole: dict[str, dict[str, bytes]] = {}
    seconds: dict[str, float] = {}
    for kind in KINDS:
        run, start = Run(kind, tmp_path / kind.name / "whole"), cpu_seconds_of_ended()
        assert run.start().wait() == 0, run.text()
        seconds[kind.name] = cpu_seconds_of_ended() - start
        whole[kind.name] = videos(run.folder)
    kinds, num_left = itertools.cycle(KINDS), request.config.getoption("--kills")
    while num_left:
        kind = next(kinds)
        run = Run(kind, tmp_path / kind.name / "killed")
        process = run.start()
        moment = dice.uniform(0.0, 1.02) * seconds[kind.name]
        while process.poll() is None and cpu_seconds(process.pid) < moment:
            time.sleep(0.02)
        what = kill(run, process, dice) if process.poll() is None else None
        wait_until_none_is_left(run)
        code = process.wait()
        if what is not None:
            num_left -= 1
            check_end(what, code, run.text())
            check_folder(run, was_killed="SIGKILL" in what)
        if code == 0 or (not kind.is_set and videos(run.folder)):  # killed after the last write
            assert videos(run.folder) == whole[kind.name]
            shutil.rmtree(run.folder)
    for kind in KINDS:  # the last ones are made to the end
        run = Run(kind, tmp_path / kind.name / "killed")
        assert run.start().wait() == 0, run.text()
        assert videos(run.folder) == whole[kind.name]


def check_end(what: str, code: int, said: str) -> None:
    """Check exit code and message."""
    name, _, victim = what.partition(" of the ")
    number = signal.Signals[name]
    is_asked = number in ASKED
    assert code in ((128 + number, -number, 0) if is_asked else (137, -9, 0)), f"{what}: {said}"
    assert "Traceback" not in said, f"{what}: {said}"
    lines = [line for line in said.splitlines() if line.startswith(("error: ", "interrupted"))]
    if victim.startswith("process") and code:
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {victim} of 2 was ended by SIGKILL")
    if code == 128 + number and is_asked:
        assert len(lines) == 1
