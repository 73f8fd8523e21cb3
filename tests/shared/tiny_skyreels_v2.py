"""Random SkyReels-V2 checkpoints that make a video in a second."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flowcache.wan.checkpoint import diffusers_key
from flowcache.wan.dit import DiT, DiTConfig
from skyreels_v2.released import DEMO

HEIGHT, WIDTH = 16, 32
NUM_FRAMES = 17

SMALL = f"""
height: {HEIGHT}
width: {WIDTH}
num_frames: {NUM_FRAMES}
base_num_frames: {NUM_FRAMES}
overlap_history: null
num_steps: 3
ar_step: 1
causal_block_size: 2
seed: 3
reuse:
  rescale: none
"""
"""The settings that the checkpoint brings."""


def write_checkpoint(folder: Path, *, num_layers: int = 2) -> Path:
    """Write a random transformer with the demo's VAE and text encoder."""
    shutil.copytree(
        DEMO, folder, ignore=shutil.ignore_patterns("presets", "profiles", "transformer")
    )
    (folder / "presets").mkdir()
    (folder / "presets/base.yaml").write_text(SMALL)
    write_dit(folder, DiTConfig(in_dim=16, inject_sample_info=True), num_layers=num_layers)
    return folder


def write_dit(folder: Path, kind: DiTConfig, *, num_layers: int = 2) -> None:
    """Write a random transformer of a kind, in the `*-Diffusers` layout."""
    text_dim = json.loads((folder / "text_encoder/config.json").read_text())["d_model"]
    config = replace(
        kind,
        dim=48,
        ffn_dim=64,
        freq_dim=32,
        num_heads=4,
        num_layers=num_layers,
        text_dim=text_dim,
    )
    torch.manual_seed(0)
    weights = DiT(config).state_dict()
    (folder / "transformer").mkdir()
    save_file(
        {diffusers_key(key): value.contiguous() for key, value in weights.items()},
        folder / "transformer/diffusion_pytorch_model.safetensors",
    )
    (folder / "transformer/config.json").write_text(json.dumps(diffusers_json(config)))


def diffusers_json(config: DiTConfig) -> dict[str, Any]:
    """Return what `transformer/config.json` holds for a model."""
    return {
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "attention_head_dim": config.head_width,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "in_channels": config.in_dim,
        "inject_sample_info": config.inject_sample_info,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_dim,
        "patch_size": [1, 2, 2],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "text_dim": config.text_dim,
    }
