"""Compiled blocks: equal to plain ones, compiled once for all layers, chunks, cache lengths."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close

from flowcache.runtime.model import Request
from flowcache.runtime.run import encode_inputs, load_networks, prepare, render
from flowcache.runtime.stats import RunStats
from flowcache.wan.dit import BlockParts, DiT, compiled_parts
from skyreels_v2.model import MODEL
from skyreels_v2.sampler import Sampling
from skyreels_v2.window import cut_window

pytestmark = pytest.mark.numeric

CAUSAL = Sampling(3, 8.0, 3.0, 1, "causal", clean_pass=False, fps=24)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_blocks_equal_plain_ones_and_are_compiled_once(
    make_dit: Callable[..., DiT], denoise: Callable[..., Any]
):
    dit = make_dit(num_layers=3)
    torch.manual_seed(0)
    window = cut_window(9, chunk_frames=3, num_prefix=1)
    assert [len(chunk) for chunk in window.chunks] == [1, 3, 3, 2]
    latents = torch.randn(16, window.num_frames, 8, 8)
    ways = [CAUSAL, replace(CAUSAL, clean_pass=True), replace(CAUSAL, attention="full")]
    torch.compiler.reset()
    dit.parts = compiled_parts()
    once = dit.parts
    dit.compile_ahead(num_frames=3, frame_tokens=5, batches=[1])
    for sampling in ways:
        dit.parts = BlockParts()
        plain = denoise(dit, latents, window=window, sampling=sampling)
        dit.parts = once
        # all is compiled: no length, chunk, timestep, layer or way may compile
        with torch.compiler.set_stance("fail_on_recompile"):
            made = denoise(dit, latents, window=window, sampling=sampling)
        assert_close(made.latents, plain.latents, ulps=512)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("batches", ["true", "false"])
def test_what_a_run_needs_is_compiled_while_its_models_are_loaded(
    small: Path, tmp_path: Path, batches: str
):
    overrides = ["prompt=a swan", "compile=true", f"batch_branches={batches}", "num_steps=4"]
    overrides += ["height=32"]  # else half a frame is a single token, which is compiled apart
    job = prepare(MODEL, Request("flowcache_fast", str(small), overrides, out=str(tmp_path)))
    stats = RunStats(job.device)
    torch.compiler.reset()
    models, conditioning = load_networks(job, stats=stats), encode_inputs(job, stats=stats)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert render(job, models, conditioning, stats=stats)["num_frames"] == 17
