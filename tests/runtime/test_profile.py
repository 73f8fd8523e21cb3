from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowcache.errors import UserError
from flowcache.runtime.profile import (
    Observed,
    Prediction,
    Profile,
    Reuse,
    Setting,
    Source,
    check_fits,
    fingerprint,
    read_profile,
    write_profile,
)

PROFILE = Profile(
    version=1,
    fingerprint="ab12",
    setting=Setting(num_steps=4, shift=5.0, lag=2, guidance=[4.0]),
    reuse=Reuse(plans=[[0, 1, 3], [0, 3]], predict="velocity", order=1, factor=0.5),
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
        ("factor: 0.5\n", "factor: fast\n"),
        ("factor: 0.5\n", ""),
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


def test_a_profile_fits_the_run_it_was_made_for(tmp_path: Path):
    check_fits(PROFILE, PROFILE.setting, path=tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 50}, "num_steps 4, but this run has 50"),
        ({"shift": 8.0}, "shift 5.0, but this run has 8.0"),
        ({"lag": 0}, "lag 2, but"),
        ({"guidance": []}, r"guidance \[4.0\], but this run has \[\]"),
    ],
)
def test_a_profile_for_another_run_is_refused_in_a_line_that_says_what_to_do(
    change: dict[str, object], words: str
):
    setting = replace(PROFILE.setting, **change)
    with pytest.raises(UserError, match=words) as caught:
        check_fits(PROFILE, setting, path=Path("p.yaml"))
    assert "scripts/tune.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_tells_models_apart_but_not_dtypes():
    weights = {f"blocks.{i}.q": torch.randn(8, 8, generator=_seed(i)) for i in range(20)}
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


def _seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
