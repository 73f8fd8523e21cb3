"""What training steps are drawn from covers what generation asks for."""

import numpy as np
import torch
from torch import Tensor

from flowcache.demo.forcing import (
    GIVEN_SIGMA,
    ForcingPlan,
    Window,
    draw_levels,
    draw_window,
    forcing_loss,
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
        inner = levels[:-1] if window.ends_with_image else levels
        assert np.all(np.diff(inner) >= 0)
        assert levels.max() > GIVEN_SIGMA, "a clip with nothing to learn"
        if window.starts_with_image:
            assert levels[0] <= GIVEN_SIGMA
        if window.ends_with_image:
            assert levels[-1] == 0


def test_the_true_velocity_has_no_loss_and_given_frames_do_not_count():
    window = next(w for w in _windows() if w.starts_with_image and w.is_causal)
    data = torch.randn(3, 16, window.num_frames, 4, 4, generator=torch.Generator().manual_seed(2))

    def velocity(x: Tensor, t_BF: Tensor, bounds: object) -> Tensor:
        assert bounds == window.bounds
        sigma = t_BF[:, None, :, None, None] / 1000
        noise = (x - (1 - sigma) * data) / sigma.clamp(min=1e-3)
        exact = noise - data
        # any answer will do for given frames
        return torch.where(sigma <= GIVEN_SIGMA, torch.full_like(exact, 1e3), exact)

    loss = forcing_loss(velocity, data, window, plan=PLAN, randomness=step_randomness(0, 0))
    assert float(loss) < 1e-6
