"""What holds of the three loops whatever the weights are."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowcache.runtime.stats import RunStats
from flowcache.wan.dit import DiT
from flowcache.wan.flow_match import levels_of
from flowcache.wan.rounded import RoundedDiT
from self_forcing.sampler import Sampler, Sampling

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]
MakeSampler = Callable[..., Sampler]
Denoise = Callable[..., Tensor]

FEW = Sampling(steps=levels_of(5.0).warped([1000, 750, 500, 250]))
MANY = Sampling(steps=(), num_steps=4, guidance=3.0)
ROLLING = replace(FEW, is_rolling=True, window=21)
RELATIVE = replace(FEW, is_relative=True)
LOOPS = {"few": FEW, "many": MANY, "rolling": ROLLING, "relative": RELATIVE}


def test_chunks_after_clean_passes_equal_one_forward_under_the_mask_of_training(
    make_dit: MakeDiT, make_sampler: MakeSampler
):
    """Clean chunks at timestep 0 see what came before; the noisy one sees them and itself."""
    dit = make_dit()
    sampler = make_sampler(dit, FEW, num_frames=9, size=3)
    for chunk in (0, 1):
        sampler.feed_clean(chunk, timestep=0)
    tick = FEW.ticks(range(2, 3))[0]
    found = sampler._velocities(tick, {2: 937.5})["cond"]
    (branch,) = sampler.cached.own.values()
    x, times = sampler.latents.unsqueeze(0), torch.tensor([[0.0] * 6 + [937.5] * 3])
    embedded = dit.embed(x, times, fps=[16])
    rope = dit.rope(torch.arange(9), latent_height=4, latent_width=6)

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            dit.kernel(q[:, a:b], k[:, :b], v[:, :b]) for a, b in ((0, 18), (18, 36), (36, 54))
        ]
        return torch.cat(parts, dim=1)

    hidden = dit.run_blocks(embedded, rope, branch.context, self_attend=attend)
    whole = dit.velocity(hidden, embedded, latent_height=4, latent_width=6)[0, :, 6:]
    assert_close(found, whole, ulps=64)


@pytest.mark.parametrize("sampling", [FEW, MANY], ids=["few", "many"])
def test_a_window_as_long_as_the_video_changes_nothing(
    make_dit: MakeDiT, denoise: Denoise, sampling: Sampling
):
    dit = make_dit()
    whole = denoise(dit, sampling, num_frames=9, size=3)
    windowed = replace(sampling, window=9, sink=2)
    assert torch.equal(denoise(dit, windowed, num_frames=9, size=3), whole)
    shorter = replace(sampling, window=6, sink=1)
    assert not torch.equal(denoise(dit, shorter, num_frames=9, size=3), whole)


def test_relative_positions_equal_absolute_ones_until_a_frame_leaves(
    make_dit: MakeDiT, denoise: Denoise
):
    dit = make_dit()
    pairs = [
        [denoise(dit, replace(s, window=6, sink=1), num_frames=n, size=3) for s in (FEW, RELATIVE)]
        for n in (6, 9)
    ]
    assert_close(*pairs[0], ulps=64)
    assert (pairs[1][0] - pairs[1][1]).abs().max() > 1e-4


def test_a_video_with_relative_positions_has_no_end(make_dit: MakeDiT, denoise: Denoise):
    """Frame 1025 has no absolute position; the cache holds the window alone."""
    sampling = replace(RELATIVE, steps=(1000.0,), window=3, sink=1)
    made = denoise(make_dit(num_layers=1), sampling, num_frames=1030, size=1, kv_frames=3)
    assert made.isfinite().all()


def test_a_single_chunk_rolls_as_it_is_denoised_alone(make_dit: MakeDiT, denoise: Denoise):
    dit = make_dit()
    alone = denoise(dit, FEW, num_frames=3, size=3)
    assert_close(denoise(dit, ROLLING, num_frames=3, size=3), alone, ulps=64)


@pytest.mark.parametrize("name", ["few", "many"])
def test_given_frames_stay_and_are_seen(make_dit: MakeDiT, denoise: Denoise, name: str):
    dit, sampling = make_dit(), LOOPS[name]
    made = [
        denoise(dit, sampling, num_frames=6, size=3, given=torch.full((16, 3, 4, 6), value))
        for value in (0.0, 1.0)
    ]
    assert [float(each[:, :3].mean()) for each in made] == [0.0, 1.0]
    assert not torch.equal(made[0][:, 3:], made[1][:, 3:])


@pytest.mark.parametrize("name", LOOPS)
def test_a_video_costs_what_torch_counts(make_dit: MakeDiT, make_sampler: MakeSampler, name: str):
    dit, stats = make_dit(), RunStats(torch.device("cpu"))
    sampler = make_sampler(dit, LOOPS[name], num_frames=12, size=3, stats=stats)
    before = stats.computed_flops  # of the prompts, projected when the branches were opened
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for _ in sampler.denoise():
            pass
    assert stats.computed_flops - before == counter.get_total_flops()


def test_a_chunk_takes_its_steps_one_by_one_and_the_first_may_take_more():
    sampling = replace(FEW, steps=(1000.0,), first_steps=FEW.steps)
    assert [tick.steps for tick in sampling.ticks(range(1, 4))] == [
        *({1: 0}, {1: 1}, {1: 2}, {1: 3}),
        *({2: 0}, {3: 0}),
    ]
    assert [tick.finishing for tick in sampling.ticks(range(1, 3))] == [(), (), (), (1,), (2,)]
    assert [tick.steps for tick in replace(ROLLING, steps=(1.0, 0.5)).ticks(range(3))] == [
        *({0: 0}, {0: 1, 1: 0}, {1: 1, 2: 0}, {2: 1}),
    ]


@pytest.mark.parametrize(
    ("sampling", "num_frames", "clean", "is_clean", "room", "reach"),
    [
        pytest.param(FEW, 3, 9, False, 9, (0, 9), id="all"),
        pytest.param(replace(FEW, window=7, sink=2), 3, 6, False, 4, (0, 4), id="window"),
        pytest.param(ROLLING, 12, 0, False, 0, (0, 0), id="rolling, first chunk active"),
        pytest.param(ROLLING, 12, 6, False, 6, (3, 3), id="rolling, short history"),
        pytest.param(ROLLING, 12, 24, False, 21, (3, 6), id="rolling, window full"),
        pytest.param(ROLLING, 3, 18, True, 18, (3, 15), id="rolling, fed, first chunk seen"),
        pytest.param(ROLLING, 3, 21, True, 21, (0, 18), id="rolling, fed, first chunk left"),
    ],
)
def test_what_stays_and_what_is_seen(
    sampling: Sampling,
    num_frames: int,
    clean: int,
    is_clean: bool,
    room: int,
    reach: tuple[int, int],
):
    assert sampling.room(num_frames, clean) == room
    assert sampling.reach(num_frames, room, sink=3, is_clean=is_clean) == reach


def test_rounding_nothing_the_reference_equals_the_exact_transformer(
    make_dit: MakeDiT, denoise: Denoise
):
    dit = make_dit()
    rounded = RoundedDiT(dit.config)
    rounded.load_state_dict(dit.state_dict())
    found = [denoise(each, FEW, num_frames=6, size=3) for each in (dit, rounded.eval())]
    assert_close(*found, ulps=64)
