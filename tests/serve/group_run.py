"""Make videos by a group of two processes: `python group_run.py FOLDER VICTIM WHEN`.

In FOLDER: `first`, `after` (the same video, after two that were cancelled), `tokens` (the same,
divided otherwise) and `wrong.txt`, what was said of a wrong setting. `pid.txt` names the other
process. At last VICTIM, `first` or `other`, is killed: WHEN is `idle` or `at work`.
"""

import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from flowcache.api import Tick
from flowcache.errors import UserError
from flowcache.serve.group import Group, load_in
from flowcache.serve.jobs import CancelledError, Event, Job, Shown

GIVEN = {
    "model": "demo",
    "preset": "flowcache_fast",
    "architecture": None,
    "progress_bar": False,
    "device": "cpu",
    "num_frames": "33",
    "num_steps": "8",
}
PROMPT = "a red circle moving right on a black background"


def main(folder: Path, victim: str, when: str) -> None:
    group = Group(partial(load_in, given=GIVEN), 2)
    (other,) = multiprocessing.active_children()
    assert other.pid is not None
    (folder / "pid.txt").write_text(str(other.pid))

    def make(name: str, report: partial[None] | None = None, **settings: str) -> None:
        (folder / name).mkdir()
        job = Job(name, PROMPT, "flowcache_fast", settings, 24, "64x64", 0)
        group.make(job, folder / name, report or (lambda _event: None))

    make("first")
    for kind in (Tick, Shown):
        try:
            make(f"cancelled by {kind.__name__}", partial(cancel, kind))
            raise AssertionError("a cancelled video was finished")
        except CancelledError:
            pass
    try:
        make("wrong", num_frames="34")
    except UserError as error:
        (folder / "wrong.txt").write_text(str(error))
    make("after")
    make("tokens", **{"parallel.branch": "1"})
    pid = os.getpid() if victim == "first" else other.pid
    if when == "idle":
        os.kill(pid, signal.SIGKILL)
        time.sleep(60)  # the end comes first
    else:
        make("killed", partial(kill, pid))


def cancel(kind: type, event: Event) -> None:
    if isinstance(event, kind):
        raise CancelledError


def kill(pid: int, event: Event) -> None:
    if isinstance(event, Tick) and event.index == 5:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
