"""Tiny checkpoints, and short runs with them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_windows
import torch
from PIL import Image
from tiny_skyreels_v2 import HEIGHT, WIDTH, write_dit
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from flowcache.runtime.video import VideoWriter
from flowcache.wan.dit import DiTConfig
from skyreels_v2.model import MODEL


@pytest.fixture
def denoise() -> Callable[..., tiny_windows.Denoised]:
    return tiny_windows.denoise


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
