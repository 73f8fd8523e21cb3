"""What one run did, pass by pass: FLOPs, seconds, and the tokens left in the KV caches.

Kept only where a run is recorded. Nothing here waits for the device before the run is over: times
are pairs of CUDA events there, token counts stay tensors until they are read.

Axes: N chunks.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Moment: TypeAlias = "float | torch.cuda.Event"
"""A point in time on the host's clock (seconds), or in the queue of a CUDA device."""


class PassId(NamedTuple):
    """One chunk in one guidance branch at one tick."""

    segment: int
    tick: int
    chunk: int
    branch: str


class TickId(NamedTuple):
    """One pass over the active chunks of a segment."""

    segment: int
    tick: int


class PassFlops(NamedTuple):
    """FLOPs of a pass that were done, and those that reuse saved."""

    spent: int
    saved: int


class KVTokens(NamedTuple):
    """Clean tokens in the caches of a branch after a tick."""

    segment: int
    tick: int
    branch: str
    tokens: dict[int, float]
    """Chunk -> its tokens, mean over layers and heads; chunks without any are left out."""


@dataclass(frozen=True)
class Traced:
    """What the processes of a run traced, or one of them; plain values."""

    flops: dict[PassId, PassFlops]
    pass_seconds: dict[PassId, float]
    """Of each pass that was computed."""
    tick_seconds: dict[TickId, float]
    kv_tokens: list[KVTokens]


def merged(parts: Sequence[Traced]) -> Traced:
    """Return what processes traced that divided the guidance branches of a run, as one would.

    All counted the FLOPs of a pass alike, or one did. Its seconds add up: a pass of the record may
    stand for several guidance passes, made one after the other in one process. A tick took as long
    as in the slowest process. Each branch's caches are in one process.

        pass        FLOPs of A, B    together    seconds of A, B    together
        "all"       6, 6             6           2, 1               3
        "cond"      4, -             4           2, -               2

    Args:
        parts: one of each branch group, in their order.
    """
    flops: dict[PassId, PassFlops] = {}
    pass_seconds: dict[PassId, float] = {}
    tick_seconds: dict[TickId, float] = {}
    kv_tokens: list[KVTokens] = []
    for part in parts:
        flops |= part.flops
        for each, seconds in part.pass_seconds.items():
            pass_seconds[each] = pass_seconds.get(each, 0.0) + seconds
        for tick, seconds in part.tick_seconds.items():
            tick_seconds[tick] = max(tick_seconds.get(tick, 0.0), seconds)
        kv_tokens += part.kv_tokens
    kv_tokens.sort(key=lambda row: (row.segment, row.tick))  # stable: the branches keep their order
    return Traced(flops, pass_seconds, tick_seconds, kv_tokens)


def now(device: torch.device) -> Moment:
    """Return the present moment: on CUDA, that at which the work queued so far is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed_seconds(start: Moment, end: Moment) -> float:
    """Return the time between two moments of the same kind; events must have happened."""
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000
    assert isinstance(end, float)
    return end - start


def host_clock(device: torch.device) -> Callable[[Moment], float]:
    """Return what tells when a moment was, in seconds of the host's clock. Waits for the device.

    The queue of a CUDA device is empty then, so that one more event happens at a known time; every
    event before it was that much earlier. The event now happens at 50 s of the host's clock:
    another one, 2000 ms before it, was at 48 s.
    """
    if device.type != "cuda":
        return _as_it_is
    torch.cuda.synchronize(device)
    reference = now(device)
    assert isinstance(reference, torch.cuda.Event)
    reference.synchronize()
    reference_seconds = time.perf_counter()

    def seconds(moment: Moment) -> float:
        if isinstance(moment, float):
            return moment
        return reference_seconds - elapsed_seconds(moment, reference)

    return seconds


def _as_it_is(moment: Moment) -> float:
    assert isinstance(moment, float)
    return moment


class Trace:
    """Collects what each pass did; the results are read when the run is over."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flops: dict[PassId, PassFlops] = {}
        self._passes: list[tuple[Sequence[PassId], Moment, Moment]] = []
        self._ticks: list[tuple[TickId, Moment, Moment]] = []
        self._kv: list[tuple[TickId, str, Tensor]] = []

    def add_flops(self, passes: Sequence[PassId], *, computed: int, without_reuse: int) -> None:
        """Add FLOPs to some passes, in equal parts; the first ones get what does not divide."""
        saved = without_reuse - computed
        for place, each in enumerate(passes):
            old = self.flops.get(each, PassFlops(0, 0))
            self.flops[each] = PassFlops(
                old.spent + _part(computed, place, len(passes)),
                old.saved + _part(saved, place, len(passes)),
            )

    @contextmanager
    def timed_pass(self, passes: Sequence[PassId]) -> Generator[None, None, None]:
        """Add the time of the body to some passes, in equal parts."""
        start = now(self.device)
        yield
        self._passes.append((passes, start, now(self.device)))

    @contextmanager
    def timed_tick(self, tick: TickId) -> Generator[None, None, None]:
        """Keep the time of the body as that of a tick."""
        start = now(self.device)
        yield
        self._ticks.append((tick, start, now(self.device)))

    def keep_tokens(self, tick: TickId, branch: str, tokens_N: Tensor) -> None:
        """Keep the clean tokens of each chunk after a tick."""
        self._kv.append((tick, branch, tokens_N))

    def read(self) -> Traced:
        """Return all that was traced. Waits for the device."""
        return Traced(self.flops, self.pass_seconds(), self.tick_seconds(), self.kv_tokens())

    def pass_seconds(self) -> dict[PassId, float]:
        """Return the time of each pass that was computed. Waits for the device."""
        self._wait()
        seconds: dict[PassId, float] = {}
        for passes, start, end in self._passes:
            for each in passes:
                part = elapsed_seconds(start, end) / len(passes)
                seconds[each] = seconds.get(each, 0.0) + part
        return seconds

    def tick_seconds(self) -> dict[TickId, float]:
        """Return the time of each tick. Waits for the device."""
        self._wait()
        return {tick: elapsed_seconds(start, end) for tick, start, end in self._ticks}

    def kv_tokens(self) -> list[KVTokens]:
        """Return the clean tokens after each tick, by branch."""
        return [
            KVTokens(
                *tick,
                branch,
                {chunk: count for chunk, count in enumerate(tokens.tolist()) if count > 0},
            )
            for tick, branch, tokens in self._kv
        ]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _part(total: int, place: int, count: int) -> int:
    """Return one of `count` parts of an integer: 7 in three parts is 3, 2, 2."""
    return total // count + (place < total % count)
