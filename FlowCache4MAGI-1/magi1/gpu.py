"""What is measured of MAGI-1: the distilled 4.5B model at 720x720, 240 frames, one pass."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

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
)
from flowcache.gpu.paths import Check, Outcome, relative_error
from flowcache.gpu.traces import Curve
from flowcache.runtime.model import Job
from magi1.config import read_config
from magi1.dit import DiT, published_block_flops, published_clip_flops, set_precision
from magi1.fp8 import FP8, emulated_product, has_fp8_gemm, product
from magi1.model import MODEL
from magi1.pipeline import Conditioning
from magi1.released import CONFIGS
from magi1.schedule import Clip, Clock, visible
from magi1.vae import RELEASED, VAE, ViTVAE
from magi1.work import latent_size, layout_of, tiling_of

RELEASED_NAME = "4.5B_distill"
WINDOWS = (5, 4, 3, 2)
"""The released KV window: chunks seen in each quarter of a chunk's steps."""
CHUNK_TOKENS = 6 * 45 * 45
"""Of 6 latent frames of 720 x 720 pixels."""
TINY_VAE = replace(
    RELEASED,
    video_size=32,
    video_length=12,
    embed_dim=16,
    depth=1,
    num_heads=2,
    mlp_ratio=2,
    use_final_proj=True,
)
FP8_PRODUCT = 2**-7
"""Tolerance of an 8-bit product: both sides round to bfloat16 once; 8-bit inputs are the same."""


def costs(job: Job) -> tuple[float, ...]:
    """Return the costs of all own steps where the cache holds five chunks, as published."""
    run, tokens = job.config.runtime_config, layout_of(job.config).chunk_tokens
    clock = Clock(run.num_steps, run.window_size, WINDOWS)
    return tuple(
        sum(
            published_block_flops(
                job.config.model_config,
                queries=tokens,
                keys=tokens * len(visible(chunk, clock.reach(step))),
            )
            for chunk in job.work.segments[0].cut.generated
        )
        for step in range(run.num_steps)
    )


def stored(job: Job) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape and type of a stored latent update."""
    width, channels = job.work.segments[0].cut.chunk_width, job.config.model_config.latent_channels
    return (width, channels, *latent_size(job.config)), torch.float32


def magi1_dit(job: Job, fill: Fill) -> DiT:
    """Make the transformer."""
    with torch.device("meta"):
        dit = DiT(job.config.model_config, is_fp8=job.config.engine_config.fp8_quant)
    set_precision(dit, job.dtype)
    fill(dit)
    return dit


def magi1_vae(job: Job, size: Size, fill: Fill) -> VAE:
    """Make the VAE; with `offload` it waits on the CPU, as where it is loaded."""
    with torch.device("meta"):
        network = ViTVAE(RELEASED if size == "paper" else TINY_VAE).to(job.dtype)
    fill(network)
    scale = job.config.runtime_config.scale_factor
    return VAE(
        network.to("cpu") if job.placed.offload else network,
        scale=scale,
        tiling=tiling_of(job.config),
    )


def magi1_inputs(job: Job, draw: torch.Generator) -> Conditioning:
    """Make a random prompt."""
    shape = (job.work.text_tokens, job.config.model_config.caption_channels)
    return Conditioning(torch.randn(shape, generator=draw).to(job.device))


def magi1_checks(device: torch.device) -> list[Check]:
    """Return the paths that this model alone has."""
    return [Check("8-bit product (MAGI-1)", partial(fp8_product, device))]


def fp8_product(device: torch.device) -> Outcome:
    """Compare the product of 8-bit matrices with the one that is emulated in float32."""
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


def clip_flops(
    *, num_frames: int = 240, reaches: Sequence[int] = (), nearly_clean_pass: bool
) -> int:
    """Count one clip as published: 720 x 720, 64 steps, window of 4 chunks."""
    return published_clip_flops(
        read_config(CONFIGS / f"{RELEASED_NAME}.json").model_config,
        clip=Clip(num_frames),
        clock=Clock(num_steps=64, window=4, reaches=tuple(reaches)),
        chunk_tokens=CHUNK_TOKENS,
        nearly_clean_pass=nearly_clean_pass,
    )


def _clip(num_frames: int) -> tuple[str, ...]:
    return ("prompt=-", f"runtime_config.num_frames={num_frames}")


def _all_steps(num_frames: int) -> tuple[str, ...]:
    return (*_clip(num_frames), "reuse.policy=vanilla")


def _square(side: int) -> tuple[str, ...]:
    return (f"runtime_config.video_size_h={side}", f"runtime_config.video_size_w={side}")


NO_REUSE = clip_flops(reaches=WINDOWS, nearly_clean_pass=False)
FAST = "FlowCache-fast + KV compression"
BENCHMARK = Benchmark(
    model=MODEL,
    title="MAGI-1 4.5B distilled, 720x720, 240 frames, 64 steps",
    methods=(
        Method("vanilla", "vanilla"),
        Method("vanilla, KV window", "vanilla_window"),
        Method(
            "vanilla, neither pass",
            "vanilla_no_nearly_clean",
            settings=("passes.clean_pass=false",),
        ),
        Method("FlowCache-slow", "flowcache_slow_nocompress", "slow"),
        Method("FlowCache-fast", "flowcache_fast_nocompress", "fast"),
        Method("FlowCache-slow + KV compression", "flowcache_slow", "slow"),
        Method(FAST, "flowcache_fast", "fast"),
    ),
    checked=(FAST, "FlowCache-fast", "vanilla"),
    targets=(
        *TARGETS_OF_ALL,
        Target("speedup", FAST, least=2.2, says="faster than vanilla, end to end"),
        Target("peak_bytes", FAST, most=24e9, says="peak memory, text encoder elsewhere"),
    ),
    # Source: FlowCache (arXiv 2602.10825), figure 2, read off to 10 %
    curve=Curve(
        64,
        (
            *((1, 0.002), (8, 0.005), (16, 0.0094), (24, 0.016)),
            *((32, 0.025), (44, 0.055), (52, 0.10), (60, 0.22)),
        ),
    ),
    shares={"slow": 161e15 / NO_REUSE, "fast": 140e15 / NO_REUSE},
    thin={"paper": (4, 8), "tiny": ()},
    steps={
        "paper": {"runtime_config.num_steps": 64},
        "tiny": {"runtime_config.num_steps": 16},
    },
    # the cache stays on the GPU, where it fits
    settings={
        "paper": (
            *("runtime_config.num_frames=240", *_square(720), "engine_config.kv_offload=false"),
        ),
        "tiny": (
            *("runtime_config.num_frames=168", "runtime_config.video_size_h=32"),
            *("runtime_config.video_size_w=48", "engine_config.kv_offload=false"),
            *("model_config.num_layers=2", "model_config.hidden_size=32"),
            *("model_config.ffn_hidden_size=48", "model_config.num_attention_heads=4"),
            *("model_config.num_query_groups=2", "model_config.kv_channels=8"),
            *("model_config.caption_channels=12", "model_config.caption_max_length=60"),
        ),
    },
    sources=lambda _size: MODEL.find(RELEASED_NAME, is_dry=True),
    vae_package=None,
    num_layers=lambda job: job.config.model_config.num_layers,
    with_layers=lambda config, source, number: (
        replace(config, model_config=replace(config.model_config, num_layers=number)),
        source,
    ),
    costs=costs,
    stored=stored,
    make_dit=magi1_dit,
    make_vae=magi1_vae,
    make_inputs=magi1_inputs,
    growth=Growth(
        title="MAGI-1 4.5B, 720x720",
        lines=(
            Line("all keys and values", "flowcache_fast_nocompress", _all_steps),
            Line("KV compression", "flowcache_fast", _all_steps),
        ),
        fewer_steps=("runtime_config.num_steps=16",),
        planned=(96, 192, 384, 768, 1152, 1536, 1920),
        measured=(96, 192, 288, 480),
    ),
    demo=Demo(
        title="MAGI-1",
        fast="flowcache_fast_nocompress",
        compressed="flowcache_fast",
        # six chunks of 96 tokens: one more than the compressed cache holds
        short=("runtime_config.num_frames=144", "engine_config.kv_offload=false"),
        keys_on_host=("engine_config.kv_offload=true",),
        half_vae=(),
        half_tolerance=0.03,
    ),
    checks=magi1_checks,
)
