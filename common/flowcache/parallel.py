"""Start and divide a run in several processes, as torchrun starts them."""

import logging
import os
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Annotated, cast

import torch.distributed as dist

from flowcache.bounds import Bounds
from flowcache.cli import EXIT_INTERRUPTED, run_command
from flowcache.errors import UserError
from flowcache.ranks import (
    PATIENCE,
    TIMEOUT,
    Group,
    Layout,
    LostProcessError,
    Place,
    Ranks,
    ToldElsewhereError,
    contact,
)

MAX_PROCESSES = 4096
EXIT_LOST = 1
EXIT_TERMINATED = 143


@dataclass(frozen=True)
class ParallelRule:
    """How several processes divide a run."""

    branch: Annotated[int | None, Bounds(1, MAX_PROCESSES)] = None
    sequence: Annotated[int | None, Bounds(1, MAX_PROCESSES)] = None


def layout_of(
    rule: ParallelRule,
    num_processes: int,
    *,
    num_branches: int,
    num_heads: int,
    num_tokens: int,
) -> Layout:
    """Divide the processes of a run: as many branch groups as possible, the rest by tokens.

    Args:
        num_branches: guidance passes.
        num_heads: key/value heads.
        num_tokens: least number of tokens that is divided.

    Raises:
        UserError: the processes, branches, heads or tokens can't be divided so.
    """
    layout = _chosen(rule, num_processes, num_branches=num_branches)
    if layout.size != num_processes:
        raise UserError(
            f"parallel.branch={layout.branch} x parallel.sequence={layout.sequence} needs "
            f"{layout.size} processes, but {num_processes} run: change one of them, or start "
            f"torchrun --nproc_per_node={layout.size} (a launcher: GPUS={layout.size})"
        )
    if layout.branch > num_branches:
        raise UserError(
            f"parallel.branch={layout.branch} is above the {num_branches} guidance passes of this "
            f"run: use parallel.branch={num_branches} or less"
        )
    if num_heads % layout.sequence:
        raise UserError(
            f"parallel.sequence={layout.sequence} does not divide the {num_heads} key/value heads "
            f"of the model: {_remedy(rule, layout, num_branches=num_branches, num_heads=num_heads)}"
        )
    if num_tokens < layout.sequence:
        raise UserError(
            f"parallel.sequence={layout.sequence} is above the {num_tokens} tokens that are "
            "divided: use fewer processes, or a larger video"
        )
    return layout


def _chosen(rule: ParallelRule, num_processes: int, *, num_branches: int) -> Layout:
    """Return how processes are divided, whether or not that fits them and the run."""
    branch = rule.branch
    if branch is None and rule.sequence is not None:
        branch = max(num_processes // rule.sequence, 1)
    if branch is None:
        branch = max(b for b in range(1, num_branches + 1) if num_processes % b == 0)
    return Layout(branch, rule.sequence or max(num_processes // branch, 1))


def _remedy(rule: ParallelRule, layout: Layout, *, num_branches: int, num_heads: int) -> str:
    """Say what to do where a layout does not divide the heads.

    Example: one branch, 8 heads, 6 processes: "start 1, 2 or 4 processes instead of 6 ...".
    """
    if rule.sequence is not None:
        fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        return f"use parallel.sequence={_either(fitting)}"
    fewer = {n: _chosen(rule, n, num_branches=num_branches) for n in range(1, layout.size)}
    fitting = [n for n, own in fewer.items() if own.size == n and num_heads % own.sequence == 0]
    noun = "process" if fitting == [1] else "processes"
    numbers = _either(fitting)
    return f"start {numbers} {noun} instead of {layout.size} (a launcher: GPUS={numbers})"


def _either(numbers: Sequence[int]) -> str:
    """Write numbers of which one is to be taken: "1, 2 or 4"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def own_bytes(num_bytes: int, layout: Layout, *, num_branches: int) -> int:
    """Return how much of what all branches hold per head a process has at most.

    Args:
        num_bytes: of all branches.
    """
    held = -(-num_branches // layout.branch)
    return num_bytes * held // (num_branches * layout.sequence)


def layout_lines(layout: Layout) -> list[str]:
    """Say how a run is divided, in a line of its description; [] if it is not."""
    if layout.size == 1:
        return []
    return [
        f"processes    {layout.size}: {layout.branch} branch groups x {layout.sequence} sequence "
        "ranks; weights and KV cache below are those of each"
    ]


# Beginning and end --------------------------------------------------------------------------------


@contextmanager
def joined(place: Place, *, timeout: timedelta = TIMEOUT) -> Generator[Ranks, None, None]:
    """Meet the other processes.

    Args:
        timeout: how long to wait for them, now and whenever something is exchanged.

    Raises:
        LostProcessError: one did not come in time.
    """
    if place.size == 1:
        yield Ranks()
        return
    with contact():
        dist.init_process_group("gloo", timeout=timeout)
        every = dist.new_group(timeout=PATIENCE, backend="gloo")
    everyone = Group(place.rank, place.size, dist.group.WORLD)
    patient = Group(place.rank, place.size, cast("dist.ProcessGroup", every))
    yield Ranks(place, everyone=everyone, patient=patient, timeout=timeout)
    dist.destroy_process_group()  # not after an error: it would wait for those that are lost


def run_in_ranks(command: Callable[[Ranks], None]) -> int:
    """Run a command in each process that torchrun started; return the exit code.

    The first process speaks for all. One that is asked to end puts its files in order first.
    """
    place = Place.of(os.environ)
    if place.size == 1:
        return run_command(lambda: command(Ranks()))
    signal.signal(signal.SIGTERM, _terminated)
    if place.rank:
        logging.disable(logging.WARNING)
    return run_command(lambda: _join_and_run(command, place))


def _join_and_run(command: Callable[[Ranks], None], place: Place) -> None:
    try:
        with joined(place) as ranks:
            command(ranks)
    except ToldElsewhereError:
        raise SystemExit(0) from None
    except LostProcessError as error:
        if place.rank:
            raise SystemExit(EXIT_LOST) from None
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        if place.rank:
            raise SystemExit(EXIT_INTERRUPTED) from None
        raise


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(EXIT_TERMINATED)
