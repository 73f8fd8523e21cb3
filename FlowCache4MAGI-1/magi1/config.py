"""The JSON configs of the MAGI-1 release, read as they are into frozen dataclasses.

Field names, sections and units are the release's own: a field that is missing or unknown is an
error that names it. Source: SandAI-org/MAGI-1, example/*/*_config.json.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch

from flowcache.bounds import (
    IS_PATH,
    MAX_FRAMES,
    Bounds,
    Fps,
    Frames,
    NumSteps,
    Pixels,
    Seed,
    Share,
    check_values,
)
from flowcache.errors import UserError
from flowcache.runtime.config import load_config
from flowcache.runtime.parallel import MAX_PROCESSES

PIXELS_PER_TOKEN = 16
"""Rows (and columns) of pixels of one token: VAE stride 8 times patch size 2."""

PROJECTION_GROUPS = 8
"""Groups in which attention outputs lie before the joint projection, whatever the head count.

Source: the released weights, which were trained with eight key/value heads.
"""

Width: TypeAlias = Annotated[int, Bounds(1, 2**17)]
"""Channels, or heads; the widest layer of a released model, an MLP's, has 16384."""
Factor: TypeAlias = Annotated[float, Bounds(0, 1000, is_open=True)]
Ratio: TypeAlias = Annotated[float, Bounds(0, 16, is_open=True)]
Scales: TypeAlias = Annotated[tuple[float, ...], Bounds(-1000, 1000)]
Processes: TypeAlias = Annotated[int, Bounds(1, MAX_PROCESSES)]
PlaceName: TypeAlias = Annotated[str, IS_PATH]

ParamsDtype = Literal["torch.bfloat16", "torch.float16", "torch.float32"]
_DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transformer."""

    model_name: str
    num_layers: Annotated[int, Bounds(1, 256)]
    hidden_size: Width
    ffn_hidden_size: Width
    num_attention_heads: Width
    num_query_groups: Width
    """Key/value heads."""
    kv_channels: Width
    """Width of an attention head."""
    layernorm_epsilon: Share
    apply_layernorm_1p: bool
    x_rescale_factor: Factor
    """Latents are multiplied by it on the way in, the velocity is divided by it."""
    half_channel_vae: bool
    """Whether the model sees every latent channel twice (24B)."""
    params_dtype: ParamsDtype
    patch_size: Width
    t_patch_size: Width
    in_channels: Width
    out_channels: Width
    cond_hidden_ratio: Ratio
    caption_channels: Width
    caption_max_length: Annotated[int, Bounds(1, 100_000)]
    xattn_cond_hidden_ratio: Ratio
    cond_gating_ratio: Ratio
    gated_linear_unit: bool

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights inside the blocks."""
        return _DTYPES[self.params_dtype]

    @property
    def condition_width(self) -> int:
        """Width of the timestep and caption condition."""
        return int(self.hidden_size * self.cond_hidden_ratio)

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        return self.in_channels // 2 if self.half_channel_vae else self.in_channels


@dataclass(frozen=True)
class RuntimeConfig:
    """What is generated, and how it is denoised."""

    cfg_number: Annotated[int, Bounds(1, 3)]
    """Guidance passes: 3 (base) or 1 (distilled)."""
    cfg_t_range: Annotated[tuple[float, ...], Bounds(0, 1)]
    """Lower ends of the timestep ranges of the two scale lists."""
    prev_chunk_scales: Scales
    text_scales: Scales
    noise2clean_kvrange: Annotated[tuple[int, ...], Bounds(1, MAX_FRAMES)]
    """Chunks that a chunk sees, itself included, from its noisiest steps on; empty: all."""
    clean_chunk_kvrange: Annotated[int, Bounds(-1, MAX_FRAMES)]
    """The same for a clean chunk; -1: the last entry above."""
    clean_t: Annotated[float, Bounds(0, 1, is_open=True)]
    seed: Seed
    num_frames: Frames
    video_size_h: Pixels
    video_size_w: Pixels
    num_steps: NumSteps
    window_size: NumSteps
    """Chunks denoised at once."""
    fps: Fps
    chunk_width: Annotated[int, Bounds(1, 10_000)]
    """Latent frames of a chunk."""
    load: PlaceName
    """Folder that holds `inference_weight*`."""
    t5_pretrained: PlaceName
    """Folder that holds `t5-v1_1-xxl`."""
    t5_device: str
    vae_pretrained: PlaceName
    scale_factor: Factor
    """Factor between the VAE's latents and the model's."""
    temporal_downsample_factor: Annotated[int, Bounds(1, 64)]


@dataclass(frozen=True)
class EngineConfig:
    """How the weights are stored and the run is divided."""

    distributed_backend: str
    distributed_timeout_minutes: Annotated[int, Bounds(0, 1_000_000)]
    pp_size: Processes
    cp_size: Processes
    cp_strategy: str
    ulysses_overlap_degree: Processes
    fp8_quant: bool
    distill_nearly_clean_chunk_threshold: Share
    """Timestep of the oldest chunk above which distilled models see it a second time."""
    shortcut_mode: str
    """Which three of the twelve-step model's quarters are short."""
    distill: bool
    kv_offload: bool
    enable_cuda_graph: bool


@dataclass(frozen=True)
class MagiConfig:
    """One JSON config of the release."""

    model_config: ModelConfig
    runtime_config: RuntimeConfig
    engine_config: EngineConfig


def read_config(path: str | Path, *, overrides: Sequence[str] = ()) -> MagiConfig:
    """Read a JSON config of the release and check that it makes sense.

    Args:
        overrides: `section.field=value` texts that win over the file.

    Raises:
        UserError: a field is missing, unknown, of the wrong type, or breaks a rule; it is named.
    """
    config = load_config(MagiConfig, [Path(path)], overrides=overrides)
    check_model(config.model_config, source=str(path))
    check_runtime(config.runtime_config, config.engine_config, source=str(path))
    return config


def check_model(model: ModelConfig, *, source: str) -> None:
    """Check the sizes of a transformer.

    Raises:
        UserError: one is out of bounds, does not divide another, or is not of a released model.
    """
    check_values(model, source=source)
    supported: dict[str, Any] = {
        "model_name": "videodit_ardf",
        "apply_layernorm_1p": True,
        "patch_size": 2,
        "t_patch_size": 1,
        "xattn_cond_hidden_ratio": 1.0,
        "cond_gating_ratio": 1.0,
    }
    _check(
        source,
        model,
        (
            (name, getattr(model, name) == value, f"only {value} is supported")
            for name, value in supported.items()
        ),
    )
    heads, width, channels = model.num_attention_heads, model.hidden_size, model.in_channels
    rules = (
        ("num_query_groups", heads % model.num_query_groups == 0, f"must divide {heads} heads"),
        ("kv_channels", heads * model.kv_channels == width, f"{heads} heads must make {width}"),
        ("kv_channels", model.kv_channels % 8 == 0, "must be a multiple of 8 (rotary positions)"),
        ("hidden_size", width % PROJECTION_GROUPS == 0, f"must divide by {PROJECTION_GROUPS}"),
        ("out_channels", model.out_channels == channels, f"must be in_channels, {channels}"),
        (
            "in_channels",
            not (model.half_channel_vae and channels % 2),
            "must be even for two halves",
        ),
    )
    _check(source, model, rules)


def check_runtime(run: RuntimeConfig, engine: EngineConfig, *, source: str) -> None:
    """Check what is to be generated.

    Raises:
        UserError: a size, step count or guidance setting that the model cannot work with.
    """
    check_values(run, source=source)
    check_values(engine, source=source)
    passes = 1 if engine.distill or engine.fp8_quant else 3
    kind = "distilled" if passes == 1 else "base"
    ranges, num_scales = run.noise2clean_kvrange, len(run.cfg_t_range)
    size_rule = f"must be a positive multiple of {PIXELS_PER_TOKEN} pixels"
    range_rule = f"must divide by the {len(ranges)} entries of noise2clean_kvrange"
    scale_rule = f"needs {num_scales} entries, as cfg_t_range has"
    rules = (
        ("cfg_number", run.cfg_number == passes, f"must be {passes} for a {kind} model"),
        ("video_size_h", run.video_size_h % PIXELS_PER_TOKEN == 0, size_rule),
        ("video_size_w", run.video_size_w % PIXELS_PER_TOKEN == 0, size_rule),
        ("num_steps", run.num_steps % run.window_size == 0, f"must divide by {run.window_size}"),
        ("num_steps", not ranges or run.num_steps % len(ranges) == 0, range_rule),
        (
            "clean_chunk_kvrange",
            run.clean_chunk_kvrange == -1 or run.clean_chunk_kvrange > 0,
            "must be a count from 1 on, or -1 for the last entry of noise2clean_kvrange",
        ),
        ("cfg_t_range", _is_rising(run.cfg_t_range), "must rise, from 0 on"),
        ("prev_chunk_scales", len(run.prev_chunk_scales) == num_scales, scale_rule),
        ("text_scales", len(run.text_scales) == num_scales, scale_rule),
        ("t5_device", _is_device(run.t5_device), "must be cpu, cuda or cuda:0"),
    )
    _check(source, run, rules)


def _is_rising(lows: Sequence[float]) -> bool:
    """Tell whether the lower ends of ranges leave no timestep out."""
    return bool(lows) and lows[0] == 0 and list(lows) == sorted(set(lows))


def _is_device(name: str) -> bool:
    return re.fullmatch(r"cpu|cuda(:\d+)?", name) is not None


def _check(source: str, section: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raise for the first (field, whether its rule holds, rule) that does not hold."""
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"{source}: {name} is {getattr(section, name)!r}, but {rule}")
