"""Make the videos of a list: each whole or not at all, and only those that are missing.

A video is made in a folder of its own inside the output folder. It counts once it has its receipt
and its name, in this order. The system knows which of these folders belong to running processes;
what a killed one left is removed by the next.

Several processes divide a list in advance; `flowcache.bench.actors` divides it by Ray.
"""

import contextlib
import errno
import heapq
import logging
import os
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowcache.bench.tasks import MISSING, Kind, Origin, Task, flaw, sha256_of
from flowcache.errors import UserError
from flowcache.runtime.ending import check_stopped, remove_left, temporary_folder, undisturbed
from flowcache.runtime.files import write_json

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
RECEIPT = "receipt.json"
ERROR_SUFFIX = ".error.json"
TRIAL_BYTES = 2**22
"""Written after a failure to distinguish a full disk from anything else."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How a full disk, a used up quota, and a limit of the file size are reported."""

Render = Callable[[Task, Path], dict[str, Any]]
"""Makes a video in a folder, and returns what its JSON holds."""


class DiskFullError(UserError):
    """Nothing more can be written; going on would fail every task."""

    @classmethod
    def at(cls, folder: Path, error: OSError) -> "DiskFullError":
        """Return the error of a folder."""
        return cls(
            f"{folder}: nothing more can be written ({error.strerror}): make room and start again; "
            "what is complete stays"
        )


def divide(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Divide work: the most expensive first, each to the share that costs least so far.

    Example: costs 5, 4, 3, 3, 3 in two shares are 5 + 3 and 4 + 3 + 3.

    Source: Graham, Bounds on Multiprocessing Timing Anomalies, 1969 (longest processing time).
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0.0, number) for number in range(num_shares)]
    for index in longest_first(costs):
        load, number = loads[0]
        shares[number].append(index)
        heapq.heapreplace(loads, (load + costs[index], number))
    return shares


def longest_first(costs: Sequence[float]) -> list[int]:
    """Return the order of falling costs; what costs the same stays in order."""
    return sorted(range(len(costs)), key=lambda index: -costs[index])


@dataclass
class Worker:
    """Makes videos one after the other."""

    out: Path
    render: Render
    origins: Mapping[Kind, Origin] = field(default_factory=dict)
    """What videos are made from; of a kind that is not named, that is not compared."""

    def run(self, tasks: Iterable[Task]) -> dict[str, str]:
        """Make what is missing.

        Returns: for each failed task, by its label, why it failed.

        Raises:
            DiskFullError: the disk is full; what is complete stays.
        """
        failures: dict[str, str] = {}
        for task in tasks:
            check_stopped()
            reason = self.make(task)
            if reason is not None:
                failures[task.label] = reason
        self.tidy()
        return failures

    def flaw(self, task: Task) -> str | None:
        """Say why a task is not complete; see `flowcache.bench.tasks.flaw`."""
        return flaw(task, self.out, origin=self.origins.get(task.kind))

    def make(self, task: Task) -> str | None:
        """Make a video unless it is complete; return why it failed, None: it is complete."""
        flaw = self.flaw(task)
        if flaw is None:
            return None
        if flaw != MISSING:
            logger.warning("%s: it is made again", flaw)
            task.path(self.out, ".json").unlink()
        logger.info("video         %s, %s", task.label, task.preset)
        try:
            with temporary_folder(self.out / UNFINISHED) as work:
                try:
                    report = self.render(task, work)
                    report = {**report, "made_from": dict(self.origins.get(task.kind, {}))}
                    publish(task, self.out, work, report=report)
                except Exception as error:  # noqa: BLE001 - others go on after any failure
                    check_disk(work)
                    return self.record(task, error)
            task.path(self.out, ERROR_SUFFIX).unlink(missing_ok=True)
            logger.info("wrote         %s", task.path(self.out, ".mp4"))
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DiskFullError.at(self.out, error) from None
        return None

    def tidy(self) -> None:
        """Remove what killed processes left; what others work on stays."""
        remove_left(self.out / UNFINISHED)
        with contextlib.suppress(OSError):
            (self.out / UNFINISHED).rmdir()

    def record(self, task: Task, error: Exception) -> str:
        """Write why a task failed; return it in one line."""
        line = " ".join(f"{error}".split()) or type(error).__name__
        if not isinstance(error, UserError):
            line = f"{type(error).__name__}: {line}"
        logger.error("failed: %s: %s", task.label, line)
        path = task.path(self.out, ERROR_SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "error": line,
            "task": task.to_dict(),
            "traceback": traceback.format_exception(error),
            "when_ns": time.time_ns(),
        }
        write_json(path, content)
        return line


def publish(task: Task, out: Path, work: Path, *, report: dict[str, Any]) -> None:
    """Move a finished video to its place and write its receipt, which makes it count."""
    made = work / str(report["video"])
    target = task.path(out, ".mp4")
    target.parent.mkdir(parents=True, exist_ok=True)
    receipt = {
        **report,
        "video": target.name,
        "task": task.to_dict(),
        "sha256": sha256_of(made),
        "num_bytes": made.stat().st_size,
    }
    with made.open("rb") as stream:
        os.fsync(stream.fileno())
    # in the folder for unfinished files, so that a killed process leaves no part among videos
    write_json(work / RECEIPT, receipt)
    with undisturbed():  # the video goes last: one that has its name has its receipt, too
        os.replace(work / RECEIPT, target.with_suffix(".json"))
        os.replace(made, target)


def check_disk(folder: Path) -> None:
    """Raise `DiskFullError` if not even a little can be written."""
    trial = folder / "trial"
    try:
        with trial.open("wb") as stream:
            stream.write(bytes(TRIAL_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        trial.unlink()
    except OSError as error:
        raise DiskFullError.at(folder, error) from None


@contextlib.contextmanager
def warned_once(names: Iterable[str]) -> Generator[None, None, None]:
    """Drop what loggers of these names warn of again while the body runs."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_known = record.levelno == logging.WARNING and message in seen
        seen.add(message)
        return not is_known

    loggers = [logging.getLogger(name) for name in names]
    for each in loggers:
        each.addFilter(is_new)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(is_new)
