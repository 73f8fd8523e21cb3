"""Runs that make the decisions of a recorded run again."""

import json
from pathlib import Path

import numpy as np
import pytest

from flowcache.runtime.ending import EXIT_USER_ERROR
from flowcache.runtime.record import read_record
from flowcache.runtime.video import read_video
from magi1.__main__ import main

pytestmark = pytest.mark.numeric

SETTINGS = ("reuse.threshold=0.05", "reuse.warmup_steps=1", "runtime_config.num_steps=8")


def start(model: Path, out: Path, *rest: str) -> int:
    """Run the command line; return the exit code."""
    prompt = ["--prompt", "a red circle moving right"]
    given = ["--preset", "flowcache_fast_nocompress", "--model", str(model), *prompt]
    return main([*given, "--out", str(out), *SETTINGS, *rest])


@pytest.fixture(scope="module")
def first(distilled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the record of a run."""
    out = tmp_path_factory.mktemp("first") / "first.mp4"
    assert start(distilled, out, "--record") == 0
    return out.with_suffix(".record.json")


def test_a_replayed_run_gives_the_same_frames_whatever_its_policy_would_decide(
    distilled: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record = read_record(first)
    assert {row["computed"] for row in record["decisions"]} == {True, False}
    frames = read_video(first.with_name("first.mp4"))[0]
    given = ("reuse.threshold=0", "--record", "--replay", str(first))
    assert start(distilled, tmp_path / "again.mp4", *given) == 0
    assert np.array_equal(read_video(tmp_path / "again.mp4")[0], frames)
    again = read_record(tmp_path / "again.record.json")
    assert [row["computed"] for row in again["decisions"]] == [
        row["computed"] for row in record["decisions"]
    ]
    assert (again["policy"], again["threshold"]) == ("replay", None)
    assert json.loads((tmp_path / "again.json").read_text())["replay"] == "first.mp4"
    assert json.loads(first.with_name("first.json").read_text())["replay"] is None
    assert "replay       the decisions of first.mp4 (flowcache)\n" in capsys.readouterr().out
    # what the settings ask for is another video
    assert start(distilled, tmp_path / "zero.mp4", "reuse.threshold=0") == 0
    assert not np.array_equal(read_video(tmp_path / "zero.mp4")[0], frames)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("runtime_config.num_steps=12", "it has 12 ticks, the run 18"),
        ("runtime_config.num_frames=36", "it has 12 ticks, the run 16"),
        ("runtime_config.window_size=1", "it has 12 ticks, the run 16"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_in_one_line_before_anything_is_loaded(
    distilled: Path,
    first: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    reason: str,
):
    given = (change, "--replay", str(first), "--dry-run")
    assert start(distilled, tmp_path / "no.mp4", *given) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert message.startswith(f"error: the record does not fit this run: {reason}")
    assert message.count("\n") == 1


def test_a_record_of_another_model_family_is_refused(
    distilled: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record = json.loads(first.read_text())
    for row in record["decisions"]:
        row["branch"] = "cond"
    other = tmp_path / "other.record.json"
    other.write_text(json.dumps(record))
    assert start(distilled, tmp_path / "no.mp4", "--replay", str(other)) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert "it has decisions of segment 0, branch cond, which the run does not make" in message
    assert message.count("\n") == 1
