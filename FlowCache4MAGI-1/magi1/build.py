"""From the settings of a run to the objects that carry it out."""

from dataclasses import replace

import torch

from flowcache.compress import TokenLayout
from flowcache.reuse import ReusePolicy
from flowcache.runtime.cli import DTYPES
from flowcache.runtime.profile import Setting
from flowcache.runtime.settings import check_work, policy_maker, strategy_of
from magi1.config import PIXELS_PER_TOKEN, RunConfig
from magi1.sampler import KVBudget, Sampling
from magi1.schedule import SHIFT, Clip, Clock
from magi1.vae import Tiling

VAE_STRIDE = 8
"""Pixels per latent, in both directions."""


def clip_of(config: RunConfig, *, num_prefix: int) -> Clip:
    """Cut the video into chunks.

    Args:
        num_prefix: given latents.

    Raises:
        UserError: the video is too short or too long.
    """
    run = config.runtime_config
    clip = Clip(
        run.num_frames,
        num_prefix=num_prefix,
        is_image=config.image is not None,
        chunk_width=run.chunk_width,
        temporal_stride=run.temporal_downsample_factor,
    )
    check_work(num_chunks=clip.num_chunks, num_steps=run.num_steps)
    return clip


def sampling_of(config: RunConfig) -> Sampling:
    """Return the settings of the denoising loop."""
    return replace(
        Sampling.of(config),
        clean_pass=config.passes.clean_pass,
        nearly_clean_pass=config.passes.nearly_clean_pass,
        prev_share=config.passes.prev_share,
        quantity=config.reuse.predict,
        budget=budget_of(config),
        kv_storage=torch.device("cpu") if config.engine_config.kv_offload else None,
    )


def setting_of(config: RunConfig) -> Setting:
    """Return what a profile must fit."""
    run, guidance = config.runtime_config, sampling_of(config).guidance
    scales: list[float] = []
    if guidance is not None:
        scales = [*guidance.t_range, *guidance.prev_scales, *guidance.text_scales]
    return Setting(
        num_steps=run.num_steps, shift=SHIFT, lag=Clock.of(config).stage, guidance=scales
    )


def policy_of(config: RunConfig) -> ReusePolicy:
    """Return a new reuse policy; a clip has one for all its guidance passes."""
    return policy_maker(config.reuse)()


def layout_of(config: RunConfig) -> TokenLayout:
    """Return the DiT tokens of a latent frame and of a chunk."""
    run = config.runtime_config
    per_frame = (run.video_size_h // PIXELS_PER_TOKEN) * (run.video_size_w // PIXELS_PER_TOKEN)
    return TokenLayout(frame_tokens=per_frame, chunk_tokens=per_frame * run.chunk_width)


def budget_of(config: RunConfig) -> KVBudget | None:
    """Return the bound of the KV cache and the rule that picks what stays, or None."""
    strategy = strategy_of(config.kv)
    if strategy is None:
        return None
    return KVBudget(config.kv.total_chunks, strategy, layout_of(config))


def tiling_of(config: RunConfig) -> Tiling:
    """Return the tiles in which the VAE works."""
    return Tiling.of_rate(config.runtime_config.fps)


def latent_size(config: RunConfig) -> tuple[int, int]:
    """Return the rows and columns of a latent."""
    run = config.runtime_config
    return run.video_size_h // VAE_STRIDE, run.video_size_w // VAE_STRIDE


def dtype_of(config: RunConfig, device: torch.device) -> torch.dtype:
    """Return the type of the weights inside the blocks.

    `auto` is the JSON's `params_dtype` on CUDA, float32 on the CPU; 8-bit checkpoints work in
    bfloat16 everywhere.
    """
    if config.engine_config.fp8_quant:
        return torch.bfloat16
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    return config.model_config.dtype if device.type == "cuda" else torch.float32
