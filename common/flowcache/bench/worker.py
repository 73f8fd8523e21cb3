"""Take tasks, make them, write receipts, until none is left: one process of any number."""

import contextlib
import errno
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowcache.bench.locks import STALE_SECONDS, Lock, Locks
from flowcache.bench.tasks import MISSING, Kind, Origin, Task, alarms_of, flaw, sha256_of
from flowcache.errors import UserError
from flowcache.runtime.ending import check_stopped, undisturbed
from flowcache.runtime.files import write_json

logger = logging.getLogger(__name__)

RECEIPT = "receipt.json"
ERROR_SUFFIX = ".error.json"
POLL_SECONDS = 1.0
"""Between two looks at tasks that others have locked."""
TRIAL_BYTES = 2**22
"""Written after a failure to tell a full disk from anything else."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How a full disk, a used up quota, and a limit of the file size are reported."""

Render = Callable[[Task, Path], dict[str, Any]]
"""Makes a video in a folder, and returns what its JSON holds."""


class DiskFullError(UserError):
    """Nothing more can be written; going on would fail every task."""


@dataclass
class Worker:
    """The work of one process."""

    tasks: Sequence[Task]
    out: Path
    render: Render
    origins: Mapping[Kind, Origin] = field(default_factory=dict)
    """What videos are made from; of a kind that is not named, that is not compared."""
    stale_seconds: float = STALE_SECONDS
    poll_seconds: float = POLL_SECONDS
    locks: Locks = field(init=False)
    old_errors: dict[str, str | None] = field(init=False)
    """What error files held at the start: such tasks are tried once more."""

    def __post_init__(self) -> None:
        self.locks = Locks(self.out, self.stale_seconds)
        self.old_errors = {task.label: self._error_text(task) for task in self.tasks}

    def run(self, *, first: int = 0) -> dict[str, str]:
        """Make what is missing and wait for what others make.

        Args:
            first: where in the list to begin, so that processes do not all try the same task.

        Returns: for each failed task, by its label, why it failed.

        Raises:
            DiskFullError: the disk is full; what is complete stays.
        """
        try:
            return self._run(first)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise full_disk(self.out, error) from None

    def _run(self, first: int) -> dict[str, str]:
        failures: dict[str, str] = {}
        pending = [*self.tasks[first:], *self.tasks[:first]]
        while pending:
            waiting: list[Task] = []
            for task in pending:
                check_stopped()
                if not self._try(task, failures):
                    waiting.append(task)
            if len(waiting) == len(pending):
                time.sleep(self.poll_seconds)
            pending = waiting
        self.locks.tidy([task.label for task in self.tasks])
        return {task.label: failures[task.label] for task in self.tasks if task.label in failures}

    def _try(self, task: Task, failures: dict[str, str]) -> bool:
        """Bring a task forward; tell whether it is over: complete or failed."""
        if self._is_over(task, failures):
            return True
        lock = self.locks.take(task.label)
        if lock is None:
            return False
        with lock.held():
            # another process may have ended it between the look and the lock
            if not self._is_over(task, failures):
                self._make(task, lock)
        return self._is_over(task, failures)

    def _is_over(self, task: Task, failures: dict[str, str]) -> bool:
        reason = self._flaw(task)
        if reason is None:
            return True
        text = self._error_text(task)
        if text is not None and text != self.old_errors[task.label]:
            failures[task.label] = json.loads(text)["error"]
            return True
        return False

    def _flaw(self, task: Task) -> str | None:
        return flaw(task, self.out, origin=self.origins.get(task.kind))

    def _make(self, task: Task, lock: Lock) -> None:
        reason = self._flaw(task)
        if reason != MISSING:
            logger.warning("%s: it is made again", reason)
            task.path(self.out, ".json").unlink()
        try:
            report = self.render(task, lock.work)
            if lock.is_valid():
                report = {**report, "made_from": dict(self.origins.get(task.kind, {}))}
                publish(task, self.out, lock.work, report=report)
                task.path(self.out, ERROR_SUFFIX).unlink(missing_ok=True)
        except Exception as error:  # noqa: BLE001 - whatever fails, the other tasks go on
            if not lock.is_valid():  # who took over has removed the folder, and goes on
                logger.warning("%s: another process has taken over: dropped", task.label)
                return
            check_disk(lock.work)
            self._record(task, error)

    def _record(self, task: Task, error: Exception) -> None:
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

    def _error_text(self, task: Task) -> str | None:
        try:
            return task.path(self.out, ERROR_SUFFIX).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


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
    # in the folder that goes with the lock, so that a killed process leaves no part beside videos
    write_json(work / RECEIPT, receipt)
    with undisturbed():  # the video goes last: one that has its name has its receipt, too
        os.replace(work / RECEIPT, target.with_suffix(".json"))
        os.replace(made, target)


def check_disk(folder: Path) -> None:
    """Try to write a little.

    Raises:
        DiskFullError: it can't be done.
    """
    trial = folder / "trial"
    try:
        with trial.open("wb") as stream:
            stream.write(bytes(TRIAL_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        trial.unlink()
    except OSError as error:
        raise full_disk(folder, error) from None


def full_disk(folder: Path, error: OSError) -> DiskFullError:
    """Say that nothing can be written any more, and why."""
    return DiskFullError(
        f"{folder}: nothing more can be written ({error.strerror}): make room and start again; "
        "what is complete stays"
    )


def say_alarms(tasks: Sequence[Task], out: Path, failures: Collection[str]) -> None:
    """List on standard error what is alarming about complete videos, by their receipts."""
    for task in tasks:
        if task.label not in failures:
            for alarm in alarms_of(task, out):
                sys.stderr.write(f"ALARM {task.label}: {alarm}\n")


def say_failures(failures: dict[str, str]) -> None:
    """List what failed on standard error."""
    for label, reason in failures.items():
        sys.stderr.write(f"failed: {label}: {reason}\n")


class FirstOnly(logging.Filter):
    """Lets a warning through the first time, and everything that is no warning."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is new, or no warning."""
        message = record.getMessage()
        is_new = record.levelno != logging.WARNING or message not in self.seen
        self.seen.add(message)
        return is_new


@contextlib.contextmanager
def warned_once(names: Iterable[str]) -> Generator[None, None, None]:
    """Drop what loggers of these names warn of again while the body runs."""
    first_only = FirstOnly()
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(first_only)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(first_only)
