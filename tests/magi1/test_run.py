"""Whole runs, from settings to the mp4 and its JSON, on tiny checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowcache.errors import UserError
from flowcache.runtime.model import Request
from flowcache.runtime.record import read_record
from flowcache.runtime.run import prepare, run
from flowcache.runtime.video import probe
from magi1.model import MODEL

Make = Callable[..., Any]

COMPRESSED = ("kv.compress=importance", "kv.total_chunks=3", "runtime_config.num_frames=60")
"""Five chunks, two at once, one clean one kept."""


# What it makes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "num_frames"),
    [
        pytest.param(("runtime_config.num_frames=25",), 24, id="no whole latent more"),
        pytest.param(("runtime_config.num_frames=28",), 36, id="rounded up to whole chunks"),
        pytest.param(("runtime_config.window_size=1",), 24, id="one chunk at a time"),
        pytest.param(("runtime_config.noise2clean_kvrange=[2,1]",), 24, id="windows"),
        pytest.param(("passes.clean_pass=false",), 24, id="no clean pass"),
        pytest.param(("passes.nearly_clean_pass=false",), 24, id="no nearly-clean pass"),
        pytest.param(("special_tokens=null",), 24, id="no special tokens"),
        pytest.param(COMPRESSED, 60, id="compressed, with nearly-clean pass"),
        pytest.param(
            (*COMPRESSED, "runtime_config.noise2clean_kvrange=[3,2]"), 60, id="compressed windows"
        ),
        pytest.param((*COMPRESSED, "kv.granularity=frame"), 60, id="whole frames kept"),
    ],
)
@pytest.mark.parametrize("kind", ["distilled", "base"])
def test_every_mode_makes_a_video_and_the_plan_counts_its_flops(
    make: Make, request: pytest.FixtureRequest, kind: str, settings: Any, num_frames: int
):
    made = make(*settings, model=request.getfixturevalue(kind))
    assert probe(made.path).num_frames == made.report["num_frames"] == num_frames
    made.check_costs()
    assert np.ptp(made.frames) > 0


@pytest.mark.parametrize(
    ("settings", "num_frames"),
    [
        # 2 latents given and 6 asked: 3 chunks of 3 latents, the given ones not shown
        pytest.param(("prefix_frames=8",), 28, id="within the first chunk"),
        # 8 given and 6 asked: 5 chunks, 2 of them given whole
        pytest.param((), 28, id="two chunks and two latents"),
        pytest.param(
            (*COMPRESSED, "runtime_config.noise2clean_kvrange=[3,2]"), 64, id="compressed windows"
        ),
    ],
)
@pytest.mark.parametrize("kind", ["distilled", "base"])
def test_a_video_is_extended_by_new_frames(
    make: Make,
    request: pytest.FixtureRequest,
    clip: Path,
    kind: str,
    settings: Any,
    num_frames: int,
):
    made = make(f"video={clip}", *settings, model=request.getfixturevalue(kind))
    assert probe(made.path).num_frames == num_frames
    made.check_costs()


def test_a_given_image_is_shown_and_counts_as_a_latent_more(make: Make, picture: Path):
    made = make(f"image={picture}")
    # 1 latent given and 6 asked: 3 chunks of 3 latents
    assert probe(made.path).num_frames == 36
    made.check_costs()


def test_a_record_names_the_frames_that_show_each_chunk(
    distilled: Path, clip: Path, tmp_path: Path
):
    asked = Request(
        preset="flowcache_fast",
        model=str(distilled),
        overrides=["prompt=a red circle", f"video={clip}"],
        out=str(tmp_path / "made.mp4"),
        record=True,
    )
    report = run(prepare(MODEL, asked))
    record = read_record(tmp_path / "made.record.json")
    # 8 latents given and 6 asked, 3 per chunk: two chunks given whole, of the third one latent
    assert record["chunk_frames"] == {"0": [[0, 0], [0, 0], [0, 4], [4, 16], [16, 28]]}
    assert (record["policy"], record["threshold"], record["num_steps"]) == ("flowcache", 0.015, 4)
    assert len(record["decisions"]) == len(report["stats"]["decisions"]["rows"])
    with pytest.raises(UserError, match=r"made\.record\.json exists and is kept"):
        (tmp_path / "made.mp4").unlink()
        (tmp_path / "made.json").unlink()
        prepare(MODEL, asked)


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
