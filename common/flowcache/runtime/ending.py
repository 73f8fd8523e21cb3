"""How a command starts as one of several processes, and ends early: by a signal, or alone.

The first SIGINT, SIGTERM or SIGHUP raises `Stopped` in the main thread, so that every `with` puts
its files in order, and the exit code is 128 + the signal's number. Python alone would lose a signal
in three ways, which a thread makes good:

    raised where Python ignores exceptions      it is raised again a moment later
    (at-fork callbacks, finalizers)
    the main thread waits in C code and can't   after STUCK_SECONDS unfinished files get the names
    raise (a meeting of processes, a GPU)       that say so, and the process ends
    putting things in order takes for ever      the same after END_SECONDS

Code that catches everything is met by `check_stopped` in the loops over ticks and videos. A second
signal ends the process at once. No signal arrives inside `undisturbed`.
"""

import contextlib
import fcntl
import json
import logging
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from flowcache.errors import UserError
from flowcache.runtime.files import fresh_path

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REPEAT_SECONDS = 1.0
"""What comes sooner is no second signal: shells and `timeout` signal a process and its group."""
STUCK_SECONDS = 5.0
END_SECONDS = 25.0
"""Launchers and schedulers send SIGKILL 30 seconds after SIGTERM."""
POLL_SECONDS = 1.0
"""Between two looks at the process that started this one."""
AGAIN_SECONDS = 0.05
"""Until a lost signal is raised again: whatever lost it should be over."""
OVER, LOST = b"\0", b"\xff"
"""What the watching thread is woken with, next to numbers of signals."""

EXIT_USER_ERROR = 2
EXIT_LOST = 75
"""Of a process whose others ended or hang; by convention: to try again may help."""
LAUNCHER = "FLOWCACHE_LAUNCHER"
"""Variable by which `flowcache.launch` says its process number and two descriptors of the first
process: its notes, see `Starter`, and the socket at which the processes meet."""
TEMPORARY = "flowcache-unpacked-"
INTERRUPTED = "interrupted"
ORPHANED = "the process that started this one has ended"
MEET_SECONDS = 60.0
"""How long an answer of torchrun is waited for."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_UNSET = "unset RANK, WORLD_SIZE and LOCAL_RANK for a run of one process, else start it by torchrun"


@dataclass(frozen=True)
class Starter:
    """The process that started this one as one of several."""

    pid: int
    says_why: bool = False
    """Whether it says why a run ended, so that its processes need not; see `flowcache.launch`."""
    notes: int | None = None
    """File in which it finds what is unfinished when this process is killed (descriptor)."""


class Stopped(KeyboardInterrupt):
    """The command has to end.

    A KeyboardInterrupt, since libraries clean up after that and pass it on.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number
        self.reason = reason
        self.kept: list[str] = []
        """What unfinished results were kept, as a sentence each."""

    def __str__(self) -> str:
        return message(self.reason, self.kept)

    @property
    def exit_code(self) -> int:
        """As of a program that the signal ended."""
        return 128 + self.number


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Which one on its machine."""

    @property
    def shared_rank(self) -> int | None:
        """Its `local_rank` where several processes share the machines' devices, else None."""
        return self.local_rank if self.size > 1 else None

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> "Place":
        """Read the environment that torchrun gives its processes; without it there is one."""
        read = {name: variables.get(name, "") for name in _VARIABLES}
        for name, text in read.items():
            if text and not (text.isascii() and text.isdecimal() and len(text) < 10):
                raise UserError(
                    f"{name}={text[:40]} in the environment must be a whole number, 0 or more: "
                    f"{_UNSET}"
                )
        if not read["RANK"] and int(read["WORLD_SIZE"] or 1) != 1:
            raise UserError(
                f"WORLD_SIZE={read['WORLD_SIZE']} is in the environment, but no RANK: {_UNSET}"
            )
        rank, size = int(read["RANK"] or 0), int(read["WORLD_SIZE"] or 1)
        place = cls(rank, size, int(read["LOCAL_RANK"] or 0))
        for name, value in (("RANK", place.rank), ("LOCAL_RANK", place.local_rank)):
            if value >= size:
                raise UserError(
                    f"{name}={value} in the environment must be below WORLD_SIZE={size}: {_UNSET}"
                )
        return place


def starter_of(variables: Mapping[str, str], place: Place) -> Starter | None:
    """Return the process that started this one as one of several; None: this one is alone."""
    if LAUNCHER in variables:
        pid, notes, _ = map(int, variables[LAUNCHER].split(","))
        starter = Starter(pid, says_why=True, notes=notes if place.rank == 0 else None)
    elif place.size > 1 or "TORCHELASTIC_RUN_ID" in variables:
        starter = Starter(os.getppid())
    else:
        return None
    is_torchrun = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if starter.pid != os.getppid() or (is_torchrun and not _is_torchrun_there(variables)):
        raise Stopped(signal.SIGTERM, "" if place.rank else ORPHANED)
    return starter


def _is_torchrun_there(variables: Mapping[str, str]) -> bool:
    """Tell whether torchrun still listens; it may have ended while Python started here."""
    try:
        address = (variables["MASTER_ADDR"], int(variables["MASTER_PORT"]))
        socket.create_connection(address, timeout=MEET_SECONDS).close()
    except ConnectionRefusedError:
        return False
    except (OSError, KeyError, ValueError):
        return True  # not known
    return True


class Ending:
    """The signal handlers of a command, as a context; nothing outside the main thread."""

    def __init__(self, starter: Starter | None = None, *, is_first: bool = True) -> None:
        """Install nothing yet."""
        self.number: int | None = None
        """The signal that came."""
        self.reason = INTERRUPTED
        self.unfinished: dict[Path, Path | None] = {}
        """What is being written -> its name if it is never finished; None: it goes."""
        self.depth = 0
        """Of `undisturbed` sections."""
        self._starter = starter
        self._is_first = is_first
        self._arrived: float | None = None
        self._since = 0.0
        self._lost = threading.Event()
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Ending":
        """Install the handlers and start the thread that watches over them."""
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_hook = sys.unraisablehook
        sys.unraisablehook = self._note_lost
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="ending", daemon=True)
        self._thread.start()
        for number in SIGNALS:
            # what is ignored on purpose stays so: SIGHUP under nohup, SIGINT in the background
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                self._old_handlers[number] = signal.signal(number, self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the handlers, and name what is unfinished."""
        if not self._old_handlers:
            return
        self.depth += 1  # from here on no signal is raised
        self._writer.send(OVER)
        self._thread.join()
        for number, old in self._old_handlers.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
        signal.set_wakeup_fd(self._old_fd)
        sys.unraisablehook = self._old_hook
        self._reader.close()
        self._writer.close()
        kept = self._rescue()
        if isinstance(error, Stopped):
            error.kept += kept
        elif self.number is not None:
            stopped = self._stopped()
            stopped.kept += kept
            raise stopped
        else:
            for sentence in kept:
                logger.warning("%s", sentence)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
        if self.number is None:
            self.number, self._since = number, time.monotonic()
        elif self._lost.is_set():
            self._lost.clear()
        elif time.monotonic() - self._since > REPEAT_SECONDS:
            self._abandon(number)
        else:
            return
        if not self.depth:
            raise self._stopped()

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self.number is not None:
            raise self._stopped()

    def begin(self, part: Path, partial: Path | None) -> None:
        """Note a file or folder that is being written.

        Args:
            partial: its name if it is never finished; None: it is of no use then, and goes.
        """
        self.unfinished[part] = partial
        self._write_notes()

    def finish(self, part: Path) -> None:
        """Note that a file is finished, or gone."""
        self.unfinished.pop(part, None)
        self._write_notes()

    def _write_notes(self) -> None:
        if self._starter is None or self._starter.notes is None:
            return
        text = json.dumps(
            [[str(part), name and str(name)] for part, name in self.unfinished.items()]
        )
        os.ftruncate(self._starter.notes, 0)
        os.pwrite(self._starter.notes, text.encode(), 0)

    def _stopped(self) -> Stopped:
        assert self.number is not None
        return Stopped(self.number, self._reason())

    def _reason(self) -> str:
        """Return the reason, or nothing where another process says it."""
        is_said = self._starter is not None and self._starter.says_why
        return "" if not self._is_first or (is_said and self.reason != ORPHANED) else self.reason

    def _note_lost(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, Stopped):
            self._lost.set()
            self._writer.send(LOST)
        else:
            self._old_hook(unraisable)

    def _watch(self) -> None:
        """Notice what the main thread can't: see the table above."""
        while True:
            is_calm = self._starter is None and self._arrived is None
            is_ready = select.select([self._reader], [], [], None if is_calm else POLL_SECONDS)[0]
            received = self._reader.recv(64) if is_ready else b""
            now = time.monotonic()
            for number in received:
                if number in self._old_handlers:
                    self._note(number, now)
            if OVER in received:
                return
            self._look(now)

    def _note(self, number: int, now: float) -> None:
        if self._arrived is None:
            self._arrived = now
        elif now - self._arrived > REPEAT_SECONDS and self.number is None:
            self._abandon(number)  # the main thread has not even seen the first one

    def _look(self, now: float) -> None:
        if self._lost.is_set():
            time.sleep(AGAIN_SECONDS)
            self._send(self.number or signal.SIGTERM)
        if self._arrived is None:
            if self._starter is not None and os.getppid() != self._starter.pid:
                self.reason = ORPHANED
                self._send(signal.SIGTERM)
            return
        seconds = now - self._arrived
        if seconds > END_SECONDS or (self.number is None and seconds > STUCK_SECONDS):
            self._abandon(self.number or signal.SIGTERM)

    @staticmethod
    def _send(number: int) -> None:
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, number)

    def _abandon(self, number: int) -> None:
        """End the process at once; encoders finish their files by themselves."""
        text = message(self._reason(), self._rescue())
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}\n".encode() if text else b"")
        os._exit(128 + number)

    def _rescue(self) -> list[str]:
        """Give unfinished files the names that say so."""
        kept = [rescue(part, partial) for part, partial in [*self.unfinished.items()]]
        self.unfinished.clear()
        return [sentence for sentence in kept if sentence is not None]


def message(reason: str, kept: list[str]) -> str:
    """Say in one line why a command ended and what it kept."""
    return ": ".join(part for part in (reason, "; ".join(kept)) if part)


def rescue(part: Path, partial: Path | None) -> str | None:
    """Name what is unfinished, and say so; None: there is nothing, or it was of no use.

    Example: `.a.4711.part.mp4` becomes `a.partial.mp4`.
    """
    if partial is None:
        shutil.rmtree(part, ignore_errors=True)
        return None
    with contextlib.suppress(OSError):
        if part.stat().st_size > 0:
            target = fresh_path(partial.parent, partial.stem, partial.suffix)
            os.replace(part, target)
            return f"what was written so far is in {target}"
        part.unlink()
    return None


def current() -> Ending | None:
    """Return the ending of the command that runs, if this is its main thread."""
    if threading.current_thread() is not threading.main_thread():
        return None
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, Ending) else None


def check_stopped() -> None:
    """Raise `Stopped` if a signal came that something has swallowed."""
    ending = current()
    if ending is not None:
        ending.check()


@contextlib.contextmanager
def undisturbed() -> Generator[None, None, None]:
    """Keep signals from being raised inside; what came is raised at the end."""
    ending = current()
    if ending is None:
        yield
        return
    had_number = ending.number is not None
    ending.depth += 1
    try:
        yield
    finally:
        ending.depth -= 1
        if not ending.depth and not had_number:
            ending.check()


@contextlib.contextmanager
def temporary_folder(place: Path | None = None) -> Generator[Path, None, None]:
    """Make a folder for large temporary files, of which none outlives the next run.

    It is gone at the end, and when a signal or an error ends the command. What a killed process
    left is removed by the next one that makes such a folder: the system has dropped its lock.

    Args:
        place: where; made if it is missing. None: where the system keeps temporary files.
    """
    place = Path(tempfile.gettempdir()) if place is None else place
    place.mkdir(parents=True, exist_ok=True)
    remove_left(place)
    made, ending = Path(tempfile.mkdtemp(prefix=f"new-{TEMPORARY}", dir=place)), current()
    folder = made.with_name(made.name.removeprefix("new-"))
    try:
        with (made / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made.rename(folder)  # under this name it is looked at, so not before it is locked
            if ending is not None:
                ending.begin(folder, None)
            yield folder
    finally:
        for path in (made, folder):
            shutil.rmtree(path, ignore_errors=True)
        if ending is not None:
            ending.finish(folder)


def remove_left(place: Path) -> None:
    """Remove the temporary folders of killed processes."""
    for left in place.glob(f"{TEMPORARY}*"):
        # for writing: network file systems lock nothing else
        with contextlib.suppress(OSError), (left / "lock").open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)


def start_quietly(name: str) -> None:
    """Let Ctrl-C end a program without a traceback while it imports; `Ending` handles it later.

    Args:
        name: `__name__` of the caller: nothing happens unless it is the program itself.
    """
    # where SIGINT is ignored, as in the background of a shell, it stays so
    if name == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
