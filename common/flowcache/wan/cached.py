"""The Wan transformer with the keys and values of earlier frames, chunk by chunk.

    cached = CachedDiT(dit, open_branches(dit, texts, ...), stats=stats, size=(h, w), num_chunks=7)
    velocities = cached.velocities(x, times, frames=range(3, 6))  # of frames 3..5, by branch
    cached.feed(x, times, frames=range(3, 6), chunk=1)            # clean: their keys are final
    cached.keep(first=1, last=5)                                  # others leave

Keys lie in the cache as they are read, or before rotation: then a `View` says which frames a pass
sees and at which positions.

Axes: C latent channels, F latent frames, h/w latent rows/columns, S tokens, H heads, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from flowcache.block_reuse import BlockReuse
from flowcache.compress import KVRule
from flowcache.kv import Attend, KVCache, cached_attention, caches_for, prefetcher_for
from flowcache.kv_quantized import KVLayout, KVSizes, Rotary, cache_maker
from flowcache.quantization import attend_wide, format_of
from flowcache.runtime.model import SegmentWork
from flowcache.runtime.ops import on_device
from flowcache.runtime.parallel import Ranks, TokenSplit
from flowcache.runtime.stats import PassId, RunStats
from flowcache.schedule import Tick
from flowcache.wan.dit import (
    PATCH,
    Around,
    ContextKV,
    DiT,
    Embedded,
    blocks_flops,
    context_flops,
    embed_flops,
    head_flops,
    rotate,
)
from flowcache.wan.kept import Budget, KeptKeys, rotate_keys

NO_RATE = [16]
"""Frames per second, for models whose transformer is not told."""
Passes = Callable[[str], Sequence[PassId]]
"""Branch -> the passes that a record shows."""


@dataclass
class Branch:
    """One guidance pass of a video: its prompt, and the caches of all layers."""

    context: list[ContextKV]
    caches: list[KVCache]


@dataclass(frozen=True)
class View:
    """What a pass sees of the clean frames, where keys are rotated when they are read.

    Example: 6 clean frames, first 1, last 2: a pass of 3 frames sees the frames 0, 4, 5 and its
    own, at 6 positions.
    """

    first: int
    last: int
    positions: Tensor
    """Of the first, the last and the pass's own frames."""


def encode_contexts(
    dit: DiT,
    texts: Mapping[str, Tensor],
    image: Tensor | None = None,
    *,
    stats: RunStats,
    ranks: Ranks,
) -> dict[str, list[ContextKV]]:
    """Project every branch's prompt to cross-attention keys and values, once per video.

    A branch that other processes compute gets none.

    Args:
        texts: branch -> text encoder output `[1, L, D]`.
        image: what CLIP sees in the start image, `[1, 257, 1280]`.
    """
    device, contexts = dit.patch_embedding.weight.device, dict[str, list[ContextKV]]()
    with stats.stage("dit"):
        for number, (name, text) in enumerate(texts.items()):
            contexts[name] = []
            if not ranks.computes(number):
                continue
            cost = context_flops(dit.config)
            stats.add_flops(computed=cost, without_reuse=cost)
            contexts[name] = dit.encode_context(
                text.to(device), None if image is None else image.to(device)
            )
    return contexts


def kv_layout(
    dit: DiT,
    rule: KVRule,
    part: SegmentWork,
    *,
    chunks: Sequence[range],
    size: tuple[int, int],
    comes_rotated: bool = True,
    waits: bool = False,
) -> KVLayout | None:
    """Return what the quantised caches of a segment have in common, if they are quantised.

    Args:
        chunks: frames of each chunk.
        size: rows and columns of a latent frame.
        comes_rotated: whether keys are rotated before they are put, rather than when read.
        waits: whether the clean pass of a chunk is made with the first step of the next one.
    """
    made = format_of(rule, head_width=dit.config.head_width)
    if made is None:
        return None
    frame_tokens, rotary = part.tokens[0] // len(chunks[0]), None
    if comes_rotated:
        last = max(chunk.stop for chunk in chunks)
        frames = torch.arange(last, device=dit.patch_embedding.weight.device)
        table = dit.rope(frames, latent_height=size[0], latent_width=size[1])
        rotary = Rotary(table, rotate, has_neighbours=True)
    starts = {number: chunk.start * frame_tokens for number, chunk in enumerate(chunks)}
    return KVLayout(KVSizes.of(made, part.ticks, part.tokens, waits=waits), starts, rotary)


def open_caches(
    dit: DiT, *, ranks: Ranks, kv_tokens: int, on_host: bool, layout: KVLayout | None = None
) -> list[KVCache]:
    """Allocate the caches of all layers of a branch.

    Args:
        kv_tokens: that a cache holds at most.
        on_host: whether caches lie in the memory of the host.
        layout: of quantised caches, see `kv_layout`.
    """
    return caches_for(
        dit.config.num_layers,
        capacity=kv_tokens,
        num_heads=dit.config.num_heads // ranks.layout.sequence,
        head_width=dit.config.head_width,
        dtype=dit.dtype,
        device=dit.patch_embedding.weight.device,
        storage=torch.device("cpu") if on_host else None,
        make=cache_maker(layout),
    )


def open_branches(
    dit: DiT,
    texts: Mapping[str, Tensor],
    *,
    stats: RunStats,
    ranks: Ranks,
    kv_tokens: int,
    on_host: bool,
    layout: KVLayout | None = None,
) -> dict[str, Branch]:
    """Encode the prompts and allocate caches; branches of other processes have neither.

    See `encode_contexts` and `open_caches`.
    """
    branches = dict[str, Branch]()
    contexts = encode_contexts(dit, texts, stats=stats, ranks=ranks)
    for number, (name, context) in enumerate(contexts.items()):
        caches = list[KVCache]()
        if ranks.computes(number):
            caches = open_caches(
                dit, ranks=ranks, kv_tokens=kv_tokens, on_host=on_host, layout=layout
            )
        branches[name] = Branch(context, caches)
    return branches


class CachedDiT:
    """A transformer and the caches of one video.

    Args:
        branches: by name, in the order in which they are computed.
        size: rows and columns of a latent frame.
        num_chunks: of the video, for records.
        budget: by which clean tokens stay; None: those that `keep` is told.
    """

    def __init__(
        self,
        dit: DiT,
        branches: Mapping[str, Branch],
        *,
        stats: RunStats,
        ranks: Ranks,
        size: tuple[int, int],
        num_chunks: int,
        budget: Budget | None = None,
    ) -> None:
        self.dit, self.stats, self.ranks, self.size = dit, stats, ranks, size
        self.names = list(branches)
        self.own = {name: branches[name] for name in ranks.local_branches(self.names)}
        """The branches that this process computes."""
        self.frame_tokens = size[0] // PATCH[1] * (size[1] // PATCH[2])
        self.prefetcher = prefetcher_for(self._caches)
        self.kept = dict[str, KeptKeys]()
        """Of own branches, where tokens stay by a budget."""
        self._tracked = dict[str, list[KVCache]]()
        """Of own branches, where a record says what the caches hold."""
        for name, branch in self.own.items():
            caches = branch.caches
            if budget is not None:
                self.kept[name] = KeptKeys(dit, budget, caches=caches, ranks=ranks, size=size)
                branch.caches = []  # they may be replaced
            if stats.trace is not None and (budget is None or not self.kept[name].classes):
                self._tracked[name] = caches
                for cache in caches:
                    cache.track(num_chunks)

    @property
    def _caches(self) -> list[KVCache]:
        return list(chain.from_iterable(branch.caches for branch in self.own.values()))

    @property
    def kv_bytes(self) -> int:
        """Bytes of the caches of this process."""
        kept = sum(each.num_bytes for each in self.kept.values())
        return kept + sum(cache.num_bytes() for cache in self._caches)

    @property
    def clean_frames(self) -> int:
        """Frames in the caches whose keys are final."""
        return self._caches[0].clean // self.frame_tokens

    def velocities(
        self,
        x_CFhw: Tensor,
        times: Sequence[float],
        *,
        frames: range,
        view: View | None = None,
        passes: Passes = lambda _name: (),
        blocks: BlockReuse | None = None,
    ) -> dict[str, Tensor]:
        """Return the velocity of some frames in every branch, `[C, F, h, w]`.

        Args:
            times: timestep of each frame.
            frames: their places in the video.
            view: what they see, where keys are rotated when they are read; else all clean frames.
            blocks: reuses blocks of earlier chunks at the same timesteps; of one branch.
        """
        embedded, made = self.embed(x_CFhw, times), dict[str, Tensor]()
        assert blocks is None or len(self.names) == 1, "blocks are reused in one branch"
        around = None if blocks is None else self._around(blocks, times)
        for name in self.own:
            with self.stats.timed_pass(passes(name)):
                hidden = self.run(name, embedded, frames=frames, view=view, around=around)
                made[name] = self.read(hidden, embedded)
            reused = 0 if blocks is None else blocks.num_reused
            self.count(name, frames, view, passes=passes(name), reused_blocks=reused)
        return self.ranks.gather_branches(made, names=self.names, like=x_CFhw)

    def velocities_after(
        self,
        x_CFhw: Tensor,
        times: Sequence[float],
        *,
        frames: range,
        fed: range,
        chunk: int,
        seen: tuple[int, int],
        passes: Passes = lambda _name: (),
    ) -> dict[str, Tensor]:
        """Feed a clean chunk and compute the velocity of the next one in a single pass.

        The result is that of `feed` and `velocities`: the clean chunk does not see the other.

        Args:
            x_CFhw: both chunks.
            times: timestep of each frame.
            frames: of the second chunk.
            fed: frames of the first one.
            chunk: its number.
            seen: how many of the first and of the last clean frames the second chunk sees, the
                first chunk among these.
        """
        embedded, made = self.embed(x_CFhw, times), dict[str, Tensor]()
        num_fed, kernel = len(fed) * self.frame_tokens, self.dit.kernel
        first, last = (count * self.frame_tokens for count in seen)
        rope = self._rope(torch.arange(fed.start, frames.stop, device=self._device))
        split = TokenSplit(self.ranks.sequence, len(fed) + len(frames), self.frame_tokens)

        for name, branch in self.own.items():
            caches = branch.caches

            def attend(
                layer: int, q: Tensor, k: Tensor, v: Tensor, caches: Sequence[KVCache] = caches
            ) -> Tensor:
                cache, outputs = caches[layer], list[Tensor]()
                cache.put(0, k[0], v[0])
                all_rows = [x.unsqueeze(0) for x in cache.prefix(k.shape[1])]
                stop = cache.clean + num_fed
                groups = cache.bias_groups
                whole = (x[:, :stop] for x in all_rows)
                outputs.append(attend_wide(kernel, q[:, :num_fed], *whole, num_groups=groups))
                own = [torch.cat([x[:, :first], x[:, stop - last :]], dim=1) for x in all_rows]
                outputs.append(attend_wide(kernel, q[:, num_fed:], *own, num_groups=groups))
                return torch.cat(outputs, dim=1)

            self.count(name, fed, None, head=False)
            self.count(name, frames, sum(seen), passes=passes(name))
            with self.stats.timed_pass(passes(name)):
                part = replace(embedded, tokens=split.scatter(embedded.tokens, axis=1))
                hidden = self.dit.run_blocks(
                    part,
                    split.scatter(rope, axis=0),
                    branch.context,
                    self_attend=split.over_heads(attend),
                )
                whole = split.gather(hidden)[:, num_fed:]
                own = embedded.frames(len(fed), len(fed) + len(frames))
                made[name] = self.read(whole, own)
        self.settle(len(fed), chunk=chunk)
        return self.ranks.gather_branches(made, names=self.names, like=x_CFhw[:, len(fed) :])

    def feed(
        self,
        x_CFhw: Tensor,
        times: Sequence[float],
        *,
        frames: range,
        chunk: int,
        view: View | None = None,
    ) -> None:
        """Send a clean chunk through the blocks for the sake of its keys, which become final."""
        embedded = self.embed(x_CFhw, times)
        for name in self.own:
            self.count(name, frames, view, head=False)
            self.run(name, embedded, frames=frames, view=view, is_clean=True)
        self.settle(len(frames), chunk=chunk)

    def settle(self, num_frames: int, *, chunk: int) -> None:
        """Declare the keys of a chunk final, which were put last."""
        for cache in self._caches:
            cache.settle(num_frames * self.frame_tokens, chunk=chunk)
            cache.pack()
        for kept in self.kept.values():
            kept.settle(num_frames * self.frame_tokens, chunk=chunk)
        self.stats.kv_bytes = self.kv_bytes

    def trace_tokens(self, tick: Tick) -> None:
        """Trace the clean tokens of each chunk after a tick; classes of heads are left out."""
        self.stats.keep_tokens(0, tick.index, self._tracked, sequence=self.ranks.sequence)

    def switch(self, name: str, text_1LD: Tensor) -> None:
        """Give a branch another prompt from now on; keys that were made stay."""
        if name in self.own:
            cost = context_flops(self.dit.config)
            self.stats.add_flops(computed=cost, without_reuse=cost)
            self.own[name].context = self.dit.encode_context(text_1LD.to(self._device))

    def rewind(self, num_frames: int) -> None:
        """Forget the newest clean frames; they are fed anew."""
        for cache in self._caches:
            cache.rewind(num_frames * self.frame_tokens)

    def keep(self, *, first: int, last: int) -> None:
        """Keep the first and the last clean frames and let those between leave."""
        per_frame = self.frame_tokens
        for cache in self._caches:
            if cache.clean > (first + last) * per_frame:
                recent = range(cache.clean - last * per_frame, cache.clean)
                kept = [*range(first * per_frame), *recent]
                indices = on_device(kept, dtype=torch.int64, device=self._device)
                cache.keep(indices.unsqueeze(1).expand(-1, cache.kv.shape[2]))

    def _around(self, blocks: BlockReuse, times: Sequence[float]) -> Around:
        """Return what computes or reuses the blocks of a pass."""
        height, width = (side // stride for side, stride in zip(self.size, PATCH[1:], strict=True))
        size, step = (len(times), height, width), tuple(times)
        blocks.begin()

        def around(layer: int, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            made = blocks.through(
                x[0], step=step, block=layer, size=size, compute=lambda: compute()[0]
            )
            return made.unsqueeze(0)

        return around

    # One pass ---------------------------------------------------------------------------------

    def embed(self, x_CFhw: Tensor, times: Sequence[float]) -> Embedded:
        """Make tokens of some frames, each at its own timestep."""
        if self.ranks.branches.rank == 0:  # the others' is the same work
            sizes, count = self.dit.config, len(times)
            cost = embed_flops(sizes, num_frames=count, frame_tokens=self.frame_tokens)
            self.stats.add_flops(computed=cost, without_reuse=cost)
        t = on_device(times, dtype=torch.float32, device=self._device)
        return self.dit.embed(x_CFhw.unsqueeze(0), t.unsqueeze(0), fps=NO_RATE)

    def run(
        self,
        name: str,
        embedded: Embedded,
        *,
        frames: range,
        view: View | None,
        is_clean: bool = False,
        around: Around | None = None,
    ) -> Tensor:
        """Run the blocks of one branch: `[1, S, D]`."""
        branch, kept, rotates = self.own[name], self.kept.get(name), view is not None
        rope = self._rope(torch.arange(frames.start, frames.stop, device=self._device))
        if kept is not None:
            attend, rotates = kept.attend(len(rope), is_clean=is_clean), kept.budget.rotates
        elif view is None:
            attend = cached_attention(
                [branch.caches],
                active=[range(len(rope))],
                kernel=self.dit.kernel,
                prefetcher=self.prefetcher,
            )
        else:
            attend = self._rotating(branch.caches, view, num_own=len(rope))
        if rotates:
            rope = torch.stack([torch.ones_like(rope[..., 0]), torch.zeros_like(rope[..., 0])], -1)
        split = TokenSplit(self.ranks.sequence, len(frames), self.frame_tokens)
        part = Embedded(split.scatter(embedded.tokens, axis=1), embedded.time, embedded.modulation)
        hidden = self.dit.run_blocks(
            part,
            split.scatter(rope, axis=0),
            branch.context,
            self_attend=split.over_heads(attend),
            around=around,
        )
        return split.gather(hidden)

    def _rotating(self, caches: Sequence[KVCache], view: View, *, num_own: int) -> Attend:
        """Return the attention of a pass that rotates what it reads."""
        rope, per_frame = self._rope(view.positions), self.frame_tokens
        clean = caches[0].clean
        rows = (
            slice(0, view.first * per_frame),
            slice(clean - view.last * per_frame, clean + num_own),
        )

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            caches[layer].put(0, k[0], v[0])
            held = caches[layer].prefix(num_own)
            keys, values = (torch.cat([x[part] for part in rows]).unsqueeze(0) for x in held)
            queries = rotate(q, rope[-num_own:]).to(q.dtype)
            turned = rotate_keys(keys, rope, width=q.shape[-1])
            groups = caches[layer].bias_groups
            return attend_wide(self.dit.kernel, queries, turned, values, num_groups=groups)

        return attend

    def _rope(self, positions: Tensor) -> Tensor:
        return self.dit.rope(positions, latent_height=self.size[0], latent_width=self.size[1])

    def read(self, hidden_BSD: Tensor, embedded: Embedded) -> Tensor:
        """Read the velocity `[C, F, h, w]` out of what the blocks made of one branch."""
        height, width = self.size
        return self.dit.velocity(hidden_BSD, embedded, latent_height=height, latent_width=width)[0]

    def count(
        self,
        name: str,
        frames: range,
        view: View | int | None,
        *,
        blocks: bool = True,
        head: bool = True,
        passes: Sequence[PassId] = (),
        reused_blocks: int = 0,
    ) -> None:
        """Add the FLOPs of one branch's blocks and head; those that reuse saves as well.

        Args:
            view: what the frames see; a number: of clean frames.
            blocks: whether the blocks are computed, which count without reuse in any case.
            head: whether the head is.
            reused_blocks: of these, so many are not.
        """
        sizes, queries = self.dit.config, len(frames) * self.frame_tokens
        if name in self.kept:
            inner = blocks_flops(sizes, queries=queries, keys=0) + self.kept[name].flops(queries)
        else:
            seen = self.clean_frames if view is None else view
            seen = seen if isinstance(seen, int) else seen.first + seen.last
            keys = queries + seen * self.frame_tokens
            inner = blocks_flops(sizes, queries=queries, keys=keys)
        outer = head_flops(sizes, queries=queries)
        own_blocks = inner - reused_blocks * (inner // sizes.num_layers)
        computed = (own_blocks if blocks else 0) + (outer if head else 0)
        without_reuse = inner + (outer if head or not blocks else 0)
        self.stats.add_flops(computed=computed, without_reuse=without_reuse, passes=passes)

    @property
    def _device(self) -> torch.device:
        return self.dit.patch_embedding.weight.device


def add_flops_of_others(stats: RunStats, ranks: Ranks) -> None:
    """Count what other processes did in the branches that this one does not compute.

    Those that share a branch count it alike. The numbers are the host's: no device is asked.
    """
    own = torch.tensor([stats.computed_flops, stats.flops_without_reuse])
    every = ranks.world.all_reduce(own) // ranks.sequence.size
    stats.computed_flops, stats.flops_without_reuse = every.tolist()
