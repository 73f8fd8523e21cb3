"""Locks: one process makes a video, and another takes over once that is gone."""

import importlib
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from sampling_cases import (
    make_file,
    make_task,
    make_worker,
    videos,
)


def test_of_many_threads_exactly_one_gets_a_lock(tmp_path: Path):
    locks = importlib.import_module("flowcache.bench.locks")
    for round_ in range(20):
        found: list[Any] = []
        barrier = threading.Barrier(8)

        def take(label: str = f"task {round_}", barrier: Any = barrier, found: Any = found) -> None:
            barrier.wait()
            found.append(locks.Locks(tmp_path).take(label))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(lock is not None for lock in found) == 1


def test_a_lock_whose_process_is_gone_is_taken_over_at_once(tmp_path: Path):
    locks = importlib.import_module("flowcache.bench.locks")
    first = locks.Locks(tmp_path).take("a")
    ended = subprocess.Popen(["true"])
    ended.wait()
    owner = json.loads(first.path.read_text())
    first.path.write_text(json.dumps({**owner, "pid": ended.pid}))
    second = locks.Locks(tmp_path).take("a")
    assert second.generation == 1
    assert second.is_valid()
    assert not first.is_valid()


def test_a_lock_of_another_machine_is_stale_only_without_a_heartbeat(tmp_path: Path):
    locks = importlib.import_module("flowcache.bench.locks")
    first = locks.Locks(tmp_path).take("a")
    owner = json.loads(first.path.read_text())
    first.path.write_text(json.dumps({**owner, "place": "elsewhere", "pid": 1}))
    waiting = locks.Locks(tmp_path, stale_seconds=0.2)
    assert waiting.take("a") is None
    time.sleep(0.15)
    os.utime(first.path)
    assert waiting.take("a") is None
    time.sleep(0.15)
    assert waiting.take("a") is None  # the heartbeat began the count anew
    time.sleep(0.15)
    assert waiting.take("a").generation == 1


def test_a_process_number_of_another_container_with_this_hostname_says_nothing(tmp_path: Path):
    locks = importlib.import_module("flowcache.bench.locks")
    first = locks.Locks(tmp_path).take("a")
    owner = json.loads(first.path.read_text())
    ended = subprocess.Popen(["true"])
    ended.wait()
    host, *rest = owner["place"].split()
    assert len(rest) == 2
    for place in (f"{host} {rest[0]} pid:[1]", f"{host} another-boot {rest[1]}"):
        first.path.write_text(json.dumps({**owner, "place": place, "pid": ended.pid}))
        assert locks.Locks(tmp_path).take("a") is None


def test_who_lost_its_lock_drops_what_it_made(tmp_path: Path):
    def slow(task: Any, folder: Path) -> dict[str, Any]:
        (folder.parent / "7").write_text("{}")  # somebody took over
        return make_file(task, folder)

    worker = make_worker([make_task("a")], tmp_path, slow)
    lock = worker.locks.take("a")
    with lock.held():
        worker._make(make_task("a"), lock)
    assert not (tmp_path / "a.mp4").exists()


def test_who_lost_its_lock_and_its_folder_goes_on_without_a_failure(tmp_path: Path):
    first, second = (make_worker([make_task("a")], tmp_path) for _ in range(2))
    later = []

    def suspended(task: Any, folder: Path) -> dict[str, Any]:
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
