"""A tuned plan on disk: a small YAML file that says what it was made for.

write_profile(profile, Path("profile.yaml"))
profile = read_profile(Path("profile.yaml"))
check_fits(profile, setting, path=Path("profile.yaml"))
check_model(profile, fingerprint(sizes, weights), path=Path("profile.yaml"))
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from flowcache.errors import UserError
from flowcache.results import MAX_ORDER
from flowcache.runtime.config import load_config
from flowcache.runtime.files import write_text

VERSION = 1
SIGNIFICANT_DIGITS = 6
FINGERPRINT_NUMBERS = 1024
"""Numbers of each weight that are read."""
HEADER = "# Which steps to compute; made by scripts/tune.py. Change nothing here: tune again.\n"


@dataclass(frozen=True)
class Setting:
    """What a plan depends on beside the model: it serves runs with the same values only."""

    num_steps: int
    shift: float
    lag: int
    guidance: list[float]
    """All scales of the guidance passes; empty where there is one pass."""


@dataclass(frozen=True)
class Reuse:
    """What is computed, and what stands for the rest."""

    plans: list[list[int]]
    """Computed own steps by chunk position; chunks behind the last entry use that one."""
    predict: Literal["velocity", "clean"]
    order: int
    factor: float
    guidance_steps: list[int] | None = None
    """Own steps that run all guidance passes if they are computed; None: every one."""


@dataclass(frozen=True)
class Prediction:
    """What was expected when the plan was made."""

    error: float
    """Squared error of the latent per element, times how much errors grow until the end."""
    psnr: float
    """dB against the same run with every step computed."""
    flops: float
    """Share of the FLOPs with every step computed."""
    pixel_scale: float
    """Squared pixel levels per unit of that error."""


@dataclass(frozen=True)
class Observed:
    """What the calibration clips had in common, by own step."""

    magnitude_ratios: list[float]
    distance_low: list[float]
    distance_high: list[float]


@dataclass(frozen=True)
class Source:
    """How the calibration was made."""

    model: str
    preset: str
    date: str
    prompts: list[str]
    seeds: list[int]


@dataclass(frozen=True)
class Profile:
    """A tuned plan."""

    version: int
    fingerprint: str
    """Of the model; see `fingerprint`."""
    setting: Setting
    reuse: Reuse
    predicted: Prediction
    observed: Observed
    source: Source

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise UserError(f"version is {self.version}, but this program reads {VERSION}")
        num_steps, plans = self.setting.num_steps, self.reuse.plans
        if not plans:
            raise UserError("reuse.plans is empty")
        for plan in plans:
            is_ascending = plan == sorted(set(plan))
            if not is_ascending or plan[:1] != [0] or plan[-1] != num_steps - 1:
                raise UserError(f"reuse.plans must run from 0 to {num_steps - 1}, found {plan}")
        if not 0 <= self.reuse.order <= MAX_ORDER:
            raise UserError(f"reuse.order must be in 0..{MAX_ORDER}, found {self.reuse.order}")
        wrong = [step for step in self.reuse.guidance_steps or () if not 0 <= step < num_steps]
        if wrong:
            raise UserError(
                f"reuse.guidance_steps must be own steps, 0..{num_steps - 1}, found {wrong[0]}"
            )
        for name, values in dataclasses.asdict(self.observed).items():
            if len(values) != num_steps:
                raise UserError(f"observed.{name} needs {num_steps} values, found {len(values)}")


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile in one step: a reader sees the old file or the whole new one.

    Raises:
        UserError: the file can't be written.
    """
    content = _rounded(dataclasses.asdict(profile))
    text = HEADER + yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)
    write_text(path, text)


def read_profile(path: Path) -> Profile:
    """Read a profile; every key must be there and no other.

    Raises:
        UserError: the file is missing, or no whole profile.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such profile: make one with scripts/tune.py --out {path}")
    try:
        return load_config(Profile, [path])
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ").partition(": set it in a preset")[0]
        raise UserError(
            f"{path} is no profile, or damaged ({reason}): make it again with scripts/tune.py"
        ) from None


def check_fits(profile: Profile, setting: Setting, *, path: Path) -> None:
    """Refuse a profile that was made for other settings.

    Raises:
        UserError: it was; the line says what to do.
    """
    tuned, found = (_rounded(dataclasses.asdict(each)) for each in (profile.setting, setting))
    wrong = [name for name, wanted in tuned.items() if wanted != found[name]]
    if wrong:
        was = ", ".join(f"{name} {tuned[name]}" for name in wrong)
        now = ", ".join(f"{found[name]}" for name in wrong)
        raise UserError(
            f"{path}, made for {profile.source.model}, was tuned with {was}, but this run has "
            f"{now}: use {was}, tune again with scripts/tune.py, or choose a preset without a "
            "profile"
        )


def check_model(profile: Profile, found: str, *, path: Path) -> None:
    """Refuse a profile that was made for another model.

    Args:
        found: fingerprint of the model of the run.

    Raises:
        UserError: it was; the line says what to do.
    """
    if found != profile.fingerprint:
        raise UserError(
            f"{path} was tuned for another model ({profile.source.model}): tune this one with "
            "scripts/tune.py, or choose a preset without a profile"
        )


def fingerprint(config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of a model's sizes and of the start of each of its weights.

    The weights are rounded to bfloat16, so that a model stored in bfloat16 or float32 is the same.

    Args:
        config: sizes, as plain values for JSON.
        tensors: name and weight, in any order; mapped from files, little of them is read.
    """
    starts = {name: _start(tensor) for name, tensor in tensors}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(starts):
        digest.update(name.encode() + starts[name])
    return digest.hexdigest()


def _start(tensor: Tensor) -> bytes:
    shape = str(list(tensor.shape)).encode()
    start = tensor.detach().flatten()[:FINGERPRINT_NUMBERS].to(torch.bfloat16)
    return shape + start.view(torch.int16).numpy().tobytes()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value
