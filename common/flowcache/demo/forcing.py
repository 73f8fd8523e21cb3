"""Diffusion forcing: draw the window and the noisy clips of a flow-matching training step.

Axes: B batch, C latent channels, F latent frames, h/w latent rows/columns.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowcache.demo.trainer import StepRandomness

# Noise left on given frames half of the time, as generation does with `addnoise_condition: 20`.
GIVEN_SIGMA = 0.02
_PURE_NOISE = 0.999


@dataclass(frozen=True)
class Window:
    """What a step trains on: chunk bounds in latent frames, and what may be seen and is given."""

    bounds: tuple[tuple[int, int], ...]
    is_causal: bool
    starts_with_image: bool
    ends_with_image: bool

    @property
    def num_frames(self) -> int:
        """Latent frames of the window."""
        return self.bounds[-1][1]


@dataclass(frozen=True)
class ForcingPlan:
    """The mixture that training steps are drawn from; shares are of steps or of clips.

    Attributes:
        num_frames: latent frames of a whole window.
        chunk_frames: latent frames of a chunk at sampling time.
        shift: how far noise levels lean to the noisy side, as the sampling shift does.
        warp: power of the progress that the shift is applied to: 1, or 2 for a squared table.
        lag_range: shares of all steps by which a chunk lags behind the one before it.
        fewest_chunks: chunks of the shortest window.
        batch_frames: latent frames of a batch, all clips together.
        largest_batch: most clips in a batch.
        short_share: steps on a shorter window, which are cheaper.
        single_share: of these, steps on one chunk, which knows nothing but the caption.
        full_share: steps without the block-causal limit.
        odd_chunk_share: steps with chunks of one frame or of the whole window.
        image_share: steps whose first frame is a given image.
        end_image_share: steps of these, without the limit, whose last frame is given too.
        staggered_share: clips whose chunks run a fixed lag behind each other, as generation does.
        together_share: of the others, clips with one noise level for all chunks.
        given_share: clips whose first chunks are given.
        waiting_share: clips whose last chunks still are pure noise.
    """

    num_frames: int
    chunk_frames: int
    shift: float = 3.0
    warp: float = 1.0
    lag_range: tuple[float, float] = (0.08, 0.4)
    fewest_chunks: int = 2
    batch_frames: int = 200
    largest_batch: int = 16
    short_share: float = 0.45
    single_share: float = 0.0
    full_share: float = 0.45
    odd_chunk_share: float = 0.12
    image_share: float = 0.15
    end_image_share: float = 0.4
    staggered_share: float = 0.5
    together_share: float = 0.4
    given_share: float = 0.25
    waiting_share: float = 0.2

    def batch_size(self, window: Window) -> int:
        """Return how many clips of a window are in a batch."""
        return min(self.largest_batch, self.batch_frames // window.num_frames)


def draw_window(rng: np.random.Generator, plan: ForcingPlan) -> Window:
    """Draw the window of a step."""
    num_frames = plan.num_frames
    if rng.random() < plan.short_share:
        num_chunks = rng.integers(plan.fewest_chunks, num_frames // plan.chunk_frames)
        if rng.random() < plan.single_share:
            num_chunks = 1
        num_frames = plan.chunk_frames * int(num_chunks)
    chunk = plan.chunk_frames
    if rng.random() < plan.odd_chunk_share:
        chunk = int(rng.choice([1, num_frames]))
    starts_with_image = bool(rng.random() < plan.image_share)
    is_causal = bool(rng.random() >= plan.full_share)
    ends_with_image = (
        starts_with_image and not is_causal and bool(rng.random() < plan.end_image_share)
    )
    edges = list(range(int(starts_with_image), num_frames - int(ends_with_image), chunk))
    edges += [num_frames - 1] if ends_with_image else []
    edges = ([0] if starts_with_image else []) + edges
    bounds = tuple(zip(edges, [*edges[1:], num_frames], strict=True))
    return Window(bounds, is_causal, starts_with_image, ends_with_image)


@dataclass(frozen=True)
class Levels:
    """Noise levels of the clips of a step.

    Attributes:
        sigma: of each chunk, `[B, chunks]`, 0 (clean) to 1 (noise).
        shows_motion: whether given frames show how the clip moves, `[B]`: else its caption must.
    """

    sigma: np.ndarray
    shows_motion: npt.NDArray[np.bool_]


def draw_levels(rng: np.random.Generator, window: Window, plan: ForcingPlan) -> Levels:
    """Draw the noise levels of a batch."""
    clips = [_draw_clip_levels(rng, window, plan) for _ in range(plan.batch_size(window))]
    sigma = np.stack(clips)
    first = int(window.starts_with_image)
    return Levels(sigma, shows_motion=sigma[:, first] <= GIVEN_SIGMA)


def _draw_clip_levels(rng: np.random.Generator, window: Window, plan: ForcingPlan) -> np.ndarray:
    """Draw one clip's noise level per chunk, earlier chunks never noisier than later ones.

    Returns:
        sigma per chunk, 0 (clean) to 1 (noise); given chunks have at most `GIVEN_SIGMA`.
    """
    num_chunks = len(window.bounds)
    if not window.ends_with_image and rng.random() < plan.staggered_share:
        sigma = _staggered_levels(rng, num_chunks, plan)
        if window.starts_with_image:
            sigma[0] = 0.0
        return sigma
    uniform = np.sort(rng.random(num_chunks))
    if rng.random() < plan.together_share:
        uniform = np.full(num_chunks, uniform[rng.integers(num_chunks)])
    sigma = np.maximum(_shifted(uniform, plan), 2 * GIVEN_SIGMA)
    if num_chunks > 1 and rng.random() < plan.waiting_share:
        sigma[rng.integers(1, num_chunks) :] = _PURE_NOISE
    num_given = int(window.starts_with_image)
    is_open = num_chunks > 1 + num_given and not window.ends_with_image
    if is_open and rng.random() < plan.given_share:
        num_given += int(rng.integers(1, num_chunks - num_given))
    sigma[:num_given] = rng.choice([0.0, GIVEN_SIGMA])
    if window.ends_with_image:
        sigma[-1] = 0.0
    return sigma


def _staggered_levels(rng: np.random.Generator, num_chunks: int, plan: ForcingPlan) -> np.ndarray:
    """Draw a moment of a generation in which each chunk runs a fixed lag behind the one before.

    Example: with a lag of 0.4 of all steps and the first chunk 0.7 through, the next is 0.3 through
    and all others wait as pure noise; chunks that are through are clean.
    """
    lag = rng.uniform(*plan.lag_range)
    through = rng.uniform(0, 1 + lag * (num_chunks - 1)) - lag * np.arange(num_chunks)
    sigma = np.maximum(_shifted(1 - through.clip(0, 1), plan), 2 * GIVEN_SIGMA)
    sigma[through <= 0] = _PURE_NOISE
    sigma[through >= 1] = rng.choice([0.0, GIVEN_SIGMA])
    return sigma


def _shifted(uniform: np.ndarray, plan: ForcingPlan) -> np.ndarray:
    """Turn evenly spread shares of the steps still to go into noise levels, as sampling does."""
    uniform = 1 - (1 - uniform) ** plan.warp
    return plan.shift * uniform / (1 + (plan.shift - 1) * uniform)


@dataclass(frozen=True)
class NoisyClips:
    """Clips of a training step, noised.

    Attributes:
        x: `(1 - sigma) data + sigma noise`, `[B, C, F, h, w]`.
        target: the velocity, noise - data.
        sigma: noise level of each frame's chunk, `[B, F]`.
        counts: frames whose velocity is to be learned, `[B, F]` bool.
    """

    x: Tensor
    target: Tensor
    sigma: Tensor
    counts: Tensor

    def mean_square(self, error_BCFhw: Tensor) -> Tensor:
        """Return the mean square of an error over the frames that count."""
        return error_BCFhw.square().mean(dim=(1, 3, 4))[self.counts].mean()


def draw_noisy(
    data_BCFhw: Tensor,
    window: Window,
    *,
    levels: Levels,
    randomness: StepRandomness,
    num_fixed: int = 0,
) -> NoisyClips:
    """Noise clips, each chunk of each clip to a level of its own.

    Args:
        data_BCFhw: clean normalised latents; frames beyond the window are left out.
        num_fixed: first frames that are given without noise, though their chunk has a noise level.
    """
    data_BCFhw = data_BCFhw[:, :, : window.num_frames]
    lengths = [stop - start for start, stop in window.bounds]
    sigma_BF = torch.from_numpy(np.repeat(levels.sigma, lengths, axis=1)).float()
    is_fixed_F = torch.arange(data_BCFhw.shape[2]) < num_fixed
    sigma = sigma_BF.masked_fill(is_fixed_F, 0)[:, None, :, None, None]
    noise = torch.randn(data_BCFhw.shape, generator=randomness.torch)
    return NoisyClips(
        x=(1 - sigma) * data_BCFhw + sigma * noise,
        target=noise - data_BCFhw,
        sigma=sigma_BF,
        counts=(sigma_BF > GIVEN_SIGMA) & ~is_fixed_F,
    )
