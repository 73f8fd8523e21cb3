"""Whole runs, from settings to the mp4 and its JSON, on tiny checkpoints."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowcache.errors import UserError
from flowcache.runtime.model import Request
from flowcache.runtime.record import read_record
from flowcache.runtime.run import prepare, run
from flowcache.runtime.video import probe, read_video
from magi1.model import MODEL

Make = Callable[..., Any]

COMPRESSED = ("kv.compress=importance", "kv.total_chunks=3", "runtime_config.num_frames=60")
"""Five chunks, two at once, one clean one kept."""


def frames_of(path: Path) -> np.ndarray:
    return read_video(path)[0]


def check_costs(made: Any) -> None:
    """Check that the plan said what the run then did."""
    stats = made.report["stats"]
    assert stats["flops"]["without_reuse"] == made.job.work.flops
    assert len({row[1] for row in stats["decisions"]["rows"]}) == made.job.work.num_ticks
    assert made.report["num_frames"] == made.job.work.segments[0].cut.num_frames_out


# What it makes ------------------------------------------------------------------------------


def test_a_run_writes_a_video_that_plays_and_its_json(make: Make):
    made = make(preset="flowcache_fast")
    found = probe(made.path)
    assert (found.num_frames, found.fps, found.height, found.width) == (24, 24, 32, 48)
    report = json.loads(made.path.with_suffix(".json").read_text())
    assert report["num_frames"] == 24
    assert report["preset"] == "flowcache_fast"
    assert report["model"] == "distilled"
    assert report["config"]["runtime_config"]["seed"] == 3
    assert report["config"]["prompt"] == "a red circle moving right"
    assert {"text", "load", "dit", "vae", "write"} <= set(report["stats"]["stages"])
    # 2 chunks, 4 steps each
    assert len(report["stats"]["decisions"]["rows"]) == 2 * 4
    names = sorted(path.name for path in made.path.parent.iterdir())
    assert names == ["flowcache_fast-3.json", "flowcache_fast-3.mp4"]


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
    check_costs(made)
    assert np.ptp(frames_of(made.path)) > 0


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
    check_costs(made)


def test_a_given_image_is_shown_and_counts_as_a_latent_more(make: Make, picture: Path):
    made = make(f"image={picture}")
    # 1 latent given and 6 asked: 3 chunks of 3 latents
    assert probe(made.path).num_frames == 36
    check_costs(made)


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


def test_the_summary_names_the_video(make: Make, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    made = make()
    assert str(made.path) in caplog.text
    assert "24 frames of 48x32 at 24 fps" in caplog.text


# Laws ---------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_video_and_another_seed_another(make: Make):
    first, second, other = (make(f"runtime_config.seed={seed}") for seed in (5, 5, 6))
    assert np.array_equal(frames_of(first.path), frames_of(second.path))
    assert not np.array_equal(frames_of(first.path), frames_of(other.path))


@pytest.mark.usefixtures("one_thread")
def test_two_prompts_in_one_process_equal_two_processes(
    make: Make, distilled: Path, tmp_path: Path
):
    prompts = ("a blue square moving left", "a green circle moving right")
    together = [make(f"prompt={prompt}", preset="flowcache_fast") for prompt in prompts]
    # the first needs no process of its own: nothing came before it
    alone = tmp_path / "alone.mp4"
    code = (
        "import sys, torch; torch.set_num_threads(1); "
        "from magi1.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    rest = ["--model", str(distilled), "--prompt", prompts[1], "--out", str(alone)]
    subprocess.run(
        [sys.executable, "-c", code, "--preset", "flowcache_fast", *rest],
        check=True,
        capture_output=True,
    )
    assert np.array_equal(frames_of(together[1].path), frames_of(alone))
    assert not np.array_equal(frames_of(together[0].path), frames_of(alone))


@pytest.mark.parametrize("setting", ["offload", "engine_config.kv_offload"])
def test_offloading_changes_nothing(make: Make, setting: str):
    plain, offloaded = (make(f"{setting}={value}", *COMPRESSED) for value in ("false", "true"))
    assert np.array_equal(frames_of(plain.path), frames_of(offloaded.path))


def test_a_threshold_of_zero_equals_vanilla(make: Make):
    vanilla = make("passes.clean_pass=false", "passes.nearly_clean_pass=false")
    flowcache = make("reuse.threshold=0", preset="flowcache_fast_nocompress")
    assert flowcache.report["stats"]["passes"]["reused"] == 0
    assert np.array_equal(frames_of(vanilla.path), frames_of(flowcache.path))


def test_a_high_threshold_reuses_all_steps_after_the_warmup_but_the_last_of_the_run(make: Make):
    made = make("reuse.threshold=1e9", "reuse.warmup_steps=1", preset="flowcache_fast")
    # 2 chunks: of 4 steps the first is computed, and of the last chunk the last, which ends the run
    assert made.report["stats"]["passes"]["computed"] == 2 + 1
    flops = made.report["stats"]["flops"]
    assert flops["computed"] < flops["without_reuse"] == made.job.work.flops


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
