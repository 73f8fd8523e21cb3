"""Several processes make one video: how they are divided, and what they tell each other.

Every process holds all weights and goes through the same ticks. Guidance branches are divided
first, then the tokens of each branch, see `flowcache.ulysses`. With 4 processes, 2 branch groups
and 2 sequence ranks:

    process  branch group  sequence rank     exchanges velocities with     tokens and heads with
    0        0 (cond)      0                 2                             1
    1        0 (cond)      1                 3                             0
    2        1 (uncond)    0                 0                             3
    3        1 (uncond)    1                 1                             2

Noise, solver and latents are worked out by each process alike; reuse is decided by one.
"""

import logging
import math
import os
import signal
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from flowcache.cli import EXIT_INTERRUPTED, run_command
from flowcache.errors import UserError
from flowcache.reuse import Decision, ReusePolicy
from flowcache.schedule import Tick

T = TypeVar("T")

TIMEOUT = timedelta(seconds=60)
"""How long a process waits for the others before it gives up."""
PATIENCE = timedelta(minutes=30)
"""The same where they read models from the disk, each at its own speed."""
EXIT_LOST = 1
EXIT_TERMINATED = 143


class LostProcessError(Exception):
    """Another process of the run ended, hangs, or never came."""


class ToldElsewhereError(Exception):
    """The run ends for a reason that the first process tells the user."""


@dataclass(frozen=True)
class ParallelRule:
    """How several processes divide a run."""

    branch: int | None = None
    sequence: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("branch", self.branch), ("sequence", self.sequence)):
            if value is not None and value < 1:
                raise UserError(f"parallel.{name} must be 1 or more, or null, not {value}")


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Which one on its machine."""

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> "Place":
        """Read what torchrun tells its processes; without it there is one process."""
        return cls(*(int(variables.get(n, d)) for n, d in _VARIABLES.items()))


_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True)
class Layout:
    """Into how many parts the branches are divided, and into how many the tokens of each."""

    branch: int = 1
    sequence: int = 1

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.branch * self.sequence


def layout_of(
    rule: ParallelRule, num_processes: int, *, num_branches: int, num_heads: int, num_tokens: int
) -> Layout:
    """Divide the processes of a run: as many branch groups as possible, the rest by tokens.

    Args:
        num_branches: guidance passes.
        num_heads: key/value heads.
        num_tokens: least number of tokens that is divided.

    Raises:
        UserError: the processes, branches, heads or tokens can't be divided so.
    """
    branch = rule.branch
    if branch is None and rule.sequence is not None:
        branch = max(num_processes // rule.sequence, 1)
    if branch is None:
        branch = max(b for b in range(1, num_branches + 1) if num_processes % b == 0)
    layout = Layout(branch, rule.sequence or max(num_processes // branch, 1))
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
        fitting = [str(n) for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise UserError(
            f"parallel.sequence={layout.sequence} does not divide the {num_heads} key/value heads "
            f"of the model: use {', '.join(fitting)}, times parallel.branch as many processes"
        )
    if num_tokens < layout.sequence:
        raise UserError(
            f"parallel.sequence={layout.sequence} is above the {num_tokens} tokens that are "
            "divided: use fewer processes, or a larger video"
        )
    return layout


def layout_lines(layout: Layout, *, num_branches: int, kv_bytes: int) -> list[str]:
    """Say how a run is divided, in a line of its description; [] if it is not.

    Args:
        kv_bytes: the KV caches of all branches.
    """
    if layout.size == 1:
        return []
    held = -(-num_branches // layout.branch)
    own = kv_bytes * held / num_branches / layout.sequence
    return [
        f"processes    {layout.size}: {layout.branch} branch groups x {layout.sequence} sequence "
        f"ranks; KV cache {own / 1e9:.3g} GB in each"
    ]


# What processes tell each other -------------------------------------------------------------------


@contextmanager
def _contact() -> Generator[None, None, None]:
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
            with _contact():
                dist.all_reduce(x, group=self.handle)
        return x

    def copied(self, x: Tensor, *, source: int) -> Tensor:
        """Return what a process has; the others give a tensor of its shape to be overwritten."""
        if self.size > 1:
            assert self.handle is not None, "a group of several has a handle"
            with _contact():
                dist.broadcast(x, dist.get_global_rank(self.handle, source), group=self.handle)
        return x

    def swapped(self, pieces: Sequence[Tensor], *, sizes: Sequence[int]) -> list[Tensor]:
        """Give each process its piece; return what each one gave, flat, `sizes` values each."""
        given = torch.cat([piece.flatten() for piece in pieces])
        received = given.new_empty(sum(sizes))
        with _contact():
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
        with _contact():
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

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.place.rank == 0

    def divided(self, layout: Layout, device: torch.device) -> "Ranks":
        """Return the same processes with groups for their device; all must ask for it alike."""
        if layout.size == 1:
            return self
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        numbers = torch.arange(layout.size).view(layout.branch, layout.sequence)

        def own(groups: list[list[int]]) -> Group:
            found = Group()
            for members in groups:
                if len(members) > 1:
                    handle = cast(
                        "dist.ProcessGroup",
                        dist.new_group(members, timeout=TIMEOUT, backend=backend),
                    )
                    if self.place.rank in members:
                        found = Group(members.index(self.place.rank), len(members), handle)
            return found

        with _contact():
            branches, sequence = own(numbers.T.tolist()), own(numbers.tolist())
        return replace(self, layout=layout, branches=branches, sequence=sequence)

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

    def from_first(self, make: Callable[[], Tensor]) -> Tensor:
        """Return what the first process makes, on the CPU in the others."""
        if self.place.size == 1:
            return make()
        values: list[Any] = [None]
        made = None
        if self.is_first:
            made = make()
            values = [made.cpu()]
        with _contact():
            dist.broadcast_object_list(values, src=0, group=self.patient.handle)
        return cast(Tensor, values[0]) if made is None else made

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


# Beginning and end --------------------------------------------------------------------------------


@contextmanager
def joined(place: Place, *, timeout: timedelta = TIMEOUT) -> Generator[Ranks, None, None]:
    """Meet the other processes.

    Raises:
        LostProcessError: one did not come in time.
    """
    if place.size == 1:
        yield Ranks()
        return
    with _contact():
        dist.init_process_group("gloo", timeout=timeout)
        every = dist.new_group(timeout=PATIENCE, backend="gloo")
    everyone = Group(place.rank, place.size, dist.group.WORLD)
    patient = Group(place.rank, place.size, cast("dist.ProcessGroup", every))
    yield Ranks(place, everyone=everyone, patient=patient)
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
