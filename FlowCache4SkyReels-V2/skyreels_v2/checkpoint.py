"""Find a SkyReels-V2 checkpoint and load its transformer, in both published layouts.

The original layout is one flat folder; the `*-Diffusers` layout has a folder per part. Which one it
is, and which model, is read from the files, never from the name of the folder.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flowcache.bounds import given_path
from flowcache.errors import UserError
from flowcache.runtime.embeddings import tokenizer_files
from flowcache.runtime.hub import HUB, Hub, Missing, fetch, find_missing, local_copy
from flowcache.runtime.weights import find_shards, read_model_config
from flowcache.wan import checkpoint as wan
from flowcache.wan import text
from flowcache.wan.dit import CLIP_WIDTH, DiT, DiTConfig
from flowcache.wan.folder import WanFolder
from skyreels_v2.released import DEMO, REAL_MODEL, RELEASED, released_name

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_PARTS: dict[wan.Layout, dict[str, str]] = {
    "original": {
        "config": "config.json",
        "dit": ".",
        "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "google/umt5-xxl",
        "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    },
    "diffusers": {
        "config": "transformer/config.json",
        "dit": "transformer",
        "vae": "vae",
        "text_encoder": "text_encoder",
        "tokenizer": "tokenizer",
        "image_encoder": "image_encoder",
    },
}
"""Where the parts of a checkpoint lie in its folder."""


def released_sizes(name: str) -> DiTConfig:
    """Return the sizes of a released model, which plan a run without its files.

    Source: the `config.json` files of the released checkpoints.
    """
    sizes = DiTConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
    if "-1.3b-" in name:
        sizes = DiTConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
    if name.startswith("i2v-"):
        return replace(sizes, model_type="i2v", in_dim=36, image_dim=CLIP_WIDTH)
    return replace(sizes, inject_sample_info=name == "df-1.3b-540p")


def choose(name: str, *, has_cuda: bool | None = None) -> str | Path:
    """Return the folder or hub id of a model.

    Args:
        name: either, or `demo`, or `auto`: the real model where there is CUDA, else the demo.
        has_cuda: whether there is a CUDA device; None: look for one.
    """
    has_cuda = torch.cuda.is_available() if has_cuda is None else has_cuda
    if name == "demo" or (name == "auto" and not has_cuda):
        if not DEMO.is_dir():
            raise UserError(
                f"{DEMO}: the demo checkpoint is missing: restore it from the repository"
            )
        return DEMO
    if name in RELEASED and not Path(name).exists():
        raise UserError(
            f"{name} names sizes, for --dry-run: to make a video give the checkpoint's folder or "
            f"its hub id, as {REAL_MODEL}"
        )
    given_path(name, name="model")
    return REAL_MODEL if name == "auto" else name


@dataclass(frozen=True)
class Checkpoint(WanFolder):
    """A checkpoint on disk whose parts, folders or files, are all there."""

    dit_files: tuple[Path, ...]
    image_encoder: Path | None
    """CLIP's vision tower; None unless the model is I2V."""

    @property
    def is_i2v(self) -> bool:
        """Whether the transformer takes a start image (I2V, not diffusion forcing)."""
        return self.config.model_type == "i2v"


def find(model: str | Path, *, hub: Hub = HUB) -> Checkpoint:
    """Find a checkpoint: a local folder, or else a hub id, whose local copy or download is used."""
    folder = Path(model).expanduser()
    if not folder.exists():
        folder = fetch(_hub_id(model), is_whole=_is_whole, hub=hub)
    return _find_in(folder)


def find_download(model: str | Path, *, hub: Hub = HUB) -> Missing | None:
    """Return what `find` would download; None: nothing, the model is on the disk."""
    if Path(model).expanduser().exists():
        return None
    repository = _hub_id(model)
    if local_copy(repository, is_whole=_is_whole, hub=hub) is not None:
        return None
    missing = find_missing(repository, hub=hub)
    missing.check_room()
    return missing


def is_checkpoint(name: str) -> bool:
    """Tell whether a folder, or a repository of the hub, holds a SkyReels-V2 model."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return released_name(name) is not None
    try:
        _find_in(folder)
    except UserError:
        return False
    return True


def _hub_id(model: str | Path) -> str:
    if not _HUB_ID.fullmatch(str(model)):
        raise UserError(f"{model}: no such folder; give a checkpoint's folder or a hub id ORG/NAME")
    return str(model)


def _find_in(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the checkpoint's folder")
    for layout in ("diffusers", "original"):
        if (folder / _PARTS[layout]["config"]).is_file():
            return _find_parts(folder, layout)
    raise UserError(
        f"{folder}: no SkyReels-V2 checkpoint; it must hold transformer/config.json (*-Diffusers"
        " layout) or config.json (original layout)"
    )


def _is_whole(folder: Path) -> bool:
    """Whether no file of a checkpoint is missing."""
    try:
        found = _find_in(folder)
        tokenizer_files(found.tokenizer)
        for part in (found.vae, found.text_encoder, found.image_encoder):
            if part is not None and part.is_dir():
                read_model_config(part / "config.json")
                find_shards(part)
    except UserError:
        return False
    return True


def _find_parts(folder: Path, layout: wan.Layout) -> Checkpoint:
    names = _PARTS[layout]
    if layout == "diffusers":
        tokenizer = _part(folder, names["tokenizer"])
        config = wan.read_diffusers(folder / names["config"], text_len=wan.text_len(tokenizer))
    else:
        config = wan.read_original(folder / names["config"])
    is_i2v = config.model_type == "i2v"
    return Checkpoint(
        layout=layout,
        folder=folder,
        config=config,
        dit_files=find_shards(folder / names["dit"]),
        vae=_part(folder, names["vae"]),
        text_encoder=_part(folder, names["text_encoder"]),
        tokenizer=_part(folder, names["tokenizer"]),
        image_encoder=_part(folder, names["image_encoder"]) if is_i2v else None,
    )


def _part(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise UserError(f"{path}: is missing; the checkpoint is not complete, download it again")
    return path


def check(checkpoint: Checkpoint) -> None:
    """Check that the weights of all parts are there, whole, and fit; reads headers only."""
    config = checkpoint.config
    wan.check_dit(config, checkpoint.dit_files, layout=checkpoint.layout)
    checkpoint.check()
    if checkpoint.image_encoder is not None:
        text.check_vision(checkpoint.image_encoder, width=config.image_dim)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash of the transformer, see `profile.fingerprint`; little of the files is read."""
    return wan.fingerprint_dit(checkpoint.config, checkpoint.dit_files, layout=checkpoint.layout)


def load_dit(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None, device: torch.device | str
) -> DiT:
    """Load the transformer; see `wan.checkpoint.load_dit`."""
    config, files, layout = checkpoint.config, checkpoint.dit_files, checkpoint.layout
    return wan.load_dit(config, files, layout=layout, dtype=dtype, device=device)
