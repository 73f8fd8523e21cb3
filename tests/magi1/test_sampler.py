"""The denoising loop: the reference's clips, and laws that need no reference."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowcache.compress import ImportanceRedundancy, Recent, TokenLayout
from flowcache.policies import FlowCache, ReusePolicy, Stride, TeaCache, Vanilla
from flowcache.predict import HeldGuidance, ResultStore
from flowcache.runtime.ending import EXIT_USER_ERROR
from flowcache.runtime.record import build_record, read_record, replay_policies
from flowcache.runtime.stats import RunStats
from flowcache.runtime.video import read_video
from flowcache.tokens import TokenChoice, TopTokens
from magi1.__main__ import main
from magi1.config import TokenChoice as SpecialChoice
from magi1.dit import DiT
from magi1.sampler import ClipInputs, ClipSampler, Reuse, euler_step_
from magi1.sampling import Guidance, KVBudget, Sampling, cache_chunks
from magi1.schedule import Clip, Clock
from magi1.text import SpecialTokens, chunk_captions, null_caption

pytestmark = pytest.mark.numeric

BASE = Guidance((0.0, 0.3), prev_scales=(1.5, 1.0), text_scales=(7.5, 0.0))
CLOCK = Clock(num_steps=8, window=4)
DISTILLED = Sampling(CLOCK, guidance=None, is_distilled=True)
LAYOUT = TokenLayout(frame_tokens=4, chunk_tokens=8)
"""Of the tiny clips: 2 latents of 4 x 4 in a chunk, 4 tokens in a latent."""


def reference_sampler(want: Any, policy: ReusePolicy, sampling: Sampling) -> ClipSampler:
    """Build the sampler of a reference case that has no prefix."""
    config, dit = want.config(), want.dit()
    clip = Clip(config.runtime_config.num_frames)
    special = want.under("special")
    tokens = SpecialTokens(
        *(special[f"{name}"] for name in ("caption_token", "logo_token")), special["other_tokens"]
    )
    captions = chunk_captions(
        want["emb"][0, 0][want["mask"][0].bool()],
        num_chunks=clip.num_chunks,
        tokens=tokens,
        choice=SpecialChoice(),
        max_length=config.model_config.caption_max_length,
    )
    noise, null = want["noise"][0].clone(), null_caption(dit.null_caption)
    return ClipSampler(
        dit,
        ClipInputs(clip, noise, captions=dict(enumerate(captions)), null_caption=null),
        replace(sampling, clock=Clock.of(config)),
        reuse=Reuse(policy),
        stats=RunStats(torch.device("cpu")),
    )


def test_three_passes_give_the_reference_clip(golden: Callable[[str], Any]):
    want = golden("gen_base_t2v")
    sampler = reference_sampler(want, Vanilla(), Sampling.of(want.config()))
    for tick, finished in sampler.run():
        assert_close(sampler.latents, want["x_after"][tick.index], ulps=512)
        for chunk in finished:
            own = sampler.clip.shown(chunk)
            chunk_latents = sampler.latents[:, own.start : own.stop]
            assert_close(chunk_latents, want[f"chunk.{chunk}"][0], ulps=512)


def test_chunk_wise_reuse_gives_the_reference_decisions_and_clip(golden: Callable[[str], Any]):
    want = golden("flow_reuse_keep_nearly_clean")
    policy = FlowCache(threshold=want.case["rel_l1_thresh"], warmup_steps=want.case["warmup_steps"])
    sampler = reference_sampler(want, policy, replace(DISTILLED, clean_pass=False))
    for _ in sampler.run():
        pass
    reused = [each for each in sampler.stats.passes if not each.is_computed]
    assert len(reused) == want.case["reused"] > 0
    for each in sampler.stats.passes:
        assert want["reuse"][each.tick, each.chunk] == int(not each.is_computed)
    for chunk in range(sampler.clip.num_chunks):
        own = sampler.clip.latents(chunk)
        chunk_latents = sampler.latents[:, own.start : own.stop]
        assert_close(chunk_latents, want[f"chunk.{chunk}"][0], ulps=512)


def make(
    dit: DiT,
    *,
    num_chunks: int = 6,
    num_prefix: int = 0,
    policy: ReusePolicy | None = None,
    sampling: Sampling = DISTILLED,
    held: HeldGuidance | None = None,
    tokens: TokenChoice | None = None,
    records: bool = False,
    observe: Any = None,
    **changes: Any,
) -> ClipSampler:
    """Build a sampler of chunks of two latents, eight tokens each; always the same noise.

    Args:
        changes: of the sampling.
    """
    clip = Clip(8 * num_chunks, num_prefix=num_prefix, chunk_width=2)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4, 2 * clip.num_chunks, 4, 4, generator=generator)
    text = torch.randn(5, 6, generator=generator)
    inputs = ClipInputs(
        clip,
        noise,
        captions={chunk: text[: 2 + chunk % 3] for chunk in clip.generated},
        null_caption=dit.null_caption[:3],
        prefix=torch.randn(4, num_prefix, 4, 4, generator=generator) if num_prefix else None,
    )
    return ClipSampler(
        dit,
        inputs,
        replace(sampling, **changes),
        reuse=Reuse(policy or Vanilla(), held_guidance=held or HeldGuidance(), tokens=tokens),
        stats=RunStats(torch.device("cpu"), records=records),
        observe=observe,
    )


def finished(sampler: ClipSampler) -> Tensor:
    for _ in sampler.run():
        pass
    assert sampler.latents.isfinite().all()
    return sampler.latents


@pytest.fixture(scope="module")
def vanilla(dit: DiT) -> Callable[[Sampling], Tensor]:
    """Give the clip of a sampling without any reuse or budget, made once."""
    clips: dict[Sampling, Tensor] = {}

    def clip(sampling: Sampling) -> Tensor:
        if sampling not in clips:
            clips[sampling] = finished(make(dit, sampling=sampling))
        return clips[sampling]

    return clip


def keep(total_chunks: int) -> KVBudget:
    return KVBudget(total_chunks, ImportanceRedundancy(queries="frame"), LAYOUT)


SAMPLINGS = {
    "base": Sampling(CLOCK, guidance=BASE, is_distilled=False),
    "distilled": DISTILLED,
    "published": replace(DISTILLED, clean_pass=False, nearly_clean_pass=False),
}
each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)


@each_sampling
def test_threshold_zero_computes_what_vanilla_does(
    dit: DiT, sampling: Sampling, vanilla: Callable[[Sampling], Tensor]
):
    zero = FlowCache(threshold=0, warmup_steps=0)
    assert torch.equal(finished(make(dit, sampling=sampling, policy=zero)), vanilla(sampling))


@each_sampling
def test_an_ample_budget_changes_nothing(
    dit: DiT, sampling: Sampling, vanilla: Callable[[Sampling], Tensor]
):
    budgeted = finished(make(dit, sampling=sampling, budget=keep(6)))
    assert torch.equal(budgeted, vanilla(sampling))


@each_sampling
@pytest.mark.parametrize("num_prefix", [0, 1, 11])
def test_a_small_budget_bounds_the_cache(dit: DiT, sampling: Sampling, num_prefix: int):
    clock = Clock(num_steps=8, window=4, reaches=(5, 4, 3, 2), clean_reach=1)
    policy = FlowCache(threshold=0.5, warmup_steps=2)
    sampler = make(
        dit,
        num_prefix=num_prefix,
        sampling=sampling,
        clock=clock,
        policy=policy,
        budget=keep(5),
    )
    finished(sampler)
    assert sampler.stats.num_reused > 0
    for branch in sampler.branches.values():
        assert {cache.kv.shape[1] for cache in branch.caches} == {5 * LAYOUT.chunk_tokens}


def test_the_newest_chunks_can_be_kept_instead(dit: DiT, vanilla: Callable[[Sampling], Tensor]):
    budget = KVBudget(5, Recent(), LAYOUT)
    sampler = make(dit, budget=budget)
    recent, whole = finished(sampler), vanilla(DISTILLED)
    # the first two chunks are clean when the sixth enters and only one of them can stay
    assert torch.equal(recent[:, :4], whole[:, :4])
    assert not torch.equal(recent[:, 4:6], whole[:, 4:6])


@each_sampling
def test_no_key_is_read_before_it_is_written(dit: DiT, sampling: Sampling):
    policy = TeaCache(threshold=0.5, warmup_ticks=2)
    sampler = make(dit, sampling=sampling, policy=policy, num_chunks=5)
    for branch in sampler.branches.values():
        for cache in branch.caches:
            cache.kv.fill_(float("nan"))
    assert finished(sampler).isfinite().all()
    assert sampler.stats.num_reused > 0


def test_given_latents_stay_in_their_places_and_matter(dit: DiT):
    sampler = make(dit, num_prefix=3, num_chunks=3)
    before = sampler.latents.clone()
    assert sampler.clip.num_given == 1
    latents = finished(sampler)
    assert torch.equal(latents[:, :2], before[:, :2])
    other = make(dit, num_prefix=3, num_chunks=3)
    assert other.inputs.prefix is not None
    other.inputs.prefix[:, :2] = 0
    assert not torch.equal(finished(other)[:, 2:], latents[:, 2:])


def test_a_window_that_reaches_all_chunks_is_no_window(
    dit: DiT, vanilla: Callable[[Sampling], Tensor]
):
    wide = Clock(num_steps=8, window=4, reaches=(9, 9), clean_reach=9)
    assert torch.equal(finished(make(dit, clock=wide)), vanilla(DISTILLED))


@pytest.mark.parametrize(
    ("quantity", "is_rescaled"), [("latent_update", False), ("velocity", True), ("clean", True)]
)
def test_a_reused_step_takes_the_published_or_the_current_step_size(
    dit: DiT, quantity: Any, is_rescaled: bool
):
    sampler = make(
        dit,
        num_chunks=1,
        policy=Stride(steps=[0]),
        sampling=replace(DISTILLED, quantity=quantity),
    )
    states = [sampler.latents.clone()]
    for _ in sampler.run():
        states.append(sampler.latents.clone())
    first, second = states[1] - states[0], states[2] - states[1]
    t = sampler.timesteps
    factor = (t[2] - t[1]) / (t[1] - t[0]) if is_rescaled else 1.0
    size = states[1].abs().max().item()  # a move is a difference of latents
    assert_close(second, factor * first, ulps=16, size=size)


@each_sampling
def test_the_closed_form_flops_are_those_torch_counts(dit: DiT, sampling: Sampling):
    policy = FlowCache(threshold=0.9, warmup_steps=1)
    clock = Clock(num_steps=4, window=2, reaches=(3, 2), clean_reach=1)
    # the fused attention kernel of a CPU is left out by torch's counter
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sampler = make(
            dit, sampling=sampling, policy=policy, clock=clock, num_prefix=3, num_chunks=2
        )
        finished(sampler)
    assert sampler.stats.computed_flops == counter.get_total_flops()
    assert sampler.stats.computed_flops < sampler.stats.flops_without_reuse
    assert sampler.stats.num_reused > 0


@each_sampling
def test_chunks_computed_in_part_cost_what_torch_counts(dit: DiT, sampling: Sampling):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sampler = make(
            dit,
            sampling=sampling,
            policy=Stride(steps=[1, 2, 3, 5]),
            tokens=TopTokens("latent", 0.6, steps=[2, 3, 5], share=0.4),
            records=True,
        )
        finished(sampler)
    assert sampler.stats.computed_flops == counter.get_total_flops()
    assert sampler.stats.trace is not None
    spent = sampler.stats.trace.flops.items()
    flops = {each.tick: row.spent for each, row in spent if each.chunk == 0}
    assert flops[4] < flops[2] < flops[1]  # reused, in part, whole


@pytest.mark.parametrize("quantity", ["latent_update", "velocity", "clean"])
def test_pixels_that_are_left_out_move_as_in_a_reused_step(dit: DiT, quantity: Any):
    """At step 2, half of the pixels move as in a run that reuses the step, the others do not."""
    published = replace(DISTILLED, clean_pass=False, nearly_clean_pass=False, quantity=quantity)
    states: list[Tensor] = []
    for steps in ([1, 2], [1]):
        sampler = make(
            dit,
            num_chunks=1,
            sampling=published,
            policy=Stride(steps=steps),
            tokens=TopTokens("latent", 0.6, steps=[2], share=0.5),
        )
        for tick, _ in sampler.run():
            if tick.index in (1, 2):
                states.append(sampler.latents.clone())
    assert torch.equal(states[0], states[2])
    is_equal = (states[1] == states[3]).all(dim=0)
    assert is_equal.sum() == is_equal.numel() // 2


def test_the_planned_cache_is_the_one_allocated(dit: DiT):
    for budget, total in ((None, None), (keep(5), 5)):
        sampler = make(dit, sampling=SAMPLINGS["base"], budget=budget)
        tokens = cache_chunks(sampler.clip, total_chunks=total) * LAYOUT.chunk_tokens
        for branch in sampler.branches.values():
            assert {cache.kv.shape[1] for cache in branch.caches} == {tokens}


def test_guidance_scales_change_at_the_lower_ends_of_their_ranges():
    guidance = Guidance((0.0, 0.1, 0.3), prev_scales=(1.5, 1.2, 1.0), text_scales=(7.5, 7.0, 0.0))
    assert guidance.scales(0.0) == (1.5, 7.5)
    assert guidance.scales(0.0999) == (1.5, 7.5)
    assert guidance.scales(0.100000001) == (1.2, 7.0)
    assert guidance.scales(0.29999999) == (1.0, 0.0)
    assert guidance.scales(1.0) == (1.0, 0.0)


def record_of(sampler: ClipSampler) -> dict[str, Any]:
    return build_record(
        sampler.stats,
        sampler.stats.traced(),
        video="a.mp4",
        model="tiny",
        preset="test",
        policy="flowcache",
        threshold=0.5,
        num_steps=8,
        config={},
        environment={},
    )


@each_sampling
def test_a_replayed_record_gives_the_same_clip_bit_for_bit(dit: DiT, sampling: Sampling):
    def run(policy: ReusePolicy) -> ClipSampler:
        return make(dit, sampling=sampling, policy=policy, budget=keep(5), records=True)

    first = run(FlowCache(threshold=0.5, warmup_steps=2))
    latents, record = finished(first), record_of(first)
    assert first.stats.num_reused > 0
    again = run(replay_policies(record, segment=0, branch="all"))
    assert torch.equal(finished(again), latents)
    # the signals, which a replay does not need, are paid for whatever is decided
    saved = sum(row["flops_saved"] for row in record["decisions"])
    assert saved == again.stats.flops_without_reuse - again.stats.computed_flops > 0
    for row in record["decisions"]:
        assert (row["seconds"] is None) == (not row["computed"])
    *_, last = (row for row in record["kv"] if row["branch"] == "cond")
    assert set(last["tokens"]) > {"3", "4"}
    assert all(0 < count <= LAYOUT.chunk_tokens for count in last["tokens"].values())
    # what the budget left of the first chunks
    assert sum(last["tokens"].values()) < 5 * LAYOUT.chunk_tokens


@each_sampling
def test_observing_and_the_place_of_the_cache_change_nothing(
    dit: DiT, sampling: Sampling, vanilla: Callable[[Sampling], Tensor]
):
    seen: list[dict[str, Any]] = []
    sampler = make(
        dit,
        sampling=sampling,
        observe=lambda **row: seen.append(row),
        kv_storage=torch.device("cpu"),
    )
    assert torch.equal(finished(sampler), vanilla(sampling))
    shown = {(row["tick"], row["chunk"], row["branch"]): row for row in seen}
    assert len(shown) == len(seen)
    for each in sampler.stats.passes:
        guided = shown[each.tick, each.chunk, "guided"]
        cond = shown[each.tick, each.chunk, "cond"]
        assert guided["velocity"].shape == (4, 2, 4, 4)
        assert guided["sigma"] == cond["sigma"] == 1 - sampler.timesteps[each.step]
    passes = {row["branch"] for row in seen} - {"guided"}
    names = {"base": {"cond", "prev", "alone"}, "distilled": {"cond", "nearly_clean"}}
    assert passes == names["base"] if sampling.guidance else passes <= names["distilled"]


@pytest.mark.parametrize(
    ("name", "quantity"),
    [("base", "velocity"), ("distilled", "clean"), ("published", "latent_update")],
)
def test_nothing_but_a_decision_waits_for_the_device(dit: DiT, name: str, quantity: Any):
    """Tensors of the meta device have no values: the host can't read one."""
    meta = torch.device("meta")
    model, clip = deepcopy(dit).to(meta), Clip(32, chunk_width=2)

    def sampler(policy: ReusePolicy) -> ClipSampler:
        inputs = ClipInputs(
            clip,
            torch.empty(4, 8, 4, 4, device=meta),
            captions={chunk: torch.empty(5, 6, device=meta) for chunk in clip.generated},
            null_caption=model.null_caption[:3],
        )
        sampling = replace(
            SAMPLINGS[name],
            clock=Clock(num_steps=4, window=2),
            quantity=quantity,
            budget=keep(3),
        )
        stats = RunStats(torch.device("cpu"))
        return ClipSampler(model, inputs, sampling, reuse=Reuse(policy), stats=stats)

    stride = Stride(every=2, warmup_steps=1)
    stride.needs_signals = True  # they are made, and not looked at
    made = sampler(stride)
    assert len(list(made.run())) == made.clock.ticks(clip)[-1].index + 1
    with pytest.raises(NotImplementedError, match="meta"):  # the decision is what reads
        list(sampler(FlowCache(threshold=0.3, warmup_steps=1)).run())


# Steps in which only the pass with text is computed -----------------------------------------

HELD = Sampling(Clock(num_steps=8, window=2), BASE, is_distilled=False, quantity="velocity")


def states(sampler: ClipSampler) -> list[Tensor]:
    return [sampler.latents.clone(), *(sampler.latents.clone() for _ in sampler.run())]


def computed(sampler: ClipSampler, branch: str) -> list[int]:
    rows = [row for row in sampler.stats.passes if (row.branch, row.chunk) == (branch, 0)]
    return [row.step for row in rows if row.is_computed]


def test_what_guidance_adds_is_held_as_worked_by_hand(dit: DiT):
    """Steps 0, 1, 2, 4, 6 and the last are computed, 0 and 4 and the last one with all passes."""
    seen: dict[tuple[str, int], Tensor] = {}

    def observe(*, step: int, branch: str, velocity: Tensor, **_: Any) -> None:
        seen[branch, step] = velocity.clone()

    sampler = make(
        dit,
        num_chunks=1,
        sampling=HELD,
        policy=Stride(steps=[1, 2, 4, 6]),
        held=HeldGuidance([4]),
        observe=observe,
    )
    rows, t = states(sampler), sampler.timesteps
    full = [step for step in range(8) if ("guided", step) in seen]
    assert computed(sampler, "all") == [0, 1, 2, 4, 6, 7]
    assert computed(sampler, "guidance") == full
    # the scales change at t = 0.3: the next computed step is made with all passes, asked or not
    assert t[4] < 0.3 < t[6]
    assert full == [0, 4, 6, 7]
    velocity = added = torch.empty(0)
    for step in range(8):
        if ("cond", step) in seen:
            cond = seen["cond", step]
            added = seen["guided", step] - cond if step in full else added
            velocity = cond + added
        expected = rows[step] + (t[step + 1] - t[step]) * velocity
        assert_close(rows[step + 1], expected, ulps=64)


def test_with_all_steps_listed_it_is_vanilla(dit: DiT):
    want, found = (
        states(make(dit, num_chunks=2, sampling=HELD, held=held))
        for held in (None, HeldGuidance(range(8)))
    )
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_flops_and_record_tell_the_passes_apart(dit: DiT):
    plain, held = (
        make(dit, num_chunks=2, sampling=HELD, held=each, records=True)
        for each in (None, HeldGuidance(every=2))
    )
    finished(plain)
    finished(held)
    assert held.stats.flops_without_reuse == plain.stats.computed_flops
    assert {row.branch for row in plain.stats.passes} == {"all"}
    full = set(computed(held, "guidance"))
    assert {0, 7} <= full < set(range(8))
    assert held.stats.trace is not None
    flops = held.stats.trace.flops
    assert all(row.saved == 0 or each.branch == "guidance" for each, row in flops.items())
    saved = sum(row.saved for row in flops.values())
    assert held.stats.flops_without_reuse - held.stats.computed_flops == saved > 0


def test_a_run_with_held_guidance_is_replayed(base: Path, tmp_path: Path):
    given = ("--model", str(base), "--preset", "vanilla", "--prompt", "a cat", "--record")
    settings = ("reuse.guidance_every=2", "reuse.policy=stride", "reuse.predict=velocity")
    first, again = tmp_path / "first.mp4", tmp_path / "again.mp4"
    assert main([*given, "--out", str(first), *settings]) == 0
    record = first.with_suffix(".record.json")
    replay = [*given, "--out", str(again), "--replay", str(record)]
    assert main([*replay, *settings]) == 0
    assert np.array_equal(read_video(first)[0], read_video(again)[0])
    rows = read_record(record)["decisions"]
    spent = {
        branch: sum(row["computed"] for row in rows if row["branch"] == branch)
        for branch in ("all", "guidance")
    }
    assert 0 < spent["guidance"] < spent["all"]
    # without the setting the record says more than the run decides
    assert main(replay) == EXIT_USER_ERROR


# One Euler step, computed or predicted, against sums worked by hand ---------------------------

TIMES = (0.0, 0.1, 0.25, 0.45, 0.7, 1.0)
COMPUTED = (0, 1, 2, 4)


@pytest.mark.parametrize(("order", "factor"), [(1, 0.0), (1, 0.5), (2, 0.8)])
@pytest.mark.parametrize("quantity", ["latent_update", "velocity", "clean"])
def test_a_reused_step_follows_the_polynomial_through_the_stored_results(
    order: int, factor: float, quantity: Any
):
    """Steps 0, 1, 2 and 4 of 5 are computed; the polynomial for step 3 is numpy's."""
    draw = torch.Generator().manual_seed(0)
    velocities = torch.randn(len(COMPUTED) + 1, 2, 3, 4, generator=draw)
    latents = torch.randn(2, 3, 4, generator=draw)
    x = latents.double().numpy().copy()
    store, seen = ResultStore(factor, order=order), dict[float, Any]()
    for step, t in enumerate(TIMES[:-1]):
        size, is_computed = TIMES[step + 1] - t, step in COMPUTED
        v = velocities[step].double().numpy()
        if is_computed:
            estimates = {"latent_update": v * size, "velocity": v, "clean": x + (1 - t) * v}
            seen[1 - t] = estimates[quantity]
        else:
            last = list(seen)[-order - 1 :]
            values = np.stack([seen[at].ravel() for at in last])
            coefficients = np.polyfit(last, values, order)
            polynomial = sum(c * (1 - t) ** p for p, c in enumerate(coefficients[::-1]))
            result = (values[-1] + factor * (polynomial - values[-1])).reshape(x.shape)
            stand_ins = {
                "latent_update": result / size,
                "velocity": result,
                "clean": (result - x) / (1 - t),
            }
            v = stand_ins[quantity]
        x = x + size * v
        euler_step_(
            latents,
            velocities[step] if is_computed else None,
            chunk=0,
            t=t,
            step_size=size,
            results=store,
            quantity=quantity,
        )
        assert_close(latents, x, ulps=64)


def test_a_held_clean_estimate_is_a_held_velocity_after_euler_steps():
    draw = torch.Generator().manual_seed(1)
    start, velocity = torch.randn(2, 2, 3, 4, generator=draw)
    for quantity in ("velocity", "clean"):
        latents, store = start.clone(), ResultStore()
        for step, t in enumerate(TIMES[:-1]):
            euler_step_(
                latents,
                velocity if step == 0 else None,
                chunk=0,
                t=t,
                step_size=TIMES[step + 1] - t,
                results=store,
                quantity=quantity,
            )
        assert_close(latents, start + velocity, ulps=64)
