"""The denoising of one video: the loops of Self-Forcing and Causal-Forcing, from top to bottom.

A chunk sees itself and, through the KV cache, the chunks before it. Three loops share that:

    few steps     one chunk after the other; each step estimates the clean data and adds new noise
    rolling       the same, but a window of chunks moves on, each one step behind the one before
                  it, which see each other in both directions
    many steps    one chunk after the other; guidance, and a UniPC solver of the chunk's own

A chunk that is done goes through the blocks once more, clean, for the keys that later ones see.

Axes: C latent channels, F latent frames, h/w latent rows/columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowcache.block_reuse import BlockReuse
from flowcache.policies import Decision
from flowcache.runtime.ops import Draw
from flowcache.runtime.stats import PassId
from flowcache.schedule import Tick, staggered
from flowcache.wan.cached import CachedDiT, View
from flowcache.wan.flow_match import NUM_LEVELS, add_noise, estimate_clean, levels_of
from flowcache.wan.kept import Budget
from flowcache.wan.reuse import StepReuse
from flowcache.wan.scenes import recached
from flowcache.wan.unipc import UniPC, timestep_grid
from self_forcing.config import CleanPass


@dataclass(frozen=True)
class Sampling:
    """How a video is denoised."""

    steps: tuple[float, ...]
    """Timesteps of a chunk, highest first; empty: `num_steps` steps of a solver, with guidance."""
    first_steps: tuple[float, ...] = ()
    """Of the first new chunk, where they are others."""
    num_steps: int = 50
    shift: float = 5.0
    guidance: float = 1.0
    context_noise: float = 0.0
    """Timestep of the clean pass in few steps; the latents stay clean."""
    window: int | None = None
    """Latent frames that a chunk sees, its own included; None: all."""
    sink: int = 0
    """First latent frames that never leave the window."""
    is_relative: bool = False
    """Whether positions count from the start of the window, so that a video may have any length."""
    is_rolling: bool = False
    budget: Budget | None = None
    """By which clean tokens stay; None: whole frames, the last ones and the sink."""
    switches: tuple[int, ...] = ()
    """Chunks with which another prompt begins."""
    recaches: bool = False
    """Whether the keys of the newest frames are then made anew."""
    clean_pass: CleanPass = "separate"
    reuses_blocks: bool = False
    """Whether blocks add what they added in the chunk before where their inputs are alike."""
    refine_noise: float = 0.05
    """Noise level of a refining clean pass."""

    def ticks(self, chunks: Sequence[int]) -> list[Tick]:
        """Return the passes that denoise some chunks."""
        if self.is_rolling:
            return staggered(chunks, num_steps=len(self.steps), lag=1)
        counts = [len(self.timesteps(is_first=chunk == chunks[0])) for chunk in chunks]
        steps = [(c, step, n) for c, n in zip(chunks, counts, strict=True) for step in range(n)]
        return [Tick(i, sum(counts), n, {c: step}) for i, (c, step, n) in enumerate(steps)]

    def timesteps(self, *, is_first: bool) -> Sequence[float]:
        """Return the timesteps of a chunk."""
        if not self.steps:
            return timestep_grid(self.num_steps, shift=self.shift)[0]
        return self.first_steps if is_first and self.first_steps else self.steps

    def room(self, num_frames: int, clean: int) -> int:
        """Return how many clean frames may stay next to some that are denoised.

        Example: window 6, sink 1, chunks of 3: of the clean frames 0..5 three stay, 0, 4, 5.
        """
        if self.budget is not None:
            return self.budget.room(clean)
        if self.window is None:
            return clean
        # a clean pass of the rolling loop sees all of the window, and the first chunk is kept, too
        return min(clean, self.window if self.is_rolling else self.window - num_frames)

    def recached(self, chunk: int, *, chunks: Sequence[range], clean: int) -> Sequence[int]:
        """Return the chunks whose keys are made anew before one, if another prompt begins there."""
        if not self.recaches or chunk not in self.switches:
            return ()
        return recached(chunk, chunks=chunks, whole=clean - self.sink)

    def reach(self, num_frames: int, clean: int, *, sink: int, is_clean: bool) -> tuple[int, int]:
        """Return how many of the first and of the last clean frames a pass sees.

        In the rolling loop the first chunk is always seen, but by clean passes of a full window.

        Args:
            num_frames: that are denoised, or one clean chunk that is fed.
            sink: frames of the first chunk.
        """
        if not self.is_rolling or not clean:
            return 0, clean
        assert self.window is not None, "the rolling loop has a window"
        last = min(clean - sink, self.window - num_frames - (0 if is_clean else sink))
        return (0 if is_clean and clean + num_frames > self.window else sink), last


class Sampler:
    """Denoises one video; lives as long as it does.

    Args:
        latents: `[C, F, h, w]`, noise with the given frames in their places. Changed in place.
        chunks: latent frames of each chunk.
        num_given: chunks that are clean from the start.
        draw: makes the noise between steps.
        reuse: decides which of many steps are computed.
        scenes: text encoder output of the prompts that begin with `sampling.switches`.
    """

    def __init__(
        self,
        cached: CachedDiT,
        sampling: Sampling,
        latents: Tensor,
        *,
        chunks: Sequence[range],
        num_given: int,
        draw: Draw,
        reuse: StepReuse,
        scenes: Sequence[Tensor] = (),
    ) -> None:
        self.blocks = BlockReuse() if sampling.reuses_blocks else None
        self.unfed: int | None = None
        """A clean chunk whose pass is that of the next step."""
        self.scenes = dict(zip(sampling.switches, scenes, strict=True))
        self.cached, self.sampling, self.draw, self.reuse = cached, sampling, draw, reuse
        self.latents, self.chunks, self.num_given = latents, chunks, num_given
        self.levels = levels_of(sampling.shift)
        self.solver = UniPC(sampling.num_steps, shift=sampling.shift)

    def denoise(self) -> Iterator[tuple[Tick, tuple[int, ...]]]:
        """Denoise; after every tick yield it and the chunks that became clean in it."""
        sampling, stats = self.sampling, self.cached.stats
        with stats.stage("dit"):
            for chunk in range(self.num_given):
                self.feed_clean(chunk, timestep=0)
        for tick in sampling.ticks(range(self.num_given, len(self.chunks))):
            with stats.timed_tick(0, tick.index), stats.stage("dit"):
                for chunk in tick.entering:
                    self._begin_scene(chunk)
                if sampling.steps:
                    self._take_few(tick)
                else:
                    self._take_many(tick)
                for chunk in tick.finishing:
                    self._finish(chunk, is_last=tick.is_last)
                self.cached.trace_tokens(tick)
            yield tick, tick.finishing

    def _begin_scene(self, chunk: int) -> None:
        """Take the prompt that begins with a chunk, if one does."""
        if chunk not in self.scenes:
            return
        self.cached.switch("cond", self.scenes[chunk])
        if self.blocks is not None:  # what they added depends on the prompt
            self.blocks = BlockReuse()
        clean = self.cached.clean_frames if self.sampling.recaches else 0
        anew = self.sampling.recached(chunk, chunks=self.chunks, clean=clean)
        self.cached.rewind(sum(len(self.chunks[each]) for each in anew))
        for each in anew:
            self.feed_clean(each, timestep=0)

    def _finish(self, chunk: int, *, is_last: bool) -> None:
        """Make a clean chunk's keys final; upstream does so for the last one, that nobody sees."""
        sampling, own = self.sampling, self.chunks[chunk]
        if sampling.clean_pass == "refined":
            self._refine(chunk)
        elif is_last:
            return
        elif sampling.clean_pass == "skipped":
            self.cached.settle(len(own), chunk=chunk)
        elif sampling.clean_pass == "merged" and chunk + 1 not in self.scenes:
            self.unfed = chunk
        else:
            self.feed_clean(chunk, timestep=sampling.context_noise if sampling.steps else 0)

    def _refine(self, chunk: int) -> None:
        """Noise a chunk slightly, and let the pass that makes its keys clean it again."""
        own, x = self.chunks[chunk], self.latents[:, self._frames([chunk])]
        timestep = self.sampling.refine_noise * NUM_LEVELS
        sigma = self.sampling.refine_noise
        noisy = add_noise(x, self._noise_like(x), sigma=sigma)
        velocity = self.cached.velocities(
            noisy, [timestep] * len(own), frames=own, view=self._view(own, is_clean=True)
        )["cond"]
        x.copy_(estimate_clean(noisy, velocity, sigma=sigma))
        self.cached.settle(len(own), chunk=chunk)

    # Steps and clean passes -------------------------------------------------------------------

    def _take_few(self, tick: Tick) -> None:
        """Estimate the clean chunks; add noise to those that go on, each of its own next step.

        As upstream, noise is drawn for all active chunks once per chunk that goes on, which takes
        its own part of it.
        """
        steps = {c: self.sampling.timesteps(is_first=c == self.num_given) for c in tick.steps}
        times = {chunk: steps[chunk][step] for chunk, step in tick.steps.items()}
        active = self.latents[:, self._frames(list(times))]
        velocity = self._velocities(tick, times)["cond"]
        start = self.chunks[min(times)].start
        for chunk, step in tick.steps.items():
            own = slice(self.chunks[chunk].start - start, self.chunks[chunk].stop - start)
            sigma = self.levels.sigma(times[chunk])
            clean = estimate_clean(active[:, own], velocity[:, own], sigma=sigma)
            if chunk not in tick.finishing:
                noise, sigma = self._noise_like(active), self.levels.sigma(steps[chunk][step + 1])
                clean = add_noise(clean, noise[:, own], sigma=sigma)
            active[:, own].copy_(clean)

    def _take_many(self, tick: Tick) -> None:
        """Take a solver step with the guided velocity, or the update of an earlier one."""
        ((chunk, step),) = tick.steps.items()
        if step == 0:
            self.solver = UniPC(self.sampling.num_steps, shift=self.sampling.shift)
        frames, sigma = self.chunks[chunk], self.solver.grid.sigmas[step]
        x = self.latents[:, self._frames([chunk])]
        velocity = self.reuse.velocity(
            tick,
            x,
            timestep=self.solver.grid.timesteps[step],
            sigma=sigma,
            frames=frames,
            view=self._view(frames, is_clean=False),
        )
        if velocity is None:
            x += self.reuse.predicted_update(chunk, sigma=sigma, like=x)
            self.solver.skip()
        else:
            before = x.clone()
            x.copy_(self.solver.step(velocity.to(x.dtype), sample=before))
            self.reuse.put_update(chunk, x - before, sigma=sigma)
        if chunk in tick.finishing:
            self.reuse.drop(chunk)

    def feed_clean(self, chunk: int, *, timestep: float) -> None:
        """Send a clean chunk through the blocks for the sake of its keys, which become final."""
        own = self.chunks[chunk]
        self.cached.feed(
            self.latents[:, self._frames([chunk])],
            [timestep] * len(own),
            frames=own,
            chunk=chunk,
            view=self._view(own, is_clean=True),
        )

    # One pass ---------------------------------------------------------------------------------

    def _velocities(self, tick: Tick, times: dict[int, float]) -> dict[str, Tensor]:
        """Return the velocity of the active chunks in every branch, `[C, F, h, w]`.

        Args:
            times: timestep of each active chunk.
        """
        own, computed = self._frames(list(times)), Decision(is_computed=True)
        for name in self.cached.names:
            for chunk in tick.steps:
                self.cached.stats.record(tick, chunk, name, computed)
        if self.unfed is not None:
            return self._with_clean_pass(self.unfed, tick, times)
        return self.cached.velocities(
            self.latents[:, own],
            [times[chunk] for chunk in times for _ in self.chunks[chunk]],
            frames=range(own.start, own.stop),
            view=self._view(range(own.start, own.stop), is_clean=False),
            passes=lambda name: [PassId(0, tick.index, chunk, name) for chunk in times],
            blocks=self.blocks,
        )

    def _with_clean_pass(
        self, chunk: int, tick: Tick, times: dict[int, float]
    ) -> dict[str, Tensor]:
        """Compute a chunk's first step and the clean pass of the chunk before in one pass."""
        ((new, timestep),) = times.items()
        fed, own = self.chunks[chunk], self.chunks[new]
        clean = self.cached.clean_frames + len(fed)
        room = self.sampling.room(len(own), clean)
        first = min(self.sampling.sink, room) if room < clean else 0
        self.unfed = None
        return self.cached.velocities_after(
            self.latents[:, self._frames([chunk, new])],
            [self.sampling.context_noise] * len(fed) + [timestep] * len(own),
            frames=own,
            fed=fed,
            chunk=chunk,
            seen=(first, room - first),
            passes=lambda name: [PassId(0, tick.index, new, name)],
        )

    def _view(self, own: range, *, is_clean: bool) -> View | None:
        """Let frames leave that have no room next to a pass; return what the pass sees.

        Relative positions count what is held. In the rolling loop the first chunk stands right
        before the other frames; in a clean pass it has its own place. None: all that is held, at
        its place in the video.
        """
        sampling, cached, first_chunk = self.sampling, self.cached, len(self.chunks[0])
        if sampling.budget is not None:
            return None  # the caches see to it
        room = sampling.room(len(own), cached.clean_frames)
        stays = first_chunk if sampling.is_rolling else min(sampling.sink, room)
        if room < cached.clean_frames:
            cached.keep(first=stays, last=room - stays)
        if not sampling.is_rolling and not sampling.is_relative:
            return None
        clean = cached.clean_frames
        first, last = sampling.reach(len(own), clean, sink=first_chunk, is_clean=is_clean)
        start = own.start - last if sampling.is_rolling else 0
        positions = torch.arange(start - first, start + last + len(own))
        if is_clean:
            positions[:first] = torch.arange(first)
        return View(first, last, positions.to(self.latents.device, non_blocking=True))

    def _frames(self, chunks: Sequence[int]) -> slice:
        """Return the frames of neighbouring chunks."""
        return slice(self.chunks[chunks[0]].start, self.chunks[chunks[-1]].stop)

    def _noise_like(self, x_CFhw: Tensor) -> Tensor:
        """Draw noise as upstream: frames before channels, in the type of the transformer."""
        shape = (x_CFhw.shape[1], x_CFhw.shape[0], *x_CFhw.shape[2:])
        return self.draw(shape, self.cached.dit.dtype).movedim(1, 0).to(x_CFhw.dtype)
