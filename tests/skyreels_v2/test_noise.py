"""What a seed draws: the numbers upstream draws, in its order, shapes and types."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowcache.runtime.model import Job, Loaded, Request
from flowcache.runtime.run import encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats
from flowcache.wan.given import Conditioning
from skyreels_v2.model import MODEL
from skyreels_v2.pipeline import generate

SEED = 3
LONG = ("num_frames=57", "base_num_frames=25", "overlap_history=9", "addnoise_condition=20")
"""15 latent frames in three windows of 7 that share 3, the prefix noised."""


def loaded(model: Path, *settings: str) -> tuple[Job, Loaded, Conditioning]:
    overrides = ["prompt=a red circle", f"seed={SEED}", "num_steps=2", *settings]
    job = prepare(MODEL, Request(preset="vanilla_causal", model=str(model), overrides=overrides))
    stats = RunStats(job.device)
    return job, load_networks(job, stats=stats), encode_inputs(job, stats=stats)


def frames_of(job: Job, models: Loaded, given: Conditioning, **options: object) -> Tensor:
    shown = generate(
        models.dit,
        models.vae,
        job.config,
        given,
        stats=RunStats(job.device),
        **options,  # type: ignore[arg-type]
    )
    return torch.cat([each.frames for each in shown if each.frames is not None], dim=1)


@pytest.mark.parametrize(
    ("settings", "image", "frames"),
    [
        pytest.param((), None, [5], id="text"),
        pytest.param((), "image", [5], id="start image"),
        # an end image is one latent frame more, for which no noise is drawn
        pytest.param(("attention=full",), "end_image", [5], id="end image"),
        pytest.param((), "end_image", [5], id="end image, causal"),
        # blending noise into prefixes does not shift what later windows start from
        pytest.param(LONG, None, [7, 7, 7], id="long"),
        pytest.param((*LONG, "attention=full"), "image", [7, 7, 7], id="long, start image"),
    ],
)
def test_a_seed_draws_one_noise_per_window_and_nothing_for_an_end_image(
    small: Path, picture: Path, settings: tuple[str, ...], image: str | None, frames: list[int]
):
    given = [] if image is None else [f"{image}={picture}"]
    job, models, conditioning = loaded(small, *settings, *given)
    generator = torch.Generator().manual_seed(SEED)
    size = (job.config.height // 8, job.config.width // 8)
    noises = [torch.randn(16, num, *size, generator=generator) for num in frames]
    draws = iter(noises)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        noise = next(draws, None)
        if noise is None:  # what is blended into prefixes comes after all windows
            return torch.randn(shape, generator=generator, dtype=dtype)
        assert (noise.shape, noise.dtype) == (shape, dtype)
        return noise

    by_hand = frames_of(job, models, conditioning, draw=draw)
    assert next(draws, None) is None, "a window without noise of its own"
    assert torch.equal(frames_of(job, models, conditioning), by_hand)


@pytest.mark.parametrize(
    ("checkpoint", "settings", "want"),
    [
        ("small", (), torch.bfloat16),
        ("small", ("noise_dtype=model",), torch.bfloat16),
        ("small", ("noise_dtype=float32",), torch.float32),
        ("small_i2v", ("attention=full", "ar_step=0", "image={picture}"), torch.float32),
    ],
)
def test_a_bfloat16_model_draws_in_its_own_type_and_an_i2v_model_in_float32(
    request: pytest.FixtureRequest,
    picture: Path,
    checkpoint: str,
    settings: tuple[str, ...],
    want: torch.dtype,
):
    given = [setting.format(picture=picture) for setting in settings]
    model = request.getfixturevalue(checkpoint)
    job, models, conditioning = loaded(model, "dtype=bfloat16", *given)
    found: set[torch.dtype] = set()
    found: set[torch.dtype] = set()

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found.add(dtype)
        return torch.zeros(shape, dtype=dtype)

    stats = RunStats(job.device)
    next(generate(models.dit, models.vae, job.config, conditioning, stats=stats, draw=draw))
    assert found == {want}
