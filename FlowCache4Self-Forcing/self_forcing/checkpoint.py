"""Find the base model and the weights that replace those of its transformer, and load them.

The base is a folder of Wan2.1-T2V-1.3B, whose own transformer is not read. The weights are one
file: `.safetensors`, or a `.pt` that holds one or several copies (`generator_ema`, `generator`).

Source: what the savers of Self-Forcing and Causal-Forcing write.
"""

from dataclasses import replace
from pathlib import Path

from flowcache.bounds import given_path
from flowcache.runtime.hub import Missing, fetch_file, find_missing_file
from flowcache.wan.checkpoint import DiTFiles
from flowcache.wan.dit import DiTConfig
from flowcache.wan.folder import PARTS, Folders, WanFolder
from self_forcing.config import RunConfig
from self_forcing.released import DEMO, REAL_MODEL, RELEASED

SIZES = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
"""Of Wan2.1-T2V-1.3B. Source: its `config.json`."""
_ORIGINAL = PARTS["original"]
FOLDERS = Folders(
    "Wan model",
    demo=DEMO,
    no_demo="there is no demo yet: make it with scripts/train_demo.py --model self_forcing, or "
    "give --model, a folder or hub id",
    real=REAL_MODEL,
    released=RELEASED,
    has_dit=False,  # the checkpoint replaces it
    files=(
        *(_ORIGINAL[part] for part in ("config", "vae", "text_encoder")),
        f"{_ORIGINAL['tokenizer']}/*",
    ),
)


def with_weights(config: RunConfig, base: WanFolder) -> WanFolder:
    """Return a base model with the weights that the settings name, fetched if need be."""
    path = _local(config.checkpoint, base.folder) or fetch_file(config.checkpoint)
    copies = ("generator_ema", "generator") if config.use_ema else ("generator", "generator_ema")
    return replace(base, dit=DiTFiles(base.config, (path,), "original", (*copies, "model")))


def find_weights_download(config: RunConfig, base: WanFolder | None) -> Missing | None:
    """Return what `with_weights` would download; None: nothing."""
    is_here = _local(config.checkpoint, Path() if base is None else base.folder)
    return None if is_here else find_missing_file(config.checkpoint)


def _local(checkpoint: str, folder: Path) -> Path | None:
    path = given_path(checkpoint, name="checkpoint")
    return next((each for each in (path, folder / path) if each.is_file()), None)
