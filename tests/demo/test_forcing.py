"""What training steps are drawn from covers what generation asks for."""

from dataclasses import replace

import numpy as np
import torch

from flowcache.demo.forcing import (
    GIVEN_SIGMA,
    ForcingPlan,
    Window,
    draw_levels,
    draw_noisy,
    draw_window,
)
from flowcache.demo.trainer import step_randomness

PLAN = ForcingPlan(num_frames=25, chunk_frames=5)


def _windows() -> list[Window]:
    rng = np.random.default_rng(0)
    return [draw_window(rng, PLAN) for _ in range(400)]


def test_windows_are_tiled_by_their_chunks():
    for window in _windows():
        assert window.bounds[0][0] == 0
        assert all(a < b for a, b in window.bounds)
        ends = [stop for _, stop in window.bounds]
        assert [start for start, _ in window.bounds[1:]] == ends[:-1]
        assert window.num_frames <= PLAN.num_frames


def test_the_mixture_holds_every_kind_of_step():
    windows = _windows()
    whole = tuple((start, start + 5) for start in range(0, 25, 5))
    assert any(w.bounds == whole and w.is_causal for w in windows)
    assert any(w.bounds == whole and not w.is_causal for w in windows)
    image = [w for w in windows if w.starts_with_image and w.is_causal]
    assert any(w.bounds[:2] == ((0, 1), (1, 6)) for w in image)
    assert any(w.ends_with_image for w in windows)
    assert not any(w.ends_with_image and w.is_causal for w in windows)
    assert any(w.num_frames < 25 for w in windows)


def test_earlier_chunks_are_never_noisier():
    rng = np.random.default_rng(1)
    for window in _windows():
        levels = draw_levels(rng, window, PLAN)
        assert levels.sigma.shape == (PLAN.batch_size(window), len(window.bounds))
        inner = levels.sigma[:, :-1] if window.ends_with_image else levels.sigma
        # what waits is at 0.999, and what has just begun may be above it
        assert np.all(np.diff(inner, axis=1) >= -0.001)
        assert np.all(levels.sigma.max(axis=1) > GIVEN_SIGMA), "a clip with nothing to learn"
        if window.starts_with_image:
            assert np.all(levels.sigma[:, 0] <= GIVEN_SIGMA)
        if window.ends_with_image:
            assert np.all(levels.sigma[:, -1] == 0)


def test_a_given_picture_does_not_show_how_a_clip_moves_and_a_given_chunk_does():
    rng = np.random.default_rng(2)
    seen = set[tuple[bool, bool]]()
    for window in _windows():
        levels = draw_levels(rng, window, PLAN)
        first_moving = levels.sigma[:, int(window.starts_with_image)]
        assert np.array_equal(levels.shows_motion, first_moving <= GIVEN_SIGMA)
        seen |= {(window.starts_with_image, bool(shown)) for shown in levels.shows_motion}
    assert len(seen) == 4


def test_the_true_velocity_has_no_loss_and_given_frames_do_not_count():
    window = next(w for w in _windows() if w.starts_with_image and w.is_causal)
    data = torch.randn(3, 16, window.num_frames, 4, 4, generator=torch.Generator().manual_seed(2))

    plan = replace(PLAN, largest_batch=len(data))
    levels = draw_levels(np.random.default_rng(3), window, plan)
    clips = draw_noisy(data, window, levels=levels, randomness=step_randomness(0, 0))
    sigma = clips.sigma[:, None, :, None, None]
    noise = (clips.x - (1 - sigma) * data) / sigma.clamp(min=1e-3)
    # any answer will do for given frames
    velocity = torch.where(sigma <= GIVEN_SIGMA, 1e3, noise - data)
    assert float(clips.mean_square(velocity - clips.target)) < 1e-6


def test_fixed_frames_are_clean_and_do_not_count_though_their_chunk_is_noisy():
    plan = ForcingPlan(
        num_frames=12, chunk_frames=6, given_share=0.0, staggered_share=0.0, largest_batch=3
    )
    window = Window(((0, 6), (6, 12)), True, False, False)
    data = torch.randn(3, 16, 12, 4, 4, generator=torch.Generator().manual_seed(2))
    levels = draw_levels(np.random.default_rng(3), window, plan)
    clips = draw_noisy(data, window, levels=levels, randomness=step_randomness(0, 0), num_fixed=2)
    assert torch.equal(clips.x[:, :, :2], data[:, :, :2])
    assert not clips.counts[:, :2].any()
    assert clips.counts[:, 2:].all()
    assert torch.equal(clips.sigma[:, 0], clips.sigma[:, 5]), "the chunk's level is told"
    assert not torch.equal(clips.x[:, :, 2], data[:, :, 2])


def test_the_squared_table_is_that_of_magi1():
    plan = ForcingPlan(num_frames=6, chunk_frames=6, warp=2.0, lag_range=(0.25, 0.25))
    window = Window(((0, 6), (6, 12)), True, False, False)
    rng = np.random.default_rng(0)
    drawn = [draw_levels(rng, window, plan).sigma for _ in range(20)]
    moving = [(a, b) for a, b in np.concatenate(drawn) if 0.1 < a < 0.9 and b < 0.99]
    assert moving
    # t = s^2 / (3 - 2 s^2): from a noise level back to the share of the steps that are done
    for first, second in moving:
        done = [np.sqrt(3 * (1 - x) / (1 + 2 * (1 - x))) for x in (first, second)]
        if abs(done[0] - done[1] - 0.25) < 1e-6:
            return
    raise AssertionError("no pair lags by a quarter of the steps")
