"""The laws of the denoising loop, on small models with random weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from safetensors import safe_open
from tiny_windows import (
    CAUSAL,
    CLEAN,
    FRAME_TOKENS,
    FULL,
    HEIGHT,
    LOOPS,
    QUANTITIES,
    WIDTH,
    WINDOW,
    denoise,
    kept,
    noise,
    prompts,
)
from torch import Tensor

from flowcache.attention import SDPA
from flowcache.compress import CompressionStrategy, ImportanceRedundancy, Recent
from flowcache.kv import KVCache, cached_attention, caches_for
from flowcache.policies import FlowCache, ReusePolicy, Stride, TeaCache, Vanilla
from flowcache.predict import Quantity
from flowcache.wan.dit import DiT, DiTConfig, embed_flops
from flowcache.wan.unipc import UniPC, timestep_grid
from skyreels_v2.sampler import Sampling
from skyreels_v2.window import cut_window

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]
GOLDEN = Path(__file__).parents[1] / "golden" / "skyreels_v2"


# No caching ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_threshold_zero_equals_vanilla_bit_for_bit_whatever_is_reused(make_dit: MakeDiT, loop: str):
    dit = make_dit()
    runs = [
        denoise(dit, sampling=replace(LOOPS[loop], quantity=quantity), policy=policy)
        for policy in (Vanilla, partial(FlowCache, 0.0, 1), partial(TeaCache, 0.0, 1))
        for quantity in QUANTITIES
    ]
    for run in runs[1:]:
        assert run.stats.num_reused == 0
        for ours, expected in zip(run.rows, runs[0].rows, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("policy", [FlowCache, TeaCache])
def test_a_threshold_above_zero_does_reuse_and_changes_the_latents(
    make_dit: MakeDiT, loop: str, quantity: Quantity, policy: Callable[..., ReusePolicy]
):
    dit, sampling = make_dit(), replace(LOOPS[loop], quantity=quantity)
    run = denoise(dit, sampling=sampling, policy=partial(policy, 9.0, 1))
    vanilla = denoise(dit, sampling=sampling)
    assert run.stats.num_reused > 0
    assert run.stats.num_reused + run.stats.num_computed == vanilla.stats.num_computed
    assert run.latents.isfinite().all()
    assert not torch.equal(run.latents, vanilla.latents)


@pytest.mark.parametrize("sampling", [CAUSAL, CLEAN], ids=["causal", "clean pass"])
@pytest.mark.parametrize(
    "strategy", [ImportanceRedundancy(), ImportanceRedundancy(order="score"), Recent()], ids=repr
)
def test_an_ample_budget_equals_none_bit_for_bit(
    make_dit: MakeDiT, strategy: CompressionStrategy, sampling: Sampling
):
    dit = make_dit()
    free, ample, tight = (
        denoise(dit, sampling=sampling, compression=compression)
        for compression in (None, kept(strategy, chunks=3), kept(strategy))
    )
    assert torch.equal(free.latents, ample.latents)
    assert not torch.equal(free.latents, tight.latents)
    assert max(cache.clean for cache in free.branches["cond"].caches) == 5 * FRAME_TOKENS
    # one kept chunk, and the chunks that became clean after the last computed one
    assert max(cache.clean for cache in tight.branches["cond"].caches) < 5 * FRAME_TOKENS


# Chunk by chunk -----------------------------------------------------------------------------------


def test_clean_chunks_in_the_cache_equal_one_block_causal_forward(make_dit: MakeDiT):
    """Chunks 0 and 1 clean at timestep 0, then chunk 2 at its own noise level."""
    dit = make_dit(inject_sample_info=True)
    x, bounds = noise(7).unsqueeze(0), [(0, 2), (2, 4), (4, 7)]
    t = torch.tensor([[0, 0, 0, 0, 700, 700, 700]])
    text = prompts(dit)["cond"]
    expected = dit(x, t, text, causal_chunks=bounds)
    caches = caches_for(
        dit.config.num_layers,
        capacity=7 * FRAME_TOKENS,
        num_heads=dit.config.num_heads,
        head_width=dit.config.head_width,
        dtype=torch.float32,
        device=x.device,
    )
    context = dit.encode_context(text)
    for start, stop in bounds:
        velocity = forward_chunk(dit, x, t, context, caches, start=start, stop=stop)
        assert_close(velocity, expected[:, :, start:stop], ulps=64)
        for cache in caches:
            cache.settle((stop - start) * FRAME_TOKENS)


def forward_chunk(
    dit: DiT,
    x: Tensor,
    t: Tensor,
    context: list[Any],
    caches: list[KVCache],
    *,
    start: int,
    stop: int,
) -> Tensor:
    part = dit.embed(x[:, :, start:stop], t[:, start:stop], fps=[24])
    rope = dit.rope(torch.arange(start, stop), latent_height=HEIGHT, latent_width=WIDTH)
    attend = cached_attention([caches], active=[range(len(rope))], kernel=SDPA)
    hidden = dit.run_blocks(part, rope, context, self_attend=attend)
    return dit.velocity(hidden, part, latent_height=HEIGHT, latent_width=WIDTH)


@pytest.mark.parametrize("lag", [0, 2, 6])
@pytest.mark.parametrize("num_prefix", [0, 3])
def test_the_causal_loop_equals_forwards_of_the_whole_window(
    make_dit: MakeDiT, num_prefix: int, lag: int
):
    """With a clean pass: waiting chunks are noise, clean ones shown at timestep 0, no cache."""
    dit, z, sampling = make_dit(), noise(8), replace(CLEAN, lag=lag)
    window, texts = cut_window(8, chunk_frames=2, num_prefix=num_prefix), prompts(dit)
    ours = denoise(dit, z, window=window, sampling=sampling, texts=texts)
    timesteps, _ = timestep_grid(sampling.num_steps, shift=sampling.shift)
    solvers = {c: UniPC(sampling.num_steps, shift=sampling.shift) for c in window.generated}
    bounds = [(chunk.start, chunk.stop) for chunk in window.chunks]
    clean, moving = set(range(window.num_given)), z.clone()
    for tick, row in zip(sampling.ticks(window), ours.rows, strict=True):
        levels = [
            0 if c in clean else timesteps[tick.steps[c]] if c in tick.steps else 999
            for c in range(len(window.chunks))
        ]
        t = torch.tensor(
            [[level for level, own in zip(levels, window.chunks, strict=True) for _ in own]]
        )
        v = {
            name: dit(moving.unsqueeze(0), t, text, causal_chunks=bounds)[0]
            for name, text in texts.items()
        }
        guided = v["uncond"] + sampling.guidance * (v["cond"] - v["uncond"])
        for chunk in tick.steps:
            own = slice(*bounds[chunk])
            solvers[chunk].advance_(moving[:, own], velocity=guided[:, own])
        clean.update(tick.finishing)
        assert_close(row, moving, ulps=256)


@pytest.mark.parametrize("name", ["async_causal", "prefix_async_causal", "prefix_addnoise"])
def test_the_reference_loop_is_reproduced(name: str):
    with safe_open(GOLDEN / "df_loop.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
        weights = {
            key.removeprefix("weights."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
            if key.startswith("weights.")
        }
        texts = {n: file.get_tensor(f"in.context_{n}") for n in ("cond", "uncond")}
        run = next(run for run in case["runs"] if run["name"] == name)
        z, final = file.get_tensor(f"{name}.noise"), file.get_tensor(f"{name}.final")
        if run["num_prefix"]:
            z[:, : run["num_prefix"]] = file.get_tensor(f"{name}.prefix")
        drawn = iter(file.get_tensor(f"{name}.condition_noise") if run["addnoise"] else ())
    dit = DiT(DiTConfig(**case["config"]))
    dit.load_state_dict(weights)
    is_causal = bool(run["causal_mask_block"])
    window = cut_window(
        z.shape[1], chunk_frames=run["causal_block_size"], num_prefix=run["num_prefix"]
    )
    sampling = Sampling(
        run["N"],
        run["shift"],
        run["guidance"],
        run["ar_step"],
        "causal" if is_causal else "full",
        clean_pass=is_causal,
        fps=24 if run["fps_flag"] else 16,
        addnoise=run["addnoise"],
    )
    draw = {"draw_noise": lambda _like: next(drawn)}
    ours = denoise(dit, z, window=window, sampling=sampling, texts=texts, **draw)
    assert_close(ours.latents, final, ulps=256)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_unstarted_chunk_is_still_its_noise_and_a_clean_one_no_longer_moves(
    make_dit: MakeDiT, loop: str
):
    z, run = noise(), denoise(make_dit(), sampling=LOOPS[loop])
    for tick, row in zip(LOOPS[loop].ticks(WINDOW), run.rows, strict=True):
        for chunk, own in enumerate(WINDOW.chunks):
            frames = slice(own.start, own.stop)
            first, last = 2 * chunk, 2 * chunk + 5
            if tick.index < first:
                assert torch.equal(row[:, frames], z[:, frames])
            elif tick.index >= last:
                assert torch.equal(row[:, frames], run.latents[:, frames])
            else:
                assert not torch.equal(row[:, frames], z[:, frames])


@pytest.mark.parametrize("loop", LOOPS)
def test_given_frames_are_never_changed_but_change_the_others(make_dit: MakeDiT, loop: str):
    dit, z, sampling = make_dit(), noise(8), LOOPS[loop]
    window = cut_window(7, chunk_frames=3, num_prefix=1, has_end=True)
    run = denoise(dit, z, window=window, sampling=sampling)
    for given in (0, 7):
        assert torch.equal(run.latents[:, given], z[:, given])
        other = z.clone()
        other[:, given] += 1
        changed = denoise(dit, other, window=window, sampling=sampling)
        difference = (changed.latents - run.latents).abs().amax(dim=(0, 2, 3))
        assert difference[[f for f in range(8) if f != 7 - given]].min() > 1e-7


@pytest.mark.parametrize(("loop", "num_draws"), [("full", 10), ("causal", 2)])
def test_the_prefix_is_noised_in_every_tick_or_once_per_chunk_in_the_cache(
    make_dit: MakeDiT, loop: str, num_draws: int
):
    """5 generated frames in chunks of 2 and lag 2 make 6 + 4 ticks; 3 given frames 2 chunks."""
    drawn: list[Tensor] = []

    def draw(like: Tensor) -> Tensor:
        drawn.append(torch.randn(like.shape, generator=torch.Generator().manual_seed(len(drawn))))
        return drawn[-1]

    settings = {"window": cut_window(8, chunk_frames=2, num_prefix=3)}
    noisy = replace(LOOPS[loop], addnoise=20)
    run = denoise(make_dit(), noise(8), sampling=noisy, draw_noise=draw, **settings)
    assert len(drawn) == num_draws
    assert sum(noise.shape[1] for noise in drawn[:2]) == (6 if loop == "full" else 3)
    assert torch.equal(run.latents[:, :3], noise(8)[:, :3])
    plain = denoise(make_dit(), noise(8), sampling=LOOPS[loop], **settings)
    assert not torch.equal(plain.latents, run.latents)


# No state leaks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_a_second_window_equals_the_same_window_in_a_fresh_model(make_dit: MakeDiT, loop: str):
    settings = {
        "sampling": LOOPS[loop],
        "policy": partial(FlowCache, 9.0, 1),
        "compression": kept(ImportanceRedundancy()),
    }
    used = make_dit()
    denoise(used, noise(seed=5), seed=5, **settings)
    second, alone = (denoise(dit, **settings) for dit in (used, make_dit()))
    assert torch.equal(second.latents, alone.latents)
    assert second.stats.passes == alone.stats.passes


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_clean_chunks_stored_results_are_dropped(
    make_dit: MakeDiT, loop: str, quantity: Quantity
):
    sampling = replace(LOOPS[loop], quantity=quantity)
    run = denoise(make_dit(), sampling=sampling, policy=partial(Stride, 2, warmup_steps=1))
    stores = [run.updates, *(branch.results for branch in run.branches.values())]
    assert not [unit for store in stores for unit in store.units() if unit >= 0]


# What is computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_every_chunk_step_and_branch_is_recorded_once(make_dit: MakeDiT, loop: str):
    run = denoise(make_dit(), sampling=LOOPS[loop])
    assert sorted((p.branch, p.chunk, p.step) for p in run.stats.passes) == sorted(
        (branch, chunk, step)
        for branch in ("cond", "uncond")
        for chunk in range(3)
        for step in range(6)
    )


def test_without_guidance_only_the_prompts_branch_runs(make_dit: MakeDiT):
    dit = make_dit()
    alone, both = (denoise(dit, sampling=replace(CAUSAL, guidance=scale)) for scale in (1.0, 3.0))
    assert {p.branch for p in alone.stats.passes} == {"cond"}
    # both branches share one embedding
    embedding = sum(
        embed_flops(
            dit.config,
            num_frames=sum(len(WINDOW.chunks[chunk]) for chunk in tick.steps),
            frame_tokens=FRAME_TOKENS,
        )
        for tick in CAUSAL.ticks(WINDOW)
    )
    assert both.stats.computed_flops == 2 * alone.stats.computed_flops - embedding


@pytest.mark.parametrize(
    ("signal", "sees_latents"),
    [("timestep", False), ("timestep_embedding", False), ("content", True)],
)
def test_the_content_signal_sees_the_latents_and_the_others_the_timestep_only(
    make_dit: MakeDiT, signal: Any, sees_latents: bool
):
    dit, settings = make_dit(), {"sampling": replace(CAUSAL, signal=signal)}
    first, second = (
        denoise(dit, noise(seed=seed), policy=partial(FlowCache, 1e-9, 1), **settings)
        for seed in (1, 2)
    )
    distances = [[p.distance for p in run.stats.passes] for run in (first, second)]
    assert (distances[0] != distances[1]) is sees_latents


@pytest.mark.parametrize("sampling", [FULL, CAUSAL], ids=["full", "causal"])
def test_an_i2v_model_sees_its_condition_frame_by_frame(make_dit: MakeDiT, sampling: Sampling):
    dit = make_dit(model_type="i2v", in_dim=36, image_dim=20)
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(1, 257, 20, generator=draw)
    condition = torch.randn(20, 5, HEIGHT, WIDTH, generator=draw)
    other = condition.clone()
    other[:, 4] += 1
    first, second = (
        denoise(dit, condition=given, sampling=sampling, image=image).latents
        for given in (condition, other)
    )
    differs = (first - second).abs().amax(dim=(0, 2, 3)) > 0
    # through the cache the last chunk is invisible to the others
    assert differs.tolist() == [sampling is FULL] * 4 + [True]
