"""Runs of the demo that make the decisions of a recorded run again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowcache.runtime.ending import EXIT_USER_ERROR
from flowcache.runtime.record import read_record
from flowcache.runtime.video import read_video
from skyreels_v2.__main__ import main
from skyreels_v2.released import RELEASED

pytestmark = pytest.mark.numeric

LONG = ("num_frames=25", "base_num_frames=17", "overlap_history=9", "causal_block_size=2")
"""Two segments, of 5 latent frames in 3 chunks, and of 2 new latent frames in one."""
SETTINGS = (
    *("height=32", "width=32", "num_steps=6", "ar_step=2"),
    *("reuse.threshold=0.15", "reuse.warmup_steps=1"),
    *LONG,
)


def start(out: Path, *rest: str, preset: str = "flowcache_fast", model: str = "demo") -> int:
    """Run the command line; return the exit code."""
    given = ["--prompt", "a red circle moving right on a black background", "--seed", "3"]
    return main(["--preset", preset, "--model", model, *given, "--out", str(out), *rest])


@dataclass(frozen=True)
class Recorded:
    """A video and its record."""

    path: Path
    record: dict[str, Any]

    @property
    def frames(self) -> np.ndarray:
        return read_video(self.path)[0]


def recorded(out: Path, *rest: str, preset: str = "flowcache_fast") -> Recorded:
    assert start(out, "--record", *rest, preset=preset) == 0
    return Recorded(out, read_record(out.with_suffix(".record.json")))


def decisions(run: Recorded) -> list[tuple[Any, ...]]:
    names = ("segment", "tick", "chunk", "step", "branch", "computed")
    return [tuple(row[name] for name in names) for row in run.record["decisions"]]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return recorded(tmp_path_factory.mktemp("first") / "first.mp4", *SETTINGS)


def replay(run: Recorded) -> tuple[str, str]:
    return "--replay", str(run.path.with_suffix(".record.json"))


def test_the_decisions_of_all_segments_are_replayed(first: Recorded, tmp_path: Path):
    assert {computed for *_, computed in decisions(first)} == {True, False}
    assert {segment for segment, *_ in decisions(first)} == {0, 1}
    again = recorded(tmp_path / "again.mp4", *SETTINGS, "reuse.threshold=0", *replay(first))
    assert np.array_equal(again.frames, first.frames)
    assert decisions(again) == decisions(first)


def test_decisions_for_the_whole_window_are_replayed_too(tmp_path: Path):
    given = (*SETTINGS, "attention=full")
    run = recorded(tmp_path / "first.mp4", *given, preset="teacache_fast")
    assert {computed for *_, computed in decisions(run)} == {True, False}
    again = recorded(tmp_path / "again.mp4", *given, *replay(run), preset="vanilla")
    assert np.array_equal(again.frames, run.frames)
    assert decisions(again) == decisions(run)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("num_frames=17", "decisions of segment 1, branch cond, which the run does not make"),
        ("num_frames=33", "no decisions of segment 2, branch cond"),
    ],
)
def test_a_record_of_another_number_of_segments_is_refused(
    first: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, reason: str
):
    code = start(tmp_path / "no.mp4", *SETTINGS, change, *replay(first), "--dry-run")
    assert code == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert message.startswith("error: the record does not fit this run: ")
    assert reason in message
    assert message.count("\n") == 1


def test_a_record_is_planned_with_a_released_model_too(
    first: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    released = next(iter(RELEASED))
    given = (*SETTINGS, *replay(first), "--dry-run")
    assert start(tmp_path / "no.mp4", *given, "num_steps=7", model=released) == EXIT_USER_ERROR
    assert "the record does not fit this run" in capsys.readouterr().err
