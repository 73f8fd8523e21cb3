"""The transformer against the reference's tensors, and laws that need no reference."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.attention import SDPA
from flowcache.kv import Attend, cached_attention, caches_for
from magi1.config import ModelConfig
from magi1.dit import (
    DiT,
    LayerParts,
    attend_to_text,
    compiled_parts,
    interleave,
    is_float32,
    rope_table,
    set_precision,
)
from magi1.fp8 import Fp8Linear

pytestmark = pytest.mark.numeric


def difference(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


def ranged(
    past: Sequence[Tensor], ranges: Sequence[Sequence[int]], seen: dict[int, Tensor]
) -> Attend:
    """Attend as the reference does: query range i to key range i of cached and current tokens.

    The keys and values of the call are put into `seen`, by layer, as `[S, G, 2 C]`.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen[layer] = torch.cat([k, v], dim=-1)[0]
        old_k, old_v = past[layer].unsqueeze(0).chunk(2, dim=-1)
        k, v = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
        parts = zip(q.chunk(len(ranges), dim=1), ranges, strict=True)
        return torch.cat([SDPA(part, k[:, a:b], v[:, a:b]) for part, (a, b) in parts], dim=1)

    return attend


def test_a_24b_style_model_gives_the_reference_velocities(golden: Callable[[str], Any]):
    want = golden("dit_24b_style")
    dit, chunk_tokens = want.dit(), want.case["chunk_tokens"]
    x, t, text, mask = want["x"], want["t"], want["y"][:, 0], want["mask"][:, 0].bool()
    past = [want[f"kv_in.{layer}"][:chunk_tokens] for layer in range(2)]
    seen: dict[int, Tensor] = {}
    attend = ranged(past, want["kv_range"].tolist(), seen)

    cond = dit(x, t, text, mask_RL=mask, first_frame=6, self_attend=attend)
    assert_close(cond, want["out_cond"], ulps=256)

    prev = dit(x, t, text, mask_RL=mask, first_frame=6, self_attend=attend, is_null=True)
    assert_close(prev, want["out_prev"], ulps=256)
    for layer, kv in seen.items():
        written = want[f"kv_out.{layer}"][chunk_tokens:]
        assert_close(kv, written, ulps=256)

    separate = x[:, :, 6:].unflatten(2, (2, 6))[0].movedim(1, 0)
    uncond = dit(separate, t[0, 1:, None], text[1:], mask_RL=mask[1:], is_null=True)
    assert_close(uncond, want["out_uncond"], ulps=256)


def test_the_embeddings_are_the_reference_ones(golden: Callable[[str], Any]):
    want = golden("dit_24b_style")
    dit = want.dit()
    embedded = dit.embed(want["x"], want["t"], is_null=False)
    assert_close(embedded.tokens[0], want["pre.tokens"][:, 0], ulps=256)
    assert_close(embedded.condition, want["pre.condition"], ulps=256)
    height, width = want.case["latent_hw"]
    rope = dit.rope_table(first_frame=6, num_frames=18, latent_height=height, latent_width=width)
    assert_close(torch.cat([rope[..., 1], rope[..., 0]], dim=1), want["pre.rope"], ulps=256)


def test_a_distilled_model_sees_its_step_width(model_tiny: ModelConfig):
    torch.manual_seed(0)
    dit = DiT(model_tiny).requires_grad_(False)
    x, t = torch.randn(1, 16, 1, 4, 4), torch.tensor([[0.25]])
    told = dit.embed(x, t, is_null=False, step_width=4.0).condition
    untold = dit.embed(x, t, is_null=False).condition
    # the same embedder as the timestep's
    width = dit.t_embedder(torch.tensor([[4.0]]), dtype=torch.float32)
    assert_close(told, untold + width, ulps=8)


def test_chunk_by_chunk_through_a_cache_is_the_block_causal_forward(model_tiny: ModelConfig):
    torch.manual_seed(0)
    dit = DiT(model_tiny).eval().requires_grad_(False)
    x, t = torch.randn(1, 16, 6, 4, 4), torch.tensor([[0.7, 0.4, 0.1]])
    text = torch.randn(3, 5, model_tiny.caption_channels)
    whole = dit(x, t, text)
    caches = caches_for(
        model_tiny.num_layers,
        capacity=24,
        num_heads=model_tiny.num_query_groups,
        head_width=model_tiny.kv_channels,
        dtype=torch.float32,
        device=x.device,
    )
    parts = [
        dit(
            x[:, :, 2 * chunk : 2 * chunk + 2],
            t[:, chunk : chunk + 1],
            text[chunk : chunk + 1],
            first_frame=2 * chunk,
            self_attend=cached_attention(
                [caches], active=[range(8 * chunk, 8 * chunk + 8)], kernel=SDPA
            ),
        )
        for chunk in range(3)
    ]
    assert_close(torch.cat(parts, dim=2), whole, ulps=256)


def test_masked_text_equals_shorter_text_and_no_text_gives_nothing(model_tiny: ModelConfig):
    torch.manual_seed(0)
    attention = DiT(model_tiny).requires_grad_(False).videodit_blocks.layers[0].self_attention
    text, q = torch.randn(2, 6, 32), torch.randn(1, 8, 4, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    out = attend_to_text(q, attention.encode(text, mask), kernel=SDPA)
    short = attend_to_text(q[:, :4], attention.encode(text[:1, :4], None), kernel=SDPA)
    assert_close(out[:, :4], short, ulps=64)
    assert torch.equal(out[:, 4:], torch.zeros(1, 4, 4, 8))
    nothing = attend_to_text(q[:, :4], attention.encode(text[:1, :0], None), kernel=SDPA)
    assert torch.equal(nothing, torch.zeros(1, 4, 4, 8))


def test_attention_outputs_are_joined_in_eight_groups():
    core, cross = torch.arange(16).view(1, 1, 16), torch.arange(100, 116).view(1, 1, 16)
    assert interleave(core, cross).flatten()[:8].tolist() == [0, 1, 100, 101, 2, 3, 102, 103]


def test_rows_and_columns_are_scaled_to_the_reference_area():
    # 32 x 8 tokens have the area of 16 x 16: rows run from -15.5 to 15.5, columns -3.5 to 3.5
    # 64 x 16 have four times the area, r = 2: rows run from -15.5 to 15.5 as well
    for height, width in ((32, 8), (64, 16)):
        table = rope_table(torch.ones(1), first_frame=2, num_frames=1, height=height, width=width)
        angle = torch.tensor([2.0, -15.5, -3.5])
        assert_close(table[0, :, 1], angle.sin(), ulps=64)


def test_frames_count_from_the_start_of_the_video():
    whole = rope_table(torch.ones(2), first_frame=0, num_frames=9, height=2, width=3)
    tail = rope_table(torch.ones(2), first_frame=6, num_frames=3, height=2, width=3)
    assert torch.equal(whole[-18:], tail)


def test_only_inner_layers_of_a_quantised_model_are_8_bit(model_tiny: ModelConfig):
    dit = DiT(model_tiny, is_fp8=True)
    dtypes = [layer.self_attention.linear_proj.weight.dtype for layer in dit.videodit_blocks.layers]
    fp8 = torch.float8_e4m3fn
    assert dtypes == [torch.float32, fp8, fp8, torch.float32]
    assert dit.videodit_blocks.layers[1].self_attention.linear_kv_xattn.weight.dtype != fp8


def test_a_quantised_model_runs_in_bfloat16_and_stays_near_the_unquantised_one(
    model_tiny: ModelConfig,
):
    torch.manual_seed(0)
    plain = DiT(model_tiny).requires_grad_(False)
    quantised = DiT(model_tiny, is_fp8=True).requires_grad_(False)
    state = plain.state_dict()
    for name, value in quantised.state_dict().items():
        value.copy_(state[name].view(value.shape) if name in state else torch.ones_like(value))
    for dit in (plain, quantised):
        set_precision(dit, torch.bfloat16)
    x, t = torch.randn(1, 16, 2, 4, 4), torch.full((1, 1), 0.5)
    text = torch.randn(1, 5, model_tiny.caption_channels)
    a, b = plain(x, t, text), quantised(x, t, text)
    assert difference(b, a) < 0.1  # 8 bits hold 3 digits after the leading one: 1/16 per value
    assert not torch.equal(a, b)


def test_half_precision_keeps_the_named_parts_in_float32(model_tiny: ModelConfig):
    dit = DiT(model_tiny)
    set_precision(dit, torch.bfloat16)
    kept = {name for name, value in dit.named_parameters() if value.dtype == torch.float32}
    layer = "videodit_blocks.layers.0"
    assert {name for name in kept if name.startswith(layer)} == {
        f"{layer}.{norm}.{part}"
        for norm in (
            "self_attention.q_layernorm",
            "self_attention.k_layernorm",
            "self_attn_post_norm",
            "mlp_post_norm",
        )
        for part in ("weight", "bias")
    }
    assert is_float32("rope.bands")
    assert is_float32("videodit_blocks.final_layernorm.weight")
    assert not is_float32(f"{layer}.self_attention.q_layernorm_xattn.weight")
    assert dit.dtype == torch.bfloat16


def test_a_bfloat16_run_stays_near_the_float32_one(golden: Callable[[str], Any]):
    want = golden("dit_24b_style")
    dit = want.dit()
    text, mask = want["y"][:1, 0], want["mask"][:1, 0].bool()
    x, t = want["x"][:, :, :6], want["t"][:, 1:2]
    assert_close(dit(x, t, text, mask_RL=mask), want["out_first"], ulps=256)
    set_precision(dit, torch.bfloat16)
    velocity = dit(x, t, text, mask_RL=mask)
    assert velocity.dtype == torch.float32
    assert difference(velocity, want["out_first"]) < 0.1


def test_the_velocity_of_a_half_channel_model_has_the_latent_channels(model_tiny: ModelConfig):
    half = replace(model_tiny, half_channel_vae=True, in_channels=8, out_channels=8)
    dit = DiT(half).requires_grad_(False)
    velocity = dit(torch.randn(1, 4, 1, 4, 4), torch.zeros(1, 1), torch.randn(1, 2, 12))
    assert velocity.shape == (1, 4, 1, 4, 4)


# Compiled layers --------------------------------------------------------------------------

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
