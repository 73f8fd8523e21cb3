"""Random Self-Forcing checkpoints that make a video in a second."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from flowcache.wan.dit import DiT, DiTConfig
from skyreels_v2.released import DEMO

HEIGHT, WIDTH = 16, 32
SIZES = DiTConfig(dim=48, ffn_dim=64, freq_dim=32, num_heads=4, num_layers=2, text_dim=0)

SMALL = f"""
height: {HEIGHT}
width: {WIDTH}
num_frames: 33
seed: 3
checkpoint: checkpoints/tiny.pt
"""
"""The settings that the checkpoint brings: 9 latent frames."""


def write_checkpoint(folder: Path, *, num_layers: int = 2) -> Path:
    """Write a random transformer, as upstream saves it, with a demo's VAE and text encoder."""
    shutil.copytree(
        DEMO, folder, ignore=shutil.ignore_patterns("presets", "profiles", "transformer")
    )
    (folder / "presets").mkdir()
    (folder / "presets/base.yaml").write_text(SMALL)
    text_dim = json.loads((folder / "text_encoder/config.json").read_text())["d_model"]
    sizes = replace(SIZES, text_dim=text_dim, num_layers=num_layers)
    stored = {
        "attention_head_dim": sizes.head_width,
        "ffn_dim": sizes.ffn_dim,
        "freq_dim": sizes.freq_dim,
        "num_attention_heads": sizes.num_heads,
        "num_layers": sizes.num_layers,
        "text_dim": sizes.text_dim,
    }
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text(json.dumps(stored))
    (folder / "checkpoints").mkdir()
    copies = {}
    for seed, copy in enumerate(("generator", "generator_ema")):
        torch.manual_seed(seed)
        weights = DiT(sizes).state_dict()
        copies[copy] = {f"model.{key}": value for key, value in weights.items()}
    torch.save(copies, folder / "checkpoints/tiny.pt")
    return folder
