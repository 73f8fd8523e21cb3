"""Typed configuration: YAML layers and command-line overrides into one frozen dataclass.

A schema is a dataclass; nested dataclasses are sections. Its field types say what a value may be
(`int`, `float | None`, `Literal["full", "causal"]`, `Annotated[str, OneOf(...)]`, `list[int]`,
`dict[str, float]`, a list or mapping of dataclasses, ...) and its defaults are the lowest layer.
Every later layer changes only the keys it names:

    # base.yaml              # fast.yaml              command line
    reuse:                   reuse:                   reuse.threshold=0.2
      policy: vanilla          policy: flowcache
      threshold: 0.0           threshold: 0.1

    load_config(Run, [Path("base.yaml"), Path("fast.yaml")], overrides=["reuse.threshold=0.2"])
    -> Run(reuse=Reuse(policy="flowcache", threshold=0.2))

PyYAML reads the text. Nothing in it is a reference: a `${...}` is text.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import numbers
import operator
import re
import types
import typing
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast

import yaml

from flowcache.bounds import Bounds, annotated_hints, bounds_of, given_path, names_of
from flowcache.errors import UserError, one_line
from flowcache.runtime.files import read_json, read_regular

T = TypeVar("T")

COMMAND_LINE = "command line"
VALUE_CHARACTERS = 80  # of a wrong value shown in an error
MAX_KEYS_SHOWN = 15  # of a section; of a longer one the nearest
NUM_NEAREST = 5
KEY_CHARACTERS = 200  # no key is longer
MAX_YAML_CHARACTERS = 1_000_000
"""Of a file; the longest that is read here, a profile of many clips, has some ten thousand."""
MAX_YAML_DEPTH = 20
"""Nested lists and mappings; none that is read here has more than 5."""
MAX_BLOCKS = 1000
"""Of a transformer; released ones have 48 at most."""
MAX_STRIPS = 64
"""Of a picture; from about 16 on neighbours repeat more than they save."""
MISSING = "???"
"""A default that is none: a value must be given."""


def load_config(schema: type[T], layers: Sequence[Path], *, overrides: Sequence[str] = ()) -> T:
    """Merge YAML or JSON layers, then `a.b=value` overrides, into an instance of the schema.

    Args:
        layers: files, the later one wins; a list value replaces the earlier list.
    """
    values: dict[str, Any] = {}
    for path in layers:
        layer = read_json(path) if path.suffix == ".json" else read_yaml(path)
        if not isinstance(layer, dict):
            raise UserError(f"{path}: expected a JSON object, found a {type(layer).__name__}")
        _merge_(values, schema, cast("dict[str, Any]", layer), source=str(path))
    merge_overrides_(values, schema, overrides)
    missing: list[str] = []
    made = _made(schema, values, missing=missing)
    if missing:
        key = min(missing)
        raise UserError(f"{key} has no value: set it in a preset or as {key}=VALUE")
    return cast(T, made)


def merge_overrides_(values: dict[str, Any], schema: type, overrides: Sequence[str]) -> None:
    """Put `a.b=value` overrides, converted to the types of the schema, into nested `values`.

    A value is YAML, but for a text field it is taken as it is.
    """
    hints = dict(_leaves(schema)) if overrides else {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        key = flat_names(schema).get(key, key)
        if not equals or not all(key.split(".")) or len(key) > KEY_CHARACTERS:
            raise UserError(f"{_shown(text)} is not an override: write key=value, as in seed=7")
        hint, value = hints.get(key), cast(Any, raw)
        options = _options(hint)
        if set(options) - {str, type(None)} or names_of(hint):
            try:
                value = parse_yaml(raw)
            except YAML_ERRORS:
                raise UserError(f"{COMMAND_LINE}: {key}={_shown(raw)} is not valid YAML") from None
        elif raw == "null" and type(None) in options:
            value = None
        for name in reversed(key.split(".")):
            value = {name: value}
        _merge_(values, schema, cast("dict[str, Any]", value), source=COMMAND_LINE)


def check_left_out(settings: Sequence[str], own: Mapping[str, str]) -> None:
    """Refuse `key=value` settings of a command that sets them itself.

    Args:
        own: key -> why, and what to do, as "is set by the table: leave it out".
    """
    for setting in settings:
        key, _, _ = setting.partition("=")
        if key in own:
            raise UserError(f"{key} {own[key]}")


IN_PYTHON = {
    "scripts/tune.py --out": "flowcache.tune, saved as",
    "scripts/train_demo.py --model": "scripts/train_demo.py --model",
    "--overwrite": "overwrite=True",
    "--out": "path",
    **{f"--{name.replace('_', '-')}": name for name in ("model", "memory_limit")},
    **{
        flag: f"the command line's {flag}"
        for flag in ("--download", "--dry-run", "--list-settings", "--record")
    },
}
"""What messages of the command line and of Python call the same thing."""
_FLAG = re.compile(rf"(?<!command line's )(?:{'|'.join(map(re.escape, IN_PYTHON))})(?![\w-])")


@contextmanager
def from_python() -> Generator[None, None, None]:
    """Say what is wrong in the words of a caller from Python, who has no command line."""
    try:
        yield
    except UserError as error:
        text = str(error).removeprefix(f"{COMMAND_LINE}: ")
        error.args = (_FLAG.sub(lambda found: IN_PYTHON[found[0]], text),)
        raise


def overrides_of(
    settings: Mapping[str, Any],
    *,
    keys: Mapping[str, str] = types.MappingProxyType({}),
    prefix: str = "",
) -> Iterator[str]:
    """Yield Python values as `a.b=value` texts; a mapping is a section.

    Args:
        keys: names that a model's command line has -> its settings.
        prefix: of the keys.
    """
    for name, value in settings.items():
        key = f"{prefix}{name}"
        key = keys.get(key, key)
        if isinstance(value, Mapping):
            section = cast("Mapping[str, Any]", value)
            yield from overrides_of(section, keys=keys, prefix=f"{key}.")
        else:
            yield f"{key}={value if isinstance(value, (str, Path)) else _as_yaml(key, value)}"


def _as_yaml(key: str, value: Any) -> str:
    def number(value: object) -> int | float:
        if isinstance(value, numbers.Integral):  # of NumPy, for example
            return int(value)
        if isinstance(value, numbers.Real):
            return float(value)
        raise UserError(f"{key} must be a text, a number, a list or a mapping, not {_shown(value)}")

    if isinstance(value, numbers.Real) and not math.isfinite(value):
        return f".{str(float(value)).replace('-', '')}"  # which JSON lacks
    return json.dumps(value, default=number)


# Reading ------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty mapping."""
    try:
        content = parse_yaml(read_regular(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({one_line(error)})") from None
    except YAML_ERRORS as error:
        line, reason = "", one_line(error)
        if isinstance(error, yaml.MarkedYAMLError):
            line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            reason = str(error.problem)
        raise UserError(f"{path}: {line}not valid YAML ({reason})") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        found = "a list" if isinstance(content, list) else f"{content!r:.80}"
        raise UserError(f"{path}: expected 'key: value' lines, found {found}")
    return cast("dict[str, Any]", content)


YAML_ERRORS = (yaml.YAMLError, ValueError, OverflowError, TypeError)
"""What reading YAML raises: also the errors of numbers too long, of dates, of unhashable keys."""


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C: where libyaml is there


class _Loader(_SafeLoader):
    """Reads numbers as YAML 1.2 does, dates as text, and no key twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        start: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:timestamp"]
        for start, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"found duplicate key {key.value}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for text, where a number is meant
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$|[-+]?\.[0-9_]+[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    YAML that would exhaust the stack or the memory of what reads it is refused before anything is
    built, and so is odd YAML: settings need no anchors, aliases or tags, and little depth.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise yaml.YAMLError(f"it has over {MAX_YAML_CHARACTERS} characters")
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        problem = None
        if depth > MAX_YAML_DEPTH:
            problem = f"more than {MAX_YAML_DEPTH} nested lists and mappings"
        elif isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            problem = "anchors and aliases, & and *, are not taken"
        elif getattr(event, "tag", None) is not None:
            problem = "tags, !, are not taken"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
    return yaml.load(text, _Loader)  # a SafeLoader


def preset_names(folder: Path) -> list[str]:
    """Return the names of the presets in a folder, in order."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_preset(folder: Path, name: str) -> Path:
    """Return the YAML file of a preset: a name in the folder, or a path to a file."""
    available = {preset: folder / f"{preset}.yaml" for preset in preset_names(folder)}
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


def flat_names(schema: type) -> Mapping[str, str]:
    """Return the names that a setting of a section has everywhere, as `num_frames`.

    Both models take them; where a release has a name of its own, as
    `runtime_config.video_size_h`, that is taken, too.
    """
    return vars(schema).get("FLAT_NAMES", {})


# Merging ------------------------------------------------------------------------------------------


def _merge_(
    values: dict[str, Any], schema: type, layer: Mapping[str, Any], *, source: str, prefix: str = ""
) -> None:
    """Put a layer's values, converted to the types of the schema, into nested `values`."""
    hints, flat = annotated_hints(schema), flat_names(schema)
    for name, value in layer.items():
        if name in flat and name not in hints:
            section, _, inner = flat[name].rpartition(".")
            _merge_(values, schema, {section: {inner: value}}, source=source)
            continue
        key = f"{prefix}{name}"
        if name not in hints:
            raise UserError(_unknown_key(key, schema, prefix=prefix, source=source))
        section = _section(hints[name])
        if section is not None and value is not None:
            if not isinstance(value, Mapping):
                raise UserError(
                    f"{source}: {key} is {_shown(value)}, but must be a section of keys"
                )
            inside, given = values.setdefault(name, {}), cast("Mapping[str, Any]", value)
            _merge_(inside, section, given, source=source, prefix=f"{key}.")
            continue
        try:
            made = _converted(hints[name], value)
        except _UNFIT:
            problem = f"{source}: {key} is {_shown(value)}, but must be {_rule(hints[name])}"
            raise UserError(problem) from None
        if isinstance(made, dict) and isinstance(values.get(name), dict):
            values[name].update(made)
        else:
            values[name] = made


def _unknown_key(key: str, section: type, *, prefix: str, source: str) -> str:
    """Name an unknown key and the closest valid one, also when the section was left out.

    `ABSENT` of a schema says why it lacks some settings of other models, and what to do instead.
    """
    reason = vars(section).get("ABSENT", {}).get(key)
    if reason is not None:
        return f"{source}: {key} is no setting of this model, {reason}"
    valid = [f"{prefix}{field.name}" for field in dataclasses.fields(section)]
    inside = [leaf for leaf, _ in _leaves(section)]
    leaves = {leaf.rpartition(".")[2]: f"{prefix}{leaf}" for leaf in reversed(inside)}
    name = key.rpartition(".")[2]
    # the same name in another section is meant before one that looks alike here
    close = [leaves[name]] if name in leaves else difflib.get_close_matches(key, valid, n=1)
    close = close or [leaves[like] for like in difflib.get_close_matches(name, leaves, n=1)]
    if close:
        hint = f", did you mean {close[0]}?"
    elif len(valid) <= MAX_KEYS_SHOWN:
        hint = f"; valid: {', '.join(valid)}"
    else:
        near = difflib.get_close_matches(key, valid, n=NUM_NEAREST, cutoff=0)
        hint = f"; the nearest are {', '.join(near)}; --list-settings shows all"
    return f"{source}: unknown key {_shown(key)}{hint}"


def _made(
    schema: type,
    values: Mapping[str, Any],
    *,
    missing: list[str],
    prefix: str = "",
    default: Any = None,
) -> Any:
    """Return an instance with the given values, sections made of theirs and their defaults.

    Args:
        missing: is given the keys, or sections, that have neither value nor default; where there
            are some, nothing is made.
        default: the instance whose values stay where none is given; None: that of the schema.
    """
    hints, given = annotated_hints(schema), dict(values)
    for field in dataclasses.fields(schema):
        key, section, own = f"{prefix}{field.name}", _section(hints[field.name]), _default(field)
        if field.name not in given:
            missing += [key] if own in (dataclasses.MISSING, MISSING) else []
        elif section is not None and given[field.name] is not None:
            own = None if own is dataclasses.MISSING else own
            options: dict[str, Any] = {"missing": missing, "prefix": f"{key}.", "default": own}
            given[field.name] = _made(section, given[field.name], **options)
    if missing:
        return None
    return schema(**given) if default is None else dataclasses.replace(default, **given)


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; `dataclasses.MISSING` if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


# Types of values ----------------------------------------------------------------------------------

_UNFIT = (TypeError, ValueError, KeyError, OverflowError, yaml.YAMLError)
"""What a conversion raises."""


def _converted(hint: Any, value: Any) -> Any:
    """Return a value in the first of a field's types that it fits; raises one of `_UNFIT`."""
    names = names_of(hint)
    if names is not None and value is not None and value not in names:
        raise ValueError("none of the names")
    for option in _options(hint):
        try:
            return _as_option(option, value)
        except _UNFIT:
            continue
    raise TypeError("none of the types")


def _as_option(hint: Any, value: Any) -> Any:
    arguments, origin = typing.get_args(hint), typing.get_origin(hint) or hint
    if origin is Literal and value in arguments:
        return value
    if origin in (list, tuple) and isinstance(value, list):
        items = cast("list[Any]", value)
        is_open = origin is list or arguments[-1:] == (Ellipsis,)
        hints = [arguments[0]] * len(items) if is_open else arguments
        return origin(_converted(each, item) for each, item in zip(hints, items, strict=True))
    if origin is dict and isinstance(value, dict):
        given = cast("dict[str, Any]", value)
        return {name: _converted(arguments[1], item) for name, item in given.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        values: dict[str, Any] = {}
        missing: list[str] = []
        schema, given = cast(type, hint), cast("dict[str, Any]", value)
        _merge_(values, schema, given, source="item")
        made = _made(schema, values, missing=missing)
        if missing:
            raise TypeError("a value is missing")
        return made
    if hint in (bool, int, float) and isinstance(value, str):
        value = parse_yaml(value)  # a quoted number
    is_boolean, is_number = isinstance(value, bool), isinstance(value, (int, float))
    if hint is bool and is_number and value in (0, 1):
        return bool(value)
    if hint is float and is_number and not is_boolean and not math.isnan(value):
        return float(value)
    if hint is str and is_number:
        return str(value)
    if hint is Any or (isinstance(hint, type) and type(value) is hint and hint is not float):
        return value
    raise TypeError(hint)


def _leaves(schema: type) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, type) of every value of a schema, in the order of its fields."""
    hints = annotated_hints(schema)
    for field in dataclasses.fields(schema):
        section = _section(hints[field.name])
        if section is None:
            yield field.name, hints[field.name]
        else:
            yield from ((f"{field.name}.{key}", hint) for key, hint in _leaves(section))


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself; annotations are left out."""
    if typing.get_origin(hint) is Annotated:
        return _options(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(option for each in typing.get_args(hint) for option in _options(each))
    return (hint,)


def _section(hint: Any) -> type | None:
    """Return the dataclass that a type is, `None` or not."""
    is_section = dataclasses.is_dataclass
    return next(
        (each for each in _options(hint) if isinstance(each, type) and is_section(each)), None
    )


def _rule(hint: Any) -> str:
    """Return in a sentence's words what values a type allows."""
    words, bounds = {"int": "a whole number", "float": "a number"}, bounds_of(hint)
    text = " or ".join(words.get(each, each) for each in _expected(hint).split(" or "))
    return text if bounds is None else f"{text}, {bounds.rule()}"


def _expected(hint: Any) -> str:
    """Return in words what values a type allows: `int or null`, `one of full, causal`."""
    names, options = names_of(hint), _options(hint)
    option, *others = options
    if others:
        text = f"one of {', '.join(names)}" if names else "text"
        return " or ".join(text if each is str else _expected(each) for each in options)
    arguments, origin = typing.get_args(option), typing.get_origin(option) or option
    if names or origin is Literal:
        return f"one of {', '.join(str(choice) for choice in names or arguments)}"
    if origin is list or (origin is tuple and arguments[-1:] == (Ellipsis,)):
        return f"a list of {_expected(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_expected(item) for item in arguments)}]"
    if origin is dict:
        return f"a mapping to {_expected(arguments[1])}"
    if dataclasses.is_dataclass(option):
        return "a section of keys"
    words = {bool: "true or false", str: "text", type(None): "null", Any: "anything"}
    return words.get(option, getattr(option, "__name__", str(option)))


# Writing ------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain values for JSON: a tuple as a list."""
    return cast("dict[str, Any]", _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= VALUE_CHARACTERS else f"{text[:VALUE_CHARACTERS]}..."


def describe(config: Any, *, commented: Sequence[Path]) -> list[str]:
    """Return one line per key: `key: type = value`, and the comment behind it in a YAML file.

    Args:
        commented: YAML files whose trailing `# comments` explain the keys.
    """
    comments = {key: text for path in commented for key, text in yaml_comments(path).items()}
    lines: list[str] = []
    for key, hint in _leaves(type(config)):
        bounds, value = bounds_of(hint), operator.attrgetter(key)(config)
        rule = "" if bounds is None else f" {bounds.rule()}"
        # as it is written on the command line
        shown = value if isinstance(value, str) else json.dumps(_plain(value))
        comment = f"  # {comments[key]}" if key in comments else ""
        lines.append(f"{key}: {_expected(hint)}{rule} = {shown}{comment}")
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


# Settings that every model has, besides those of the method --------------------------------------

MAX_PROCESSES = 4096
MAX_CHUNK_STEPS = 1_000_000
"""Steps of all chunks, which are planned one by one: four hours of video in MAGI-1's 64 steps."""
MAX_PASS_TOKENS = 2**20
"""Tokens that attend to each other in one pass; 97 frames of 4K are 810,000 in SkyReels-V2."""

KernelName: TypeAlias = Literal[
    "auto", "flash_attn_3", "flash_attn_2", "cudnn", "flash", "efficient", "math", "torch", "sage"
]
"""What `attention_kernel` may be: auto probes; torch leaves the choice to PyTorch."""
QuantizeName: TypeAlias = Literal["int8_weight", "int8_dynamic", "fp8_weight", "fp8_dynamic"]
"""weight: 8-bit weights, widened for each product; dynamic: 8-bit activations and products, too."""
TextQuantizeName: TypeAlias = Literal["int8_weight", "fp8_weight"]
"""The same of a text encoder, which may run on the host and encodes once: products stay wide."""

NumBlocks: TypeAlias = Annotated[int | None, Bounds(0, MAX_BLOCKS)]
"""Of a transformer."""
NumStrips: TypeAlias = Annotated[int | None, Bounds(1, MAX_STRIPS)]
"""Of a picture."""

MEMORY_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
_LIMIT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.IGNORECASE)


@dataclass(frozen=True)
class ParallelRule:
    """How several processes divide a run."""

    branch: Annotated[int | None, Bounds(1, MAX_PROCESSES)] = None
    sequence: Annotated[int | None, Bounds(1, MAX_PROCESSES)] = None


def check_prompt(name: str, prompt: str) -> None:
    """Check that a prompt says something."""
    if not prompt.strip():
        raise UserError(f"{name} is empty: say what the video shows")


def check_work(*, num_chunks: int, num_steps: int) -> None:
    """Refuse a video so long that planning it, step by step, would fill time and memory.

    Args:
        num_chunks: of all windows, given ones included.
        num_steps: a chunk's own steps, or the ticks that it adds at most: the larger number.
    """
    if num_chunks * num_steps > MAX_CHUNK_STEPS:
        raise UserError(
            f"{num_chunks} chunks of {num_steps} steps are {num_chunks * num_steps} steps, at "
            f"most {MAX_CHUNK_STEPS} are planned: make a shorter video (num_frames), or use larger "
            "chunks or fewer steps"
        )


def check_pass(num_tokens: int, *, sizes: str) -> None:
    """Refuse a pass over more tokens than any model and device can do; `sizes` lower it."""
    if num_tokens > MAX_PASS_TOKENS:
        raise UserError(
            f"one pass would have {num_tokens} tokens, at most {MAX_PASS_TOKENS} are possible: "
            f"lower {sizes}"
        )


def parse_limit(text: str) -> int | None:
    """Return the bytes that a `memory_limit` names, None for `auto` and `none`.

    Example: `24GB` is 24,000,000,000 and `24GiB` is 25,769,803,776.
    """
    if text.lower() in ("auto", "none"):
        return None
    found = _LIMIT.fullmatch(text.strip())
    factor = None if found is None else MEMORY_UNITS.get(found[2].upper())
    if found is None or factor is None or not float(found[1]):
        raise UserError(
            f"memory_limit must be auto, none or an amount such as 24GB or 24GiB, not {text}"
        )
    return int(float(found[1]) * factor)
