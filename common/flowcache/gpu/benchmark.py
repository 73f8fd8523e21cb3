"""What the measurements need of a model in addition to the contract: `BENCHMARK` of its module
`gpu`."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from flowcache.gpu.traces import Curve, Pattern, fit_pattern
from flowcache.policies import Policies
from flowcache.runtime.compile import Compilation, should_compile
from flowcache.runtime.model import Job, Progress, Request, Source, VideoModel, models_with
from flowcache.runtime.ops import set_float32_precision
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import bring_to_device, job_of, read_settings
from flowcache.runtime.stats import RunStats

Size = Literal["paper", "tiny"]
"""The published experiments, or one that a CPU runs in seconds to test the code."""
Speed = Literal["slow", "fast"]
Fill = Callable[..., None]
"""Gives a network on the meta device weights on a real one."""
INIT_STD = 0.02
WARMUP_STEPS = 5
"""Of all presets, by own steps of the published schedule."""
GPU = torch.device("cuda")


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    preset: str
    speed: Speed | None = None
    """The published decisions that it follows; None: every step is computed."""
    settings: tuple[str, ...] = ()
    is_lean: bool = False
    """Whether speed is given up for memory; bounds of all methods are not about it."""


@dataclass(frozen=True)
class Target:
    """A bound on one figure of one method, from the project's goals."""

    figure: str
    method: str | None
    """None: the worst of all methods that give up no speed for memory."""
    least: float | None = None
    most: float | None = None
    says: str = ""


TARGETS_OF_ALL = (
    Target("rate_share", None, least=0.55, says="TFLOP/s of the DiT / of a matrix product"),
    Target("caching_share", None, most=0.01, says="caching and statistics / DiT time"),
    Target("compression_share", None, most=0.02, says="KV compression / DiT time"),
    Target("exposed_share", None, most=0.10, says="time outside the DiT / end to end"),
)


@dataclass(frozen=True)
class Line:
    """One way to make a video of any length."""

    name: str
    preset: str
    settings: Callable[[int], tuple[str, ...]]
    """By number of frames."""
    is_measured: bool = True
    """On the demo, too."""

    def plus(self, settings: Sequence[str]) -> "Line":
        """Return the line with more settings."""
        return replace(self, settings=lambda frames: (*self.settings(frames), *settings))


@dataclass(frozen=True)
class Growth:
    """How cost against length is planned and measured; see `flowcache.gpu.demos`."""

    title: str
    lines: tuple[Line, ...]
    fewer_steps: tuple[str, ...]
    """Settings of the demo: time per step and chunk depends on the length alone."""
    planned: Sequence[int]
    """Numbers of frames."""
    measured: Sequence[int]


@dataclass(frozen=True)
class Demo:
    """How the demo is run to check a device; see `flowcache.gpu.paths`."""

    title: str
    fast: str
    """Preset that reuses."""
    compressed: str
    """Preset that compresses."""
    short: tuple[str, ...]
    """Settings of a short video."""
    keys_on_host: tuple[str, ...]
    half_vae: tuple[str, ...]
    """Settings of a VAE in 16 bits; none: it is always that of the run."""
    half_tolerance: float
    """Twice the error that bfloat16 makes on a CPU in the same runs."""
    strips: tuple[str, ...] = ()
    """Settings with which pictures are decoded in strips; empty: there are none."""


@dataclass(frozen=True)
class Models:
    """Transformer, VAE, and what replaces encoded prompts."""

    dit: Any
    vae: Any
    inputs: Any


@dataclass(frozen=True)
class Benchmark:
    """A model's part of the measurements."""

    model: VideoModel
    title: str
    methods: tuple[Method, ...]
    """Rows of the table; the first one is what all are compared with."""
    checked: tuple[str, ...]
    """Rows that `gpu_check.sh` measures: what the method is for first, the base last."""
    targets: tuple[Target, ...]
    curve: Curve
    """Change of a chunk's signal, as published."""
    shares: Mapping[Speed, float]
    """Of the FLOPs of all steps, by the published count, that each speed computes."""
    thin: Mapping[Size, tuple[int, ...]]
    """Factors by which the number of steps may be divided, ascending."""
    steps: Mapping[Size, Mapping[str, int]]
    """Settings that are divided by these factors."""
    settings: Mapping[Size, tuple[str, ...]]
    """Others in addition to the presets, whose values are those of the published experiments."""
    sources: Callable[[Size], Source]
    """The model at a size, by its sizes alone."""
    vae_package: str | None
    """Package without which the VAE is left out; None: it needs none."""
    num_layers: Callable[[Job], int]
    with_layers: Callable[[Any, Source, int], tuple[Any, Source]]
    """Settings and source of a transformer with another number of layers."""
    costs: Callable[[Job], tuple[float, ...]]
    """What each own step costs by the published count, all chunks together; in any unit."""
    stored: Callable[[Job], tuple[tuple[int, ...], torch.dtype]]
    """Shape, frames first, and type of a stored result of one chunk."""
    make_dit: Callable[[Job, Fill], Any]
    """The transformer with random weights, in the types in which it is loaded."""
    make_vae: Callable[[Job, Size, Fill], Any]
    make_inputs: Callable[[Job, torch.Generator], Any]
    """Random numbers in place of encoded prompts."""
    growth: Growth
    demo: Demo
    checks: Callable[[torch.device], Sequence[Any]]
    """Further paths to check, see `flowcache.gpu.paths.Check`."""

    @property
    def has_vae(self) -> bool:
        """Whether what the VAE needs is installed."""
        return self.vae_package is None or is_installed(self.vae_package)

    def plan(
        self,
        preset: str,
        size: Size,
        settings: Sequence[str],
        *,
        device: torch.device = GPU,
        num_layers: int | None = None,
        ranks: Ranks | None = None,
    ) -> Job:
        """Plan a run by sizes alone.

        Args:
            num_layers: of the transformer; None: all.
            ranks: the processes that divide the run; None: this one.
        """
        source, request = self.sources(size), Request(preset, overrides=settings)
        config = read_settings(self.model, request, source)
        if num_layers is not None:
            config, source = self.with_layers(config, source, num_layers)
        return job_of(
            self.model,
            request,
            config,
            source,
            self.model.media(config, source),
            device=device,
            dtype=self.model.dtype(config, device),
            ranks=ranks or Ranks(),
        )

    def plan_method(
        self, method: Method, size: Size, thin: int, settings: Sequence[str] = (), **options: Any
    ) -> Job:
        """Plan a method's run with `thin` times fewer steps; see `plan`."""
        steps = [f"{key}={number // thin}" for key, number in self.steps[size].items()]
        changes = (*self.settings[size], *method.settings, *settings)
        return self.plan(method.preset, size, ["prompt=-", *steps, *changes], **options)

    def build(self, job: Job, size: Size, fill: Fill) -> Models:
        """Make all networks; blocks are compiled as the settings say."""
        dit = self.make_dit(job, partial(fill, at=job.dit_device))
        bring_to_device(job, dit)
        vae = self.make_vae(job, size, fill)
        set_float32_precision(job.dtype)
        if should_compile(job.config.compile, job.device):
            self.model.compile(job, dit)
        return Models(dit, vae, self.make_inputs(job, torch.Generator().manual_seed(0)))

    def generate(
        self, models: Models, job: Job, stats: RunStats, policies: Policies | None
    ) -> Iterator[Progress]:
        """Make the video in memory."""
        return self.model.generate(
            models.dit,
            models.vae,
            job.placed,
            models.inputs,
            stats=stats,
            work=job.work,
            policies=policies,
            ranks=job.ranks,
        )

    def pattern(self, job: Job, speed: Speed) -> Pattern:
        """Return the own steps that a speed computes."""
        costs = self.costs(job)
        return fit_pattern(
            self.curve.distances(len(costs)),
            warmup_steps=math.ceil(WARMUP_STEPS * len(costs) / self.curve.num_steps),
            costs=costs,
            share=self.shares[speed],
        )


def load_benchmark(name: str) -> Benchmark:
    """Import a model's part by the name of its package."""
    return cast("Benchmark", importlib.import_module(f"{name}.gpu").BENCHMARK)


def load_benchmarks() -> dict[str, Benchmark]:
    """Import the parts of all models."""
    return {name: load_benchmark(name) for name in models_with("gpu")}


def compilation_of(models: Models) -> Compilation | None:
    """Return how compiling the blocks went; None: they run as they are."""
    return models.dit.parts.compilation


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported; it is not looked into."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def random_weights(device: torch.device) -> Fill:
    """Return what gives a network random weights, there or elsewhere: normal, 0.02 wide.

    Random, not zero: matrix products of zeros need less power and run faster than real ones.
    """

    def fill(network: nn.Module, at: torch.device = device) -> None:
        network.to_empty(device=at)
        draw = torch.Generator(device=at).manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=INIT_STD, generator=draw)
        network.eval().requires_grad_(False)

    return fill


class NoVAE:
    """Replaces a VAE where none is wanted: the pixels are the latents."""

    def __init__(self) -> None:
        self.model = nn.Identity()

    def decode(self, latents_BCFhw: Tensor, ranks: Ranks | None = None, /) -> Tensor:
        """Return a copy."""
        return latents_BCFhw.clone()

    def stream(self, ranks: Ranks, /) -> "NoVAE":
        """Begin a segment."""
        return self

    def to(self, device: torch.device | str, /) -> "NoVAE":
        """Stay."""
        return self
