"""Every setting of a run, with its type and default; presets and the command line change them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from flowcache.bounds import (
    MAX_FRAMES,
    MAX_STEPS,
    Bounds,
    Fps,
    Frames,
    NumSteps,
    Pixels,
    Place,
    Seed,
    check_values,
)
from flowcache.compress import KVRule, PlainStrategy
from flowcache.errors import UserError
from flowcache.policies import guidance_of
from flowcache.predict import PREDICTORS
from flowcache.runtime.config import (
    KernelName,
    NumBlocks,
    NumStrips,
    ParallelRule,
    QuantizeName,
    TextQuantizeName,
    check_prompt,
    describe,
    parse_limit,
)
from flowcache.tokens import check_tokens
from flowcache.wan.calibration import ReuseConfig, check_rule
from skyreels_v2.released import PRESETS

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The negative prompt of Wan 2.1, with which SkyReels-V2 is used."""

MAX_ADDNOISE = 60
MAX_SCALE = 1000
"""Of shift and guidance, far above what makes a picture."""


@dataclass(frozen=True)
class KVConfig(KVRule):
    """How many clean tokens the KV cache keeps, and which."""

    compress: PlainStrategy = "none"
    budget_chunks: Annotated[float, Bounds(0, MAX_FRAMES)] = 1.0


@dataclass(frozen=True)
class RunConfig:
    """One video."""

    prompt: str = ""
    negative_prompt: str = NEGATIVE_PROMPT
    image: Place = None
    end_image: Place = None
    video: Place = None
    height: Pixels = 544
    width: Pixels = 960
    num_frames: Frames = 97
    base_num_frames: Frames = 97
    overlap_history: Annotated[int | None, Bounds(1, MAX_FRAMES)] = None
    fps: Fps = 24
    seed: Seed = 0
    noise_dtype: Literal["auto", "model", "float32"] = "auto"
    num_steps: NumSteps = 50
    shift: Annotated[float, Bounds(0, MAX_SCALE, is_open=True)] = 8.0
    guidance: Annotated[float, Bounds(0, MAX_SCALE)] = 6.0
    ar_step: Annotated[int, Bounds(0, MAX_STEPS)] = 0
    causal_block_size: Annotated[int, Bounds(1, MAX_FRAMES)] = 1
    addnoise_condition: Annotated[int, Bounds(0, MAX_ADDNOISE)] = 0
    attention: Literal["full", "causal"] = "full"
    clean_pass: bool = False
    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    parallel: ParallelRule = field(default_factory=ParallelRule)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    batch_branches: bool | None = None
    together_tokens: Annotated[int, Bounds(0, 10**9)] = 4096
    offload: bool = False
    text_on_host: bool = False
    kv_on_host: bool = False
    blocks_on_device: NumBlocks = None
    vae_strips: NumStrips = None
    memory_limit: str = "auto"
    embedding_cache: Place = None
    attention_kernel: KernelName = "auto"
    compile: bool | None = None
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    vae_compile: bool = False
    quantize: QuantizeName | None = None
    text_quantize: TextQuantizeName | None = None
    overlap: bool | None = None

    def lines(self) -> list[str]:
        """Return a line for every setting, with type, value and meaning."""
        return describe(self, commented=[PRESETS / "base.yaml"])

    def __post_init__(self) -> None:
        check_values(self)
        check_prompt("prompt", self.prompt)
        num_passes = 2 if self.guidance > 1 else 1
        check_rule(self.reuse, num_steps=self.num_steps, num_passes=num_passes)
        check_tokens(
            self.reuse,
            num_steps=self.num_steps,
            level=PREDICTORS[self.reuse.predict].level,
            compress=self.kv.compress,
        )
        parse_limit(self.memory_limit)
        self._check_causal()

    def _check_causal(self) -> None:
        tokens = self.reuse.tokens
        if tokens.is_on and PREDICTORS[self.reuse.predict].level == "step":
            raise UserError(
                f"reuse.tokens.choice={tokens.choice} with a solver of higher order needs a "
                "velocity of every token: set reuse.predict to residual, velocity or clean, not "
                f"{self.reuse.predict}"
            )
        if self.attention == "causal":
            return
        if tokens.is_on:
            raise UserError(
                f"reuse.tokens.choice={tokens.choice} needs a KV cache, which attention=full does "
                "not have: set attention=causal"
            )
        if self.reuse.kind.needs_forecasts:
            raise UserError(
                f"reuse.policy={self.reuse.policy} compares forecasts chunk by chunk: set "
                "attention=causal, or another policy"
            )
        if guidance_of(self.reuse).is_on:
            raise UserError(
                "reuse.guidance_every and reuse.guidance_steps work chunk by chunk: set "
                "attention=causal, or leave them out"
            )
        if self.kv.compress != "none":
            raise UserError(
                f"kv.compress={self.kv.compress} needs a KV cache, which attention=full does not "
                "have: set attention=causal"
            )
        if self.kv.dtype != "model":
            raise UserError(
                f"kv.dtype={self.kv.dtype} needs a KV cache, which attention=full does not have: "
                "set attention=causal"
            )
        if self.clean_pass:
            raise UserError("clean_pass=true needs a KV cache: set attention=causal")
