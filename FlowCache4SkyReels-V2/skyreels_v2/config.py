"""Every setting of a run, with its type and default; presets and the command line change them."""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from flowcache.errors import UserError
from flowcache.reuse import Quantity
from skyreels_v2.sampler import Signal

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The negative prompt of Wan 2.1, with which SkyReels-V2 is used."""

MAX_PROMPT_CHARACTERS = 10_000
MAX_SEED = 2**63 - 1
MAX_ADDNOISE = 60
MAX_STEPS = 1000
"""Timesteps that the model was trained with; more steps would repeat some."""


@dataclass(frozen=True)
class ReuseConfig:
    """When a chunk is recomputed, and what it gets when it is not."""

    policy: Literal["vanilla", "teacache", "flowcache", "stride"] = "vanilla"
    threshold: float = 0.1
    warmup_steps: int = 5
    signal: Signal = "timestep"
    rescale: str = "auto"
    every: int = 2
    steps: list[int] | None = None
    predict: Quantity = "residual"
    extrapolate: float = 0.0


@dataclass(frozen=True)
class KVConfig:
    """How many clean tokens the KV cache keeps, and which."""

    compress: Literal["none", "importance", "recent", "sink_recent"] = "none"
    budget_chunks: float = 1.0
    mix: float = 0.07
    kernel: int = 7
    granularity: Literal["token", "frame", "chunk"] = "token"
    queries: Literal["token", "frame", "chunk"] = "chunk"
    weighting: str = "none"
    power: float = 3.0
    order: Literal["position", "score"] = "position"
    sink_frames: int = 1


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
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    batch_branches: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        _check_finite(self)
        _check_prompt("prompt", self.prompt, may_be_empty=False)
        _check_prompt("negative_prompt", self.negative_prompt, may_be_empty=True)
        for name in ("num_frames", "base_num_frames", "num_steps", "causal_block_size", "fps"):
            _at_least(name, getattr(self, name), 1)
        if self.num_steps > MAX_STEPS:
            raise UserError(f"num_steps must be at most {MAX_STEPS}, not {self.num_steps}")
        _at_least("ar_step", self.ar_step, 0)
        _at_least("guidance", self.guidance, 0)
        if self.shift <= 0:
            raise UserError(f"shift must be above 0, not {self.shift:g}; 8 is usual")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed must be in 0..{MAX_SEED}, not {self.seed}")
        if not 0 <= self.addnoise_condition <= MAX_ADDNOISE:
            raise UserError(
                f"addnoise_condition must be a timestep in 0..{MAX_ADDNOISE} (20 is usual), "
                f"not {self.addnoise_condition}"
            )
        self._check_reuse()
        self._check_kv()

    def _check_reuse(self) -> None:
        reuse = self.reuse
        _at_least("reuse.threshold", reuse.threshold, 0)
        _at_least("reuse.warmup_steps", reuse.warmup_steps, 1)
        _at_least("reuse.every", reuse.every, 1)
        wrong = [s for s in reuse.steps or () if not 0 <= s < self.num_steps]
        if wrong:
            raise UserError(
                f"reuse.steps are own steps of a chunk, 0..{self.num_steps - 1}: {wrong[0]} is none"
            )

    def _check_kv(self) -> None:
        _at_least("kv.budget_chunks", self.kv.budget_chunks, 0)
        if not 0 <= self.kv.mix <= 1:
            raise UserError(f"kv.mix is a share and must be in 0..1, not {self.kv.mix:g}")
        if self.kv.compress != "none" and self.attention != "causal":
            raise UserError(
                f"kv.compress={self.kv.compress} needs a KV cache, which attention=full does not "
                "have: set attention=causal"
            )
        if self.clean_pass and self.attention != "causal":
            raise UserError("clean_pass=true needs a KV cache: set attention=causal")


def _check_finite(section: Any, prefix: str = "") -> None:
    """Refuse an infinite value in a section or one of its sections."""
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            _check_finite(value, f"{prefix}{entry.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}{entry.name} must be a finite number, not {value:g}")


def _check_prompt(name: str, prompt: str, *, may_be_empty: bool) -> None:
    if not may_be_empty and not prompt.strip():
        raise UserError(f"{name} is empty: say what the video shows")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"{name} is not valid UTF-8 text: check the encoding of your terminal")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"{name} has {len(prompt)} characters, at most {MAX_PROMPT_CHARACTERS} are allowed "
            "(the model reads about 512 tokens): shorten it"
        )


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"{name} must be {least:g} or more, not {value:g}")
