"""The processes of one run, and what they tell each other.

Guidance branches are divided first, then the tokens of each branch, see `runtime.ulysses`. With 4
processes, 2 branch groups and 2 sequence ranks:

    process  branch group  sequence rank     exchanges velocities with     tokens and heads with
    0        0 (cond)      0                 2                             1
    1        0 (cond)      1                 3                             0
    2        1 (uncond)    0                 0                             3
    3        1 (uncond)    1                 1                             2

Every process holds all weights and goes through the same ticks. Noise, solver and latents are
worked out by each alike; reuse is decided by one. The decoding of finished chunks is divided over
all of them: the processes above have the shares 0 to 3.
"""

import math
import os
import signal
import socket
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from flowcache.errors import UserError
from flowcache.policies import Decision, ReusePolicy
from flowcache.runtime.ending import LAUNCHER, ORPHANED, Starter, Stopped
from flowcache.schedule import Tick

T = TypeVar("T")

TIMEOUT = timedelta(seconds=60)
"""How long a process waits for the others before it gives up."""
PATIENCE = timedelta(minutes=30)
"""The same where they read models from the disk, each at its own speed."""


class LostProcessError(Exception):
    """Another process of the run ended, hangs, or never came."""


class ToldElsewhereError(Exception):
    """The run ends for a reason that the first process tells the user."""


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
        """Read what torchrun tells its processes; without it there is one process.

        Raises:
            UserError: the variables contradict each other, or are no numbers.
        """
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


_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_UNSET = "unset RANK, WORLD_SIZE and LOCAL_RANK for a run of one process, else start it by torchrun"


def starter_of(variables: Mapping[str, str], place: Place) -> Starter | None:
    """Return the process that started this one as one of several; None: this one is alone.

    Raises:
        Stopped: it has ended already.
    """
    if LAUNCHER in variables:
        pid, notes, _ = map(int, variables[LAUNCHER].split(","))
        starter = Starter(pid, says_why=True, notes=notes if place.rank == 0 else None)
    elif place.size > 1 or "TORCHELASTIC_RUN_ID" in variables:
        starter = Starter(os.getppid())
    else:
        return None
    is_torchrun = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if starter.pid != os.getppid() or (is_torchrun and not _is_there(variables)):
        raise Stopped(signal.SIGTERM, "" if place.rank else ORPHANED)
    return starter


def _is_there(variables: Mapping[str, str]) -> bool:
    """Tell whether torchrun still listens; it may have ended while Python started here."""
    try:
        address = (variables["MASTER_ADDR"], int(variables["MASTER_PORT"]))
        socket.create_connection(address, timeout=TIMEOUT.total_seconds()).close()
    except ConnectionRefusedError:
        return False
    except (OSError, KeyError, ValueError):
        return True  # not known
    return True


@dataclass(frozen=True)
class Layout:
    """Into how many parts the branches are divided, and into how many the tokens of each."""

    branch: int = 1
    sequence: int = 1

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.branch * self.sequence


@contextmanager
def contact() -> Generator[None, None, None]:
    """Turn an error of torch.distributed into `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:  # all errors of torch.distributed are one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LostProcessError(
            f"lost contact with another process, which ended or hangs ({reason}): what it said "
            "stands above, else look at its memory and start again"
        ) from error


@dataclass(frozen=True)
class Group:
    """Processes that exchange tensors. In a group of one nothing is exchanged."""

    rank: int = 0
    size: int = 1
    handle: "dist.ProcessGroup | None" = None

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over all processes; `x` may be overwritten."""
        if self.size > 1:
            with contact():
                dist.all_reduce(x, group=self.handle)
        return x

    def copied(self, x: Tensor, *, source: int) -> Tensor:
        """Return what a process has; the others give a tensor of its shape to be overwritten."""
        if self.size > 1:
            assert self.handle is not None, "a group of several has a handle"
            with contact():
                dist.broadcast(x, dist.get_global_rank(self.handle, source), group=self.handle)
        return x

    def swapped(self, pieces: Sequence[Tensor], *, sizes: Sequence[int]) -> list[Tensor]:
        """Give each process its piece; return what each one gave, flat, `sizes` values each."""
        given = torch.cat([piece.flatten() for piece in pieces])
        received = given.new_empty(sum(sizes))
        with contact():
            dist.all_to_all_single(
                received,
                given,
                output_split_sizes=list(sizes),
                input_split_sizes=[piece.numel() for piece in pieces],
                group=self.handle,
            )
        return list(received.split(list(sizes)))

    def everyones(self, value: T) -> list[T]:
        """Return the plain values of all processes."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        with contact():
            dist.all_gather_object(values, value, group=self.handle)
        return cast("list[T]", values)


@dataclass(frozen=True)
class Ranks:
    """The processes of one run, as one of them sees them; by default it is alone."""

    place: Place = field(default_factory=Place)
    layout: Layout = field(default_factory=Layout)
    everyone: Group = field(default_factory=Group)
    """All, for values on the host."""
    patient: Group = field(default_factory=Group)
    """The same, waiting longer."""
    branches: Group = field(default_factory=Group)
    """Those with the same tokens of other branches, for tensors on the device."""
    sequence: Group = field(default_factory=Group)
    """Those with other tokens of the same branches, for tensors on the device."""
    timeout: timedelta = TIMEOUT
    """How long an exchange may take."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.place.rank == 0

    def divided(self, device: torch.device) -> "Ranks":
        """Return the same with the groups of the layout; all processes must ask for it alike.

        Args:
            device: of the run, in this process.
        """
        layout = self.layout
        if layout.size == 1:
            return self
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # 2: an exchange that takes too long is aborted and the next call raises. The default
            # ends the process at once, so that nobody could say why.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        numbers = torch.arange(layout.size).view(layout.branch, layout.sequence)

        def own(groups: list[list[int]]) -> Group:
            found = Group()
            for members in groups:
                if len(members) > 1:
                    handle = cast(
                        "dist.ProcessGroup",
                        dist.new_group(members, timeout=self.timeout, backend=backend),
                    )
                    if self.place.rank in members:
                        found = Group(members.index(self.place.rank), len(members), handle)
            return found

        with contact():
            branches, sequence = own(numbers.T.tolist()), own(numbers.tolist())
        return replace(self, branches=branches, sequence=sequence)

    @property
    def num_shares(self) -> int:
        """Into how many shares work is divided that is no matter of branches and tokens."""
        return self.branches.size * self.sequence.size

    @property
    def share(self) -> int:
        """Which of these shares is this process's."""
        return self.branches.rank * self.sequence.size + self.sequence.rank

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over all shares; `x` may be overwritten.

        Where only one process has something else than zeros, the others get exactly that.
        """
        if self.num_shares == 1:
            return x
        return self.branches.total(self.sequence.total(x.contiguous()))

    def owns(self, branch: int) -> bool:
        """Tell whether this process computes the branch of that number."""
        return branch % self.branches.size == self.branches.rank

    def holder(self, branches: Sequence[str], name: str) -> int:
        """Return which process of a group `branches` computes a branch."""
        return branches.index(name) % self.branches.size

    def own(self, branches: Sequence[str]) -> list[str]:
        """Return the names of the branches that this process computes."""
        return [name for number, name in enumerate(branches) if self.owns(number)]

    def exchanged(
        self, own: Mapping[str, Tensor], *, names: Sequence[str], like: Tensor
    ) -> dict[str, Tensor]:
        """Return a tensor of each branch.

        Args:
            own: the tensors of the branches that this process computes, those among `names`.
            names: of all branches that have one.
            like: a tensor of the same shape and dtype.
        """
        if self.branches.size == 1 or not names:
            return dict(own)
        every = like.new_zeros(len(names), *like.shape)
        for name, x in own.items():
            every[names.index(name)] = x
        return dict(zip(names, self.branches.total(every), strict=True))

    def decided_by(self, policy: ReusePolicy, *, branch: int) -> ReusePolicy:
        """Return a policy whose decisions are those of the first process with that branch."""
        if self.place.size == 1:
            return policy
        leader = branch % self.layout.branch * self.layout.sequence
        return SharedPolicy(policy, self.everyone, leader)

    def together(self, check: Callable[[], T]) -> T:
        """Make a check in every process; if one fails, all end and the first one tells why.

        Raises:
            UserError: a check failed (first process).
            ToldElsewhereError: a check failed (other processes).
        """
        result: list[T] = []
        told: str | None = None
        try:
            result.append(check())
        except UserError as error:
            told = str(error)
        failed = [message for message in self.patient.everyones(told) if message is not None]
        if not failed:
            return result[0]
        raise UserError(failed[0]) if self.is_first else ToldElsewhereError(failed[0])

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes: plain values, or tensors on the CPU.

        Raises:
            UserError: it can't make it (first process).
            ToldElsewhereError: the same (other processes).
        """
        if self.place.size == 1:
            return make()
        values: list[T | UserError | None] = [None]
        if self.is_first:
            try:
                values = [make()]
            except UserError as error:
                values = [UserError(str(error))]
        with contact():
            dist.broadcast_object_list(values, src=0, group=self.patient.handle)
        if isinstance(values[0], UserError):
            raise values[0] if self.is_first else ToldElsewhereError(str(values[0]))
        return cast(T, values[0])

    def confirm(self) -> None:
        """Check that all exchanges on the device came about: the next one after a failure raises.

        Raises:
            LostProcessError: one did not.
        """
        for group in (self.branches, self.sequence):
            if group.size > 1:
                with contact():
                    dist.barrier(group=group.handle)

    def wait(self) -> None:
        """Wait until all processes are here, however long they read from the disk."""
        self.patient.everyones(None)


@dataclass
class SharedPolicy(ReusePolicy):
    """One process decides for all, so that rounding can't drive them apart."""

    policy: ReusePolicy
    everyone: Group
    leader: int

    def __post_init__(self) -> None:
        self.needs_signals = self.policy.needs_signals

    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        """Decide as the leader does; see `ReusePolicy.plan`. Others' signals are not looked at."""
        table = torch.zeros(len(tick.steps), 3, dtype=torch.float64)
        if self.everyone.rank == self.leader:
            plan = self.policy.plan(tick, signals, stored=stored)
            rows = [_to_row(plan[chunk]) for chunk in tick.steps]
            table = torch.tensor(rows, dtype=torch.float64)
        rows = self.everyone.copied(table, source=self.leader).tolist()
        return {chunk: _from_row(row) for chunk, row in zip(tick.steps, rows, strict=True)}

    def computed_anyway(self, chunks: Collection[int]) -> None:
        self.policy.computed_anyway(chunks)


def _to_row(decision: Decision) -> list[float]:
    values = (decision.distance, decision.accumulated)
    return [float(decision.is_computed), *(math.nan if v is None else v for v in values)]


def _from_row(row: Sequence[float]) -> Decision:
    computed, *values = row
    return Decision(bool(computed), *(None if math.isnan(value) else value for value in values))
