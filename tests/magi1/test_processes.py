"""Two processes of a real run: where they listen, what they keep, and that none stays behind."""

import ipaddress
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flowcache.runtime.video import probe

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "scripts"
OWN = ("-m", "flowcache.launch", "2")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--main_process_port", "29577"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
RUN = (
    *("-m", "magi1", "--model", "demo", "--prompt", "a red circle"),
    *("runtime_config.num_frames=480", "runtime_config.num_steps=16"),
)

Start = Callable[..., psutil.Popen]


@pytest.fixture(name="start")
def _start(tmp_path: Path) -> Iterator[Start]:
    started: list[psutil.Popen] = []

    def start(*command: str) -> psutil.Popen:
        with (tmp_path / "err").open("w") as err:
            process = psutil.Popen(
                [sys.executable, *command],
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                cwd=tmp_path,
                stdout=subprocess.DEVNULL,
                stderr=err,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        for each in [*ranks_of(process), process] if process.is_running() else []:
            each.kill()


def wait_for(condition: Callable[[], object], *, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ranks_of(process: psutil.Popen) -> list[psutil.Process]:
    """Return the processes of a launcher in the order of their ranks."""
    found: dict[str, psutil.Process] = {}
    for child in process.children():
        try:
            found[child.environ()["RANK"]] = child
        except (psutil.Error, KeyError):
            continue
    return [found[rank] for rank in sorted(found)]


def listening(processes: list[psutil.Process]) -> set[str]:
    return {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def has_frames(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.glob(".*.part.mp4"))


@pytest.mark.parametrize("launcher", [OWN, TORCHRUN])
def test_processes_listen_on_the_loopback_interface_only(
    launcher: tuple[str, ...], start: Start, tmp_path: Path
):
    process = start(*launcher, *RUN, "--out", "v.mp4")
    wait_for(lambda: has_frames(tmp_path))
    # torchrun itself listens everywhere, which nobody but its caller can change
    own = [*ranks_of(process), *([process] if launcher == OWN else [])]
    found = listening(own)
    process.terminate()
    assert process.wait(60) != 0
    assert found
    assert all(ipaddress.ip_address(address).is_loopback for address in found)
    assert probe(tmp_path / "v.partial.mp4").num_frames > 0
    assert not any(rank.is_running() for rank in own)
    said = (tmp_path / "err").read_text()
    assert "v.partial.mp4" in said
    if launcher == OWN:
        assert process.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in said
        assert said.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_and_the_frames_are_kept(
    rank: int, start: Start, tmp_path: Path
):
    process = start(*OWN, *RUN, "--out", "v.mp4")
    wait_for(lambda: has_frames(tmp_path))
    ranks = ranks_of(process)
    ranks[rank].kill()
    assert process.wait(60) == 128 + signal.SIGKILL
    assert not any(each.is_running() for each in ranks)
    assert probe(tmp_path / "v.partial.mp4").num_frames > 0
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said
    assert said.count("error:") == 1
    assert f"error: process {rank} of 2 was ended by SIGKILL" in said
    assert "v.partial.mp4" in said


@pytest.mark.parametrize("launcher", [OWN, TORCHRUN, ACCELERATE])
@pytest.mark.parametrize("seconds", [0, 1.5, 6])
def test_no_process_survives_its_launcher(
    launcher: tuple[str, ...], seconds: float, start: Start, tmp_path: Path
):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    command = [str(SCRIPTS / "sample.py"), "magi1", "--model", "demo", "--prompts", "prompts.txt"]
    process = start(*launcher, *command, "--out", "out", *RUN[-2:])
    wait_for(lambda: len(ranks_of(process)) == 2)
    ranks = ranks_of(process)
    time.sleep(seconds)
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for each in alive:
        each.kill()
    assert not alive
