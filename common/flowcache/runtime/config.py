"""Typed configuration: YAML layers and command-line overrides into one frozen dataclass.

A schema is a dataclass; nested dataclasses are sections. Its field types say what a value may be
(`int`, `float | None`, `Literal["full", "causal"]`, an Enum, `tuple[int, int]`, ...) and its
defaults are the lowest layer. Every later layer changes only the keys it names:

    # base.yaml              # fast.yaml              command line
    reuse:                   reuse:                   reuse.threshold=0.2
      policy: vanilla          policy: flowcache
      threshold: 0.0           threshold: 0.1

    load_config(Run, [Path("base.yaml"), Path("fast.yaml")], overrides=["reuse.threshold=0.2"])
    -> Run(reuse=Reuse(policy="flowcache", threshold=0.2))

OmegaConf reads the YAML and converts the values. A `${...}` in a string is text, not a reference.
Where it is not installed, as on a GPU machine that only measures, PyYAML reads the same settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import yaml

from flowcache.errors import UserError, one_line
from flowcache.runtime.bounds import annotated_hints, bounds_of, given_path
from flowcache.runtime.files import read_json, read_regular

if TYPE_CHECKING:
    from omegaconf import DictConfig

T = TypeVar("T")

COMMAND_LINE = "command line"
VALUE_CHARACTERS = 80  # of a wrong value shown in an error
KEY_CHARACTERS = 200  # no key is longer
MAX_YAML_CHARACTERS = 1_000_000
"""Of a file; the longest that is read here, a profile of many clips, has some ten thousand."""
MAX_YAML_DEPTH = 20
"""Nested lists and mappings; none that is read here has more than 5."""


def load_config(schema: type[T], layers: Sequence[Path], *, overrides: Sequence[str] = ()) -> T:
    """Merge YAML layers, then `a.b=value` overrides, into an instance of the schema.

    Args:
        schema: a dataclass whose defaults are the lowest layer.
        layers: YAML files, the later one wins; a list value replaces the earlier list.
        overrides: `key=value` texts. The value is YAML, but for a text field it is taken as it is.

    Raises:
        UserError: a file is missing or not YAML, a key is unknown, a value has the wrong type, or
            a key without a default was given no value. One line that names file, key and value.
    """
    if not has_omegaconf():
        return _load_plain(schema, layers, overrides=overrides)
    from omegaconf import OmegaConf

    config: DictConfig = OmegaConf.structured(schema)
    for path in layers:
        config = _merged(config, schema, read_layer(path), source=str(path))
    for text in overrides:
        config = _merged(config, schema, parse_override(text, schema), source=COMMAND_LINE)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} has no value: set it in a preset or as {missing[0]}=VALUE")
    return cast(T, OmegaConf.to_object(config))


def has_omegaconf() -> bool:
    """Tell whether OmegaConf is installed."""
    try:
        importlib.import_module("omegaconf")
    except ImportError:
        return False
    return True


def read_layer(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a mapping.

    Raises:
        UserError: the file can't be read, or holds no mapping.
    """
    if path.suffix != ".json":
        return read_yaml(path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return cast("dict[str, Any]", content)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty mapping.

    Raises:
        UserError: the file is missing, unreadable, not plain YAML (with the line), or no mapping.
    """
    try:
        text = read_regular(path)
        check_plain_yaml(text)
        content = _parsed(text, source=str(path)) if has_omegaconf() else _yaml_value(text) or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({one_line(error)})") from None
    except YAML_ERRORS as error:
        raise UserError(f"{path}: {_yaml_reason(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found a list")
    return cast("dict[str, Any]", content)


def _parsed(text: str, *, source: str) -> Any:
    """Return the values of a YAML text as OmegaConf reads them; an empty one is a mapping."""
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError, OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except GrammarParseError as error:
        raise UserError(f"{source}: {error.full_key}: write '$' and '{{' apart") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {_yaml_reason(error)}") from None


YAML_ERRORS = (yaml.YAMLError, ValueError, OverflowError, TypeError)
"""What reading YAML raises: also the errors of numbers too long, of dates, of unhashable keys."""


def check_plain_yaml(text: str) -> None:
    """Refuse YAML that would exhaust the stack or the memory of what reads it, and odd YAML.

    Settings need no anchors, aliases or tags, and little depth. Nothing is built here.

    Raises:
        yaml.YAMLError: it is no YAML, or not plain.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise yaml.YAMLError(f"it has over {MAX_YAML_CHARACTERS} characters")
    depth = 0
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C: where libyaml is there
    for event in yaml.parse(text, Loader=loader):
        mark = event.start_mark
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            problem = f"more than {MAX_YAML_DEPTH} nested lists and mappings"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases, & and *, are not taken", problem_mark=mark
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags, !, are not taken", problem_mark=mark)


def _yaml_reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return f"{line}not valid YAML ({error.problem})"
    return f"not valid YAML ({one_line(error)})"


def parse_override(text: str, schema: type) -> dict[str, Any]:
    """Turn `a.b=value` into `{"a": {"b": value}}`.

    Raises:
        UserError: there is no `=`, no key, or the value is not YAML.
    """
    key, equals, raw = text.partition("=")
    if not equals or not all(key.split(".")) or len(key) > KEY_CHARACTERS:
        raise UserError(f"{_shown(text)} is not an override: write key=value, as in seed=7")
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    value: Any = raw
    if not _is_text(_hint_of(schema, key)):
        try:
            check_plain_yaml(raw)
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)
        except (*YAML_ERRORS, OmegaConfBaseException):
            raise UserError(f"{COMMAND_LINE}: {key}={_shown(raw)} is not valid YAML") from None
        value = cast("dict[str, Any]", value)["value"]
    elif raw == "null" and _accepts_none(_hint_of(schema, key)):
        value = None
    return _nested(key, value)


def find_preset(folder: Path, name: str) -> Path:
    """Return the YAML file of a preset: a name in the folder, or a path to a file.

    Raises:
        UserError: there is no such preset; the available ones are named.
    """
    available = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name in available:
        return available[name]
    given = given_path(name, name="preset")
    if given.suffix in (".yaml", ".yml"):
        if given.is_file():
            return given
        raise UserError(f"{name}: no such file; presets: {', '.join(available) or 'none'}")
    close = difflib.get_close_matches(name, available, n=1)
    hint = f", did you mean {close[0]}?" if close else ";"
    raise UserError(
        f"preset {_shown(name)} is unknown{hint} available: {', '.join(available) or 'none'}"
        f" (in {folder})"
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain values for JSON: an Enum by its name, a tuple as a list."""
    return cast("dict[str, Any]", _plain(dataclasses.asdict(config)))


def describe(schema: type, *, commented: Path | None = None) -> list[str]:
    """Return one line per key: `key: type = default`, and the comment behind it in a YAML file.

    A key without a default has no `= default`.

    Args:
        schema: the dataclass.
        commented: a YAML file whose trailing `# comments` explain the keys.
    """
    from omegaconf import OmegaConf

    comments = {} if commented is None else yaml_comments(commented)
    defaults = OmegaConf.structured(schema)
    required = OmegaConf.missing_keys(defaults)  # sections too: their keys have no default either
    lines: list[str] = []
    for key, hint in _leaves(schema):
        line = f"{key}: {_expected(hint)}"
        bounds = bounds_of(hint)
        line += "" if bounds is None else f" {bounds.rule()}"
        if key not in required and key.partition(".")[0] not in required:
            default = OmegaConf.select(defaults, key)
            value = _plain(
                OmegaConf.to_object(default) if OmegaConf.is_config(default) else default
            )
            line += f" = {'null' if value is None else value}"
        lines.append(f"{line}  # {comments[key]}" if key in comments else line)
    return lines


def yaml_comments(path: Path) -> dict[str, str]:
    """Return the trailing comment of every key in a YAML file, by dotted key."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found: dict[str, str] = {}

    def visit(node: yaml.Node | None, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            is_section = isinstance(value_node, yaml.MappingNode)
            end = key_node.end_mark if is_section else value_node.end_mark
            comment = re.match(r"\s*:?\s*#\s*(.*)", lines[end.line][end.column :])
            if comment:
                found[key] = comment[1].strip()
            visit(value_node, f"{key}.")

    visit(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return found


def _merged(
    config: DictConfig, schema: type, layer: Mapping[str, Any], *, source: str
) -> DictConfig:
    """Merge a layer key by key, so that a wrong value can be named with its key and source."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, hint, value in _assignments(schema, layer, prefix="", source=source):
        try:
            if isinstance(value, str) and _is_collection(hint):
                raise ValueError("no text, and OmegaConf would take ${a} as a reference")
            merged = OmegaConf.unsafe_merge(config, _nested(key, _adapted(hint, value)))
            _check_meaning(value, OmegaConf.select(merged, key))
        except (OmegaConfBaseException, ValueError, TypeError, OverflowError):
            problem = f"{source}: {key} is {_shown(value)}, but must be {_expected(hint)}"
            raise UserError(problem) from None
        config = cast("DictConfig", merged)
    return config


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _assignments(
    schema: type, layer: Mapping[str, Any], *, prefix: str, source: str
) -> Iterator[tuple[str, Any, Any]]:
    """Walk a layer along the schema; yield (dotted key, type, value) of every leaf."""
    hints = typing.get_type_hints(schema)
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise UserError(_unknown_key(key, schema, prefix=prefix, source=source))
        section = _section(hints[name])
        if section is None or value is None:
            yield key, hints[name], value
        elif isinstance(value, Mapping):
            yield key, hints[name], {}
            yield from _assignments(section, value, prefix=f"{key}.", source=source)
        else:
            raise UserError(f"{source}: {key} is {_shown(value)}, but must be a section of keys")


def _unknown_key(key: str, section: type, *, prefix: str, source: str) -> str:
    """Name an unknown key and the closest valid one, also when the section was left out."""
    valid = [f"{prefix}{field.name}" for field in dataclasses.fields(section)]
    inside = [leaf for leaf, _ in _leaves(section)]
    leaves = {leaf.rpartition(".")[2]: f"{prefix}{leaf}" for leaf in reversed(inside)}
    name = key.rpartition(".")[2]
    # the same name in another section is meant before one that looks alike here
    close = [leaves[name]] if name in leaves else difflib.get_close_matches(key, valid, n=1)
    close = close or [leaves[like] for like in difflib.get_close_matches(name, leaves, n=1)]
    hint = f", did you mean {close[0]}?" if close else f"; valid: {', '.join(valid)}"
    return f"{source}: unknown key {_shown(key)}{hint}"


def _leaves(schema: type) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, type) of every value of a schema, in the order of its fields."""
    hints = annotated_hints(schema)
    for field in dataclasses.fields(schema):
        section = _section(hints[field.name])
        if section is None:
            yield field.name, hints[field.name]
        else:
            yield from ((f"{field.name}.{key}", hint) for key, hint in _leaves(section))


def _hint_of(schema: type, key: str) -> Any:
    """Return the type at a dotted key, or None for an unknown one."""
    return dict(_leaves(schema)).get(key)


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself; annotations are left out."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _section(hint: Any) -> type | None:
    for option in _options(hint):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def _accepts_none(hint: Any) -> bool:
    return type(None) in _options(hint)


def _is_text(hint: Any) -> bool:
    return all(option in (str, Path, type(None)) for option in _options(hint))


def _is_collection(hint: Any) -> bool:
    origins = [typing.get_origin(option) or option for option in _options(hint)]
    return any(origin in (list, tuple, dict) for origin in origins) and str not in origins


def _check_meaning(value: Any, converted: Any) -> None:
    """Refuse what OmegaConf accepts and no key means: NaN, and a number such as 3 as a boolean."""
    if isinstance(converted, float) and math.isnan(converted):
        raise ValueError("NaN")
    if isinstance(converted, bool) and isinstance(value, (int, float)) and value not in (0, 1):
        raise ValueError("not a boolean")


def _adapted(hint: Any, value: Any) -> Any:
    """Escape `${` so that it stays text; make 3 a float where the union `float | ...` is asked."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    if isinstance(value, list):
        return [_adapted(Any, item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {key: _adapted(Any, item) for key, item in cast("dict[str, Any]", value).items()}
    if type(value) is int and float in _options(hint) and int not in _options(hint):
        return float(value)
    return value


def _expected(hint: Any) -> str:
    """Say in words what values a type allows: `int or null`, `one of full, causal`."""
    return " or ".join(_expected_option(option) for option in _options(hint))


def _expected_option(hint: Any) -> str:
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint) or hint
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in arguments)}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(member.name for member in hint)}"
    if origin is list or (origin is tuple and arguments[-1:] == (Ellipsis,)):
        return f"a list of {_expected(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_expected(item) for item in arguments)}]"
    if origin is dict:
        return f"a mapping to {_expected(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "a section of keys"
    names = {
        bool: "true or false",
        str: "text",
        Path: "a path",
        type(None): "null",
        Any: "anything",
    }
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= VALUE_CHARACTERS else f"{text[:VALUE_CHARACTERS]}..."


# Without OmegaConf --------------------------------------------------------------------------------


def _load_plain(schema: type[T], layers: Sequence[Path], *, overrides: Sequence[str]) -> T:
    """Read the settings with PyYAML alone: the same values, from files and texts in plain order.

    Values must have the type of their field as YAML reads them; whole numbers count as floats.

    Raises:
        UserError: as `load_config`.
    """
    made: dict[str, Any] = {}
    for source, layer in (
        *((str(path), read_layer(path)) for path in layers),
        *((COMMAND_LINE, _plain_override(text, schema)) for text in overrides),
    ):
        for key, hint, value in _assignments(schema, layer, prefix="", source=source):
            section = made
            *names, last = key.split(".")
            for name in names:
                section = section.setdefault(name, {})
            if _section(hint) is not None and value is not None:
                section.setdefault(last, {})
            elif isinstance(value, Mapping) and isinstance(section.get(last), Mapping):
                section[last] = section[last] | _typed(hint, value, key=key, source=source)
            else:
                section[last] = _typed(hint, value, key=key, source=source)
    return _instance(schema, made, prefix="")


def _plain_override(text: str, schema: type) -> dict[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{_shown(text)} is not an override: write key=value, as in seed=7")
    hint = _hint_of(schema, key)
    if _is_text(hint):
        return _nested(key, None if raw == "null" and _accepts_none(hint) else raw)
    try:
        return _nested(key, _yaml_value(raw))
    except yaml.YAMLError:
        raise UserError(f"{COMMAND_LINE}: {key}={_shown(raw)} is not valid YAML") from None


def _yaml_value(text: str) -> Any:
    class Loader(yaml.SafeLoader):
        """YAML 1.1 takes 1e-3 for text, where a number is meant, and the last of equal keys."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            for place, (key, _) in enumerate(node.value):
                if key.value in names[:place]:
                    problem = f"found duplicate key {key.value}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )
    return yaml.load(text, Loader)  # a SafeLoader


def _typed(hint: Any, value: Any, *, key: str, source: str) -> Any:
    """Return a value in the first of a field's types that it fits."""
    for option in _options(hint):
        with contextlib.suppress(TypeError, ValueError, KeyError):
            return _as_option(option, value)
    raise UserError(f"{source}: {key} is {_shown(value)}, but must be {_expected(hint)}")


def _as_option(hint: Any, value: Any) -> Any:
    arguments, origin = typing.get_args(hint), typing.get_origin(hint) or hint
    if origin is Literal and value in arguments:
        return value
    if origin in (list, tuple) and isinstance(value, list):
        items = cast("list[Any]", value)
        is_open = origin is list or arguments[-1:] == (Ellipsis,)
        hints = [arguments[0]] * len(items) if is_open else arguments
        parts = zip(hints, items, strict=True)
        return origin(_typed(each, item, key="", source="") for each, item in parts)
    if origin is dict and isinstance(value, Mapping):
        given = cast("Mapping[str, Any]", value)
        return {name: _typed(arguments[1], item, key="", source="") for name, item in given.items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint[value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        number = float(value)
        if math.isnan(number):
            raise ValueError("NaN")
        return number
    if hint is str and is_number:
        return str(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    raise TypeError(hint)


def _instance(schema: type[T], values: Mapping[str, Any], *, prefix: str) -> T:
    """Make a schema of its defaults and some values, checked once, at the end."""
    hints, given = typing.get_type_hints(schema), dict[str, Any]()
    for field in dataclasses.fields(cast(Any, schema)):
        name, section = field.name, _section(hints[field.name])
        has_default = not (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if section is not None and not (has_default and name not in values):
            given[name] = _instance(section, values.get(name, {}), prefix=f"{prefix}{name}.")
        elif name in values:
            given[name] = values[name]
        elif not has_default or field.default == "???":  # as OmegaConf marks it
            key = f"{prefix}{name}"
            raise UserError(f"{key} has no value: set it in a preset or as {key}=VALUE")
    return schema(**given)
