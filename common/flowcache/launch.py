"""Start the processes of a run: `python -m flowcache.launch 4 -m magi1 ARGUMENTS`.

This is `torchrun --standalone --nproc_per_node=4 -m magi1 ARGUMENTS`, but all sockets listen on the
loopback interface only, whatever ends the run is one line, and what a killed process was writing
keeps its frames as `NAME.partial.mp4`.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from flowcache.errors import UserError
from flowcache.runtime.ending import (
    END_SECONDS,
    EXIT_LOST,
    EXIT_USER_ERROR,
    LAUNCHER,
    Ending,
    Stopped,
    rescue,
    start_quietly,
    undisturbed,
)

start_quietly(__name__)

POLL_SECONDS = 0.05
SETTLE_SECONDS = 0.5
"""After the first failure, until those that have to do with it have failed, too."""
UNREADY = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)
"""Codes of a process that ended in the middle of a line."""
KILL_SECONDS = END_SECONDS + 10
"""Between the request to end and SIGKILL."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them; return the exit code.

    That is 0, 2 (something given is wrong), 128 + N after signal N, else that of the process which
    failed.
    """
    num, *command = (sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        with Ending():
            return launch(num, command)
    except UserError as error:  # as `flowcache.runtime.cli.run_command`, which imports PyTorch
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER_ERROR
    except Stopped as stopped:
        with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
            sys.stderr.write(f"{stopped}\n")
        return stopped.exit_code


def launch(num: str, command: Sequence[str]) -> int:
    """Run a command, which follows `python`, in `num` processes; return the exit code."""
    if not (num.isascii() and num.isdecimal() and 0 < int(num[:9]) < 10_000):
        raise UserError(f"GPUS={num} must be a whole number of processes, 1 or more")
    if not command:
        raise UserError("nothing to start: give a module or a script, as in 2 -m magi1 --help")
    with Processes(int(num)) as processes:
        processes.start(command)
        code, reason = processes.wait()
    if reason is not None:
        sys.stderr.write(f"error: {reason}\n")
    return code


@dataclass
class Processes:
    """The processes of a run, as a context at whose end none is left."""

    num: int
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _notes: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def __enter__(self) -> "Processes":
        """Return the processes; none runs yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what runs, and keep what it was writing."""
        with undisturbed():
            self._end()
            if self.running and (self.running[0].returncode or 0) in UNREADY:
                sys.stderr.write("\n")  # it had no time to end its progress bar
            for sentence in self._rescue():
                sys.stderr.write(f"{sentence}\n")
            self._notes.close()

    def start(self, command: Sequence[str]) -> None:
        """Start all of them."""
        with socket.create_server(("127.0.0.1", 0)) as meeting:
            descriptors = (self._notes.fileno(), meeting.fileno())
            shared = {
                "WORLD_SIZE": str(self.num),
                "LOCAL_WORLD_SIZE": str(self.num),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(meeting.getsockname()[1]),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
                LAUNCHER: ",".join(map(str, (os.getpid(), *descriptors))),
            }
            for rank in range(self.num):
                with undisturbed():
                    process = subprocess.Popen(
                        [sys.executable, "-u", *command],
                        env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        pass_fds=descriptors if rank == 0 else (),
                        start_new_session=True,  # Ctrl-C reaches the launcher alone
                    )
                    self.running.append(process)

    def wait(self) -> tuple[int, str | None]:
        """Wait until all have ended or one failed.

        Returns: the exit code, and why that process failed; None: it has said so itself.
        """
        while None in (codes := [each.poll() for each in self.running]) and not any(codes):
            time.sleep(POLL_SECONDS)
        if not any(codes):
            return 0, None
        time.sleep(SETTLE_SECONDS)
        codes = [each.poll() for each in self.running]
        rank = min(range(self.num), key=lambda rank: _blame(codes[rank]))
        code, process = codes[rank] or 0, f"process {rank} of {self.num}"
        if code < 0:
            hint = " (by the system, if memory was short)" if -code == signal.SIGKILL else ""
            name = signal.Signals(-code).name
            return 128 - code, f"{process} was ended by {name}{hint}, so the others ended, too"
        if code == EXIT_LOST:
            return code, (
                f"{process} lost contact with the others, of which one hangs or is too slow: look "
                "at memory and disk, and start again"
            )
        if code == EXIT_USER_ERROR:
            return code, None
        return code, f"{process} ended with exit code {code}; why stands above"

    def _end(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + KILL_SECONDS
        for process in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started itself
            process.wait()

    def _rescue(self) -> list[str]:
        """Name what a process was writing that had no time to do so itself."""
        self._notes.seek(0)
        try:
            unfinished = json.loads(self._notes.read() or b"[]")
        except ValueError:  # killed in the middle of a note
            return []
        kept = [rescue(Path(part), name and Path(name)) for part, name in unfinished]
        return [sentence for sentence in kept if sentence is not None]


def _blame(code: int | None) -> int:
    """Order exit codes by how near to the cause they are: wrong input, killed, failed, lost."""
    if code is None or code == 0:
        return 4
    if code == EXIT_USER_ERROR:
        return 0  # it has said why; the network of another may abort as this one leaves
    if code < 0:
        return 1
    return {EXIT_LOST: 3}.get(code, 2)


if __name__ == "__main__":
    sys.exit(main())
