"""Many videos by many processes: shared by a folder, resumable, never half a result."""

import importlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sampling_cases import (
    drive,
    make_file,
    make_task,
    make_worker,
    receipts,
    videos,
)


def test_two_processes_share_the_work_and_make_the_same_files(tmp_path: Path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert drive(alone).wait() == 0
    processes = [drive(together, first=first, pause=0.002) for first in (0, 6)]
    assert [process.wait() for process in processes] == [0, 0]
    assert videos(alone) == videos(together)
    assert len(videos(alone)) == 12
    assert not (together / ".claims").exists()


def test_after_kills_at_random_moments_the_set_is_that_of_an_undisturbed_run(tmp_path: Path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert drive(alone).wait() == 0
    dice = random.Random(7)
    interrupted = 0
    for _ in range(12):
        processes = [drive(killed, first=first, pause=0.004) for first in (0, 5)]
        time.sleep(dice.uniform(0.05, 0.5))
        for process in processes:
            process.kill()
        interrupted += sum(process.wait() == -signal.SIGKILL for process in processes)
        for name, receipt in receipts(killed).items():
            made = killed / "a" / f"{name}.mp4"
            assert made.read_bytes() == (alone / "a" / f"{name}.mp4").read_bytes()
            assert receipt["num_bytes"] == made.stat().st_size
    assert interrupted > 0
    assert drive(killed).wait() == 0
    assert videos(killed) == videos(alone)
    leftovers = [
        path for path in killed.rglob("*") if ".claims" in path.parts or path.name[0] == "."
    ]
    assert leftovers == []


def test_a_second_start_makes_nothing_again(tmp_path: Path):
    assert drive(tmp_path).wait() == 0
    before = receipts(tmp_path)
    assert drive(tmp_path).wait() == 0
    assert receipts(tmp_path) == before


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
    assert list(videos(tmp_path)) == []
    assert make_worker([make_task("a")], tmp_path).run() == {}
    assert list(videos(tmp_path)) == ["a.mp4"]


def test_an_interruption_leaves_no_claim_and_no_half_file(tmp_path: Path):
    def interrupt(task: Any, folder: Path) -> dict[str, Any]:
        (folder / f"{task.name}.mp4").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_worker([make_task("a")], tmp_path, interrupt).run()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert make_worker([make_task("a")], tmp_path).run() == {}


def test_a_damaged_video_is_made_again_and_no_other(tmp_path: Path):
    tasks = [make_task("a"), make_task("b")]
    make_worker(tasks, tmp_path).run()
    (tmp_path / "b.mp4").write_bytes(b"x")
    made: list[str] = []

    def render(task: Any, folder: Path) -> dict[str, Any]:
        made.append(task.name)
        return make_file(task, folder)

    assert make_worker(tasks, tmp_path, render).run() == {}
    assert made == ["b"]
    assert (tmp_path / "b.mp4").read_bytes() == b"b"


def test_a_video_without_its_receipt_does_not_count(tmp_path: Path):
    make_worker([make_task("a")], tmp_path).run()
    (tmp_path / "a.json").unlink()
    (tmp_path / "a.mp4").write_bytes(b"half")
    make_worker([make_task("a")], tmp_path).run()
    assert (tmp_path / "a.mp4").read_bytes() == b"a"


def test_results_of_other_settings_are_kept_and_refused(tmp_path: Path):
    make_worker([make_task("a")], tmp_path).run()
    with pytest.raises(ValueError, match=r"a\.json is of another run \(seed differ\)"):
        make_worker([make_task("a", settings=())], tmp_path)._is_over(
            importlib.import_module("dataclasses").replace(make_task("a"), seed=5), {}
        )
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match=r"b\.json is no receipt .* choose another output folder"):
        make_worker([make_task("b")], tmp_path).run()


@pytest.mark.parametrize("text", ["", '{"task": {', "\x00\x00"])
def test_a_receipt_that_a_power_cut_left_does_not_count(tmp_path: Path, text: str):
    make_worker([make_task("a")], tmp_path).run()
    whole = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text)
    assert make_worker([make_task("a")], tmp_path).run() == {}
    assert (tmp_path / "a.json").read_text() == whole


def test_results_of_an_edited_preset_or_another_checkpoint_are_kept_and_refused(tmp_path: Path):
    task = make_task("a")
    origin = {"resolved_settings": "1", "checkpoint": "2"}
    make_worker([task], tmp_path, origins={task.kind: origin}).run()
    make_worker([task], tmp_path, origins={task.kind: origin}).run()
    for changes, names in (
        ({"resolved_settings": "3"}, "resolved_settings"),
        ({"resolved_settings": "3", "checkpoint": "4"}, "resolved_settings, checkpoint"),
    ):
        worker = make_worker([task], tmp_path, origins={task.kind: origin | changes})
        with pytest.raises(ValueError, match=rf"is of another run \({names} differ\) and is kept"):
            worker.run()
    assert videos(tmp_path) == {"a.mp4": b"a"}


def test_a_failing_video_is_recorded_and_the_others_go_on(tmp_path: Path):
    def render(task: Any, folder: Path) -> dict[str, Any]:
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


def test_a_full_disk_ends_with_one_line_and_a_later_start_goes_on(tmp_path: Path):
    process = drive(tmp_path / "out", repeat=2000, limit=50_000)
    _, said = process.communicate()
    assert process.returncode == 2
    assert len(said.splitlines()) == 1
    assert "nothing more can be written (File too large)" in said
    assert "make room and start again" in said
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    assert drive(tmp_path / "out", repeat=2000).wait() == 0
    assert drive(tmp_path / "alone", repeat=2000).wait() == 0
    assert videos(tmp_path / "out") == videos(tmp_path / "alone")


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_what_is_complete(small_disk: Path, tmp_path: Path):
    out = small_disk / "out"
    process = drive(out, repeat=1000)  # some 50 kB each, twelve of them
    _, said = process.communicate()
    assert process.returncode == 2
    assert "nothing more can be written (No space left on device)" in said
    done = receipts(out)
    assert 0 < len(done) < 12
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert drive(out, repeat=1000).wait() == 0
    assert drive(tmp_path / "alone", repeat=1000).wait() == 0
    assert videos(out) == videos(tmp_path / "alone")
    assert {name: receipts(out)[name] for name in done} == done


def test_alarms_of_receipts_are_listed_and_go_into_the_notes_of_a_table(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    evidence = importlib.import_module("flowcache.bench.verify")
    worker = importlib.import_module("flowcache.bench.worker")
    tasks = [make_task(name, folder="half") for name in ("black", "good", "failed", "older")]
    folder = tmp_path / evidence.VIDEOS / "half"
    folder.mkdir(parents=True)
    said = "constant: all 9 frames are of one colour (black)"
    for name, receipt in (("black", {"alarms": [said]}), ("good", {"alarms": []}), ("older", {})):
        (folder / f"{name}.json").write_text(json.dumps(receipt))
    worker.say_alarms(tasks, tmp_path / evidence.VIDEOS, {"half/failed"})
    assert capfd.readouterr().err == f"ALARM half/black: {said}\n"
    complete = [task for task in tasks if task.name != "failed"]
    found = evidence.alarm_notes(complete, tmp_path / evidence.VIDEOS)
    assert found == [f"ALARM half/black: {said}"]
