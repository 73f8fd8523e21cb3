"""Replays of runs of several segments, and of decisions for the whole window."""

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

SETTINGS = (
    *("height=32", "width=32", "num_steps=6", "ar_step=2", "reuse.threshold=0.15"),
    *("reuse.warmup_steps=1", "num_frames=25", "base_num_frames=17", "overlap_history=9"),
    "causal_block_size=2",
)
"""Two segments, of 5 latent frames in 3 chunks, and of 2 new latent frames in one."""


def start(out: Path, *rest: str, preset: str = "flowcache_fast", model: str = "demo") -> int:
    """Run the command line; return the exit code."""
    given = ["--prompt", "a red circle moving right on a black background", "--seed", "3"]
    return main(["--preset", preset, "--model", model, *given, "--out", str(out), *SETTINGS, *rest])


def recorded(out: Path, *rest: str, preset: str) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
    """Return the frames and the decisions of a run."""
    assert start(out, "--record", *rest, preset=preset) == 0
    names = ("segment", "tick", "chunk", "step", "branch", "computed")
    rows = read_record(out.with_suffix(".record.json"))["decisions"]
    return read_video(out)[0], [tuple(row[name] for name in names) for row in rows]


@pytest.mark.parametrize(
    ("preset", "settings", "other"),
    [
        ("flowcache_fast", (), ("flowcache_fast", "reuse.threshold=0")),
        ("teacache_fast", ("attention=full",), ("vanilla", "attention=full")),
    ],
    ids=["all segments", "the whole window"],
)
def test_the_decisions_are_replayed(
    tmp_path: Path, preset: str, settings: tuple[str, ...], other: tuple[str, str]
):
    frames, decisions = recorded(tmp_path / "first.mp4", *settings, preset=preset)
    assert {computed for *_, computed in decisions} == {True, False}
    assert {segment for segment, *_ in decisions} == {0, 1}
    replay = ("--replay", str(tmp_path / "first.record.json"))
    again, same = recorded(tmp_path / "again.mp4", *other[1:], *replay, preset=other[0])
    assert np.array_equal(again, frames)
    assert same == decisions


@pytest.mark.parametrize(
    ("change", "model", "reason"),
    [
        ("num_frames=17", "demo", "decisions of segment 1, branch cond, which the run does not"),
        ("num_frames=33", "demo", "no decisions of segment 2, branch cond"),
        ("num_steps=7", next(iter(RELEASED)), ""),
    ],
    ids=["fewer segments", "more segments", "a released model"],
)
def test_a_record_that_does_not_fit_is_refused_in_the_plan(
    first: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    model: str,
    reason: str,
):
    given = (change, "--replay", str(first), "--dry-run")
    assert start(tmp_path / "no.mp4", *given, model=model) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert message.startswith("error: the record does not fit this run: ")
    assert reason in message
    assert message.count("\n") == 1


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a record."""
    out = tmp_path_factory.mktemp("first") / "first.mp4"
    assert start(out, "--record") == 0
    return out.with_suffix(".record.json")
