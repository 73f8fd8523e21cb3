"""The MAGI-1 recipe: what it exports is the release's layout, and its losses are what they say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close

from flowcache.demo.clips import draw_crowd
from flowcache.demo.latents import LatentBank, Statistics
from flowcache.demo.trainer import step_randomness
from magi1 import demo, vae
from magi1.checkpoint import Checkpoint
from magi1.config import read_config
from magi1.text import load_special_tokens

pytestmark = pytest.mark.numeric

CAPTION = "a red circle moving right on a black background"


@pytest.fixture(scope="module")
def bank() -> LatentBank:
    generator = torch.Generator().manual_seed(0)
    return LatentBank(
        torch.randn(20, 16, 36, 8, 8, generator=generator).half(),
        [CAPTION] * 20,
        torch.arange(20) < 15,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "demo"
    models = demo.new_models()
    statistics = Statistics(mean=[0.5] * 16, std=[2.0] * 16)
    student = demo.new_models().dit
    demo.write_checkpoint(demo.new_vae(), models, student, statistics=statistics, folder=folder)
    return folder


@pytest.mark.parametrize("name", ["base", "distill"])
def test_the_export_is_a_checkpoint_of_the_release(
    exported: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(exported)
    config = read_config(exported / f"{name}_config.json")
    found = Checkpoint.find(config)
    found.check()
    dit = found.load_dit(device="cpu")
    assert sum(parameter.numel() for parameter in dit.parameters()) > 1e6
    load_special_tokens(exported / "special_tokens.npz", channels=64)
    assert sum(path.stat().st_size for path in exported.rglob("*") if path.is_file()) < 12e6


def test_a_training_can_begin_with_the_weights_of_a_checkpoint(exported: Path):
    written = demo.new_models().state_dict()
    kept = {key: value.half().float() for key, value in written.items()}
    kept["tokens"] = written["tokens"]  # in float64, as released
    begun = demo.new_models(exported).state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in begun.items())
    folded = demo.new_vae(exported)
    loaded = vae.load(exported / "ckpt/vae", scale=1.0, dtype=torch.float32, device="cpu")
    picture = drawn_pixels(np.random.default_rng(1))[None]
    assert_close(folded.means(picture), loaded.model.means(picture), ulps=64)


def test_folding_the_statistics_whitens_the_latents_and_keeps_the_pictures():
    plain, folded = demo.new_vae(), demo.new_vae()
    rng = np.random.default_rng(0)
    clip = torch.stack([drawn_pixels(rng) for _ in range(4)])
    with torch.inference_mode():
        latents = demo.ViTCodec(plain).encode(clip)
        pictures = demo.ViTCodec(plain).decode(latents)
    mean = latents.mean((0, 2, 3, 4)).tolist()
    std = latents.std((0, 2, 3, 4)).tolist()
    demo.fold_statistics(folded, Statistics(mean, std))
    codec = vae.VAE(folded, scale=demo.SCALE_FACTOR)
    scaled = codec.encode(clip)
    assert_close(scaled.mean((0, 2, 3, 4)), torch.zeros(16), ulps=64, size=1.0)
    assert_close(scaled.std((0, 2, 3, 4)), torch.ones(16), ulps=64)
    assert_close(codec.decode(scaled), pictures, ulps=256)


def drawn_pixels(rng: np.random.Generator) -> torch.Tensor:
    frames = draw_crowd(rng, num_frames=12)
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def test_an_untrained_model_is_silent_and_learns(bank: LatentBank):
    loss = demo.BaseLoss(demo.new_models(), bank, forcing=demo.FORCING)
    first = loss(0, step_randomness(0, 0))
    # noise and data both have deviation 1, and the silent model's velocity is 0
    assert float(first.detach()) == pytest.approx(2.0, abs=0.2)
    first.backward()
    tokens, head = loss.models.tokens, loss.models.dit.final_linear.linear.weight
    assert tokens.grad is not None
    assert head.grad is not None
    assert head.grad.abs().max() > 0


def test_a_copy_of_the_base_model_is_as_far_from_guidance_as_guidance_from_text(bank: LatentBank):
    models = demo.new_models()
    generator = torch.Generator().manual_seed(1)
    for param in models.dit.parameters():
        param.data += 0.05 * torch.randn(param.shape, generator=generator)
    loss = demo.DistillLoss(models, models.dit, bank)
    with torch.no_grad():
        assert float(loss(3, step_randomness(0, 3))) > 0
        now, clips = loss.draw(step_randomness(0, 3))
        with_text = demo.predict(models.dit, clips, now, is_null=False)
        without = demo.predict(models.dit, clips, now, is_null=True)
        guided = loss.guided(clips, now)
    is_late = (clips.sigma < 0.7)[:, None, :, None, None]
    expected = without + torch.where(is_late, 1.5, 3.0) * (with_text - without)
    assert_close(guided, expected, ulps=64)
