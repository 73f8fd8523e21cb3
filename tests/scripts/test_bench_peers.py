"""The comparison with diffusers' pipeline: its table, its file, and what makes it fail."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

TINY = ("--runs", "2", "--frames", "5", "--steps", "3", "--methods")


@pytest.fixture(name="script")
def _script() -> ModuleType:
    return importlib.import_module("bench_peers")


def test_vanilla_equals_diffusers_and_a_preset_that_reuses_need_not(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert script.main([*TINY, "vanilla", "stride", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench_peers.json").read_text())
    rows = report["rows"]
    assert [(row["method"], row["part"]) for row in rows] == [
        (method, part) for method in ("vanilla", "stride") for part in ("transformer", "with VAE")
    ]
    for row in rows:
        pairs = zip(row["their_seconds"], row["our_seconds"], strict=True)
        assert row["ratios"] == [theirs / ours for theirs, ours in pairs]
        assert len(row["ratios"]) == 2
    assert all(row["difference"] < 1e-4 for row in rows[:2])
    shown = capsys.readouterr().out
    assert shown.count(", equal |") == 2
    assert shown.count(" dB") == 1


def test_another_result_is_an_error(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = script.make

    def wrong(pipe: object, output: str, call: object) -> object:
        frames = made(pipe, output, call)
        return frames + 0.01 if "FlowCache" in type(pipe).__name__ else frames

    monkeypatch.setattr(script, "make", wrong)
    assert script.main([*TINY, "vanilla", "--out", str(tmp_path)]) == 1


def test_no_run_is_refused_in_one_line(script: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert script.main(["--runs", "0"]) == 2
    assert "--runs must be 1 or more, not 0" in capsys.readouterr().err
