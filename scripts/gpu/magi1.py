"""MAGI-1: the distilled 4.5B model at 720x720, 240 frames in ten chunks, one pass."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from flops import MAGI1_WINDOWS, magi1_clip

from flowcache.attention import Kernel, choose_kernels
from flowcache.policies import Policies
from flowcache.runtime.compile import Compilation, should_compile
from flowcache.runtime.model import Progress, Request
from flowcache.runtime.ops import set_float32_precision
from flowcache.runtime.run import read_settings
from flowcache.runtime.stats import RunStats
from gpu.subject import TARGETS_OF_ALL, Method, Plan, Size, Subject, Target, fill
from gpu.traces import MAGI1_CURVE
from magi1.config import RunConfig
from magi1.dit import DiT, compiled_parts, published_block_flops, set_precision
from magi1.model import ASSUMED_TOKENS, MODEL
from magi1.pipeline import Conditioning, generate_clip
from magi1.sampler import ALL_BRANCHES
from magi1.schedule import Clip, Clock, visible
from magi1.vae import RELEASED, VAE, VAEConfig, ViTVAE
from magi1.work import clip_work, dtype_of, latent_size, layout_of, tiling_of

RELEASED_NAME = "4.5B_distill"
STEPS = {"paper": 64, "tiny": 16}
TEXT_TOKENS = {"paper": ASSUMED_TOKENS, "tiny": 7}
SETTINGS: Mapping[Size, tuple[str, ...]] = {
    "paper": (
        *("runtime_config.num_frames=240", "runtime_config.video_size_h=720"),
        *("runtime_config.video_size_w=720", "engine_config.kv_offload=false"),
    ),
    "tiny": (
        *("runtime_config.num_frames=168", "runtime_config.video_size_h=32"),
        *("runtime_config.video_size_w=48", "engine_config.kv_offload=false"),
        *("model_config.num_layers=2", "model_config.hidden_size=32"),
        *("model_config.ffn_hidden_size=48", "model_config.num_attention_heads=4"),
        *("model_config.num_query_groups=2", "model_config.kv_channels=8"),
        *("model_config.caption_channels=12", "model_config.caption_max_length=60"),
    ),
}
"""Beside the release's own JSON. The cache stays on the GPU, where it fits."""
VAE_SIZES: Mapping[Size, VAEConfig] = {
    "paper": RELEASED,
    "tiny": VAEConfig(
        video_size=32,
        video_length=12,
        z_chans=16,
        embed_dim=16,
        depth=1,
        num_heads=2,
        mlp_ratio=2,
        qkv_bias=True,
        ln_in_attn=True,
        conv_last_layer=True,
        use_final_proj=True,
    ),
}


@dataclass(frozen=True)
class Models:
    """Transformer, VAE, and what stands for an encoded prompt."""

    dit: DiT
    vae: VAE
    conditioning: Conditioning


def plan(method: Method, size: Size, thin: int, settings: Sequence[str]) -> Plan:
    """Plan a method's run; see `Subject.plan`."""
    overrides = [
        *("prompt=-", f"runtime_config.num_steps={STEPS[size] // thin}"),
        *(*SETTINGS[size], *method.settings, *settings),
    ]
    config = read_settings(MODEL, Request(method.preset, RELEASED_NAME, overrides))
    made = clip_work(
        config,
        num_prefix=0,
        prompt_tokens=TEXT_TOKENS[size],
        has_special_tokens=False,
        dtype=config.model_config.dtype,
    )
    (segment,), (height, width) = made.segments, latent_size(config)
    clip = segment.cut
    return Plan(
        config=config,
        ticks={0: segment.ticks},
        branches=(ALL_BRANCHES,),
        flops=made.flops,
        num_chunks=clip.num_chunks,
        costs=published_costs(config, clip=clip),
        stored_shape=(clip.chunk_width, config.model_config.latent_channels, height, width),
        stored_dtype=torch.float32,
        attention=made.attention,
        num_text=made.text_tokens,
    )


def published_costs(config: RunConfig, *, clip: Clip) -> tuple[float, ...]:
    """Return what each own step of all chunks costs where the cache holds five chunks."""
    run, tokens = config.runtime_config, layout_of(config).chunk_tokens
    clock = Clock(run.num_steps, run.window_size, MAGI1_WINDOWS)
    return tuple(
        sum(
            published_block_flops(
                config.model_config,
                queries=tokens,
                keys=tokens * len(visible(chunk, clock.reach(step))),
            )
            for chunk in clip.generated
        )
        for step in range(run.num_steps)
    )


def build(made: Plan, size: Size, device: torch.device) -> Models:
    """Make random weights in the types in which the released ones are loaded."""
    config: RunConfig = made.config
    dtype = dtype_of(config, device)
    with torch.device("meta"):
        dit, vae = DiT(config.model_config), ViTVAE(VAE_SIZES[size])
    set_precision(dit, dtype)
    vae.to(dtype)
    for model in (dit, vae):
        fill(model, device=device)
    set_float32_precision(dtype)
    if should_compile(config.compile, device):
        dit.parts = compiled_parts()
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(TEXT_TOKENS[size], config.model_config.caption_channels, generator=draw)
    codec = VAE(vae, scale=config.runtime_config.scale_factor, tiling=tiling_of(config))
    return Models(dit, codec, Conditioning(text.to(device)))


def choose(models: Models, made: Plan) -> tuple[Kernel, Kernel]:
    """Take the fastest attention kernels; see `Subject.choose`."""
    config: RunConfig = made.config
    dit = models.dit
    dit.kernel, dit.cross_kernel = choose_kernels(
        models.vae.device,
        dtype=dit.dtype,
        shape=made.attention,
        num_text=made.num_text,
        wanted=config.attention_kernel,
    )
    return dit.kernel, dit.cross_kernel


def compilation(models: Models) -> Compilation | None:
    """Say how compiling the layers went."""
    return models.dit.parts.compilation


def play(models: Models, made: Plan, stats: RunStats, policies: Policies) -> Iterator[Progress]:
    """Make the video in memory."""
    return generate_clip(
        models.dit, models.vae, made.config, models.conditioning, stats=stats, policies=policies
    )


NO_REUSE = magi1_clip(reaches=MAGI1_WINDOWS, nearly_clean_pass=False)
FAST = "FlowCache-fast + KV compression"
SUBJECT: Subject[Models] = Subject(
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
    targets=(
        *TARGETS_OF_ALL,
        Target("speedup", FAST, least=2.2, says="faster than vanilla, end to end"),
        Target("peak_bytes", FAST, most=24e9, says="peak memory, text encoder elsewhere"),
    ),
    thin={"paper": (4, 8), "tiny": ()},
    curve=MAGI1_CURVE,
    shares={"slow": 161e15 / NO_REUSE, "fast": 140e15 / NO_REUSE},
    plan=plan,
    build=build,
    choose=choose,
    compilation=compilation,
    play=play,
)
