"""Many videos divided by Ray: longest first, killed processes, one line where Ray is missing."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import sample
from sampling_cases import REPOSITORY, SCRIPTS, SHORT, make_file, make_task, receipts, videos
from signals import MARK, heed_signals, living

from flowcache.bench import actors
from flowcache.bench.tasks import Task
from flowcache.bench.worker import DiskFullError, Worker
from flowcache.errors import UserError
from flowcache.runtime.cluster import Cluster, cluster

END_SECONDS = 60
"""Within which nothing of an ended command is left."""
RAY = ("--ray", "--replicas", "2")


# With something in place of Ray -------------------------------------------------------------------


class DiedError(Exception):
    """As Ray's `RayActorError`."""


class FailedError(Exception):
    """As Ray's `RayTaskError`."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class FakeRay:
    """Makes what actors are asked for when it is waited for, in this process."""

    exceptions = SimpleNamespace(RayActorError=DiedError, RayTaskError=FailedError)

    def __init__(self, make: Callable[[Task], str | None]) -> None:
        self.make = make
        self.options: dict[str, Any] = {}
        self.num_actors = 0

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.options = options
        return lambda _kind: SimpleNamespace(remote=self._start)

    def _start(self, *_: Any) -> Any:
        self.num_actors += 1
        return SimpleNamespace(make=SimpleNamespace(remote=lambda task: task))

    def wait(self, references: list[Task], **_: Any) -> tuple[list[Task], list[Task]]:
        return references[:1], references[1:]

    def get(self, reference: Task) -> str | None:
        return self.make(reference)


def divide(
    make: Callable[[Task], str | None], out: Path, tasks: list[Task]
) -> tuple[FakeRay, dict[str, str]]:
    ray = FakeRay(make)
    found = Cluster(ray, 2, {"num_cpus": 1, "num_gpus": 0}, is_own=True)
    costs = {task.kind: float(task.preset.removeprefix("p")) for task in tasks}
    return ray, actors.run(Worker(out, make_file), tasks, costs, found)


def test_the_most_expensive_videos_are_made_first_by_no_more_actors_than_videos(tmp_path: Path):
    tasks = [
        make_task(name, preset=f"p{cost}") for name, cost in zip("abcd", (1, 3, 2, 3), strict=True)
    ]
    order: list[str] = []
    ray, failures = divide(lambda task: order.append(task.name), tmp_path, tasks)
    assert (order, failures, ray.num_actors) == (["b", "d", "c", "a"], {}, 2)
    assert ray.options == {
        "max_restarts": -1,
        "max_task_retries": 2,
        "num_cpus": 1,
        "num_gpus": 0,
    }
    ray, _ = divide(lambda _task: None, tmp_path, tasks[:1])
    assert ray.num_actors == 1


def test_a_video_whose_process_always_dies_is_recorded_and_the_others_go_on(tmp_path: Path):
    def make(task: Task) -> str | None:
        if task.name == "a":
            raise DiedError
        return "no such clip" if task.name == "b" else None

    _, failures = divide(make, tmp_path, [make_task(name, preset="p1") for name in "abc"])
    said = "the process that made it died 3 times: look at its memory"
    assert failures == {"a": said, "b": "no such clip"}
    assert said in (tmp_path / "a.error.json").read_text()


def test_a_full_disk_ends_the_whole_run(tmp_path: Path):
    def make(_task: Task) -> str | None:
        raise FailedError(DiskFullError("nothing more can be written"))

    with pytest.raises(DiskFullError, match="nothing more can be written"):
        divide(make, tmp_path, [make_task("a", preset="p1")])


def test_without_ray_there_is_one_line_before_any_work(
    fake: list[Task], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert sample.main(["magi1", "--prompts", "prompts.txt", "--out", "out", "--ray"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ray is not installed: pip install 'flowcache[ray]'")
    assert fake == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:99999999"])
def test_an_address_at_which_no_cluster_listens_is_one_line(
    address: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setitem(sys.modules, "ray", FakeRay(lambda _: None))
    said = f"RAY_ADDRESS={address}: no cluster of Ray listens there: give HOST:PORT"
    with pytest.raises(UserError, match=said), cluster(2):
        pass


CORES, GPUS = [{"CPU": 4.0}], [{"CPU": 4.0, "GPU": 2.0}]


@pytest.mark.parametrize(
    ("machines", "num_replicas", "group_size", "expected"),
    [
        (CORES, None, 1, (1, 1, 0)),
        (CORES, 4, 1, (4, 1, 0)),
        (CORES, 2, 2, (2, 2, 0)),
        (CORES, 5, 1, "--replicas 5 is above the 4 cores of the cluster"),
        (CORES, 3, 2, "--replicas 3 of 2 cores each is above the 4 cores of the cluster"),
        (GPUS, None, 1, (2, 1, 1)),
        (GPUS, None, 2, (1, 1, 2)),
        (GPUS, 3, 1, "--replicas 3 is above the 2 GPUs of the cluster"),
        (GPUS * 2, None, 2, (2, 1, 2)),
        (GPUS * 2, None, 4, "--gpus-per-replica 4 is above the 2 GPUs that a machine of the clus"),
        ([{"CPU": 4.0, "GPU": 5.0}], 2, 2, (2, 1, 2)),
        ([{"CPU": 4.0, "GPU": 5.0}], None, 2, "--gpus-per-replica 2 does not divide the 5 GPUs of"),
    ],
)
def test_a_replica_takes_gpus_where_there_are_some_else_cores(
    machines: list[dict[str, float]],
    num_replicas: int | None,
    group_size: int,
    expected: tuple[int, int, int] | str,
    monkeypatch: pytest.MonkeyPatch,
):
    """The cluster is one that is running; whose signal handlers stay as they were."""
    ended: list[bool] = []
    lost = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    ray = SimpleNamespace(
        init=lambda **_: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        nodes=lambda: [lost, *({"Alive": True, "Resources": each} for each in machines)],
        shutdown=lambda: ended.append(True),
    )
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setitem(sys.modules, "ray", ray)
    before = signal.getsignal(signal.SIGTERM)
    if isinstance(expected, str):
        with (
            pytest.raises(UserError, match=expected),
            cluster(num_replicas, group_size=group_size),
        ):
            pass
    else:
        with cluster(num_replicas, group_size=group_size) as found:
            numbers = found.resources["num_cpus"], found.resources["num_gpus"]
            assert (found.num_replicas, *numbers) == expected
            assert signal.getsignal(signal.SIGTERM) == before
            assert not found.is_own
    assert ended == [True]


# With Ray -----------------------------------------------------------------------------------------

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[ray]'"
)


class Command:
    """`sample.py` in a process of its own."""

    def __init__(self, out: Path, prompts: Path, *given: str) -> None:
        self.said = (out.parent / "said").open("w+")
        code = [REPOSITORY / name for name in ("common", "FlowCache4SkyReels-V2")]
        arguments = ["--model", "demo", "--prompts", str(prompts), "--out", str(out), *SHORT]
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "sample.py"), "skyreels_v2", *arguments, *given],
            env=os.environ
            | {MARK: str(out), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            | {"PYTHONPATH": os.pathsep.join(map(str, code))},
            stdout=self.said,
            stderr=self.said,
            start_new_session=True,
            preexec_fn=heed_signals,
        )
        self.out = out

    def living(self, name: str = "") -> list[psutil.Process]:
        """Return its processes whose command lines hold a name."""
        return living(str(self.out), name=name)

    def text(self) -> str:
        self.said.seek(0)
        return self.said.read()

    def wait_until(self, is_so: Callable[[], object], *, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)


@pytest.fixture(name="many", scope="module")
def _many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a list of prompts, and the folder of its videos made by one process."""
    folder = tmp_path_factory.mktemp("many")
    prompts, whole = folder / "many.txt", folder / "whole"
    words = [(colour, shape) for colour in ("red", "blue", "green") for shape in ("circle", "dot")]
    prompts.write_text("".join(f"a {colour} {shape}\n" for colour, shape in words))
    command = Command(whole, prompts)
    assert command.process.wait() == 0, command.text()
    return prompts, whole


@needs_ray
@pytest.mark.slow
def test_a_killed_actor_loses_nothing(many: tuple[Path, Path], tmp_path: Path):
    prompts, whole = many
    command = Command(tmp_path / "out", prompts, *RAY)
    command.wait_until(lambda: videos(command.out))
    command.wait_until(lambda: command.living("ray::Sampler.make"))
    victim = command.living("ray::Sampler.make")[0]
    victim.kill()
    assert command.process.wait() == 0, command.text()
    assert "6 of 6 videos are complete" in command.text()
    assert videos(command.out) == videos(whole)
    assert not (command.out / ".unfinished").exists()
    command.wait_until(lambda: not command.living(), seconds=END_SECONDS)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_command_leaves_nothing_running_and_the_next_makes_the_rest(
    number: signal.Signals, many: tuple[Path, Path], tmp_path: Path
):
    prompts, whole = many
    command = Command(tmp_path / "out", prompts, *RAY)
    command.wait_until(lambda: list(command.out.glob("*.mp4")))  # one is complete
    command.process.send_signal(number)
    code, said = command.process.wait(), command.text()
    assert code == (-number if number == signal.SIGKILL else 128 + number), said
    assert "Traceback" not in said
    assert len(re.findall("^interrupted", said, re.MULTILINE)) == (number != signal.SIGKILL)
    command.wait_until(lambda: not command.living(), seconds=END_SECONDS)
    made = {name: content for name, content in videos(command.out).items() if "/" not in name}
    assert 0 < len(made) < 6
    assert made.items() <= videos(whole).items()
    before = {Path(name).stem: receipts(command.out)[Path(name).stem] for name in made}
    again = Command(command.out, prompts)  # without Ray: results do not depend on it
    assert again.process.wait() == 0, again.text()
    assert videos(command.out) == videos(whole)
    assert not (command.out / ".unfinished").exists()
    assert {name: receipts(command.out)[name] for name in before} == before
