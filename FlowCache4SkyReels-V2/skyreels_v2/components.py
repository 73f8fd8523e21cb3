"""The networks behind a pipeline: read from a checkpoint, or taken from a pipeline of diffusers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.model import Source
from flowcache.wan import checkpoint as wan
from flowcache.wan import text, vae
from flowcache.wan.dit import DiT, DiTConfig
from skyreels_v2.model import FOLDERS, MODEL

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class Components:
    """The networks of a model, and where presets of its own may lie."""

    source: Source
    dit: DiT
    vae: vae.VAE
    encoder: text.TextEncoder
    scheduler: Any
    """Of diffusers; only its shift is used."""


def load_components(
    place: str | Path, *, dtype: torch.dtype, given_vae: AutoencoderKLWan | None
) -> Components:
    """Load a checkpoint on the CPU.

    Args:
        place: as `--model` on the command line.
        dtype: of transformer and text encoder.
        given_vae: takes the place of the checkpoint's, which is loaded in float32.

    Raises:
        UserError: the model is not there, is damaged, or is no diffusion forcing model.
    """
    found = FOLDERS.find(FOLDERS.choose(str(place)))
    _check_kind(found.config)
    found.check()
    host = torch.device("cpu")
    own = vae.load(found.vae, device=host) if given_vae is None else vae.VAE(given_vae)
    folder = found.folder / "scheduler"
    if folder.is_dir():
        scheduler = UniPCMultistepScheduler.from_pretrained(folder)
    else:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000
        )
    return Components(
        MODEL.find(str(found.folder)),
        found.dit.load(dtype=dtype, device=host),
        own,
        found.load_text(dtype=dtype, device=host),
        scheduler,
    )


def components_of(pipe: Any) -> Components:
    """Take the networks of a pipeline; no weight is copied if the transformer has one type.

    Raises:
        UserError: it is no pipeline of a SkyReels-V2 diffusion forcing model.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise UserError(f"from_pipe takes a pipeline of diffusers, not {type(pipe).__name__}")
    parts = pipe.components
    missing = [name for name in _PARTS if parts.get(name) is None]
    if missing or not isinstance(parts["transformer"], SkyReelsV2Transformer3DModel):
        lack = f" without {', '.join(missing)}" if missing else ""
        raise UserError(
            "from_pipe takes a pipeline with SkyReels-V2's transformer, not "
            f"{type(pipe).__name__}{lack}"
        )
    limit = getattr(parts["tokenizer"], "model_max_length", wan.MAX_TEXT_LEN)
    text_len = int(min(limit, wan.MAX_TEXT_LEN))
    dit = _dit_of(parts["transformer"], text_len=text_len)
    place = Path(pipe.name_or_path or "pipe")
    return Components(
        Source(place.name, place if place.is_dir() else None, sizes=dit.config),
        dit,
        vae.VAE(parts["vae"]),
        text.TextEncoder(parts["text_encoder"], parts["tokenizer"], text_len=text_len),
        parts["scheduler"],
    )


def _check_kind(sizes: DiTConfig) -> None:
    if sizes.model_type == "i2v":
        raise UserError(
            "this is an image-to-video model, whose transformer is shown the start image: use "
            "flowcache.load, or a diffusion forcing (DF) model"
        )


def _dit_of(transformer: SkyReelsV2Transformer3DModel, *, text_len: int) -> DiT:
    """Build our transformer around the weights of diffusers'."""
    with tempfile.TemporaryDirectory() as folder:
        transformer.save_config(folder)
        sizes = wan.read_diffusers(Path(folder) / "config.json", text_len=text_len)
    _check_kind(sizes)
    with torch.device("meta"):
        dit = DiT(sizes)
    dit.requires_grad_(False)
    given: dict[str, Tensor] = dict(transformer.state_dict())
    names = {wan.diffusers_key(name): name for name in dit.state_dict()}
    other = sorted(given.keys() ^ names.keys())
    if other or any(not value.is_floating_point() or value.is_meta for value in given.values()):
        raise UserError(
            f"from_pipe needs the plain weights of the transformer, but {len(other)} names differ "
            f"({', '.join(other[:2]) or 'or types do'}): fuse and unload a LoRA, do not quantize, "
            "and do not offload before"
        )
    # diffusers keeps a few weights in float32 next to bfloat16 ones
    dtype: torch.dtype = transformer.dtype
    state = {names[key]: value.to(dtype) for key, value in given.items()}
    dit.load_state_dict(state, strict=True, assign=True)
    return dit.eval()
