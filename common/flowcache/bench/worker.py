"""Make videos with any number of processes, which share the work through a folder alone.

The lock of a task is a file that exactly one process can create. Its owner touches it every few
seconds. A lock whose owner is gone is *stale*: the next owner creates the file of the next
generation, which again exactly one process can do, so no file is ever taken from somebody else.

    .claims/5f2c.../0        of a process that was killed
    .claims/5f2c.../1        of the one that makes the video now
    .claims/5f2c.../1.work   its folder for unfinished files

A process that was taken for dead by mistake (suspended for minutes) sees the newer generation and
drops what it made. A finished video counts once it has its receipt and its name, in this order.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flowcache.bench.tasks import MISSING, Kind, Origin, Task, flaw, sha256_of
from flowcache.errors import UserError
from flowcache.runtime.ending import check_stopped, undisturbed
from flowcache.runtime.files import is_running, write_json

logger = logging.getLogger(__name__)

FOLDER = ".claims"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 120.0
"""Without a heartbeat, by the clock of who waits: clocks of nodes may differ."""


@dataclass(frozen=True)
class Lock:
    """The right of this process to make one video."""

    folder: Path
    generation: int
    owner: str
    """What the file says: who made the lock, and when."""

    @property
    def path(self) -> Path:
        """The file that is the lock."""
        return self.folder / str(self.generation)

    @property
    def work(self) -> Path:
        """The folder for unfinished files."""
        return self.folder / f"{self.generation}.work"

    def is_valid(self) -> bool:
        """Tell whether nobody else has taken over."""
        return _newest(self.folder) == self.generation and self._is_own()

    def _is_own(self) -> bool:
        """Tell whether the file is still this lock: generations begin anew once all are gone."""
        try:
            return self.path.read_text(encoding="utf-8") == self.owner
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def held(self) -> Generator[None, None, None]:
        """Touch the file while the body runs; remove it and what was left behind at the end."""
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        thread.start()
        try:
            self.work.mkdir(exist_ok=True)
            yield
        finally:
            stop.set()
            thread.join()
            if self._is_own():  # else who took over has removed all; what lies there is not ours
                for generation in range(self.generation + 1):  # the lock itself goes last
                    shutil.rmtree(self.folder / f"{generation}.work", ignore_errors=True)
                    (self.folder / str(generation)).unlink(missing_ok=True)

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


@dataclass
class Locks:
    """What this process knows of the locks in an output folder."""

    out: Path
    stale_seconds: float = STALE_SECONDS
    _seen: dict[Path, tuple[int, float]] = field(default_factory=dict)
    """Lock -> its last touch (nanoseconds, its own clock), and when that was first seen here."""

    def take(self, label: str) -> Lock | None:
        """Lock a task; None: somebody else has it."""
        folder = self._folder(label)
        folder.mkdir(parents=True, exist_ok=True)
        newest = _newest(folder)
        if newest is not None and not self._is_stale(folder / str(newest)):
            return None
        owner = {
            "task": label,
            "place": place(),
            "pid": os.getpid(),
            "since": datetime.now(timezone.utc).isoformat(),
        }
        lock = Lock(folder, 0 if newest is None else newest + 1, json.dumps(owner))
        try:
            stream = lock.path.open("x", encoding="utf-8")
        except (FileExistsError, FileNotFoundError):  # lost the race, or the folder was tidied up
            return None
        try:
            with stream:
                stream.write(lock.owner)
        except OSError:
            lock.path.unlink()
            raise
        return lock

    def tidy(self, labels: list[str]) -> None:
        """Remove the folders of tasks that are over, and stale locks: killed after the receipt."""
        with contextlib.suppress(OSError):
            for label in labels:
                lock = self.take(label) if self._folder(label).is_dir() else None
                if lock is not None:
                    with lock.held():
                        pass
                with contextlib.suppress(OSError):
                    self._folder(label).rmdir()
            (self.out / FOLDER).rmdir()

    def _folder(self, label: str) -> Path:
        return self.out / FOLDER / hashlib.sha256(label.encode()).hexdigest()[:24]

    def _is_stale(self, path: Path) -> bool:
        """Tell whether the owner of a lock is gone."""
        try:
            touched = path.stat().st_mtime_ns
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return False  # just given back
        last, since = self._seen.get(path, (None, 0.0))
        if last != touched:
            since = time.monotonic()
            self._seen[path] = (touched, since)
        if time.monotonic() - since > self.stale_seconds:
            return True
        try:
            owner = json.loads(text)
            return owner["place"] == place() and not is_running(owner["pid"])
        except (ValueError, KeyError, TypeError, RecursionError):  # half written, or not ours
            return False


def place() -> str:
    """Name what process numbers are numbers of: this machine since its start, and its namespace.

    Containers often share a hostname, and a number of one means nothing in another.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # where there is no Linux, the name has to do
        parts.append(BOOT_ID.read_text(encoding="ascii").strip())
        parts.append(os.readlink(PID_NAMESPACE))
    return " ".join(parts)


def _newest(folder: Path) -> int | None:
    try:
        generations = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    except FileNotFoundError:
        return None
    return max(generations, default=None)


# The work of one process --------------------------------------------------------------------------

RECEIPT = "receipt.json"
ERROR_SUFFIX = ".error.json"
POLL_SECONDS = 1.0
"""Between two looks at tasks that others have locked."""
TRIAL_BYTES = 2**22
"""Written after a failure to distinguish a full disk from anything else."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How a full disk, a used up quota, and a limit of the file size are reported."""

Render = Callable[[Task, Path], dict[str, Any]]
"""Makes a video in a folder, and returns what its JSON holds."""


class DiskFullError(UserError):
    """Nothing more can be written; going on would fail every task."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(
            f"{folder}: nothing more can be written ({error.strerror}): make room and start again; "
            "what is complete stays"
        )


@dataclass
class Worker:
    """Takes tasks and makes them until none is left."""

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
        failures: dict[str, str] = {}
        pending = [*self.tasks[first:], *self.tasks[:first]]
        try:
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
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DiskFullError(self.out, error) from None
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
        if self._flaw(task) is None:
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
        number, count = self.tasks.index(task) + 1, len(self.tasks)
        logger.info("video         %d of %d: %s, %s", number, count, task.label, task.preset)
        try:
            report = self.render(task, lock.work)
            if lock.is_valid():
                report = {**report, "made_from": dict(self.origins.get(task.kind, {}))}
                publish(task, self.out, lock.work, report=report)
                task.path(self.out, ERROR_SUFFIX).unlink(missing_ok=True)
                logger.info("wrote         %s", task.path(self.out, ".mp4"))
        except Exception as error:  # noqa: BLE001 - the other tasks go on after any failure
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
    # in the folder that goes with the lock, so that a killed process leaves no part among videos
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
        raise DiskFullError(folder, error) from None


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
