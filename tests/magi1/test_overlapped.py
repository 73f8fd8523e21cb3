"""Runs whose decoding and writing go on beside the denoising."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from magi1.vae import VAE

pytestmark = pytest.mark.numeric

Make = Callable[..., Any]


def test_decoding_beside_the_denoising_gives_the_same_video(make: Make):
    plain = make("overlap=false")
    beside = make("overlap=true")
    assert plain.path.read_bytes() == beside.path.read_bytes()
    stages = beside.report["stats"]["stages"]
    for name in ("vae", "write"):
        assert stages[name]["overlapped_seconds"] == stages[name]["seconds"] > 0


def test_an_error_in_the_decoder_ends_the_run_with_its_message(
    make: Make, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("the decoder broke")

    monkeypatch.setattr(VAE, "decode", broken)
    with pytest.raises(RuntimeError, match="the decoder broke"):
        make("overlap=true")


def test_a_limit_is_planned_and_the_plan_is_in_the_json(make: Make):
    memory = make("memory_limit=1GB").report["memory"]
    assert memory["limit_bytes"] == 10**9
    assert set(memory["stages"]) == {"text", "denoise", "decode"}


def test_known_prompts_are_not_encoded_again(
    make: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    cache = f"embedding_cache={tmp_path / 'texts'}"
    first = make(cache)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the text encoder is not needed")

    monkeypatch.setattr("magi1.text.load", never)
    assert first.path.read_bytes() == make(cache).path.read_bytes()
