from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_windows import FRAME_TOKENS, HEIGHT, LOOPS, WIDTH, denoise, kept
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowcache.kv import Compression
from flowcache.policies import FlowCache, ReusePolicy, Stride, TeaCache, Vanilla
from flowcache.predict import Quantity
from flowcache.runtime.stats import RunStats
from flowcache.wan.dit import DiT, DiTConfig, blocks_flops, context_flops, embed_flops, head_flops
from skyreels_v2.window import cut_window

MakeDiT = Callable[..., DiT]

REAL_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, inject_sample_info=True)
KINDS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "t2v with fps embedding": {"inject_sample_info": True},
    "i2v": {"model_type": "i2v", "in_dim": 36, "image_dim": 20},
}
FRAMES = 5
IMAGE_TOKENS = 257


def counted(call: Callable[[], object]) -> int:
    """Return the FLOPs that torch counts; its fused CPU attention kernel is left out by torch."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def image_inputs(config: DiTConfig) -> dict[str, Any]:
    if config.model_type == "t2v":
        return {}
    return {
        "y_BCFhw": torch.randn(1, 20, FRAMES, HEIGHT, WIDTH),
        "image_BLD": torch.randn(1, IMAGE_TOKENS, 20),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", [None, [(0, 2), (2, 4), (4, 5)]], ids=["full", "causal"])
def test_one_forward_costs_what_torch_counts(
    make_dit: MakeDiT, kind: str, bounds: list[tuple[int, int]] | None
):
    dit = make_dit(**KINDS[kind])
    config = dit.config
    x = torch.randn(1, 16, FRAMES, HEIGHT, WIDTH)
    t = torch.arange(FRAMES).unsqueeze(0)
    text = torch.randn(1, config.text_len, config.text_dim)
    total = counted(lambda: dit(x, t, text, causal_chunks=bounds, **image_inputs(config)))
    chunks = bounds or [(0, FRAMES)]
    blocks = sum(
        blocks_flops(config, queries=(b - a) * FRAME_TOKENS, keys=b * FRAME_TOKENS)
        for a, b in chunks
    )
    assert total == (
        embed_flops(config, num_frames=FRAMES, frame_tokens=FRAME_TOKENS)
        + context_flops(config)
        + blocks
        + head_flops(config, queries=FRAMES * FRAME_TOKENS)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_costs_what_torch_counts(make_dit: MakeDiT, kind: str):
    dit = make_dit(**KINDS[kind])
    text = torch.randn(1, dit.config.text_len, dit.config.text_dim)
    image = image_inputs(dit.config).get("image_BLD")
    assert context_flops(dit.config) == counted(lambda: dit.encode_context(text, image))


POLICIES: dict[str, Callable[[], ReusePolicy]] = {
    "vanilla": Vanilla,
    "flowcache": lambda: FlowCache(5.0, 1),
    "teacache": lambda: TeaCache(5.0, 1),
    "stride": lambda: Stride(2, warmup_steps=1),
}


@pytest.mark.parametrize(
    ("kind", "policy", "loop", "is_kept"),
    [
        ("t2v", "vanilla", "full", False),
        ("t2v", "flowcache", "causal", False),
        ("t2v", "stride", "causal with clean pass", True),
        ("t2v with fps embedding", "teacache", "full", False),
        ("t2v with fps embedding", "flowcache", "causal with clean pass", False),
        ("i2v", "teacache", "full", False),
        ("i2v", "stride", "causal", True),
    ],
)
def test_a_run_costs_what_torch_counts(
    make_dit: MakeDiT, kind: str, policy: str, loop: str, is_kept: bool
):
    total, stats = run_counted(
        make_dit(**KINDS[kind]), loop, policy, compression=kept() if is_kept else None
    )
    assert stats.computed_flops == total
    assert (stats.num_reused > 0) == (policy != "vanilla")


@pytest.mark.parametrize("quantity", ["residual", "velocity", "latent_update", "clean"])
@pytest.mark.parametrize("attention", ["full", "causal"])
def test_what_is_reused_decides_whether_the_head_is_read(
    make_dit: MakeDiT, attention: str, quantity: Quantity
):
    dit = make_dit(num_layers=1)
    total, stats = run_counted(dit, attention, "teacache", quantity=quantity)
    assert stats.computed_flops == total
    without, vanilla = run_counted(dit, attention, "vanilla", quantity=quantity)
    assert stats.flops_without_reuse == vanilla.flops_without_reuse == without
    assert total < without


def run_counted(
    dit: DiT,
    loop: str,
    policy: str,
    *,
    compression: Compression | None = None,
    quantity: Quantity = "residual",
) -> tuple[int, RunStats]:
    """Denoise a window with a given frame; return torch's count without the prompts, and ours."""
    image, runs = image_inputs(dit.config), []
    sampling = replace(LOOPS[loop], num_steps=4, lag=1, quantity=quantity)

    def run() -> None:
        done = denoise(
            dit,
            window=cut_window(FRAMES, chunk_frames=2, num_prefix=1),
            sampling=sampling,
            policy=POLICIES[policy],
            compression=compression,
            condition=image["y_BCFhw"][0] if image else None,
            image=image.get("image_BLD"),
        )
        runs.append(done.stats)

    return counted(run) - 2 * context_flops(dit.config), runs[0]


def test_a_real_forward_with_full_attention_costs_612_teraflops():
    tokens = 5 * 10_200
    forward = blocks_flops(REAL_1_3B, queries=tokens, keys=tokens)
    forward += head_flops(REAL_1_3B, queries=tokens)
    forward += embed_flops(REAL_1_3B, num_frames=25, frame_tokens=2040)
    assert round(forward / 1e12) == 612
    assert round(forward * 270 / 1e15) == 165


def test_active_chunks_through_the_cache_cost_79_7_petaflops_without_reuse():
    """50 steps of 5 and of 4 chunks, two branches, every chunk seeing those before it."""
    chunks = [blocks_flops(REAL_1_3B, queries=10_200, keys=10_200 * n) for n in range(1, 6)]
    assert 2 * 50 * (sum(chunks) + sum(chunks[1:])) / 1e15 == pytest.approx(79.7, abs=0.4)
