"""Whole runs, from settings to the mp4 and its JSON, on tiny checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowcache.errors import UserError
from flowcache.runtime.model import Request
from flowcache.runtime.run import prepare
from flowcache.runtime.video import probe
from magi1.model import MODEL

Make = Callable[..., Any]


def test_8_bit_checkpoints_run_by_emulation_and_say_so(
    make: Make, quantised: Path, caplog: pytest.LogCaptureFixture
):
    made = make(model=quantised)
    assert probe(made.path).num_frames == 24
    assert "8-bit products are emulated" in caplog.text


def test_a_run_says_once_what_missing_special_tokens_leave_out(
    make: Make, caplog: pytest.LogCaptureFixture
):
    make()
    assert "special tokens" not in caplog.text
    make("special_tokens=null")
    assert caplog.text.count("no special tokens") == 1
    caplog.clear()
    make("special_tokens=null", "tokens.quality=false", "tokens.duration=false")
    assert "special tokens" not in caplog.text


@pytest.mark.parametrize("rule", ["window", "deep_forcing"])
def test_tokens_kept_by_another_rule_cost_what_was_planned(make: Make, rule: str):
    bound = ("kv.total_chunks=5", "kv.recent_frames=1", "runtime_config.num_frames=168")
    make(f"kv.compress={rule}", *bound).check_costs()


# Checkpoints that do not fit ----------------------------------------------------------------


def test_a_vae_of_other_latents_is_refused(distilled: Path, tmp_path: Path):
    document = json.loads((distilled / "config.json").read_text())
    document["runtime_config"]["temporal_downsample_factor"] = 8
    for name in ("load", "t5_pretrained", "vae_pretrained"):
        document["runtime_config"][name] = str(distilled / document["runtime_config"][name])
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="the VAE's patch_length is 4, the transformer takes 8"):
        prepare(MODEL, Request(model=str(tmp_path), overrides=["prompt=a cat"], out=str(tmp_path)))


def test_only_a_released_model_can_be_downloaded(distilled: Path, tmp_path: Path):
    asked = Request(
        model=str(distilled), overrides=["prompt=a cat"], out=str(tmp_path), download=True
    )
    with pytest.raises(UserError, match="fetches a released model, not distilled"):
        prepare(MODEL, asked)
