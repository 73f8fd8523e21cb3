"""What a chunk gets that is not computed, on small models with random weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.attention import SDPA
from flowcache.compress import ImportanceRedundancy, Recent, TokenLayout
from flowcache.kv import Compression
from flowcache.policies import FlowCache, ReusePolicy, Stride
from flowcache.predict import Quantity, ResultStore
from flowcache.wan.dit import DiT
from flowcache.wan.unipc import UniPC, timestep_grid
from skyreels_v2.sampler import Sampling
from skyreels_v2.window import cut_window

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]
Denoise = Callable[..., Any]
"""`denoise_window` of conftest.py"""
MakePolicy = Callable[[], ReusePolicy]

GOLDEN = Path(__file__).parents[1] / "golden" / "skyreels_v2"
HEIGHT, WIDTH, FRAME_TOKENS = 4, 6, 6

FULL = Sampling(6, 8.0, 3.0, 2, "full", clean_pass=False, fps=24)
CAUSAL = replace(FULL, attention="causal")
CLEAN = replace(CAUSAL, clean_pass=True)
LOOPS = {"full": FULL, "causal": CAUSAL, "causal with clean pass": CLEAN}
QUANTITIES: tuple[Quantity, ...] = ("residual", "velocity", "latent_update", "clean")


def noise(num_frames: int, *, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(16, num_frames, HEIGHT, WIDTH, generator=draw)


WINDOW = cut_window(5, chunk_frames=2)
"""Three chunks, the last one shorter."""


# What a reused chunk gets -------------------------------------------------------------------------

ONE_CHUNK = cut_window(2, chunk_frames=2)


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_a_reused_update_moves_the_latent_as_the_computed_step_did(
    denoise: Denoise, make_dit: MakeDiT, attention: Any
):
    """Steps 0, 1, 3, 5 of 6 are computed: steps 2 and 4 repeat the moves of steps 1 and 3."""
    sampling = replace(FULL, attention=attention, quantity="latent_update")
    z = noise(2)
    run = denoise(
        make_dit(), z, window=ONE_CHUNK, sampling=sampling, policy=lambda: Stride(steps=[1, 3])
    )
    moves = [after - before for before, after in zip([z, *run.rows], run.rows, strict=False)]
    size = z.abs().max().item()  # a move is a difference of latents
    for computed, reused in ((1, 2), (3, 4)):
        assert_close(moves[reused], moves[computed], ulps=16, size=size)
    assert not torch.allclose(moves[3], moves[2], atol=1e-3)


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_a_reused_velocity_takes_the_solver_step_of_the_last_computed_one(
    denoise: Denoise, make_dit: MakeDiT, attention: Any
):
    """The model's answers are recorded by hand; step 2 steps with the velocity of step 1."""
    dit, z = make_dit(), noise(2)
    sampling = replace(FULL, attention=attention, quantity="velocity", guidance=1.0)
    draw = torch.Generator().manual_seed(2)
    text = torch.randn(1, dit.config.text_len, dit.config.text_dim, generator=draw)
    run = denoise(
        dit,
        z,
        window=ONE_CHUNK,
        sampling=sampling,
        policy=lambda: Stride(steps=[1]),
        texts={"cond": text},
    )
    timesteps, _ = timestep_grid(6, shift=8.0)
    solver, expected, velocity = UniPC(6, shift=8.0), z.clone(), torch.empty(0)
    for step, t in enumerate(timesteps):
        if step in (0, 1, 5):
            velocity = dit(expected.unsqueeze(0), torch.full((1, 2), t), text)[0]
        solver.advance_(expected, velocity=velocity)
        assert_close(run.rows[step], expected, ulps=256)


def test_a_reused_residual_is_added_to_the_fresh_embedding(denoise: Denoise, make_dit: MakeDiT):
    dit, z = make_dit(), noise(2)
    draw = torch.Generator().manual_seed(2)
    text = torch.randn(1, dit.config.text_len, dit.config.text_dim, generator=draw)
    run = denoise(
        dit,
        z,
        window=ONE_CHUNK,
        sampling=replace(CAUSAL, guidance=1.0),
        policy=lambda: Stride(steps=[1]),
        texts={"cond": text},
    )
    timesteps, _ = timestep_grid(6, shift=8.0)
    size = {"latent_height": HEIGHT, "latent_width": WIDTH}
    solver, expected, change = UniPC(6, shift=8.0), z.clone(), torch.empty(0)
    context, rope = dit.encode_context(text), dit.rope(torch.arange(2), **size)
    for step, t in enumerate(timesteps):
        embedded = dit.embed(expected.unsqueeze(0), torch.full((1, 2), t), fps=[24])
        if step in (0, 1, 5):
            hidden = dit.run_blocks(
                embedded, rope, context, self_attend=lambda _layer, q, k, v: SDPA(q, k, v)
            )
            change = hidden - embedded.tokens
        velocity = dit.velocity(embedded.tokens + change, embedded, **size)[0]
        solver.advance_(expected, velocity=velocity)
        assert_close(run.rows[step], expected, ulps=256)


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize(("order", "factor"), [(1, 0.0), (1, 0.5), (2, 0.8)])
@pytest.mark.parametrize("quantity", ["velocity", "clean"])
def test_reused_steps_follow_the_polynomial_through_velocities_or_clean_estimates(
    denoise: Denoise, make_dit: MakeDiT, attention: Any, order: int, factor: float, quantity: Any
):
    """Steps 0, 1, 2, 5 of 6 are computed; the polynomial is numpy's."""
    dit, z = make_dit(), noise(2)
    draw = torch.Generator().manual_seed(2)
    text = torch.randn(1, dit.config.text_len, dit.config.text_dim, generator=draw)
    run = denoise(
        dit,
        z,
        window=ONE_CHUNK,
        sampling=replace(FULL, attention=attention, quantity=quantity, guidance=1.0),
        policy=lambda: Stride(steps=[1, 2]),
        texts={"cond": text},
        store=lambda: ResultStore(factor, order=order),
    )
    timesteps, sigmas = timestep_grid(6, shift=8.0)
    solver, x, seen = UniPC(6, shift=8.0), z.clone(), dict[float, Tensor]()
    for step, t in enumerate(timesteps):
        sigma = sigmas[step]
        if step in (0, 1, 2, 5):
            velocity = dit(x.unsqueeze(0), torch.full((1, 2), t), text)[0]
            seen[sigma] = velocity if quantity == "velocity" else x - sigma * velocity
        else:
            last = list(seen)[-order - 1 :]
            values = np.stack([seen[at].double().flatten() for at in last])
            coefficients = np.polyfit(last, values, order)
            polynomial = sum(c * sigma**p for p, c in enumerate(coefficients[::-1]))
            moved = values[-1] + factor * (polynomial - values[-1])
            stand_in = torch.from_numpy(moved).float().view_as(x)
            velocity = stand_in if quantity == "velocity" else (x - stand_in) / sigma
        solver.advance_(x, velocity=velocity)
        assert_close(run.rows[step], x, ulps=256)


def test_branches_decide_alike_where_the_guided_update_is_reused(
    denoise: Denoise, make_dit: MakeDiT
):
    run = denoise(
        make_dit(),
        noise(5),
        window=WINDOW,
        sampling=replace(CAUSAL, quantity="latent_update", signal="content"),
        policy=lambda: FlowCache(0.3, 1),
    )
    decisions = {
        branch: [(p.tick, p.chunk, p.is_computed) for p in run.stats.passes if p.branch == branch]
        for branch in ("cond", "uncond")
    }
    assert decisions["cond"] == decisions["uncond"]


# Guidance branches in one batch -------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
@pytest.mark.parametrize("loop", LOOPS)
def test_branches_in_one_batch_give_what_they_give_one_by_one(
    loop: str, model_type: str, make_dit: MakeDiT, denoise: Denoise
) -> None:
    extra: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    if model_type == "i2v":
        changes = {"model_type": "i2v", "in_dim": 36, "image_dim": 8}
        extra = {"condition": torch.ones(20, 5, HEIGHT, WIDTH), "image": torch.ones(1, 257, 8)}
    layout = TokenLayout(FRAME_TOKENS, 2 * FRAME_TOKENS)
    keep = partial(Recent().keep, budget=2 * FRAME_TOKENS, layout=layout)
    compression = Compression(2 * FRAME_TOKENS, keep) if loop != "full" else None

    def latents(*, batch_branches: bool) -> Tensor:
        return denoise(
            make_dit(**changes),
            noise(5),
            window=WINDOW,
            sampling=replace(LOOPS[loop], batch_branches=batch_branches),
            policy=partial(Stride, every=2, warmup_steps=2),
            compression=compression,
            **extra,
        ).latents

    assert_close(latents(batch_branches=True), latents(batch_branches=False), ulps=256)


@pytest.mark.parametrize("loop", ["causal", "causal with clean pass"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_chunks_go_through_the_blocks_together_and_the_result_is_that_of_each_alone(
    loop: str, quantity: Quantity, make_dit: MakeDiT, denoise: Denoise
):
    """Chunks have 12, 12 and 6 tokens: 0 leaves each alone, 18 joins the last two."""
    layout = TokenLayout(FRAME_TOKENS, 2 * FRAME_TOKENS)
    keep = partial(Recent().keep, budget=2 * FRAME_TOKENS, layout=layout)

    def run(together_tokens: int) -> tuple[Tensor, int, int]:
        dit, calls = make_dit(), list[None]()
        dit.blocks[0].register_forward_hook(lambda *_: calls.append(None))
        done = denoise(
            dit,
            noise(5),
            window=WINDOW,
            sampling=replace(LOOPS[loop], quantity=quantity, together_tokens=together_tokens),
            policy=partial(FlowCache, threshold=0.3, warmup_steps=2),
            compression=Compression(2 * FRAME_TOKENS, keep),
        )
        return done.latents, done.stats.computed_flops, len(calls)

    alone, flops, most_calls = run(0)
    for together_tokens in (18, 4096):
        latents, own_flops, calls = run(together_tokens)
        assert_close(latents, alone, ulps=256)
        assert own_flops == flops
        assert calls < most_calls
        most_calls = calls


@pytest.mark.parametrize(
    ("loop", "quantity"),
    [
        ("full", "residual"),
        ("causal", "velocity"),
        ("causal", "latent_update"),
        ("causal with clean pass", "clean"),
    ],
)
def test_nothing_but_a_decision_waits_for_the_device(
    loop: str, quantity: Quantity, make_dit: MakeDiT, denoise: Denoise
):
    """Tensors of the meta device have no values: the host can't read one."""
    meta = torch.device("meta")
    dit = make_dit(inject_sample_info=True).to(meta)
    shape = (1, dit.config.text_len, dit.config.text_dim)
    keep = partial(
        ImportanceRedundancy().keep,
        budget=2 * FRAME_TOKENS,
        layout=TokenLayout(FRAME_TOKENS, 2 * FRAME_TOKENS),
    )

    def run(policy: MakePolicy) -> Any:
        return denoise(
            dit,
            torch.empty(16, 5, HEIGHT, WIDTH, device=meta),
            window=WINDOW,
            sampling=replace(LOOPS[loop], quantity=quantity, signal="content"),
            policy=policy,
            compression=None if loop == "full" else Compression(2 * FRAME_TOKENS, keep),
            texts={name: torch.empty(shape, device=meta) for name in ("cond", "uncond")},
        )

    assert run(partial(Stride, every=2, warmup_steps=2)).latents.device == meta
    with pytest.raises(NotImplementedError, match="meta"):  # the decision is what reads
        run(partial(FlowCache, threshold=0.3, warmup_steps=2))
