"""Work that goes on beside the denoising: decoding finished chunks, writing frames.

A lane does its work in order. `SerialLane` does it at once, in the caller's thread; `ThreadLane` in
a thread of its own, on CUDA also in a stream of its own, with a bounded number of pieces waiting.
Results are the same; what fails is raised where the result is asked for, and at the latest when the
lane ends.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import torch

MAX_WAITING = 2
"""Pieces of work that may wait or be under way in a lane; whoever adds one more waits."""

T = TypeVar("T")


class Later(Generic[T]):
    """A value that is made when it is first asked for, and kept."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._lock = threading.Lock()

    @classmethod
    def of(cls, value: T) -> "Later[T]":
        """Return a value that is there already."""
        return cls(lambda: value)

    def get(self) -> T:
        """Return the value, waiting for it if necessary."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


class Lane(Protocol):
    """Does pieces of work one after the other."""

    @property
    def is_beside(self) -> bool:
        """Whether the caller goes on meanwhile."""
        ...

    def submit(self, work: Callable[[], T], /) -> Later[T]:
        """Have some work done, after all that was submitted before."""
        ...

    def follow(self, work: Callable[[], T], /) -> Later[T]:
        """Have a little work done after what was submitted last, without counting as waiting."""
        ...


class SerialLane:
    """Does its work at once."""

    is_beside = False

    def submit(self, work: Callable[[], T], /) -> Later[T]:
        """Do the work now."""
        return Later.of(work())

    def follow(self, work: Callable[[], T], /) -> Later[T]:
        """Do the work now."""
        return self.submit(work)


class ThreadLane:
    """Does its work in a thread; use it as a context, which ends when all is done.

    Example: with two pieces waiting, a third `submit` returns when the first is done.
    """

    is_beside = True

    def __init__(self, name: str, *, device: torch.device | None = None) -> None:
        """Start the thread.

        Args:
            device: where the work runs; on CUDA it gets a stream of its own, which first waits for
                what the caller has queued. None: on the host alone.
        """
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._room = threading.Semaphore(MAX_WAITING)
        self._failed: list[BaseException] = []
        self._stream: torch.cuda.Stream | None = None
        if device is not None and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)

    def __enter__(self) -> "ThreadLane":
        """Return the lane."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish what was submitted; raise what failed, unless something else is raised already."""
        self._executor.shutdown(wait=True)
        if kind is None:
            self._raise()

    def submit(self, work: Callable[[], T], /) -> Later[T]:
        """Have some work done in the thread; what it reads must not change any more.

        Raises:
            BaseException: what an earlier piece of work raised.
        """
        self._raise()
        self._room.acquire()
        try:
            future = self._queue(work)
        except RuntimeError:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return Later(future.result)

    def follow(self, work: Callable[[], T], /) -> Later[T]:
        """Have a little work done after what was submitted last, without counting as waiting.

        Raises:
            BaseException: what an earlier piece of work raised.
        """
        self._raise()
        return Later(self._queue(work).result)

    def _queue(self, work: Callable[[], T]) -> Future[T]:
        ready: torch.cuda.Event | None = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._stream.device))
        return self._executor.submit(self._carry_out, work, ready)

    def _carry_out(self, work: Callable[[], T], ready: torch.cuda.Event | None) -> T:
        try:
            if self._failed:
                raise self._failed[0]
            with torch.no_grad(), self._in_stream(ready):
                made = work()
            if self._stream is not None:
                self._stream.synchronize()  # blocks this thread alone; any stream may read it now
            return made
        except BaseException as error:
            self._failed.append(error)
            raise

    def _in_stream(self, ready: torch.cuda.Event | None) -> AbstractContextManager[object]:
        if self._stream is None or ready is None:
            return nullcontext()
        self._stream.wait_event(ready)
        return torch.cuda.stream(self._stream)

    def _raise(self) -> None:
        if self._failed:
            raise self._failed[0]


def lane_for(name: str, *, device: torch.device, is_beside: bool) -> AbstractContextManager[Lane]:
    """Return a lane as a context: beside the caller's work, or at once."""
    return ThreadLane(name, device=device) if is_beside else nullcontext(SerialLane())


def should_overlap(wanted: bool | None, device: torch.device, *, takes_turns: bool) -> bool:
    """Tell whether decoding goes on beside the denoising.

    Args:
        wanted: `overlap` of the settings; None: on CUDA.
        takes_turns: whether transformer and VAE are never on the device together, or work with
            other processes, whose calls must come in one order.
    """
    is_wanted = device.type == "cuda" if wanted is None else wanted
    return is_wanted and not takes_turns
