"""The JSON configs of the MAGI-1 release, read as they are into frozen dataclasses.

Field names, sections and units are the release's own: a field that is missing or unknown is an
error that names it. Source: SandAI-org/MAGI-1, example/*/*_config.json.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from flowcache.config import load_config
from flowcache.errors import UserError
from flowcache.weights import MAX_LAYERS, MAX_SIZE

PIXELS_PER_TOKEN = 16
"""Rows (and columns) of pixels of one token: VAE stride 8 times patch size 2."""

PROJECTION_GROUPS = 8
"""Groups in which attention outputs lie before the joint projection, whatever the head count.

Source: the released weights, which were trained with eight key/value heads.
"""

ParamsDtype = Literal["torch.bfloat16", "torch.float16", "torch.float32"]
_DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transformer."""

    model_name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    kv_channels: int
    """Width of an attention head."""
    layernorm_epsilon: float
    apply_layernorm_1p: bool
    x_rescale_factor: float
    """Latents are multiplied by it on the way in, the velocity is divided by it."""
    half_channel_vae: bool
    """Whether the model sees every latent channel twice (24B)."""
    params_dtype: ParamsDtype
    patch_size: int
    t_patch_size: int
    in_channels: int
    out_channels: int
    cond_hidden_ratio: float
    caption_channels: int
    caption_max_length: int
    xattn_cond_hidden_ratio: float
    cond_gating_ratio: float
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

    cfg_number: int
    """Guidance passes: 3 (base) or 1 (distilled)."""
    cfg_t_range: tuple[float, ...]
    """Lower ends of the timestep ranges of the two scale lists."""
    prev_chunk_scales: tuple[float, ...]
    text_scales: tuple[float, ...]
    noise2clean_kvrange: tuple[int, ...]
    """Chunks that a chunk sees, itself included, from its noisiest steps on; empty: all."""
    clean_chunk_kvrange: int
    """The same for a clean chunk; -1: the last entry above."""
    clean_t: float
    seed: int
    num_frames: int
    video_size_h: int
    video_size_w: int
    num_steps: int
    window_size: int
    """Chunks denoised at once."""
    fps: int
    chunk_width: int
    """Latent frames of a chunk."""
    load: str
    """Folder that holds `inference_weight*`."""
    t5_pretrained: str
    """Folder that holds `t5-v1_1-xxl`."""
    t5_device: str
    vae_pretrained: str
    scale_factor: float
    """Factor between the VAE's latents and the model's."""
    temporal_downsample_factor: int


@dataclass(frozen=True)
class EngineConfig:
    """How the weights are stored and the run is divided."""

    distributed_backend: str
    distributed_timeout_minutes: int
    pp_size: int
    cp_size: int
    cp_strategy: str
    ulysses_overlap_degree: int
    fp8_quant: bool
    distill_nearly_clean_chunk_threshold: float
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
        UserError: one is not positive, does not divide another, or is not of a released model.
    """
    positive = (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
        *("num_query_groups", "kv_channels", "in_channels", "caption_channels"),
        *("caption_max_length", "x_rescale_factor", "cond_hidden_ratio"),
    )
    _check(
        source, model, ((name, getattr(model, name) > 0, "must be positive") for name in positive)
    )
    limits = {name: MAX_LAYERS if name == "num_layers" else MAX_SIZE for name in positive}
    _check(
        source,
        model,
        (
            (name, getattr(model, name) <= limit, f"at most {limit} is supported")
            for name, limit in limits.items()
        ),
    )
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
    positive = ("num_frames", "num_steps", "window_size", "fps", "chunk_width", "scale_factor")
    _check(source, run, ((name, getattr(run, name) > 0, "must be positive") for name in positive))
    passes = 1 if engine.distill or engine.fp8_quant else 3
    kind = "distilled" if passes == 1 else "base"
    ranges, num_scales = run.noise2clean_kvrange, len(run.cfg_t_range)
    size_rule = f"must be a positive multiple of {PIXELS_PER_TOKEN} pixels"
    range_rule = f"must divide by the {len(ranges)} entries of noise2clean_kvrange"
    scale_rule = f"needs {num_scales} entries, as cfg_t_range has"
    rules = (
        ("cfg_number", run.cfg_number == passes, f"must be {passes} for a {kind} model"),
        ("video_size_h", _is_size(run.video_size_h), size_rule),
        ("video_size_w", _is_size(run.video_size_w), size_rule),
        ("num_steps", run.num_steps % run.window_size == 0, f"must divide by {run.window_size}"),
        ("num_steps", not ranges or run.num_steps % len(ranges) == 0, range_rule),
        ("noise2clean_kvrange", all(count > 0 for count in ranges), "must hold counts from 1 on"),
        (
            "clean_chunk_kvrange",
            run.clean_chunk_kvrange == -1 or run.clean_chunk_kvrange > 0,
            "must be a count from 1 on, or -1 for the last entry of noise2clean_kvrange",
        ),
        ("cfg_t_range", _is_rising(run.cfg_t_range), "must rise, from 0 on"),
        ("prev_chunk_scales", len(run.prev_chunk_scales) == num_scales, scale_rule),
        ("text_scales", len(run.text_scales) == num_scales, scale_rule),
        ("t5_device", _is_device(run.t5_device), "must be cpu, cuda or cuda:0"),
        ("clean_t", 0 < run.clean_t <= 1, "must lie in 0..1, where 1 is clean"),
    )
    _check(source, run, rules)


def _is_rising(lows: Sequence[float]) -> bool:
    """Tell whether the lower ends of ranges leave no timestep out."""
    return bool(lows) and lows[0] == 0 and list(lows) == sorted(set(lows))


def _is_device(name: str) -> bool:
    return re.fullmatch(r"cpu|cuda(:\d+)?", name) is not None


def _is_size(pixels: int) -> bool:
    return pixels > 0 and pixels % PIXELS_PER_TOKEN == 0


def _check(source: str, section: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raise for the first (field, whether its rule holds, rule) that does not hold."""
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"{source}: {name} is {getattr(section, name)!r}, but {rule}")
