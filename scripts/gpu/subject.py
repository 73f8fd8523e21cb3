"""What the measurement needs of a model, whichever it is."""

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from flowcache.attention import AttentionShape, Kernel
from flowcache.policies import Policies
from flowcache.runtime.compiling import Compilation
from flowcache.runtime.model import Progress
from flowcache.runtime.stats import RunStats
from flowcache.schedule import Tick
from gpu.traces import Curve, Pattern, fit_pattern

Size = Literal["paper", "tiny"]
"""The published experiments, or one that a CPU runs in seconds to test the code."""
Speed = Literal["slow", "fast"]
INIT_STD = 0.02
WARMUP_STEPS = 5
"""Of all presets, by own steps of the published schedule."""


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        preset: of the model's own `configs`.
        speed: the published decisions that it follows; None: every step is computed.
        settings: changes of the preset.
        is_lean: whether speed is given up for memory; bounds of all methods are not about it.
    """

    name: str
    preset: str
    speed: Speed | None = None
    settings: tuple[str, ...] = ()
    is_lean: bool = False


@dataclass(frozen=True)
class Plan:
    """One method's run at one number of steps.

    Attributes:
        config: all settings, a dataclass of the model.
        ticks: segment -> passes.
        branches: that decide.
        flops: if every step is computed.
        num_chunks: that are denoised.
        costs: of a chunk's own steps by the published count, all chunks together; in any unit.
        stored_shape: of a stored result, frames first.
        stored_dtype: its type.
        attention: the largest self-attention.
        num_text: tokens of a prompt.
    """

    config: Any
    ticks: Mapping[int, Sequence[Tick]]
    branches: tuple[str, ...]
    flops: int
    num_chunks: int
    costs: tuple[float, ...]
    stored_shape: tuple[int, ...]
    stored_dtype: torch.dtype
    attention: AttentionShape
    num_text: int

    @property
    def num_ticks(self) -> int:
        """Passes of all segments."""
        return sum(len(own) for own in self.ticks.values())


@dataclass(frozen=True)
class Target:
    """A bound on one figure of one method, from the project's goals."""

    figure: str
    method: str | None
    """None: the worst of all methods that give up no speed for memory."""
    least: float | None = None
    most: float | None = None
    says: str = ""


Models = TypeVar("Models")


TARGETS_OF_ALL = (
    Target("rate_share", None, least=0.55, says="TFLOP/s of the DiT / of a matrix product"),
    Target("caching_share", None, most=0.01, says="caching and statistics / DiT time"),
    Target("compression_share", None, most=0.02, says="KV compression / DiT time"),
    Target("exposed_share", None, most=0.10, says="time outside the DiT / end to end"),
)
"""What is wanted of every model."""


@dataclass(frozen=True)
class Subject(Generic[Models]):
    """A model's part of the measurement.

    Attributes:
        methods: rows of the table; the first one is what all are compared with.
        targets: bounds on its figures.
        thin: by size, factors by which the number of steps may be divided, ascending.
        curve: change of a chunk's signal, as published.
        shares: of the FLOPs of all steps, by the published count, that each speed computes.
        plan: `(method, size, factor, more settings)`: the run with that many times fewer steps.
        build: make random weights; blocks are compiled as the settings say.
        choose: take the fastest attention kernels for a method's run; return them, the second of
            attention to the prompt.
        compilation: how compiling the blocks went; None: they run as they are.
        play: run it.
        vae_package: without which the VAE is left out; None: it needs none.
    """

    title: str
    methods: tuple[Method, ...]
    targets: tuple[Target, ...]
    thin: Mapping[Size, tuple[int, ...]]
    curve: Curve
    shares: Mapping[Speed, float]
    plan: Callable[[Method, Size, int, Sequence[str]], Plan]
    build: Callable[[Plan, Size, torch.device], Models]
    choose: Callable[[Models, Plan], tuple[Kernel, Kernel]]
    compilation: Callable[[Models], Compilation | None]
    play: Callable[[Models, Plan, RunStats, Policies], Iterator[Progress]]
    vae_package: str | None = None

    @property
    def has_vae(self) -> bool:
        """Whether what the VAE needs is installed."""
        return self.vae_package is None or is_installed(self.vae_package)

    def pattern(self, plan: Plan, speed: Speed) -> Pattern:
        """Return the own steps that a speed computes."""
        num_steps = len(plan.costs)
        return fit_pattern(
            self.curve.distances(num_steps),
            warmup_steps=math.ceil(WARMUP_STEPS * num_steps / self.curve.num_steps),
            costs=plan.costs,
            share=self.shares[speed],
        )


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
