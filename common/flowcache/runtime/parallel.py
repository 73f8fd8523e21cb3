"""The processes of one run: how they are divided, what they exchange, how they start and end.

Guidance branches are divided first, then the tokens of each branch. With 4 processes, 2 branch
groups and 2 sequence ranks:

    process  branch group  sequence rank     exchanges velocities with     tokens and heads with
    0        0 (cond)      0                 2                             1
    1        0 (cond)      1                 3                             0
    2        1 (uncond)    0                 0                             3
    3        1 (uncond)    1                 1                             2

Every process holds all weights and goes through the same ticks. Noise, solver and latents are
computed by each alike; reuse is decided by one. The decoding of finished chunks is divided over
all of them: the processes above have the shares 0 to 3.

Axes: B batch, S tokens of a chunk, H query heads, G key/value heads, C head width, F frames of a
chunk, T tokens of a frame, P processes.
"""

import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Collection, Generator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from einops import rearrange, repeat
from torch import Tensor

from flowcache.errors import UserError, first_line
from flowcache.kv import Attend
from flowcache.policies import Decision, ReusePolicy
from flowcache.runtime.cli import run_command
from flowcache.runtime.config import ParallelRule
from flowcache.runtime.ending import EXIT_LOST, LAUNCHER, Place
from flowcache.schedule import Tick

T = TypeVar("T")

TIMEOUT = timedelta(seconds=60)
"""How long a process waits for the others before it gives up."""
PATIENCE = timedelta(minutes=30)
"""The same where they read models from the disk, each at its own speed."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class LostProcessError(Exception):
    """Another process of the run ended, hangs, or never came."""


class ReportedElsewhereError(Exception):
    """The run ends for a reason that the first process reports."""


# Layout -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Into how many parts the branches are divided, and into how many the tokens of each."""

    branch: int = 1
    sequence: int = 1

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.branch * self.sequence


def process_layout(
    rule: ParallelRule, num_processes: int, *, num_branches: int, num_heads: int, num_tokens: int
) -> Layout:
    """Divide the processes of a run: as many branch groups as possible, the rest by tokens."""
    if num_processes == 1 and (rule.branch or 1, rule.sequence or 1) == (1, 1):
        return Layout()
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
    """Say what to do where a layout does not divide the heads."""

    def either(numbers: Sequence[int]) -> str:
        *others, last = map(str, numbers)
        return f"{', '.join(others)} or {last}" if others else last

    if rule.sequence is not None:
        fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        return f"use parallel.sequence={either(fitting)}"
    fewer = {n: _chosen(rule, n, num_branches=num_branches) for n in range(1, layout.size)}
    fitting = [n for n, each in fewer.items() if each.size == n and num_heads % each.sequence == 0]
    noun, numbers = "process" if fitting == [1] else "processes", either(fitting)
    return f"start {numbers} {noun} instead of {layout.size} (a launcher: GPUS={numbers})"


def branches_per_process(layout: Layout, *, num_branches: int) -> int:
    """Return how many branches a process computes at most."""
    return -(-num_branches // layout.branch)


def bytes_per_process(num_bytes: int, layout: Layout, *, num_branches: int) -> int:
    """Return how much of what all branches hold per head, `num_bytes`, a process has at most."""
    held = branches_per_process(layout, num_branches=num_branches)
    return num_bytes * held // (num_branches * layout.sequence)


# Exchange -----------------------------------------------------------------------------------------


@contextmanager
def contact() -> Generator[None, None, None]:
    """Turn an error of torch.distributed into `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:  # all errors of torch.distributed are one
        raise LostProcessError(
            "lost contact with another process, which ended or hangs "
            f"({first_line(error)}): what it said stands above, else look at its memory and start "
            "again"
        ) from error


@dataclass(frozen=True)
class Group:
    """Processes that exchange tensors. In a group of one nothing is exchanged."""

    rank: int = 0
    size: int = 1
    handle: "dist.ProcessGroup | None" = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over all processes; `x` may be overwritten."""
        if self.size > 1:
            with contact():
                dist.all_reduce(x, group=self.handle)
        return x

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Return what a process has; the others give a tensor of its shape to be overwritten."""
        if self.size > 1:
            assert self.handle is not None, "a group of several has a handle"
            with contact():
                dist.broadcast(x, dist.get_global_rank(self.handle, source), group=self.handle)
        return x

    def all_to_all(self, x: Tensor, *, given: Sequence[int], received: Sequence[int]) -> Tensor:
        """Give each process its rows of a tensor; return the rows that each one gave.

        Args:
            x: `[sum(given), ...]`.
        """
        y = x.new_empty(sum(received), *x.shape[1:])
        with contact():
            dist.all_to_all_single(y, x.contiguous(), [*received], [*given], group=self.handle)
        return y

    def all_gather(self, value: T) -> list[T]:
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
    world: Group = field(default_factory=Group)
    """All, for values on the host."""
    slow: Group = field(default_factory=Group)
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
        """Return the same with the groups of the layout; all processes must ask for it alike."""
        layout = self.layout
        if layout.size == 1:
            return self
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # 2: an exchange that takes too long is aborted and the next call raises. The default
            # ends the process at once, so that nobody could say why.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        ranks = torch.arange(layout.size).view(layout.branch, layout.sequence)
        with contact():
            branches, sequence = (
                self._group_among(rows, backend="nccl" if device.type == "cuda" else "gloo")
                for rows in (ranks.T.tolist(), ranks.tolist())
            )
        return replace(self, branches=branches, sequence=sequence)

    def _group_among(self, groups: list[list[int]], *, backend: str) -> Group:
        """Make groups of processes; return that of this one."""
        size = len(groups[0])
        if size == 1:
            return Group()
        # a DeviceMesh would make them as well, but without this timeout
        handle, _ = dist.new_subgroups_by_enumeration(groups, timeout=self.timeout, backend=backend)
        group = cast("dist.ProcessGroup", handle)
        return Group(dist.get_rank(group), size, group)

    @property
    def num_shares(self) -> int:
        """Into how many shares work is divided that is not of a branch or a token."""
        return self.branches.size * self.sequence.size

    @property
    def share(self) -> int:
        """Which of these shares is this process's."""
        return self.branches.rank * self.sequence.size + self.sequence.rank

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over all shares; `x` may be overwritten.

        Where only one process has something else than zeros, the others get exactly that.
        """
        if self.num_shares == 1:
            return x
        return self.branches.all_reduce(self.sequence.all_reduce(x.contiguous()))

    def computes(self, branch: int) -> bool:
        """Tell whether this process computes the branch of that number."""
        return branch % self.branches.size == self.branches.rank

    def rank_of(self, branches: Sequence[str], name: str) -> int:
        """Return which process of the group `branches` computes a branch."""
        return branches.index(name) % self.branches.size

    def local_branches(self, branches: Sequence[str]) -> list[str]:
        """Return the names of the branches that this process computes."""
        return [name for number, name in enumerate(branches) if self.computes(number)]

    def gather_branches(
        self, local: Mapping[str, Tensor], *, names: Sequence[str], like: Tensor
    ) -> dict[str, Tensor]:
        """Return a tensor of each branch.

        Args:
            local: the tensors of the branches that this process computes, those among `names`.
        """
        if self.branches.size == 1 or not names:
            return dict(local)
        every = like.new_zeros(len(names), *like.shape)
        for name, x in local.items():
            every[names.index(name)] = x
        return dict(zip(names, self.branches.all_reduce(every), strict=True))

    def decided_by(self, policy: ReusePolicy, *, branch: int) -> ReusePolicy:
        """Return a policy whose decisions are those of the first process with that branch."""
        if self.place.size == 1:
            return policy
        leader = branch % self.layout.branch * self.layout.sequence
        return SharedPolicy(policy, self.world, leader)

    def together(self, check: Callable[[], T]) -> T:
        """Make a check in every process; if one fails, all end and the first one reports why."""
        if self.place.size == 1:
            return check()
        result: list[T] = []
        refusal: str | None = None
        try:
            result.append(check())
        except UserError as error:
            refusal = str(error)
        refusals = [text for text in self.slow.all_gather(refusal) if text is not None]
        if not refusals:
            return result[0]
        raise UserError(refusals[0]) if self.is_first else ReportedElsewhereError(refusals[0])

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes: plain values, or tensors on the CPU."""
        if self.place.size == 1:
            return make()
        values: list[T | UserError | None] = [None]
        if self.is_first:
            try:
                values = [make()]
            except UserError as error:
                values = [UserError(str(error))]
        with contact():
            dist.broadcast_object_list(values, src=0, group=self.slow.handle)
        if isinstance(values[0], UserError):
            raise values[0] if self.is_first else ReportedElsewhereError(str(values[0]))
        return cast(T, values[0])

    @contextmanager
    def in_step(self) -> Generator[Callable[[], None], None, None]:
        """Go through steps of equal number in all processes; one that raises ends it for all.

        Yields what every process calls at the end of a step: it raises `ReportedElsewhereError`
        where another process has raised something in that step.
        """

        def end_step(*, has_failed: bool = False) -> None:
            num_failed = int(self.world.all_reduce(torch.tensor(int(has_failed))))
            if num_failed and not has_failed:
                raise ReportedElsewhereError("another process has left")

        try:
            yield end_step
        except (ReportedElsewhereError, LostProcessError):
            raise
        except BaseException:
            with suppress(LostProcessError):  # the reason counts for more
                end_step(has_failed=True)
            raise

    def confirm(self) -> None:
        """Check that all exchanges on the device came about: one after a failure raises."""
        for group in (self.branches, self.sequence):
            if group.size > 1:
                with contact():
                    dist.barrier(group=group.handle)

    def wait(self) -> None:
        """Wait until all processes are here, however long they read from the disk."""
        self.slow.all_gather(None)


@dataclass
class SharedPolicy(ReusePolicy):
    """One process decides for all, so that rounding can't drive them apart."""

    policy: ReusePolicy
    world: Group
    leader: int

    def __post_init__(self) -> None:
        self.needs_signals = self.policy.needs_signals
        self.needs_forecasts = self.policy.needs_forecasts

    def plan(
        self, tick: Tick, signals: Mapping[int, Tensor], *, stored: Collection[int]
    ) -> dict[int, Decision]:
        """Decide as the leader does; see `ReusePolicy.plan`. Others' signals are not looked at."""
        table = torch.zeros(len(tick.steps), 3, dtype=torch.float64)
        if self.world.rank == self.leader:
            plan = self.policy.plan(tick, signals, stored=stored)
            made = [plan[chunk] for chunk in tick.steps]
            rows = [(each.is_computed, each.distance, each.accumulated) for each in made]
            absent = [[math.nan if value is None else value for value in row] for row in rows]
            table = torch.tensor(absent, dtype=torch.float64)
        decisions: dict[int, Decision] = {}
        rows = self.world.broadcast(table, source=self.leader).tolist()
        for chunk, (computed, *values) in zip(tick.steps, rows, strict=True):
            known = [None if math.isnan(value) else value for value in values]
            decisions[chunk] = Decision(bool(computed), *known)
        return decisions

    def computed_anyway(self, chunks: Collection[int]) -> None:
        self.policy.computed_anyway(chunks)


@dataclass(frozen=True)
class TokenSplit:
    """Divides the tokens of a chunk among processes, and the heads inside attention.

    Outside attention each process has a share of the tokens of every frame and all heads. Inside it
    has all tokens and a share of the heads: keys and values are cached, compressed and attended to
    per head, so nothing else has to be exchanged. The order of the tokens is that of one process.

    Example: 2 frames of 3 tokens, a b c | d e f, and 2 processes: the first has a b d e, the second
    c f. Inside attention the first has a b c d e f of the first half of the heads.

    Source: DeepSpeed-Ulysses, arXiv 2309.14509.

    Attributes:
        num_frames: parts of the chunk that are divided one by one.
        frame_tokens: tokens of such a part; they need not divide evenly.
    """

    group: Group
    num_frames: int
    frame_tokens: int

    @property
    def sizes(self) -> list[int]:
        """Tokens of a frame in each process."""
        size, rest = divmod(self.frame_tokens, self.group.size)
        return [size + (rank < rest) for rank in range(self.group.size)]

    def scatter(self, x: Tensor, *, axis: int) -> Tensor:
        """Return this process's share of all tokens, which are on an axis."""
        if self.group.size == 1:
            return x
        frames = x.unflatten(axis, (self.num_frames, self.frame_tokens))
        share = frames.split(self.sizes, dim=axis + 1)[self.group.rank]
        return share.flatten(axis, axis + 1)

    def gather(self, x_BS: Tensor) -> Tensor:
        """Return all tokens from this process's share, `[B, local tokens, ...]`."""
        if self.group.size == 1:
            return x_BS
        x = repeat(x_BS, "b (f t) ... -> (p t) f b ...", p=self.group.size, f=self.num_frames)
        return self._gather(x)

    def over_heads(self, attend: Attend) -> Attend:
        """Return an attention of this process's tokens that calls `attend` with all tokens."""
        if self.group.size == 1:
            return attend

        def exchanged(layer: int, q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor) -> Tensor:
            sizes = {"p": self.group.size, "f": self.num_frames}
            parts = [
                rearrange(x, "b (f t) (p h) c -> (p t) f b h c", **sizes)
                for x in (q_BSHC, k_BSGC, v_BSGC)
            ]
            qkv = self._gather(torch.cat(parts, dim=3))
            q, k, v = qkv.split([part.shape[3] for part in parts], dim=2)
            return self._scatter(attend(layer, q, k, v))

        return exchanged

    # what is exchanged has its tokens first, since processes have different numbers of them

    def _gather(self, x: Tensor) -> Tensor:
        """Give each process its part of `[P T, F, B, ...]`; return all tokens of one's own part."""
        given = [self.sizes[self.group.rank]] * self.group.size
        y = self.group.all_to_all(x, given=given, received=self.sizes)
        return rearrange(y, "t f b ... -> b (f t) ...")

    def _scatter(self, x_BSHC: Tensor) -> Tensor:
        """Give each process its tokens of the local heads; return local tokens of all heads."""
        x = rearrange(x_BSHC, "b (f t) h c -> t f b h c", f=self.num_frames)
        received = [self.sizes[self.group.rank]] * self.group.size
        y = self.group.all_to_all(x, given=self.sizes, received=received)
        return rearrange(y, "(p t) f b h c -> b (f t) (p h) c", p=self.group.size)


# Beginning and end --------------------------------------------------------------------------------


@contextmanager
def process_group(
    place: Place, *, timeout: timedelta = TIMEOUT, listener: int | None = None
) -> Generator[Ranks, None, None]:
    """Meet the other processes.

    Args:
        timeout: how long to wait for them, now and whenever something is exchanged.
        listener: of the first process: the descriptor of a socket that listens at the place to
            meet; None: as the launcher says, else one is made.
    """
    if place.size == 1:
        yield Ranks()
        return
    with contact():
        store = _store(place, os.environ, timeout=timeout, listener=listener)
        dist.init_process_group(
            "gloo", store=store, rank=place.rank, world_size=place.size, timeout=timeout
        )
        patient = cast("dist.ProcessGroup", dist.new_group(timeout=PATIENCE, backend="gloo"))
    world = Group(place.rank, place.size, dist.group.WORLD)
    slow = Group(place.rank, place.size, patient)
    yield Ranks(place, world=world, slow=slow, timeout=timeout)
    dist.destroy_process_group()  # not after an error: it would wait for those that are lost


def _store(
    place: Place,
    variables: MutableMapping[str, str],
    *,
    timeout: timedelta,
    listener: int | None = None,
) -> dist.TCPStore | None:
    """Return where the processes meet; None: where torchrun listens, as the environment says.

    On one machine all of them talk through the loopback interface; left to themselves PyTorch's
    store, gloo and NCCL listen on every one.
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
    if place.rank == 0 and listener is None:
        is_given = LAUNCHER in variables
        listener = int(variables[LAUNCHER].split(",")[2]) if is_given else _listen(host, int(port))
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


def run_in_ranks(command: Callable[[Ranks], None], *, timeout: timedelta = TIMEOUT) -> int:
    """Run a command in each process that torchrun started; return the exit code.

    The first process speaks for all.

    Args:
        timeout: how long one of them waits for the others.
    """
    codes: list[int] = []
    code = run_command(lambda: codes.append(_join_and_run(command, Place.of(os.environ), timeout)))
    code = code or codes[0]
    if dist.is_initialized():  # it ended early, with a code or because another process says why
        sys.stdout.flush()
        sys.stderr.flush()
        # an ordinary end would wait for lost processes, or abort in the threads that talk to them
        os._exit(code)
    return code


def _join_and_run(command: Callable[[Ranks], None], place: Place, timeout: timedelta) -> int:
    if place.size == 1:
        command(Ranks())
        return 0
    if place.rank:
        logging.disable(logging.WARNING)
    try:
        with process_group(place, timeout=timeout) as ranks:
            command(ranks)
    except ReportedElsewhereError:
        return 0
    except LostProcessError as error:
        if place.rank == 0 and LAUNCHER not in os.environ:  # else the launcher says it
            sys.stderr.write(f"error: {error}\n")
        return EXIT_LOST
    return 0
