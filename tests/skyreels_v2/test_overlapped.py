"""Runs whose decoding and writing go on beside the denoising."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from skyreels_v2.vae import VAEStream

Make = Callable[..., Any]

LONG = ("num_frames=41", "base_num_frames=25", "overlap_history=9", "attention=causal")
"""Two segments, the second of which begins with decoded frames of the first."""


def test_decoding_beside_the_denoising_gives_the_same_video(make: Make):
    plain = make(*LONG, "overlap=false")
    beside = make(*LONG, "overlap=true")
    assert plain.path.read_bytes() == beside.path.read_bytes()
    stages = beside.report["stats"]["stages"]
    assert 0 < stages["vae"]["overlapped_seconds"] < stages["vae"]["seconds"]  # encoding waits
    assert stages["write"]["overlapped_seconds"] == stages["write"]["seconds"]
    assert stages["vae"]["within"] is None
    assert "overlapped_seconds" not in plain.report["stats"]["stages"]["vae"]
    assert beside.report["first_frames_seconds"] > 0


def test_an_error_in_the_decoder_ends_the_run_with_its_message(
    make: Make, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("the decoder broke")

    before = threading.active_count()
    monkeypatch.setattr(VAEStream, "decode", broken)
    with pytest.raises(RuntimeError, match="the decoder broke"):
        make("overlap=true")
    assert threading.active_count() == before


def test_networks_that_take_turns_do_not_overlap(make: Make):
    made = make("overlap=true", "offload=true")
    assert "overlapped_seconds" not in made.report["stats"]["stages"]["vae"]
