"""From the settings of a run to the objects that carry it out."""

from collections.abc import Callable
from functools import partial

from flowcache.compress import TokenLayout
from flowcache.errors import UserError
from flowcache.kv import Compression, peak_tokens
from flowcache.reuse import Rescale, ReusePolicy, identity, polynomial
from flowcache.runtime import settings
from flowcache.runtime.profile import Setting
from flowcache.wan.dit import PATCH, DiTConfig
from skyreels_v2.calibration import COEFFICIENTS, coefficients_for
from skyreels_v2.config import RunConfig
from skyreels_v2.sampler import Sampling
from skyreels_v2.window import Segment, Window, cut_segments, cut_window, latent_frames

VAE_STRIDE = 8
"""Pixels per latent, in both directions."""


def segments_of(config: RunConfig) -> list[Segment]:
    """Cut the run into segments.

    Raises:
        UserError: frames, windows and overlap don't fit each other, or the video is too long.
    """
    window = latent_frames(min(config.num_frames, config.base_num_frames))
    step = max(window - latent_frames(config.overlap_history or 1), 1)
    num_segments = -(-latent_frames(config.num_frames) // step)
    num_chunks = num_segments * -(-window // config.causal_block_size)
    settings.check_work(num_chunks=num_chunks, num_steps=config.num_steps)
    return cut_segments(
        config.num_frames,
        base=config.base_num_frames,
        overlap=config.overlap_history,
        continues_video=config.video is not None,
    )


def window_of(config: RunConfig, segment: Segment, *, num_segments: int, is_i2v: bool) -> Window:
    """Cut one segment into chunks, given frames included."""
    num_prefix = latent_frames(segment.prefix_pixels) if segment.prefix_pixels else 0
    if segment.index == 0 and config.image is not None and not is_i2v:
        num_prefix = 1
    return cut_window(
        segment.num_frames,
        chunk_frames=config.causal_block_size,
        num_prefix=num_prefix,
        has_end=config.end_image is not None and segment.index == num_segments - 1,
    )


def sampling_of(config: RunConfig) -> Sampling:
    """Return the settings of the denoising loop."""
    return Sampling(
        num_steps=config.num_steps,
        shift=config.shift,
        guidance=config.guidance,
        lag=config.ar_step,
        attention=config.attention,
        clean_pass=config.clean_pass,
        fps=config.fps,
        addnoise=config.addnoise_condition,
        signal=config.reuse.signal,
        quantity=config.reuse.predict,
        batch_branches=batches_branches(config),
        together_tokens=config.together_tokens,
    )


def batches_branches(config: RunConfig) -> bool:
    """Tell whether the guidance branches are computed in one batch."""
    if config.batch_branches is not None:
        return config.batch_branches
    is_full = config.attention == "full"
    frames = latent_frames(config.base_num_frames) if is_full else config.causal_block_size
    tokens = len(branches_of(config)) * frames * tokens_per_frame(config)
    return tokens <= config.together_tokens


def setting_of(config: RunConfig) -> Setting:
    """Return what a profile must fit."""
    return Setting(
        num_steps=config.num_steps,
        shift=config.shift,
        lag=config.ar_step,
        guidance=[config.guidance] if len(branches_of(config)) > 1 else [],
    )


def branches_of(config: RunConfig) -> tuple[str, ...]:
    """Return the guidance passes by name."""
    return ("cond", "uncond") if config.guidance > 1 else ("cond",)


def rescale_for(config: RunConfig, dit: DiTConfig) -> tuple[str, Rescale]:
    """Return the name and the function that turn a distance into what is accumulated.

    Raises:
        UserError: no coefficients are known for this model, or the name is unknown.
    """
    name = config.reuse.rescale
    if name == "none" or (name == "auto" and config.reuse.signal == "content"):
        return "none", identity
    if name == "auto":
        found = coefficients_for(
            dit, signal=config.reuse.signal, height=config.height, width=config.width
        )
        if found is None:
            raise UserError(
                f"reuse.policy={config.reuse.policy} has no calibrated coefficients for a model of "
                f"width {dit.dim}: set reuse.rescale=none, or to one of {', '.join(COEFFICIENTS)}"
            )
        name = found
    if name not in COEFFICIENTS:
        raise UserError(
            f"reuse.rescale={name} is unknown: use auto, none, or one of {', '.join(COEFFICIENTS)}"
        )
    return name, polynomial(COEFFICIENTS[name])


def policy_maker(config: RunConfig, dit: DiTConfig) -> Callable[[], ReusePolicy]:
    """Return what makes the reuse policy of one branch of one window."""
    if config.reuse.policy not in ("flowcache", "teacache"):
        return settings.policy_maker(config.reuse)
    _, rescale = rescale_for(config, dit)
    return settings.policy_maker(config.reuse, rescale=rescale)


def compression_of(config: RunConfig, *, frame_tokens: int) -> Compression | None:
    """Return the KV budget in tokens and the rule that picks what stays, or None.

    Raises:
        UserError: the budget is below what the rule needs.
    """
    strategy = settings.strategy_of(config.kv)
    if strategy is None:
        return None
    layout = token_layout(config, frame_tokens=frame_tokens)
    budget = budget_of(config, layout)
    return Compression(budget, partial(strategy.keep, budget=budget, layout=layout))


def token_layout(config: RunConfig, *, frame_tokens: int) -> TokenLayout:
    """Return how tokens group into frames and chunks."""
    return TokenLayout(
        frame_tokens=frame_tokens, chunk_tokens=frame_tokens * config.causal_block_size
    )


def budget_of(config: RunConfig, layout: TokenLayout) -> int:
    """Return how many clean tokens a compressed KV cache keeps."""
    return int(config.kv.budget_chunks * layout.chunk_tokens)


def tokens_per_frame(config: RunConfig) -> int:
    """Return the DiT tokens of one latent frame.

    Raises:
        UserError: the resolution is not a multiple of what VAE and patches need.
    """
    multiple = VAE_STRIDE * PATCH[1]
    for name, value in (("height", config.height), ("width", config.width)):
        if value < multiple or value % multiple:
            below = max(value // multiple, 1) * multiple
            raise UserError(
                f"{name} must be a multiple of {multiple} pixels, not {value}; use {below} or "
                f"{below + multiple}"
            )
    return (config.height // multiple) * (config.width // multiple)


def kv_capacity(config: RunConfig, window: Window) -> int:
    """Return the tokens that each layer's KV cache of a branch holds at most; 0 without one."""
    if config.attention == "full":
        return 0
    per_frame = tokens_per_frame(config)
    compression = compression_of(config, frame_tokens=per_frame)
    tokens = {c: len(window.chunks[c]) * per_frame for c in window.generated}
    return peak_tokens(
        sampling_of(config).ticks(window),
        chunk_tokens=tokens,
        given=sum(len(chunk) for chunk in window.chunks[: window.num_given]) * per_frame,
        budget=None if compression is None else compression.budget,
    )
