"""Models by name: the demos, the released ones, or any JSON config; and where their files are."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from flowcache.bounds import given_path
from flowcache.errors import UserError
from magi1.config import MagiConfig

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
HUB = "sand-ai/MAGI-1"
PATH_FIELDS = ("load", "t5_pretrained", "vae_pretrained")

Config = TypeVar("Config", bound=MagiConfig)


@dataclass(frozen=True)
class Source:
    """A model that was asked for.

    Attributes:
        name: as reports show it.
        config_file: its JSON config; presets of its own may lie beside it.
        is_released: whether the name is that of a released model.
    """

    name: str
    config_file: Path
    is_released: bool = False


def find_model(model: str) -> Source:
    """Find the JSON config of a model.

    Args:
        model: `demo`, `demo-base`, a name of `RELEASED`, a JSON file, a folder with one
            `*config.json`, or `auto`: 4.5B_distill where there is CUDA, else the demo.

    Raises:
        UserError: there is no such model, or a folder with none or several configs.
    """
    if model == "auto":
        model = REAL_MODEL if torch.cuda.is_available() else "demo"
    if model in RELEASED:
        return Source(model, CONFIGS / f"{model}.json", is_released=True)
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
    found = sorted(folder.glob("*config.json"))
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


def download(config: Config, source: Source) -> Config:
    """Fetch a released model from the hub, or find it in the local hub cache.

    Returns: the config with the folders of what was fetched.

    Raises:
        UserError: it is none of the released models, or not to be had.
    """
    if not source.is_released:
        raise UserError(
            f"--download fetches a released model, not {source.name}: give --model as one of "
            f"{', '.join(RELEASED)}"
        )
    patterns = [f"ckpt/magi/{source.name}/*", "ckpt/vae/*", "ckpt/t5/*"]
    try:
        folder = Path(snapshot_download(HUB, allow_patterns=patterns)) / "ckpt"
    # covers an unknown repository, no network, a hub that refuses, and a full disk
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{HUB}: not to be had from the hub ({reason})") from error
    run = replace(
        config.runtime_config,
        load=str(folder / "magi" / source.name),
        t5_pretrained=str(folder / "t5"),
        vae_pretrained=str(folder / "vae"),
    )
    return replace(config, runtime_config=run)
