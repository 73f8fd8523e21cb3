"""Many videos by many processes: divided in advance, resumable, never half a result."""

import errno
import fcntl
import json
import logging
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_cases import drive, make_file, make_task, receipts, videos

from flowcache.bench import worker as worker_module
from flowcache.bench.tasks import Task
from flowcache.bench.worker import DiskFullError, Worker, divide, warned_once

# Several processes


def whole(repeat: int = 20) -> dict[str, bytes]:
    """Return the files that a process makes."""
    return {
        f"a/{n:02d}.mp4": b"".join(
            f"{n:02d} {part} ".encode() * (1 + n) * repeat for part in range(10)
        )
        for n in range(12)
    }


def test_two_processes_divide_the_work_and_a_second_start_makes_nothing_again(tmp_path: Path):
    processes = [drive(tmp_path, rank=rank, size=2, pause=0.002) for rank in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0]
    assert videos(tmp_path) == whole()
    assert not (tmp_path / ".unfinished").exists()
    before = receipts(tmp_path)
    assert drive(tmp_path).wait() == 0
    assert receipts(tmp_path) == before


def test_after_kills_at_random_moments_the_set_is_that_of_an_undisturbed_run(tmp_path: Path):
    dice, interrupted = random.Random(7), 0
    for _ in range(12):
        processes = [drive(tmp_path, rank=rank, size=2, pause=0.004) for rank in (0, 1)]
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


@pytest.mark.parametrize(
    ("costs", "num_shares", "expected"),
    [
        pytest.param([3, 3, 5, 4, 3], 2, [[2, 1], [3, 0, 4]], id="by hand"),
        pytest.param([1] * 5, 2, [[0, 2, 4], [1, 3]], id="equal costs"),
        pytest.param([1, 9], 3, [[1], [0], []], id="fewer than shares"),
        pytest.param([], 2, [[], []], id="nothing"),
    ],
)
def test_the_most_expensive_is_given_first_to_the_share_that_costs_least(
    costs: list[float], num_shares: int, expected: list[list[int]]
):
    assert divide(costs, num_shares) == expected


@given(st.lists(st.floats(0.0, 1e15), max_size=40), st.integers(1, 8))
def test_shares_hold_everything_once_and_differ_by_one_video_at_most(
    costs: list[float], num_shares: int
):
    shares = divide(costs, num_shares)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    loads = [sum(costs[index] for index in share) for share in shares]
    # relative: sums of floats
    assert max(loads) - min(loads) <= max(costs, default=0.0) * (1 + 1e-9)


# One process


def test_a_start_removes_what_killed_processes_left_and_nothing_else(tmp_path: Path):
    left, used = (tmp_path / ".unfinished" / f"flowcache-unpacked-{name}" for name in "ab")
    for folder in (left, used):
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    with (used / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert Worker(tmp_path, make_file).run([make_task("a")]) == {}
        assert list(left.parent.iterdir()) == [used]
    assert Worker(tmp_path, make_file).run([make_task("a")]) == {}
    assert not left.parent.exists()


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
            Worker(tmp_path, make_file).run([make_task("a")])
    assert videos(tmp_path) == {}
    assert Worker(tmp_path, make_file).run([make_task("a")]) == {}
    assert videos(tmp_path) == {"a.mp4": b"a"}


def test_an_interruption_leaves_no_half_file(tmp_path: Path):
    def interrupt(task: Task, folder: Path) -> dict[str, Any]:
        (folder / f"{task.name}.mp4").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Worker(tmp_path, interrupt).run([make_task("a")])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert Worker(tmp_path, make_file).run([make_task("a")]) == {}


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

    Worker(tmp_path, make_file).run(tasks)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    assert Worker(tmp_path, render).run(tasks) == {}
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
    Worker(tmp_path, make_file, {made.kind: first}).run([made])
    (tmp_path / "b.json").write_text("{}")
    worker = Worker(tmp_path, make_file, {task.kind: first | origin})
    if said is None:
        assert worker.run([task]) == {}
    else:
        with pytest.raises(ValueError, match=said):
            worker.run([task])
    assert videos(tmp_path) == {"a.mp4": b"a"}


def test_a_failing_video_is_recorded_and_the_others_go_on(tmp_path: Path):
    def render(task: Task, folder: Path) -> dict[str, Any]:
        if task.name == "b":
            raise RuntimeError("out of\nmemory")
        return make_file(task, folder)

    tasks = [make_task(name) for name in "abc"]
    assert Worker(tmp_path, render).run(tasks) == {"b": "RuntimeError: out of memory"}
    assert sorted(videos(tmp_path)) == ["a.mp4", "c.mp4"]
    record = json.loads((tmp_path / "b.error.json").read_text())
    assert record["task"]["name"] == "b"
    assert "Traceback" in record["traceback"][0]
    assert Worker(tmp_path, make_file).run(tasks) == {}
    assert not (tmp_path / "b.error.json").exists()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EACCES, PermissionError)]
)
def test_only_a_full_disk_is_reported_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
):
    def refuse(_place: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(worker_module, "temporary_folder", refuse)
    with pytest.raises(kind):
        Worker(tmp_path, make_file).run([make_task("a")])


def test_the_log_names_each_video_and_where_it_lies_afterwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tasks = [replace(make_task(name), folder="flowcache_fast") for name in "ab"]
    with caplog.at_level(logging.INFO):
        Worker(tmp_path, make_file).run(tasks)
    assert caplog.messages == [
        line
        for name in "ab"
        for line in (
            f"video         flowcache_fast/{name}, {tasks[0].preset}",
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
