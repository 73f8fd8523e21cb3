"""Every setting of a run: the JSON config of the release, and what that has no field for.

Field names, sections and units of the JSON are the release's own: a field that is missing or
unknown is an error that names it. Source: SandAI-org/MAGI-1, example/*/*_config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from flowcache.bounds import (
    IS_PATH,
    MAX_FRAMES,
    Bounds,
    Fps,
    Frames,
    NumSteps,
    OneOf,
    Pixels,
    Place,
    Seed,
    Share,
    Threshold,
    check_values,
)
from flowcache.compress import KVRule, PlainStrategy, strategy_of
from flowcache.errors import UserError
from flowcache.policies import ReuseRule, check_guidance, check_reuse
from flowcache.predict import PREDICTORS
from flowcache.runtime.config import (
    MAX_PROCESSES,
    KernelName,
    NumBlocks,
    ParallelRule,
    QuantizeName,
    TextQuantizeName,
    check_prompt,
    describe,
    load_config,
    parse_limit,
)
from flowcache.tokens import PUBLISHED_FOR_LATENTS, TokenRule, check_tokens
from magi1.released import FIELDS, PRESETS

if TYPE_CHECKING:
    import torch

PIXELS_PER_LATENT, PIXELS_PER_TOKEN = 8, 16
"""Rows (and columns) of pixels: of a latent, and of a token, which is 2 x 2 latents."""

PROJECTION_GROUPS = 8
"""Groups in which attention outputs lie before the joint projection, for any head count.

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

Quantity: TypeAlias = Annotated[str, OneOf(("latent_update", "velocity", "clean"))]
"""What a reused chunk gets again: the last change of its latents, as published, with the step size
of then; or the last velocity, times the step size of now; or the velocity that leads to the clean
estimate of then."""


# The release's JSON -------------------------------------------------------------------------------


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
        import torch

        return getattr(torch, self.params_dtype.removeprefix("torch."))

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
class ReleaseConfig:
    """One JSON config of the release."""

    model_config: ModelConfig
    runtime_config: RuntimeConfig
    engine_config: EngineConfig


def read_config(path: str | Path, *, overrides: Sequence[str] = ()) -> ReleaseConfig:
    """Read a JSON config and check it; `overrides` are texts as in `section.field=value`."""
    config = load_config(ReleaseConfig, [Path(path)], overrides=overrides)
    check_model(config.model_config, source=str(path))
    check_runtime(config.runtime_config, config.engine_config, source=str(path))
    return config


def check_model(model: ModelConfig, *, source: str) -> None:
    """Check that the sizes of a transformer fit together and are of a released architecture."""
    check_values(model, source=source)
    supported: dict[str, Any] = {
        "model_name": "videodit_ardf",
        "apply_layernorm_1p": True,
        "patch_size": 2,
        "t_patch_size": 1,
        "xattn_cond_hidden_ratio": 1.0,
        "cond_gating_ratio": 1.0,
    }
    heads, width, channels = model.num_attention_heads, model.hidden_size, model.in_channels
    is_split_evenly = not (model.half_channel_vae and channels % 2)
    rules = (
        *(
            (name, getattr(model, name) == value, f"only {value} is supported")
            for name, value in supported.items()
        ),
        ("num_query_groups", heads % model.num_query_groups == 0, f"must divide {heads} heads"),
        ("kv_channels", heads * model.kv_channels == width, f"{heads} heads must make {width}"),
        ("kv_channels", model.kv_channels % 8 == 0, "must be a multiple of 8 (rotary positions)"),
        ("hidden_size", width % PROJECTION_GROUPS == 0, f"must divide by {PROJECTION_GROUPS}"),
        ("out_channels", model.out_channels == channels, f"must be in_channels, {channels}"),
        ("in_channels", is_split_evenly, "must be even for two halves"),
    )
    _check(source, model, rules)


def check_runtime(run: RuntimeConfig, engine: EngineConfig, *, source: str) -> None:
    """Check that sizes, step counts and guidance are such as the model can work with."""
    check_values(run, source=source)
    check_values(engine, source=source)
    passes = 1 if engine.distill or engine.fp8_quant else 3
    kind = "distilled" if passes == 1 else "base"
    ranges, lows, num_scales = run.noise2clean_kvrange, run.cfg_t_range, len(run.cfg_t_range)
    is_device = re.fullmatch(r"cpu|cuda(:\d+)?", run.t5_device) is not None
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
        # no timestep is left out
        (
            "cfg_t_range",
            lows[:1] == (0,) and lows == tuple(sorted(set(lows))),
            "must rise, from 0 on",
        ),
        ("prev_chunk_scales", len(run.prev_chunk_scales) == num_scales, scale_rule),
        ("text_scales", len(run.text_scales) == num_scales, scale_rule),
        ("t5_device", is_device, "must be cpu, cuda or cuda:0"),
    )
    _check(source, run, rules)


def _check(source: str, section: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raise for the first (field, whether its rule holds, rule) that does not hold."""
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"{source}: {name} is {getattr(section, name)!r}, but {rule}")


# A run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenChoice:
    """Which special tokens go before the prompt; `base.yaml` says what each asks for."""

    static: bool = False
    dynamic: bool = False
    borderness: bool = False
    quality: bool = True
    three_d_model: bool = False
    two_d_anime: bool = False
    duration: bool = True
    negative: bool = False

    def names(self) -> list[str]:
        """Return the chosen tokens but that of duration, in the order they are put in front."""
        style = ("static", "dynamic", "borderness", "quality", "three_d_model", "two_d_anime")
        return [name for name in style if getattr(self, name)]


@dataclass(frozen=True)
class PassConfig:
    """Extra passes through the model."""

    clean_pass: bool = True
    nearly_clean_pass: bool = True
    prev_share: Share = 0.7


@dataclass(frozen=True)
class ReuseConfig(ReuseRule):
    """When a chunk is recomputed, and what it gets when it is not."""

    threshold: Threshold = 0.01
    compute_last_step: bool = False
    predict: Quantity = "latent_update"
    tokens: TokenRule = PUBLISHED_FOR_LATENTS


@dataclass(frozen=True)
class KVConfig(KVRule):
    """How many chunks the KV cache holds, and which clean tokens stay."""

    compress: PlainStrategy = "none"
    total_chunks: Annotated[int, Bounds(1, MAX_FRAMES)] = 5


@dataclass(frozen=True)
class RunConfig(ReleaseConfig):
    """One video: a JSON config of the release, under its own names, and more."""

    FLAT_NAMES: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **{key: f"runtime_config.{key}" for key in ("seed", "num_steps", "num_frames", "fps")},
            "height": "runtime_config.video_size_h",
            "width": "runtime_config.video_size_w",
        }
    )

    ABSENT: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "vae_strips": "whose VAE decodes tiles anyway: leave it out",
            "vae_dtype": "whose VAE has the type of the transformer: set dtype",
            "vae_compile": "whose VAE is run as it is: leave it out",
            "text_on_host": "which asks for it otherwise: set runtime_config.t5_device=cpu",
            "kv_on_host": "which asks for it otherwise: set engine_config.kv_offload=true",
        }
    )
    """Settings of other models: why they are none here, and what to do instead."""

    prompt: str = ""
    image: Place = None
    video: Place = None
    prefix_frames: Annotated[int | None, Bounds(1, MAX_FRAMES)] = 32
    special_tokens: Place = None
    tokens: TokenChoice = field(default_factory=TokenChoice)
    passes: PassConfig = field(default_factory=PassConfig)
    guidance: Annotated[float | None, Bounds(1, 1000)] = None
    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    parallel: ParallelRule = field(default_factory=ParallelRule)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    offload: bool = False
    memory_limit: str = "auto"
    blocks_on_device: NumBlocks = None
    quantize: QuantizeName | None = None
    text_quantize: TextQuantizeName | None = None
    embedding_cache: Place = None
    attention_kernel: KernelName = "auto"
    compile: bool | None = None
    overlap: bool | None = None

    @property
    def text_scales(self) -> tuple[float, ...]:
        """The scales of the text: `guidance` is the largest of them, the others keep their share.

        Example: guidance 5 makes the release's 7.5, 7.5, 0 into 5, 5, 0.
        """
        scales = self.runtime_config.text_scales
        if self.guidance is None:
            return scales
        return tuple(self.guidance * scale / max(scales) for scale in scales)

    def lines(self) -> list[str]:
        """Return a line for every setting, with type, value and meaning."""
        return describe(self, commented=[FIELDS, PRESETS / "base.yaml"])

    def __post_init__(self) -> None:
        check_values(self)
        check_model(self.model_config, source="model_config")
        check_runtime(self.runtime_config, self.engine_config, source="runtime_config")
        check_prompt("prompt", self.prompt)
        check_reuse(self.reuse, num_steps=self.runtime_config.num_steps, least_warmup=0)
        check_guidance(self.reuse, num_passes=self.runtime_config.cfg_number)
        self._check_tokens()
        self._check_scales()
        self._check_given()
        self._check_decoding()
        self._check_kv()
        parse_limit(self.memory_limit)
        if self.engine_config.fp8_quant and self.dtype not in ("auto", "bfloat16"):
            raise UserError(
                f"dtype is {self.dtype}, but an 8-bit checkpoint (fp8_quant) works in bfloat16: "
                "leave dtype at auto"
            )
        if self.engine_config.fp8_quant and self.quantize is not None:
            raise UserError(
                f"quantize is {self.quantize}, but the weights of an 8-bit checkpoint (fp8_quant) "
                "are 8-bit already: leave quantize at null, or take a checkpoint in bfloat16"
            )

    def _check_tokens(self) -> None:
        rule, num_steps = self.reuse, self.runtime_config.num_steps
        level = PREDICTORS[rule.predict].level
        check_tokens(rule, num_steps=num_steps, level=level, compress=self.kv.compress)

    def _check_scales(self) -> None:
        if self.guidance is None:
            return
        if self.runtime_config.cfg_number == 1:
            raise UserError(
                f"guidance is {self.guidance:g}, but a distilled model makes one pass, which has "
                "its guidance built in: leave guidance out"
            )
        if max(self.runtime_config.text_scales) <= 0:
            raise UserError(
                "guidance scales runtime_config.text_scales, of which none is above 0: set those"
            )

    def _check_decoding(self) -> None:
        # late: most wrong settings are refused before torch is loaded
        from magi1.vae import RELEASED, Tiling, check_decoding

        check_decoding(
            Tiling.of_rate(self.runtime_config.fps),
            chunk_width=self.runtime_config.chunk_width,
            temporal_stride=RELEASED.patch_length,  # whether the VAE's is another is checked later
        )

    def _check_given(self) -> None:
        stride = self.runtime_config.temporal_downsample_factor
        if self.image is not None and self.video is not None:
            raise UserError(
                "image and video cannot both be the start: give image for a first frame, or video "
                "for a clip that goes on"
            )
        if self.prefix_frames is not None and (
            self.prefix_frames < stride or self.prefix_frames % stride
        ):
            raise UserError(
                f"prefix_frames must be a positive multiple of {stride} (the frames of a latent) "
                f"or null, not {self.prefix_frames}"
            )

    def _check_kv(self) -> None:
        window = self.runtime_config.window_size
        if strategy_of(self.kv) is not None and self.kv.total_chunks <= window:
            raise UserError(
                f"kv.total_chunks must be above runtime_config.window_size {window}, so that a "
                f"clean chunk stays beside the active ones, not {self.kv.total_chunks}"
            )
