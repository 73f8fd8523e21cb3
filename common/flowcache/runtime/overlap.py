"""Work that goes on while the next ticks are denoised: decoding finished chunks, writing frames."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TypeVar

import torch

MAX_WAITING = 2
"""Pieces of work that may wait or be under way in a worker; whoever adds one more waits."""

T = TypeVar("T")


class Worker:
    """Does pieces of work in order, at once or in a thread; a context that ends when all is done.

    The thread has a stream of its own on CUDA, which first waits for what the caller has queued.
    Results are the same either way. What fails is raised where the result is asked for, and at the
    latest when the context ends.
    """

    def __init__(
        self, name: str, *, device: torch.device | None = None, is_concurrent: bool = True
    ) -> None:
        """Start the thread.

        Args:
            is_concurrent: whether the work is done in a thread, while the caller goes on.
        """
        self.is_concurrent = is_concurrent
        self._executor: ThreadPoolExecutor | None = None
        self._room = threading.Semaphore(MAX_WAITING)
        self._failed: list[BaseException] = []
        self._stream: torch.cuda.Stream | None = None
        if is_concurrent:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
            if device is not None and device.type == "cuda":
                self._stream = torch.cuda.Stream(device)

    def __enter__(self) -> "Worker":
        """Return the worker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish what was submitted; raise what failed, unless something else is raised already."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        if kind is None:
            self._raise()

    def submit(self, work: Callable[[], T], /, *, is_small: bool = False) -> Future[T]:
        """Have some work done, after all that was submitted before.

        Args:
            is_small: whether it is done in no time, and needs no room among what waits.
        """
        self._raise()
        if self._executor is None:
            return done(work())
        if is_small:
            return self._executor.submit(self._run, work, self._queued())
        self._room.acquire()
        try:
            future = self._executor.submit(self._run, work, self._queued())
        except RuntimeError:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future

    def _queued(self) -> torch.cuda.Event | None:
        """Return the moment at which what the caller has queued is done."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._stream.device))
        return event

    def _run(self, work: Callable[[], T], ready: torch.cuda.Event | None) -> T:
        try:
            self._raise()
            with torch.no_grad(), self._in_stream(ready):
                result = work()
            if self._stream is not None:
                self._stream.synchronize()  # blocks this thread alone; any stream may read it now
            return result
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


def done(value: T) -> Future[T]:
    """Return a future whose result is there already."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


def should_overlap(wanted: bool | None, device: torch.device, *, takes_turns: bool) -> bool:
    """Tell whether decoding goes on while the next ticks are denoised.

    Args:
        wanted: `overlap` of the settings; None: on CUDA.
        takes_turns: whether transformer and VAE are never on the device together, or work with
            other processes, whose calls must come in one order.
    """
    is_wanted = device.type == "cuda" if wanted is None else wanted
    return is_wanted and not takes_turns
