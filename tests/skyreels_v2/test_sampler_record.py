"""What a run tells about itself: its record, its replay, the velocities it shows."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache.compress import ImportanceRedundancy, TokenLayout
from flowcache.kv import Compression
from flowcache.policies import FlowCache
from flowcache.predict import Quantity
from flowcache.runtime.record import build_record, replay_policies
from flowcache.runtime.stats import RunStats
from flowcache.wan.dit import DiT
from skyreels_v2.sampler import Sampling
from skyreels_v2.window import cut_window

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]
Denoise = Callable[..., Any]
"""`denoise_window` of conftest.py"""

FRAME_TOKENS = 6
FULL = Sampling(6, 8.0, 3.0, 2, "full", clean_pass=False, fps=24, signal="content")
LOOPS = {
    "full": FULL,
    "causal": replace(FULL, attention="causal"),
    "causal with clean pass": replace(FULL, attention="causal", clean_pass=True),
}
WINDOW = cut_window(6, chunk_frames=2)
QUANTITIES: tuple[Quantity, ...] = ("residual", "latent_update")
LAYOUT = TokenLayout(FRAME_TOKENS, 2 * FRAME_TOKENS)
TIGHT = Compression(
    LAYOUT.chunk_tokens,
    partial(ImportanceRedundancy().keep, budget=LAYOUT.chunk_tokens, layout=LAYOUT),
)


def noise() -> Tensor:
    return torch.randn(16, 6, 4, 6, generator=torch.Generator().manual_seed(1))


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


def flowcache_run(denoise: Denoise, dit: DiT, loop: str, **changes: Any) -> Any:
    return denoise(
        dit,
        noise(),
        window=WINDOW,
        policy=lambda: FlowCache(0.3, 1),
        compression=None if loop == "full" else TIGHT,
        records=True,
        **{"sampling": LOOPS[loop], **changes},
    )


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_replayed_record_gives_the_same_latents_bit_for_bit(
    denoise: Denoise, make_dit: MakeDiT, loop: str, quantity: Quantity
):
    dit, sampling = make_dit(), replace(LOOPS[loop], quantity=quantity)
    first = flowcache_run(denoise, dit, loop, sampling=sampling)
    assert first.stats.num_reused > 0
    record = record_of(first.stats)
    again = flowcache_run(
        denoise,
        dit,
        loop,
        sampling=sampling,
        policies={b: replay_policies(record, segment=0, branch=b) for b in ("cond", "uncond")},
    )
    assert torch.equal(first.latents, again.latents)
    for row, old in zip(record_of(again.stats)["decisions"], record["decisions"], strict=True):
        assert all(row[name] == old[name] for name in ("tick", "chunk", "branch", "computed"))


@pytest.mark.parametrize("loop", LOOPS)
def test_the_record_accounts_for_every_pass(denoise: Denoise, make_dit: MakeDiT, loop: str):
    stats = flowcache_run(denoise, make_dit(), loop).stats
    record = record_of(stats)
    saved = sum(row["flops_saved"] for row in record["decisions"])
    assert saved == stats.flops_without_reuse - stats.computed_flops > 0
    for row in record["decisions"]:
        assert (row["seconds"] is None) == (not row["computed"])
        assert row["flops"] > 0
    assert len(record["ticks"]) == len(LOOPS[loop].ticks(WINDOW))
    tokens = [row for row in record["kv"] if row["branch"] == "cond"]
    assert len(tokens) == (0 if loop == "full" else len(record["ticks"]))
    if tokens:
        # before the last chunk is clean, what is kept of the others is the budget or newly clean
        assert list(tokens[0]["tokens"]) == []
        assert set(tokens[-1]["tokens"]) == {"0", "1", "2"}
        assert tokens[-1]["tokens"]["2"] == LAYOUT.chunk_tokens
        assert tokens[-1]["tokens"]["0"] < LAYOUT.chunk_tokens


@pytest.mark.parametrize("loop", LOOPS)
def test_recording_observing_and_the_place_of_the_cache_change_nothing(
    denoise: Denoise, make_dit: MakeDiT, loop: str
):
    dit = make_dit()
    plain = denoise(
        dit,
        noise(),
        window=WINDOW,
        sampling=LOOPS[loop],
        policy=lambda: FlowCache(0.3, 1),
        compression=None if loop == "full" else TIGHT,
    )
    seen: list[dict[str, Any]] = []
    watched = flowcache_run(
        denoise,
        dit,
        loop,
        observe=lambda **row: seen.append(row),
        storage=torch.device("cpu"),
    )
    assert torch.equal(plain.latents, watched.latents)
    assert plain.stats.trace is None
    shown = {(row["tick"], row["chunk"], row["branch"]): row for row in seen}
    computed = {(p.tick, p.chunk, p.branch) for p in watched.stats.passes if p.is_computed}
    assert {key for key in shown if key[2] != "guided"} == computed
    both = {k[:2] for k in computed if {(*k[:2], "cond"), (*k[:2], "uncond")} <= computed}
    assert {key[:2] for key in shown if key[2] == "guided"} == both
    for tick, chunk in both:
        cond, uncond, guided = (
            shown[tick, chunk, branch] for branch in ("cond", "uncond", "guided")
        )
        assert guided["velocity"].shape == (16, 2, 4, 6)
        assert guided["sigma"] == cond["sigma"]
        expected = uncond["velocity"] + 3.0 * (cond["velocity"] - uncond["velocity"])
        assert torch.equal(guided["velocity"], expected)
