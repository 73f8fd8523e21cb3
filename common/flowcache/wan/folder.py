"""The folder of a Wan model, in both published layouts: what lies where.

The original layout is one flat folder; the `*-Diffusers` layout has a folder per part. Which one it
is, is read from the files, never from the name of the folder.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from flowcache.errors import UserError
from flowcache.runtime.embeddings import tokenizer_files
from flowcache.runtime.hub import Missing, fetch, find_missing, local_copy
from flowcache.runtime.weights import find_shards, read_model_config
from flowcache.wan import text, vae
from flowcache.wan.checkpoint import Layout, read_diffusers, read_original, text_len
from flowcache.wan.dit import DiTConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ORIGINAL = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl")
DIFFUSERS = ("vae", "text_encoder", "tokenizer")
"""VAE, text encoder and tokenizer in either layout."""


@dataclass(frozen=True)
class WanFolder:
    """The parts of a model that are not its transformer's weights, which a model may bring apart.

    Attributes:
        layout: how the files are laid out and named.
        folder: that holds all parts.
        config: sizes of the transformer.
        vae: VAE, folder or file.
        text_encoder: UMT5 encoder, folder or file.
        tokenizer: tokenizer folder.
    """

    layout: Layout
    folder: Path
    config: DiTConfig
    vae: Path
    text_encoder: Path
    tokenizer: Path

    def check(self) -> None:
        """Check that the weights of all parts are there, whole, and fit; reads headers only."""
        vae.check(self.vae)
        text.check_encoder(self.text_encoder, tokenizer=self.tokenizer, width=self.config.text_dim)


def locate(place: str, *, patterns: list[str] | None = None) -> WanFolder:
    """Find the parts of a model: of a local folder, or else of a hub id, fetched if need be."""
    folder = Path(place)
    if not folder.exists():
        folder = fetch(place, patterns=patterns, is_whole=is_whole)
    return find_folder(folder)


def find_missing_folder(place: str, *, patterns: list[str] | None = None) -> Missing | None:
    """Return what `locate` would download; None: nothing."""
    is_here = Path(place).exists() or local_copy(place, patterns=patterns, is_whole=is_whole)
    return None if is_here else find_missing(place, patterns=patterns)


def check_place(place: str) -> str:
    """Refuse what is neither a folder that is there nor of the form of a hub id."""
    if not Path(place).exists() and not HUB_ID.fullmatch(place):
        raise UserError(f"{place}: no such folder; give the model's folder or a hub id ORG/NAME")
    return place


def find_folder(folder: Path) -> WanFolder:
    """Find the parts of a model; all must be there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the model's folder")
    if (folder / "transformer" / "config.json").is_file():
        layout, parts = "diffusers", [_part(folder, name) for name in DIFFUSERS]
        path = folder / "transformer" / "config.json"
        config = read_diffusers(path, text_len=text_len(parts[-1]))
    elif (folder / "config.json").is_file():
        layout, parts = "original", [_part(folder, name) for name in ORIGINAL]
        config = read_original(folder / "config.json")
    else:
        raise UserError(
            f"{folder}: no Wan model; it must hold transformer/config.json (*-Diffusers layout) or "
            "config.json (original layout)"
        )
    return WanFolder(layout, folder, config, *parts)


def is_whole(folder: Path) -> bool:
    """Return whether no file of a model is missing."""
    try:
        found = find_folder(folder)
        tokenizer_files(found.tokenizer)
        for part in (found.vae, found.text_encoder):
            if part.is_dir():
                read_model_config(part / "config.json")
                find_shards(part)
    except UserError:
        return False
    return True


def _part(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise UserError(f"{path}: is missing; the model is not complete, download it again")
    return path
