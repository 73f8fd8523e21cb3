"""What a chunk gets that is not computed, held guidance, and what a run says about itself."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from tiny_windows import (
    CAUSAL,
    FRAME_TOKENS,
    FULL,
    HEIGHT,
    LOOPS,
    QUANTITIES,
    WIDTH,
    denoise,
    kept,
    noise,
    prompts,
)
from torch import Tensor

from flowcache.attention import SDPA
from flowcache.compress import ImportanceRedundancy
from flowcache.errors import UserError
from flowcache.policies import FlowCache, ReusePolicy, Stride
from flowcache.predict import HeldGuidance, Quantity, ResultStore
from flowcache.runtime.record import build_record, replay_policies
from flowcache.runtime.stats import RunStats
from flowcache.wan.dit import DiT
from flowcache.wan.unipc import UniPC, timestep_grid
from skyreels_v2.config import ReuseConfig, RunConfig
from skyreels_v2.window import cut_window

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]
ONE_CHUNK = cut_window(2, chunk_frames=2)
TIMESTEPS, SIGMAS = timestep_grid(6, shift=8.0)
HELD = replace(CAUSAL, signal="content", quantity="velocity")
"""For held guidance."""
RECORDED = {loop: replace(sampling, signal="content") for loop, sampling in LOOPS.items()}
THREE_CHUNKS = cut_window(6, chunk_frames=2)


# What a reused chunk gets -------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_a_reused_update_moves_the_latent_as_the_computed_step_did(
    make_dit: MakeDiT, attention: Any
):
    """Steps 0, 1, 3, 5 of 6 are computed: steps 2 and 4 repeat the moves of steps 1 and 3."""
    sampling = replace(FULL, attention=attention, quantity="latent_update")
    z, policy = noise(2), partial(Stride, steps=[1, 3])
    run = denoise(make_dit(), z, window=ONE_CHUNK, sampling=sampling, policy=policy)
    moves = [after - before for before, after in zip([z, *run.rows], run.rows, strict=False)]
    size = z.abs().max().item()  # a move is a difference of latents
    for computed, reused in ((1, 2), (3, 4)):
        assert_close(moves[reused], moves[computed], ulps=16, size=size)
    assert not torch.allclose(moves[3], moves[2], atol=1e-3)


def test_a_reused_residual_is_added_to_the_fresh_embedding(make_dit: MakeDiT):
    dit, z = make_dit(), noise(2)
    run = denoise(
        dit,
        z,
        window=ONE_CHUNK,
        sampling=replace(CAUSAL, guidance=1.0),
        policy=partial(Stride, steps=[1]),
    )
    size = {"latent_height": HEIGHT, "latent_width": WIDTH}
    solver, expected, change = UniPC(6, shift=8.0), z.clone(), torch.empty(0)
    context = dit.encode_context(prompts(dit)["cond"])
    rope = dit.rope(torch.arange(2), **size)
    for step, t in enumerate(TIMESTEPS):
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
    make_dit: MakeDiT, attention: Any, order: int, factor: float, quantity: Any
):
    """Steps 0, 1, 2, 5 of 6 are computed; the polynomial is numpy's; factor 0 holds the last."""
    dit, z = make_dit(), noise(2)
    run = denoise(
        dit,
        z,
        window=ONE_CHUNK,
        sampling=replace(FULL, attention=attention, quantity=quantity, guidance=1.0),
        policy=partial(Stride, steps=[1, 2]),
        store=partial(ResultStore, factor, order=order),
    )
    solver, x, seen = UniPC(6, shift=8.0), z.clone(), dict[float, Tensor]()
    for step, t in enumerate(TIMESTEPS):
        sigma = SIGMAS[step]
        if step in (0, 1, 2, 5):
            velocity = dit(x.unsqueeze(0), torch.full((1, 2), t), prompts(dit)["cond"])[0]
            seen[sigma] = velocity if quantity == "velocity" else x - sigma * velocity
        else:
            last = list(seen)[-order - 1 :]
            values = np.stack([seen[at].double().flatten() for at in last])
            coefficients = np.polyfit(last, values, order)
            polynomial = sum(c * sigma**p for p, c in enumerate(coefficients[::-1]))
            moved = values[-1] + factor * (polynomial - values[-1])
            predicted = torch.from_numpy(moved).float().view_as(x)
            velocity = predicted if quantity == "velocity" else (x - predicted) / sigma
        solver.advance_(x, velocity=velocity)
        assert_close(run.rows[step], x, ulps=256)


def test_branches_decide_alike_where_the_guided_update_is_reused(make_dit: MakeDiT):
    sampling = replace(CAUSAL, quantity="latent_update", signal="content")
    policies: dict[str, ReusePolicy] = {"cond": Stride(steps=[2]), "uncond": Stride(steps=[3])}
    run = denoise(make_dit(), window=ONE_CHUNK, sampling=sampling, policies=policies)
    for branch in policies:
        made = [p.step for p in run.stats.passes if p.branch == branch and p.is_computed]
        assert made == [0, 2, 3, 5]


# Together and apart -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
@pytest.mark.parametrize("loop", LOOPS)
def test_branches_in_one_batch_give_what_they_give_one_by_one(
    loop: str, model_type: str, make_dit: MakeDiT
):
    changes: dict[str, Any] = {}
    given: dict[str, Any] = {"policy": partial(Stride, 2, warmup_steps=2), "compression": kept()}
    if model_type == "i2v":
        changes = {"model_type": "i2v", "in_dim": 36, "image_dim": 8}
        given |= {"condition": torch.ones(20, 5, HEIGHT, WIDTH), "image": torch.ones(1, 257, 8)}
    together, apart = (
        denoise(make_dit(**changes), sampling=replace(LOOPS[loop], batch_branches=both), **given)
        for both in (True, False)
    )
    assert_close(together.latents, apart.latents, ulps=256)


@pytest.mark.parametrize("loop", ["causal", "causal with clean pass"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_chunks_go_through_the_blocks_together_and_the_result_is_that_of_each_alone(
    loop: str, quantity: Quantity, make_dit: MakeDiT
):
    """Chunks have 12, 12 and 6 tokens: 0 leaves each alone, 18 joins the last two."""

    def run(together_tokens: int) -> tuple[Tensor, int, int]:
        dit, calls = make_dit(), list[None]()
        dit.blocks[0].register_forward_hook(lambda *_: calls.append(None))
        sampling = replace(LOOPS[loop], quantity=quantity, together_tokens=together_tokens)
        policy = partial(FlowCache, threshold=0.3, warmup_steps=2)
        done = denoise(dit, sampling=sampling, policy=policy, compression=kept())
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
    loop: str, quantity: Quantity, make_dit: MakeDiT
):
    """Tensors of the meta device have no values: the host can't read one."""
    meta = torch.device("meta")
    dit = make_dit(inject_sample_info=True)
    texts = {name: text.to(meta) for name, text in prompts(dit).items()}
    dit.to(meta)

    def run(policy: Callable[[], ReusePolicy]) -> Tensor:
        return denoise(
            dit,
            torch.empty(16, 5, HEIGHT, WIDTH, device=meta),
            sampling=replace(LOOPS[loop], quantity=quantity, signal="content"),
            policy=policy,
            compression=kept(ImportanceRedundancy()),
            texts=texts,
        ).latents

    assert run(partial(Stride, every=2, warmup_steps=2)).device == meta
    with pytest.raises(NotImplementedError, match="meta"):  # the decision is what reads
        run(partial(FlowCache, threshold=0.3, warmup_steps=2))


# Held guidance ------------------------------------------------------------------------------------


def computed(run: Any, branch: str, *, chunk: int = 0) -> list[int]:
    rows = [row for row in run.stats.passes if (row.branch, row.chunk) == (branch, chunk)]
    return [row.step for row in rows if row.is_computed]


def test_the_difference_of_the_branches_is_held_as_worked_by_hand(make_dit: MakeDiT):
    """Steps 0, 1, 3, 5 of 6 are computed, 0 and 3 and the last one with both branches."""
    dit, z = make_dit(), noise(2)
    texts, policy = prompts(dit), partial(Stride, steps=[1, 3])
    run = denoise(
        dit, z, window=ONE_CHUNK, sampling=HELD, policy=policy, guidance=HeldGuidance([3])
    )
    assert computed(run, "cond") == [0, 1, 3, 5]
    assert computed(run, "uncond") == [0, 3, 5]
    solver, x = UniPC(6, shift=8.0), z.clone()
    guided = difference = torch.empty(0)
    for step, t in enumerate(TIMESTEPS):
        if step in (0, 1, 3, 5):
            cond = dit(x.unsqueeze(0), torch.full((1, 2), t), texts["cond"])[0]
            if step != 1:
                difference = dit(x.unsqueeze(0), torch.full((1, 2), t), texts["uncond"])[0] - cond
            guided = cond + (1 - HELD.guidance) * difference
        solver.advance_(x, velocity=guided)
        assert_close(run.rows[step], x, ulps=256)


@pytest.mark.parametrize("quantity", ["velocity", "clean", "latent_update"])
@pytest.mark.parametrize("batch_branches", [False, True])
def test_with_all_steps_listed_it_is_vanilla(
    make_dit: MakeDiT, quantity: Any, batch_branches: bool
):
    sampling = replace(HELD, quantity=quantity, batch_branches=batch_branches)
    want, found = (
        denoise(make_dit(), sampling=sampling, guidance=guidance).latents
        for guidance in (None, HeldGuidance(range(6)))
    )
    assert torch.equal(found, want)


@pytest.mark.parametrize("quantity", ["velocity", "clean", "latent_update"])
def test_every_second_computed_step_runs_one_branch_and_costs_half(
    make_dit: MakeDiT, quantity: Any
):
    """Both branches cost the same; 6 steps, all computed: 0, 2, 4 and the last one with both."""
    # with lag 1 the chunks of a tick run different branches
    held, sampling = HeldGuidance(every=2), replace(HELD, quantity=quantity, lag=1)
    run = denoise(make_dit(), sampling=sampling, guidance=held, records=True)
    for chunk in range(3):
        assert computed(run, "cond", chunk=chunk) == list(range(6))
        assert computed(run, "uncond", chunk=chunk) == [0, 2, 4, 5]
    spent = dict.fromkeys(("cond", "uncond"), 0)
    for each, flops in run.stats.trace.flops.items():
        spent[each.branch] += flops.spent
    saved = run.stats.flops_without_reuse - run.stats.computed_flops
    assert spent["uncond"] == spent["cond"] - saved
    assert saved > 0
    assert run.stats.num_reused == 6
    assert not run.updates.history


def test_an_adaptive_policy_and_held_guidance_go_together(make_dit: MakeDiT):
    sampling, held = replace(HELD, quantity="latent_update"), HeldGuidance(every=2)
    run = denoise(make_dit(), sampling=sampling, policy=partial(FlowCache, 1.0, 3), guidance=held)
    assert computed(run, "cond") == [0, 1, 2, 5]
    assert computed(run, "uncond") == [0, 2, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 1.0}, "this run has that one pass only"),
        ({"attention": "full"}, "work chunk by chunk: set attention=causal"),
        ({"reuse": ReuseConfig(guidance_every=2)}, "set reuse.predict to velocity, clean or"),
    ],
)
def test_a_run_that_cannot_hold_guidance_is_refused(settings: dict[str, Any], message: str):
    reuse = ReuseConfig(guidance_every=2, predict="velocity")
    good = RunConfig(prompt="a cat", attention="causal", reuse=reuse)
    with pytest.raises(UserError, match=message):
        replace(good, **settings)


# Records ------------------------------------------------------------------------------------------


def record_of(stats: RunStats) -> dict[str, Any]:
    return build_record(
        stats,
        stats.traced(),
        video="a.mp4",
        model="tiny",
        preset="test",
        policy="flowcache",
        threshold=0.3,
        num_steps=6,
        config={},
        environment={},
    )


def flowcache_run(dit: DiT, loop: str, **changes: Any) -> Any:
    return denoise(
        dit,
        noise(6),
        window=THREE_CHUNKS,
        policy=partial(FlowCache, 0.3, 1),
        compression=kept(ImportanceRedundancy()),
        **{"records": True, "sampling": RECORDED[loop], **changes},
    )


@pytest.mark.parametrize("quantity", ["residual", "latent_update"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_replayed_record_gives_the_same_latents_bit_for_bit(
    make_dit: MakeDiT, loop: str, quantity: Quantity
):
    dit, sampling = make_dit(), replace(RECORDED[loop], quantity=quantity)
    first = flowcache_run(dit, loop, sampling=sampling)
    assert first.stats.num_reused > 0
    record = record_of(first.stats)
    policies = {b: replay_policies(record, segment=0, branch=b) for b in ("cond", "uncond")}
    again = flowcache_run(dit, loop, sampling=sampling, policies=policies)
    assert torch.equal(first.latents, again.latents)
    for row, old in zip(record_of(again.stats)["decisions"], record["decisions"], strict=True):
        assert all(row[name] == old[name] for name in ("tick", "chunk", "branch", "computed"))


@pytest.mark.parametrize("loop", LOOPS)
def test_the_record_accounts_for_every_pass(make_dit: MakeDiT, loop: str):
    stats = flowcache_run(make_dit(), loop).stats
    record = record_of(stats)
    saved = sum(row["flops_saved"] for row in record["decisions"])
    assert saved == stats.flops_without_reuse - stats.computed_flops > 0
    for row in record["decisions"]:
        assert (row["seconds"] is None) == (not row["computed"])
        assert row["flops"] > 0
    assert len(record["ticks"]) == len(LOOPS[loop].ticks(THREE_CHUNKS))
    tokens = [row["tokens"] for row in record["kv"] if row["branch"] == "cond"]
    assert len(tokens) == (0 if loop == "full" else len(record["ticks"]))
    if tokens:
        assert tokens[0] == {}
        assert set(tokens[-1]) == {"0", "1", "2"}
        # of the last chunk nothing is dropped yet
        assert tokens[-1]["0"] < tokens[-1]["2"] == 2 * FRAME_TOKENS


@pytest.mark.parametrize("loop", LOOPS)
def test_recording_observing_and_the_place_of_the_cache_change_nothing(
    make_dit: MakeDiT, loop: str
):
    dit, seen = make_dit(), list[dict[str, Any]]()
    plain = flowcache_run(dit, loop, records=False)
    options = {"observe": lambda **row: seen.append(row), "storage": torch.device("cpu")}
    watched = flowcache_run(dit, loop, **options)
    assert torch.equal(plain.latents, watched.latents)
    assert plain.stats.trace is None
    shown = {(row["tick"], row["chunk"], row["branch"]): row for row in seen}
    made = {(p.tick, p.chunk, p.branch) for p in watched.stats.passes if p.is_computed}
    assert {key for key in shown if key[2] != "guided"} == made
    both = {k[:2] for k in made if {(*k[:2], "cond"), (*k[:2], "uncond")} <= made}
    assert {key[:2] for key in shown if key[2] == "guided"} == both
    for key in both:
        cond, uncond, guided = (shown[(*key, name)] for name in ("cond", "uncond", "guided"))
        assert guided["velocity"].shape == (16, 2, HEIGHT, WIDTH)
        assert guided["sigma"] == cond["sigma"]
        expected = uncond["velocity"] + 3.0 * (cond["velocity"] - uncond["velocity"])
        assert torch.equal(guided["velocity"], expected)
