"""Frames as they come out of loaded models, in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowcache.runtime.model import Job, Loaded, Progress, Request
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats
from magi1.memory import networks_for
from magi1.model import MODEL
from magi1.pipeline import Conditioning, generate_clip
from magi1.vae import Tiling

COMPRESSED = ("kv.compress=importance", "kv.total_chunks=3", "runtime_config.num_frames=60")


def job_of(model: Path, out: Path, *settings: str, preset: str = "vanilla") -> Job:
    overrides = ["prompt=a red circle", *settings]
    return prepare(
        MODEL, Request(preset=preset, model=str(model), overrides=overrides, out=str(out))
    )


def loaded(job: Job) -> tuple[Loaded, Conditioning]:
    stats = RunStats(job.device)
    return load_networks(job, stats=stats), encode_inputs(job, stats=stats)


def rendered(job: Job, models: Loaded, conditioning: Conditioning, **options: Any) -> Tensor:
    """Return all frames of a clip."""
    stats, run = RunStats(job.device), (models.dit, models.vae, job.config, conditioning)
    shown = generate_clip(*run, stats=stats, **options)
    return torch.cat([each.frames for each in shown if each.frames is not None], dim=1)


@pytest.mark.parametrize("kind", ["distilled", "base"])
@pytest.mark.parametrize("given", ["nothing", "image", "video"])
@pytest.mark.parametrize("preset", ["flowcache_fast", "teacache_fast", "vanilla_window", "stride"])
def test_every_frame_is_finite(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, given: str, preset: str
):
    settings = [*COMPRESSED, "reuse.threshold=0.5", "reuse.warmup_steps=1"]
    settings.append("passes.nearly_clean_pass=true")
    if preset == "vanilla_window":
        settings.append("runtime_config.noise2clean_kvrange=[3,2]")
    if given != "nothing":
        path = request.getfixturevalue("picture" if given == "image" else "clip")
        settings.append(f"{given}={path}")
    job = job_of(request.getfixturevalue(kind), tmp_path, *settings, preset=preset)
    frames = rendered(job, *loaded(job))
    assert frames.isfinite().all()
    assert frames.shape == (3, job.work.segments[0].cut.num_frames_out, 32, 48)


def test_the_vae_of_a_run_works_in_tiles_of_its_rate(distilled: Path, tmp_path: Path):
    settings = ("runtime_config.fps=17", "runtime_config.chunk_width=2")
    job = job_of(distilled, tmp_path, *settings, "runtime_config.num_frames=8")
    models, _ = loaded(job)
    planned = networks_for(job.source.files, job.config, dtype=job.dtype)
    assert models.vae.tiling == planned.vae.tiling == Tiling(frames=8)


def test_loaded_models_keep_nothing_of_a_clip(distilled: Path, tmp_path: Path):
    first, second = (
        job_of(distilled, tmp_path, f"runtime_config.seed={seed}", preset="flowcache_fast")
        for seed in (1, 2)
    )
    models, conditioning = loaded(first)
    before = rendered(first, models, conditioning)
    assert not torch.equal(rendered(second, models, conditioning), before)
    assert torch.equal(rendered(first, models, conditioning), before)


def test_frames_come_chunk_by_chunk_while_the_next_ones_are_denoised(
    distilled: Path, tmp_path: Path
):
    job = job_of(distilled, tmp_path, "runtime_config.num_frames=48")
    models, conditioning = loaded(job)
    progress = list(
        generate_clip(models.dit, models.vae, job.config, conditioning, stats=RunStats(job.device))
    )
    # 4 steps, two chunks at once: one becomes clean in every second tick from the fourth on
    shown = {each.tick.index: each.frames.shape[1] for each in progress if each.frames is not None}
    assert shown == {3: 12, 5: 12, 7: 12, 9: 12}
    assert len(progress) == job.work.num_ticks


class CountingVAE:
    """Encodes to zeros; decodes every latent to four frames that tell its place in the chunk."""

    def __init__(self) -> None:
        self.num_decoded: list[int] = []

    def encode(self, pixels_B3THW: Tensor, /) -> Tensor:
        batch, _, num_frames, height, width = pixels_B3THW.shape
        return torch.zeros(batch, 4, max(num_frames // 4, 1), height // 8, width // 8)

    def decode(self, latents_BCFhw: Tensor, ranks: Ranks, /) -> Tensor:
        num_latents = latents_BCFhw.shape[2]
        self.num_decoded.append(num_latents)
        places = torch.arange(num_latents).repeat_interleave(4)
        return places.view(1, 1, -1, 1, 1).expand(1, 3, -1, 32, 48).float()

    @property
    def model(self) -> nn.Module:
        raise NotImplementedError("nothing is moved")


@pytest.mark.parametrize(
    ("num_given", "start", "places"),
    [
        # two latents given: the first chunk shows its third one, no frame of it is lost
        (8, "video", [[2], [0, 1, 2], [0, 1, 2]]),
        # one latent of a video given: it is not repeated
        (4, "video", [[1, 2], [0, 1, 2], [0, 1, 2]]),
        (1, "video", [[1, 2], [0, 1, 2], [0, 1, 2]]),
        # an image is shown
        (1, "image", [[0, 1, 2], [0, 1, 2], [0, 1, 2]]),
    ],
)
def test_whole_chunks_are_decoded_and_given_frames_cut_off(
    distilled: Path, tmp_path: Path, num_given: int, start: str, places: list[list[int]]
):
    job = job_of(distilled, tmp_path)
    config = replace(job.config, **{start: "given"})
    models, conditioning = loaded(job)
    given = Conditioning(
        conditioning.text, tokens=conditioning.tokens, prefix=torch.zeros(3, num_given, 32, 48)
    )
    codec = CountingVAE()
    progress: list[Progress] = list(
        generate_clip(models.dit, codec, config, given, stats=RunStats(job.device))
    )
    shown = [each.frames[0, ::4, 0, 0].tolist() for each in progress if each.frames is not None]
    assert shown == places
    assert codec.num_decoded == [3, 3, 3]


def test_the_noise_is_drawn_once_for_all_chunks(distilled: Path, tmp_path: Path):
    job = job_of(distilled, tmp_path)
    models, conditioning = loaded(job)
    drawn: list[Any] = []

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        drawn.append((shape, dtype))
        return torch.zeros(shape, dtype=dtype)

    rendered(job, models, conditioning, draw=draw)
    assert drawn == [((4, 6, 4, 6), torch.float32)]


def test_what_a_chunk_is_told_changes_the_video(distilled: Path, tmp_path: Path):
    def make(*settings: str) -> Tensor:
        job = job_of(distilled, tmp_path, *settings)
        return rendered(job, *loaded(job))

    plain = make()
    assert not torch.equal(make("tokens.duration=false"), plain)
    assert not torch.equal(make("prompt=a blue square"), plain)
    untold = make("special_tokens=null")
    assert torch.equal(make("special_tokens=null", "tokens.duration=false"), untold)
