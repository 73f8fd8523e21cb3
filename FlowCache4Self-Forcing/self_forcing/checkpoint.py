"""Find the base model and the weights that replace those of its transformer, and load them.

The base is a folder of Wan2.1-T2V-1.3B, whose own transformer is not read. The weights are one
file: `.safetensors`, or a `.pt` that holds one or several copies (`generator_ema`, `generator`).

Source: what the savers of Self-Forcing and Causal-Forcing write.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from flowcache.bounds import given_path
from flowcache.errors import UserError
from flowcache.runtime import profile
from flowcache.runtime.hub import (
    Missing,
    fetch,
    fetch_file,
    find_missing,
    find_missing_file,
    local_copy,
)
from flowcache.runtime.weights import StoredTensor, load_into, match, read
from flowcache.wan.dit import DiT, DiTConfig
from flowcache.wan.folder import ORIGINAL, WanFolder, find_folder, is_whole
from flowcache.wan.rounded import RoundedDiT
from self_forcing.config import RunConfig
from self_forcing.released import DEMO, REAL_MODEL, RELEASED

SIZES = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
"""Of Wan2.1-T2V-1.3B. Source: its `config.json`."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BASE_FILES = ["config.json", *ORIGINAL[:2], f"{ORIGINAL[2]}/*"]
"""All but the transformer's weights, which the checkpoint replaces."""


@dataclass(frozen=True)
class Checkpoint:
    """The base model and, once it is looked for, the file of the weights."""

    base: WanFolder
    weights: Path | None = None
    copies: tuple[str, ...] = ()
    """Of the weights in the file, in the order in which they are wanted."""


def choose(name: str) -> str:
    """Return the folder or hub id of a base model, by either, `demo` or `auto`."""
    if name == "demo" or (name == "auto" and not torch.cuda.is_available()):
        if not DEMO.is_dir():
            raise UserError(
                f"{DEMO}: there is no demo checkpoint; give --model, a folder or hub id"
            )
        return str(DEMO)
    if name in RELEASED and not Path(name).exists():
        raise UserError(f"{name} names sizes, for --dry-run: give a folder, or {REAL_MODEL}")
    place = REAL_MODEL if name == "auto" else str(given_path(name, name="model"))
    if not Path(place).exists() and not HUB_ID.fullmatch(place):
        raise UserError(f"{place}: no such folder; give the model's folder or a hub id ORG/NAME")
    return place


def find_base(place: str) -> Checkpoint:
    """Find a base model: a local folder, or else a hub id, which is fetched if need be."""
    folder = Path(place)
    if not folder.exists():
        folder = fetch(place, patterns=_patterns(place), is_whole=is_whole)
    return Checkpoint(find_folder(folder))


def find_weights(config: RunConfig, found: Checkpoint) -> Checkpoint:
    """Find the weights that the settings name, which are fetched if need be."""
    path = _local(config.checkpoint, found.base.folder) or fetch_file(config.checkpoint)
    copies = ("generator_ema", "generator") if config.use_ema else ("generator", "generator_ema")
    return replace(found, weights=path, copies=(*copies, "model"))


def find_download(config: RunConfig, place: str, found: Checkpoint | None) -> Missing | None:
    """Return what must be downloaded first; None: all is on the disk."""
    if found is None and local_copy(place, patterns=_patterns(place), is_whole=is_whole) is None:
        return find_missing(place, patterns=_patterns(place))
    folder = Path() if found is None else found.base.folder
    is_here = _local(config.checkpoint, folder) is not None
    return None if is_here else find_missing_file(config.checkpoint)


def _patterns(place: str) -> list[str] | None:
    return BASE_FILES if place == REAL_MODEL else None


def _local(checkpoint: str, folder: Path) -> Path | None:
    path = given_path(checkpoint, name="checkpoint")
    return next((each for each in (path, folder / path) if each.is_file()), None)


def check(found: Checkpoint) -> None:
    """Check that the weights of all parts are there, whole, and fit; reads headers only."""
    found.base.check()
    for _ in match(_empty(found), _stored(found)):
        pass


def fingerprint(found: Checkpoint) -> str:
    """Return a hash of the transformer, see `profile.fingerprint`; little of the file is read."""
    weights = match(_empty(found), _stored(found))
    named = ((names[0], tensor) for names, tensor in weights)
    return profile.fingerprint(asdict(found.base.config), named)


def load_dit(
    found: Checkpoint, *, is_rounded: bool, dtype: torch.dtype, device: torch.device
) -> DiT:
    """Load the transformer, for inference.

    Args:
        is_rounded: whether every operation is rounded to the weights' type, as in upstream's code.
    """
    dit = _empty(found, RoundedDiT if is_rounded else DiT)
    load_into(dit, _stored(found), dtype=dtype, device=device)
    return dit


def _stored(found: Checkpoint) -> Iterator[StoredTensor]:
    assert found.weights is not None, "the weights are looked for before they are read"
    return read([found.weights], within=found.copies)


def _empty(found: Checkpoint, kind: type[DiT] = DiT) -> DiT:
    with torch.device("meta"):
        return kind(found.base.config)
