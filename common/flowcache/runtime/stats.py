"""What one run did: reuse decisions, FLOPs, seconds per stage, peak memory.

Recording appends plain numbers, and nothing waits for the device: on CUDA a stage is two events,
read when the run is over. With `records=True` FLOPs and seconds are kept for every pass, too, and
the tokens left in the KV caches, which stay tensors until they are read.
"""

import importlib.metadata
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flowcache.errors import memory_named
from flowcache.kv import KVCache, tokens_per_chunk
from flowcache.policies import Decision
from flowcache.schedule import Tick

if TYPE_CHECKING:
    from flowcache.runtime.parallel import Group

SCHEMA_VERSION = 1  # of the dictionary that `RunStats.to_dict` returns
REPORTED_PACKAGES = ("flowcache", "torch", "transformers", "diffusers", "numpy", "flash-attn")
GIT_TIMEOUT_SECONDS = 5
CPU_FILE = Path("/proc/cpuinfo")
MIN_GAP_SECONDS = 0.001
MIN_GAP_SHARE = 0.001
"""Of the timeline's length. A shorter gap between two uses of a stage is left out of it."""
PREFIXES = ("", "k", "M", "G", "T", "P", "E")
ROUNDED_TO_NEXT = 999.5
"""From here three digits show 1000 of a unit, which is 1 of the next."""


def scaled(value: float, unit: str, *, digits: int = 3) -> str:
    """Write a count with a decimal prefix: `scaled(1.13e17, "FLOP")` is `113 PFLOP`."""
    power = 0
    while abs(value) >= ROUNDED_TO_NEXT and power < len(PREFIXES) - 1:
        value /= 1000
        power += 1
    return f"{value:.{digits}g} {PREFIXES[power]}{unit}"


# Time ---------------------------------------------------------------------------------------------

Moment: TypeAlias = "float | torch.cuda.Event"
"""A point in time on the host's clock (seconds), or in the queue of a CUDA device."""


def now(device: torch.device) -> Moment:
    """Return the present moment: on CUDA, that at which the work queued so far is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed_seconds(start: Moment, end: Moment) -> float:
    """Return the time between two moments of the same kind; events must have happened."""
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000
    assert isinstance(end, float)
    return end - start


def host_clock(device: torch.device) -> Callable[[Moment], float]:
    """Return a function from a moment to seconds of the host's clock. Waits for the device.

    The queue of a CUDA device is empty then, so that one more event happens at a known time. If
    that is 50 s, an event 2000 ms before it was at 48 s.
    """
    _wait(device)
    reference = now(device)
    _wait(device)
    reference_seconds = time.perf_counter()

    def seconds(moment: Moment) -> float:
        if isinstance(moment, float):
            return moment
        return reference_seconds - elapsed_seconds(moment, reference)

    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Period(NamedTuple):
    """A stage at work without a break, in seconds since the start of the run."""

    stage: str
    start_seconds: float
    stop_seconds: float
    is_concurrent: bool
    """In a thread of its own, while other stages run."""

    def to_row(self) -> list[Any]:
        """Return plain values for JSON, with times to a microsecond."""
        start, stop = round(self.start_seconds, 6), round(self.stop_seconds, 6)
        return [self.stage, start, stop, self.is_concurrent]


def merged_periods(periods: Sequence[Period]) -> list[Period]:
    """Return periods in order of their starts, each merged with the one that it follows at once.

    The run's own thread is one row of periods, each concurrent stage another one. Neighbours in a
    row are merged if they are of one stage and the gap between them is below a millisecond or a
    thousandth of the timeline, which no chart would show. In seconds:

        text  0    to 1                      text  0 to 1
        dit   1    to 2                      dit   1 to 4
        dit   2    to 4              ->      vae   3 to 6, concurrent
        vae   3    to 6, concurrent          dit   5 to 6
        dit   5    to 6
    """
    if not periods:
        return []
    ordered = sorted(periods, key=lambda each: (each.start_seconds, each.stop_seconds))
    length = max(each.stop_seconds for each in ordered) - ordered[0].start_seconds
    gap = max(MIN_GAP_SECONDS, MIN_GAP_SHARE * length)
    merged: list[Period] = []
    last: dict[str | None, int] = {}  # of a concurrent stage by its name, of the others by None
    for each in ordered:
        row = each.stage if each.is_concurrent else None
        if (place := last.get(row)) is not None:
            before = merged[place]
            if before.stage == each.stage and each.start_seconds - before.stop_seconds < gap:
                stop = max(before.stop_seconds, each.stop_seconds)
                merged[place] = before._replace(stop_seconds=stop)
                continue
        last[row] = len(merged)
        merged.append(each)
    return merged


# Passes -------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """What happened to one chunk in one branch at one tick; see `RunStats.record`."""

    segment: int
    tick: int
    chunk: int
    step: int
    branch: str
    is_computed: bool
    distance: float | None
    accumulated: float | None


class PassId(NamedTuple):
    """One chunk in one guidance branch at one tick."""

    segment: int
    tick: int
    chunk: int
    branch: str


class TickId(NamedTuple):
    """One pass over the active chunks of a segment."""

    segment: int
    tick: int


class PassFlops(NamedTuple):
    """FLOPs of a pass that were done, and those that reuse saved."""

    spent: int
    saved: int


class KVTokens(NamedTuple):
    """Clean tokens in the caches of a branch after a tick."""

    segment: int
    tick: int
    branch: str
    tokens: dict[int, float]
    """Chunk -> its tokens, mean over layers and heads; chunks without any are left out."""


@dataclass(frozen=True)
class Traced:
    """What the processes of a run traced, or one of them; plain values."""

    flops: dict[PassId, PassFlops]
    pass_seconds: dict[PassId, float]
    """Of each pass that was computed."""
    tick_seconds: dict[TickId, float]
    kv_tokens: list[KVTokens]


def merged(parts: Sequence[Traced]) -> Traced:
    """Merge what the processes traced that divided the guidance branches of a run.

    All counted the FLOPs of a pass alike, or one did. Its seconds add up: a pass of the record may
    be several guidance passes, made one after the other in one process. A tick took as long as in
    the slowest process. Each branch's caches are in one process.

        pass        FLOPs of A, B    merged      seconds of A, B    merged
        "all"       6, 6             6           2, 1               3
        "cond"      4, -             4           2, -               2

    Args:
        parts: one of each branch group, in their order.
    """
    flops: dict[PassId, PassFlops] = {}
    pass_seconds: dict[PassId, float] = defaultdict(float)
    tick_seconds: dict[TickId, float] = defaultdict(float)
    kv_tokens: list[KVTokens] = []
    for part in parts:
        flops |= part.flops
        for each, seconds in part.pass_seconds.items():
            pass_seconds[each] += seconds
        for tick, seconds in part.tick_seconds.items():
            tick_seconds[tick] = max(tick_seconds[tick], seconds)
        kv_tokens += part.kv_tokens
    kv_tokens.sort(key=lambda row: (row.segment, row.tick))  # stable: the branches keep their order
    return Traced(flops, dict(pass_seconds), dict(tick_seconds), kv_tokens)


class Trace:
    """Collects FLOPs, times and clean tokens pass by pass; read when the run is over."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flops: dict[PassId, PassFlops] = {}
        self._passes: list[tuple[Sequence[PassId], Moment, Moment]] = []
        self._ticks: list[tuple[TickId, Moment, Moment]] = []
        self._kv: list[tuple[TickId, str, Tensor]] = []

    def add_flops(self, passes: Sequence[PassId], *, computed: int, without_reuse: int) -> None:
        """Add FLOPs to some passes, in equal parts; the first ones get what does not divide."""
        count, saved = len(passes), without_reuse - computed
        for place, each in enumerate(passes):  # 7 in three parts is 3, 2, 2
            old = self.flops.get(each, PassFlops(0, 0))
            self.flops[each] = PassFlops(
                old.spent + computed // count + (place < computed % count),
                old.saved + saved // count + (place < saved % count),
            )

    @contextmanager
    def timed_pass(self, passes: Sequence[PassId]) -> Generator[None, None, None]:
        """Add the time of the body to some passes, in equal parts."""
        start = now(self.device)
        yield
        self._passes.append((passes, start, now(self.device)))

    @contextmanager
    def timed_tick(self, tick: TickId) -> Generator[None, None, None]:
        """Keep the time of the body as that of a tick."""
        start = now(self.device)
        yield
        self._ticks.append((tick, start, now(self.device)))

    def keep_tokens(self, tick: TickId, branch: str, tokens_N: Tensor) -> None:
        """Keep the clean tokens of each chunk after a tick."""
        self._kv.append((tick, branch, tokens_N))

    def read(self) -> Traced:
        """Return all that was traced. Waits for the device."""
        _wait(self.device)
        pass_seconds: dict[PassId, float] = defaultdict(float)
        for passes, start, end in self._passes:
            for each in passes:
                pass_seconds[each] += elapsed_seconds(start, end) / len(passes)
        tick_seconds = {tick: elapsed_seconds(start, end) for tick, start, end in self._ticks}
        kv_tokens = [
            KVTokens(*tick, branch, {chunk: n for chunk, n in enumerate(tokens_N.tolist()) if n})
            for tick, branch, tokens_N in self._kv
        ]
        return Traced(self.flops, dict(pass_seconds), tick_seconds, kv_tokens)


# The run ------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """One use of a stage."""

    name: str
    parent: str | None
    start: Moment
    end: Moment
    is_concurrent: bool


@dataclass
class StageTime:
    """The time of all uses of a stage."""

    seconds: float
    num_uses: int
    parent: str | None  # the stage that this one's seconds are also part of
    overlapped_seconds: float = 0.0
    """The part of the seconds that ran in a thread of its own, concurrently with other stages."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; overlapped seconds only where there are some."""
        values = {"seconds": self.seconds, "num_uses": self.num_uses, "within": self.parent}
        if self.overlapped_seconds:
            values["overlapped_seconds"] = self.overlapped_seconds
        return values


class RunStats:
    """Collect what a run does. Made at the start of a run, dropped with it."""

    def __init__(self, device: torch.device, *, records: bool = False) -> None:
        """Start the clock, and on CUDA the count of the peak memory.

        Args:
            records: whether every pass is traced.
        """
        self.device = device
        self.trace = Trace(device) if records else None
        self.passes: list[Pass] = []
        self.num_computed = 0
        self.num_reused = 0
        self.computed_flops = 0
        self.flops_without_reuse = 0
        self.kv_bytes = 0
        """Of the KV caches of this process, when a chunk was last finished; 0: not known."""
        self._spans: list[_Span] = []
        self._open_stages: list[str] = []
        self._start_seconds = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.init()  # the count of a numbered device is refused before that
            torch.cuda.reset_peak_memory_stats(device)

    def record(
        self, tick: Tick, chunk: int, branch: str, decision: Decision, *, segment: int = 0
    ) -> None:
        """Add what a policy decided for one chunk in one guidance branch."""
        self.num_computed += decision.is_computed
        self.num_reused += not decision.is_computed
        distances = decision.distance, decision.accumulated
        step, is_computed = tick.steps[chunk], decision.is_computed
        row = Pass(segment, tick.index, chunk, step, branch, is_computed, *distances)
        self.passes.append(row)

    def add_flops(
        self, *, computed: int, without_reuse: int, passes: Sequence[PassId] = ()
    ) -> None:
        """Add the FLOPs of a pass, and what the pass would cost if every chunk were computed.

        Args:
            passes: the chunks' passes that the trace adds them to, in equal parts.
        """
        self.computed_flops += computed
        self.flops_without_reuse += without_reuse
        if self.trace is not None:
            self.trace.add_flops(passes, computed=computed, without_reuse=without_reuse)

    def timed_pass(self, passes: Sequence[PassId]) -> AbstractContextManager[None]:
        """Return a context whose time the trace adds to some passes, in equal parts."""
        return nullcontext() if self.trace is None else self.trace.timed_pass(passes)

    def timed_tick(self, segment: int, tick: int) -> AbstractContextManager[None]:
        """Return a context whose time the trace keeps as that of a tick."""
        if self.trace is None:
            return nullcontext()
        return self.trace.timed_tick(TickId(segment, tick))

    def keep_tokens(
        self, segment: int, tick: int, caches: Mapping[str, Sequence[KVCache]], *, sequence: "Group"
    ) -> None:
        """Trace the clean tokens of each chunk in each branch after a tick.

        Args:
            caches: of the branches of this process, by layer.
            sequence: processes over whose heads the mean is taken.
        """
        if self.trace is None:
            return
        for branch, own in caches.items():
            tokens_N = sequence.all_reduce(tokens_per_chunk(own)) / sequence.size
            self.trace.keep_tokens(TickId(segment, tick), branch, tokens_N)

    def traced(self) -> Traced:
        """Return what this process traced. Waits for the device."""
        assert self.trace is not None, "a record needs RunStats(records=True)"
        return self.trace.read()

    @contextmanager
    def stage(
        self, name: str, *, is_on_host: bool = False, is_concurrent: bool = False
    ) -> Generator[None, None, None]:
        """Add the time of the body to a stage.

        Args:
            name: the stage; a stage inside another one counts in both.
            is_on_host: the body leaves nothing for the device to do (writing a file, loading), so
                that the host's clock is the right one.
            is_concurrent: the body runs in a thread of its own, while other stages go on. It is
                part of none, and their time grows only where they wait for the same device.
        """
        clock = torch.device("cpu") if is_on_host else self.device
        parent = self._open_stages[-1] if self._open_stages and not is_concurrent else None
        if not is_concurrent:
            self._open_stages.append(name)
        start = now(clock)
        try:
            with memory_named(name):
                yield
        finally:
            self._spans.append(_Span(name, parent, start, now(clock), is_concurrent))
            if not is_concurrent:
                self._open_stages.pop()

    def stage_times(self) -> dict[str, StageTime]:
        """Return the time of every stage, in the order of their first end. Waits for the device."""
        _wait(self.device)
        times: dict[str, StageTime] = {}
        for span in self._spans:
            elapsed = elapsed_seconds(span.start, span.end)
            stage = times.setdefault(span.name, StageTime(0.0, 0, span.parent))
            stage.seconds += elapsed
            stage.num_uses += 1
            if span.is_concurrent:
                stage.overlapped_seconds += elapsed
        return times

    def timeline(self) -> list[Period]:
        """Return when each stage was at work, in order of the starts. Waits for the device.

        Stages inside another one are left out, uses of a stage that follow each other at once are
        merged. On CUDA a stage starts when the device begins with its work, which is later than it
        was queued.
        """
        seconds = host_clock(self.device)
        origin = self._start_seconds
        return merged_periods(
            [
                Period(name, seconds(start) - origin, seconds(end) - origin, is_concurrent)
                for name, parent, start, end, is_concurrent in self._spans
                if parent is None
            ]
        )

    def elapsed_seconds(self) -> float:
        """Return the time since this was made, by the host's clock."""
        return time.perf_counter() - self._start_seconds

    def peak_memory_bytes(self) -> int:
        """Return the most memory in use: tensors of this run on CUDA, else the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # ru_maxrss: bytes / KiB

    def peak_reserved_bytes(self) -> int | None:
        """Return the most memory that PyTorch took from the GPU, gaps included; None without."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_reserved(self.device)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; a number that is not finite is None."""
        per_branch: dict[str, dict[str, int]] = {}
        for row in self.passes:
            counts = per_branch.setdefault(row.branch, {"computed": 0, "reused": 0})
            counts["computed" if row.is_computed else "reused"] += 1
        return {
            "schema_version": SCHEMA_VERSION,
            "total_seconds": self.elapsed_seconds(),
            "stages": {name: stage.to_dict() for name, stage in self.stage_times().items()},
            "timeline": [period.to_row() for period in self.timeline()],
            "passes": {
                "computed": self.num_computed,
                "reused": self.num_reused,
                "computed_share": _ratio(self.num_computed, self.num_computed + self.num_reused),
                "per_branch": per_branch,
            },
            "flops": {
                "computed": self.computed_flops,
                "without_reuse": self.flops_without_reuse,
                "saving_factor": _ratio(self.flops_without_reuse, self.computed_flops),
            },
            "peak_memory": {
                "bytes": self.peak_memory_bytes(),
                "reserved_bytes": self.peak_reserved_bytes(),
                "of": "CUDA tensors" if self.device.type == "cuda" else "process",
            },
            "decisions": {
                "columns": list(Pass._fields),
                "rows": [[_finite(value) for value in row] for row in self.passes],
            },
        }

    def summary(self) -> str:
        """Return a few lines for people: passes and FLOPs, seconds per stage, peak memory."""
        lines: list[str] = []
        if num_passes := self.num_computed + self.num_reused:
            share = 100 * self.num_computed / num_passes
            lines.append(
                f"chunk passes  {self.num_computed} of {num_passes} computed ({share:.1f} %)"
            )
        if self.computed_flops:
            factor = self.flops_without_reuse / self.computed_flops
            without = f"without reuse ({scaled(self.flops_without_reuse, 'FLOP')})"
            fewer = f", {factor:.2f}x fewer than {without}" if factor > 1 else ""
            lines.append(f"FLOPs         {scaled(self.computed_flops, 'FLOP')}{fewer}")
        lines.append(f"time          {self._time_line()}")
        reserved = self.peak_reserved_bytes()
        owner = "the whole process"
        if reserved is not None:
            owner = f"tensors on the GPU; {scaled(reserved, 'B')} reserved for them"
        lines.append(f"peak memory   {scaled(self.peak_memory_bytes(), 'B')} ({owner})")
        return "\n".join(lines)

    def _time_line(self) -> str:
        times = self.stage_times()
        parts: list[str] = []
        for name, stage in times.items():
            if stage.parent is not None:
                continue
            part = f"{name} {stage.seconds:.1f} s"
            inside = [f"{n} {t.seconds:.1f} s" for n, t in times.items() if t.parent == name]
            if inside:
                part += f" (with {', '.join(inside)})"
            if stage.overlapped_seconds:
                part += f" ({stage.overlapped_seconds:.1f} s of it beside the others)"
            parts.append(part)
        total = self.elapsed_seconds()
        return f"{total:.1f} s" + (f": {', '.join(parts)}" if parts else "")


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, device and commit as plain values; nothing that names the machine."""
    versions: dict[str, str | None] = {}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # names the build, too: 2.13.0+cpu
    is_cuda = device.type == "cuda"
    return {
        "commit": _commit(Path(__file__)),
        "python": platform.python_version(),
        "packages": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "cpu": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "cuda": torch.version.cuda if is_cuda else None,
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    """Return the processor's model as the system names it; its architecture where it does not."""
    try:
        lines = CPU_FILE.read_text(encoding="utf-8").splitlines()
    except OSError:  # only Linux has the file
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit(file: Path) -> str | None:
    """Return the commit of the repository that holds a file, with `+` if something changed."""
    folder = file.resolve().parent

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=GIT_TIMEOUT_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    # An installed copy may lie inside some other repository, whose commit would mean nothing.
    if git("ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    is_changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    return None if commit is None else commit + ("+" if is_changed else "")


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
