"""Reference tensors and small models for the MAGI-1 tests."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from magi1.config import EngineConfig, MagiConfig, ModelConfig, RuntimeConfig
from magi1.dit import DiT, set_precision

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

    def config(self) -> MagiConfig:
        """Return the case's configuration; the files leave out the three paths."""
        parts = self.case["config"]
        runtime = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in parts["runtime_config"].items()
        }
        paths = {"load": "", "t5_pretrained": "", "vae_pretrained": ""}
        return MagiConfig(
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


MODEL_4_5B = ModelConfig(
    model_name="videodit_ardf",
    num_layers=34,
    hidden_size=3072,
    ffn_hidden_size=12288,
    num_attention_heads=24,
    num_query_groups=8,
    kv_channels=128,
    layernorm_epsilon=1e-6,
    apply_layernorm_1p=True,
    x_rescale_factor=1.0,
    half_channel_vae=False,
    params_dtype="torch.bfloat16",
    patch_size=2,
    t_patch_size=1,
    in_channels=16,
    out_channels=16,
    cond_hidden_ratio=0.25,
    caption_channels=4096,
    caption_max_length=800,
    xattn_cond_hidden_ratio=1.0,
    cond_gating_ratio=1.0,
    gated_linear_unit=False,
)


@pytest.fixture
def model_4_5b() -> ModelConfig:
    """The released 4.5B model."""
    return MODEL_4_5B


@pytest.fixture
def model_24b() -> ModelConfig:
    """The released 24B model."""
    return replace(
        MODEL_4_5B,
        num_layers=48,
        hidden_size=6144,
        ffn_hidden_size=16384,
        num_attention_heads=48,
        x_rescale_factor=0.1,
        half_channel_vae=True,
        in_channels=32,
        out_channels=32,
        gated_linear_unit=True,
    )


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
