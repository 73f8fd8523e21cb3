"""Whole runs, from settings to the mp4 and its JSON, on tiny checkpoints."""

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowcache.kv import KVCache
from flowcache.runtime.model import Job, Request
from flowcache.runtime.run import encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats
from flowcache.runtime.video import probe, read_video
from skyreels_v2.model import MODEL
from skyreels_v2.pipeline import generate

Make = Callable[..., Any]

LONG = ("num_frames=41", "base_num_frames=25", "overlap_history=9")
"""11 latent frames in two windows, 7 and 7 with 3 shared."""


def test_the_given_prefix_is_shown_unchanged(make: Make, picture: Path):
    made = make(f"image={picture}", "attention=causal")
    job = made.job
    stats = RunStats(job.device)
    models = load_networks(job, stats=stats)
    image = job.media.image
    assert image is not None
    latents = models.vae.encode(image.unsqueeze(0))
    alone = models.vae.stream().decode(latents)[0]
    conditioning = encode_inputs(job, stats=stats)
    shown = [
        progress.frames
        for progress in generate(models.dit, models.vae, job.config, conditioning, stats=stats)
        if progress.frames is not None
    ]
    assert torch.equal(shown[0][:, :1], alone)


def test_a_portrait_image_turns_the_video(make: Make, portrait: Path):
    made = make(f"image={portrait}")
    found = probe(made.path)
    assert (found.height, found.width) == (32, 16)


def test_a_video_is_extended_by_new_frames_only(make: Make, clip: Path):
    made = make(f"video={clip}", "overlap_history=9", "num_frames=17", "attention=causal")
    assert probe(made.path).num_frames == 20 + 17 - 9
    made.check_costs()
    before, after = read_video(clip)[0].astype(int), made.frames[:20].astype(int)
    assert np.abs(before - after).mean() < 16  # encoded once more, but the same frames


@pytest.mark.parametrize("rule", ["window", "deep_forcing"])
def test_tokens_kept_by_another_rule_cost_what_was_planned(make: Make, rule: str):
    budget = ("kv.budget_chunks=2", "kv.recent_frames=1")
    make(f"kv.compress={rule}", *budget, *LONG, "attention=causal").check_costs()


# What it holds ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((), id="asynchronous"),
        pytest.param(("ar_step=0",), id="synchronous"),
        pytest.param(("clean_pass=true",), id="with clean pass"),
        pytest.param(("kv.compress=recent", *LONG), id="compressed, two segments"),
    ],
)
def test_the_planned_kv_bytes_are_allocated_and_filled(small: Path, settings: tuple[str, ...]):
    job = prepare(
        MODEL,
        Request(
            preset="vanilla_causal",
            model=str(small),
            overrides=["prompt=a red circle", *settings],
        ),
    )
    stats = RunStats(job.device)
    models, conditioning = load_networks(job, stats=stats), encode_inputs(job, stats=stats)
    gc.collect()
    most_bytes = most_tokens = 0
    for progress in generate(models.dit, models.vae, job.config, conditioning, stats=stats):
        caches = [item for item in gc.get_objects() if type(item) is KVCache]
        assert len(caches) == models.dit.config.num_layers * 2
        most_bytes = max(most_bytes, sum(cache.kv.nbytes for cache in caches))
        most_tokens = max(most_tokens, *(cache.filled for cache in caches))
        window = job.work.segments[progress.segment.index].cut
        reached = progress.tick.index
        known = [c for c in window.generated if _entered(c - window.num_given, job, reached)]
        frames = sum(len(window.chunks[c]) for c in [*range(window.num_given), *known])
        assert all(cache.filled <= frames * job.work.frame_tokens for cache in caches)
        del caches
    assert most_bytes == job.work.kv_bytes
    planned = max(segment.kv_tokens for segment in job.work.segments)
    # what compression drops within a tick is no longer there after it
    assert most_tokens == planned if job.config.kv.compress == "none" else most_tokens <= planned


def _entered(place: int, job: Job, tick: int) -> bool:
    """Whether the chunk at a place has had its first step by a tick."""
    return place * job.config.ar_step <= tick


def test_full_attention_holds_no_keys(make: Make):
    assert make().job.work.kv_bytes == 0


# Image-to-video -----------------------------------------------------------------------------


def test_an_image_to_video_model_runs(
    make: Make, small_i2v: Path, picture: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    made = make(f"image={picture}", model=small_i2v)
    assert probe(made.path).num_frames == 17
    made.check_costs()
    assert any("wrote" in message for message in caplog.messages)
