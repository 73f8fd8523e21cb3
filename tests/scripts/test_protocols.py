"""Protocols: what they must hold, and the shipped ones."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sample
from sampling_cases import SCRIPTS, write_protocol

from flowcache.bench.protocol import Method, Protocol, contradiction, read_protocol
from flowcache.runtime.config import to_dict
from flowcache.runtime.model import Request, load_model
from flowcache.runtime.run import plan_by_sizes, read_settings

PROTOCOLS = sorted((SCRIPTS / "protocols").glob("*.yaml"))
SIZES = {"skyreels_v2": "df-1.3b-540p", "magi1": "4.5B_distill"}
"""Model -> a released one whose sizes are known without its files."""
NOT_PINNED = {
    *("prompt", "seed", "image", "video"),  # of each video, and its task says them
    *("device", "load", "t5_pretrained", "vae_pretrained", "special_tokens"),  # places
    *("model_config", "distributed_backend", "distributed_timeout_minutes", "pp_size", "cp_size"),
    *("cp_strategy", "ulysses_overlap_degree", "kv_offload", "enable_cuda_graph"),
}
"""Settings that a protocol leaves open; sizes of a model belong to its checkpoint."""


def row(folder: str, preset: str = "vanilla", **more: Any) -> dict[str, Any]:
    return {"name": folder, "folder": folder, "preset": preset, **more}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec_quality": 7}, "codec_quality is 7, but this version writes videos with 8"),
        ({"prompts": []}, "prompts is empty"),
        ({"reference": "x"}, "reference is 'x', but must be one of vanilla, half"),
        ({"famly": "magi1"}, "unknown key 'famly', did you mean family"),
        ({"family": "wan"}, "family is 'wan', but must be one of skyreels_v2, magi1"),
        ({"methods": [row("a/b")]}, "needs name, preset, and a folder of letters"),
        (
            {"methods": [row("a"), row("a", "stride")]},
            "two methods have the folder a, but differ",
        ),
    ],
)
def test_a_protocol_out_of_order_is_refused(tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_protocol(write_protocol(tmp_path / "p.yaml", **changes))


@pytest.mark.parametrize("count", [0, 3])
def test_more_prompts_than_there_are_or_none_are_refused(tmp_path: Path, count: int):
    protocol = read_protocol(write_protocol(tmp_path / "p.yaml"))
    assert len(protocol.tasks(None, num_prompts=1)) * 2 == len(protocol.tasks(None))
    with pytest.raises(ValueError, match=rf"--num-prompts must be in 1\.\.2.*not {count}"):
        protocol.tasks(None, num_prompts=count)


def test_what_a_row_sets_itself_is_not_pinned_against_it(tmp_path: Path):
    changes = {"methods": [row("a", settings=["guidance=1"])], "reference": "a"}
    path = write_protocol(tmp_path / "p.yaml", **changes, pinned={"guidance": 4, "fps": 24})
    assert read_protocol(path).pins("a") == {"fps": 24}


def test_a_contradiction_names_the_setting_and_both_values():
    config = {"guidance": 4.0, "reuse": {"threshold": 0.2, "steps": None}}
    assert contradiction({"guidance": 4, "reuse.steps": None}, config) is None
    said = "reuse.threshold is 0.2, but pinned to 0.1"
    assert contradiction({"reuse.threshold": 0.1}, config) == said
    for key in ("reuse.treshold", "guidance.scale", "shift"):
        assert contradiction({key: 1}, config) == f"{key} is pinned to 1, but is no setting"


def test_a_row_that_no_longer_comes_to_what_is_pinned_is_refused_before_anything_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    preset = tmp_path / "own.yaml"
    preset.write_text("attention: causal\nreuse: {policy: flowcache, threshold: 0.25}\n")
    method = row("own", str(preset), pinned={"reuse.threshold": 1})
    protocol = write_protocol(tmp_path / "p.yaml", methods=[method], reference="own", pinned={})
    assert sample.main(["--protocol", str(protocol), "--out", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "own.yaml with model demo: reuse.threshold is 0.25, but pinned to 1" in line
    assert "undo what changed it, or write a protocol of your own" in line
    assert list((tmp_path / "out").rglob("*.mp4")) == []


# The shipped protocols


@pytest.mark.slow
@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_every_method_of_a_shipped_protocol_can_be_planned(path: Path):
    protocol = read_protocol(path)
    assert path.stem.startswith(protocol.family)
    for task in {task.folder: task for task in protocol.tasks(None)}.values():
        settings = [*task.settings, f"prompt={task.prompt}"]
        request = Request(task.preset, SIZES[protocol.family], settings)
        plan = plan_by_sizes(load_model(protocol.family), request)
        assert "FLOP if every step is computed" in plan
    parts = [method.part for method in protocol.methods]
    assert parts.count("paper") == 5
    assert parts.count("ingredient") >= 4


@pytest.mark.parametrize("family", SIZES)
def test_both_protocols_of_a_model_hold_the_same_rows(family: str):
    demo, paper = (
        read_protocol(SCRIPTS / "protocols" / f"{family}_{kind}.yaml") for kind in ("demo", "paper")
    )
    rows = [[replace(row, pinned={}) for row in protocol.methods] for protocol in (demo, paper)]
    assert rows[0] == rows[1]
    published = {method.name: method.published for method in paper.methods}
    for name in ("TeaCache-slow", "TeaCache-fast", "FlowCache-slow", "FlowCache-fast"):
        # a speed-up is published as the ratio of the published latencies
        ratio = published["Vanilla"].latency_seconds / published[name].latency_seconds
        assert math.isclose(ratio, published[name].speedup, rel_tol=0.02)


def leaves(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        if name not in NOT_PINNED:
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"


def resolve(protocol: Protocol, method: Method) -> dict[str, Any]:
    """Return all settings of a row, without the files of a released model."""
    settings = [*protocol.settings, *method.settings, "prompt=a cat"]
    request = Request(method.preset, protocol.model, settings)
    return to_dict(read_settings(load_model(protocol.family), request))


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_a_shipped_protocol_pins_every_setting_of_every_row(path: Path):
    protocol = read_protocol(path)
    for method in protocol.methods:
        config, pins = resolve(protocol, method), protocol.pins(method.folder)
        assert contradiction(pins, config) is None, method.name
        given = {text.partition("=")[0] for text in (*protocol.settings, *method.settings)}
        assert pins.keys() | given == set(leaves(config)), method.name
