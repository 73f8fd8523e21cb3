from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from flowcache.errors import UserError
from flowcache.policies import GuardedPlan, MagCache, Planned, ReuseRule, guidance_of, threshold_of
from flowcache.runtime.config import load_config
from flowcache.runtime.profile import (
    Observed,
    Prediction,
    Profile,
    Reuse,
    Setting,
    Source,
    check_tuned_for,
    fingerprint,
    load_with_profile,
    policy_maker,
    profile_line,
    read_profile,
    write_profile,
)

SETTING = Setting(num_steps=4, shift=5.0, lag=2, guidance=[4.0])
PROFILE = Profile(
    version=1,
    fingerprint="ab12",
    setting=SETTING,
    reuse=Reuse(plans=[[0, 1, 3], [0, 3]], predict="velocity", order=1, factor=0.625),
    predicted=Prediction(error=1.25e-5, psnr=41.5, flops=0.36, pixel_scale=2000.0),
    observed=Observed([1.0, 0.99, 0.98, 0.9], [0.0, 0.1, 0.1, 0.1], [0.0, 0.2, 0.2, 0.3]),
    source=Source("demo", "flowcache_fast", "2026-01-31", ["a red: circle"], [7]),
)


def write(folder: Path) -> Path:
    path = folder / "p.yaml"
    write_profile(PROFILE, path)
    return path


def test_a_profile_comes_back_from_its_file(tmp_path: Path):
    assert read_profile(write(tmp_path)) == PROFILE
    assert [path.name for path in tmp_path.iterdir()] == ["p.yaml"]


def test_a_profile_from_before_guidance_was_held_is_read(tmp_path: Path):
    path = write(tmp_path)
    text = path.read_text()
    assert "guidance_steps: null" in text
    path.write_text(text.replace("  guidance_steps: null\n", ""))
    assert read_profile(path) == PROFILE


def test_a_missing_profile_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(UserError, match=r"scripts/tune\.py"):
        read_profile(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version: 1", "version: 2"),
        ("factor: 0.625\n", "factor: fast\n"),
        ("factor: 0.625\n", ""),
        ("lag: 2", "lagg: 2"),
        ("num_steps: 4", "num_steps: 5"),
        ("reuse:", "reuse: ["),
        ("predict: velocity", "predict: pixels"),
        ("order: 1", "order: 3"),
        ("guidance_steps: null", "guidance_steps: [4]"),
    ],
)
def test_a_damaged_profile_is_refused_in_one_line(tmp_path: Path, old: str, new: str):
    path = write(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match="damaged") as caught:
        read_profile(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_profile_cut_off_anywhere_is_refused(tmp_path: Path):
    path = write(tmp_path)
    text = path.read_text().rstrip()
    for length in range(0, len(text) - 4, 29):
        path.write_text(text[:length])
        with pytest.raises(UserError, match="damaged"):
            read_profile(path)


@pytest.mark.parametrize("plan", ["[]", "[[0, 2]]", "[[1, 3]]", "[[0, 2, 1, 3]]", "[[0, 1, 1, 3]]"])
def test_a_plan_that_does_not_run_from_the_first_to_the_last_step_is_refused(
    tmp_path: Path, plan: str
):
    path = write(tmp_path)
    path.write_text(f"{path.read_text()}\n".replace("plans:", "unused:"))
    lines = path.read_text().split("unused:")
    rest = lines[1][lines[1].index("  predict:") :]
    path.write_text(f"{lines[0]}plans: {plan}\n{rest}")
    with pytest.raises(UserError, match=r"reuse\.plans"):
        read_profile(path)


def test_the_fingerprint_tells_models_apart_but_not_dtypes():
    weights = {
        f"blocks.{i}.q": torch.randn(8, 8, generator=torch.Generator().manual_seed(i))
        for i in range(20)
    }
    rounded = {name: value.bfloat16() for name, value in weights.items()}
    other = {**weights, "blocks.0.q": weights["blocks.0.q"] + 1}
    sizes = {"dim": 8}
    found = fingerprint(sizes, weights.items())
    assert found == fingerprint(sizes, reversed(rounded.items()))
    assert found != fingerprint(sizes, other.items())
    assert found != fingerprint({"dim": 9}, weights.items())


def test_a_profile_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be written"):
        write_profile(PROFILE, tmp_path / "missing" / "p.yaml")


# Runs that follow a profile -----------------------------------------------------------------------


@dataclass(frozen=True)
class Rule(ReuseRule):
    predict: str = "residual"


@dataclass(frozen=True)
class Run:
    reuse: Rule = field(default_factory=Rule)


Load = Callable[..., Run]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Return what loads settings from a folder beside which a profile lies."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (tmp_path / "checkpoint/profiles").mkdir(parents=True)
    write_profile(PROFILE, tmp_path / "checkpoint/profiles/p.yaml")

    def load_run(*overrides: str, setting: Setting = SETTING) -> Run:
        return load_with_profile(
            partial(load_config, Run, []),
            overrides,
            folder=tmp_path / "checkpoint",
            setting_of=lambda _: setting,
        )

    return load_run


def test_the_predictor_of_the_profile_is_used_with_its_plan(load: Load, tmp_path: Path):
    rule = load("reuse.policy=planned", "reuse.profile=profiles/p.yaml").reuse
    assert rule.profile == str(tmp_path / "checkpoint/profiles/p.yaml")
    assert (rule.predict, rule.extrapolate) == ("velocity", 0.625)
    assert policy_maker(rule)() == Planned([[0, 1, 3], [0, 3]])
    assert threshold_of(rule) is None
    assert profile_line(rule) == (
        f"profile      {rule.profile}: 2 or 3 of 4 steps planned, 41.5 dB expected"
    )


def test_order_and_held_guidance_of_the_profile_are_used(load: Load):
    reuse = Reuse([[0, 1, 3]], "clean", order=2, factor=0.7, guidance_steps=[0, 2, 3])
    write_profile(replace(PROFILE, reuse=reuse), Path("second.yaml"))
    rule = load("reuse.policy=planned", "reuse.profile=second.yaml").reuse
    assert (rule.predict, rule.extrapolate, rule.order) == ("clean", 0.7, 2)
    assert rule.guidance_steps == [0, 2, 3]
    assert guidance_of(rule).steps == [0, 2, 3]
    held = replace(PROFILE, reuse=Reuse([[0, 3]], "velocity", order=0, factor=1.0))
    write_profile(held, Path("held.yaml"))
    rule = load("reuse.policy=planned", "reuse.profile=held.yaml").reuse
    assert (rule.extrapolate, rule.order, rule.guidance_steps) == (0.0, 1, None)


def test_a_predictor_on_the_command_line_wins(load: Load):
    given = ("reuse.policy=planned", "reuse.profile=profiles/p.yaml", "reuse.extrapolate=0.1")
    rule = load(*given).reuse
    assert (rule.predict, rule.extrapolate) == ("velocity", 0.1)


def test_a_guarded_plan_has_the_calibrated_band(load: Load):
    rule = load("reuse.policy=guarded", "reuse.profile=profiles/p.yaml").reuse
    observed = PROFILE.observed
    policy = policy_maker(rule)()
    assert policy == GuardedPlan([[0, 1, 3], [0, 3]], observed.distance_low, observed.distance_high)
    assert policy.needs_signals


def test_magcache_takes_the_magnitudes_and_no_factor_that_was_fitted_to_a_plan(load: Load):
    given = ("reuse.threshold=0.2", "reuse.warmup_steps=1", "reuse.most_reuses=3")
    rule = load("reuse.policy=magcache", "reuse.profile=profiles/p.yaml", *given).reuse
    assert (rule.predict, rule.extrapolate) == ("velocity", 0.0)
    want = MagCache([1.0, 0.99, 0.98, 0.9], threshold=0.2, warmup_steps=1, most_reuses=3)
    assert policy_maker(rule)() == want
    assert threshold_of(rule) == 0.2


def test_other_policies_read_no_profile(load: Load):
    rule = load("reuse.profile=profiles/missing.yaml").reuse
    assert rule == Rule(profile="profiles/missing.yaml")


def test_a_profile_is_found_beside_the_checkpoint_then_from_here(load: Load, tmp_path: Path):
    write_profile(PROFILE, Path("own.yaml"))
    assert load("reuse.policy=planned", "reuse.profile=own.yaml").reuse.profile == "own.yaml"
    write_profile(PROFILE, tmp_path / "checkpoint/own.yaml")
    found = load("reuse.policy=planned", "reuse.profile=own.yaml").reuse.profile
    assert found == str(tmp_path / "checkpoint/own.yaml")
    whole = str(tmp_path / "here/own.yaml")
    assert load("reuse.policy=planned", f"reuse.profile={whole}").reuse.profile == whole


@pytest.mark.parametrize(
    ("overrides", "change", "message"),
    [
        ((), {}, r"^reuse\.policy=planned needs a profile: set reuse\.profile=PATH"),
        (
            ("reuse.profile=no.yaml",),
            {},
            r"checkpoint/no\.yaml: no such profile, nor /\S+/no\.yaml: make one with",
        ),
        (("reuse.profile=profiles/p.yaml",), {"num_steps": 30}, "with num_steps 4, but this run"),
        (("reuse.profile=profiles/p.yaml",), {"shift": 3.0}, "with shift 5.0, but this run has 3"),
        (("reuse.profile=profiles/p.yaml",), {"lag": 0}, "with lag 2, but this run has 0"),
        (("reuse.profile=profiles/p.yaml",), {"guidance": []}, r"guidance \[4\.0\], but this"),
    ],
)
def test_a_profile_that_cannot_be_used_is_one_line(
    load: Load, overrides: tuple[str, ...], change: dict[str, object], message: str
):
    with pytest.raises(UserError, match=message) as caught:
        load("reuse.policy=planned", *overrides, setting=replace(SETTING, **change))
    assert "\n" not in str(caught.value)


def test_a_profile_of_another_model_is_refused(load: Load):
    planned = load("reuse.policy=planned", "reuse.profile=profiles/p.yaml").reuse
    check_tuned_for(planned, lambda: "ab12")
    with pytest.raises(UserError, match="was tuned for another model"):
        check_tuned_for(planned, lambda: "cd34")
