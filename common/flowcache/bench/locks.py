"""Locks: how processes share tasks through a folder alone, without talking to each other.

The lock of a task is a file that exactly one process can create. Its owner touches it every few
seconds. A lock whose owner is gone is *stale*: the next owner creates the file of the next
generation, which again exactly one process can do, so no file is ever taken from somebody else.

    .claims/5f2c.../0        of a process that was killed
    .claims/5f2c.../1        of the one that makes the video now
    .claims/5f2c.../1.work   its folder for unfinished files

A process that was taken for dead by mistake (suspended for minutes) sees the newer generation and
drops what it made.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

FOLDER = ".claims"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 120.0
"""Without a heartbeat, as seen by the clock of who waits: clocks of nodes may differ."""


@dataclass(frozen=True)
class Lock:
    """The right of this process to make one video."""

    folder: Path
    generation: int
    owner: str
    """What the file says: who made the lock, and when."""

    @property
    def path(self) -> Path:
        """Return the file that is the lock."""
        return self.folder / str(self.generation)

    @property
    def work(self) -> Path:
        """Return the folder for unfinished files."""
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
            self._remove()

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _remove(self) -> None:
        """Remove this generation and those before it; the lock itself goes last.

        Where the lock is gone, who took over has removed them; what lies there now is not ours.
        """
        if not self._is_own():
            return
        for generation in range(self.generation + 1):
            shutil.rmtree(self.folder / f"{generation}.work", ignore_errors=True)
            (self.folder / str(generation)).unlink(missing_ok=True)


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
            self._seen[path] = (touched, time.monotonic())
            since = time.monotonic()
        if time.monotonic() - since > self.stale_seconds:
            return True
        try:
            owner = json.loads(text)
            return owner["place"] == place() and not _is_running(owner["pid"])
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


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
