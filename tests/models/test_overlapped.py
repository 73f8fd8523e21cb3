"""Runs whose decoding and writing go on while chunks are denoised."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

pytestmark = pytest.mark.numeric

Make = Callable[..., Any]


def test_decoding_while_denoising_gives_the_same_video(make: Make):
    plain, overlapped = make("overlap=false"), make("overlap=true")
    assert plain.path.read_bytes() == overlapped.path.read_bytes()
    stages = overlapped.report["stats"]["stages"]
    for name in ("vae", "write"):
        assert stages[name]["overlapped_seconds"] == stages[name]["seconds"] > 0
    assert "overlapped_seconds" not in plain.report["stats"]["stages"]["vae"]


def test_an_error_in_the_decoder_ends_the_run_with_its_message(
    make: Make, tiny: Any, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("the decoder broke")

    before = threading.active_count()
    monkeypatch.setattr(tiny.short.decoder, broken)
    with pytest.raises(RuntimeError, match="the decoder broke"):
        make("overlap=true")
    assert threading.active_count() == before
