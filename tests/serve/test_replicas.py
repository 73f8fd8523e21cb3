"""Replicas of the model: jobs that begin again, cancelling, a replica that is killed."""

import asyncio
import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from flowcache.api import Pipeline, Tick
from flowcache.errors import UserError
from flowcache.runtime.ending import EXIT_LOST
from flowcache.runtime.video import read_video
from flowcache.serve.__main__ import main
from flowcache.serve.jobs import (
    CANCELLED,
    DONE,
    RUNNING,
    WAITING,
    BegunAgain,
    CancelledError,
    Event,
    Job,
    Jobs,
    Made,
    Report,
    Shown,
)
from flowcache.serve.replicas import Replica, Replicas

PROMPT = "a red circle moving right on a black background"
TICK = Tick(0, 4, (), (), 0.5)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[ray]'"
)


class DiedError(Exception):
    """As Ray's `RayActorError`."""


class FailedError(Exception):
    """As Ray's `RayTaskError`."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Response:
    """What a handle returns: events, then an exception if there is one."""

    def __init__(self, events: list[Event], end: Exception | None) -> None:
        self.events = self._events(events, end)
        self.is_cancelled = False

    async def _events(self, events: list[Event], end: Exception | None) -> AsyncIterator[Event]:
        for event in events:
            yield event
        if isinstance(end, CancelledError):  # nothing more happens
            await asyncio.Event().wait()
        if end is not None:
            raise end

    def __aiter__(self) -> "Response":
        return self

    def __anext__(self) -> Any:
        return self.events.__anext__()

    def cancel(self) -> None:
        self.is_cancelled = True


def replicas_of(*responses: Response) -> Replicas:
    """Return replicas that answer one call after the other."""
    left = list(responses)
    handle = SimpleNamespace(make=SimpleNamespace(remote=lambda _job, _folder: left.pop(0)))
    return Replicas(handle, 2)


@pytest.fixture(name="no_waits")
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowcache.serve.replicas.RETRY_SECONDS", (0.0, 0.0))


def make_job(folder: Path) -> Job:
    for name in ("job.json", "input.image", "live.mp4", ".video.mp4.1.part"):
        (folder / name).touch()
    return Job("a", PROMPT, "vanilla", {}, 24, "64x64", 0)


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("end", [DiedError(), FailedError(DiedError()), None])
def test_a_job_whose_replica_died_begins_again_without_what_was_unfinished(
    end: Exception | None, tmp_path: Path
):
    job, events = make_job(tmp_path), list[Event]()
    died, good = Response([TICK], end), Response([TICK, Made(1.0, 2.0)], None)
    replicas_of(died, good).make(job, tmp_path, events.append)
    assert events == [TICK, BegunAgain(), TICK, Made(1.0, 2.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.image", "job.json"]


@pytest.mark.usefixtures("no_waits")
def test_a_job_whose_replicas_die_again_and_again_fails(tmp_path: Path):
    calls = [Response([], DiedError()) for _ in range(3)]
    with pytest.raises(
        UserError, match="the replica that made the video failed 3 times, at last with: DiedError"
    ):
        replicas_of(*calls).make(make_job(tmp_path), tmp_path, lambda _: None)


def test_an_error_of_a_replica_is_that_of_the_job(tmp_path: Path):
    call = Response([], FailedError(UserError("num_frames must be 4 n + 1")))
    with pytest.raises(UserError, match="num_frames must be 4 n"):
        replicas_of(call).make(make_job(tmp_path), tmp_path, lambda _: None)


@pytest.mark.parametrize("events", [[], [TICK]], ids=["no replica yet", "at work"])
def test_a_cancelled_job_ends_the_call(events: list[Event], tmp_path: Path):
    job, call = make_job(tmp_path), Response(events, CancelledError())
    threading.Timer(0.1, lambda: setattr(job, "is_cancelled", True)).start()
    with pytest.raises(CancelledError):
        replicas_of(call).make(job, tmp_path, lambda _: None)
    assert call.is_cancelled


def test_the_queue_gives_jobs_to_as_many_replicas_and_forgets_what_was_lost(
    pipe: Pipeline, tmp_path: Path
):
    at_work, go_on = threading.Semaphore(0), threading.Event()

    def make(_job: Job, _folder: Path, report: Report) -> None:
        for event in (TICK, Shown(9, 0.5), BegunAgain(), TICK, Shown(5, 0.7)):
            report(event)
        at_work.release()
        assert go_on.wait(60)
        report(Made(2.0, 3.0))

    jobs = Jobs(pipe, tmp_path, max_waiting=9, max_bytes=10**9, make=make, num_at_once=2)
    made = [jobs.add(PROMPT, preset=None, settings={}, files={}) for _ in range(3)]
    for _ in range(2):
        assert at_work.acquire(timeout=60)
    assert [job.status for job in made] == [RUNNING, RUNNING, "queued"]
    assert [(len(job.ticks), job.num_frames, job.first_part_seconds) for job in made[:2]] == [
        (1, 5, 0.7)
    ] * 2
    go_on.set()
    assert jobs.wait(lambda: all(job.status == DONE for job in made), timeout_seconds=60)
    jobs.close()


def test_a_replica_ends_a_video_that_nobody_wants_before_it_takes_the_next(
    pipe: Pipeline, tmp_path: Path
):
    replica = Replica(lambda _: pipe)
    job = Job("a", PROMPT, "flowcache_fast", {"num_frames": 177}, 24, "64x64", 0)

    async def leave() -> int:
        events = replica.make(job, tmp_path)
        found = [await anext(events) for _ in range(3)]
        await events.aclose()
        return sum(isinstance(event, Tick) for event in found)

    assert asyncio.run(leave()) > 0
    assert not (tmp_path / "video.mp4").exists()
    assert pipe._lock.acquire(timeout=0)
    pipe._lock.release()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replicas", "2"], "--replicas is how many models --ray loads: give --ray, too"),
        (["--ray", "--replicas", "0"], "--replicas must be 1 to 10000, not 0"),
        (
            ["--gpus-per-replica", "2"],
            "--gpus-per-replica is how many GPUs --ray gives to each model: give --ray, too",
        ),
        (
            ["--ray", "--gpus-per-replica", "-1"],
            "--gpus-per-replica must be 1 to 10000, not -1",
        ),
        (["--ray"], "ray is not installed: pip install 'flowcache[ray]', or in the repository"),
    ],
)
def test_what_is_wrong_with_replicas_is_one_line(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert main(["--model", "demo", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_a_model_that_a_group_cannot_divide_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())  # of which nothing is asked
    given = ["--model", "demo", "device=cpu", "--ray", "--gpus-per-replica", "5"]
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: parallel.sequence=5 does not divide the ")


@pytest.mark.parametrize(
    ("victim", "when"),
    [
        ("other", "idle"),
        pytest.param("first", "idle", marks=pytest.mark.slow),
        pytest.param("other", "at work", marks=pytest.mark.slow),
        pytest.param("first", "at work", marks=pytest.mark.slow),
    ],
)
def test_a_group_makes_what_one_process_makes_stays_in_step_and_ends_as_a_whole(
    victim: str, when: str, pipe: Pipeline, tmp_path: Path
):
    script = Path(__file__).with_name("group_run.py")
    command = [sys.executable, str(script), str(tmp_path), victim, when]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    expected = EXIT_LOST if victim == "other" else -signal.SIGKILL
    assert ended.returncode == expected, ended.stderr
    assert has_ended(int((tmp_path / "pid.txt").read_text()))
    assert "num_frames" in (tmp_path / "wrong.txt").read_text()
    alone = pipe(PROMPT, preset="flowcache_fast", record=True)
    assert alone.record is not None
    alone.save(tmp_path / "alone.mp4")
    frames = read_video(tmp_path / "alone.mp4")[0].astype(float)
    for name, branch in (("first", 2), ("after", 2), ("tokens", 1)):
        video = read_video(tmp_path / name / "video.mp4")[0]
        # of 255: sums in another order, then the codec
        assert np.abs(video - frames).mean() < 0.1
        report = json.loads((tmp_path / name / "video.json").read_text())
        assert report["processes"] == {"branch": branch, "sequence": 2 // branch}
        assert report["stats"]["passes"] == alone.stats["passes"]
        flops = alone.stats["flops"]["computed"]
        assert report["stats"]["flops"]["computed"] == pytest.approx(flops)
        record = json.loads((tmp_path / name / "video.record.json").read_text())
        assert len(record["decisions"]) == len(alone.record["decisions"])
    assert not (tmp_path / "killed" / "video.mp4").exists()


def has_ended(pid: int) -> bool:
    """Wait for the end of a process."""
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        time.sleep(0.1)
    return not psutil.pid_exists(pid)


def ask(address: str, path: str, fields: dict[str, Any] | None = None) -> Any:
    data = None if fields is None else json.dumps(fields).encode()
    request = urllib.request.Request(
        f"{address}{path}", data=data, headers={"content-type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request, timeout=60))


def running(name: str) -> list[psutil.Process]:
    """Return the processes below this one whose command holds a name."""
    found: list[psutil.Process] = []
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since
            if name in "".join(each.cmdline()):
                found.append(each)
    return found


REPLICA, SERVICE = "ServeReplica", "flowcache.serve"


def others(replica: psutil.Process) -> list[psutil.Process]:
    """Return the further processes of a replica."""
    return [each for each in replica.children() if "spawn_main" in "".join(each.cmdline())]


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_service_with_a_killed_replica_loses_no_job_and_makes_what_one_model_makes(
    pipe: Pipeline, service: Callable[..., str], tmp_path: Path
):
    address = service("num_frames=177", "num_steps=20", "--ray", "--replicas", "2")
    ids: list[str] = []
    killed: list[int] = []
    states: list[dict[str, Any]] = []
    num_waiting = 0
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        # the second replica comes when the first is busy; by then a fast machine has made many
        for _ in range(0 if killed else 4 - num_waiting):
            fields = {"prompt": PROMPT, "seed": len(ids)}
            ids.append(ask(address, "/v1/videos", fields)["id"])
        states = [ask(address, f"/v1/videos/{each}") for each in ids]
        num_waiting = sum(state["status"] in WAITING for state in states)
        if not killed and sum(state["progress"] > 5 for state in states) >= 2:
            # two have worked; the first one at work now dies
            at_work = [state for state in states if state["status"] == RUNNING]
            replicas = running(REPLICA)
            if len(replicas) == 2 and len(at_work) == 2:
                replicas[0].kill()
                killed.append(replicas[0].pid)
        if not num_waiting:
            break
        time.sleep(0.1)
    assert killed
    assert [state["status"] for state in states] == [DONE] * len(ids), (
        [state["error"] for state in states],
        (tmp_path / "said").read_text(),
    )
    for number, video_id in enumerate(ids):
        folder = tmp_path / "jobs" / video_id
        expected = pipe(PROMPT, seed=number, num_frames=177, num_steps=20).save(
            tmp_path / f"{number}.mp4"
        )
        assert (folder / "video.mp4").read_bytes() == expected.read_bytes()
        live, _ = read_video(folder / "live.mp4")
        whole, _ = read_video(expected)
        # of 255; two encoders' noise
        assert np.abs(live.astype(float) - whole).mean() < 8
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    waiting = ask(address, "/v1/videos", {"prompt": PROMPT})["id"]
    ask(address, f"/v1/videos/{waiting}/cancel", {})
    while (state := ask(address, f"/v1/videos/{waiting}"))["status"] in WAITING:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert state["status"] == CANCELLED


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_replica_of_two_processes_of_which_one_is_killed_loses_no_job_and_leaves_nothing(
    pipe: Pipeline, service: Callable[..., str], tmp_path: Path
):
    settings = {"num_frames": 177, "num_steps": 20}
    given = [f"{name}={value}" for name, value in settings.items()]
    address = service(*given, "--ray", "--gpus-per-replica", "2")
    (replica,) = running(REPLICA)
    (other,) = others(replica)
    ids = [ask(address, "/v1/videos", {"prompt": PROMPT, "seed": n})["id"] for n in range(3)]
    deadline = time.monotonic() + 400
    while ask(address, f"/v1/videos/{ids[0]}")["progress"] < 10:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    other.kill()
    assert has_ended(replica.pid)
    states: list[dict[str, Any]] = []
    while not states or any(state["status"] in WAITING for state in states):
        assert time.monotonic() < deadline, states
        time.sleep(0.2)
        states = [ask(address, f"/v1/videos/{each}") for each in ids]
    assert [state["status"] for state in states] == [DONE] * len(ids), states
    for number, video_id in enumerate(ids):
        folder = tmp_path / "jobs" / video_id
        assert json.loads((folder / "video.json").read_text())["processes"]["branch"] == 2
        alone = pipe(PROMPT, seed=number, **settings).save(tmp_path / f"{number}.mp4")
        whole = read_video(alone)[0].astype(float)
        # of 255: sums in another order, then the codec
        assert np.abs(read_video(folder / "video.mp4")[0] - whole).mean() < 0.1
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    (replica,) = running(REPLICA)
    left = [replica, *others(replica)]
    assert len(left) == 2
    (process,) = running(SERVICE)
    process.terminate()
    assert all(has_ended(each.pid) for each in left)
