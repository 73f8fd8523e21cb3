"""Several processes make the video that one makes: divided by branches, by tokens, and by both."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import num_ulps

from flowcache.runtime.record import read_record
from flowcache.runtime.run import prepare
from skyreels_v2.model import MODEL

SCRIPT = Path(__file__).with_name("parallel_runs.py")
LAYOUTS = {2: ("1x2", "2x1"), 4: ("1x4", "2x2")}
NUMBERS = [2, pytest.param(4, marks=pytest.mark.slow)]
ULPS = 256
"""Pixels of several processes may differ by this: they add up in another order in every step."""

Results = dict[str, dict[str, dict[str, Any]]]
"""Layout -> case -> what came out"""


@pytest.fixture(scope="module")
def made(
    small: Path, tmp_path_factory: pytest.TempPathFactory, run_in_ranks: Callable[..., None]
) -> Callable[[int], list[Results]]:
    """Return what makes the videos of all cases in so many processes, once."""
    known: dict[int, list[Results]] = {}

    def make(num: int) -> list[Results]:
        if num not in known:
            folder = tmp_path_factory.mktemp("ranks")
            layouts = LAYOUTS.get(num, ("1x1",))
            run_in_ranks(SCRIPT, str(small), str(folder), *layouts, num=num)
            known[num] = [
                torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num)
            ]
        return known[num]

    return make


@pytest.mark.numeric
@pytest.mark.parametrize("num", NUMBERS)
def test_processes_make_the_video_of_one(made: Callable[[int], list[Results]], num: int):
    [alone] = made(1)
    for of_rank in made(num):
        assert tuple(of_rank) == LAYOUTS[num]
        for layout, cases in of_rank.items():
            assert cases.keys() == alone["1x1"].keys()
            for name, case in cases.items():
                expected = alone["1x1"][name]["frames"]
                difference = num_ulps(case["frames"], expected, size=1.0)
                assert difference < ULPS, f"{name}, {layout}: {difference} ulps"


@pytest.mark.parametrize("num", NUMBERS)
def test_processes_decide_and_count_as_one(made: Callable[[int], list[Results]], num: int):
    [alone] = made(1)
    for of_rank in made(num):
        for cases in of_rank.values():
            for name, case in cases.items():
                expected = alone["1x1"][name]
                assert case["computed"] == expected["computed"], name
                assert case["flops"] == expected["flops"], name


@pytest.mark.parametrize("num", NUMBERS)
def test_processes_record_what_one_records(
    made: Callable[[int], list[Results]], num: int, same_record: Callable[[Path, Path], None]
):
    [alone], [first, *_] = made(1), made(num)
    for cases in first.values():
        request = cases["compression"]["request"]
        same_record(Path(request.out), Path(alone["1x1"]["compression"]["request"].out))
        # one process makes the decisions again
        again = [*request.overrides, "parallel.branch=null", "parallel.sequence=null"]
        path = str(Path(request.out).with_suffix(".record.json"))
        job = prepare(MODEL, replace(request, overrides=again, replay=path, overwrite=True))
        assert job.replay == read_record(Path(path))


def test_the_cases_reuse_and_compress(made: Callable[[int], list[Results]]):
    [alone] = made(1)
    cases = alone["1x1"]
    for name in ("teacache", "flowcache", "content", "compression", "stride", "segments"):
        computed, without_reuse = cases[name]["flops"]
        assert computed < without_reuse, name
    frames = (cases[name]["frames"] for name in ("flowcache", "compression"))
    assert num_ulps(*frames, size=1.0) > 100 * ULPS


def launch(model: Path, out: Path, *arguments: str, num: int) -> list[str]:
    return [
        *(sys.executable, "-m", "flowcache.launch", str(num)),
        *("-m", "skyreels_v2", "--preset", "vanilla"),
        *("--model", str(model), "--prompt", "a cat", "--out", str(out), *arguments),
    ]


def processes_of(launcher: int) -> dict[str, int]:
    """Return the processes that a launcher started, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_text().split("\0")
        ranks = [entry[5:] for entry in environment if entry.startswith("RANK=")]
        found |= dict.fromkeys(ranks, int(child))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_processes_end_within_a_minute_when_one_dies(small: Path, tmp_path: Path):
    out, told = tmp_path / "a.mp4", tmp_path / "told"
    command = launch(small, out, "num_steps=900", num=2)
    with told.open("w") as stream:
        launcher = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        while "tick" not in told.read_text().partition("output")[2]:
            assert launcher.poll() is None, told.read_text()
            time.sleep(0.2)
        processes = processes_of(launcher.pid)
        os.kill(processes["1"], signal.SIGKILL)
        assert launcher.wait(timeout=60) != 0
    assert processes.keys() == {"0", "1"}
    assert not any(Path(f"/proc/{process}").exists() for process in processes.values())
    assert told.read_text().count("error: ") <= 1
    assert list(tmp_path.iterdir()) == [told]


def test_what_can_not_be_divided_is_told_once_before_anything_is_loaded(
    small: Path, tmp_path: Path
):
    command = launch(small, tmp_path / "a.mp4", "parallel.branch=1", num=3)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: parallel.sequence=3 does not divide the 4 key/value heads of the model: "
        "start 1 or 2 processes instead of 3 (a launcher: GPUS=1 or 2)\n"
    )
    assert not list(tmp_path.iterdir())
