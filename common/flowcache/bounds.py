"""What values settings may have: bounds of numbers and rules of texts, as part of their types.

    @dataclass(frozen=True)
    class Sampling:
        num_steps: Annotated[int, Bounds(1, 1000)] = 50
        shift: Annotated[float, Bounds(0, 1000, is_open=True)] = 8.0
        image: Annotated[str | None, IS_PATH] = None

    check_values(Sampling(num_steps=0))  # UserError: num_steps must be in 1..1000, not 0

Bounds are wide: they refuse what no run means, so that planning a run stays cheap.
"""

import math
import os
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, cast

from flowcache.errors import UserError

T = TypeVar("T")

MAX_CHARACTERS = 10_000
"""Of any text: the models read some hundred tokens of a prompt."""
MAX_PATH_BYTES = 4095
MAX_NAME_BYTES = 255
"""Of a path and of a name in it. Source: `limits.h` of Linux."""
SHOWN_DIGITS = 30
"""Of a wrong number shown in an error."""

IS_PATH = "path"
"""Annotation of a text that names a file or folder."""


@dataclass(frozen=True)
class Bounds:
    """The least and the largest value of a number, or of each number of a list."""

    low: float
    high: float
    is_open: bool = False
    """Whether `low` itself is too low."""

    def holds(self, value: float) -> bool:
        """Return whether a number lies inside."""
        return (self.low < value if self.is_open else self.low <= value) and value <= self.high

    def rule(self) -> str:
        """Return the rule in words: `in 1..1000`, `above 0 and at most 1000`."""
        low, high = number(self.low), number(self.high)
        return f"above {low} and at most {high}" if self.is_open else f"in {low}..{high}"


@dataclass(frozen=True)
class OneOf:
    """The names that a text may be."""

    names: tuple[str, ...]


# The bounds of settings that every model has ------------------------------------------------------

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
"""Denoising steps of a chunk. Source: the timesteps that the models were trained with."""
MAX_FRAMES = 1_000_000
"""Of a video: eleven hours at 24 frames per second."""

Seed: TypeAlias = Annotated[int, Bounds(0, MAX_SEED)]
Frames: TypeAlias = Annotated[int, Bounds(1, MAX_FRAMES)]
Pixels: TypeAlias = Annotated[int, Bounds(16, 4096)]
Fps: TypeAlias = Annotated[int, Bounds(1, 1000)]
NumSteps: TypeAlias = Annotated[int, Bounds(1, MAX_STEPS)]
OwnSteps: TypeAlias = Annotated[list[int] | None, Bounds(0, MAX_STEPS - 1)]
Threshold: TypeAlias = Annotated[float, Bounds(0, 10**9)]
Share: TypeAlias = Annotated[float, Bounds(0, 1)]
Place: TypeAlias = Annotated[str | None, IS_PATH]

# Checks -------------------------------------------------------------------------------------------


SETTING = "setting"
"""In the metadata of a dataclass field: the setting that it takes, where that has another name."""


def sources_of(made: type) -> dict[str, str]:
    """Return for each field of a dataclass the name of the setting that it may take."""
    return {each.name: each.metadata.get(SETTING, each.name) for each in fields(made)}


def made_of(made: type[T], *sections: Any) -> T:
    """Return an instance whose fields take the values of settings; the others keep defaults.

    Of two sections that have the same setting the later one wins; see `sources_of`.
    """
    values = {name: value for section in sections for name, value in vars(section).items()}
    sources = sources_of(made).items()
    return made(**{name: values[source] for name, source in sources if source in values})


def number(value: float) -> str:
    """Write a number in full if it is whole and not too long, else shortly."""
    if isinstance(value, int):
        # Python refuses to write very long numbers
        is_short = abs(value) < 10**SHOWN_DIGITS
        return str(value) if is_short else f"a number of over {SHOWN_DIGITS} digits"
    return f"{value:g}"


def bounds_of(hint: Any) -> Bounds | None:
    """Return the bounds that a type is annotated with, or None."""
    return next((x for x in _annotations(hint) if isinstance(x, Bounds)), None)


def names_of(hint: Any) -> tuple[str, ...] | None:
    """Return the names that a type is annotated with, or None."""
    return next((x.names for x in _annotations(hint) if isinstance(x, OneOf)), None)


@cache
def annotated_hints(schema: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, their annotations included."""
    return typing.get_type_hints(schema, include_extras=True)


def check_values(section: Any, *, prefix: str = "", source: str = "") -> None:
    """Check every number and text of a dataclass and of its sections.

    Args:
        prefix: of the keys, in messages.
        source: the file, in messages.
    """
    where = f"{source}: " if source else ""
    for entry in fields(section):
        value, key = getattr(section, entry.name), f"{prefix}{entry.name}"
        if is_dataclass(value):
            check_values(value, prefix=f"{key}.", source=source)
            continue
        hint = annotated_hints(type(section))[entry.name]
        bounds = bounds_of(hint)
        for item in _items(value):
            if isinstance(item, str):
                fault = path_fault(item) if IS_PATH in _annotations(hint) else text_fault(item)
            else:
                fault = _number_fault(item, bounds)
            if fault is not None:
                raise UserError(f"{where}{key} {fault}")


def _number_fault(value: Any, bounds: Bounds | None) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, not {value:g}"
    if bounds is not None and not bounds.holds(value):
        return f"must be {bounds.rule()}, not {number(value)}"
    return None


def text_fault(text: str) -> str | None:
    """Return what keeps a text from being written and read as UTF-8, or None."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "is not valid UTF-8 text: check the encoding of your terminal or file"
    if "\0" in text:
        return "holds a NUL character: remove it"
    if len(text) > MAX_CHARACTERS:
        return (
            f"has {len(text)} characters, at most {MAX_CHARACTERS} are allowed (the model reads "
            "some hundred tokens): shorten it"
        )
    return None


def path_fault(text: str) -> str | None:
    """Return why a text can't be the path of a file or folder, or None."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "is not valid UTF-8: rename the file or folder"
    if any(character < " " for character in text):
        return "holds a control character, as a line break: rename the file or folder"
    size = len(text.encode())
    if size > MAX_PATH_BYTES:
        return f"is a path of {size} bytes, at most {MAX_PATH_BYTES} are possible"
    longest = max((len(os.fsencode(name)) for name in text.split("/")), default=0)
    if longest > MAX_NAME_BYTES:
        return f"has a name of {longest} bytes, at most {MAX_NAME_BYTES} are possible"
    return None


def given_path(text: str, *, name: str) -> Path:
    """Return a path that a user gave as an argument or setting, `~` and `~user` replaced."""
    if (fault := path_fault(text)) is not None:
        raise UserError(f"{name} {fault}")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{name} is {text}, but that home directory is not known") from None


def _items(value: Any) -> Iterator[Any]:
    """Yield a value, or those of a list, tuple or mapping."""
    if isinstance(value, dict):
        value = list(cast("dict[Any, Any]", value).values())
    if isinstance(value, (list, tuple)):
        for item in cast("list[Any]", value):
            yield from _items(item)
    else:
        yield value


def _annotations(hint: Any) -> tuple[Any, ...]:
    return hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
