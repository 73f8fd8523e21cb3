"""Reference tensors and small models for the MAGI-1 tests."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_magi1 import HEIGHT, MODEL_4_5B, WIDTH, write_checkpoint
from torch import Tensor

from flowcache.runtime.config import find_preset, load_config
from flowcache.runtime.run import config_layers
from flowcache.runtime.video import VideoWriter
from magi1.checkpoint import find_model
from magi1.config import EngineConfig, ModelConfig, ReleaseConfig, RunConfig, RuntimeConfig
from magi1.dit import DiT, set_precision
from magi1.model import MODEL
from magi1.released import PRESETS

FOLDER = Path(__file__).parents[1] / "golden/magi1"


@dataclass(frozen=True)
class Golden:
    """One reference file: its case description and its tensors."""

    case: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose keys start with `prefix.`, without it."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def config(self) -> ReleaseConfig:
        """Return the case's configuration; the files leave out the three paths."""
        parts = self.case["config"]
        runtime = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in parts["runtime_config"].items()
        }
        paths = {"load": "", "t5_pretrained": "", "vae_pretrained": ""}
        return ReleaseConfig(
            ModelConfig(**parts["model_config"]),
            RuntimeConfig(**runtime, **paths),
            EngineConfig(**parts["engine_config"]),
        )

    def dit(self) -> DiT:
        """Return the case's model in float32."""
        dit = DiT(self.config().model_config)
        dit.load_state_dict(self.under("weights"))
        set_precision(dit, torch.float32)
        return dit.eval().requires_grad_(False)


def load_golden(name: str) -> Golden:
    """Read a reference file."""
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return Golden(json.loads(file.metadata()["case"]), tensors)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    return load_golden


Configure = Callable[..., RunConfig]
"""`(preset, *settings, model) -> settings of a run of a released model`"""


@pytest.fixture(scope="session")
def configure() -> Configure:
    def settings_of(preset: str = "base", *settings: str, model: str = "4.5B_distill") -> RunConfig:
        source = find_model(model)
        layers = config_layers(
            PRESETS / "base.yaml",
            find_preset(PRESETS, preset),
            checkpoint=source.folder,
            model=source.layers,
        )
        return load_config(RunConfig, layers, overrides=["prompt=a cat", *settings])

    return settings_of


@pytest.fixture(scope="session")
def model_4_5b() -> ModelConfig:
    """The released 4.5B model."""
    return MODEL_4_5B


@pytest.fixture
def model_tiny() -> ModelConfig:
    """A model small enough to run in milliseconds, four layers deep."""
    return replace(
        MODEL_4_5B,
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        caption_channels=12,
        caption_max_length=20,
        params_dtype="torch.float32",
    )


# Whole checkpoints, and runs with them --------------------------------------------------------


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random distilled checkpoint with 8-bit weights."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "quantised", is_fp8=True)


@pytest.fixture
def make(maker: Callable[..., Any], distilled: Path) -> Callable[..., Any]:
    """Return what makes a video in a fresh folder from settings given as `key=value`."""
    return maker(MODEL, distilled)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A video of 40 frames of random noise at 24 frames per second."""
    path = tmp_path / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (40, HEIGHT, WIDTH, 3), dtype=np.uint8)
    with VideoWriter(path, fps=24, size=(HEIGHT, WIDTH)) as writer:
        writer.append(frames)
    return path


@pytest.fixture(name="dit", scope="module")
def _dit(model_4_5b: ModelConfig) -> DiT:
    """Two layers of random weights for sampling loops."""
    torch.manual_seed(0)
    config = replace(
        model_4_5b,
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=8,
        params_dtype="torch.float32",
        in_channels=4,
        out_channels=4,
        cond_hidden_ratio=0.5,
        caption_channels=6,
        caption_max_length=12,
    )
    return DiT(config).eval().requires_grad_(False)
