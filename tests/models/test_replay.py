"""Runs that make the decisions of a recorded run again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowcache.runtime.ending import EXIT_USER_ERROR
from flowcache.runtime.record import read_record
from flowcache.runtime.video import read_video

pytestmark = pytest.mark.numeric

SETTINGS = {
    "skyreels_v2": ("ar_step=2", "reuse.threshold=0.4", "num_steps=6"),
    "magi1": ("reuse.threshold=0.05", "runtime_config.num_steps=8"),
}
"""With them a run computes some steps and reuses others."""


def start(tiny: Any, out: Path, *rest: str) -> int:
    """Run the command line; return the exit code."""
    given = ["--preset", tiny.short.uncompressed, "--model", str(tiny.folder)]
    given += ["--prompt", "a red circle moving right", "--out", str(out)]
    return tiny.main(*given, *SETTINGS[tiny.model.name], "reuse.warmup_steps=1", *rest)


@pytest.fixture(scope="module")
def first(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the record of a run."""
    out = tmp_path_factory.mktemp("first") / "first.mp4"
    assert start(tiny, out, "--record") == 0
    return out.with_suffix(".record.json")


def decisions(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    names = ("segment", "tick", "chunk", "step", "branch", "computed")
    return [tuple(row[name] for name in names) for row in record["decisions"]]


def test_a_replayed_run_gives_the_same_frames_whatever_its_policy_would_decide(
    tiny: Any, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record = read_record(first)
    assert {computed for *_, computed in decisions(record)} == {True, False}
    frames = read_video(first.with_name("first.mp4"))[0]
    given = ("reuse.threshold=0", "--record", "--replay", str(first))
    assert start(tiny, tmp_path / "again.mp4", *given) == 0
    assert np.array_equal(read_video(tmp_path / "again.mp4")[0], frames)
    again = read_record(tmp_path / "again.record.json")
    assert decisions(again) == decisions(record)
    assert (again["policy"], again["threshold"]) == ("replay", None)
    assert json.loads((tmp_path / "again.json").read_text())["replay"] == "first.mp4"
    assert json.loads(first.with_name("first.json").read_text())["replay"] is None
    assert "replay       the decisions of first.mp4 (flowcache)\n" in capsys.readouterr().out
    # what the settings ask for is another video
    assert start(tiny, tmp_path / "zero.mp4", "reuse.threshold=0") == 0
    assert not np.array_equal(read_video(tmp_path / "zero.mp4")[0], frames)


def test_a_run_that_forecasts_have_decided_is_replayed_without_them(tiny: Any, tmp_path: Path):
    first, again = tmp_path / "first.mp4", tmp_path / "again.mp4"
    policy = ("reuse.policy=racer", "reuse.threshold=9", "--record")
    assert start(tiny, first, *policy) == 0
    record = read_record(first.with_suffix(".record.json"))
    assert {computed for *_, computed in decisions(record)} == {True, False}
    given = ("reuse.policy=vanilla", "--record", "--replay", str(first.with_suffix(".record.json")))
    assert start(tiny, again, *given) == 0
    assert np.array_equal(read_video(again)[0], read_video(first)[0])
    assert decisions(read_record(again.with_suffix(".record.json"))) == decisions(record)


MISFITS = [
    ("skyreels_v2", "num_steps=5", "it has 10 ticks, the run 9"),
    ("skyreels_v2", "ar_step=3", "it has 10 ticks, the run 12"),
    (
        "skyreels_v2",
        "guidance=1",
        "it has decisions of segment 0, branch uncond, which the run does not make",
    ),
    ("skyreels_v2", "attention=full", "it reuses chunks"),
    ("magi1", "runtime_config.num_steps=12", "it has 12 ticks, the run 18"),
    ("magi1", "runtime_config.num_frames=36", "it has 12 ticks, the run 16"),
    ("magi1", "runtime_config.window_size=1", "it has 12 ticks, the run 16"),
]
"""Model, setting, reason."""


def test_a_record_that_does_not_fit_is_refused_in_one_line_before_anything_is_loaded(
    tiny: Any, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for change, reason in ((row[1:]) for row in MISFITS if row[0] == tiny.model.name):
        given = (change, "--replay", str(first), "--dry-run")
        assert start(tiny, tmp_path / "no.mp4", *given) == EXIT_USER_ERROR
        message = capsys.readouterr().err
        assert message.startswith(f"error: the record does not fit this run: {reason}")
        assert message.count("\n") == 1


def test_a_record_of_another_model_is_refused(
    tiny: Any, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record = json.loads(first.read_text())
    for row in record["decisions"]:
        row["branch"] = "other"
    other = tmp_path / "other.record.json"
    other.write_text(json.dumps(record))
    assert start(tiny, tmp_path / "no.mp4", "--replay", str(other)) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert "it has decisions of segment 0, branch other, which the run does not make" in message
    assert message.count("\n") == 1


def test_what_is_no_record_is_named(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.json").write_text("{}")
    for name, reason in (("a.json", "schema_version must be 1"), ("b.json", "cannot be read")):
        given = ("--replay", str(tmp_path / name))
        assert start(tiny, tmp_path / "no.mp4", *given) == EXIT_USER_ERROR
        message = capsys.readouterr().err
        assert reason in message
        assert message.count("\n") == 1
    assert not (tmp_path / "no.mp4").exists()
