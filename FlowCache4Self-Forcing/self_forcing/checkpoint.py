"""Find the base model and the weights that replace those of its transformer, and load them.

The base is a folder of Wan2.1-T2V-1.3B, whose own transformer is not read. The weights are one
file: `.safetensors`, or a `.pt` that holds one or several copies (`generator_ema`, `generator`).

Source: what the savers of Self-Forcing and Causal-Forcing write.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flowcache.bounds import given_path
from flowcache.errors import UserError
from flowcache.runtime.hub import Missing, fetch_file, find_missing_file
from flowcache.wan import checkpoint as wan
from flowcache.wan.dit import DiT, DiTConfig
from flowcache.wan.folder import ORIGINAL, WanFolder, check_place, find_missing_folder, locate
from flowcache.wan.rounded import RoundedDiT
from self_forcing.config import RunConfig
from self_forcing.released import DEMO, REAL_MODEL, RELEASED

SIZES = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
"""Of Wan2.1-T2V-1.3B. Source: its `config.json`."""
BASE_FILES = ["config.json", *ORIGINAL[:2], f"{ORIGINAL[2]}/*"]
"""All but the transformer's weights, which the checkpoint replaces."""


@dataclass(frozen=True)
class Checkpoint:
    """The base model and, once it is looked for, the file of the weights."""

    base: WanFolder
    weights: Path = Path()
    copies: tuple[str, ...] = ()
    """Of the weights in the file, in the order in which they are wanted."""

    def check(self) -> None:
        """Check that the weights of all parts are there, whole, and fit; reads headers only."""
        self.base.check()
        files, copies = [self.weights], self.copies
        wan.check_dit(self.base.config, files, layout="original", within=copies)

    def fingerprint(self) -> str:
        """Return a hash of the transformer, see `profile.fingerprint`."""
        files, copies = [self.weights], self.copies
        return wan.fingerprint_dit(self.base.config, files, layout="original", within=copies)

    def load_dit(self, *, is_rounded: bool, dtype: torch.dtype, device: torch.device) -> DiT:
        """Load the transformer; rounded: every operation to its type, as in upstream's code."""
        return wan.load_dit(
            self.base.config,
            [self.weights],
            layout="original",
            dtype=dtype,
            device=device,
            within=self.copies,
            kind=RoundedDiT if is_rounded else DiT,
        )


def choose(name: str) -> str:
    """Return the folder or hub id of a base model, by either, `demo` or `auto`."""
    if name == "demo" or (name == "auto" and not torch.cuda.is_available()):
        if not DEMO.is_dir():
            raise UserError(f"{DEMO}: there is no demo yet; give --model, a folder or hub id")
        return str(DEMO)
    if name in RELEASED and not Path(name).exists():
        raise UserError(f"{name} names sizes, for --dry-run: give a folder, or {REAL_MODEL}")
    return check_place(REAL_MODEL if name == "auto" else str(given_path(name, name="model")))


def find_base(place: str) -> Checkpoint:
    """Find a base model: a local folder, or else a hub id, which is fetched if need be."""
    return Checkpoint(locate(place, patterns=_patterns(place)))


def find_weights(config: RunConfig, found: Checkpoint) -> Checkpoint:
    """Find the weights that the settings name, which are fetched if need be."""
    path = _local(config.checkpoint, found.base.folder) or fetch_file(config.checkpoint)
    copies = ("generator_ema", "generator") if config.use_ema else ("generator", "generator_ema")
    return replace(found, weights=path, copies=(*copies, "model"))


def find_download(config: RunConfig, place: str, found: Checkpoint | None) -> Missing | None:
    """Return what must be downloaded first; None: all is on the disk."""
    if found is None and (missing := find_missing_folder(place, patterns=_patterns(place))):
        return missing
    is_here = _local(config.checkpoint, Path() if found is None else found.base.folder)
    return None if is_here else find_missing_file(config.checkpoint)


def _patterns(place: str) -> list[str] | None:
    return BASE_FILES if place == REAL_MODEL else None


def _local(checkpoint: str, folder: Path) -> Path | None:
    path = given_path(checkpoint, name="checkpoint")
    return next((each for each in (path, folder / path) if each.is_file()), None)
