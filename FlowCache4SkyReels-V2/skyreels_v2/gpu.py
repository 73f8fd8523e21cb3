"""What is measured of SkyReels-V2: the 1.3B model at 544x960, 177 frames in two windows."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowcache.errors import UserError
from flowcache.gpu.benchmark import (
    TARGETS_OF_ALL,
    Benchmark,
    Demo,
    Fill,
    Growth,
    Line,
    Method,
    Size,
    Target,
    is_installed,
)
from flowcache.gpu.paths import AbsentError, Check, Outcome, relative_error
from flowcache.gpu.traces import Curve
from flowcache.runtime.model import Job, Source
from flowcache.runtime.ops import linear_flops, set_float32_precision
from flowcache.runtime.parallel import Ranks
from flowcache.wan import quantize
from flowcache.wan.dit import DiT, DiTConfig, blocks_flops
from flowcache.wan.given import Conditioning
from flowcache.wan.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE, VAE, latent_frames, released
from skyreels_v2.model import MODEL, released_sizes

RELEASED = released_sizes("df-1.3b-540p")
SIZES: dict[Size, DiTConfig] = {
    "paper": RELEASED,
    "tiny": DiTConfig(
        dim=48, ffn_dim=64, freq_dim=32, num_heads=4, num_layers=2, text_dim=24, text_len=16
    ),
}
TINY_VAE_WIDTH = 4
VAE_PACKAGE = "diffusers"
QUANTIZED = {"int8_weight": 0.05, "int8_dynamic": 0.05, "fp8_weight": 0.1, "fp8_dynamic": 0.1}
"""Tolerance of a velocity against unquantised float32: about three times what docs/speed.md
measured."""
_CHUNK_TOKENS = 5 * 34 * 60
"""Of five latent frames of 544 x 960 pixels."""
SEGMENTS = (range(5), range(1, 5))
"""Chunks that are denoised in each window of 177 frames; the second one's first chunk is given."""
NUM_STEPS, LAG, NUM_BRANCHES = 50, 5, 2


class GreyVAE:
    """Replaces the VAE where its package is missing: as many frames, all grey."""

    def __init__(self) -> None:
        self.model, self.has_begun = nn.Identity(), False

    def encode(self, pixels_B3THW: Tensor, /) -> Tensor:
        """Return latents of zeros."""
        batch, _, num_frames, height, width = pixels_B3THW.shape
        num_latents = latent_frames(num_frames)
        shape = (
            batch,
            RELEASED.out_dim,
            num_latents,
            height // SPATIAL_STRIDE,
            width // SPATIAL_STRIDE,
        )
        return pixels_B3THW.new_zeros(shape)

    def stream(self, _ranks: Ranks, /) -> "GreyVAE":
        """Begin a segment."""
        return GreyVAE()

    def decode(self, latents_BCFhw: Tensor, /) -> Tensor:
        """Return the frames of the next latents: one of a segment's first latent, else four."""
        batch, _, num_latents, height, width = latents_BCFhw.shape
        num_frames = TEMPORAL_STRIDE * num_latents
        if not self.has_begun:
            num_frames -= TEMPORAL_STRIDE - 1
        self.has_begun = True
        shape = (batch, 3, num_frames, height * SPATIAL_STRIDE, width * SPATIAL_STRIDE)
        return latents_BCFhw.new_zeros(shape)


def wan_dit(job: Job, fill: Fill) -> DiT:
    """Make the transformer, with 8-bit linears where the settings say so."""
    with torch.device("meta"):
        dit = DiT(job.source.sizes).to(job.dtype)
    fill(dit)
    if job.config.quantize is not None:
        quantize.quantize(dit, job.config.quantize, device=job.device, rest=job.dit_device)
    return dit


def wan_vae(job: Job, size: Size, fill: Fill) -> VAE | GreyVAE:
    """Make the VAE in float32, as loaded; a grey one where diffusers is missing."""
    if not is_installed(VAE_PACKAGE):
        return GreyVAE()
    network = released().model
    if size == "tiny":
        with torch.device("meta"):
            network = type(network)(base_dim=TINY_VAE_WIDTH)
    fill(network)
    made = VAE(network)
    made.num_strips = job.residence.vae_strips or 1
    return made


def wan_inputs(job: Job, draw: torch.Generator) -> Conditioning:
    """Make a random prompt for each guidance pass."""
    shape = (1, job.source.sizes.text_len, job.source.sizes.text_dim)
    prompts = {name: torch.randn(shape, generator=draw) for name in job.work.branches}
    return Conditioning({name: prompt.to(job.device) for name, prompt in prompts.items()})


def wan_checks(device: torch.device) -> list[Check]:
    """Return the paths that this model alone has."""
    return [
        Check(f"{mode} linears (SkyReels-V2)", partial(quantized, mode, device))
        for mode in QUANTIZED
    ]


def quantized(mode: Any, device: torch.device) -> Outcome:
    """Compare the velocity of a small model with 8-bit linears with that in float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = SIZES["tiny"]
    try:
        quantize.check(mode, sizes, device=device, dtype=dtype)
    except UserError as error:
        raise AbsentError(str(error)) from None
    set_float32_precision(dtype)
    torch.manual_seed(0)
    dit = DiT(sizes).eval().requires_grad_(False)
    inputs = (torch.randn(1, 16, 5, 8, 8), torch.full((1, 5), 500.0), torch.randn(1, 16, 24))
    with torch.no_grad():
        wanted = dit(*inputs)
        dit = dit.to(dtype)
        quantize.quantize(dit, mode, device=device)
        found = dit(*(x.to(device) for x in inputs))
    return Outcome(relative_error(found, wanted), QUANTIZED[mode])


def causal_flops(num_chunks: int) -> int:
    """Count one forward of so many chunks, each seeing itself and those before it.

    As published, every chunk projects the prompt's keys and values anew; norms are not counted.

    Source: the published spreadsheet, sheet SkyreelsV2-Chunkwise.
    """
    sizes, chunk = RELEASED, _CHUNK_TOKENS
    text = sizes.num_layers * linear_flops(sizes.text_len, d_in=sizes.dim, d_out=2 * sizes.dim)
    seen = range(chunk, (num_chunks + 1) * chunk, chunk)
    return sum(blocks_flops(sizes, queries=chunk, keys=keys) + text for keys in seen)


def full_flops() -> int:
    """Count one forward of a window of 5 chunks with full attention, prompts as `causal_flops`."""
    chunk, window = _CHUNK_TOKENS, 5 * _CHUNK_TOKENS
    text = causal_flops(1) - blocks_flops(RELEASED, queries=chunk, keys=chunk)
    return blocks_flops(RELEASED, queries=window, keys=window) + 5 * text


def active_only_flops() -> int:
    """Count a run that forwards active chunks only, and the given one once per branch."""
    steps = sum(
        causal_flops(chunk + 1) - causal_flops(chunk) for chunks in SEGMENTS for chunk in chunks
    )
    return NUM_BRANCHES * (NUM_STEPS * steps + causal_flops(1))


def _frames(num_frames: int) -> tuple[str, ...]:
    return ("prompt=-", f"num_frames={num_frames}")


def _one_window(num_frames: int) -> tuple[str, ...]:
    return (*_frames(num_frames), f"base_num_frames={num_frames}", "overlap_history=null")


FAST, LEAN = "FlowCache-fast", "FlowCache-fast, keys on the host"
ALL_KEYS = Line("all keys and values", "vanilla_causal", _one_window)
BENCHMARK = Benchmark(
    model=MODEL,
    title="SkyReels-V2 1.3B, 544x960, 177 frames, 50 steps, guidance",
    methods=(
        Method("vanilla", "vanilla"),
        Method("vanilla causal", "vanilla_causal"),
        Method("FlowCache-slow", "flowcache_slow", "slow"),
        Method(FAST, "flowcache_fast", "fast"),
        Method("FlowCache-slow + KV compression", "flowcache_kvcompress", "slow"),
        # what --memory-limit 24GB chooses: the cache alone takes 18.8 GB
        Method(LEAN, "flowcache_fast", "fast", ("kv_on_host=true",), is_lean=True),
    ),
    checked=(FAST, "FlowCache-slow + KV compression", "vanilla"),
    targets=(
        *TARGETS_OF_ALL,
        Target("speedup", FAST, least=5.5, says="faster than vanilla, end to end"),
        Target("peak_bytes", LEAN, most=24e9, says="peak memory, text encoder elsewhere"),
    ),
    # Source: the range that FlowCache gives for SkyReels-V2; its shape in between is assumed
    curve=Curve(NUM_STEPS, ((1, 0.003), (49, 0.17))),
    shares={"slow": 36e15 / active_only_flops(), "fast": 28e15 / active_only_flops()},
    thin={"paper": (5,), "tiny": ()},
    steps={
        "paper": {"num_steps": NUM_STEPS, "ar_step": LAG},
        "tiny": {"num_steps": 10, "ar_step": 1},
    },
    settings={
        "paper": ("dtype=bfloat16",),
        "tiny": (
            *("dtype=float32", "height=32", "width=48", "num_frames=21"),
            *("base_num_frames=13", "overlap_history=5", "causal_block_size=1"),
            "reuse.rescale=none",  # there are no coefficients for such a width
        ),
    },
    sources=lambda size: Source(size, sizes=SIZES[size]),
    vae_package=VAE_PACKAGE,
    num_layers=lambda job: job.source.sizes.num_layers,
    with_layers=lambda config, source, number: (
        config,
        replace(source, sizes=replace(source.sizes, num_layers=number)),
    ),
    costs=lambda job: (1.0,) * job.config.num_steps,
    stored=lambda job: (
        (job.config.causal_block_size, job.work.frame_tokens, job.source.sizes.dim),
        job.dtype,
    ),
    make_dit=wan_dit,
    make_vae=wan_vae,
    make_inputs=wan_inputs,
    growth=Growth(
        title="SkyReels-V2 1.3B, 544x960",
        lines=(
            ALL_KEYS,
            replace(ALL_KEYS.plus(("kv.compress=importance",)), name="KV compression"),
            Line("windows of 97 frames", "vanilla_causal", _frames, is_measured=False),
        ),
        fewer_steps=("num_steps=10", "ar_step=2"),
        planned=(97, 177, 337, 657, 977, 1297, 1617, 1937),
        measured=(97, 177, 337, 497),
    ),
    demo=Demo(
        title="SkyReels-V2",
        fast="flowcache_fast",
        compressed="flowcache_kvcompress",
        # three chunks of 80 tokens in one window
        short=(
            *("ar_step=2", "num_frames=57", "base_num_frames=57"),
            "overlap_history=null",
        ),
        keys_on_host=("kv_on_host=true",),
        strips=("vae_strips=3",),
        half_vae=("vae_dtype=bfloat16",),
        half_tolerance=0.06,
    ),
    checks=wan_checks,
)
