"""Runs one method and takes its figures: seconds, FLOPs, shares of the time, memory.

On CUDA all times but the end-to-end one are pairs of events; nothing waits in between.
"""

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from flowcache.gpu.benchmark import Benchmark, Models, Speed, compilation_of
from flowcache.gpu.traces import CACHING, policies_at
from flowcache.policies import Policies, ReusePolicy, Vanilla
from flowcache.predict import ResultStore
from flowcache.runtime.checks import Decoded
from flowcache.runtime.model import Job, Progress
from flowcache.runtime.overlap import Worker, should_overlap
from flowcache.runtime.record import Record
from flowcache.runtime.run import choose_attention
from flowcache.runtime.stats import PassId, RunStats, TickId, Trace, elapsed_seconds, now
from flowcache.runtime.video import to_uint8
from flowcache.schedule import Tick

MATRIX_SIDE = {"cuda": 8192, "cpu": 512}
WARM_UP_TICKS = 2
NUM_REPEATS = 20
"""Of a short operation that is timed apart."""
COMPRESSION = "kv_compression"
KINDS = (
    ("attention", re.compile(r"attention|attn|flash|fmha", re.IGNORECASE)),
    (
        "linears",
        re.compile(r"gemm|cutlass|cublas|nvjet|gemv|xmma|aten::(addmm|mm|bmm|baddbmm)$|mkldnn_lin"),
    ),
)
"""What a kernel's name says of it; the first that fits. Other kernels are "other"."""
NO_KERNEL = re.compile(r"^(Torch-Compiled|## |ProfilerStep|TorchDynamo)")
"""Names of ranges that hold kernels and must not be counted once more."""


class TimedStats(RunStats):
    """Statistics that also time each pass and tick; a record's extra work is left out."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.times = Trace(device)

    def timed_pass(self, passes: Sequence[PassId]) -> AbstractContextManager[None]:
        """Time some passes; see `RunStats.timed_pass`."""
        return self.times.timed_pass(passes)

    def timed_tick(self, segment: int, tick: int) -> AbstractContextManager[None]:
        """Time a tick; see `RunStats.timed_tick`."""
        return self.times.timed_tick(TickId(segment, tick))


@dataclass(frozen=True)
class Trial:
    """One method's run: as it is measured, and as it would be with all steps.

    A shortened run decodes apart from its ticks (`overlap=false`): seconds of passes that are
    scaled up must not hold those of a decoder at work at the same time.
    """

    job: Job
    whole: Job
    glance: Job
    """The same with the fewest steps, for a look at one tick."""
    thin: int
    """How many times fewer steps are measured."""
    speed: Speed | None
    """Decisions that are followed; None: every step is computed."""
    trace: Record | None = None
    """Recorded decisions instead of those made from the published curve."""

    def policies(self, benchmark: Benchmark, stats: RunStats) -> Policies:
        """Return what makes the policies."""
        if self.speed is None:
            return all_computed
        pattern = benchmark.pattern(self.job, self.speed)
        return policies_at(pattern, self.job.work, stats, self.trace)


def all_computed(*, segment: int, branch: str) -> ReusePolicy:  # noqa: ARG001
    """Return the policy of a run that reuses nothing."""
    return Vanilla()


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the mean time of a short piece of work, after three untimed ones."""
    for _ in range(3):
        work()
    wait(device)
    start = now(device)
    for _ in range(NUM_REPEATS):
        work()
    end = now(device)
    wait(device)
    return elapsed_seconds(start, end) / NUM_REPEATS


def matrix_rate(device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product: bfloat16 on CUDA, float32 on the CPU."""
    side = MATRIX_SIDE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, device)


def shares_of_kinds(benchmark: Benchmark, models: Models, job: Job) -> dict[str, float] | None:
    """Return how the time of a tick with a full window is divided among kinds of operations.

    Every chunk is computed. The ticks before it serve as warm-up. None where the profiler sees
    nothing of the device, as without the right to.
    """
    device, is_cuda = job.device, job.device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    shown = benchmark.generate(models, job, RunStats(device), all_computed)
    for _ in range(looked_at(job.work.segments[0].ticks)):
        next(shown)
    wait(device)
    with profile(activities=[activity], acc_events=True) as profiler:
        next(shown)
        wait(device)
    seconds = dict.fromkeys([*(name for name, _ in KINDS), "other"], 0.0)
    wanted = DeviceType.CUDA if is_cuda else DeviceType.CPU
    for event in profiler.key_averages():
        if event.device_type != wanted or NO_KERNEL.search(event.key):
            continue
        own = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        seconds[kind_of(event.key)] += own
    total = sum(seconds.values())
    return {name: part / total for name, part in seconds.items()} if total else None


def looked_at(ticks: Sequence[Tick]) -> int:
    """Return which tick is profiled: one with a full window and no chunk decoded concurrently.

    The second of those before a chunk becomes clean, or the only one.
    """
    most = max(len(tick.steps) for tick in ticks)
    first_clean = next((i for i, tick in enumerate(ticks) if tick.finishing), len(ticks))
    full = [i for i, tick in enumerate(ticks) if len(tick.steps) == most]
    alone = [i for i in full if i < first_clean] or full
    return alone[min(1, len(alone) - 1)]


def kind_of(kernel: str) -> str:
    """Return the kind of an operation by the name of its kernel."""
    return next((name for name, pattern in KINDS if pattern.search(kernel)), "other")


def store_seconds(benchmark: Benchmark, job: Job) -> tuple[float, float]:
    """Return the time of storing a result of one chunk and branch, and of using it again."""
    (shape, dtype), device = benchmark.stored(job), job.device
    store, sigma = ResultStore(), torch.ones(shape[0], device=device)
    before, after = torch.randn((2, *shape), device=device).to(dtype)
    put = seconds_of(lambda: store.put(0, after - before, sigma=sigma), device)
    return put, seconds_of(lambda: before + store.predict(0, sigma=sigma), device)


@torch.no_grad()
def measure(
    benchmark: Benchmark,
    models: Models,
    trial: Trial,
    *,
    is_profiled: bool = True,
) -> dict[str, Any]:
    """Run a method and return its figures as plain values.

    Args:
        is_profiled: whether a tick is looked into first; else two ticks serve as warm-up."""
    job, device = trial.job, trial.job.device
    rate, (kernel, cross_kernel) = matrix_rate(device), choose_attention(models.dit, job)
    start = time.perf_counter()
    kinds = None
    if is_profiled:
        kinds = shares_of_kinds(benchmark, models, trial.glance)
    else:
        shown = benchmark.generate(models, trial.glance, RunStats(device), all_computed)
        for _ in range(WARM_UP_TICKS):
            next(shown)
    warm_up = time.perf_counter() - start
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    wait(device)
    stats = TimedStats(device)
    policies = trial.policies(benchmark, stats)
    is_concurrent = should_overlap(job.config.overlap, device, takes_turns=job.config.offload)
    start = time.perf_counter()
    shown = benchmark.generate(models, job, stats, policies)
    num_frames = take_frames(shown, device=device, is_concurrent=is_concurrent)
    wait(device)
    total = time.perf_counter() - start
    compilation = compilation_of(models)
    return {
        **_figures(benchmark, trial, stats, total=total),
        "matrix_rate": rate,
        "rate_share": stats.computed_flops / stats.stage_times()["dit"].seconds / rate,
        "caching_share": _caching_share(benchmark, trial, stats),
        "kinds": kinds,
        "num_frames": num_frames,
        "attention_kernel": kernel.name,
        "attention_probe": dict(kernel.probed),
        "cross_attention_kernel": cross_kernel.name,
        "cross_attention_probe": dict(cross_kernel.probed),
        "compilation": None if compilation is None else compilation.to_dict(),
        "is_overlapped": is_concurrent,
        "warm_up_seconds": warm_up,
    }


def take_frames(shown: Iterable[Progress], *, device: torch.device, is_concurrent: bool) -> int:
    """Carry out a run and bring its frames to the host, as one that writes them; count them.

    Args:
        is_concurrent: whether frames are waited for in a thread, while the next ticks go on.
    """

    def take(later: Future[Decoded]) -> int:
        return len(to_uint8(later.result().frames).cpu())

    with Worker("take", device=device, is_concurrent=is_concurrent) as worker:
        taken = [
            worker.submit(partial(take, progress.later))
            for progress in shown
            if progress.later is not None
        ]
        return sum(count.result() for count in taken)


def _figures(
    benchmark: Benchmark, trial: Trial, stats: TimedStats, *, total: float
) -> dict[str, Any]:
    """Return seconds, FLOPs and bytes; a shortened run is scaled up to all steps."""
    times = stats.stage_times()
    traced = stats.times.read()
    dit, ticks = times["dit"].seconds, list(traced.tick_seconds.values())
    forwards = list(traced.pass_seconds.values())
    compression = times[COMPRESSION].seconds if COMPRESSION in times else 0.0
    scale = _scale(benchmark, trial)
    whole, flops = dit, float(stats.computed_flops)
    if trial.thin > 1:
        # compression is work per chunk, not per step
        rest = dit - compression
        inside = rest if trial.speed is None else min(sum(forwards), rest)
        whole = (
            inside * scale + (rest - inside) * trial.whole.work.num_ticks / len(ticks) + compression
        )
        flops *= scale
    return {
        "factor": trial.thin,
        "measured_ticks": len(ticks),
        "num_ticks": trial.whole.work.num_ticks,
        "num_forwards": len(forwards),
        "seconds_per_tick": statistics.fmean(ticks),
        "seconds_per_tick_median": statistics.median(ticks),
        "seconds_per_forward": statistics.fmean(forwards),
        "flops": flops,
        "rate": stats.computed_flops / dit,
        "dit_seconds": whole,
        "vae_seconds": times["vae"].seconds if "vae" in times and benchmark.has_vae else None,
        "total_seconds": total - dit + whole,
        # decoded apart, a shortened run says nothing of how much of the decoding a whole one hides
        "exposed_share": (total - dit) / (total - dit + whole) if trial.thin == 1 else None,
        "outside_share": 1 - sum(forwards) / dit,
        "compression_share": compression / whole,
        "peak_bytes": stats.peak_memory_bytes(),
        "reserved_bytes": stats.peak_reserved_bytes(),
    }


def _scale(benchmark: Benchmark, trial: Trial) -> float:
    """Return how many times more the passes of all steps cost than the measured ones."""
    scale = trial.whole.work.flops / trial.job.work.flops
    if trial.speed is None:
        return scale
    whole, short = (
        benchmark.pattern(job, trial.speed).share(benchmark.costs(job))
        for job in (trial.whole, trial.job)
    )
    return scale * whole / short


def _caching_share(benchmark: Benchmark, trial: Trial, stats: RunStats) -> float | None:
    """Return the share of the DiT's time that decisions and stored results take.

    Decisions are timed in the run, waiting for the device included; storing a result and using it
    again apart, and multiplied by how often that was done.
    """
    if trial.speed is None:
        return None
    times = stats.stage_times()
    put, use = store_seconds(benchmark, trial.job)
    seconds = times[CACHING].seconds + stats.num_computed * put + stats.num_reused * use
    return seconds / times["dit"].seconds
