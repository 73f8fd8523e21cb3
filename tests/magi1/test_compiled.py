"""Compiled layers: equal to plain ones, compiled once for all chunks and cache lengths."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowcache.attention import SDPA
from flowcache.kv import cached_attention, caches_for
from flowcache.runtime.model import Request
from flowcache.runtime.run import encode_inputs, load_networks, prepare, render
from flowcache.runtime.stats import RunStats
from magi1.config import ModelConfig
from magi1.dit import DiT, LayerParts, compiled_parts, set_precision
from magi1.fp8 import Fp8Linear
from magi1.model import MODEL

CHUNK_FRAMES, FRAME_TOKENS = 2, 8


@torch.no_grad()
def chunks_through_cache(dit: DiT, *, num_chunks: int) -> list[Tensor]:
    """Forward chunks one after the other through a KV cache, each with a later timestep."""
    draw = torch.Generator().manual_seed(1)
    config = dit.config
    size = CHUNK_FRAMES * FRAME_TOKENS
    caches = caches_for(
        config.num_layers,
        capacity=num_chunks * size,
        num_heads=config.num_query_groups,
        head_width=config.kv_channels,
        dtype=dit.dtype,
        device=torch.device("cpu"),
    )
    made: list[Tensor] = []
    for chunk in range(num_chunks):
        # the length of the text differs from chunk to chunk
        text = torch.randn(1, 3 + chunk, config.caption_channels, generator=draw)
        latents = torch.randn(1, config.in_channels, CHUNK_FRAMES, 4, 8, generator=draw)
        embedded = dit.embed(latents, torch.full((1, 1), 0.1 + 0.2 * chunk), is_null=False)
        rope = dit.rope_table(
            first_frame=chunk * CHUNK_FRAMES,
            num_frames=CHUNK_FRAMES,
            latent_height=4,
            latent_width=8,
        )
        attend = cached_attention(
            [caches], active=[range(chunk * size, (chunk + 1) * size)], kernel=SDPA
        )
        context = dit.encode_context(text)
        made.append(dit.run_blocks(embedded, rope, context, self_attend=attend).float())
    return made


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("is_fp8", [False, True])
def test_compiled_layers_equal_plain_ones_and_are_compiled_once(
    model_tiny: ModelConfig, is_fp8: bool
):
    torch.manual_seed(0)
    dit = DiT(model_tiny, is_fp8=is_fp8).eval().requires_grad_(False)
    for module in dit.modules():
        if isinstance(module, Fp8Linear):
            module.weight.data = (0.2 * torch.randn(module.weight.shape)).to(module.weight.dtype)
    set_precision(dit, torch.bfloat16 if is_fp8 else torch.float32)
    # in bfloat16 fused sums are rounded once where plain ones are rounded twice
    tolerance = 0.05 if is_fp8 else 128 * torch.finfo(torch.float32).eps
    dit.parts = LayerParts()
    plain = chunks_through_cache(dit, num_chunks=4)
    torch.compiler.reset()
    dit.parts = compiled_parts()
    dit.compile_ahead(num_tokens=12)
    # all is compiled: no chunk, timestep or length of cache and text may compile
    with torch.compiler.set_stance("fail_on_recompile"):
        made = chunks_through_cache(dit, num_chunks=4)
    for got, want in zip(made, plain, strict=True):
        assert float((got - want).norm() / want.norm()) < tolerance


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_what_a_run_needs_is_compiled_while_its_models_are_loaded(quantised: Path, tmp_path: Path):
    overrides = ["prompt=a cat", "compile=true", "reuse.policy=stride", "reuse.warmup_steps=1"]
    job = prepare(MODEL, Request("vanilla", str(quantised), overrides, out=str(tmp_path)))
    stats = RunStats(job.device)
    torch.compiler.reset()
    models, conditioning = load_networks(job, stats=stats), encode_inputs(job, stats=stats)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert render(job, models, conditioning, stats=stats)["num_frames"] == 24
