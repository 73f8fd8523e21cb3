"""Compiled blocks: equal to plain ones, compiled once for all layers, chunks, cache lengths."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_close

from flowcache.wan.dit import BlockParts, DiT, compiled_parts
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
