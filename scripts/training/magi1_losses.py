"""What the MAGI-1 demo's transformers learn: velocities, and what guidance makes of them.

Axes: B batch, N chunks, R text rows (B * N), L text tokens, C text width, F latent frames.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flowcache.demo.forcing import ForcingPlan, NoisyClips, draw_noisy, draw_window
from flowcache.demo.latents import LatentBank
from flowcache.demo.text import build_tokenizer
from flowcache.demo.trainer import StepRandomness
from flowcache.kv import Attend
from magi1.config import TokenChoice
from magi1.dit import DiT
from magi1.sampler import Guidance
from magi1.schedule import step_width
from magi1.text import NULL_TOKENS, chunk_captions
from training.magi1_models import CHUNK_WIDTH, DemoModels
from training.work import drop_some

CLEAN_T = 0.9999
FORCING = ForcingPlan(
    num_frames=CHUNK_WIDTH * 6,
    chunk_frames=CHUNK_WIDTH,
    warp=2.0,
    lag_range=(0.2, 0.32),
    fewest_chunks=1,
    full_share=0.0,
    odd_chunk_share=0.0,
    image_share=0.0,
    staggered_share=0.7,
    together_share=0.2,
)
REFINE_FORCING = replace(FORCING, batch_frames=144)
# Shares of the steps without any caption, with given latents in the first noisy chunk, and with a
# limited reach.
NULL_SHARE = 0.12
FIXED_SHARE = 0.15
FIXED_LATENTS = (1, 2, 8)
LIMITED_SHARE = 0.3
# Share of the steps without special tokens, as a run without their file has.
PLAIN_SHARE = 0.15
MOST_REMAINING = 4
GUIDANCE = Guidance(
    t_range=(0.0, 0.0217, 0.1, 0.3, 0.999),
    prev_scales=(1.0, 1.0, 1.0, 1.0, 1.0),
    text_scales=(3.0, 3.0, 3.0, 1.5, 1.5),
)
STEP_COUNTS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Situation:
    """What one training step looks like.

    Attributes:
        captions: text of every chunk, `[R, L, C]`, and which tokens count, `[R, L]`.
        is_null: whether all captions are left out.
        reach: chunks that a chunk sees, itself included; None: all before it.
    """

    captions: tuple[Tensor, Tensor]
    is_null: bool
    reach: int | None


class BaseLoss:
    """The loss of a training step of the base model."""

    def __init__(
        self,
        models: DemoModels,
        bank: LatentBank,
        *,
        forcing: ForcingPlan,
        is_weighted: bool = False,
    ) -> None:
        self.models, self.bank = models, bank
        self.forcing, self.is_weighted = forcing, is_weighted
        self.tokenizer = build_tokenizer()

    def __call__(self, _step: int, randomness: StepRandomness) -> Tensor:
        now, clips = self.draw(randomness)
        data_minus_noise = predict(self.models.dit, clips, now, is_null=now.is_null)
        error_BCFhw = data_minus_noise + clips.target
        if self.is_weighted:
            error_BCFhw = error_BCFhw * level_weights(clips.sigma).sqrt()[:, None, :, None, None]
        return clips.mean_square(error_BCFhw)

    def draw(self, randomness: StepRandomness) -> tuple[Situation, NoisyClips]:
        """Draw a step."""
        rng = randomness.numpy
        window = draw_window(rng, self.forcing)
        num_chunks = len(window.bounds)
        size = min(self.forcing.largest_batch, self.forcing.batch_frames // window.num_frames)
        latents, captions = self.bank.batch(rng, size)
        now = Situation(
            captions=self.encode(rng, captions, num_chunks=num_chunks),
            is_null=bool(rng.random() < NULL_SHARE),
            reach=int(rng.integers(1, 6)) if rng.random() < LIMITED_SHARE else None,
        )
        num_fixed = 0
        if rng.random() < FIXED_SHARE:
            num_fixed = int(rng.choice(FIXED_LATENTS if num_chunks > 1 else FIXED_LATENTS[:2]))
        clips = draw_noisy(
            latents[:, :, : window.num_frames],
            window,
            plan=self.forcing,
            randomness=randomness,
            num_fixed=num_fixed,
        )
        return now, clips

    def encode(
        self, rng: np.random.Generator, captions: list[str], *, num_chunks: int
    ) -> tuple[Tensor, Tensor]:
        """Encode captions to what each chunk is told, padded to `NULL_TOKENS`."""
        tokens = None if rng.random() < PLAIN_SHARE else self.models.special_tokens
        num_later = int(rng.integers(MOST_REMAINING + 1))
        given = self.tokenizer(drop_some(rng, captions), padding=True, return_tensors="pt")
        states_BLC = self.models.text(
            input_ids=given.input_ids, attention_mask=given.attention_mask
        ).last_hidden_state
        texts: list[Tensor] = []
        for states_LC, length in zip(states_BLC, given.attention_mask.sum(1), strict=True):
            texts += chunk_captions(
                states_LC[:length],
                num_chunks=num_chunks + num_later,
                tokens=tokens,
                choice=TokenChoice(),
                max_length=NULL_TOKENS,
            )[:num_chunks]
        lengths = torch.tensor([len(text) for text in texts])
        rows = [functional.pad(text, (0, 0, 0, NULL_TOKENS - len(text))) for text in texts]
        return torch.stack(rows), torch.arange(NULL_TOKENS) < lengths[:, None]


def level_weights(sigma: Tensor) -> Tensor:
    """Return the weight of an error by noise level: what can't be known weighs little.

    Near 1 the place of the shape is open, near 0 the noise is; both would outweigh the rest.
    """
    return 4 * sigma * (1 - sigma) + 0.1


def predict(
    dit: DiT,
    clips: NoisyClips,
    now: Situation,
    *,
    is_null: bool,
    step_width: float | None = None,
) -> Tensor:
    """Predict the velocity, data minus noise; chunks that are clean are told no text."""
    t_BN = 1 - clips.sigma[:, ::CHUNK_WIDTH]
    text_RLC, mask_RL = now.captions
    is_silent_R = (t_BN == 1).flatten() | is_null
    text_RLC = torch.where(is_silent_R[:, None, None], dit.null_caption[:NULL_TOKENS], text_RLC)
    return dit(
        clips.x,
        t_BN.clamp(max=CLEAN_T),
        text_RLC,
        mask_RL=mask_RL | is_silent_R[:, None],
        is_null=is_null,
        step_width=step_width,
        self_attend=_limited(dit, num_chunks=t_BN.shape[1], reach=now.reach),
    )


def _limited(dit: DiT, *, num_chunks: int, reach: int | None) -> Attend | None:
    """Let every chunk attend to the last `reach` chunks, itself included."""
    if reach is None:
        return None

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = q.shape[1] // num_chunks
        stops = range(size, q.shape[1] + 1, size)
        seen = [slice(max(0, stop - reach * size), stop) for stop in stops]
        parts = [
            dit.kernel(q[:, stop - size : stop], k[:, own], v[:, own])
            for stop, own in zip(stops, seen, strict=True)
        ]
        return torch.cat(parts, dim=1)

    return attend


class DistillLoss(BaseLoss):
    """The squared distance of the student's velocity to the guided one of the base model."""

    def __init__(self, models: DemoModels, student: DiT, bank: LatentBank) -> None:
        super().__init__(models, bank, forcing=REFINE_FORCING)
        self.student = student

    def __call__(self, _step: int, randomness: StepRandomness) -> Tensor:
        with torch.no_grad():
            now, clips = self.draw(randomness)
            guided = self.guided(clips, now)
        width = step_width(int(randomness.numpy.choice(STEP_COUNTS)), interval=1.0)
        taught = predict(self.student, clips, now, is_null=False, step_width=width)
        return clips.mean_square(taught - guided)

    def guided(self, clips: NoisyClips, now: Situation) -> Tensor:
        """Return what guidance makes of the base model's passes with and without text."""
        with_text = predict(self.models.dit, clips, now, is_null=False)
        without = predict(self.models.dit, clips, now, is_null=True)
        scales = [[GUIDANCE.scales(1 - sigma)[1] for sigma in row] for row in clips.sigma.tolist()]
        return without + torch.tensor(scales)[:, None, :, None, None] * (with_text - without)
