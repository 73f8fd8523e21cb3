"""A tuned plan on disk, and runs that follow one.

A profile is a small YAML file that says what it was made for. It ranks above the presets and below
the command line: what a user sets there wins.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flowcache.bounds import given_path
from flowcache.errors import UserError
from flowcache.policies import Calibration, Rescale, ReusePolicy, ReuseRule, identity
from flowcache.predict import MAX_ORDER, Quantity
from flowcache.runtime.config import load_config
from flowcache.runtime.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
SIGNIFICANT_DIGITS = 6
FINGERPRINT_NUMBERS = 1024
"""Numbers of each weight that are read."""
HEADER = "# Which steps to compute; made by scripts/tune.py. Change nothing here: tune again.\n"


PLACEHOLDER = "reuse.predict=velocity"
"""Replaces what a profile sets, until it is read: a predictor that most other settings go with."""


@dataclass(frozen=True)
class Setting:
    """What a plan depends on besides the model: it serves runs with the same values only."""

    num_steps: int
    shift: float
    lag: int
    guidance: list[float]
    """All scales of the guidance passes; empty where there is one pass."""


@dataclass(frozen=True)
class Reuse:
    """What is computed, and what predicts the rest."""

    plans: list[list[int]]
    """Computed own steps by chunk position; chunks behind the last entry use that one."""
    predict: Quantity
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
    guidance_risks: list[list[float]] | None = None
    """Of reusing a result that is one step old, two, ...; None: not calibrated."""


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
            if values is not None and len(values) != num_steps:
                raise UserError(f"observed.{name} needs {num_steps} values, found {len(values)}")

    def calibration(self, rescale: Rescale) -> Calibration:
        """Return what policies build on."""
        observed = dataclasses.asdict(self.observed)
        known = {name: values for name, values in observed.items() if values is not None}
        return Calibration(rescale, self.reuse.plans, **known)


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile in one step: a reader sees the old file or the whole new one."""
    content = _rounded(dataclasses.asdict(profile))
    text = HEADER + yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)
    write_text(path, text)


def read_profile(path: Path) -> Profile:
    """Read a profile; every key must be there and no other."""
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
    """Refuse a profile that was made for other settings."""
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


def fingerprint(config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of a model's sizes and of the start of each of its weights.

    The weights are rounded to bfloat16, so that a model stored in bfloat16 or float32 is the same.

    Args:
        tensors: name and weight, in any order; mapped from files, little of them is read.
    """
    starts = {name: _start(tensor) for name, tensor in tensors}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(starts):
        digest.update(name.encode() + starts[name])
    return digest.hexdigest()


def _start(tensor: Tensor) -> bytes:
    import torch  # late: a wrong setting is refused before torch is loaded

    shape = str(list(tensor.shape)).encode()
    start = tensor.detach().flatten()[:FINGERPRINT_NUMBERS].to(torch.bfloat16)
    return shape + start.view(torch.int16).numpy().tobytes()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


# Runs that follow a profile -----------------------------------------------------------------------


def load_with_profile(
    load: Callable[..., Any],
    overrides: Sequence[str],
    *,
    folder: Path | None,
    setting_of: Callable[[Any], Setting],
) -> Any:
    """Return the settings of a run, with the place and the predictor of its profile, if it has one.

    Args:
        load: makes settings from `overrides=`, `key=value` texts above all presets.
        folder: the checkpoint's; a relative path is looked for there, then from here.
    """
    try:
        config = load(overrides=overrides)
        rule = config.reuse
        if not rule.needs_profile:
            return config
    except UserError as refusal:
        # they may go with the predictor of a profile
        try:
            rule = load(overrides=[PLACEHOLDER, *overrides]).reuse
        except UserError:
            raise refusal from None  # not what the placeholder, which nobody set, does not go with
        if not rule.needs_profile:
            raise
    path = find_profile(rule, folder=folder)
    profile = read_profile(path)
    if rule.kind.takes("guidance_risks") and profile.observed.guidance_risks is None:
        raise UserError(
            f"{path} has no guidance risks, which reuse.policy={rule.policy} adds up: make it "
            "again with scripts/tune.py"
        )
    wanted = [*profile_settings(profile, rule), *overrides, f"reuse.profile={path}"]
    config = load(overrides=wanted)
    check_fits(profile, setting_of(config), path=path)
    return config


def find_profile(rule: ReuseRule, *, folder: Path | None) -> Path:
    """Return where a run's profile is; a place that was given in full may hold none."""
    if rule.profile is None:
        raise UserError(
            f"reuse.policy={rule.policy} needs a profile: set reuse.profile=PATH to one that "
            "scripts/tune.py made"
        )
    path = given_path(rule.profile, name="reuse.profile")
    if folder is None or path.is_absolute():
        return path
    own = folder / path
    if not own.exists() and not path.exists():
        raise UserError(
            f"{own}: no such profile, nor {path.absolute()}: make one with scripts/tune.py --out "
            f"{own}"
        )
    return own if own.exists() else path


def check_tuned_for(rule: ReuseRule, fingerprint: Callable[[], str]) -> None:
    """Refuse to follow a profile that was made for another model than that of the fingerprint."""
    path, profile = profile_of(rule)
    if fingerprint() != profile.fingerprint:
        raise UserError(
            f"{path} was tuned for another model ({profile.source.model}): tune this one with "
            "scripts/tune.py, or choose a preset without a profile"
        )


def profile_of(rule: ReuseRule) -> tuple[Path, Profile]:
    """Read the profile of a run's settings, which has been found."""
    assert rule.profile is not None, "load_with_profile comes first"
    return Path(rule.profile), read_profile(Path(rule.profile))


def profile_settings(profile: Profile, rule: ReuseRule) -> list[str]:
    """Return what a profile sets: its plan is made for its predictor, magnitudes are for none."""
    if not rule.kind.takes("plans"):
        return [f"reuse.predict={profile.reuse.predict}"]
    reuse = profile.reuse
    steps = "null" if reuse.guidance_steps is None else reuse.guidance_steps
    return [
        f"reuse.predict={reuse.predict}",
        f"reuse.extrapolate={reuse.factor if reuse.order else 0.0}",
        f"reuse.order={max(reuse.order, 1)}",
        f"reuse.guidance_steps={steps}",
    ]


def profile_line(rule: ReuseRule) -> str:
    """Return a line on the profile that a run follows, for its description."""
    path, profile = profile_of(rule)
    counts = sorted({len(plan) for plan in profile.reuse.plans})
    computed = " or ".join(str(count) for count in counts)
    return (
        f"profile      {path}: {computed} of {profile.setting.num_steps} steps planned, "
        f"{profile.predicted.psnr:.1f} dB expected"
    )


def policy_maker(rule: ReuseRule, *, rescale: Rescale = identity) -> Callable[[], ReusePolicy]:
    """Return what makes a run's reuse policies, one for each guidance branch.

    Args:
        rescale: from a distance of signals to what is accumulated.
    """
    calibration = Calibration(rescale)
    if rule.needs_profile:
        calibration = profile_of(rule)[1].calibration(rescale)
    return partial(rule.kind.of, rule, calibration)
