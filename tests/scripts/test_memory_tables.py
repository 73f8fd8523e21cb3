"""The table of cards: what fits, what does not, and what is refused."""

import importlib
import sys

import pytest


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[list[str]], str]:
    code = importlib.import_module("memory_tables").main(arguments)
    out, err = capsys.readouterr()
    return code, [[cell.strip() for cell in row.split("|")[1:-1]] for row in out.splitlines()], err


def test_a_row_says_what_fits_and_how(capsys: pytest.CaptureFixture[str]):
    code, (head, _, *rows), _ = table(
        capsys, "--runs", "MAGI-1 4.5B", "--limits", "4GB", "8GB", "12GB"
    )
    assert code == 0
    none, small, larger = rows
    assert len(head) == len(none) == len(small) == 6
    assert none[2] == "does not fit"
    assert "the smallest limit that fits is" in none[-1]
    for row, limit in ((small, 8.0), (larger, 12.0)):
        peak, unit = row[2].split()
        assert unit == "GB"
        assert 0.85 * limit <= float(peak) <= limit
        assert row[4].startswith("x1.")
        assert "of the transformer's blocks stay" in row[-1]


@pytest.mark.usefixtures("torchao")
def test_settings_go_to_all_runs(capsys: pytest.CaptureFixture[str]):
    """8-bit weights and text encoders: all blocks stay, and the encoder is on the device."""
    chosen = ("--runs", "SkyReels-V2 1.3B, 544x960, 97", "--limits", "8GB")
    eight = ("quantize=int8_weight", "text_quantize=int8_weight")
    (_, (*_, wide), _), (code, (*_, narrow), _) = (
        table(capsys, *settings, *chosen) for settings in ((), eight)
    )
    assert code == 0
    assert "the text encoder runs on the host" in wide[-1]
    assert "blocks stay" in wide[-1]
    assert "text encoder" not in narrow[-1]
    assert "blocks stay" not in narrow[-1]


def test_two_windows_fit_8_gb(capsys: pytest.CaptureFixture[str]):
    code, (*_, row), _ = table(
        capsys, "--runs", "SkyReels-V2 1.3B, 544x960, 177 frames in two", "--limits", "8GB"
    )
    assert code == 0
    assert float(row[2].removesuffix(" GB")) < 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--limits", "auto"), "--limits takes amounts such as 24GB, not auto"),
        (("--limits", "12"), "memory_limit must be auto, none or an amount"),
        (("--runs", "Sora"), "--runs 'Sora' is none of: SkyReels-V2 1.3B"),
        (("vae_strips=4",), "vae_strips"),
        (("memory_limit=2GB",), "is what --limits says here"),
    ],
)
def test_wrong_arguments_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
):
    code, rows, err = table(capsys, *arguments)
    assert (code, rows) == (2, [])
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("key", ["quantize", "text_quantize"])
def test_without_torchao_8_bits_are_not_planned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    code, rows, err = table(capsys, f"{key}=int8_weight", "--runs", "MAGI-1 4.5B")
    assert (code, rows) == (2, [])
    assert f"{key}=int8_weight needs the package torchao" in err
