"""The command that measures what 8-bit linears change: its errors, and what it can't run."""

import importlib
import re
from types import ModuleType

import pytest
import torch

TINY = ("--device", "cpu", "num_frames=9", "num_steps=2")


@pytest.fixture(name="script")
def _script() -> ModuleType:
    return importlib.import_module("quantize_error")


def rows(text: str) -> dict[str, list[float]]:
    """Return the numbers of the table by the first cell: layer %, velocity %, dB, MB."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: [float(re.sub(r"[^\d.]", "", cell)) for cell in row[2:]] for row in cells[1:]}


@pytest.mark.usefixtures("torchao")
def test_errors_are_small_but_there_and_weights_shrink(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
):
    assert script.main([*TINY, "--mode", "int8_weight"]) == 0
    found = rows(capsys.readouterr().out)
    assert list(found) == ["bfloat16", "int8_weight"]
    plain, quantised = found["bfloat16"], found["int8_weight"]
    for layer, velocity, decibel, _ in (plain, quantised):
        assert 0 < layer < 2
        assert 0 < velocity < 2
        assert 20 < decibel < 80
    # 127 steps for the largest weight of a row round more coarsely than 8 bits of mantissa
    assert quantised[0] > plain[0]
    assert 0.5 < quantised[3] / plain[3] < 0.7


def test_an_error_is_relative_to_what_is_wanted(script: ModuleType):
    got, want = torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])
    assert script.relative_error(got, want) == pytest.approx(0.2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_what_can_not_run_is_named_and_a_mistake_is_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
):
    assert script.main([*TINY, "--mode", "fp8_dynamic"]) == 0
    shown = capsys.readouterr().out
    assert list(rows(shown)) == ["bfloat16"]
    assert "fp8_dynamic: quantize=fp8_dynamic needs an NVIDIA GPU" in shown
    assert script.main([*TINY, "num_step=3"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert "unknown key 'num_step'" in error[-1]
