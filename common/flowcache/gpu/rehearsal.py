"""Runs of any model on fake CUDA tensors, see `flowcache.gpu.fake_cuda`, and what they show."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import nn

from flowcache.attention import choose_kernel
from flowcache.gpu.benchmark import Benchmark, Method, load_benchmark
from flowcache.gpu.fake_cuda import CUDA, Cost, Ledger, pretended_cuda
from flowcache.gpu.traces import policies_at
from flowcache.runtime.memory import MemoryPlan
from flowcache.runtime.model import Job
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import plan_memory
from flowcache.runtime.stats import RunStats
from flowcache.runtime.video import to_uint8
from flowcache.schedule import Tick

KERNEL: Final = "flash"
"""Fake tensors know its operation on every machine; another kernel would change no count."""
FRAMES = "frames"
"""Stage in which finished frames go to the host."""


@dataclass(frozen=True)
class Case:
    """One run to rehearse."""

    model: str
    method: Method
    thin: int = 1
    """By how much the number of steps, and the lag, is divided."""
    num_layers: int | None = None
    """Of the transformer; None: all."""
    settings: tuple[str, ...] = ()
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that divide the run, seen by one of them."""

    @property
    def job(self) -> Job:
        """The run."""
        return self.benchmark.plan_method(
            self.method,
            "paper",
            self.thin,
            ("overlap=false", "compile=false", *self.settings),
            device=CUDA,
            num_layers=self.num_layers,
            ranks=self.ranks,
        )

    @property
    def benchmark(self) -> Benchmark:
        """The model's part of the measurements."""
        return load_benchmark(self.model)

    def with_layers(self, number: int) -> "Case":
        """Return the same with another number of layers."""
        return replace(self, num_layers=number)


@dataclass(frozen=True)
class Step:
    """What one tick did."""

    tick: Tick
    reads: int
    """Times that the host waited for a value, those for the VAE and its frames aside."""
    launches: int
    """Operations of the transformer's part."""


@dataclass(frozen=True)
class Rehearsed:
    """A run that was rehearsed."""

    ledger: Ledger
    stats: RunStats
    steps: tuple[Step, ...]
    memory: MemoryPlan

    @property
    def dit(self) -> Cost:
        """What the transformer's part does, decisions and compression included."""
        return self.ledger.total("dit", "caching", "kv_compression", "other")

    @property
    def planned_bytes(self) -> int:
        """The planned peak without the text encoder, which is gone when the run begins."""
        return max(stage.peak_bytes for stage in self.memory.stages if stage.name != "text")


class LedgerStats(RunStats):
    """Statistics that also let a ledger know which stage is under way."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(CUDA)
        self.ledger = ledger

    @contextmanager
    def stage(
        self, name: str, *, is_on_host: bool = False, is_concurrent: bool = False
    ) -> Generator[None, None, None]:
        """See `RunStats.stage`."""
        with (
            self.ledger.stage(name),
            super().stage(name, is_on_host=is_on_host, is_concurrent=is_concurrent),
        ):
            yield


def rehearse(case: Case, *, limit_bytes: int | None = None) -> Rehearsed:
    """Run a case on fake CUDA tensors, with as much on the host as a limit asks for."""
    job, benchmark, speed = case.job, case.benchmark, case.method.speed
    planned = plan_memory(job, limit=limit_bytes)
    job = replace(job, memory=planned)
    steps: list[Step] = []
    with pretended_cuda() as ledger:
        stats, policies = LedgerStats(ledger), None
        if speed is not None:
            policies = policies_at(benchmark.pattern(job, speed), job.work, stats)
        before = (0, 0)
        models = benchmark.build(job, "paper", _to_cuda)
        _skip_layers(models.vae.model)
        models.dit.kernel = choose_kernel(CUDA, dtype=job.dtype, wanted=KERNEL)
        for shown in benchmark.generate(models, job, stats, policies):
            if shown.later is not None:
                with ledger.stage(FRAMES):
                    to_uint8(shown.later.result().frames).cpu()
            # what goes on once, before the first tick, counts in none
            now = (_reads(ledger), ledger.total("dit", "caching", "kv_compression").launches)
            steps.append(Step(shown.tick, now[0] - before[0], now[1] - before[1]))
            before = now
    return Rehearsed(ledger, stats, tuple(steps), planned)


def _reads(ledger: Ledger) -> int:
    return sum(count for site, count in ledger.reads.items() if site.stage not in ("vae", FRAMES))


def _skip_layers(network: nn.Module) -> None:
    """Run one of a VAE's alike blocks only: the others need no other memory but their weights."""
    for module in list(network.modules()):
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, nn.ModuleList):
            module.blocks, module.skipped = blocks[:1], blocks[1:]


def _to_cuda(network: nn.Module, at: torch.device = CUDA) -> None:
    network.to_empty(device=at).eval().requires_grad_(False)
