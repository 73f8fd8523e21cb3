"""Every setting of a run, with its type and default; presets and the command line change them."""

from dataclasses import dataclass, field
from typing import Literal

from flowcache.attention import KernelName
from flowcache.errors import UserError
from flowcache.memory import parse_limit
from flowcache.parallel import ParallelRule
from flowcache.results import Quantity
from flowcache.settings import (
    KVRule,
    ReuseRule,
    check_finite,
    check_guidance,
    check_least,
    check_mix,
    check_prompt,
    check_reuse,
    check_seed,
    guidance_of,
)
from skyreels_v2.quantize import QuantizeName
from skyreels_v2.sampling import Signal

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The negative prompt of Wan 2.1, with which SkyReels-V2 is used."""

MAX_ADDNOISE = 60
MAX_STEPS = 1000
"""Timesteps that the model was trained with; more steps would repeat some."""


@dataclass(frozen=True)
class ReuseConfig(ReuseRule):
    """When a chunk is recomputed, and what it gets when it is not."""

    signal: Signal = "timestep"
    rescale: str = "auto"
    predict: Quantity = "residual"


@dataclass(frozen=True)
class KVConfig(KVRule):
    """How many clean tokens the KV cache keeps, and which."""

    budget_chunks: float = 1.0


@dataclass(frozen=True)
class RunConfig:
    """One video."""

    prompt: str = ""
    negative_prompt: str = NEGATIVE_PROMPT
    image: str | None = None
    end_image: str | None = None
    video: str | None = None
    height: int = 544
    width: int = 960
    num_frames: int = 97
    base_num_frames: int = 97
    overlap_history: int | None = None
    fps: int = 24
    seed: int = 0
    noise_dtype: Literal["auto", "model", "float32"] = "auto"
    num_steps: int = 50
    shift: float = 8.0
    guidance: float = 6.0
    ar_step: int = 0
    causal_block_size: int = 1
    addnoise_condition: int = 0
    attention: Literal["full", "causal"] = "full"
    clean_pass: bool = False
    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    parallel: ParallelRule = field(default_factory=ParallelRule)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    batch_branches: bool | None = None
    together_tokens: int = 4096
    offload: bool = False
    text_on_host: bool = False
    kv_on_host: bool = False
    memory_limit: str = "auto"
    embedding_cache: str | None = None
    attention_kernel: KernelName = "auto"
    compile: bool | None = None
    quantize: QuantizeName | None = None
    overlap: bool | None = None

    def __post_init__(self) -> None:
        check_finite(self)
        check_prompt("prompt", self.prompt, may_be_empty=False)
        check_prompt("negative_prompt", self.negative_prompt, may_be_empty=True)
        for name in ("num_frames", "base_num_frames", "num_steps", "causal_block_size", "fps"):
            check_least(name, getattr(self, name), 1)
        if self.num_steps > MAX_STEPS:
            raise UserError(f"num_steps must be at most {MAX_STEPS}, not {self.num_steps}")
        check_least("ar_step", self.ar_step, 0)
        check_least("together_tokens", self.together_tokens, 0)
        check_least("guidance", self.guidance, 0)
        if self.shift <= 0:
            raise UserError(f"shift must be above 0, not {self.shift:g}; 8 is usual")
        check_seed("seed", self.seed)
        if not 0 <= self.addnoise_condition <= MAX_ADDNOISE:
            raise UserError(
                f"addnoise_condition must be a timestep in 0..{MAX_ADDNOISE} (20 is usual), "
                f"not {self.addnoise_condition}"
            )
        check_reuse(self.reuse, num_steps=self.num_steps, least_warmup=1)
        if self.reuse.policy == "guarded" and self.reuse.signal != "content":
            raise UserError(
                "reuse.policy=guarded compares what profiles are calibrated with: set "
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
        if self.reuse.predict == "residual":
            raise UserError(
                "reuse.guidance_every and reuse.guidance_steps hold a difference of velocities: "
                "set reuse.predict to velocity, clean or latent_update, not residual"
            )

    def _check_kv(self) -> None:
        check_least("kv.budget_chunks", self.kv.budget_chunks, 0)
        check_mix(self.kv)
        if self.kv.compress != "none" and self.attention != "causal":
            raise UserError(
                f"kv.compress={self.kv.compress} needs a KV cache, which attention=full does not "
                "have: set attention=causal"
            )
        if self.clean_pass and self.attention != "causal":
            raise UserError("clean_pass=true needs a KV cache: set attention=causal")
