"""Every setting of a run, with its type and default; presets and the command line change them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

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
from flowcache.compress import KVRule
from flowcache.errors import UserError
from flowcache.policies import ReuseRule, check_guidance, check_reuse, guidance_of
from flowcache.predict import PREDICTORS, Quantity
from flowcache.runtime.config import (
    KernelName,
    ParallelRule,
    QuantizeName,
    check_prompt,
    describe,
    parse_limit,
)
from skyreels_v2.released import PRESETS

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The negative prompt of Wan 2.1, with which SkyReels-V2 is used."""

Signal: TypeAlias = Literal["timestep", "timestep_embedding", "content"]
"""What a reuse policy compares: a tick's timestep, its embedding, or the noisy chunk itself."""

MAX_ADDNOISE = 60
MAX_SCALE = 1000
"""Of shift and guidance, far above what makes a picture."""


@dataclass(frozen=True)
class ReuseConfig(ReuseRule):
    """When a chunk is recomputed, and what it gets when it is not."""

    signal: Signal = "timestep"
    rescale: str = "auto"
    predict: Quantity = "residual"


@dataclass(frozen=True)
class KVConfig(KVRule):
    """How many clean tokens the KV cache keeps, and which."""

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
    memory_limit: str = "auto"
    embedding_cache: Place = None
    attention_kernel: KernelName = "auto"
    compile: bool | None = None
    quantize: QuantizeName | None = None
    overlap: bool | None = None

    def lines(self) -> list[str]:
        """Return a line for every setting, with type, value and meaning."""
        return describe(self, commented=[PRESETS / "base.yaml"])

    def __post_init__(self) -> None:
        check_values(self)
        check_prompt("prompt", self.prompt)
        check_reuse(self.reuse, num_steps=self.num_steps, least_warmup=1)
        if self.reuse.kind.takes("distance_low") and self.reuse.signal != "content":
            raise UserError(
                f"reuse.policy={self.reuse.policy} compares what profiles are calibrated with: set "
                f"reuse.signal=content, not {self.reuse.signal}"
            )
        parse_limit(self.memory_limit)
        self._check_guidance()
        self._check_kv()

    def _check_guidance(self) -> None:
        check_guidance(self.reuse, num_passes=2 if self.guidance > 1 else 1)
        if not guidance_of(self.reuse).is_on:
            return
        if self.attention != "causal":
            raise UserError(
                "reuse.guidance_every and reuse.guidance_steps work chunk by chunk: set "
                "attention=causal, or leave them out"
            )
        if PREDICTORS[self.reuse.predict].level == "tokens":
            raise UserError(
                "reuse.guidance_every and reuse.guidance_steps hold a difference of velocities: "
                "set reuse.predict to velocity, clean or latent_update, not residual"
            )

    def _check_kv(self) -> None:
        if self.kv.compress != "none" and self.attention != "causal":
            raise UserError(
                f"kv.compress={self.kv.compress} needs a KV cache, which attention=full does not "
                "have: set attention=causal"
            )
        if self.kv.dtype != "model" and self.attention != "causal":
            raise UserError(
                f"kv.dtype={self.kv.dtype} needs a KV cache, which attention=full does not have: "
                "set attention=causal"
            )
        if self.clean_pass and self.attention != "causal":
            raise UserError("clean_pass=true needs a KV cache: set attention=causal")
