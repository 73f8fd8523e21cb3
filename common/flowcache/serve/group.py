"""A model in several processes of one machine, which make each video together.

The first process is the one that loads; the others are its children and go through the same calls,
which it sends them. None outlives another: where one ends, all end, so that whoever started the
first can replace the whole group.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from flowcache.api import Pipeline, unloaded
from flowcache.errors import UserError
from flowcache.runtime.ending import EXIT_LOST, Place
from flowcache.runtime.parallel import LostProcessError, Ranks, process_group
from flowcache.serve.jobs import CancelledError, Job, Report, make_video

logger = logging.getLogger(__name__)

Load = Callable[[Ranks], Pipeline]
"""Loads a model in one of the processes that are given; can be pickled where there are several."""


def load_in(ranks: Ranks, *, given: Mapping[str, Any]) -> Pipeline:
    """Load a model in one of several processes, as `flowcache.load` does with what is given."""
    pipe = unloaded(**given, ranks=ranks)
    pipe.load()
    return pipe


class Group:
    """A loaded model, and the processes that it has in addition to this one."""

    def __init__(self, load: Load, size: int = 1) -> None:
        """Load the model in this process, and in `size` - 1 others."""
        self._calls: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._met = ExitStack()  # never closed: the processes part by ending
        self._is_over = threading.Event()
        self.pipe = load(self._ranks(load, size) if size > 1 else Ranks())
        if self._processes:  # from here on: if they end earlier, they and this one say why
            atexit.register(self.close)
            end = (self._processes, self._is_over)
            threading.Thread(target=_end_after, args=end, daemon=True).start()

    def make(self, job: Job, folder: Path, report: Report) -> None:
        """Make a job's video in a folder; see `flowcache.serve.jobs.Make`."""
        for connection in self._calls:
            connection.send(job)
        try:
            make_video(self.pipe, job, folder, report)
        except (UserError, CancelledError):
            raise
        except Exception:
            if not self._processes:
                raise
            logger.exception("the processes of the group may be at different points: all end")
            os._exit(EXIT_LOST)

    def close(self) -> None:
        """End the other processes."""
        self._is_over.set()
        for connection in self._calls:
            connection.close()
        for process in self._processes:
            process.join()

    def _ranks(self, load: Load, size: int) -> Ranks:
        """Start the other processes, and meet them."""
        _share_cores(size)
        context = multiprocessing.get_context("spawn")
        with socket.create_server(("127.0.0.1", 0)) as meeting:
            os.environ["MASTER_ADDR"], port = "127.0.0.1", meeting.getsockname()[1]
            os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(size)}
            for rank in range(1, size):
                here, there = context.Pipe()
                process = context.Process(
                    target=_follow, args=(load, Place(rank, size, rank), there), daemon=True
                )
                process.start()
                there.close()
                self._processes.append(process)
                self._calls.append(here)
            try:
                for connection in self._calls:
                    connection.recv()  # imports may take longer than a meeting waits
            except EOFError:
                raise LostProcessError("a process of the group ended while it started") from None
            return self._met.enter_context(
                process_group(Place(0, size), listener=os.dup(meeting.fileno()))
            )


def _follow(load: Load, place: Place, calls: Connection) -> None:
    """Be one of the other processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the first process ends this one
    parent = multiprocessing.parent_process()
    assert parent is not None
    end = ([parent], threading.Event())
    threading.Thread(target=_end_after, args=end, daemon=True).start()
    logging.disable(logging.WARNING)
    _share_cores(place.size)
    calls.send("ready")
    with process_group(place) as ranks:
        pipe = load(ranks)
        while True:
            try:
                job: Job = calls.recv()
            except EOFError:
                os._exit(0)  # an ordinary end may wait for the others
            pipe.follow(job.prompt, preset=job.preset, record=True, **job.settings)


def _end_after(processes: Sequence[BaseProcess], is_over: threading.Event) -> None:
    """End this process as soon as one of others has ended, whatever it is waiting for."""
    wait([process.sentinel for process in processes])
    if not is_over.is_set():
        logger.error("a process of the group has ended, so that all end")
        os._exit(EXIT_LOST)


def _share_cores(size: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
