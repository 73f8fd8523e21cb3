"""Steps in which only the pass with text is computed, on a small model with random weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.errors import UserError
from flowcache.policies import ReusePolicy, Stride, Vanilla
from flowcache.predict import HeldGuidance
from flowcache.runtime.ending import EXIT_USER_ERROR
from flowcache.runtime.record import read_record
from flowcache.runtime.stats import RunStats
from flowcache.runtime.video import read_video
from magi1.__main__ import main
from magi1.dit import DiT
from magi1.sampler import ClipInputs, ClipSampler, Guidance, Reuse, Sampling
from magi1.schedule import Clip, Clock

pytestmark = pytest.mark.numeric

NUM_STEPS = 8
PASSES = ("all", "guidance")
GUIDANCE = Guidance((0.0, 0.3), prev_scales=(1.5, 1.0), text_scales=(7.5, 0.0))
BASE = Sampling(
    Clock(num_steps=NUM_STEPS, window=2), GUIDANCE, is_distilled=False, quantity="velocity"
)


@dataclass
class Seen:
    """The velocities that a sampler shows."""

    velocities: dict[tuple[str, int, int], Tensor]

    def __call__(
        self, *, chunk: int, step: int, branch: str, velocity: Tensor, **_place: Any
    ) -> None:
        self.velocities[branch, chunk, step] = velocity.clone()


def make(
    dit: DiT,
    *,
    policy: ReusePolicy | None = None,
    held: HeldGuidance | None = None,
    num_chunks: int = 2,
    observe: Any = None,
) -> ClipSampler:
    clip = Clip(8 * num_chunks, num_prefix=0, chunk_width=2)
    draw = torch.Generator().manual_seed(1)
    text = torch.randn(5, 6, generator=draw)
    inputs = ClipInputs(
        clip,
        torch.randn(4, 2 * num_chunks, 4, 4, generator=draw),
        captions=dict.fromkeys(clip.generated, text),
        null_caption=dit.null_caption[:3],
    )
    return ClipSampler(
        dit,
        inputs,
        BASE,
        reuse=Reuse(policy or Vanilla(), held_guidance=held or HeldGuidance()),
        stats=RunStats(torch.device("cpu"), records=True),
        observe=observe,
    )


def states(sampler: ClipSampler) -> Iterator[Tensor]:
    yield sampler.latents.clone()
    for _ in sampler.run():
        yield sampler.latents.clone()


def computed(sampler: ClipSampler, branch: str) -> list[int]:
    rows = [row for row in sampler.stats.passes if (row.branch, row.chunk) == (branch, 0)]
    return [row.step for row in rows if row.is_computed]


def test_what_guidance_adds_is_held_as_worked_by_hand(dit: DiT):
    """Steps 0, 1, 2, 4, 6 and the last are computed, 0 and 4 and the last one with all passes."""
    seen = Seen({})
    policy = Stride(steps=[1, 2, 4, 6])
    sampler = make(dit, policy=policy, held=HeldGuidance([4]), num_chunks=1, observe=seen)
    rows = list(states(sampler))
    t = sampler.timesteps
    full = [step for step in range(NUM_STEPS) if ("guided", 0, step) in seen.velocities]
    assert computed(sampler, "all") == [0, 1, 2, 4, 6, 7]
    assert computed(sampler, "guidance") == full
    # the scales change at t = 0.3: the next computed step is made with all passes, asked or not
    assert t[4] < 0.3 < t[6]
    assert full == [0, 4, 6, 7]
    velocity = added = torch.empty(0)
    for step in range(NUM_STEPS):
        if ("cond", 0, step) in seen.velocities:
            cond = seen.velocities["cond", 0, step]
            if step in full:
                added = seen.velocities["guided", 0, step] - cond
            velocity = cond + added
        expected = rows[step] + (t[step + 1] - t[step]) * velocity
        assert_close(rows[step + 1], expected, ulps=64)


def test_with_all_steps_listed_it_is_vanilla(dit: DiT):
    want = list(states(make(dit)))
    found = list(states(make(dit, held=HeldGuidance(range(NUM_STEPS)))))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_flops_and_record_tell_the_passes_apart(dit: DiT):
    plain, held = make(dit), make(dit, held=HeldGuidance(every=2))
    for sampler in (plain, held):
        list(states(sampler))
    assert held.stats.flops_without_reuse == plain.stats.computed_flops
    assert {row.branch for row in plain.stats.passes} == {"all"}
    full = set(computed(held, "guidance"))
    assert {0, NUM_STEPS - 1} <= full < set(range(NUM_STEPS))
    assert held.stats.trace is not None
    saved = 0
    for each, flops in held.stats.trace.flops.items():
        assert flops.saved == 0 or each.branch == "guidance"
        saved += flops.saved
    assert held.stats.flops_without_reuse - held.stats.computed_flops == saved > 0


def test_a_distilled_model_has_no_guidance_to_hold(configure: Callable[..., Any]):
    with pytest.raises(UserError, match=r"this run has that one pass only .a distilled model"):
        configure("base", "reuse.guidance_every=2")
    assert configure("base", "reuse.guidance_every=2", model="4.5B_base").reuse.guidance_every == 2


def test_a_run_with_held_guidance_is_replayed(base: Path, tmp_path: Path):
    given = ("--model", str(base), "--preset", "vanilla", "--prompt", "a cat", "--record")
    settings = ("reuse.guidance_every=2", "reuse.policy=stride", "reuse.predict=velocity")
    first, again = tmp_path / "first.mp4", tmp_path / "again.mp4"
    assert main([*given, "--out", str(first), *settings]) == 0
    record = str(first.with_suffix(".record.json"))
    assert main([*given, "--out", str(again), *settings, "--replay", record]) == 0
    assert np.array_equal(read_video(first)[0], read_video(again)[0])
    rows = read_record(first.with_suffix(".record.json"))["decisions"]
    spent = {branch: sum(r["computed"] for r in rows if r["branch"] == branch) for branch in PASSES}
    assert 0 < spent["guidance"] < spent["all"]
    # without the setting the record says more than the run decides
    assert main([*given, "--out", str(again), "--replay", record]) == EXIT_USER_ERROR
