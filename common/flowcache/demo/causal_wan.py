"""Train causal Wan transformers: a teacher with many steps, then a student with few.

A chunk sees itself, noisy, and the clean chunks before it. So a step has two passes: one of clean
frames, whose keys and values are held, and one of noisy chunks, each of which reads those of the
chunks before it. Together they are the teacher-forcing mask over `[clean | noisy]`, and one chunk
after the other they are what a video is made by.

The student makes the clean frames itself (self-rollout). The teacher's solver goes from the noise
of every chunk to its end, with guidance and after these frames; the student learns to say that end
from four places on the way, which are the levels of its own steps.

Source: teacher forcing and self-rollout as in Self-Forcing (arXiv 2506.08009); regression of a
solver's end as in the first stage of CausVid (arXiv 2412.07772).

Axes: B batch, C latent channels (inside attention: head width), F latent frames, h/w latent
rows/columns, S tokens, H heads, L prompt tokens, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowcache.demo.latents import LatentBank, drop_some
from flowcache.demo.trainer import StepRandomness
from flowcache.wan.cached import NO_RATE
from flowcache.wan.dit import DiT, Embedded, SelfAttend
from flowcache.wan.flow_match import NUM_LEVELS, add_noise, estimate_clean, levels_of
from flowcache.wan.unipc import UniPC

Encode = Callable[[list[str]], Tensor]
"""Captions to `[B, L, D]`."""


@dataclass(frozen=True)
class CausalPlan:
    """What training steps are drawn from; shares are of steps.

    Attributes:
        num_frames: latent frames of a whole window.
        chunk_frames: latent frames of a chunk.
        batch_frames: latent frames of a batch, all clips together.
        short_share: steps on fewer chunks, at least two.
        single_share: steps with chunks of one frame, of windows a third as long.
        late_share: steps on windows that do not begin with their clips.
        shift: how far the teacher's noise levels lean to the noisy side.
        context_noise: highest noise level of what the teacher takes for clean frames.
        solver_steps: of the teacher's solver, a multiple of the student's steps.
        solver_shift: of the noise levels of solver and student.
        guidance: scale of the teacher's guidance.
        student_steps: of the student, for a chunk.
        given_share: steps whose first chunks are data, not the student's.
    """

    num_frames: int = 21
    chunk_frames: int = 3
    batch_frames: int = 84
    short_share: float = 0.4
    single_share: float = 0.15
    late_share: float = 0.3
    shift: float = 3.0
    context_noise: float = 0.15
    solver_steps: int = 8
    solver_shift: float = 5.0
    guidance: float = 4.0
    student_steps: int = 4
    given_share: float = 0.5

    def draw(self, rng: np.random.Generator) -> list[range]:
        """Draw the chunks of a step."""
        size, num_frames = self.chunk_frames, self.num_frames
        if rng.random() < self.single_share:
            size, num_frames = 1, self.num_frames // self.chunk_frames
        num_chunks = num_frames // size
        if rng.random() < self.short_share:
            num_chunks = int(rng.integers(2, num_chunks, endpoint=True))
        return [range(chunk * size, (chunk + 1) * size) for chunk in range(num_chunks)]

    def batch(
        self, bank: LatentBank, rng: np.random.Generator, chunks: Sequence[range]
    ) -> tuple[Tensor, list[str]]:
        """Draw windows of clips, `[B, C, F, h, w]`, and their captions."""
        num_frames = chunks[-1].stop
        is_late = rng.random() < self.late_share
        size = max(1, self.batch_frames // num_frames)
        latents_BCFhw, captions = bank.batch(rng, np.full(size, not is_late))
        if is_late:  # the shapes have turned since: nothing is said of them
            most = latents_BCFhw.shape[2] - num_frames
            first = int(rng.integers(most + 1))
            return latents_BCFhw[:, :, first : first + num_frames], [""] * size
        return latents_BCFhw[:, :, :num_frames], captions


class CleanFrames:
    """The keys and values of the clean frames of some clips, which later chunks see.

    Args:
        text_BLD: of each clip.
    """

    def __init__(self, dit: DiT, text_BLD: Tensor) -> None:
        self.dit, self.context = dit, dit.encode_context(text_BLD)
        sizes = dit.config
        none = text_BLD.new_empty(len(text_BLD), 0, sizes.num_heads, sizes.head_width)
        self.held = [(none, none)] * sizes.num_layers
        """Of each layer, `[B, S, H, C]`."""

    def feed(self, x_BCFhw: Tensor, chunks: Sequence[range]) -> None:
        """Hold the next chunks, too; each sees those before it.

        Args:
            x_BCFhw: the frames of the chunks.
        """
        first, kernel, fed = chunks[0].start, self.dit.kernel, list[tuple[Tensor, Tensor]]()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            per_frame = q.shape[1] // x_BCFhw.shape[2]
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.held[layer], (k, v), strict=True))
            fed.append((k, v))
            parts = list[Tensor]()
            for chunk in chunks:
                own = slice((chunk.start - first) * per_frame, (chunk.stop - first) * per_frame)
                stop = chunk.stop * per_frame
                parts.append(kernel(q[:, own], k[:, :stop], v[:, :stop]))
            return torch.cat(parts, dim=1)

        clean_BF = x_BCFhw.new_zeros(len(x_BCFhw), x_BCFhw.shape[2])
        self._run(x_BCFhw, clean_BF, first, attend)
        self.held = fed

    def velocity(self, x_BCFhw: Tensor, sigma_BF: Tensor, chunks: Sequence[range]) -> Tensor:
        """Return the velocity of noisy chunks; each sees itself and held chunks before it.

        Args:
            x_BCFhw: the frames of the chunks.
            sigma_BF: noise level of each frame.
        """
        first, kernel = chunks[0].start, self.dit.kernel

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            per_frame = q.shape[1] // x_BCFhw.shape[2]
            held, parts = self.held[layer], list[Tensor]()
            for chunk in chunks:
                own = slice((chunk.start - first) * per_frame, (chunk.stop - first) * per_frame)
                seen = [
                    torch.cat([before[:, : chunk.start * per_frame], each[:, own]], dim=1)
                    for before, each in zip(held, (k, v), strict=True)
                ]
                parts.append(kernel(q[:, own], *seen))
            return torch.cat(parts, dim=1)

        hidden, embedded = self._run(x_BCFhw, NUM_LEVELS * sigma_BF, first, attend)
        height, width = x_BCFhw.shape[-2:]
        return self.dit.velocity(hidden, embedded, latent_height=height, latent_width=width)

    def _run(
        self, x_BCFhw: Tensor, t_BF: Tensor, first: int, attend: SelfAttend
    ) -> tuple[Tensor, Embedded]:
        """Run the blocks on frames from `first` on."""
        dit, (num_frames, height, width) = self.dit, x_BCFhw.shape[2:]
        rope = dit.rope(
            torch.arange(first, first + num_frames), latent_height=height, latent_width=width
        )
        embedded = dit.embed(x_BCFhw, t_BF, fps=NO_RATE)
        return dit.run_blocks(embedded, rope, self.context, self_attend=attend), embedded


class TeacherLoss:
    """The loss of a training step of the teacher: teacher forcing."""

    def __init__(self, dit: DiT, bank: LatentBank, encode: Encode, *, plan: CausalPlan) -> None:
        self.dit, self.bank, self.encode, self.plan = dit, bank, encode, plan
        self.sigmas = np.array(levels_of(plan.shift).sigmas)

    def __call__(self, _step: int, randomness: StepRandomness) -> Tensor:
        rng, generator = randomness.numpy, randomness.torch
        chunks = self.plan.draw(rng)
        x, captions = self.plan.batch(self.bank, rng, chunks)
        lengths, num_clips = [len(chunk) for chunk in chunks], len(x)
        # what is generated is never as clean as data
        worn = torch.from_numpy(rng.uniform(0, self.plan.context_noise, (num_clips, 1))).float()
        clean = CleanFrames(self.dit, self.encode(drop_some(rng, captions)))
        clean.feed(noised(x, worn, generator)[0], chunks)
        levels = np.repeat(rng.choice(self.sigmas, (num_clips, len(chunks))), lengths, axis=1)
        sigma_BF = torch.from_numpy(levels).float()
        noisy, noise = noised(x, sigma_BF, generator)
        return (clean.velocity(noisy, sigma_BF, chunks) - (noise - x)).square().mean()


def noised(x_BCFhw: Tensor, sigma_BF: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return clips with noise of some levels, and the noise."""
    noise = torch.randn(x_BCFhw.shape, generator=generator)
    sigma = sigma_BF[:, None, :, None, None]
    return (1 - sigma) * x_BCFhw + sigma * noise, noise


class StudentLoss:
    """The loss of a training step of the student: how far it is from the teacher's ends."""

    def __init__(
        self, student: DiT, teacher: DiT, bank: LatentBank, encode: Encode, *, plan: CausalPlan
    ) -> None:
        self.student, self.teacher, self.bank = student, teacher, bank
        self.encode, self.plan = encode, plan

    def __call__(self, _step: int, randomness: StepRandomness) -> Tensor:
        rng, generator = randomness.numpy, randomness.torch
        chunks = self.plan.draw(rng)
        x, captions = self.plan.batch(self.bank, rng, chunks)
        num_given = 0
        if rng.random() < self.plan.given_share:
            num_given = int(rng.integers(1, len(chunks)))
        with torch.no_grad():
            text = self.encode(captions)
            made = self.roll_out(x, text, chunks, num_given=num_given, generator=generator)
            noise = torch.randn(x.shape, generator=generator)
            states, ends = self.solve(made, noise, captions, chunks)
        clean = CleanFrames(self.student, text)
        clean.feed(made, chunks)
        errors = list[Tensor]()
        for sigma, state in states:
            velocity = clean.velocity(state, state.new_full((len(x), x.shape[2]), sigma), chunks)
            errors.append((state - sigma * velocity - ends).square().mean())
        return torch.stack(errors).mean()

    def roll_out(
        self,
        data_BCFhw: Tensor,
        text_BLD: Tensor,
        chunks: Sequence[range],
        *,
        num_given: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Make clips as the student's own loop does; the first chunks may be data."""
        plan, made = self.plan, data_BCFhw.clone()
        levels = levels_of(plan.solver_shift)
        entries = [NUM_LEVELS * step // plan.student_steps for step in range(plan.student_steps)]
        sigmas = [levels.sigmas[entry] for entry in entries]
        clean = CleanFrames(self.student, text_BLD)
        if num_given:
            given = chunks[:num_given]
            clean.feed(made[:, :, : given[-1].stop], given)
        for chunk in chunks[num_given:]:
            x = torch.empty_like(made[:, :, chunk.start : chunk.stop])
            for sigma in sigmas:
                noise = torch.randn(x.shape, generator=generator)
                x = noise if sigma == 1 else add_noise(x, noise, sigma=sigma)
                velocity = clean.velocity(x, x.new_full((len(x), len(chunk)), sigma), [chunk])
                x = estimate_clean(x, velocity, sigma=sigma)
            made[:, :, chunk.start : chunk.stop] = x
            if chunk is not chunks[-1]:
                clean.feed(x, [chunk])
        return made

    def solve(
        self, clean_BCFhw: Tensor, noise: Tensor, captions: list[str], chunks: Sequence[range]
    ) -> tuple[list[tuple[float, Tensor]], Tensor]:
        """Let the teacher go from the noise of every chunk to its end.

        Returns:
            the states at the student's levels, each with its level, and the ends.
        """
        plan, passes = self.plan, list[CleanFrames]()
        for texts in (captions, [""] * len(captions)):
            passes.append(CleanFrames(self.teacher, self.encode(texts)))
            passes[-1].feed(clean_BCFhw, chunks)
        solver = UniPC(plan.solver_steps, shift=plan.solver_shift)
        states, x = list[tuple[float, Tensor]](), noise
        for step, sigma in enumerate(solver.grid.sigmas[:-1]):
            if step % (plan.solver_steps // plan.student_steps) == 0:
                states.append((sigma, x))
            sigma_BF = x.new_full((len(x), x.shape[2]), sigma)
            with_text, without = (each.velocity(x, sigma_BF, chunks) for each in passes)
            x = solver.step(without + plan.guidance * (with_text - without), sample=x)
        return states, x
