"""What one run did: reuse decisions, FLOPs, seconds per stage, peak memory.

    stats = RunStats(device)
    with stats.stage("dit"):
        ...
        with stats.stage("kv_compression"):      # inside: part of the seconds of "dit"
            ...
    stats.record(segment=0, tick=0, chunk=1, step=0, branch="cond", decision=decision)
    stats.add_flops(computed=2 * 10**12, without_reuse=6 * 10**12)
    print(stats.summary())

Recording appends plain numbers: no tensor is kept and nothing waits for the device. On CUDA a stage
is two events, read when the run is over. With `records=True` every pass is traced as well, see
`flowcache.runtime.trace`.
"""

import importlib.metadata
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowcache.errors import memory_named
from flowcache.policies import Decision
from flowcache.runtime.timeline import Period, merged_periods
from flowcache.runtime.trace import (
    Moment,
    PassId,
    TickId,
    Trace,
    Traced,
    elapsed_seconds,
    host_clock,
    now,
)
from flowcache.runtime.units import scaled

SCHEMA_VERSION = 1  # of the dictionary that `RunStats.to_dict` returns
REPORTED_PACKAGES = ("flowcache", "torch", "transformers", "diffusers", "numpy", "flash-attn")
GIT_TIMEOUT_SECONDS = 5


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


class _Span(NamedTuple):
    """One use of a stage, with its ends as seconds or as CUDA events."""

    name: str
    parent: str | None
    start: Moment
    end: Moment
    is_beside: bool


@dataclass(frozen=True)
class StageTime:
    """The time of all uses of a stage."""

    seconds: float
    num_uses: int
    parent: str | None  # the stage that this one's seconds are also part of
    overlapped_seconds: float = 0.0
    """The part of the seconds that ran beside other stages, in a thread of its own."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; overlapped seconds only where there are some."""
        told = {"seconds": self.seconds, "num_uses": self.num_uses, "within": self.parent}
        if self.overlapped_seconds:
            return told | {"overlapped_seconds": self.overlapped_seconds}
        return told


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
        self._spans: list[_Span] = []
        self._open_stages: list[str] = []
        self._start_seconds = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.init()  # the count of a numbered device is refused before that
            torch.cuda.reset_peak_memory_stats(device)

    def record(
        self, *, segment: int, tick: int, chunk: int, step: int, branch: str, decision: Decision
    ) -> None:
        """Add what a policy decided for one chunk in one guidance branch.

        Args:
            segment: the window of a long video, from 0.
            tick: the pass over the active chunks, from 0.
            chunk: the chunk, from 0.
            step: the chunk's own denoising step, from 0.
            branch: the guidance pass.
            decision: computed or reused, and the distances that led to it.
        """
        if decision.is_computed:
            self.num_computed += 1
        else:
            self.num_reused += 1
        self.passes.append(
            Pass(
                segment,
                tick,
                chunk,
                step,
                branch,
                decision.is_computed,
                decision.distance,
                decision.accumulated,
            )
        )

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
        self, segment: int, tick: int, *, branch: str, tokens: Callable[[], Tensor]
    ) -> None:
        """Trace the clean tokens of each chunk in a branch after a tick; see `tokens_per_chunk`."""
        if self.trace is not None:
            self.trace.keep_tokens(TickId(segment, tick), branch, tokens())

    def traced(self) -> Traced:
        """Return what this process traced. Waits for the device."""
        assert self.trace is not None, "a record needs RunStats(records=True)"
        return self.trace.read()

    @contextmanager
    def stage(
        self, name: str, *, is_on_host: bool = False, is_beside: bool = False
    ) -> Generator[None, None, None]:
        """Add the time of the body to a stage.

        Args:
            name: the stage; a stage inside another one counts in both.
            is_on_host: the body leaves nothing for the device to do (writing a file, loading), so
                that the host's clock is the right one.
            is_beside: the body runs in a thread of its own, beside the other stages, whose time it
                does not lengthen unless they wait for the same device.
        """
        clock = torch.device("cpu") if is_on_host else self.device
        if is_beside:
            start = now(clock)
            try:
                with memory_named(name):
                    yield
            finally:
                self._spans.append(_Span(name, None, start, now(clock), is_beside=True))
            return
        parent = self._open_stages[-1] if self._open_stages else None
        self._open_stages.append(name)
        start = now(clock)
        try:
            with memory_named(name):
                yield
        finally:
            self._spans.append(_Span(name, parent, start, now(clock), is_beside=False))
            self._open_stages.pop()

    def stage_times(self) -> dict[str, StageTime]:
        """Return the time of every stage, in the order of their first end. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        beside: dict[str, float] = {}
        num_uses: Counter[str] = Counter()
        parents: dict[str, str | None] = {}
        for span in self._spans:
            elapsed = elapsed_seconds(span.start, span.end)
            seconds[span.name] = seconds.get(span.name, 0.0) + elapsed
            num_uses[span.name] += 1
            if span.is_beside:
                beside[span.name] = beside.get(span.name, 0.0) + elapsed
            parents.setdefault(span.name, span.parent)
        return {
            name: StageTime(seconds[name], num_uses[name], parent, beside.get(name, 0.0))
            for name, parent in parents.items()
        }

    def timeline(self) -> list[Period]:
        """Return when each stage was at work, in order of the starts. Waits for the device.

        Stages inside another one are left out, and uses of a stage that follow each other at once
        are told as one; see `merged_periods`. On CUDA a stage starts when the device begins with
        its work, which is later than it was queued.
        """
        seconds = host_clock(self.device)
        return merged_periods(
            [
                Period(
                    span.name,
                    seconds(span.start) - self._start_seconds,
                    seconds(span.end) - self._start_seconds,
                    span.is_beside,
                )
                for span in self._spans
                if span.parent is None
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
        num_passes = self.num_computed + self.num_reused
        if num_passes:
            share = 100 * self.num_computed / num_passes
            lines.append(
                f"chunk passes  {self.num_computed} of {num_passes} computed ({share:.1f} %)"
            )
        if self.computed_flops:
            factor = self.flops_without_reuse / self.computed_flops
            lines.append(
                f"FLOPs         {scaled(self.computed_flops, 'FLOP')}, {factor:.2f}x fewer than "
                f"without reuse ({scaled(self.flops_without_reuse, 'FLOP')})"
            )
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
            inside = ", ".join(
                f"{child} {part.seconds:.1f} s"
                for child, part in times.items()
                if part.parent == name
            )
            beside = f" ({stage.overlapped_seconds:.1f} s of it beside the others)"
            parts.append(
                f"{name} {stage.seconds:.1f} s"
                + (f" (with {inside})" if inside else "")
                + (beside if stage.overlapped_seconds else "")
            )
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
        "cuda": torch.version.cuda if is_cuda else None,
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
    }


def _commit(file: Path) -> str | None:
    """Return the commit of the repository that holds a file, with `+` if something changed."""
    folder = file.resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=GIT_TIMEOUT_SECONDS,
                check=False,
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
