"""How it is said that memory is used up, whoever says it."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from flowcache.errors import NoMemoryError, UserError, first_line, memory_named, no_memory
from flowcache.runtime.cli import run_command
from flowcache.runtime.stats import RunStats

TOO_MANY = 2**45
"""Numbers: 35 TB as uint8, which no machine of today has."""


def of_torch() -> None:
    torch.zeros(TOO_MANY, dtype=torch.uint8)


def of_numpy() -> None:
    np.ones(TOO_MANY * 2**10, dtype=np.uint8)


def of_python() -> None:
    bytearray(2**62)


def of_system() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def of_cuda() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.1 GiB"
    )


def of_cublas() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("asks", [of_torch, of_numpy, of_python, of_system, of_cuda, of_cublas])
def test_a_command_without_memory_ends_with_one_line_that_says_what_to_change(
    asks: object, capsys: pytest.CaptureFixture[str]
):
    assert callable(asks)
    assert run_command(asks) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "is used up" in said
    assert "num_frames" in said


def test_the_stage_and_what_was_asked_for_are_named():
    stats = RunStats(torch.device("cpu"))
    of_host = r"^memory is used up in stage vae, which asked for 3\.52e\+04 GB: "
    with pytest.raises(NoMemoryError, match=of_host), stats.stage("dit"), stats.stage("vae"):
        of_torch()
    of_gpu = r"^the GPU's memory is used up in stage dit, which asked for 20\.00 GiB: "
    with pytest.raises(NoMemoryError, match=of_gpu), stats.stage("dit"):
        of_cuda()
    assert set(stats.stage_times()) == {"dit", "vae"}


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("shapes differ"), ValueError("no"), OSError(errno.ENOSPC, "full")):
        assert no_memory(error) is None
        with pytest.raises(type(error)), memory_named("dit"):
            raise error
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("shapes differ")))


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(lambda: (tmp_path / ("x" * 300)).touch()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/xxx")
    assert said.endswith("xxx: File name too long\n")


def test_a_message_stays_one_line_whatever_a_file_holds(capsys: pytest.CaptureFixture[str]):
    def refuse() -> None:
        raise UserError("version is a\nb\x1b[31m\ud800é" + "x" * 10_000)

    assert run_command(refuse) == 2
    said = capsys.readouterr().err
    assert said.startswith(r"error: version is a\nb\x1b[31m\ud800éxxx")
    assert said.endswith("xxx...\n")
    assert len(said) < 2100


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no room\nmore", "no room"),
        (
            "backend='inductor' raised:\n\n  CppCompileError: no compiler\nmore",
            "backend='inductor' raised: CppCompileError: no compiler",
        ),
        ("it ends:", "it ends:"),
        ("", "ValueError"),
    ],
)
def test_the_first_line_of_an_error_holds_its_reason(text: str, line: str):
    assert first_line(ValueError(text)) == line
