"""The denoising of one window: the loop of SkyReels-V2 with FlowCache, from top to bottom.

In every tick the active chunks are embedded; each guidance branch decides which of them go through
the blocks, and predicts the others' velocities from stored results; guidance makes one velocity of
the branches'; every chunk takes a step with a solver of its own. Attention is full over the window,
or causal: then a chunk sees itself and, through the KV cache, those before it.

Axes: C latent channels, F latent frames, h/w latent rows/columns, B batch, S tokens, D width. The
batch is 1, or has one entry per guidance branch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flowcache.kv import Compression, KVCache, cached_attention, prefetcher_for
from flowcache.policies import Observe, ReusePolicy
from flowcache.predict import PREDICTORS, HeldGuidance, Level, Quantity, ResultStore
from flowcache.runtime.ops import on_device
from flowcache.runtime.parallel import Ranks, TokenSplit
from flowcache.runtime.stats import PassId, RunStats
from flowcache.schedule import Tick, staggered
from flowcache.tokens import TokenChoice, patches_of
from flowcache.wan.calibration import Signal
from flowcache.wan.dit import (
    PATCH,
    ContextKV,
    DiT,
    Embedded,
    blocks_flops,
    embed_flops,
    head_flops,
    join_contexts,
    whole_window,
)
from flowcache.wan.reuse import WHOLE_WINDOW, BranchReuse, Computed, NoisyChunk
from flowcache.wan.unipc import UniPC, timestep_grid
from skyreels_v2.window import Window

WAITING_TIMESTEP = 999
"""Timestep shown to the model for chunks that are still pure noise."""


@dataclass(frozen=True)
class Sampling:
    """How a window is denoised."""

    num_steps: int
    shift: float
    guidance: float
    lag: int
    attention: Literal["full", "causal"]
    clean_pass: bool
    fps: int
    addnoise: int = 0
    """Timestep, 0..60, to which the prefix is noised while it conditions the rest."""
    signal: Signal = "timestep"
    quantity: Quantity = "residual"
    """What a reused chunk gets again."""
    batch_branches: bool = False
    """Compute the guidance branches in one batch: fewer, larger operations, more memory."""
    together_tokens: int = 4096
    """Chunks of one tick with at most so many tokens together go through the blocks at once."""

    @property
    def level(self) -> Level:
        """Where what is reused lies: in the tokens, the velocities, or the whole step."""
        return PREDICTORS[self.quantity].level

    def ticks(self, window: Window) -> list[Tick]:
        """Return the passes that denoise a window."""
        return staggered(window.generated, num_steps=self.num_steps, lag=self.lag)


@dataclass(frozen=True)
class Run:
    """What all windows of a video share."""

    dit: DiT
    sampling: Sampling
    stats: RunStats
    compression: Compression | None = None
    new_store: Callable[[], ResultStore] = ResultStore
    """Makes the stores of what reused steps are predicted from."""
    new_guidance: Callable[[], HeldGuidance] = HeldGuidance
    """Makes the record of where "cond" alone is computed."""
    draw_noise: Callable[[Tensor], Tensor] = torch.randn_like
    """Makes float32 standard normal noise like its argument."""
    observe: Observe | None = None
    """Is shown the velocities of computed steps."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that divide the work; all hold the same latents."""


@dataclass
class Branch:
    """One guidance pass of one window: its prompt, decisions, stored results, keys and values."""

    context: list[ContextKV]
    policy: ReusePolicy
    results: ResultStore
    caches: list[KVCache]
    """One per layer; empty with full attention."""
    tokens: TokenChoice | None = None
    """Which tokens of a chunk are computed; None: all."""


class WindowSampler:
    """Denoises one window; lives as long as it does.

    Args:
        latents: `[C, F, h, w]` float32: noise, with the given frames in their places. Changed in
            place.
        branches: by name, "cond" first; "uncond" where guidance is on.
        condition: `[C, F, h, w]` start image condition of an I2V model.
    """

    def __init__(
        self,
        run: Run,
        latents: Tensor,
        *,
        window: Window,
        branches: Mapping[str, Branch],
        segment: int = 0,
        condition: Tensor | None = None,
    ) -> None:
        self.run, self.sampling, self.stats = run, run.sampling, run.stats
        self.latents, self.condition = latents, condition
        self.window, self.segment = window, segment
        self.branches = branches
        # of this process
        self.own = {name: branches[name] for name in run.ranks.local_branches(list(branches))}
        height, width = latents.shape[-2:]

        # no method: a cycle would keep the caches of a window that is done
        def read(hidden_BSD: Tensor, embedded: Embedded) -> Tensor:
            size = {"latent_height": height, "latent_width": width}
            return run.dit.velocity(hidden_BSD, embedded, **size)[0]

        self.reuse = BranchReuse(
            signal=self.sampling.signal,
            quantity=self.sampling.quantity,
            scale=self.sampling.guidance,
            policies={name: branch.policy for name, branch in branches.items()},
            results={name: branch.results for name, branch in branches.items()},
            tokens={name: b.tokens for name, b in branches.items() if b.tokens is not None},
            updates=run.new_store(),
            guidance=run.new_guidance(),
            stats=run.stats,
            ranks=run.ranks,
            read=read,
            observe=run.observe,
            segment=segment,
        )
        num_steps, shift = self.sampling.num_steps, self.sampling.shift
        self.timesteps, self.sigmas = timestep_grid(num_steps, shift=shift)
        self.solvers = {chunk: UniPC(num_steps, shift=shift) for chunk in window.generated}
        self.clean = set(range(window.num_given))
        self.prefetcher = prefetcher_for([c for b in self.own.values() for c in b.caches])
        self.batched_context: list[ContextKV] = []
        if self.sampling.batch_branches and len(self.own) > 1:
            self.batched_context = join_contexts([branch.context for branch in self.own.values()])
        self.rope = run.dit.rope(
            torch.arange(window.num_frames, device=latents.device),
            latent_height=height,
            latent_width=width,
        )
        self.frame_tokens = len(self.rope) // window.num_frames
        if self.stats.trace is not None:
            for branch in branches.values():
                for cache in branch.caches:
                    cache.track(len(window.chunks))

    def denoise(self) -> Iterator[tuple[Tick, tuple[int, ...]]]:
        """Denoise; after every tick yield it and the chunks that became clean in it."""
        if self.sampling.attention == "causal":
            self._feed_given()
        for tick in self.sampling.ticks(self.window):
            with self.stats.timed_tick(self.segment, tick.index), self.stats.stage("dit"):
                self._advance(tick, self._velocities(tick))
                self._finish(tick)
            caches = {name: own.caches for name, own in self.own.items() if own.caches}
            self.stats.keep_tokens(
                self.segment, tick.index, caches, sequence=self.run.ranks.sequence
            )
            yield tick, tick.finishing

    # One tick ---------------------------------------------------------------------------------

    def _velocities(self, tick: Tick) -> dict[int, Tensor]:
        """Return the guided velocity of each active chunk, but for those with a reused update."""
        is_causal = self.sampling.attention == "causal"
        noisy = self._embed_active(tick) if is_causal else [self._embed_window(tick)]
        guided: dict[int, Tensor] = {}
        decided = self.reuse.decide(tick, noisy, self._signals(noisy))
        for group in self._until_settled(tick, decided):
            computed = self._compute(tick, group)
            for chunk in group:
                velocity = self.reuse.guided(tick, chunk, computed[chunk.id])
                if velocity is not None:
                    guided[chunk.id] = velocity
            if self._settles(tick, group[-1].id):
                self._settle(group[-1].id)
        if WHOLE_WINDOW in guided:
            whole = guided[WHOLE_WINDOW]
            return {chunk: whole[:, self._frames(chunk)] for chunk in tick.steps}
        return guided

    def _advance(self, tick: Tick, velocities: Mapping[int, Tensor]) -> None:
        """Take one solver step with every active chunk."""
        for chunk, step in tick.steps.items():
            latents, solver = self.latents[:, self._frames(chunk)], self.solvers[chunk]
            sigma = self.sigmas[step]
            if chunk not in velocities:
                latents += self.reuse.predicted_update(chunk, sigma=sigma, like=latents)
                solver.skip()
                continue
            before = latents.clone() if self.sampling.level == "step" else None
            solver.advance_(latents, velocity=velocities[chunk])
            if before is not None:
                self.reuse.put_update(chunk, latents - before, sigma=sigma)
            for branch in self.own.values():
                if branch.tokens is not None and branch.tokens.weighed == "latent":
                    branch.tokens.see(chunk, patches_of(latents, size=PATCH[1]))

    def _finish(self, tick: Tick) -> None:
        """Make the chunks clean that took their last step: results dropped, keys settled."""
        for chunk in tick.finishing:
            self.clean.add(chunk)
            self.reuse.drop(chunk)
            if self.sampling.attention == "causal" and self.sampling.clean_pass:
                if not tick.is_last:  # else nobody would see the keys
                    self._feed_clean(chunk, timestep=0)
                self._settle(chunk)

    # Noisy latents, embedded ------------------------------------------------------------------

    def _embed_window(self, tick: Tick) -> NoisyChunk:
        """Embed the whole window, every frame at its own noise level."""
        latents, (times, sigma) = self.latents.clone(), self._levels(tick, self._in_time())
        prefix = self.window.num_prefix
        if prefix and self.sampling.addnoise:
            latents[:, :prefix] = self._noised(latents[:, :prefix])
            times[:prefix] = [self.sampling.addnoise] * prefix
        embedded = self._embed(latents, frames=list(range(self.window.num_frames)), times=times)
        active = {c: (self._frames(c), self.sigmas[step]) for c, step in tick.steps.items()}
        return NoisyChunk(WHOLE_WINDOW, active, latents, sigma, embedded)

    def _embed_active(self, tick: Tick) -> list[NoisyChunk]:
        """Embed the active chunks, all at once, and take them apart again."""
        latents = torch.cat([self.latents[:, self._frames(chunk)] for chunk in tick.steps], dim=1)
        frames = [frame for chunk in tick.steps for frame in self.window.chunks[chunk]]
        times, sigma = self._levels(tick, tick.steps)
        embedded = self._embed(latents, frames=frames, times=times)
        chunks: list[NoisyChunk] = []
        start = offset = 0
        for chunk, step in tick.steps.items():
            stop = start + len(self.window.chunks[chunk])
            own, part = slice(start, stop), embedded.frames(start, stop)
            active = {chunk: (slice(None), self.sigmas[step])}
            chunks.append(NoisyChunk(chunk, active, latents[:, own], sigma[own], part, offset))
            # the keys of one that settles in this tick count as clean for those behind it
            offset += 0 if self._settles(tick, chunk) else chunks[-1].num_tokens
            start = stop
        return chunks

    def _embed(self, latents_CFhw: Tensor, *, frames: list[int], times: list[int]) -> Embedded:
        """Embed some frames of the window, each at its own timestep."""
        run, condition = self.run, self.condition
        if condition is not None:
            index = on_device(frames, dtype=torch.int64, device=self.latents.device)
            condition = condition.index_select(1, index)
        if run.ranks.branches.rank == 0:  # the others' is the same work
            cost = embed_flops(
                run.dit.config, num_frames=len(frames), frame_tokens=self.frame_tokens
            )
            self.stats.add_flops(computed=cost, without_reuse=cost)
        return run.dit.embed(
            latents_CFhw.unsqueeze(0),
            self._tensor(times).unsqueeze(0),
            fps=[self.sampling.fps],
            y_BCFhw=None if condition is None else condition.unsqueeze(0),
        )

    def _levels(self, tick: Tick, chunks: Iterable[int]) -> tuple[list[int], Tensor]:
        """Return the timestep and the noise level of every frame of some chunks, `[F]`."""
        times: list[int] = []
        sigmas: list[float] = []
        for chunk in chunks:
            size, step = len(self.window.chunks[chunk]), tick.steps.get(chunk)
            time, sigma = WAITING_TIMESTEP, self.sigmas[0]
            if step is not None:
                time, sigma = self.timesteps[step], self.sigmas[step]
            elif chunk in self.clean:
                time, sigma = 0, 0.0
            times += [time] * size
            sigmas += [sigma] * size
        return times, self._tensor(sigmas)

    def _noised(self, latents: Tensor) -> Tensor:
        share = self.sampling.addnoise / 1000
        return (1 - share) * latents + share * self.run.draw_noise(latents)

    # What is computed -------------------------------------------------------------------------

    def _signals(self, chunks: Sequence[NoisyChunk]) -> dict[int, Tensor]:
        """Return what the policies compare: of the active chunks, or of all in the window."""
        if self.sampling.attention == "causal":
            return {chunk.id: self.reuse.signal_of(chunk.embedded) for chunk in chunks}
        (whole,) = chunks
        bounds = {chunk: self.window.chunks[chunk] for chunk in self._in_time()}
        parts = {c: whole.embedded.frames(b.start, b.stop) for c, b in bounds.items()}
        return {chunk: self.reuse.signal_of(part) for chunk, part in parts.items()}

    # Velocities -------------------------------------------------------------------------------

    def _until_settled(
        self, tick: Tick, chunks: Sequence[NoisyChunk]
    ) -> Iterator[Sequence[NoisyChunk]]:
        """Yield the chunks of a tick in order, up to each one whose keys become final.

        The chunks behind that one attend to its final keys in this tick already.
        """
        start = 0
        for number, chunk in enumerate(chunks, 1):
            if self._settles(tick, chunk.id) or number == len(chunks):
                yield chunks[start:number]
                start = number

    # Through the blocks -----------------------------------------------------------------------

    def _compute(self, tick: Tick, chunks: Sequence[NoisyChunk]) -> dict[int, Computed]:
        """Send chunks through the blocks of the branches in which they are computed."""
        for chunk in chunks:
            for name, branch in self.own.items():
                passes = self._passes(tick, chunk, name)
                self._count(
                    branch,
                    chunk,
                    is_computed=name in chunk.computed,
                    rows=chunk.rows.get(name),
                    passes=passes,
                )
        made: dict[int, Computed] = {chunk.id: {} for chunk in chunks}
        for batch in self._together(chunks):
            names = [name for name in batch[0].computed if name in self.own]
            embedded = batch[0].embedded.joined([chunk.embedded for chunk in batch[1:]])
            passes = [
                p for name in names for chunk in batch for p in self._passes(tick, chunk, name)
            ]
            with self.stats.timed_pass(passes):
                hidden = self._run_blocks(names, batch, embedded)
            frames = [len(chunk.sigma) for chunk in batch]
            tokens = [chunk.num_tokens for chunk in batch]
            for name, whole in hidden.items():
                velocities = self.reuse.read(whole, embedded).split(frames, dim=1)
                parts = whole.split(tokens, dim=1)
                for chunk, part, velocity in zip(batch, parts, velocities, strict=True):
                    made[chunk.id][name] = (part, velocity)
        return made

    def _together(self, chunks: Sequence[NoisyChunk]) -> Iterator[list[NoisyChunk]]:
        """Yield the computed chunks that go through the blocks at once: of the same branches."""
        batch: list[NoisyChunk] = []
        for chunk in chunks:
            if not chunk.computed:
                continue
            tokens = sum(other.num_tokens for other in (*batch, chunk))
            if batch and (
                chunk.computed != batch[0].computed
                or tokens > self.sampling.together_tokens
                or chunk.rows
                or batch[0].rows
            ):
                yield batch
                batch = []
            batch.append(chunk)
        if batch:
            yield batch

    def _run_blocks(
        self, names: Sequence[str], chunks: Sequence[NoisyChunk], embedded: Embedded
    ) -> dict[str, Tensor]:
        """Run the blocks for the tokens of all chunks in some branches: `[1, S, D]` each."""
        if self.batched_context and len(names) == len(self.own) and not chunks[0].rows:
            return self._run_batch(names, self.batched_context, chunks, embedded)
        hidden: dict[str, Tensor] = {}
        for name in names:
            if name in chunks[0].rows:
                hidden[name] = self._run_some(name, chunks[0])
            else:
                hidden |= self._run_batch([name], self.own[name].context, chunks, embedded)
        return hidden

    def _run_some(self, name: str, chunk: NoisyChunk) -> Tensor:
        """Run the blocks for some tokens of a chunk in one branch: `[1, S, D]`.

        The other tokens get what is stored of them, where that is of tokens.
        """
        branch, rows, embedded = self.own[name], chunk.rows[name], chunk.embedded
        attend = cached_attention(
            [branch.caches],
            active=[range(chunk.offset, chunk.offset + chunk.num_tokens)],
            kernel=self.run.dit.kernel,
            rows=rows,
        )
        # all frames of a chunk are at one noise level, so one modulation serves any of its tokens
        some = Embedded(embedded.tokens[:, rows], embedded.time[:, :1], embedded.modulation[:, :1])
        rope = self.rope.unflatten(0, (-1, self.frame_tokens))[self._frames(chunk.id)].flatten(0, 1)
        made = self.run.dit.run_blocks(some, rope[rows], branch.context, self_attend=attend)
        whole = embedded.tokens
        if self.sampling.level == "tokens":
            whole = whole + branch.results.predict(chunk.id, sigma=chunk.sigma).flatten(0, 1)
        return whole.to(made.dtype).index_copy(1, rows, made)

    def _run_batch(
        self,
        names: Sequence[str],
        context: list[ContextKV],
        chunks: Sequence[NoisyChunk],
        embedded: Embedded,
    ) -> dict[str, Tensor]:
        """Run the blocks on one batch entry per branch, each with its own cache."""
        run = self.run
        split = TokenSplit(run.ranks.sequence, embedded.time.shape[1], self.frame_tokens)
        if chunks[0].id == WHOLE_WINDOW:
            attend, rope = whole_window(run.dit.kernel), self.rope
        else:
            attend = cached_attention(
                [self.own[name].caches for name in names],
                active=[range(c.offset, c.offset + c.num_tokens) for c in chunks],
                kernel=run.dit.kernel,
                compression=run.compression,
                prefetcher=self.prefetcher,
                timing=lambda: self.stats.stage("kv_compression"),
            )
            by_frame = self.rope.unflatten(0, (-1, self.frame_tokens))
            rope = torch.cat([by_frame[self._frames(c.id)] for c in chunks]).flatten(0, 1)
        every = Embedded(
            split.scatter(embedded.tokens, axis=1).expand(len(names), -1, -1),
            embedded.time,
            embedded.modulation.expand(len(names), -1, -1, -1),
        )
        hidden = run.dit.run_blocks(
            every, split.scatter(rope, axis=0), context, self_attend=split.over_heads(attend)
        )
        return dict(zip(names, split.gather(hidden).split(1), strict=True))

    def _count(
        self,
        branch: Branch,
        chunk: NoisyChunk,
        *,
        is_computed: bool,
        has_head: bool = True,
        rows: Tensor | None = None,
        passes: Sequence[PassId] = (),
    ) -> None:
        """Add the FLOPs of blocks and head of one branch, as done and as without reuse.

        Args:
            rows: tokens that go through the blocks; None: all.
        """
        config, queries = self.run.dit.config, chunk.num_tokens
        keys = queries
        if branch.caches:
            clean = branch.caches[0].clean
            if self.run.compression is not None:  # done before anything attends
                clean = min(clean, self.run.compression.budget)
            keys += clean + chunk.offset
        blocks = blocks_flops(config, queries=queries, keys=keys)
        own = blocks if rows is None else blocks_flops(config, queries=len(rows), keys=keys)
        head = head_flops(config, queries=queries) if has_head else 0
        reads_head = is_computed or self.sampling.level == "tokens"
        self.stats.add_flops(
            computed=(own if is_computed else 0) + (head if reads_head else 0),
            without_reuse=blocks + head,
            passes=passes,
        )

    # Keys of clean chunks ---------------------------------------------------------------------

    def _feed_given(self) -> None:
        """Put the keys of the given chunks into the cache: one forward each."""
        with self.stats.stage("dit"):
            for chunk in range(self.window.num_given):
                is_prefix = self.window.chunks[chunk].start < self.window.num_prefix
                self._feed_clean(chunk, timestep=self.sampling.addnoise if is_prefix else 0)
                self._settle(chunk)

    def _feed_clean(self, chunk: int, *, timestep: int) -> None:
        """Forward a clean chunk for the sake of its keys, noised up to `timestep` if above 0."""
        frames = self.window.chunks[chunk]
        latents = self.latents[:, self._frames(chunk)]
        if timestep:
            latents = self._noised(latents)
        embedded = self._embed(latents, frames=list(frames), times=[timestep] * len(frames))
        sigma = self._tensor([timestep / 1000] * len(frames))
        clean = NoisyChunk(chunk, {}, latents, sigma, embedded)
        for branch in self.own.values():
            self._count(branch, clean, is_computed=True, has_head=False)
        self._run_blocks(list(self.own), [clean], embedded)

    def _settles(self, tick: Tick, chunk: int) -> bool:
        """Tell whether a chunk's keys are final: in its last step, unless a clean pass follows."""
        return chunk in tick.finishing and not self.sampling.clean_pass

    def _settle(self, chunk: int) -> None:
        """Declare the keys of the oldest active chunk final."""
        num_tokens = len(self.window.chunks[chunk]) * self.frame_tokens
        for branch in self.own.values():
            for cache in branch.caches:
                cache.settle(num_tokens, chunk=chunk)
                cache.pack()

    # What is recorded and shown ---------------------------------------------------------------

    def _passes(self, tick: Tick, chunk: NoisyChunk, branch: str) -> list[PassId]:
        return [PassId(self.segment, tick.index, active, branch) for active in chunk.active]

    # Places in the window ---------------------------------------------------------------------

    def _in_time(self) -> list[int]:
        """Return the chunks by their first frame; a given end frame is the last one."""
        return sorted(range(len(self.window.chunks)), key=lambda c: self.window.chunks[c].start)

    def _frames(self, chunk: int) -> slice:
        own = self.window.chunks[chunk]
        return slice(own.start, own.stop)

    def _tensor(self, values: list[int] | list[float]) -> Tensor:
        return on_device(values, dtype=torch.float32, device=self.latents.device)
