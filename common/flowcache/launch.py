"""Start the processes of a run on this machine: `python -m flowcache.launch 4 -m magi1 ARGUMENTS`.

This is `torchrun --standalone --nproc_per_node=4 -m magi1 ARGUMENTS`, but what is wrong with the
arguments is told in one line, without torchrun's account of how its processes ended.
"""

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from flowcache.cli import EXIT_USER_ERROR, run_command
from flowcache.errors import UserError

REPORTER = "torch.distributed.elastic.multiprocessing.api"
"""Logs that a process failed, which `ChildFailedError` tells, too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them; return the exit code (2: something given is wrong).

    Raises:
        ChildFailedError: a process ended for another reason.
    """
    num, *command = (sys.argv[1:] if arguments is None else arguments) or [""]
    if not num.isdecimal() or int(num) < 1:
        return run_command(lambda: refuse(num))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun does, too, and warns of it
    logging.getLogger(REPORTER).setLevel(logging.CRITICAL)
    try:
        run(parse_args(["--standalone", f"--nproc_per_node={num}", *command]))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode != EXIT_USER_ERROR:
            raise
        return EXIT_USER_ERROR  # the process has said why
    return 0


def refuse(num: str) -> None:
    """Refuse a number of processes."""
    raise UserError(f"GPUS={num} must be a whole number of processes, 1 or more")


if __name__ == "__main__":
    sys.exit(main())
