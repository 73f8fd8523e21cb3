"""The command that measures what 8-bit linears change: its errors, and what it can't run."""

import importlib
import re
from types import ModuleType

import pytest
import torch
from tiny_self_forcing import write_checkpoint

TINY = ("--device", "cpu", "num_frames=9", "num_steps=2")
MAGI1 = ("--architecture", "magi1", "--device", "cpu", "num_frames=24", "num_steps=4")


@pytest.fixture(name="script")
def _script() -> ModuleType:
    return importlib.import_module("quantize_error")


def rows(text: str) -> dict[str, list[float]]:
    """Return the numbers of the table by the first cell: layer %, blocks %, dB, MB."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: [float(re.sub(r"[^\d.]", "", cell)) for cell in row[2:]] for row in cells[1:]}


@pytest.fixture(scope="session")
def self_forcing(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments for a tiny random checkpoint: there is no demo."""
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "self_forcing")
    checkpoint = ("--architecture", "self_forcing", "--model", str(folder))
    settings = ("checkpoint=checkpoints/tiny.pt", "num_frames=33")
    return (*checkpoint, "--preset", "self_forcing", "--device", "cpu", *settings)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("name", ["skyreels_v2", "magi1", "self_forcing"])
def test_errors_are_small_but_there_and_weights_shrink(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    name: str,
):
    given = {"skyreels_v2": TINY, "magi1": MAGI1}.get(name) or request.getfixturevalue(name)
    assert script.main([*given, "--mode", "int8_weight"]) == 0
    found = rows(capsys.readouterr().out)
    assert list(found) == ["bfloat16", "int8_weight"]
    plain, quantised = found["bfloat16"], found["int8_weight"]
    for layer, blocks, decibel, _ in (plain, quantised):
        assert 0 < layer < 2
        assert 0 < blocks < 5
        assert 20 < decibel < 80
    # 127 steps for the largest weight of a row round more coarsely than 8 bits of mantissa
    assert quantised[0] > plain[0]
    assert 0.5 < quantised[3] / plain[3] < 0.85


def test_an_error_is_relative_to_what_is_wanted(script: ModuleType):
    got, want = torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])
    assert script.relative_error(got, want) == pytest.approx(0.2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_what_can_not_run_is_named_and_a_mistake_is_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert script.main([*TINY, "--mode", "fp8_dynamic"]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert "quantize=fp8_dynamic needs an NVIDIA GPU" in shown.err
    monkeypatch.setattr(script, "MODES", ("fp8_dynamic",))
    assert script.main(TINY) == 0
    shown = capsys.readouterr().out
    assert list(rows(shown)) == ["bfloat16"]
    assert "fp8_dynamic: quantize=fp8_dynamic needs an NVIDIA GPU" in shown
    for setting in ("quantize=int8_weight", "dtype=float16", "device=cuda"):
        assert script.main([*TINY, setting]) == 2
        assert "is set by the table: leave it out" in capsys.readouterr().err
    assert script.main([*TINY, "num_step=3"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert "unknown key 'num_step'" in error[-1]
