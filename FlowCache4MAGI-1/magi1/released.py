"""Models by name: the demos, the released ones, or any JSON config; and where their files are."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from flowcache.errors import UserError
from flowcache.runtime.bounds import given_path
from flowcache.runtime.hub import HUB, Hub, Missing, fetch, find_missing, local_copy
from magi1 import checkpoint as checkpoints
from magi1.config import ReleaseConfig

FOLDER = Path(__file__).resolve().parent.parent
DEMO = FOLDER / "demo"
DEMOS = {"demo": "distill_config.json", "demo-base": "base_config.json"}
"""Distilled (one pass) and base (three guidance passes)."""
CONFIGS = FOLDER / "configs" / "released"
RELEASED = (
    *("4.5B_base", "4.5B_distill", "4.5B_distill_quant"),
    *("24B_base", "24B_distill", "24B_distill_quant"),
)
REAL_MODEL = "4.5B_distill"
REPOSITORY = "sand-ai/MAGI-1"
PATH_FIELDS = ("load", "t5_pretrained", "vae_pretrained")

Config = TypeVar("Config", bound=ReleaseConfig)


@dataclass(frozen=True)
class Source:
    """A model that was asked for.

    Attributes:
        name: as reports show it.
        config_file: its JSON config; presets of its own may lie beside it.
        is_released: whether the name is that of a released model.
        may_download: whether its weights come from the hub where they are not on the disk.
    """

    name: str
    config_file: Path
    is_released: bool = False
    may_download: bool = False


def find_model(model: str, *, has_cuda: bool | None = None) -> Source:
    """Find the JSON config of a model.

    Args:
        has_cuda: whether there is a CUDA device; None: look for one.
        model: `demo`, `demo-base`, a name of `RELEASED`, a JSON file, a folder with one
            `*config.json`, or `auto`: 4.5B_distill where there is CUDA, else the demo.

    Raises:
        UserError: there is no such model, or a folder with none or several configs.
    """
    is_auto = model == "auto"
    if is_auto:
        has_cuda = torch.cuda.is_available() if has_cuda is None else has_cuda
        model = REAL_MODEL if has_cuda else "demo"
    if model in RELEASED:
        path = CONFIGS / f"{model}.json"
        return Source(model, path, is_released=True, may_download=is_auto)
    if model in DEMOS:
        path = DEMO / DEMOS[model]
        if not path.is_file():
            raise UserError(f"{path}: the demo checkpoint is missing: restore it with git")
        return Source(model, path)
    path = given_path(model, name="model")
    if path.is_dir():
        path = _only_config(path)
    if not path.is_file():
        raise UserError(
            f"{model}: no such file or folder; a model is a JSON config, a folder that holds one, "
            f"or one of {', '.join((*DEMOS, *RELEASED))}"
        )
    return Source(path.parent.resolve().name, path)


def _only_config(folder: Path) -> Path:
    # hidden: macOS leaves ._NAME next to NAME on foreign disks
    found = sorted(p for p in folder.glob("*config.json") if not p.name.startswith("."))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{folder}: must hold one *config.json, found {names}: name the JSON file itself"
        )
    return found[0]


def locate(config: Config, source: Source) -> Config:
    """Return the config with its folders found: from here, as upstream, or beside the JSON."""
    run = config.runtime_config
    paths = {name: find_path(getattr(run, name), source) for name in PATH_FIELDS}
    return replace(config, runtime_config=replace(run, **paths))


def find_path(path: str, source: Source) -> str:
    """Return a path as it is if it exists from here, else beside the JSON if it exists there."""
    beside = source.config_file.parent / path
    return str(beside) if not Path(path).exists() and beside.exists() else path


def are_there(config: ReleaseConfig) -> bool:
    """Whether the folders that a config names hold a whole model."""
    try:
        checkpoints.check_complete(checkpoints.find(config))
    except UserError:
        return False
    return True


def download(config: Config, source: Source, *, hub: Hub = HUB) -> Config:
    """Find a released model in the local hub cache, or fetch it from the hub.

    Returns: the config with the folders of what was fetched.

    Raises:
        UserError: it is none of the released models, or not to be had.
    """
    if not source.is_released:
        raise UserError(
            f"--download fetches a released model, not {source.name}: give --model as one of "
            f"{', '.join(RELEASED)}"
        )
    folder = fetch(
        REPOSITORY,
        patterns=_patterns(source),
        is_whole=lambda folder: are_there(_in_folder(config, source, folder)),
        hub=hub,
    )
    return _in_folder(config, source, folder)


def find_download(config: ReleaseConfig, source: Source, *, hub: Hub = HUB) -> Missing | None:
    """Return what `download` would fetch; None: nothing, a copy is in the local hub cache.

    Raises:
        UserError: it is not to be had, or the disk has no room for it.
    """
    patterns = _patterns(source)
    found = local_copy(
        REPOSITORY,
        patterns=patterns,
        is_whole=lambda folder: are_there(_in_folder(config, source, folder)),
        hub=hub,
    )
    if found is not None:
        return None
    missing = find_missing(REPOSITORY, patterns=patterns, hub=hub)
    missing.check_room()
    return missing


def _patterns(source: Source) -> list[str]:
    return [f"ckpt/magi/{source.name}/*", "ckpt/vae/*", "ckpt/t5/*"]


def _in_folder(config: Config, source: Source, folder: Path) -> Config:
    """Return the config with the folders of a copy of the repository."""
    run = replace(
        config.runtime_config,
        load=str(folder / "ckpt" / "magi" / source.name),
        t5_pretrained=str(folder / "ckpt" / "t5"),
        vae_pretrained=str(folder / "ckpt" / "vae"),
    )
    return replace(config, runtime_config=run)
