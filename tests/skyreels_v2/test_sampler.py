"""The laws of the denoising loop, on small models with random weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from safetensors import safe_open
from torch import Tensor

from flowcache.attention import SDPA
from flowcache.compress import CompressionStrategy, ImportanceRedundancy, Recent, TokenLayout
from flowcache.kv import Compression, KVCache, cached_attention, caches_for
from flowcache.policies import FlowCache, ReusePolicy, Stride, TeaCache, Vanilla
from flowcache.predict import Quantity
from flowcache.wan.dit import DiT, DiTConfig, embed_flops
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


# No caching ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_threshold_zero_equals_vanilla_bit_for_bit_whatever_is_reused(
    denoise: Denoise, make_dit: MakeDiT, loop: str
):
    dit, z = make_dit(), noise(5)
    runs = [
        denoise(
            dit,
            z,
            window=WINDOW,
            sampling=replace(LOOPS[loop], quantity=quantity),
            policy=policy,
        )
        for policy, quantities in (
            (Vanilla, QUANTITIES),
            (lambda: FlowCache(0.0, 1), QUANTITIES),
            (lambda: TeaCache(0.0, 1), QUANTITIES),
        )
        for quantity in quantities
    ]
    for run in runs[1:]:
        assert run.stats.num_reused == 0
        for ours, expected in zip(run.rows, runs[0].rows, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize(
    "policy", [lambda: FlowCache(9.0, 1), lambda: TeaCache(9.0, 1)], ids=["flow", "tea"]
)
def test_a_threshold_above_zero_does_reuse_and_changes_the_latents(
    denoise: Denoise, make_dit: MakeDiT, loop: str, quantity: Quantity, policy: MakePolicy
):
    dit, z = make_dit(), noise(5)
    sampling = replace(LOOPS[loop], quantity=quantity)
    run = denoise(dit, z, window=WINDOW, sampling=sampling, policy=policy)
    vanilla = denoise(dit, z, window=WINDOW, sampling=sampling)
    assert run.stats.num_reused > 0
    assert run.stats.num_reused + run.stats.num_computed == vanilla.stats.num_computed
    assert run.latents.isfinite().all()
    assert not torch.equal(run.latents, vanilla.latents)


STRATEGIES: dict[str, CompressionStrategy] = {
    "importance": ImportanceRedundancy(),
    "importance by score": ImportanceRedundancy(order="score"),
    "recent": Recent(),
}


def budget_of(strategy: str, *, chunks: int) -> Compression:
    layout = TokenLayout(FRAME_TOKENS, 2 * FRAME_TOKENS)
    budget = chunks * layout.chunk_tokens
    return Compression(
        budget, lambda q, k: STRATEGIES[strategy].keep(q, k, budget=budget, layout=layout)
    )


@pytest.mark.parametrize("clean_pass", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_ample_budget_equals_none_bit_for_bit(
    denoise: Denoise, make_dit: MakeDiT, strategy: str, clean_pass: bool
):
    dit, z, sampling = make_dit(), noise(5), replace(CAUSAL, clean_pass=clean_pass)
    free, ample, tight = (
        denoise(dit, z, window=WINDOW, sampling=sampling, compression=compression)
        for compression in (
            None,
            budget_of(strategy, chunks=3),
            budget_of(strategy, chunks=1),
        )
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
    text = torch.randn(1, dit.config.text_len, dit.config.text_dim)
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
    denoise: Denoise, make_dit: MakeDiT, num_prefix: int, lag: int
):
    """With a clean pass: waiting chunks are noise, clean ones shown at timestep 0, no cache."""
    dit, z = make_dit(), noise(8)
    window = cut_window(8, chunk_frames=2, num_prefix=num_prefix)
    sampling = replace(CLEAN, lag=lag)
    draw = torch.Generator().manual_seed(2)
    texts = {
        name: torch.randn(1, dit.config.text_len, dit.config.text_dim, generator=draw)
        for name in ("cond", "uncond")
    }
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
def test_the_reference_loop_is_reproduced(denoise: Denoise, name: str):
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
    ours = denoise(
        dit,
        z,
        window=cut_window(
            z.shape[1], chunk_frames=run["causal_block_size"], num_prefix=run["num_prefix"]
        ),
        sampling=Sampling(
            run["N"],
            run["shift"],
            run["guidance"],
            run["ar_step"],
            "causal" if is_causal else "full",
            clean_pass=is_causal,
            fps=24 if run["fps_flag"] else 16,
            addnoise=run["addnoise"],
        ),
        texts=texts,
        draw_noise=lambda _like: next(drawn),
    )
    assert_close(ours.latents, final, ulps=256)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_unstarted_chunk_is_still_its_noise_and_a_clean_one_no_longer_moves(
    denoise: Denoise, make_dit: MakeDiT, loop: str
):
    z = noise(5)
    run = denoise(make_dit(), z, window=WINDOW, sampling=LOOPS[loop])
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
def test_given_frames_are_never_changed_but_change_the_others(
    denoise: Denoise, make_dit: MakeDiT, loop: str
):
    dit, z = make_dit(), noise(8)
    window = cut_window(7, chunk_frames=3, num_prefix=1, has_end=True)
    run = denoise(dit, z, window=window, sampling=LOOPS[loop])
    for given in (0, 7):
        assert torch.equal(run.latents[:, given], z[:, given])
        other = z.clone()
        other[:, given] += 1
        changed = denoise(dit, other, window=window, sampling=LOOPS[loop])
        difference = (changed.latents - run.latents).abs().amax(dim=(0, 2, 3))
        assert difference[[f for f in range(8) if f != 7 - given]].min() > 1e-7


@pytest.mark.parametrize(("loop", "num_draws"), [("full", 12), ("causal", 2)])
def test_the_prefix_is_noised_in_every_tick_or_once_per_chunk_in_the_cache(
    denoise: Denoise, make_dit: MakeDiT, loop: str, num_draws: int
):
    """5 generated frames in chunks of 2 and lag 2 make 6 + 4 ticks; 3 given frames 2 chunks."""
    drawn: list[Tensor] = []

    def draw(like: Tensor) -> Tensor:
        drawn.append(torch.randn(like.shape, generator=torch.Generator().manual_seed(len(drawn))))
        return drawn[-1]

    window = cut_window(8, chunk_frames=2, num_prefix=3)
    sampling = replace(LOOPS[loop], addnoise=20)
    run = denoise(make_dit(), noise(8), window=window, sampling=sampling, draw_noise=draw)
    assert len(drawn) == (len(run.rows) if loop == "full" else num_draws)
    assert sum(noise.shape[1] for noise in drawn[:2]) == (6 if loop == "full" else 3)
    assert torch.equal(run.latents[:, :3], noise(8)[:, :3])
    plain = denoise(make_dit(), noise(8), window=window, sampling=LOOPS[loop])
    assert not torch.equal(plain.latents, run.latents)


# No state leaks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_a_second_window_equals_the_same_window_in_a_fresh_model(
    denoise: Denoise, make_dit: MakeDiT, loop: str
):
    settings = {
        "window": WINDOW,
        "sampling": LOOPS[loop],
        "policy": lambda: FlowCache(9.0, 1),
        "compression": budget_of("importance", chunks=1),
    }
    used, fresh = make_dit(), make_dit()
    denoise(used, noise(5, seed=5), seed=5, **settings)
    second = denoise(used, noise(5), **settings)
    alone = denoise(fresh, noise(5), **settings)
    assert torch.equal(second.latents, alone.latents)
    assert second.stats.passes == alone.stats.passes


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_clean_chunks_stored_results_are_dropped(
    denoise: Denoise, make_dit: MakeDiT, loop: str, quantity: Quantity
):
    sampling = replace(LOOPS[loop], quantity=quantity)
    policy: MakePolicy = lambda: Stride(2, warmup_steps=1)  # noqa: E731
    run = denoise(make_dit(), noise(5), window=WINDOW, sampling=sampling, policy=policy)
    kept = set(run.updates.units()).union(
        *(branch.results.units() for branch in run.branches.values())
    )
    assert {unit for unit in kept if unit >= 0} == set()


# What is computed ---------------------------------------------------------------------------------


def test_every_chunk_step_and_branch_is_recorded_once(denoise: Denoise, make_dit: MakeDiT):
    for sampling in LOOPS.values():
        run = denoise(make_dit(), noise(5), window=WINDOW, sampling=sampling)
        passes = [(p.branch, p.chunk, p.step) for p in run.stats.passes]
        assert sorted(passes) == sorted(
            (branch, chunk, step)
            for branch in ("cond", "uncond")
            for chunk in range(3)
            for step in range(6)
        )


def test_without_guidance_only_the_prompts_branch_runs(denoise: Denoise, make_dit: MakeDiT):
    dit = make_dit()
    alone = denoise(dit, noise(5), window=WINDOW, sampling=replace(CAUSAL, guidance=1.0))
    assert {p.branch for p in alone.stats.passes} == {"cond"}
    both = denoise(dit, noise(5), window=WINDOW, sampling=replace(CAUSAL, guidance=3.0))
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


def test_the_content_signal_sees_the_latents_and_the_others_the_timestep_only(
    denoise: Denoise, make_dit: MakeDiT
):
    dit = make_dit()
    for signal, depends in (("timestep", False), ("timestep_embedding", False), ("content", True)):
        sampling = replace(CAUSAL, signal=signal)
        first, second = (
            denoise(
                dit,
                noise(5, seed=seed),
                window=WINDOW,
                sampling=sampling,
                policy=lambda: FlowCache(1e-9, 1),
            )
            for seed in (1, 2)
        )
        distances = [[p.distance for p in run.stats.passes] for run in (first, second)]
        assert (distances[0] != distances[1]) is depends


def test_an_i2v_model_sees_its_condition_frame_by_frame(denoise: Denoise, make_dit: MakeDiT):
    dit = make_dit(model_type="i2v", in_dim=36, image_dim=20)
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(1, 257, 20, generator=draw)
    condition = torch.randn(20, 5, HEIGHT, WIDTH, generator=draw)
    for sampling in (FULL, CAUSAL):
        settings = {"window": WINDOW, "sampling": sampling, "image": image}
        first = denoise(dit, noise(5), condition=condition, **settings)
        other = condition.clone()
        other[:, 4] += 1
        second = denoise(dit, noise(5), condition=other, **settings)
        differs = (first.latents - second.latents).abs().amax(dim=(0, 2, 3)) > 0
        # through the cache the last chunk is invisible to the others
        assert differs.tolist() == [sampling is FULL] * 4 + [True]
