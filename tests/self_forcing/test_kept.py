"""Clean tokens that stay by a strategy: the same window in other words, flat memory, its cost."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowcache.compress import STRATEGIES, KVRule, TokenLayout
from flowcache.kv import caches_for
from flowcache.kv_quantized import KVLayout, KVSizes, Rotary, cache_maker
from flowcache.quantization import KVFormat
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats
from flowcache.wan.dit import DiT, rotate
from flowcache.wan.flow_match import levels_of
from flowcache.wan.kept import Budget, KeptKeys
from self_forcing.sampler import Sampler, Sampling

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]
MakeSampler = Callable[..., Sampler]
Denoise = Callable[..., Tensor]

FEW = Sampling(steps=levels_of(5.0).warped([1000, 500]))
MANY = Sampling(steps=(), num_steps=3, guidance=3.0)
LAYOUT = TokenLayout(frame_tokens=6, chunk_tokens=18)
"""Of the tiny latents, in chunks of three frames."""
CLASSES = ("dummy_forcing", "forcing_kv")
CHOOSING = [name for name in STRATEGIES if name != "none"]


def kept_by(
    name: str, sampling: Sampling = FEW, *, window: int = 9, rotates: bool = True, **rule: Any
) -> Sampling:
    """Return a loop in which a strategy says what stays next to chunks of three frames."""
    budget = Budget.of(
        KVRule(compress=name, **rule),
        window=None if name in CLASSES else window,
        layout=LAYOUT,
        rotates=rotates,
    )
    return replace(sampling, budget=budget, is_relative=rotates)


@pytest.mark.parametrize("rotates", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("sampling", [FEW, MANY], ids=["few", "many"])
def test_a_window_is_the_same_by_its_name(
    make_dit: MakeDiT, denoise: Denoise, sampling: Sampling, rotates: bool
):
    dit = make_dit()
    for name, sink in (("window", 0), ("sink_recent", 1)):
        plain = replace(sampling, window=6, sink=sink, is_relative=rotates)
        named = kept_by(name, sampling, window=6, rotates=rotates)
        found = denoise(dit, named, num_frames=12, size=3, kv_frames=6)
        expected = denoise(dit, plain, num_frames=12, size=3)
        if rotates:
            assert_close(found, expected, ulps=64)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [name for name in CHOOSING if name not in CLASSES])
def test_a_strategy_that_may_keep_all_changes_nothing(
    make_dit: MakeDiT, denoise: Denoise, name: str
):
    dit = make_dit()
    expected = denoise(dit, replace(FEW, is_relative=True), num_frames=12, size=3)
    found = denoise(dit, kept_by(name, window=12, recent_frames=2), num_frames=12, size=3)
    assert_close(found, expected, ulps=64)


@pytest.mark.parametrize("name", CHOOSING)
def test_memory_and_cost_stay_flat_however_long_the_video(
    make_dit: MakeDiT, make_sampler: MakeSampler, name: str
):
    dit, stats = make_dit(), RunStats(torch.device("cpu"))
    sampling = kept_by(name, recent_frames=2)
    sampler = make_sampler(dit, sampling, num_frames=90, size=3, kv_frames=9, stats=stats)
    num_bytes, costs = list[int](), list[int]()
    for tick, _ in sampler.denoise():
        if tick.finishing:
            num_bytes.append(sampler.cached.kv_bytes)
            costs.append(stats.computed_flops)
    assert sampler.latents.isfinite().all()
    per_chunk = [after - before for before, after in itertools.pairwise(costs)]
    assert len(set(per_chunk[5:-1])) == 1
    assert len(set(num_bytes[3:])) == 1
    whole = 2 * 9 * 6 * dit.config.dim * dit.config.num_layers * 4  # keys and values of a window
    assert num_bytes[-1] <= whole
    if name in CLASSES:
        assert num_bytes[-1] < 0.75 * whole


@pytest.mark.parametrize("loop", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("name", ["window", "sink_recent", "recent", "deep_forcing", "density"])
def test_what_stays_costs_what_torch_counts(
    make_dit: MakeDiT, make_sampler: MakeSampler, name: str, loop: Sampling
):
    dit, stats = make_dit(), RunStats(torch.device("cpu"))
    sampling = kept_by(name, loop, recent_frames=2)
    sampler = make_sampler(dit, sampling, num_frames=18, size=3, kv_frames=9, stats=stats)
    before = stats.computed_flops
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for _ in sampler.denoise():
            pass
    assert stats.computed_flops - before == counter.get_total_flops()


def test_half_of_the_heads_cost_less_with_dummy_forcing(
    make_dit: MakeDiT, make_sampler: MakeSampler
):
    dit = make_dit(dim=48, num_heads=4)
    sampler = make_sampler(dit, kept_by("dummy_forcing"), num_frames=15, size=3, kv_frames=6)
    list(sampler.denoise())
    (kept,) = sampler.cached.kept.values()
    heads = [each for layer in kept.layers for each in layer]
    counts = dict.fromkeys(range(3), 0)
    for each in heads:
        assert each.index is not None
        counts[each.kind] += len(each.index)
        assert each.cache.clean == (18 if each.kind == 2 else 6)
    assert counts[0] == 4  # of 2 layers of 4 heads
    assert sum(counts.values()) == 8


@pytest.mark.parametrize("name", CHOOSING)
def test_both_branches_of_guidance_keep_tokens_of_their_own(
    make_dit: MakeDiT, denoise: Denoise, name: str
):
    sampling = kept_by(name, MANY, recent_frames=2)
    found = denoise(make_dit(), sampling, num_frames=15, size=3, kv_frames=9)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("name", "rotates"),
    [
        (name, rotates)
        for name in CHOOSING
        for rotates in (False, True)
        if name not in CLASSES and (rotates or name != "density")
    ],
)
def test_attention_to_kept_keys_in_eight_bits_is_nearly_that_in_thirty_two(
    make_dit: MakeDiT, name: str, rotates: bool
):
    dit, budget = make_dit(), kept_by(name, rotates=rotates, recent_frames=2).budget
    assert budget is not None
    table = dit.rope(torch.arange(15), latent_height=4, latent_width=6)

    def outputs(dtype: str | None) -> Tensor:
        made = None if dtype is None else KVFormat(dtype, "token", 16, bias_correction=True)
        sizes = None if made is None else KVSizes(made, 18, 18, 5)
        starts = {chunk: 18 * chunk for chunk in range(5)}
        rotary = None if rotates else Rotary(table, rotate, has_neighbours=True)
        caches = caches_for(
            1,
            capacity=budget.held_tokens,
            num_heads=2,
            head_width=16,
            dtype=torch.float32,
            device=torch.device("cpu"),
            make=cache_maker(None if sizes is None else KVLayout(sizes, starts, rotary)),
        )
        kept = KeptKeys(dit, budget, caches=caches, ranks=Ranks(), size=(4, 6))
        draw, seen = torch.Generator().manual_seed(0), list[Tensor]()
        for chunk in range(5):
            q, k, v = torch.randn(3, 1, 18, 2, 16, generator=draw)
            k[..., 2:4] += 3
            if not rotates:
                rope = table[18 * chunk : 18 * (chunk + 1)]
                q, k = rotate(q, rope), rotate(k, rope)
            seen.append(kept.attend(18, is_clean=True)(0, q, k, v))
            kept.settle(18, chunk=chunk)
        return torch.cat(seen)

    plain = outputs(None)
    # the mean: scores that are nearly equal may let another token stay
    near, far = ((outputs(dtype) - plain).abs().mean() for dtype in ("int8", "int2"))
    assert 0 < near < 0.02 * plain.abs().mean() < far


def test_kept_tokens_stand_one_behind_the_other_at_their_own_row_and_column(make_dit: MakeDiT):
    """Of two frames head 0 keeps the first three tokens of each, head 1 every second token."""
    dit, size = make_dit(), (4, 6)
    budget = Budget.of(KVRule(compress="window"), window=5, layout=LAYOUT, rotates=True)
    assert budget is not None
    caches = caches_for(
        1,
        capacity=30,
        num_heads=2,
        head_width=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    kept = KeptKeys(dit, budget, caches=caches, ranks=Ranks(), size=size)
    (heads,) = kept.layers[0]
    k = torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(0))
    heads.cache.put(0, k, k)
    kept.settle(12, chunk=0)
    chosen = torch.tensor([[0, 1, 2, 6, 7, 8], [0, 2, 4, 6, 8, 10]]).transpose(0, 1)
    kept._keep(heads, chosen)
    _, found = kept._rotated(heads, torch.zeros(6, 2, 16), heads.cache.prefix(0)[0])
    table = dit.rope(torch.arange(1), latent_height=4, latent_width=6)  # all six are frame 0 now
    for head in (0, 1):
        own = k[chosen[:, head], head][None, :, None]
        expected = rotate(own, table[chosen[:, head] % 6])[0, :, 0]
        assert_close(found[:, head], expected, ulps=4)
