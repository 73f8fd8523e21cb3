"""The denoising of one video: the loops of Self-Forcing and Causal-Forcing, from top to bottom.

A chunk sees itself and, through the KV cache, the chunks before it. Three loops share that:

    few steps     one chunk after the other; each step estimates the clean data and adds new noise
    many steps    one chunk after the other; guidance, and a UniPC solver of the chunk's own
    rolling       a window of chunks moves on, each chunk one step behind the one before it; they
                  see each other in both directions

A chunk that is done goes through the blocks once more, clean, for the keys that later ones see.

Axes: C latent channels, F latent frames, h/w latent rows/columns, B batch (1), S tokens, P tokens
of one frame, H heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from flowcache.kv import Attend, KVCache, cached_attention, prefetcher_for
from flowcache.policies import Decision, Observe
from flowcache.runtime.ops import Draw, on_device
from flowcache.runtime.parallel import Ranks, TokenSplit
from flowcache.runtime.stats import PassId, RunStats
from flowcache.schedule import Tick, staggered
from flowcache.wan.dit import (
    ContextKV,
    DiT,
    DiTConfig,
    Embedded,
    blocks_flops,
    embed_flops,
    head_flops,
    rotate,
)
from flowcache.wan.flow_match import add_noise, estimate_clean, levels_of
from flowcache.wan.unipc import UniPC, timestep_grid

FPS = 16
"""Frames per second of every released model; their transformer is not told."""


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
    """Timestep of the clean pass; the latents stay clean."""
    window: int | None = None
    """Latent frames that a chunk sees, its own included; None: all."""
    sink: int = 0
    """First latent frames that never leave the window."""
    is_relative: bool = False
    """Whether positions count from the start of the window, so that a video may have any length."""
    is_rolling: bool = False

    def ticks(self, chunks: Sequence[int]) -> list[Tick]:
        """Return the passes that denoise some chunks."""
        if self.is_rolling:
            return staggered(chunks, num_steps=len(self.steps), lag=1)
        counts = [len(self.timesteps(chunk == chunks[0])) for chunk in chunks]
        steps = [(c, step, n) for c, n in zip(chunks, counts, strict=True) for step in range(n)]
        return [Tick(i, sum(counts), n, {c: step}) for i, (c, step, n) in enumerate(steps)]

    def room(self, num_frames: int, clean: int) -> int:
        """Return how many clean frames may stay next to some that are denoised."""
        if self.window is None:
            return clean
        # a clean pass of the rolling loop sees all of the window, and the first chunk is kept, too
        return min(clean, self.window if self.is_rolling else self.window - num_frames)

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

    def timesteps(self, is_first: bool) -> Sequence[float]:
        """Return the timesteps of a chunk."""
        if not self.steps:
            return timestep_grid(self.num_steps, shift=self.shift)[0]
        return self.first_steps if is_first and self.first_steps else self.steps


def pass_flops(
    sizes: DiTConfig, num_frames: int, *, seen: int, frame_tokens: int, is_clean: bool
) -> int:
    """Return the FLOPs of one branch's blocks and, but for a clean pass, head.

    Args:
        seen: clean frames that these attend to in addition to themselves.
    """
    queries = num_frames * frame_tokens
    cost = blocks_flops(sizes, queries=queries, keys=queries + seen * frame_tokens)
    return cost if is_clean else cost + head_flops(sizes, queries=queries)


@dataclass
class Branch:
    """One guidance pass of a video: its prompt, and the caches of all layers."""

    context: list[ContextKV]
    caches: list[KVCache]


@dataclass(frozen=True)
class Run:
    """What denoising needs besides latents and branches."""

    dit: DiT
    sampling: Sampling
    stats: RunStats
    draw: Draw
    """Makes the noise between steps."""
    observe: Observe | None = None
    ranks: Ranks = field(default_factory=Ranks)


@dataclass(frozen=True)
class Seen:
    """What a pass sees where keys are rotated when they are read."""

    rows: tuple[slice, ...]
    """Of clean rows and the pass's own behind them."""
    positions: Tensor
    """Of the frames in these rows; the last ones are the pass's own."""


class Sampler:
    """Denoises one video; lives as long as it does.

    Args:
        latents: `[C, F, h, w]`, noise with the given frames in their places. Changed in place.
        chunks: latent frames of each chunk.
        num_given: chunks that are clean from the start.
        branches: by name, "cond" first; "uncond" where guidance is on.
    """

    def __init__(
        self,
        run: Run,
        latents: Tensor,
        *,
        chunks: Sequence[range],
        num_given: int,
        branches: Mapping[str, Branch],
    ) -> None:
        self.run, self.sampling, self.stats = run, run.sampling, run.stats
        self.latents, self.chunks, self.num_given = latents, chunks, num_given
        self.branches = branches
        self.own = {name: branches[name] for name in run.ranks.local_branches(list(branches))}
        """The branches that this process computes."""
        self.levels = levels_of(self.sampling.shift)
        self.frame_tokens = latents.shape[-2] * latents.shape[-1] // 4
        self.solver = UniPC(self.sampling.num_steps, shift=self.sampling.shift)
        self.prefetcher = prefetcher_for([c for b in self.own.values() for c in b.caches])
        if self.stats.trace is not None:
            for cache in chain.from_iterable(branch.caches for branch in self.own.values()):
                cache.track(len(chunks))

    def denoise(self) -> Iterator[tuple[Tick, tuple[int, ...]]]:
        """Denoise; after every tick yield it and the chunks that became clean in it."""
        sampling = self.sampling
        for chunk in range(self.num_given):
            with self.stats.stage("dit"):
                self.feed_clean(chunk, timestep=0)
        for tick in sampling.ticks(range(self.num_given, len(self.chunks))):
            with self.stats.timed_tick(0, tick.index), self.stats.stage("dit"):
                if sampling.is_rolling:
                    self._roll(tick)
                elif sampling.steps:
                    self._take_few(tick)
                else:
                    self._take_many(tick)
                # upstream feeds the last chunk, too, whose keys nobody sees
                for chunk in () if tick.is_last else tick.finishing:
                    few = bool(sampling.steps)
                    self.feed_clean(chunk, timestep=sampling.context_noise if few else 0)
            yield tick, tick.finishing

    # The three loops --------------------------------------------------------------------------

    def _take_few(self, tick: Tick) -> None:
        """Estimate the clean chunk; unless it was the last step, noise it to the next one."""
        ((chunk, step),) = tick.steps.items()
        timesteps, x = self.sampling.timesteps(chunk == self.num_given), self._latents(chunk)
        sigma = self.levels.sigma(timesteps[step])
        velocity = self._velocities(tick, times={chunk: timesteps[step]})["cond"]
        clean = estimate_clean(x, velocity, sigma=sigma).to(x.dtype)
        if chunk not in tick.finishing:
            noise = self._noise_like(x)
            clean = add_noise(clean, noise, sigma=self.levels.sigma(timesteps[step + 1]))
        x.copy_(clean)

    def _take_many(self, tick: Tick) -> None:
        """Take a solver step with the guided velocity."""
        ((chunk, step),) = tick.steps.items()
        if step == 0:
            self.solver = UniPC(self.sampling.num_steps, shift=self.sampling.shift)
        x, timestep = self._latents(chunk), self.sampling.timesteps(False)[step]
        velocities = self._velocities(tick, times={chunk: timestep})
        guided = velocities["cond"]
        if "uncond" in velocities:
            uncond = velocities["uncond"]
            guided = uncond + self.sampling.guidance * (velocities["cond"] - uncond)
        x.copy_(self.solver.step(guided.to(x.dtype), sample=x.clone()))

    def _roll(self, tick: Tick) -> None:
        """Estimate all active chunks together; noise each one to its own next step.

        As upstream, noise is drawn for the whole window once per chunk that goes on, and a chunk
        takes its own part of it.
        """
        steps = self.sampling.steps
        times = {chunk: steps[step] for chunk, step in tick.steps.items()}
        window = self.latents[:, self._frames(list(tick.steps))]
        velocity = self._velocities(tick, times=times)["cond"]
        start = self.chunks[min(times)].start
        for chunk, step in tick.steps.items():
            own = slice(self.chunks[chunk].start - start, self.chunks[chunk].stop - start)
            x, sigma = window[:, own], self.levels.sigma(times[chunk])
            clean = estimate_clean(x, velocity[:, own], sigma=sigma).to(x.dtype)
            if chunk not in tick.finishing:
                noise = self._noise_like(window)[:, own]
                clean = add_noise(clean, noise, sigma=self.levels.sigma(steps[step + 1]))
            x.copy_(clean)

    def feed_clean(self, chunk: int, *, timestep: float) -> None:
        """Send a clean chunk through the blocks for the sake of its keys, which become final."""
        size = len(self.chunks[chunk])
        self._make_room(size)
        embedded = self._embed({chunk: timestep})
        for branch in self.own.values():
            self._count(branch, size, is_clean=True)
            self._through_blocks(branch, embedded, [chunk], is_clean=True)
            for cache in branch.caches:
                cache.settle(size * self.frame_tokens, chunk=chunk)

    # One tick ---------------------------------------------------------------------------------

    def _velocities(self, tick: Tick, *, times: Mapping[int, float]) -> dict[str, Tensor]:
        """Return the velocity of the active chunks in every branch, `[C, F, h, w]`.

        Args:
            times: timestep of each active chunk.
        """
        active = list(times)
        num_frames = sum(len(self.chunks[chunk]) for chunk in active)
        self._make_room(num_frames)
        embedded, made = self._embed(times), dict[str, Tensor]()
        for name in self.branches:
            passes = [PassId(0, tick.index, chunk, name) for chunk in active]
            for chunk, step in tick.steps.items():
                self.stats.record(
                    segment=0,
                    tick=tick.index,
                    chunk=chunk,
                    step=step,
                    branch=name,
                    decision=Decision(is_computed=True),
                )
            if name not in self.own:
                continue
            branch = self.own[name]
            self._count(branch, num_frames, passes=passes)
            with self.stats.timed_pass(passes):
                hidden = self._through_blocks(branch, embedded, active)
                height, width = self.latents.shape[-2:]
                made[name] = self.run.dit.velocity(
                    hidden, embedded, latent_height=height, latent_width=width
                )[0]
        like = self.latents[:, self._frames(active)]
        names = list(self.branches)
        return self.run.ranks.gather_branches(made, names=names, like=like)

    def _embed(self, times: Mapping[int, float]) -> Embedded:
        frames = [times[chunk] for chunk in times for _ in self.chunks[chunk]]
        if self.run.ranks.branches.rank == 0:  # the others' is the same work
            sizes = self.run.dit.config
            cost = embed_flops(sizes, num_frames=len(frames), frame_tokens=self.frame_tokens)
            self.stats.add_flops(computed=cost, without_reuse=cost)
        x = self.latents[:, self._frames(list(times))].unsqueeze(0)
        t = on_device(frames, dtype=torch.float32, device=x.device).unsqueeze(0)
        return self.run.dit.embed(x, t, fps=[FPS])

    def _through_blocks(
        self, branch: Branch, embedded: Embedded, active: list[int], *, is_clean: bool = False
    ) -> Tensor:
        """Run the blocks of one branch: `[1, S, D]`."""
        dit, own = self.run.dit, self._frames(active)
        frames = torch.arange(own.start, own.stop, device=self.latents.device)
        rope = self._rope(frames)
        split = TokenSplit(self.run.ranks.sequence, len(frames), self.frame_tokens)
        if self.sampling.is_rolling or self.sampling.is_relative:
            seen = self._seen(branch, active, is_clean=is_clean)
            attend = self._rotate_when_read(branch, seen, num_own=len(rope))
            rope = torch.stack([torch.ones_like(rope[..., 0]), torch.zeros_like(rope[..., 0])], -1)
        else:
            attend = cached_attention(
                [branch.caches],
                active=[range(len(rope))],
                kernel=dit.kernel,
                prefetcher=self.prefetcher,
            )
        part = Embedded(split.scatter(embedded.tokens, axis=1), embedded.time, embedded.modulation)
        hidden = dit.run_blocks(
            part,
            split.scatter(rope, axis=0),
            branch.context,
            self_attend=split.over_heads(attend),
        )
        return split.gather(hidden)

    # What a chunk sees ------------------------------------------------------------------------

    def _make_room(self, num_frames: int) -> None:
        """Let the oldest frames behind the sink leave where the next ones need their place.

        Whole frames leave, also of a part of a chunk. Example: window 6, sink 1, chunks of 3: of
        the clean frames 0..5 the frames 0, 4, 5 stay for the chunk 6..8.
        """
        sampling, per_frame = self.sampling, self.frame_tokens
        sink = len(self.chunks[0]) if sampling.is_rolling else sampling.sink
        for cache in chain.from_iterable(branch.caches for branch in self.own.values()):
            room = sampling.room(num_frames, cache.clean // per_frame)
            if cache.clean > room * per_frame:
                recent = torch.arange(cache.clean - (room - sink) * per_frame, cache.clean)
                indices = torch.cat([torch.arange(sink * per_frame), recent])
                on_device = indices.to(self.latents.device, non_blocking=True)
                cache.keep(on_device.unsqueeze(1).expand(-1, cache.kv.shape[2]))

    def _seen(self, branch: Branch, active: list[int], *, is_clean: bool) -> Seen:
        """Return what a pass sees whose keys are rotated when they are read.

        Relative positions are those of the rows. In the rolling loop the first chunk stands right
        before the other frames; in a clean pass it has its own place.
        """
        own, per_frame, sink = self._frames(active), self.frame_tokens, len(self.chunks[0])
        num_own, clean = own.stop - own.start, branch.caches[0].clean // per_frame
        first, last = self.sampling.reach(num_own, clean, sink=sink, is_clean=is_clean)
        start = own.start - last if self.sampling.is_rolling else 0
        places = torch.arange(start - first, start + last + num_own)
        if is_clean:
            places[:first] = torch.arange(first)
        rows = (slice(0, first), slice(clean - last, clean + num_own))
        return Seen(
            tuple(slice(row.start * per_frame, row.stop * per_frame) for row in rows),
            places.to(self.latents.device, non_blocking=True),
        )

    def _rotate_when_read(self, branch: Branch, seen: Seen, *, num_own: int) -> Attend:
        """Return the attention of a pass to rows of a cache that holds keys before rotation."""
        rope = self._rope(seen.positions)
        stop = branch.caches[0].clean + num_own

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = branch.caches[layer]
            cache.put(0, k[0], v[0])
            held_k, held_v = cache.prefix(stop - cache.clean)
            keys, values = (torch.cat([x[rows] for rows in seen.rows]) for x in (held_k, held_v))
            rotated = rotate(keys.unsqueeze(0), rope).to(k.dtype)
            queries = rotate(q, rope[-num_own:]).to(q.dtype)
            return self.run.dit.kernel(queries, rotated, values.unsqueeze(0))

        return attend

    def _rope(self, frames: Tensor) -> Tensor:
        height, width = self.latents.shape[-2:]
        return self.run.dit.rope(frames, latent_height=height, latent_width=width)

    def _count(
        self,
        branch: Branch,
        num_frames: int,
        *,
        is_clean: bool = False,
        passes: Sequence[PassId] = (),
    ) -> None:
        """Add the FLOPs of one branch's blocks and head."""
        clean = branch.caches[0].clean // self.frame_tokens
        cost = pass_flops(
            self.run.dit.config,
            num_frames,
            seen=sum(
                self.sampling.reach(num_frames, clean, sink=len(self.chunks[0]), is_clean=is_clean)
            ),
            frame_tokens=self.frame_tokens,
            is_clean=is_clean,
        )
        self.stats.add_flops(computed=cost, without_reuse=cost, passes=passes)

    # Latents ----------------------------------------------------------------------------------

    def _frames(self, chunks: list[int]) -> slice:
        """Return the frames of neighbouring chunks."""
        return slice(self.chunks[chunks[0]].start, self.chunks[chunks[-1]].stop)

    def _latents(self, chunk: int) -> Tensor:
        return self.latents[:, self._frames([chunk])]

    def _noise_like(self, x_CFhw: Tensor) -> Tensor:
        """Draw noise as upstream: frames before channels, in the type of the transformer."""
        shape = (x_CFhw.shape[1], x_CFhw.shape[0], *x_CFhw.shape[2:])
        return self.run.draw(shape, self.run.dit.dtype).movedim(1, 0).to(x_CFhw.dtype)
