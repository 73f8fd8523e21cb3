"""Whole runs, from settings to the mp4 and its JSON, on tiny checkpoints."""

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowcache.kv import KVCache
from flowcache.runtime.cli import EXIT_INTERRUPTED, run_command
from flowcache.runtime.model import Job, Loaded, Request
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import encode_inputs, load_networks, prepare, render
from flowcache.runtime.stats import RunStats
from flowcache.runtime.video import probe, read_video
from flowcache.wan.vae import VAE
from skyreels_v2.model import MODEL
from skyreels_v2.pipeline import LatentDecoder, generate

Make = Callable[..., Any]

LONG = ("num_frames=41", "base_num_frames=25", "overlap_history=9")
"""11 latent frames in two windows, 7 and 7 with 3 shared."""
SHORT_END = ("num_frames=33", "base_num_frames=25", "overlap_history=9")
"""9 latent frames: a window of 7 and a shorter one of 5 with 3 shared."""


# What it makes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "num_frames"),
    [
        pytest.param(("ar_step=0",), 17, id="synchronous"),
        pytest.param(("ar_step=2", "causal_block_size=1"), 17, id="asynchronous frame by frame"),
        pytest.param(("guidance=1",), 17, id="without guidance"),
        pytest.param(("attention=causal",), 17, id="causal"),
        pytest.param(("attention=causal", "clean_pass=true"), 17, id="causal with clean pass"),
        pytest.param(("attention=causal", "causal_block_size=3"), 17, id="chunks of 3 and 2"),
        pytest.param(("num_steps=1", "ar_step=0"), 17, id="one step"),
        pytest.param(("num_frames=1", "base_num_frames=1"), 1, id="one frame"),
        pytest.param(LONG, 41, id="two segments"),
        pytest.param((*SHORT_END, "attention=causal"), 33, id="a shorter last segment"),
        pytest.param((*LONG, "kv.compress=importance", "attention=causal"), 41, id="compressed"),
        pytest.param(("height=32", "width=16"), 17, id="portrait"),
    ],
)
def test_every_mode_makes_a_video_and_the_plan_counts_its_flops(
    make: Make, settings: tuple[str, ...], num_frames: int
):
    made = make(*settings)
    found = probe(made.path)
    assert found.num_frames == made.report["num_frames"] == num_frames
    assert (found.height, found.width) == (made.job.config.height, made.job.config.width)
    made.check_costs()
    assert np.ptp(made.frames) > 0


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize("given", ["image", "end_image", "both"])
def test_a_video_starts_and_ends_with_the_given_images(
    make: Make, picture: Path, attention: str, given: str
):
    settings = [f"attention={attention}"]
    if given != "end_image":
        settings.append(f"image={picture}")
    if given != "image":
        settings.append(f"end_image={picture}")
    made = make(*settings)
    assert probe(made.path).num_frames == 17
    made.check_costs()


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


def test_a_long_extension_is_made_in_segments(make: Make, clip: Path):
    made = make(f"video={clip}", "overlap_history=9", "num_frames=29", "base_num_frames=17")
    assert len(made.job.work.segments) == 3
    assert probe(made.path).num_frames == 20 + 29 - 9
    made.check_costs()


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


# Interruption -------------------------------------------------------------------------------


class InterruptedDecoder:
    """Decodes once; then the user presses Ctrl-C."""

    def __init__(self, decoder: LatentDecoder) -> None:
        self.decoder = decoder
        self.num_calls = 0

    def decode(self, latents_BCFhw: Tensor, /) -> Tensor:
        self.num_calls += 1
        if self.num_calls == 2:
            raise KeyboardInterrupt
        return self.decoder.decode(latents_BCFhw)


class InterruptedVAE:
    """A VAE with such a decoder."""

    def __init__(self, vae: VAE) -> None:
        self.vae = vae
        self.model = vae.model

    def encode(self, pixels_B3THW: Tensor, /) -> Tensor:
        return self.vae.encode(pixels_B3THW)

    def stream(self, ranks: Ranks, /) -> LatentDecoder:
        return InterruptedDecoder(self.vae.stream(ranks))


def test_an_interrupted_run_keeps_what_it_made_under_another_name(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "videos"
    job = prepare(
        MODEL,
        Request(
            preset="flowcache_fast",
            model=str(small),
            overrides=["prompt=a red circle"],
            out=str(out),
        ),
    )
    stats = RunStats(job.device)
    models = load_networks(job, stats=stats)
    broken = Loaded(models.dit, InterruptedVAE(models.vae))
    conditioning = encode_inputs(job, stats=stats)
    code = run_command(lambda: render(job, broken, conditioning, stats=stats))
    assert code == EXIT_INTERRUPTED
    assert [path.name for path in out.iterdir()] == ["flowcache_fast-3.partial.mp4"]
    assert probe(out / "flowcache_fast-3.partial.mp4").num_frames == 5  # the first 2 latent frames
    assert "Traceback" not in capsys.readouterr().err


# Image-to-video -----------------------------------------------------------------------------


def test_an_image_to_video_model_runs(
    make: Make, small_i2v: Path, picture: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    made = make(f"image={picture}", model=small_i2v)
    assert probe(made.path).num_frames == 17
    made.check_costs()
    assert any("wrote" in message for message in caplog.messages)
