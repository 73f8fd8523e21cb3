"""Chunks that are computed in part, with small random transformers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from refusals import refuses
from tiny_windows import CAUSAL, FRAME_TOKENS, HEIGHT, WIDTH, Denoised, denoise, noise, prompts
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowcache.attention import SDPA
from flowcache.policies import FlowCache, ReusePolicy, Stride
from flowcache.predict import Quantity, ResultStore
from flowcache.tokens import MotionTokens, TokenChoice, TokenRule, TopTokens
from flowcache.wan.dit import DiT, context_flops
from flowcache.wan.unipc import UniPC, timestep_grid
from skyreels_v2.config import ReuseConfig, RunConfig
from skyreels_v2.window import cut_window

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]
TIMESTEPS, _ = timestep_grid(6, shift=8.0)
CONTENT = replace(CAUSAL, signal="content")
THRESHOLD = 0.06
"""FlowCache reuses some steps with it."""


def motion(**changes: Any) -> MotionTokens:
    given = {"threshold": THRESHOLD, "warmup_steps": 2, "vote": None, "least_share": 0.0, **changes}
    return MotionTokens("hidden", 0.3, **{"coarse_updates": 0, "coarse_steps": 0, **given})


def top(*steps: int, weighed: Any = "hidden") -> TopTokens:
    return TopTokens(weighed, 0.6, steps, share=0.5)


def run(
    dit: DiT, choice: Callable[[], TokenChoice], policy: Callable[[], ReusePolicy], **given: Any
) -> Denoised:
    return denoise(dit, policy=policy, tokens=choice, **{"sampling": CONTENT, **given})


def test_a_coarse_chunk_is_what_flowcache_makes(make_dit: MakeDiT):
    dit, policy = make_dit(), partial(FlowCache, THRESHOLD, 2)
    plain = denoise(dit, policy=policy, sampling=CONTENT)
    coarse = run(dit, partial(motion, coarse_steps=6), policy)
    assert plain.stats.num_reused > 0
    assert torch.equal(coarse.latents, plain.latents)
    assert coarse.stats.passes == plain.stats.passes


@pytest.mark.parametrize("quantity", ["residual", "velocity", "clean"])
@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_flops_are_those_torch_counts(make_dit: MakeDiT, quantity: Quantity, factor: float):
    dit = make_dit()
    weighed = "hidden" if quantity == "residual" else "latent"
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made = run(
            dit,
            partial(top, 2, 3, weighed=weighed),
            partial(Stride, steps=[1, 2, 3]),
            sampling=replace(CAUSAL, quantity=quantity),
            store=partial(ResultStore, factor),
            records=True,
        )
    stats, own = made.stats, 2 * context_flops(dit.config)
    assert stats.computed_flops + own == counter.get_total_flops()
    assert stats.trace is not None
    rows = {each.tick: flops.spent for each, flops in stats.trace.flops.items() if each.chunk == 0}
    assert rows[4] < rows[2] < rows[1]  # reused, a half, the whole


def test_tokens_that_move_are_computed_more_often_and_cost_less_than_the_chunk(make_dit: MakeDiT):
    dit, policy = make_dit(), partial(FlowCache, THRESHOLD, 2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made = run(dit, motion, policy)
    stats = made.stats
    assert stats.computed_flops + 2 * context_flops(dit.config) == counter.get_total_flops()
    whole = denoise(dit, policy=policy, sampling=CONTENT)
    assert stats.num_computed > whole.stats.num_computed
    assert stats.computed_flops < whole.stats.computed_flops


def test_the_queries_of_half_the_tokens_see_stale_keys_of_the_others(make_dit: MakeDiT):
    """One chunk of two frames; step 2 computes half of its tokens, worked out here from scratch."""
    dit, z, half = make_dit(), noise(2), FRAME_TOKENS  # of 2 * FRAME_TOKENS
    made = run(
        dit,
        partial(top, 2),
        partial(Stride, steps=[1, 2]),
        latents=z,
        window=cut_window(2, chunk_frames=2),
        sampling=replace(CAUSAL, guidance=1.0),
    )
    size = {"latent_height": HEIGHT, "latent_width": WIDTH}
    solver, x = UniPC(6, shift=8.0), z.clone()
    context, rope = dit.encode_context(prompts(dit)["cond"]), dit.rope(torch.arange(2), **size)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    change = hidden = torch.empty(0)
    for step, t in enumerate(TIMESTEPS[:4]):
        embedded = dit.embed(x.unsqueeze(0), torch.full((1, 2), t), fps=[24])
        rows = np.arange(2 * half)
        if step == 2:  # weights by the motion from frame 0 to frame 1; all tokens are one step old
            frames = hidden[0].double().numpy().reshape(2, half, -1)
            moved = np.abs(frames[1] - frames[0]).mean(axis=1)
            weight = 0.6 + 0.4 * (moved - moved.min()) / (moved.max() - moved.min())
            rows = np.sort(np.argsort(np.concatenate([weight, weight]))[-half:])
        if step < 3:

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Any = rows) -> Tensor:
                old = kept.get(layer, (k, v))
                kept[layer] = tuple(was.clone() for was in old)  # type: ignore[assignment]
                for was, new in zip(kept[layer], (k, v), strict=True):
                    was[:, rows] = new
                return SDPA(q, *kept[layer])

            parts = replace(
                embedded,
                tokens=embedded.tokens[:, rows],
                time=embedded.time[:, :1],
                modulation=embedded.modulation[:, :1],
            )
            out = dit.run_blocks(parts, rope[rows], context, self_attend=attend)
            hidden = embedded.tokens + (change if step == 2 else 0)
            hidden[:, rows] = out
        else:
            hidden = embedded.tokens + change
        change = hidden - embedded.tokens
        solver.advance_(x, velocity=dit.velocity(hidden, embedded, **size)[0])
        assert_close(made.rows[step], x, ulps=256)


@pytest.mark.parametrize("quantity", ["velocity", "clean"])
def test_pixels_that_are_left_out_get_the_predicted_velocity(make_dit: MakeDiT, quantity: Quantity):
    """At step 2, half of the pixels move as in a run that reuses the step, the others do not."""
    dit, sampling = make_dit(), replace(CAUSAL, guidance=1.0, quantity=quantity)
    given: dict[str, Any] = {"latents": noise(2), "window": cut_window(2, chunk_frames=2)}
    some, reused = (
        run(
            dit,
            partial(top, 2, weighed="latent"),
            partial(Stride, steps=steps),
            sampling=sampling,
            store=partial(ResultStore, 0.5),
            **given,
        )
        for steps in ([1, 2], [1])
    )
    assert torch.equal(some.rows[1], reused.rows[1])
    is_equal = (some.rows[2] == reused.rows[2]).all(dim=0)
    assert is_equal.sum() == is_equal.numel() // 2


def test_what_does_not_go_with_the_model_is_refused():
    def make(**given: Any) -> Callable[[], RunConfig]:
        tokens = TokenRule("motion", "latent")
        rule = ReuseConfig(policy="flowcache", tokens=tokens, **given.pop("reuse", {}))
        return lambda: RunConfig(**{"prompt": "-", "attention": "causal", "reuse": rule, **given})

    make()()
    refuses(make(attention="full"), "set attention=causal")
    refuses(make(reuse={"predict": "latent_update"}), "not latent_update")
