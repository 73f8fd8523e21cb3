"""What the measurements need of a model in addition to the contract: `BENCHMARK` of its module
`gpu`."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn

from flowcache.attention import Kernel, choose_kernels
from flowcache.gpu.traces import Curve, Pattern, fit_pattern
from flowcache.policies import Policies
from flowcache.runtime.compile import Compilation, should_compile
from flowcache.runtime.memory import Footprint
from flowcache.runtime.model import MODELS, Progress, Request, Source, VideoModel, Work
from flowcache.runtime.ops import set_float32_precision
from flowcache.runtime.parallel import Layout
from flowcache.runtime.run import read_settings
from flowcache.runtime.stats import RunStats
from flowcache.schedule import Tick

Size = Literal["paper", "tiny"]
"""The published experiments, or one that a CPU runs in seconds to test the code."""
Speed = Literal["slow", "fast"]
INIT_STD = 0.02
WARMUP_STEPS = 5
"""Of all presets, by own steps of the published schedule."""
GPU = torch.device("cuda")
"""Where the released sizes are planned for."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    preset: str
    """Of the model's own `configs`."""
    speed: Speed | None = None
    """The published decisions that it follows; None: every step is computed."""
    settings: tuple[str, ...] = ()
    """Changes of the preset."""
    is_lean: bool = False
    """Whether speed is given up for memory; bounds of all methods are not about it."""


@dataclass(frozen=True)
class Plan:
    """One method's run at one number of steps."""

    config: Any
    source: Source
    work: Work
    costs: tuple[float, ...]
    """Of a chunk's own steps by the published count, all chunks together; in any unit."""

    @property
    def ticks(self) -> Mapping[int, Sequence[Tick]]:
        """Segment -> ticks."""
        return {number: own.ticks for number, own in enumerate(self.work.segments)}


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
"""What is wanted of every model."""


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
    """How cost against length is planned and measured; see `flowcache.gpu.growth`."""

    title: str
    lines: tuple[Line, ...]
    fewer_steps: tuple[str, ...]
    """Settings of the demo: time per step and chunk depends on the length alone."""
    planned: Sequence[int]
    """Numbers of frames."""
    measured: Sequence[int]
    """Numbers of frames that the demo makes."""


@dataclass(frozen=True)
class Picture:
    """A picture size at which the overhead of all lines is measured."""

    name: str
    num_frames: int
    settings: tuple[str, ...]
    rounds: int
    """How often all methods are run, in turn; the least time of each counts."""


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
    """Settings that keep keys and values there."""
    half_tolerance: float
    """Twice the error that bfloat16 makes on a CPU in the same runs."""
    vanilla: str = "vanilla"


@dataclass(frozen=True)
class Models:
    """Transformer, VAE, and what replaces encoded prompts."""

    dit: Any
    vae: Any
    conditioning: Any


class Parts(Protocol):
    """How a model's networks are made with random weights, and what its steps are made of.

    `fill` gives a network on the meta device weights on a real one.
    """

    @property
    def vae_package(self) -> str | None:
        """Package without which the VAE is left out; None: it needs none."""
        ...

    def with_layers(self, config: Any, source: Source, number: int) -> tuple[Any, Source]:
        """Return the settings and sizes of a transformer with another number of layers."""
        ...

    def num_layers(self, config: Any, source: Source) -> int:
        """Return the number of the transformer's layers."""
        ...

    def costs(self, config: Any, work: Work) -> tuple[float, ...]:
        """Return what each own step of all chunks costs, by the published count."""
        ...

    def stored(
        self, config: Any, work: Work, source: Source
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape, frames first, and type of a stored result."""
        ...

    def dit(self, config: Any, source: Source, dtype: torch.dtype) -> Any:
        """Return the transformer on the meta device, in the types in which it is loaded."""
        ...

    def quantize(self, config: Any, dit: Any, device: torch.device) -> None:
        """Make the transformer's linears 8-bit where the settings say so."""
        ...

    def compiled_parts(self) -> Any:
        """Return the compiled parts of its blocks."""
        ...

    def vae(
        self,
        config: Any,
        size: Size,
        dtype: torch.dtype,
        fill: Callable[[nn.Module], None],
        *,
        num_layers: int | None = None,
    ) -> Any:
        """Return the VAE in the types in which it is loaded.

        Args:
            num_layers: so many only, where all are alike; None: all.
        """
        ...

    def conditioning(
        self, config: Any, work: Work, dit: Any, draw: torch.Generator | None, device: torch.device
    ) -> Any:
        """Return what replaces encoded prompts: random numbers."""
        ...

    def footprint(
        self, plan: Plan, work: Work, dtype: torch.dtype, layout: Layout, *, vae_layers: int
    ) -> Footprint:
        """Return what counts the memory of a run whose VAE has so many layers, see `vae`."""
        ...


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
    parts: Parts
    growth: Growth
    overhead: tuple[tuple[Line, ...], tuple[Picture, ...]]
    """Lines, of which all are compared with the first, and picture sizes."""
    demo: Demo
    checks: Callable[[torch.device], Sequence[Any]]
    """Further paths to check, see `flowcache.gpu.paths.Check`."""

    @property
    def has_vae(self) -> bool:
        """Whether what the VAE needs is installed."""
        return self.parts.vae_package is None or is_installed(self.parts.vae_package)

    def read(self, preset: str, size: Size, settings: Sequence[str]) -> tuple[Any, Source, Work]:
        """Return settings, source and work of a run by sizes alone."""
        source = self.sources(size)
        config = read_settings(self.model, Request(preset, overrides=settings), source)
        return config, source, self.work(config, source)

    def work(self, config: Any, source: Source) -> Work:
        """Return what a run from a prompt alone does."""
        media = self.model.media(config, source)
        return self.model.work(config, source, media, self.model.dtype(config, GPU))

    def plan(
        self,
        method: Method,
        size: Size,
        thin: int,
        settings: Sequence[str],
        *,
        num_layers: int | None = None,
    ) -> Plan:
        """Plan a method's run with `thin` times fewer steps.

        Args:
            num_layers: of the transformer; None: all.
        """
        steps = [f"{key}={number // thin}" for key, number in self.steps[size].items()]
        changes = (*self.settings[size], *method.settings, *settings)
        config, source, work = self.read(method.preset, size, ["prompt=-", *steps, *changes])
        if num_layers is not None:
            config, source = self.parts.with_layers(config, source, num_layers)
            work = self.work(config, source)
        return Plan(config, source, work, self.parts.costs(config, work))

    def build(self, plan: Plan, size: Size, device: torch.device) -> Models:
        """Make random weights; blocks are compiled as the settings say."""
        config, parts = plan.config, self.parts
        dtype = self.model.dtype(config, device)
        dit = parts.dit(config, plan.source, dtype)
        fill(dit, device=device)
        vae = parts.vae(config, size, dtype, partial(fill, device=device))
        set_float32_precision(dtype)
        if should_compile(config.compile, device):
            dit.parts = parts.compiled_parts()
        draw = torch.Generator().manual_seed(0)
        return Models(dit, vae, parts.conditioning(config, plan.work, dit, draw, device))

    def choose(self, models: Models, plan: Plan, device: torch.device) -> tuple[Kernel, Kernel]:
        """Take the fastest attention kernels for a run, the second of attention to the prompt."""
        dit = models.dit
        dit.kernel, dit.cross_kernel = choose_kernels(
            device,
            dtype=dit.dtype,
            shape=plan.work.attention,
            num_text=plan.work.text_tokens,
            wanted=plan.config.attention_kernel,
        )
        return dit.kernel, dit.cross_kernel

    def play(
        self, models: Models, plan: Plan, stats: RunStats, policies: Policies
    ) -> Iterator[Progress]:
        """Make the video in memory."""
        return self.model.generate(
            models.dit,
            models.vae,
            plan.config,
            models.conditioning,
            stats=stats,
            policies=policies,
        )

    def pattern(self, plan: Plan, speed: Speed) -> Pattern:
        """Return the own steps that a speed computes."""
        num_steps = len(plan.costs)
        return fit_pattern(
            self.curve.distances(num_steps),
            warmup_steps=math.ceil(WARMUP_STEPS * num_steps / self.curve.num_steps),
            costs=plan.costs,
            share=self.shares[speed],
        )


def load_benchmark(name: str) -> Benchmark:
    """Import a model's part by the name of its package."""
    return cast("Benchmark", importlib.import_module(f"{name}.gpu").BENCHMARK)


def load_benchmarks() -> dict[str, Benchmark]:
    """Import the parts of all models."""
    return {name: load_benchmark(name) for name in MODELS}


def compilation_of(models: Models) -> Compilation | None:
    """Return how compiling the blocks went; None: they run as they are."""
    return models.dit.parts.compilation


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported; it is not looked into."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def fill(model: nn.Module, *, device: torch.device, seed: int = 0) -> None:
    """Give a module on the meta device random weights on a real one: normal, 0.02 wide.

    Random, not zero: matrix products of zeros need less power and run faster than real ones.
    """
    model.to_empty(device=device)
    draw = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=INIT_STD, generator=draw)
    model.eval().requires_grad_(False)
