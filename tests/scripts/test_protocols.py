"""Protocols: what they must hold, and the shipped ones."""

import importlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
from sampling_cases import (
    PROTOCOLS,
    SCRIPTS,
    SIZES,
    write_protocol,
)


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
    read = importlib.import_module("sampling.protocol").read_protocol
    with pytest.raises(ValueError, match=re.escape(message)):
        read(write_protocol(tmp_path / "p.yaml", **changes))


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_every_method_of_a_shipped_protocol_can_be_planned(path: Path):
    protocol = importlib.import_module("sampling.protocol").read_protocol(path)
    run = importlib.import_module(f"{protocol.family}.run")
    assert path.stem.startswith(protocol.family)
    for task in {task.folder: task for task in protocol.tasks(None)}.values():
        settings = [*task.settings, f"prompt={task.prompt}"]
        request = run.Request(task.preset, SIZES[protocol.family], settings)
        assert "PFLOPs if every step is computed" in run.plan_released(request)
    parts = [method.part for method in protocol.methods]
    assert parts.count("paper") == 5
    assert parts.count("ingredient") >= 4


@pytest.mark.parametrize("family", SIZES)
def test_both_protocols_of_a_model_hold_the_same_rows(family: str):
    read = importlib.import_module("sampling.protocol").read_protocol
    demo, paper = (read(SCRIPTS / "protocols" / f"{family}_{k}.yaml") for k in ("demo", "paper"))
    assert demo.methods == paper.methods
    published = {method.name: method.published for method in paper.methods}
    for method in ("TeaCache-slow", "TeaCache-fast", "FlowCache-slow", "FlowCache-fast"):
        figures = published[method]
        # a speed-up is published as the ratio of the latencies beside it
        ratio = published["Vanilla"].latency_seconds / figures.latency_seconds
        assert math.isclose(ratio, figures.speedup, rel_tol=0.02)
