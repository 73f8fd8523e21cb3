"""The comparison of two commits reports what differs, and nothing else."""

import ast
import copy
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(name="script")
def _script() -> ModuleType:
    return importlib.import_module("compare_commits")


@pytest.fixture(name="result")
def _result(script: ModuleType) -> dict[str, Any]:
    model = script.MODELS["magi1"]
    return {
        "decoded": {".0": f"{model.latents} [1, 16] aa\n{model.pixels} [1, 3] bb", ".1": ""},
        ".json": {"num_frames": 96, "total_seconds": 1.5, "environment": {"cpu": "this one"}},
        ".record.json": {"decisions": [{"is_computed": True, "distance": 0.25}]},
    }


def test_equal_results_and_other_times_are_no_difference(
    script: ModuleType, result: dict[str, Any]
):
    other = copy.deepcopy(result)
    other[".json"] |= {"total_seconds": 9.0, "environment": {"cpu": "another"}}
    outcome, fault = script.judge(script.MODELS["magi1"], result, other)
    assert (outcome, fault) == ("96 frames, 2 tensors at the VAE decoder's ends", None)


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("True", "False", "/.record.json/decisions/0/is_computed: True and False"),
        # the next double
        ("0.25", repr(0.25 + 2**-54), "/.record.json/decisions/0/distance"),
        (" aa", " ab", "/decoded/.0"),
        ("'num_frames': 96", "'num_frames': 96, 'chunks': 4", "/.json/chunks is only in head"),
        ("0.25}", "0.25}, {}", "/.record.json/decisions"),
        ("96", "96.0", "/.json/num_frames: 96 and 96.0"),
    ],
)
def test_a_difference_is_reported_with_its_place(
    script: ModuleType, result: dict[str, Any], old: str, new: str, place: str
):
    other = ast.literal_eval(repr(result).replace(old, new))
    _, fault = script.judge(script.MODELS["magi1"], result, other)
    assert fault is not None
    assert fault.startswith(place)


def test_a_refusal_equals_the_same_refusal_and_a_crash_equals_nothing(
    script: ModuleType, result: dict[str, Any]
):
    model = script.MODELS["magi1"]
    refused, crash = "error: sequence=4 must divide 2 heads", "KeyError: 'a'"
    assert script.judge(model, refused, refused) == (refused, None)
    for base, head in ((crash, crash), (refused, crash), (refused, result), (result, refused)):
        assert script.judge(model, base, head)[1] is not None


def test_latents_that_were_not_seen_are_a_fault(script: ModuleType, result: dict[str, Any]):
    result["decoded"] = {".0": ""}
    _, fault = script.judge(script.MODELS["magi1"], result, result)
    assert fault == "nothing was seen at the layer of decoder.proj_in.weight"


def test_presets_of_one_commit_alone_are_run(script: ModuleType, tmp_path: Path):
    folder = script.MODELS["magi1"].folder
    for commit, presets in (("base", ("a", "b")), ("head", ("b", "c"))):
        (tmp_path / commit / folder / "configs").mkdir(parents=True)
        for preset in presets:
            (tmp_path / commit / folder / "configs" / f"{preset}.yaml").touch()
    checkouts = [tmp_path / "base", tmp_path / "head"]
    cases = script.find_cases(checkouts, ["magi1"], None, ["serial"], is_quick=True)
    assert [case.preset for case in cases] == ["a", "b", "c"]


@pytest.mark.parametrize("roots", [("common", "FlowCache4MAGI-1"), ("src", "src"), ("", "")])
def test_packages_are_found_wherever_they_lie(
    script: ModuleType, tmp_path: Path, roots: tuple[str, str]
):
    for root, package in zip((*roots, "tests"), ("flowcache", "magi1", "magi1"), strict=True):
        (tmp_path / root / package).mkdir(parents=True)
        (tmp_path / root / package / "__init__.py").touch()
    assert {*script.roots_of(tmp_path)} == {tmp_path / root for root in roots}
