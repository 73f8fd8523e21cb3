import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from flowcache.errors import UserError
from flowcache.runtime.config import (
    MISSING,
    describe,
    find_preset,
    from_python,
    load_config,
    read_yaml,
    to_dict,
    yaml_comments,
)

WriteLayer = Callable[[str], Path]


@dataclass(frozen=True)
class Part:
    name: str


@dataclass(frozen=True)
class Reuse:
    policy: Literal["vanilla", "flowcache"] = "vanilla"
    threshold: float = 0.0
    steps: tuple[int, ...] = ()
    rescale: tuple[float, float] = (1.0, 0.0)


@dataclass(frozen=True)
class Run:
    reuse: Reuse = field(default_factory=Reuse)
    prompt: str = "a cat"
    negative: str | None = None
    seed: int = 0
    offload: bool = False
    colour: Literal["red", "blue"] = "red"
    budget: float | Literal["all"] = "all"
    weights: dict[str, float] = field(default_factory=dict)
    images: list[str] | None = None
    parts: list[Part] | None = None


@pytest.fixture
def layer(tmp_path: Path) -> WriteLayer:
    def write(text: str) -> Path:
        path = tmp_path / f"layer{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def error_of(layers: list[Path], *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(Run, layers, overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_layers_the_defaults_come_back():
    assert load_config(Run, []) == Run()


def test_a_later_layer_changes_only_the_keys_it_names(layer: WriteLayer):
    base = layer("reuse: {policy: flowcache, threshold: 0.1}\nseed: 3\n")
    fast = layer("reuse: {threshold: 1e-3}\n")
    config = load_config(Run, [base, fast], overrides=["seed=7"])
    assert config == Run(reuse=Reuse(policy="flowcache", threshold=0.001), seed=7)
    assert isinstance(config.reuse, Reuse)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=12", "seed", 12),
        ("prompt=a dog: it runs, [fast]", "prompt", "a dog: it runs, [fast]"),
        ("prompt=${seed} costs \\${x} and ${", "prompt", "${seed} costs \\${x} and ${"),
        ("prompt=", "prompt", ""),
        ("prompt=3", "prompt", "3"),
        ("prompt=null", "prompt", "null"),
        ("prompt=???", "prompt", "???"),
        ("prompt=2001-02-03", "prompt", "2001-02-03"),
        ("weights={a: 1e3, b: '2'}", "weights", {"a": 1000.0, "b": 2.0}),
        ("prompt=猫が走る = 速い", "prompt", "猫が走る = 速い"),
        ("negative=null", "negative", None),
        ("offload=true", "offload", True),
        ("colour=blue", "colour", "blue"),
        ("budget=3", "budget", 3.0),
        ("budget=all", "budget", "all"),
        ("weights.clip=2", "weights", {"clip": 2.0}),
        ("images=[a, b]", "images", ["a", "b"]),
        ("parts=[{name: a}, {name: b}]", "parts", [Part("a"), Part("b")]),
    ],
)
def test_an_override_becomes_a_value_of_the_field_type(override: str, key: str, value: Any):
    found = getattr(load_config(Run, [], overrides=[override]), key)
    assert found == value
    assert type(found) is type(value)


def test_lists_become_tuples_and_replace_the_earlier_list(layer: WriteLayer):
    first, second = layer("reuse: {steps: [1, 2, 3]}"), layer("reuse: {steps: [5]}")
    assert load_config(Run, [first, second]).reuse.steps == (5,)


def test_a_quoted_number_or_boolean_is_one_and_a_date_is_text(layer: WriteLayer):
    path = layer("seed: '3'\nreuse: {threshold: '0.2'}\noffload: 'on'\nprompt: 2001-02-03\n")
    want = Run(Reuse(threshold=0.2), "2001-02-03", seed=3, offload=True)
    assert load_config(Run, [path]) == want


def test_a_section_keeps_what_its_default_has_of_its_own(layer: WriteLayer):
    @dataclass(frozen=True)
    class Quick:
        reuse: Reuse = field(default_factory=lambda: Reuse("flowcache", 0.3))

    found = load_config(Quick, [layer("reuse: {steps: [2]}")]).reuse
    assert found == Reuse("flowcache", 0.3, (2,))


def test_mappings_are_merged(layer: WriteLayer):
    first, second = layer("weights: {a: 1, b: 2}"), layer("weights: {b: 3}")
    assert load_config(Run, [first, second]).weights == {"a": 1.0, "b": 3.0}


def test_text_in_a_file_is_never_a_reference(layer: WriteLayer):
    assert load_config(Run, [layer("prompt: 'costs ${seed}'")]).prompt == "costs ${seed}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeed: 1", "unknown key 'seeed', did you mean seed?"),
        ("reuse: {treshold: 1}", "unknown key 'reuse.treshold', did you mean reuse.threshold?"),
        ("threshold: 1", "unknown key 'threshold', did you mean reuse.threshold?"),
        ("zzz: 1", "unknown key 'zzz'; valid: reuse, prompt,"),
        ("seed: abc", "seed is 'abc', but must be a whole number"),
        ("seed: 2.5", "seed is 2.5, but must be a whole number"),
        ("seed: true", "seed is True, but must be a whole number"),
        ("seed: null", "seed is None, but must be a whole number"),
        ("offload: 3", "offload is 3, but must be true or false"),
        ("reuse: 3", "reuse is 3, but must be a section of keys"),
        ("reuse: null", "reuse is None, but must be a section of keys"),
        ("reuse: {policy: fast}", "reuse.policy is 'fast', but must be one of vanilla, flowcache"),
        ("reuse: {steps: [1, x]}", "reuse.steps is [1, 'x'], but must be a list of int"),
        ("reuse: {rescale: '${a}'}", "reuse.rescale is '${a}', but must be [float, float]"),
        ("reuse: {steps: [1, [2]]}", "reuse.steps is [1, [2]], but must be a list of int"),
        ("reuse: {rescale: [1]}", "reuse.rescale is [1], but must be [float, float]"),
        ("reuse: {threshold: .nan}", "reuse.threshold is nan, but must be a number"),
        ("reuse: {threshold: '${seed}'}", "reuse.threshold is '${seed}', but must be a number"),
        ("colour: green", "colour is 'green', but must be one of red, blue"),
        ("budget: some", "budget is 'some', but must be a number or one of all"),
        ("prompt: [a]", "prompt is ['a'], but must be text"),
        ("parts: [{}]", "parts is [{}], but must be a list of a section of keys or null"),
        ("parts: [{nam: a}]", "parts is [{'nam': 'a'}], but must be a list of a section of"),
        ("seed: 1\n\tprompt: a", "line 2: not valid YAML"),
        ("seed: 1\nseed: 2", "line 2: not valid YAML (found duplicate key seed)"),
        ("- 1\n- 2", "expected 'key: value' lines, found a list"),
    ],
)
def test_a_wrong_file_names_itself_the_key_and_the_rule(layer: WriteLayer, text: str, said: str):
    path = layer(text)
    message = error_of([path])
    assert message.startswith(f"{path}: ")
    assert said in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sed=1", "command line: unknown key 'sed', did you mean seed?"),
        ("seed=${offload}", "command line: seed is '${offload}', but must be a whole number"),
        ("seed=???", "command line: seed is '???', but must be a whole number"),
        ("seed=1.5", "command line: seed is 1.5, but must be a whole number"),
        ("seed=", "command line: seed is None, but must be a whole number"),
        ("seed.x=1", "command line: seed is {'x': 1}, but must be a whole number"),
        ("seed=[", "command line: seed='[' is not valid YAML"),
        ("seed", "'seed' is not an override: write key=value"),
        ("=1", "'=1' is not an override"),
        ("reuse..policy=1", "is not an override"),
    ],
)
def test_a_wrong_override_names_the_key_and_the_rule(override: str, said: str):
    assert said in error_of([], override)


def test_a_very_long_wrong_value_is_cut_in_the_message():
    assert len(error_of([], f"seed={'x' * 100_000}")) < 200


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for name, said in [("none.yaml", "no such file"), ("binary.yaml", "cannot be read as text")]:
        assert error_of([tmp_path / name]).startswith(f"{tmp_path / name}: {said}")
    assert "cannot be read" in error_of([tmp_path])


def test_an_empty_file_changes_nothing(layer: WriteLayer):
    assert read_yaml(layer("# only a comment\n")) == {}
    assert load_config(Run, [layer("")]) == Run()


def test_a_key_without_default_must_be_given():
    @dataclass(frozen=True)
    class Model:
        folder: str = MISSING

    with pytest.raises(UserError, match=r"folder has no value: set it .* as folder=VALUE"):
        load_config(Model, [])
    assert load_config(Model, [], overrides=["folder=x"]) == Model("x")


def test_a_rule_checked_by_the_dataclass_reaches_the_user():
    @dataclass(frozen=True)
    class Sampling:
        num_steps: int = 1

        def __post_init__(self) -> None:
            if self.num_steps < 1:
                raise UserError(f"num_steps must be at least 1, got {self.num_steps}")

    with pytest.raises(UserError, match=r"^num_steps must be at least 1, got -4$"):
        load_config(Sampling, [], overrides=["num_steps=-4"])


def test_presets_are_found_by_name_and_by_path(tmp_path: Path):
    fast = tmp_path / "flowcache_fast.yaml"
    fast.write_text("seed: 1")
    (tmp_path / "vanilla.yaml").write_text("")
    assert find_preset(tmp_path, "flowcache_fast") == fast
    assert find_preset(tmp_path / "elsewhere", str(fast)) == fast
    with pytest.raises(UserError, match=r"did you mean flowcache_fast.*flowcache_fast, vanilla"):
        find_preset(tmp_path, "flowcache_fats")
    with pytest.raises(UserError, match="no such file; presets: flowcache_fast, vanilla"):
        find_preset(tmp_path, "other.yaml")


def test_a_config_becomes_json_and_comes_back(layer: WriteLayer):
    config = Run(reuse=Reuse(steps=(1, 2)), colour="blue", parts=[Part("a")], prompt="${x}")
    plain = to_dict(config)
    assert plain["colour"] == "blue"
    assert plain["reuse"]["steps"] == [1, 2]
    assert load_config(Run, [layer(json.dumps(plain))]) == config


@dataclass(frozen=True)
class Whole:
    size: int
    part: Part


def test_describe_shows_type_value_and_comment_of_every_key(layer: WriteLayer):
    path = layer(
        "reuse:  # the cache\n"
        "  threshold: 0.1  # change that is allowed (dimensionless)\n"
        "  steps: [1, 2]  # own steps\n"
        "seed: 0\n"
        "prompt: 'a # b'  # what to show\n"
    )
    assert yaml_comments(path) == {
        "reuse": "the cache",
        "reuse.threshold": "change that is allowed (dimensionless)",
        "reuse.steps": "own steps",
        "prompt": "what to show",
    }
    config = Run(reuse=Reuse(threshold=0.2, steps=(1, 3)), offload=True)
    lines = describe(config, commented=[path])
    assert lines[0] == "reuse.policy: one of vanilla, flowcache = vanilla"
    assert lines[1] == ("reuse.threshold: float = 0.2  # change that is allowed (dimensionless)")
    assert lines[2] == "reuse.steps: a list of int = [1, 3]  # own steps"
    assert "offload: true or false = true" in lines
    assert "negative: text or null = null" in lines
    assert len(lines) == 13


def test_python_is_told_flags_of_a_script_as_they_are_and_arguments_by_name():
    said = "make it with scripts/train_demo.py --model self_forcing, or give --model"
    with pytest.raises(UserError) as caught, from_python():
        raise UserError(said)
    assert str(caught.value) == said.replace("give --model", "give model")
