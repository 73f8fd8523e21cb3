"""Protocols: what they must hold, and the shipped ones."""

import importlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sampling_cases import (
    PROTOCOLS,
    SCRIPTS,
    SIZES,
    write_protocol,
)

from flowcache.runtime.model import Request, load_model
from flowcache.runtime.run import plan_by_sizes, read_settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec_quality": 7}, "codec_quality is 7, but this version writes videos with 8"),
        ({"prompts": []}, "prompts is empty"),
        ({"reference": "x"}, "reference is 'x', but must be one of vanilla, half"),
        ({"famly": "magi1"}, "unknown key 'famly', did you mean family"),
        ({"family": "wan"}, "family is 'wan', but must be one of skyreels_v2, magi1"),
        (
            {"methods": [{"name": "A", "folder": "a/b", "preset": "vanilla"}]},
            "needs name, preset, and a folder of letters",
        ),
        (
            {
                "methods": [
                    {"name": "A", "folder": "vanilla", "preset": "vanilla"},
                    {"name": "B", "folder": "vanilla", "preset": "stride"},
                ]
            },
            "two methods have the folder vanilla, but differ",
        ),
    ],
)
def test_a_protocol_out_of_order_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    read = importlib.import_module("flowcache.bench.protocol").read_protocol
    with pytest.raises(ValueError, match=re.escape(message)):
        read(write_protocol(tmp_path / "p.yaml", **changes))


@pytest.mark.slow
@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_every_method_of_a_shipped_protocol_can_be_planned(path: Path):
    protocol = importlib.import_module("flowcache.bench.protocol").read_protocol(path)
    model = load_model(protocol.family)
    assert path.stem.startswith(protocol.family)
    for task in {task.folder: task for task in protocol.tasks(None)}.values():
        settings = [*task.settings, f"prompt={task.prompt}"]
        request = Request(task.preset, SIZES[protocol.family], settings)
        assert "PFLOPs if every step is computed" in plan_by_sizes(model, request)
    parts = [method.part for method in protocol.methods]
    assert parts.count("paper") == 5
    assert parts.count("ingredient") >= 4


@pytest.mark.parametrize("family", SIZES)
def test_both_protocols_of_a_model_hold_the_same_rows(family: str):
    read = importlib.import_module("flowcache.bench.protocol").read_protocol
    demo, paper = (read(SCRIPTS / "protocols" / f"{family}_{k}.yaml") for k in ("demo", "paper"))
    rows = [[replace(row, pinned={}) for row in protocol.methods] for protocol in (demo, paper)]
    assert rows[0] == rows[1]
    published = {method.name: method.published for method in paper.methods}
    for method in ("TeaCache-slow", "TeaCache-fast", "FlowCache-slow", "FlowCache-fast"):
        figures = published[method]
        # a speed-up is published as the ratio of the latencies beside it
        ratio = published["Vanilla"].latency_seconds / figures.latency_seconds
        assert math.isclose(ratio, figures.speedup, rel_tol=0.02)


# what a protocol pins


NOT_PINNED = {
    *("prompt", "seed", "image", "video"),  # of each video, and its task says them
    *("device", "load", "t5_pretrained", "vae_pretrained", "special_tokens"),  # places
    *("model_config", "distributed_backend", "distributed_timeout_minutes", "pp_size", "cp_size"),
    *("cp_strategy", "ulysses_overlap_degree", "kv_offload", "enable_cuda_graph"),
}
"""Settings that a protocol leaves open; sizes of a model belong to its checkpoint."""


def leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if name in NOT_PINNED:
            continue
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def resolve(protocol: Any, method: Any) -> dict[str, Any]:
    """Return all settings of a row, without the files of a released model."""
    config = importlib.import_module("flowcache.runtime.config")
    settings = [*protocol.settings, *method.settings, "prompt=a cat"]
    request = Request(method.preset, protocol.model, settings)
    return config.to_dict(read_settings(load_model(protocol.family), request))


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_a_shipped_protocol_pins_every_setting_of_every_row(path: Path):
    protocols = importlib.import_module("flowcache.bench.protocol")
    protocol = protocols.read_protocol(path)
    for method in protocol.methods:
        config = resolve(protocol, method)
        pins = protocol.pins(method.folder)
        assert protocols.contradiction(pins, config) is None, method.name
        given = {text.partition("=")[0] for text in (*protocol.settings, *method.settings)}
        assert pins.keys() | given == dict(leaves(config)).keys(), method.name


def test_a_contradiction_names_the_setting_and_both_values():
    contradiction = importlib.import_module("flowcache.bench.protocol").contradiction
    config = {"guidance": 4.0, "reuse": {"threshold": 0.2, "steps": None}}
    assert contradiction({"guidance": 4, "reuse.steps": None}, config) is None
    assert contradiction({"reuse.threshold": 0.1}, config) == (
        "reuse.threshold is 0.2, but pinned to 0.1"
    )
    for key in ("reuse.treshold", "guidance.scale", "shift"):
        assert contradiction({key: 1}, config) == f"{key} is pinned to 1, but is no setting"


def test_a_row_that_no_longer_comes_to_what_is_pinned_is_refused_before_anything_is_made(
    tmp_path: Path, sample: ModuleType, capfd: pytest.CaptureFixture[str]
):
    preset = tmp_path / "own.yaml"
    preset.write_text("attention: causal\nreuse: {policy: flowcache, threshold: 0.25}\n")
    row = {"name": "own", "folder": "own", "preset": str(preset), "pinned": {"reuse.threshold": 1}}
    protocol = write_protocol(tmp_path / "p.yaml", methods=[row], reference="own", pinned={})
    arguments = ["--protocol", str(protocol), "--out", str(tmp_path / "out")]
    assert sample.main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "own.yaml with model demo: reuse.threshold is 0.25, but pinned to 1" in lines[0]
    assert "undo what changed it, or write a protocol of your own" in lines[0]
    assert list((tmp_path / "out").rglob("*.mp4")) == []


def test_what_a_row_sets_itself_is_not_pinned_against_it(tmp_path: Path):
    read = importlib.import_module("flowcache.bench.protocol").read_protocol
    row = {"name": "A", "folder": "a", "preset": "stride", "settings": ["guidance=1"]}
    changes: dict[str, Any] = {
        "methods": [row],
        "reference": "a",
        "pinned": {"guidance": 4, "fps": 24},
    }
    assert read(write_protocol(tmp_path / "p.yaml", **changes)).pins("a") == {"fps": 24}


@pytest.mark.parametrize("count", [0, 3])
def test_more_prompts_than_there_are_or_none_are_refused(tmp_path: Path, count: int):
    protocol = importlib.import_module("flowcache.bench.protocol").read_protocol(
        write_protocol(tmp_path / "p.yaml")
    )
    assert len(protocol.tasks(None, num_prompts=1)) * 2 == len(protocol.tasks(None))
    with pytest.raises(ValueError, match=rf"--num-prompts must be in 1\.\.2.*not {count}"):
        protocol.tasks(None, num_prompts=count)
