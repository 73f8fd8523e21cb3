"""Bounds of numbers, and texts that can't be written or can't be paths."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from flowcache.bounds import (
    IS_PATH,
    SETTING,
    Bounds,
    OneOf,
    annotated_hints,
    bounds_of,
    check_values,
    given_path,
    made_of,
    path_fault,
)
from flowcache.errors import UserError
from flowcache.runtime.config import describe, load_config
from flowcache.runtime.model import Request, load_model
from flowcache.runtime.run import read_settings


@dataclass(frozen=True)
class Inner:
    shares: Annotated[tuple[float, ...], Bounds(0, 1)] = (0.5,)
    size: float = 1.0


@dataclass(frozen=True)
class Outer:
    steps: Annotated[int, Bounds(1, 1000)] = 50
    shift: Annotated[float, Bounds(0, 10, is_open=True)] = 8.0
    overlap: Annotated[int | None, Bounds(1, 9)] = None
    prompt: str = "a"
    image: Annotated[str | None, IS_PATH] = None
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps must be in 1..1000, not 0"),
        ({"steps": 1001}, "steps must be in 1..1000, not 1001"),
        ({"steps": 10**5000}, "steps must be in 1..1000, not a number of over 30 digits"),
        ({"shift": 0.0}, "shift must be above 0 and at most 10, not 0"),
        ({"shift": float("nan")}, "shift must be a finite number, not nan"),
        ({"overlap": 10}, "overlap must be in 1..9, not 10"),
        ({"inner": Inner((0.5, 2.0))}, "inner.shares must be in 0..1, not 2"),
        ({"inner": Inner(size=float("inf"))}, "inner.size must be a finite number, not inf"),
        ({"prompt": "a\0b"}, "prompt holds a NUL character: remove it"),
        ({"prompt": "caf\udce9"}, "prompt is not valid UTF-8 text"),
        ({"prompt": "a" * 10_001}, "prompt has 10001 characters, at most 10000 are allowed"),
        ({"image": "a\nb.png"}, "image holds a control character"),
        ({"image": "x" * 256}, "image has a name of 256 bytes, at most 255 are possible"),
        ({"image": "d/" * 3000}, "image is a path of 6000 bytes, at most 4095 are possible"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_rule(changed: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        check_values(dataclasses.replace(Outer(), **changed))
    assert str(caught.value).startswith(message)


def test_values_at_the_bounds_are_taken():
    check_values(Outer(steps=1, shift=10.0, overlap=9, image="x" * 255, inner=Inner((0.0, 1.0))))
    check_values(Outer(steps=1000, shift=1e-9, prompt="ein Bär 🐻\n" + "a" * 9_000))


def test_what_is_called_possible_is_possible_and_the_rest_is_not(tmp_path: Path):
    (tmp_path / ("x" * 255)).touch()
    assert path_fault("x" * 255) is None
    with pytest.raises(OSError, match="File name too long"):
        (tmp_path / ("x" * 256)).touch()
    assert path_fault("ü" * 127) is None
    assert path_fault("ü" * 128) == "has a name of 256 bytes, at most 255 are possible"


def test_a_home_directory_that_nobody_has_is_refused():
    assert given_path("~/a", name="model") == Path(os.path.expanduser("~/a"))
    with pytest.raises(UserError, match=r"^model is ~no-such-user/a, but that home directory"):
        given_path("~no-such-user/a", name="model")


def numbers(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in annotated_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, f"{prefix}{name}.")
        elif "int" in str(hint) or "float" in str(hint):
            yield f"{prefix}{name}", hint


@pytest.mark.parametrize("family", ["skyreels_v2", "magi1"])
def test_every_number_of_the_settings_has_bounds_and_they_are_listed(family: str):
    model = load_model(family)
    config = read_settings(model, Request("vanilla", "demo", ["prompt=x"], None, is_dry=True))
    listed = {line.partition(":")[0]: line for line in config.lines()}
    found = [
        (key, hint)
        for key, hint in numbers(model.schema)
        if "Literal" not in str(hint) and "OneOf" not in str(hint)  # int8 is a name
    ]
    assert len(found) > 20
    for key, hint in found:
        bounds = bounds_of(hint)
        assert bounds is not None, f"{key} has no bounds"
        assert bounds.rule() in listed[key]


@dataclass(frozen=True)
class Even:
    shares: tuple[float, ...]
    count: int = field(metadata={SETTING: "steps"})
    seen: int = 0


def test_an_object_takes_its_values_from_the_settings_that_its_fields_name():
    assert made_of(Even, Outer(steps=7), Inner((0.25,))) == Even((0.25,), 7)
    assert made_of(Even, Inner((1.0,)), Even((0.5,), 3, seen=2), Outer()) == Even((0.5,), 50, 2)


def test_a_name_that_is_none_of_those_is_refused_by_name():
    @dataclass(frozen=True)
    class Choice:
        kind: Annotated[str, OneOf(("fast", "slow"))] = "fast"

    assert load_config(Choice, [], overrides=["kind=slow"]) == Choice("slow")
    for given, shown in (("quick", "'quick'"), ("null", "None"), ("3", "3")):
        with pytest.raises(UserError, match=rf"kind is {shown}, but must be one of fast, slow$"):
            load_config(Choice, [], overrides=[f"kind={given}"])
    assert describe(Choice(), commented=[]) == ["kind: one of fast, slow = fast"]
