"""Compiled blocks in whole runs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flowcache.runtime.run import encode_inputs, load_networks, prepare, render
from flowcache.runtime.stats import RunStats

# of half a frame that is a single token, the length is compiled apart: hence the height
RUNS = [
    ("skyreels_v2", "flowcache_fast", ("num_steps=4", "height=32", "batch_branches=true")),
    ("skyreels_v2", "flowcache_fast", ("num_steps=4", "height=32", "batch_branches=false")),
    ("magi1", "vanilla", ("reuse.policy=stride", "reuse.warmup_steps=1")),
]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(("tiny", "preset", "settings"), RUNS, indirect=["tiny"])
def test_what_a_run_needs_is_compiled_while_its_models_are_loaded(
    tiny: Any, preset: str, settings: tuple[str, ...], tmp_path: Path
):
    request = tiny.request("compile=true", *settings, preset=preset, out=str(tmp_path))
    job = prepare(tiny.model, request)
    stats = RunStats(job.device)
    torch.compiler.reset()
    models, inputs = load_networks(job, stats=stats), encode_inputs(job, stats=stats)
    with torch.compiler.set_stance("fail_on_recompile"):
        report = render(job, models, inputs, stats=stats)
    assert report["num_frames"] == tiny.short.num_frames
