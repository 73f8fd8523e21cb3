"""Runs of both models on fake CUDA tensors, see `gpu.fake_cuda`, and what they show."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from flowcache.attention import choose_kernel
from flowcache.policies import Policies
from flowcache.runtime.config import KernelName
from flowcache.runtime.memory import MemoryPlan, Networks, make_memory_plan, weight_bytes
from flowcache.runtime.model import Progress
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.plan import per_process
from flowcache.runtime.stats import RunStats
from flowcache.runtime.video import to_uint8
from flowcache.schedule import Tick
from flowcache.wan import quantize
from flowcache.wan.dit import DiT
from flowcache.wan.vae import VAE
from gpu import magi1 as gpu_magi1
from gpu import skyreels_v2 as gpu_skyreels
from gpu.fake_cuda import CUDA, Cost, Ledger, pretended_cuda
from gpu.measure import Job
from gpu.subject import Method, Plan, Subject
from magi1 import pipeline as magi1_pipeline
from magi1 import text as magi1_text
from magi1 import vae as magi1_vae
from magi1 import work as magi1_work
from magi1.dit import DiT as MagiDiT
from magi1.dit import set_precision
from magi1.memory import ClipMemory
from magi1.model import MODEL as MAGI
from magi1.vae import ViTVAE
from magi1.work import dtype_of
from skyreels_v2 import pipeline
from skyreels_v2 import work as skyreels_work
from skyreels_v2.memory import WindowMemory, networks_of
from skyreels_v2.model import MODEL as SKYREELS
from skyreels_v2.work import branches_of

ModelName: TypeAlias = Literal["skyreels_v2", "magi1"]
SUBJECTS: Mapping[str, Subject[Any]] = {
    "skyreels_v2": gpu_skyreels.SUBJECT,
    "magi1": gpu_magi1.SUBJECT,
}
DTYPE = torch.bfloat16
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
        vae_layers: of MAGI-1's VAE, see `vae_bytes_left_out`.
        settings: changes of the method's.
        ranks: the processes that divide the run, seen by one of them.
    """

    model: ModelName
    method: Method
    thin: int = 1
    num_layers: int | None = None
    vae_layers: int = 1
    settings: tuple[str, ...] = ()
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def plan(self) -> Plan:
        """The run."""
        settings = ("overlap=false", "compile=false", *self.settings)
        if self.model == "magi1" and self.num_layers is not None:
            settings += (f"model_config.num_layers={self.num_layers}",)
        return SUBJECTS[self.model].plan(self.method, "paper", self.thin, settings)

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
    """Return the layers that the released transformer has."""
    if case.model == "magi1":
        return case.plan.config.model_config.num_layers
    return gpu_skyreels.DIT["paper"].num_layers


def vae_bytes_left_out(case: Case) -> int:
    """Return the weights of the VAE layers that a case does without; SkyReels-V2 has all."""
    if case.model == "skyreels_v2":
        return 0
    dtype = dtype_of(case.plan.config, CUDA)
    with torch.device("meta"):
        made, whole = (
            ViTVAE(replace(magi1_vae.RELEASED, depth=depth)).to(dtype)
            for depth in (case.vae_layers, magi1_vae.RELEASED.depth)
        )
    return weight_bytes(whole) - weight_bytes(made)


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


Play: TypeAlias = Callable[[RunStats, Policies | None], Iterator[Progress]]
"""Makes the models, then the video."""


def rehearse(case: Case, *, num_ticks: int | None = None) -> Rehearsed:
    """Run a case on fake CUDA tensors.

    Args:
        num_ticks: how many; None: all.
    """
    made = case.plan
    planned, play = (_skyreels if case.model == "skyreels_v2" else _magi1)(case, made)
    steps: list[Step] = []
    with pretended_cuda() as ledger:
        stats = LedgerStats(ledger)
        policies = None
        if case.method.speed is not None:
            job = Job(made, made, made, case.thin, case.method.speed)
            policies = job.policies(SUBJECTS[case.model], stats)
        before = (0, 0)
        for shown in play(stats, policies):
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


def _skyreels(case: Case, made: Plan) -> tuple[MemoryPlan, Play]:
    """Plan the memory of a SkyReels-V2 run, and return what plays it."""
    config, sizes = made.config, gpu_skyreels.DIT["paper"]
    if case.num_layers is not None:
        sizes = replace(sizes, num_layers=case.num_layers)
    work = skyreels_work.work_of(config, sizes, dtype=DTYPE)
    needs = WindowMemory(
        sizes,
        config,
        per_process(work, case.ranks.layout),
        networks=networks_of(None, sizes, dtype=DTYPE),
        dtype=DTYPE,
        layout=case.ranks.layout,
    )

    def play(stats: RunStats, policies: Policies | None) -> Iterator[Progress]:
        with torch.device("meta"):
            dit, vae = DiT(sizes).to(DTYPE), AutoencoderKLWan()
        for model in (dit, vae):
            model.to_empty(device=CUDA).eval().requires_grad_(False)
        if config.quantize is not None:
            quantize.quantize(dit, config.quantize, device=CUDA)
        dit.kernel = choose_kernel(CUDA, dtype=DTYPE, wanted=KERNEL)
        texts = {
            name: torch.randn(1, sizes.text_len, sizes.text_dim).to(CUDA)
            for name in branches_of(config)
        }
        conditioning = pipeline.Conditioning(texts)
        return pipeline.generate(
            dit,
            VAE(vae),
            config,
            conditioning,
            stats=stats,
            work=work,
            policies=policies,
            ranks=case.ranks,
        )

    wanted = SKYREELS.residence(config)
    return make_memory_plan(needs.stages, wanted=wanted, limit_bytes=None, has_host=True), play


def _magi1(case: Case, made: Plan) -> tuple[MemoryPlan, Play]:
    """Plan the memory of a MAGI-1 run, and return what plays it."""
    config = made.config
    model, num_tokens = config.model_config, gpu_magi1.TEXT_TOKENS["paper"]
    vae_sizes = replace(magi1_vae.RELEASED, depth=case.vae_layers)
    scale, dtype = config.runtime_config.scale_factor, dtype_of(config, CUDA)
    work = magi1_work.clip_work(
        config, num_prefix=0, prompt_tokens=num_tokens, has_special_tokens=False, dtype=dtype
    )
    with torch.device("meta"):
        empty = magi1_vae.VAE(ViTVAE(vae_sizes).to(dtype), scale=scale)
    needs = ClipMemory(
        config,
        per_process(work, case.ranks.layout),
        networks=Networks(magi1_text.released(), torch.float32, empty),
        dtype=dtype,
        layout=case.ranks.layout,
    )

    def play(stats: RunStats, policies: Policies | None) -> Iterator[Progress]:
        with torch.device("meta"):
            dit = MagiDiT(model, is_fp8=config.engine_config.fp8_quant)
            vae = ViTVAE(vae_sizes).to(dtype)
        set_precision(dit, dtype)
        for network in (dit, vae):
            network.to_empty(device=CUDA).eval().requires_grad_(False)
        dit.kernel = choose_kernel(CUDA, dtype=dtype, wanted=KERNEL)
        encoded = torch.randn(num_tokens, model.caption_channels)
        return magi1_pipeline.generate_clip(
            dit,
            magi1_vae.VAE(vae.to("cpu" if config.offload else CUDA), scale=scale),
            config,
            magi1_pipeline.Conditioning(encoded.to(CUDA)),
            stats=stats,
            work=work,
            policies=policies,
            ranks=case.ranks,
        )

    wanted = MAGI.residence(config)
    return make_memory_plan(needs.stages, wanted=wanted, limit_bytes=None, has_host=True), play
