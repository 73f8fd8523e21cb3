"""SkyReels-V2: the 1.3B model at 544x960, 177 frames in two windows, two guidance branches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from flops import skyreels_active_only
from torch import Tensor

from flowcache.attention import Kernel, choose_kernels
from flowcache.policies import Policies
from flowcache.runtime.compile import Compilation, should_compile
from flowcache.runtime.model import Progress, Request, Source
from flowcache.runtime.ops import set_float32_precision
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import read_settings
from flowcache.runtime.stats import RunStats
from flowcache.wan.dit import DiT, DiTConfig, compiled_parts
from flowcache.wan.vae import TEMPORAL_STRIDE, VAE
from gpu.subject import (
    TARGETS_OF_ALL,
    Method,
    Plan,
    Size,
    Subject,
    Target,
    fill,
    is_installed,
)
from gpu.traces import SKYREELS_CURVE
from skyreels_v2.checkpoint import released_sizes
from skyreels_v2.config import RunConfig
from skyreels_v2.model import MODEL
from skyreels_v2.pipeline import Conditioning, generate
from skyreels_v2.work import VAE_STRIDE, branches_of, work_of

STEPS = {"paper": 50, "tiny": 10}
LAG = {"paper": 5, "tiny": 1}
DIT: Mapping[Size, DiTConfig] = {
    "paper": released_sizes("df-1.3b-540p"),
    "tiny": DiTConfig(
        dim=48, ffn_dim=64, freq_dim=32, num_heads=4, num_layers=2, text_dim=24, text_len=16
    ),
}
SETTINGS: Mapping[Size, tuple[str, ...]] = {
    "paper": ("dtype=bfloat16",),
    "tiny": (
        *("dtype=float32", "height=32", "width=48", "num_frames=21"),
        *("base_num_frames=13", "overlap_history=5", "causal_block_size=1"),
    ),
}
"""Beside the presets, whose values are those of the published experiments."""
TINY_VAE_WIDTH = 4
VAE_PACKAGE = "diffusers"


class GreyVAE:
    """Stands in for the VAE where its package is missing: as many frames, all grey."""

    def __init__(self, *, has_begun: bool = False) -> None:
        self.has_begun = has_begun

    def encode(self, pixels_B3THW: Tensor, /) -> Tensor:
        """Return latents of zeros."""
        batch, _, num_frames, height, width = pixels_B3THW.shape
        num_latents = (num_frames - 1) // TEMPORAL_STRIDE + 1
        shape = (
            batch,
            DIT["paper"].out_dim,
            num_latents,
            height // VAE_STRIDE,
            width // VAE_STRIDE,
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
        shape = (batch, 3, num_frames, height * VAE_STRIDE, width * VAE_STRIDE)
        return latents_BCFhw.new_zeros(shape)


@dataclass(frozen=True)
class Models:
    """Transformer, VAE, and what stands for encoded prompts."""

    dit: DiT
    vae: VAE | GreyVAE
    """Grey pixels where the package that the VAE needs is missing."""
    conditioning: Conditioning


def plan(method: Method, size: Size, thin: int, settings: Sequence[str]) -> Plan:
    """Plan a method's run; see `Subject.plan`."""
    overrides = [
        *("prompt=-", f"num_steps={STEPS[size] // thin}", f"ar_step={LAG[size] // thin}"),
        *(*SETTINGS[size], *method.settings, *settings),
    ]
    request = Request(preset=method.preset, overrides=overrides)
    config = read_settings(MODEL, request, Source(size))
    dtype = getattr(torch, config.dtype)
    made = work_of(config, DIT[size], dtype=dtype)
    return Plan(
        config=config,
        ticks={number: own.ticks for number, own in enumerate(made.segments)},
        branches=made.branches,
        flops=made.flops,
        num_chunks=made.num_chunks,
        costs=(1.0,) * config.num_steps,
        stored_shape=(config.causal_block_size, made.frame_tokens, DIT[size].dim),
        stored_dtype=dtype,
        attention=made.attention,
        num_text=DIT[size].text_len,
    )


def build(made: Plan, size: Size, device: torch.device) -> Models:
    """Make random weights: the transformer in the run's dtype, the VAE in float32, as loaded."""
    config: RunConfig = made.config
    dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        dit = DiT(DIT[size]).to(dtype)
    fill(dit, device=device)
    set_float32_precision(dtype)
    if should_compile(config.compile, device):
        dit.parts = compiled_parts()
    draw = torch.Generator().manual_seed(0)
    shape = (1, DIT[size].text_len, DIT[size].text_dim)
    text = {name: torch.randn(shape, generator=draw).to(device) for name in branches_of(config)}
    return Models(dit, build_vae(size, device), Conditioning(text))


def build_vae(size: Size, device: torch.device) -> VAE | GreyVAE:
    """Make random weights in float32, as loaded; nothing where diffusers is missing."""
    if not is_installed(VAE_PACKAGE):
        return GreyVAE()
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with torch.device("meta"):
        model = AutoencoderKLWan(**({} if size == "paper" else {"base_dim": TINY_VAE_WIDTH}))
    fill(model, device=device)
    return VAE(model)


def choose(models: Models, made: Plan) -> tuple[Kernel, Kernel]:
    """Take the fastest attention kernels; see `Subject.choose`."""
    config: RunConfig = made.config
    dit = models.dit
    dit.kernel, dit.cross_kernel = choose_kernels(
        dit.head.modulation.device,
        dtype=dit.dtype,
        shape=made.attention,
        num_text=made.num_text,
        wanted=config.attention_kernel,
    )
    return dit.kernel, dit.cross_kernel


def compilation(models: Models) -> Compilation | None:
    """Say how compiling the blocks went."""
    return models.dit.parts.compilation


def play(models: Models, made: Plan, stats: RunStats, policies: Policies) -> Iterator[Progress]:
    """Make the video in memory."""
    return generate(
        models.dit, models.vae, made.config, models.conditioning, stats=stats, policies=policies
    )


FAST, LEAN = "FlowCache-fast", "FlowCache-fast, keys on the host"
SUBJECT: Subject[Models] = Subject(
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
    targets=(
        *TARGETS_OF_ALL,
        Target("speedup", FAST, least=5.5, says="faster than vanilla, end to end"),
        Target("peak_bytes", LEAN, most=24e9, says="peak memory, text encoder elsewhere"),
    ),
    thin={"paper": (5,), "tiny": ()},
    curve=SKYREELS_CURVE,
    shares={"slow": 36e15 / skyreels_active_only(), "fast": 28e15 / skyreels_active_only()},
    plan=plan,
    build=build,
    choose=choose,
    compilation=compilation,
    play=play,
    vae_package=VAE_PACKAGE,
)
