"""Runs of any model on fake CUDA tensors, see `flowcache.gpu.fake_cuda`, and what they show."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn

from flowcache.attention import choose_kernel
from flowcache.gpu.benchmark import Benchmark, Method, Models, Plan, load_benchmark
from flowcache.gpu.fake_cuda import CUDA, Cost, Ledger, pretended_cuda
from flowcache.gpu.measure import Job
from flowcache.runtime.memory import MemoryPlan, make_memory_plan, weight_bytes
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.plan import per_process
from flowcache.runtime.settings import KernelName
from flowcache.runtime.stats import RunStats
from flowcache.runtime.video import to_uint8
from flowcache.schedule import Tick

KERNEL: KernelName = "flash"
"""Fake tensors know its operation on every machine; another kernel would change no count."""
FRAMES = "frames"
"""Stage in which finished frames go to the host."""


@dataclass(frozen=True)
class Case:
    """One run to rehearse.

    Attributes:
        thin: by how much the number of steps, and the lag, is divided.
        num_layers: of the transformer; None: all.
        vae_layers: of the VAE, where they are alike, see `vae_bytes_left_out`.
        settings: changes of the method's.
        ranks: the processes that divide the run, seen by one of them.
    """

    model: str
    method: Method
    thin: int = 1
    num_layers: int | None = None
    vae_layers: int = 1
    settings: tuple[str, ...] = ()
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def plan(self) -> Plan:
        """The run."""
        return self.benchmark.plan(
            self.method,
            "paper",
            self.thin,
            ("overlap=false", "compile=false", *self.settings),
            num_layers=self.num_layers,
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
    """What one tick did.

    Attributes:
        reads: times that the host waited for a value, those for the VAE and its frames aside.
        launches: operations of the transformer's part.
    """

    tick: Tick
    reads: int
    launches: int


def num_layers_of(case: Case) -> int:
    """Return the layers that the transformer of a case has."""
    plan = case.plan
    return case.benchmark.parts.num_layers(plan.config, plan.source)


def vae_bytes_left_out(case: Case) -> int:
    """Return the weights of the VAE layers that a case does without."""
    config, benchmark = case.plan.config, case.benchmark
    dtype = benchmark.model.dtype(config, CUDA)
    whole, made = (
        benchmark.parts.vae(config, "paper", dtype, lambda _: None, num_layers=number)
        for number in (None, case.vae_layers)
    )
    return weight_bytes(whole.model) - weight_bytes(made.model)


@dataclass(frozen=True)
class Rehearsed:
    """A run that was rehearsed.

    Attributes:
        ledger: what was done.
        stats: what the run says of itself.
        steps: by tick.
        memory: what was planned to be in memory.
    """

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
    """Statistics that also tell a ledger which stage is under way."""

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


def rehearse(case: Case, *, num_ticks: int | None = None) -> Rehearsed:
    """Run a case on fake CUDA tensors.

    Args:
        num_ticks: how many; None: all.
    """
    made = case.plan
    benchmark, planned = case.benchmark, plan_memory(case, made)
    steps: list[Step] = []
    with pretended_cuda() as ledger:
        stats = LedgerStats(ledger)
        policies = None
        if case.method.speed is not None:
            job = Job(made, made, made, case.thin, case.method.speed)
            policies = job.policies(benchmark, stats)
        before = (0, 0)
        models = make_models(case, made)
        run = benchmark.model.generate(
            models.dit,
            models.vae,
            made.config,
            models.conditioning,
            stats=stats,
            policies=policies,
            ranks=case.ranks,
        )
        for shown in run:
            if shown.later is not None:
                with ledger.stage(FRAMES):
                    to_uint8(shown.later.result().frames).cpu()
            # what goes on once, before the first tick, counts in none
            now = (_reads(ledger), ledger.total("dit", "caching", "kv_compression").launches)
            steps.append(Step(shown.tick, now[0] - before[0], now[1] - before[1]))
            before = now
            if len(steps) == num_ticks:
                break
    return Rehearsed(ledger, stats, tuple(steps), planned)


def _reads(ledger: Ledger) -> int:
    return sum(count for site, count in ledger.reads.items() if site.stage not in ("vae", FRAMES))


def plan_memory(case: Case, plan: Plan) -> MemoryPlan:
    """Plan the memory of a run."""
    benchmark, layout = case.benchmark, case.ranks.layout
    dtype = benchmark.model.dtype(plan.config, CUDA)
    needs = benchmark.parts.footprint(
        plan, per_process(plan.work, layout), dtype, layout, vae_layers=case.vae_layers
    )
    wanted = benchmark.model.residence(plan.config)
    return make_memory_plan(needs.stages, wanted=wanted, limit_bytes=None, has_host=True)


def make_models(case: Case, plan: Plan) -> Models:
    """Make the networks of a run, without values."""
    parts, config = case.benchmark.parts, plan.config
    dtype = case.benchmark.model.dtype(config, CUDA)
    dit = parts.dit(config, plan.source, dtype)
    _to_cuda(dit)
    parts.quantize(config, dit, CUDA)
    dit.kernel = choose_kernel(CUDA, dtype=dtype, wanted=KERNEL)
    vae = parts.vae(config, "paper", dtype, _to_cuda, num_layers=case.vae_layers)
    return Models(dit, vae, parts.conditioning(config, plan.work, dit, None, CUDA))


def _to_cuda(network: nn.Module) -> None:
    network.to_empty(device=CUDA).eval().requires_grad_(False)
