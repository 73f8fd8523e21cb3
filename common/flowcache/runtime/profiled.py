"""Runs that follow a profile: find it, check it, and put its predictor under the command line.

A profile stands above the presets and below the command line: what a user sets there wins.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from flowcache.errors import UserError
from flowcache.runtime.bounds import given_path
from flowcache.runtime.profile import Profile, Setting, check_fits, check_model, read_profile

STAND_IN = "reuse.predict=velocity"
"""What a profile sets, until it is read: a predictor that all other settings go with."""
TunedPolicy = Literal["planned", "guarded", "magcache"]


class Rule(Protocol):
    """The settings of reuse that name a profile."""

    @property
    def policy(self) -> str:
        """When a chunk is computed."""
        ...

    @property
    def profile(self) -> str | None:
        """Where the profile is."""
        ...


class Tunable(Protocol):
    """The settings of a run."""

    @property
    def reuse(self) -> Any:
        """A `Rule`."""
        ...


Config = TypeVar("Config", bound=Tunable)


def load_with_profile(
    load: Callable[[Sequence[str]], Config],
    overrides: Sequence[str],
    *,
    folder: Path | None,
    setting_of: Callable[[Config], Setting],
) -> Config:
    """Return the settings of a run, with the place and the predictor of its profile, if it has one.

    Args:
        load: makes settings from `key=value` texts above all presets.
        overrides: those of the command line.
        folder: the checkpoint's; a relative path is looked for there, then from here.
        setting_of: what the profile must fit, of the run.

    Raises:
        UserError: the profile is missing, damaged, or was made for other settings.
    """
    rule = load([STAND_IN, *overrides]).reuse
    if not follows_profile(rule):
        return load(overrides)
    path = find_profile(rule, folder=folder)
    profile = read_profile(path)
    config = load([*profile_settings(profile, rule), *overrides, f"reuse.profile={path}"])
    check_fits(profile, setting_of(config), path=path)
    return config


def follows_profile(rule: Rule) -> bool:
    """Tell whether a run's reuse policy needs a profile."""
    return rule.policy in ("planned", "guarded", "magcache")


def find_profile(rule: Rule, *, folder: Path | None) -> Path:
    """Return where a run's profile is, whether or not it exists.

    Raises:
        UserError: none is named.
    """
    if rule.profile is None:
        raise UserError(
            f"reuse.policy={rule.policy} needs a profile: set reuse.profile=PATH to one that "
            "scripts/tune.py made"
        )
    path = given_path(rule.profile, name="reuse.profile")
    if folder is not None and ((folder / path).exists() or not path.exists()):
        return folder / path
    return path


def check_tuned_for(rule: Rule, fingerprint: Callable[[], str]) -> None:
    """Refuse a run that follows a profile of another model.

    Args:
        fingerprint: of the model of the run; asked for only if a profile is followed.

    Raises:
        UserError: it does.
    """
    if follows_profile(rule):
        path, profile = profile_of(rule)
        check_model(profile, fingerprint(), path=path)


def profile_of(rule: Rule) -> tuple[Path, Profile]:
    """Read the profile of a run's settings, which has been found.

    Raises:
        UserError: it is missing or damaged.
    """
    assert rule.profile is not None, "load_with_profile comes first"
    return Path(rule.profile), read_profile(Path(rule.profile))


def profile_settings(profile: Profile, rule: Rule) -> list[str]:
    """Return what a profile sets: its plan is made for its predictor, magnitudes are for none."""
    if rule.policy == "magcache":
        return [f"reuse.predict={profile.reuse.predict}"]
    reuse = profile.reuse
    steps = "null" if reuse.guidance_steps is None else reuse.guidance_steps
    return [
        f"reuse.predict={reuse.predict}",
        f"reuse.extrapolate={reuse.factor if reuse.order else 0.0}",
        f"reuse.order={max(reuse.order, 1)}",
        f"reuse.guidance_steps={steps}",
    ]


def profile_lines(rule: Rule) -> list[str]:
    """Say what a run's profile is, in a line of its description; [] where it follows none."""
    if not follows_profile(rule):
        return []
    path, profile = profile_of(rule)
    counts = sorted({len(plan) for plan in profile.reuse.plans})
    computed = " or ".join(str(count) for count in counts)
    return [
        f"profile      {path}: {computed} of {profile.setting.num_steps} steps planned, "
        f"{profile.predicted.psnr:.1f} dB expected"
    ]
