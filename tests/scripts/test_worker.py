"""Many videos by many processes: shared by a folder, resumable, never half a result."""

import errno
import json
import logging
import os
import random
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sampling_cases import drive, make_file, make_task, make_worker, receipts, videos

from flowcache.bench.tasks import Task
from flowcache.bench.worker import DiskFullError, Lock, Locks, Worker, warned_once

# Several processes


def whole(repeat: int = 20) -> dict[str, bytes]:
    """Return the files that a process makes."""
    return {
        f"a/{n:02d}.mp4": b"".join(
            f"{n:02d} {part} ".encode() * (1 + n) * repeat for part in range(10)
        )
        for n in range(12)
    }


def test_two_processes_share_the_work_and_a_second_start_makes_nothing_again(tmp_path: Path):
    processes = [drive(tmp_path, first=first, pause=0.002) for first in (0, 6)]
    assert [process.wait() for process in processes] == [0, 0]
    assert videos(tmp_path) == whole()
    assert not (tmp_path / ".claims").exists()
    before = receipts(tmp_path)
    assert drive(tmp_path).wait() == 0
    assert receipts(tmp_path) == before


def test_after_kills_at_random_moments_the_set_is_that_of_an_undisturbed_run(tmp_path: Path):
    dice, interrupted = random.Random(7), 0
    for _ in range(12):
        processes = [drive(tmp_path, first=first, pause=0.004) for first in (0, 5)]
        time.sleep(dice.uniform(0.05, 0.5))
        for process in processes:
            process.kill()
        interrupted += sum(process.wait() == -signal.SIGKILL for process in processes)
        for name, receipt in receipts(tmp_path).items():
            made = (tmp_path / "a" / f"{name}.mp4").read_bytes()
            assert made == whole()[f"a/{name}.mp4"]
            assert receipt["num_bytes"] == len(made)
    assert interrupted > 0
    assert drive(tmp_path).wait() == 0
    assert videos(tmp_path) == whole()
    assert [path for path in tmp_path.rglob("*") if "/." in str(path)] == []


def test_a_full_disk_ends_with_one_line_and_keeps_what_is_complete(tmp_path: Path):
    process = drive(tmp_path, repeat=200, limit=50_000)  # 10 kB, 20 kB, ...
    _, said = process.communicate()
    assert process.returncode == 2
    assert len(said.splitlines()) == 1
    assert "nothing more can be written (File too large): make room and start again" in said
    done = receipts(tmp_path)
    assert 0 < len(done) < 12
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2 * len(done)
    assert drive(tmp_path, repeat=200).wait() == 0
    assert videos(tmp_path) == whole(200)
    assert {name: receipts(tmp_path)[name] for name in done} == done


# One process


def test_a_receipt_is_there_before_the_video_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def replace(source: Path, target: Path) -> None:
        if target.suffix == ".mp4":
            assert target.with_suffix(".json").exists()
            raise KeyboardInterrupt  # as if killed here
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            make_worker([make_task("a")], tmp_path).run()
    assert videos(tmp_path) == {}
    assert make_worker([make_task("a")], tmp_path).run() == {}
    assert videos(tmp_path) == {"a.mp4": b"a"}


def test_an_interruption_leaves_no_lock_and_no_half_file(tmp_path: Path):
    def interrupt(task: Task, folder: Path) -> dict[str, Any]:
        (folder / f"{task.name}.mp4").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_worker([make_task("a")], tmp_path, interrupt).run()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert make_worker([make_task("a")], tmp_path).run() == {}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("b.mp4", b"x"),
        ("b.mp4", None),
        ("b.json", None),
        ("b.json", b""),
        ("b.json", b'{"task": {'),
        ("b.json", b"\x00\x00"),
    ],
)
def test_a_damaged_or_missing_file_is_made_again_and_no_other(
    tmp_path: Path, file: str, content: bytes | None
):
    tasks, made = [make_task("a"), make_task("b")], []

    def render(task: Task, folder: Path) -> dict[str, Any]:
        made.append(task.name)
        return make_file(task, folder)

    make_worker(tasks, tmp_path).run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    assert make_worker(tasks, tmp_path, render).run() == {}
    assert made == ["b"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "seed", "origin", "said"),
    [
        ("a", 0, {}, None),
        ("a", 5, {}, r"a\.json is of another run \(seed differ\) and is kept"),
        ("a", 0, {"resolved_settings": "3"}, r"another run \(resolved_settings differ\)"),
        (
            "a",
            0,
            {"resolved_settings": "3", "checkpoint": "4"},
            r"another run \(resolved_settings, checkpoint differ\)",
        ),
        ("b", 0, {}, r"b\.json is no receipt .* choose another output folder"),
    ],
)
def test_results_that_were_made_otherwise_are_kept_and_refused(
    tmp_path: Path, name: str, seed: int, origin: dict[str, str], said: str | None
):
    first = {"resolved_settings": "1", "checkpoint": "2"}
    made, task = make_task("a"), make_task(name, seed=seed)
    make_worker([made], tmp_path, origins={made.kind: first}).run()
    (tmp_path / "b.json").write_text("{}")
    worker = make_worker([task], tmp_path, origins={task.kind: first | origin})
    if said is None:
        assert worker.run() == {}
    else:
        with pytest.raises(ValueError, match=said):
            worker.run()
    assert videos(tmp_path) == {"a.mp4": b"a"}


def test_a_failing_video_is_recorded_and_the_others_go_on(tmp_path: Path):
    def render(task: Task, folder: Path) -> dict[str, Any]:
        if task.name == "b":
            raise RuntimeError("out of\nmemory")
        return make_file(task, folder)

    tasks = [make_task(name) for name in "abc"]
    assert make_worker(tasks, tmp_path, render).run() == {"b": "RuntimeError: out of memory"}
    assert sorted(videos(tmp_path)) == ["a.mp4", "c.mp4"]
    record = json.loads((tmp_path / "b.error.json").read_text())
    assert record["task"]["name"] == "b"
    assert "Traceback" in record["traceback"][0]
    assert make_worker(tasks, tmp_path).run() == {}
    assert not (tmp_path / "b.error.json").exists()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EACCES, PermissionError)]
)
def test_only_a_full_disk_is_reported_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
):
    def refuse(_self: Locks, _label: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Locks, "take", refuse)
    with pytest.raises(kind):
        make_worker([make_task("a")], tmp_path).run()


def test_the_log_names_each_video_and_where_it_lies_afterwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def render(task: Task, folder: Path) -> dict[str, Any]:
        return make_file(task, folder)

    tasks = [replace(make_task(name), folder="flowcache_fast") for name in "ab"]
    with caplog.at_level(logging.INFO):
        Worker(tasks, tmp_path, render).run()
    assert caplog.messages == [
        line
        for number, name in enumerate("ab", start=1)
        for line in (
            f"video         {number} of 2: flowcache_fast/{name}, {tasks[0].preset}",
            f"wrote         {tmp_path / 'flowcache_fast' / name}.mp4",
        )
    ]
    assert all(Path(line.split()[1]).is_file() for line in caplog.messages[1::2])


def test_a_warning_is_shown_once_per_process_and_every_message(caplog: pytest.LogCaptureFixture):
    logger = logging.getLogger("magi1.run")
    caplog.set_level(logging.INFO)
    with warned_once(["magi1.run"]):
        for name in "ab":
            logger.warning("no special tokens")
            logger.warning("of %s", name)
            logger.info("wrote a video")
    logger.warning("no special tokens")
    assert [record.getMessage() for record in caplog.records] == [
        *("no special tokens", "of a", "wrote a video", "of b", "wrote a video"),
        "no special tokens",
    ]


# Locks


def take(out: Path, label: str = "a", **changes: Any) -> Lock:
    """Take a lock, and change what it says of its owner."""
    lock = Locks(out).take(label)
    assert lock is not None
    lock.path.write_text(json.dumps({**json.loads(lock.owner), **changes}))
    return lock


def test_of_many_threads_exactly_one_gets_a_lock(tmp_path: Path):
    for round_ in range(20):
        found: list[Any] = []
        barrier = threading.Barrier(8)

        def compete(label: str = f"{round_}", barrier: Any = barrier, found: Any = found) -> None:
            barrier.wait()
            found.append(Locks(tmp_path).take(label))

        threads = [threading.Thread(target=compete) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(lock is not None for lock in found) == 1


@pytest.mark.parametrize(
    ("other", "is_taken_over"),
    [
        pytest.param("{host} {boot} {names}", True, id="of this machine"),
        pytest.param("{host} {boot} pid:[1]", False, id="of a container with this hostname"),
        pytest.param("{host} another-boot {names}", False, id="of an earlier start"),
    ],
)
def test_a_lock_of_a_process_that_is_gone_is_taken_over_where_its_number_means_something(
    tmp_path: Path, other: str, is_taken_over: bool
):
    host, boot, names = json.loads(take(tmp_path, "b").owner)["place"].split()
    ended = subprocess.Popen(["true"])
    ended.wait()
    place = other.format(host=host, boot=boot, names=names)
    first = take(tmp_path, place=place, pid=ended.pid)
    second = Locks(tmp_path).take("a")
    assert (second is not None) == is_taken_over
    if second is not None:
        assert second.generation == 1
        assert second.is_valid()
        assert not first.is_valid()


def test_a_lock_of_another_machine_is_stale_only_without_a_heartbeat(tmp_path: Path):
    first = take(tmp_path, place="elsewhere", pid=1)
    waiting = Locks(tmp_path, stale_seconds=0.2)
    assert waiting.take("a") is None
    time.sleep(0.15)
    os.utime(first.path)
    assert waiting.take("a") is None
    time.sleep(0.15)
    assert waiting.take("a") is None  # the heartbeat began the count anew
    time.sleep(0.15)
    second = waiting.take("a")
    assert second is not None
    assert second.generation == 1


def test_who_lost_its_lock_drops_what_it_made(tmp_path: Path):
    def slow(task: Task, folder: Path) -> dict[str, Any]:
        (folder.parent / "7").write_text("{}")  # somebody took over
        return make_file(task, folder)

    worker = make_worker([make_task("a")], tmp_path, slow)
    lock = worker.locks.take("a")
    assert lock is not None
    with lock.held():
        worker._make(make_task("a"), lock)
    assert not (tmp_path / "a.mp4").exists()


def test_who_lost_its_lock_and_its_folder_goes_on_without_a_failure(tmp_path: Path):
    first, second = (make_worker([make_task("a")], tmp_path) for _ in range(2))
    later = []

    def suspended(task: Task, folder: Path) -> dict[str, Any]:
        owner = json.loads((folder.parent / "0").read_text())
        (folder.parent / "0").write_text(json.dumps({**owner, "place": "elsewhere"}))
        second.locks.stale_seconds = -1.0  # as if the process had been suspended for long
        assert second.run() == {}
        later.append(second.locks.take("a"))  # a lock of the same generation
        return make_file(task, folder)  # the folder is gone

    first.render = suspended
    assert first.run() == {}
    assert videos(tmp_path) == {"a.mp4": b"a"}
    assert not (tmp_path / "a.error.json").exists()
    assert later[0].generation == 0
    assert later[0].is_valid()  # the lock of somebody else was left alone
