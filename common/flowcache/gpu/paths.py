"""Every way in which a run may compute, against the same run on the CPU in float32.

The runs are those of the demos, short, with made-up prompts and the same noise everywhere. What is
compared are latents, so that no VAE blurs a difference, or pixels where decoding is the point. An
error is `|found - wanted| / |wanted|`, by Euclidean norms (dimensionless).
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from flowcache.attention import SDPA, AttentionShape, Kernel, available_kernels
from flowcache.errors import UserError
from flowcache.gpu.benchmark import Benchmark, Fill, NoVAE, Size, load_benchmark, load_benchmarks
from flowcache.runtime.compile import should_compile
from flowcache.runtime.model import Job, Progress, Request
from flowcache.runtime.ops import set_float32_precision
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import (
    bring_to_device,
    choose_attention,
    job_of,
    plan_memory,
    read_settings,
)
from flowcache.runtime.stats import RunStats, scaled

CPU = torch.device("cpu")
FLOAT32 = 2e-4
"""Tolerance of a run in float32: sums in another order err by 1e-6 per operation, some hundred of
which follow each other; products in TF32 alone would err by 5e-4 each."""
KERNEL = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-16}
"""Of an attention kernel: 2 units of rounding in 16 bits; 128 in float32, over 1440 keys."""
COARSE_KERNEL = 2**-4
"""Of one that multiplies in 8 bits: 1 of 127 steps of the largest query and key of a block."""
CERTAIN = ("reuse.warmup_steps=1", "reuse.threshold=100")
"""Every step between the forced ones is reused, whichever way signals are rounded."""
LIMIT_BYTES = 8 * 10**9
"""A limit that the released models keep."""
NUM_STEPS = {"cuda": 8, "cpu": 4}
"""Of a demo's chunk. On a CPU the same code is tried, no device."""
SHAPES: Mapping[str, AttentionShape] = {
    "self": AttentionShape(480, 1440, 4, 4, 128),
    "grouped": AttentionShape(480, 1440, 6, 2, 128),
    "prompt": AttentionShape(480, 77, 4, 4, 128),
}


class AbsentError(Exception):
    """This machine does not have a path."""


@dataclass(frozen=True)
class Outcome:
    """What a path was found to be off by, and what it may be."""

    error: float
    tolerance: float
    note: str = ""

    @property
    def is_right(self) -> bool:
        """Whether it is close enough; an error that is no number never is."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Check:
    """One path; `run` raises `AbsentError` with the reason where a machine does not have it."""

    name: str
    run: Callable[[], Outcome]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return `|found - wanted| / |wanted|`; infinite if the shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return ((found - wanted).norm() / wanted.norm()).item()


def all_checks(device: torch.device) -> list[Check]:
    """Return all paths, the quick ones first."""
    benchmarks = load_benchmarks()
    checks = attention_checks(device)
    for name in sorted(benchmarks):
        checks += benchmarks[name].checks(device)
    for benchmark in benchmarks.values():
        checks += demo_checks(benchmark, device)
    return checks


# Attention ----------------------------------------------------------------------------------------


def attention_checks(device: torch.device) -> list[Check]:
    """Return a check for each kernel and dtype."""
    return [
        Check(
            f"attention {name}, {str(dtype).removeprefix('torch.')}",
            partial(attention, kernel, device, dtype),
        )
        for dtype in (torch.bfloat16, torch.float32)
        for name, kernel in available_kernels(device, dtype=dtype).items()
    ]


def attention(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> Outcome:
    """Compare a kernel with PyTorch's on the CPU; keys are the start of a longer cache."""
    set_float32_precision(dtype)
    errors: dict[str, float] = {}
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        q, k, v = shape.tensors(device=CPU, dtype=dtype)
        wanted = SDPA(q.float(), k.float(), v.float())
        q = q.to(device)
        k, v = (torch.cat([x, x], dim=1).to(device)[:, : shape.num_keys] for x in (k, v))
        if kernel.suits(q, k, v):
            errors[name] = relative_error(kernel(q, k, v), wanted)
    if not errors:
        raise AbsentError("can do none of the shapes")
    refused = [name for name in SHAPES if name not in errors]
    note = f"refuses {', '.join(refused)}" if refused else ""
    tolerance = COARSE_KERNEL if kernel.name == "SageAttention" else KERNEL[dtype]
    return Outcome(max(errors.values()), tolerance, note)


# The demos ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a demo is run.

    Attributes:
        preset: of the model.
        settings: of the path that is checked; the reference is without them.
        dtype: of the run.
        is_decoded: whether pixels are compared, not latents.
        is_compiled: whether blocks are compiled.
        has_half_vae: whether the VAE is in 16 bits.
    """

    preset: str
    settings: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    is_decoded: bool = False
    is_compiled: bool = False
    has_half_vae: bool = False


def demo_checks(benchmark: Benchmark, device: torch.device) -> list[Check]:
    """Return the checks that run a demo."""
    demo = benchmark.demo
    half, is_cuda = torch.bfloat16, device.type == "cuda"
    compiled = Way(demo.fast, dtype=half if is_cuda else torch.float32, is_compiled=True)
    ways = {
        "demo, float32": Way(demo.fast),
        "demo, bfloat16": Way(demo.fast, dtype=half),
        "demo, every step": Way("vanilla"),
        "KV compression": Way(demo.compressed),
        "keys on the host, prefetched": Way(demo.fast, demo.keys_on_host),
        "blocks of the transformer stream": Way(demo.fast, ("blocks_on_device=1",)),
        "transformer and VAE take turns": Way(demo.fast, ("offload=true",)),
        "decoded, float32": Way(demo.fast, ("overlap=false",), is_decoded=True),
        "decoded while denoising goes on": Way(demo.fast, ("overlap=true",), is_decoded=True),
        f"compiled blocks, {'bfloat16' if is_cuda else 'float32'}": compiled,
    }
    if demo.half_vae:
        settings = ("overlap=false", *demo.half_vae)
        ways["decoded, VAE in bfloat16"] = Way(
            demo.fast, settings, is_decoded=True, has_half_vae=True
        )
    if demo.strips:
        settings = ("overlap=false", *demo.strips)
        ways["decoded in strips"] = Way(demo.fast, settings, is_decoded=True)
    if is_cuda:  # elsewhere importance is summed block by block either way
        ways["KV compression, compiled"] = Way(demo.compressed, is_compiled=True)
    checks = [
        Check(f"{demo.title}: {name}", partial(compare, way, device, benchmark))
        for name, way in ways.items()
    ]
    return [
        *checks,
        Check(f"{demo.title}: a memory limit", partial(limit_holds, device, benchmark)),
    ]


@cache
def _reference(model: str, preset: str, *, is_decoded: bool, num_steps: int) -> Tensor:
    way = Way(preset, is_decoded=is_decoded)
    return make(load_benchmark(model), way, CPU, num_steps=num_steps)


def compare(way: Way, device: torch.device, benchmark: Benchmark) -> Outcome:
    """Run a demo and compare it with the same run on the CPU in float32, which is made once."""
    name, num_steps = benchmark.model.name, NUM_STEPS[device.type]
    wanted = _reference(name, way.preset, is_decoded=way.is_decoded, num_steps=num_steps)
    found = make(benchmark, way, device, num_steps=num_steps)
    is_exact = way.dtype == torch.float32 and not way.has_half_vae
    tolerance = FLOAT32 if is_exact else benchmark.demo.half_tolerance
    return Outcome(relative_error(found, wanted), tolerance)


def open_demo(benchmark: Benchmark, way: Way, device: torch.device, *, num_steps: int) -> Job:
    """Find the demo without what only prompts and files of other parts need."""
    model, demo = benchmark.model, benchmark.demo
    dtype = f"dtype={str(way.dtype).removeprefix('torch.')}"
    steps = f"{model.keys['num_steps']}={num_steps}"
    overrides = ("prompt=-", *demo.short, *CERTAIN, dtype, steps, *way.settings)
    request, found = Request(way.preset, "demo", overrides), model.find("demo")
    config, source = model.fetch(read_settings(model, request, found), found)
    job = job_of(
        model,
        request,
        config,
        # without files a prompt of the assumed length is planned, and no tokenizer needed
        replace(source, files=None),
        model.media(config, source),
        device=device,
        dtype=way.dtype,
        ranks=Ranks(),
    )
    return replace(job, source=source)


@torch.no_grad()
def make(benchmark: Benchmark, way: Way, device: torch.device, *, num_steps: int) -> Tensor:
    """Run a demo on a device; return its latents or pixels."""
    model = benchmark.model
    if way.is_decoded and not benchmark.has_vae:
        raise AbsentError(f"the VAE needs {benchmark.vae_package}, which is not installed")
    job = open_demo(benchmark, way, device, num_steps=num_steps)
    set_float32_precision(way.dtype)
    dit = model.load_dit(job)
    bring_to_device(job, dit)
    if device.type == "cuda":
        choose_attention(dit, job)
    if way.is_compiled:
        try:
            should_compile(True, device)
        except UserError as error:
            raise AbsentError(str(error)) from None
        model.compile(job, dit)
    shown = model.generate(
        dit,
        model.load_vae(job) if way.is_decoded else NoVAE(),
        job.config,
        benchmark.make_inputs(job, torch.Generator().manual_seed(1)),
        stats=RunStats(device),
        work=job.work,
        draw=same_noise(device),
    )
    result = torch.cat([frames.cpu() for frames in _frames(shown)], dim=1)
    if way.is_compiled and dit.parts.compilation.failure is not None:
        raise RuntimeError(f"not compiled: {dit.parts.compilation.failure}")
    return result


@torch.no_grad()
def limit_holds(
    device: torch.device,
    benchmark: Benchmark,
    *,
    size: Size = "paper",
    limit_bytes: int = LIMIT_BYTES,
) -> Outcome:
    """Measure what a run under a memory limit takes until its first frames, as part of the limit.

    The weights are zeros of the released sizes. Counted is what PyTorch reserves on the device, so
    that holes between tensors count, but not the CUDA context.
    """
    if device.type != "cuda":
        raise AbsentError("only CUDA counts its memory")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    method = next(each for each in benchmark.methods if each.name == benchmark.checked[0])
    thin, settings = max(benchmark.thin[size], default=1), ("overlap=false", "compile=false")
    job = benchmark.plan_method(method, size, thin, settings, device=device)
    job = replace(job, memory=plan_memory(job, limit=limit_bytes))
    models = benchmark.build(job, size, zeros(device))
    torch.cuda.reset_peak_memory_stats(device)
    for shown in benchmark.generate(models, job, RunStats(device), None):
        if shown.later is not None:
            shown.later.result()
            break
    allocated = torch.cuda.max_memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device) - before
    assert job.memory is not None
    planned = max(stage.peak_bytes for stage in job.memory.stages if stage.name != "text")
    note = (
        f"limit {scaled(limit_bytes, 'B')}, planned {scaled(planned, 'B')}, allocated "
        f"{scaled(allocated, 'B')}, reserved {scaled(reserved, 'B')}: {job.residence.describe()}"
    )
    return Outcome(reserved / limit_bytes, 1.0, note)


def zeros(device: torch.device) -> Fill:
    """Return what gives a network weights of zeros, there or elsewhere."""

    def fill(network: nn.Module, at: torch.device = device) -> None:
        network.to_empty(device=at).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.zero_()

    return fill


def _frames(shown: Iterator[Progress]) -> Iterator[Tensor]:
    """Yield what a run shows; only at its end, so that decoding may go on concurrently."""
    laters = [progress.later for progress in shown if progress.later is not None]
    yield from (later.result().frames for later in laters)


def same_noise(device: torch.device) -> Callable[[Sequence[int], torch.dtype], Tensor]:
    """Return noise that is the same on all devices and in all dtypes, to the last bit."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        noise = torch.randn(tuple(shape), generator=generator).bfloat16()
        return noise.to(device=device, dtype=dtype)

    return draw
