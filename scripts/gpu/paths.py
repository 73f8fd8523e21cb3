"""Every way in which a run may compute, against the same run on the CPU in float32.

The runs are those of the demos, short, with made-up prompts and the same noise everywhere. What is
compared are latents, so that no VAE blurs a difference, or pixels where decoding is the point. An
error is `|found - wanted| / |wanted|`, by Euclidean norms (dimensionless).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowcache.attention import SDPA, AttentionShape, Kernel, available_kernels, choose_kernels
from flowcache.errors import UserError
from flowcache.runtime.compiling import should_compile
from flowcache.runtime.model import Progress
from flowcache.runtime.precision import set_float32_precision
from flowcache.runtime.ranks import Ranks
from flowcache.runtime.stats import RunStats
from gpu import demos
from gpu.demos import Demo

CPU = torch.device("cpu")
FLOAT32 = 2e-4
"""Tolerance of a run in float32: sums in another order err by 1e-6 per operation, some hundred of
which follow each other; products in TF32 alone would err by 5e-4 each."""
BFLOAT16 = {"skyreels_v2": 0.06, "magi1": 0.03}
"""Twice the error that bfloat16 makes on a CPU in the same runs."""
KERNEL = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-16}
"""Of an attention kernel: 2 units of rounding in 16 bits; 128 in float32, over 1440 keys."""
FP8_PRODUCT = 2**-7
"""Of an 8-bit product: both sides round to bfloat16 once; 8-bit inputs are the same."""
QUANTIZED = {"int8_weight": 0.05, "int8_dynamic": 0.05, "fp8_weight": 0.1, "fp8_dynamic": 0.1}
"""Of a velocity against unquantised float32: about three times what docs/speed.md measured."""
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
    checks = attention_checks(device)
    checks.append(Check("8-bit product (MAGI-1)", partial(fp8_product, device)))
    checks += [
        Check(f"{mode} linears (SkyReels-V2)", partial(quantized, mode, device))
        for mode in QUANTIZED
    ]
    for model in demos.DEMOS:
        checks += demo_checks(model, device)
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
    """Compare a kernel with PyTorch's on the CPU; keys are the start of a longer cache.

    Raises:
        AbsentError: it can't do any of the shapes.
    """
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
    return Outcome(max(errors.values()), KERNEL[dtype], note)


# 8 bits -------------------------------------------------------------------------------------------


def fp8_product(device: torch.device) -> Outcome:
    """Compare MAGI-1's product of 8-bit matrices with the one that is emulated in float32."""
    from magi1.fp8 import FP8, emulated_product, has_fp8_gemm, product

    torch.manual_seed(0)
    x, weight = torch.randn(96, 256).to(FP8), torch.randn(128, 256).to(FP8)
    scales = {"x_scale": torch.tensor(0.02), "w_scale": torch.tensor(0.5)}
    wanted = emulated_product(x, weight, **scales)
    found = product(
        x.to(device), weight.to(device), **{name: s.to(device) for name, s in scales.items()}
    )
    return Outcome(
        relative_error(found, wanted),
        FP8_PRODUCT,
        "" if has_fp8_gemm(device) else "emulated: this device has no 8-bit products",
    )


def quantized(mode: Any, device: torch.device) -> Outcome:
    """Compare the velocity of a small SkyReels-V2 with 8-bit linears with that in float32.

    Raises:
        AbsentError: torchao is missing, or the device has no such products.
    """
    from flowcache.wan import quantize
    from flowcache.wan.dit import DiT
    from gpu.skyreels_v2 import DIT

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        quantize.check(mode, DIT["tiny"], device=device, dtype=dtype)
    except UserError as error:
        raise AbsentError(str(error)) from None
    set_float32_precision(dtype)
    torch.manual_seed(0)
    dit = DiT(DIT["tiny"]).eval().requires_grad_(False)
    inputs = (torch.randn(1, 16, 5, 8, 8), torch.full((1, 5), 500.0), torch.randn(1, 16, 24))
    with torch.no_grad():
        wanted = dit(*inputs)
        dit = dit.to(dtype)
        quantize.quantize(dit, mode, device=device)
        found = dit(*(x.to(device) for x in inputs))
    return Outcome(relative_error(found, wanted), QUANTIZED[mode])


# The demos ----------------------------------------------------------------------------------------


class Latents:
    """Stands in for a VAE and gives latents back as they are, in place of pixels."""

    def __init__(self) -> None:
        """Have a network without weights, which may be moved."""
        self.model = nn.Identity()

    def encode(self, pixels_B3THW: Tensor, /) -> Tensor:
        """Refuse: nothing is given."""
        raise AssertionError(f"nothing is given, but {tuple(pixels_B3THW.shape)} is encoded")

    def decode(self, latents_BCFhw: Tensor, ranks: Ranks | None = None, /) -> Tensor:
        """Return a copy."""
        return latents_BCFhw.clone()

    def stream(self, ranks: Ranks, /) -> "Latents":
        """Begin a segment."""
        return self

    def to(self, device: torch.device | str, /) -> "Latents":
        """Stay."""
        return self


@dataclass(frozen=True)
class Way:
    """How a demo is run.

    Attributes:
        preset: of the model.
        settings: of the path that is checked; the reference is without them.
        dtype: of the run.
        is_decoded: whether pixels are compared, not latents.
        is_compiled: whether blocks are compiled.
    """

    preset: str
    settings: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    is_decoded: bool = False
    is_compiled: bool = False


@dataclass
class References:
    """Runs on the CPU in float32, each made once."""

    demo: Demo
    num_steps: int
    made: dict[tuple[str, bool], Tensor] = field(default_factory=dict)

    def get(self, way: Way) -> Tensor:
        """Return the run that a way is compared with."""
        key = (way.preset, way.is_decoded)
        if key not in self.made:
            plain = Way(way.preset, is_decoded=way.is_decoded)
            self.made[key] = make(self.demo, plain, CPU, num_steps=self.num_steps)
        return self.made[key]


def demo_checks(model: str, device: torch.device) -> list[Check]:
    """Return the checks that run a demo."""
    demo = demos.DEMOS[model]()
    references = References(demo, NUM_STEPS[device.type])
    half, is_cuda = torch.bfloat16, device.type == "cuda"
    compiled = Way(demo.fast, dtype=half if is_cuda else torch.float32, is_compiled=True)
    ways = {
        "demo, float32": Way(demo.fast),
        "demo, bfloat16": Way(demo.fast, dtype=half),
        "demo, every step": Way(demo.vanilla),
        "KV compression": Way(demo.compressed),
        "keys on the host, prefetched": Way(demo.fast, demo.keys_on_host),
        "transformer and VAE take turns": Way(demo.fast, ("offload=true",)),
        "decoded, float32": Way(demo.fast, ("overlap=false",), is_decoded=True),
        "decoded while denoising goes on": Way(demo.fast, ("overlap=true",), is_decoded=True),
        f"compiled blocks, {'bfloat16' if is_cuda else 'float32'}": compiled,
    }
    return [
        Check(f"{demo.title}: {name}", partial(compare, way, device, references, BFLOAT16[model]))
        for name, way in ways.items()
    ]


def compare(
    way: Way, device: torch.device, references: References, half_tolerance: float
) -> Outcome:
    """Run a demo and compare it.

    Args:
        half_tolerance: of a run in 16 bits.

    Raises:
        AbsentError: a package is missing, or blocks can't be compiled.
    """
    wanted = references.get(way)
    found = make(references.demo, way, device, num_steps=references.num_steps)
    tolerance = FLOAT32 if way.dtype == torch.float32 else half_tolerance
    return Outcome(relative_error(found, wanted), tolerance)


@torch.no_grad()
def make(demo: Demo, way: Way, device: torch.device, *, num_steps: int) -> Tensor:
    """Run a demo on a device; return its latents or pixels.

    Raises:
        AbsentError: a package is missing, or blocks can't be compiled.
    """
    if way.is_decoded and not demo.has_vae:
        raise AbsentError(f"the VAE needs {demo.vae_package}, which is not installed")
    config = demo.read(way.preset, (f"{demo.steps_key}={num_steps}", *way.settings), way.dtype)
    set_float32_precision(way.dtype)
    dit = demo.load(config, way.dtype, device)
    if device.type == "cuda":
        kernels = choose_kernels(
            device, dtype=way.dtype, shape=demo.attention(dit), num_text=demo.num_text(dit)
        )
        dit.kernel, dit.cross_kernel = kernels
    if way.is_compiled:
        _compile(dit, demo, device)
    codec = demo.load_vae(config, device) if way.is_decoded else Latents()
    shown = demo.play(dit, codec, config, RunStats(device), same_noise(device))
    result = torch.cat([frames.cpu() for frames in _frames(shown)], dim=1)
    if way.is_compiled and dit.parts.compilation.failure is not None:
        raise RuntimeError(f"not compiled: {dit.parts.compilation.failure}")
    return result


def _compile(dit: Any, demo: Demo, device: torch.device) -> None:
    try:
        should_compile(True, device)
    except UserError as error:
        raise AbsentError(str(error)) from None
    dit.parts = demo.compiled_parts()


def _frames(shown: Iterator[Progress]) -> Iterator[Tensor]:
    """Yield what a run shows; only at its end, so that decoding may go on beside the ticks."""
    laters = [progress.later for progress in shown if progress.later is not None]
    yield from (later.get().frames for later in laters)


def same_noise(device: torch.device) -> Callable[[Sequence[int], torch.dtype], Tensor]:
    """Return noise that is the same on all devices and in all dtypes, to the last bit."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        noise = torch.randn(tuple(shape), generator=generator).bfloat16()
        return noise.to(device=device, dtype=dtype)

    return draw


def describe_error(error: BaseException) -> str:
    """Return the first line of what went wrong."""
    with suppress(IndexError):
        return str(error).strip().splitlines()[0]
    return type(error).__name__
