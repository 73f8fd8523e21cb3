"""Start and divide a run in several processes, as torchrun starts them."""

import logging
import os
import socket
import sys
from collections.abc import Callable, Generator, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from flowcache.errors import UserError
from flowcache.runtime.cli import run_command
from flowcache.runtime.ending import EXIT_LOST, LAUNCHER
from flowcache.runtime.ranks import (
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
from flowcache.runtime.settings import ParallelRule


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


def own_branches(layout: Layout, *, num_branches: int) -> int:
    """Return how many branches a process computes at most."""
    return -(-num_branches // layout.branch)


def own_bytes(num_bytes: int, layout: Layout, *, num_branches: int) -> int:
    """Return how much of what all branches hold per head a process has at most.

    Args:
        num_bytes: of all branches.
    """
    held = own_branches(layout, num_branches=num_branches)
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
        UserError: it is not said where to meet.
        LostProcessError: one did not come in time.
    """
    if place.size == 1:
        yield Ranks()
        return
    with contact():
        # None: by the environment, which torchrun sets
        store = _meeting(place, os.environ, timeout=timeout)
        dist.init_process_group(
            "gloo", store=store, rank=place.rank, world_size=place.size, timeout=timeout
        )
        every = dist.new_group(timeout=PATIENCE, backend="gloo")
    everyone = Group(place.rank, place.size, dist.group.WORLD)
    patient = Group(place.rank, place.size, cast("dist.ProcessGroup", every))
    yield Ranks(place, everyone=everyone, patient=patient, timeout=timeout)
    dist.destroy_process_group()  # not after an error: it would wait for those that are lost


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _meeting(
    place: Place, variables: MutableMapping[str, str], *, timeout: timedelta
) -> dist.TCPStore | None:
    """Return where the processes meet, None: where torchrun listens.

    On one machine all of them talk through the loopback interface; left to themselves PyTorch's
    store, gloo and NCCL listen on every one.

    Raises:
        UserError: it is not said where to meet.
    """
    host, port = variables.get("MASTER_ADDR", ""), variables.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port[:9]) < 2**16:
        raise UserError(
            f"RANK={place.rank} and WORLD_SIZE={place.size} are in the environment, but "
            f"MASTER_ADDR={host} and MASTER_PORT={port} name no place to meet: start several "
            "processes by torchrun, or unset RANK and WORLD_SIZE for one"
        )
    is_local = host in LOOPBACK or variables.get("LOCAL_WORLD_SIZE") == str(place.size)
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if is_local and loopback is not None:
        for library in ("GLOO", "NCCL"):
            variables.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    if host not in LOOPBACK or variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    listener: int | None = None
    if place.rank == 0 and LAUNCHER in variables:
        listener = int(variables[LAUNCHER].split(",")[2])
    elif place.rank == 0:
        listener = _listen(host, int(port))
    return dist.TCPStore(
        host,
        int(port),
        place.size,
        place.rank == 0,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def _listen(host: str, port: int) -> int:
    """Return the descriptor of a socket that listens at an address of this machine only."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family).detach()
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={host} MASTER_PORT={port}: no place to meet ({error.strerror}): choose "
            "another port"
        ) from None


def run_in_ranks(command: Callable[[Ranks], None]) -> int:
    """Run a command in each process that torchrun started; return the exit code.

    The first process speaks for all.
    """
    codes: list[int] = []
    code = run_command(lambda: codes.append(_join_and_run(command, Place.of(os.environ))))
    code = code or codes[0]
    if dist.is_initialized():  # it ended early, with a code or because another process says why
        sys.stdout.flush()
        sys.stderr.flush()
        # an ordinary end would wait for lost processes, or abort in the threads that talk to them
        os._exit(code)
    return code


def _join_and_run(command: Callable[[Ranks], None], place: Place) -> int:
    if place.rank:
        logging.disable(logging.WARNING)
    try:
        with joined(place) as ranks:
            command(ranks)
    except ToldElsewhereError:
        return 0
    except LostProcessError as error:
        if place.rank == 0 and LAUNCHER not in os.environ:  # else the launcher says it
            sys.stderr.write(f"error: {error}\n")
        return EXIT_LOST
    return 0
