"""Small seeded transformers, windows denoised with them, tiny checkpoints, and short runs."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_skyreels_v2 import HEIGHT, WIDTH, write_dit
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from flowcache.kv import Compression, caches_for
from flowcache.policies import Observe, ReusePolicy, Vanilla
from flowcache.predict import HeldGuidance, ResultStore
from flowcache.runtime.stats import RunStats
from flowcache.runtime.video import VideoWriter
from flowcache.wan.dit import DiT, DiTConfig
from skyreels_v2.model import MODEL
from skyreels_v2.sampler import Branch, Run, Sampling, WindowSampler
from skyreels_v2.window import Window


@dataclass
class Denoised:
    """What came out of denoising a window."""

    rows: list[Tensor]
    stats: RunStats
    branches: dict[str, Branch]
    updates: ResultStore

    @property
    def latents(self) -> Tensor:
        return self.rows[-1]


def denoise_window(
    dit: DiT,
    latents: Tensor,
    *,
    window: Window,
    sampling: Sampling,
    policy: Callable[[], ReusePolicy] = Vanilla,
    compression: Compression | None = None,
    seed: int = 2,
    texts: dict[str, Tensor] | None = None,
    draw_noise: Callable[[Tensor], Tensor] = torch.randn_like,
    condition: Tensor | None = None,
    image: Tensor | None = None,
    policies: dict[str, ReusePolicy] | None = None,
    records: bool = False,
    observe: Observe | None = None,
    storage: torch.device | None = None,
    store: Callable[[], ResultStore] = ResultStore,
    guidance: HeldGuidance | None = None,
) -> Denoised:
    """Denoise with random prompts, or the given ones; everything but the weights is made here."""
    config, draw = dit.config, torch.Generator().manual_seed(seed)
    if texts is None:
        texts = {
            name: torch.randn(1, config.text_len, config.text_dim, generator=draw)
            for name in ("cond", "uncond")
        }
    if sampling.guidance <= 1:
        texts = {"cond": texts["cond"]}
    per_frame = latents.shape[-2] * latents.shape[-1] // 4
    branches = {
        name: Branch(
            dit.encode_context(text, image),
            policy() if policies is None else policies[name],
            store(),
            caches_for(
                config.num_layers if sampling.attention == "causal" else 0,
                capacity=window.num_frames * per_frame,
                num_heads=config.num_heads,
                head_width=config.head_width,
                dtype=dit.dtype,
                device=latents.device,
                storage=storage,
            ),
        )
        for name, text in texts.items()
    }
    stats = RunStats(latents.device, records=records)
    moving = latents.clone()
    run = Run(
        dit,
        sampling,
        stats,
        compression=compression,
        new_store=store,
        new_guidance=lambda: guidance or HeldGuidance(),
        draw_noise=draw_noise,
        observe=observe,
    )
    sampler = WindowSampler(run, moving, window=window, branches=branches, condition=condition)
    rows = [moving.clone() for _ in sampler.denoise()]
    return Denoised(rows, stats, branches, sampler.updates)


@pytest.fixture
def denoise() -> Callable[..., Denoised]:
    return denoise_window


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def small_i2v(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random image-to-video checkpoint: the same, with a tiny CLIP."""
    folder = tmp_path_factory.mktemp("checkpoints") / "small-i2v"
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    clip = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        image_size=32,
        patch_size=2,  # 16 x 16 patches and the class token: 257, as ViT-H/14 at 224
    )
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "image_encoder")
    write_dit(folder, DiTConfig(model_type="i2v", in_dim=36, image_dim=32))
    return folder


@pytest.fixture
def make(maker: Callable[..., Any], small: Path) -> Callable[..., Any]:
    """Return what makes a video in a fresh folder from settings given as `key=value`."""
    return maker(MODEL, small)


@pytest.fixture
def portrait(picture: Path, tmp_path: Path) -> Path:
    """The same, upright."""
    path = tmp_path / "portrait.png"
    Image.open(picture).rotate(90, expand=True).save(path)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A video of 20 frames of random noise."""
    path = tmp_path / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (20, HEIGHT, WIDTH, 3), dtype=np.uint8)
    with VideoWriter(path, fps=24, size=(HEIGHT, WIDTH)) as writer:
        writer.append(frames)
    return path
