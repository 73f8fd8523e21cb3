"""Every setting of a run, with its type and default; presets and the command line change them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from flowcache.bounds import (
    MAX_FRAMES,
    MAX_STEPS,
    Bounds,
    Fps,
    Frames,
    Pixels,
    Place,
    Seed,
    check_values,
)
from flowcache.compress import QUANTIZATION_SETTINGS, KVRule
from flowcache.errors import UserError
from flowcache.policies import ReuseRule
from flowcache.predict import Quantity
from flowcache.runtime.config import (
    KernelName,
    ParallelRule,
    check_prompt,
    describe,
    parse_limit,
)
from self_forcing.released import PRESETS

MAX_POSITIONS = 1024
"""Latent frames for which the models have positions. Source: table of rotations upstream."""

Entries = Annotated[list[int] | None, Bounds(0, 1000)]


@dataclass(frozen=True)
class ReuseConfig(ReuseRule):
    """When a chunk is recomputed, and what it gets when it is not."""

    predict: Quantity = "velocity"


@dataclass(frozen=True)
class RunConfig:
    """One video."""

    prompt: str = ""
    negative_prompt: str = ""
    image: Place = None
    video: Place = None
    overlap_history: Annotated[int | None, Bounds(1, MAX_FRAMES)] = None
    checkpoint: str = "gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt"
    use_ema: bool = True
    height: Pixels = 480
    width: Pixels = 832
    num_frames: Frames = 81
    fps: Fps = 16
    seed: Seed = 0
    step_list: Entries = None
    first_chunk_step_list: Entries = None
    warp_steps: bool = True
    num_steps: Annotated[int | None, Bounds(1, MAX_STEPS)] = None
    shift: Annotated[float, Bounds(0, 1000, is_open=True)] = 5.0
    guidance: Annotated[float | None, Bounds(0, 1000)] = None
    chunk_frames: Annotated[int, Bounds(1, MAX_POSITIONS)] = 3
    first_frame_alone: bool = False
    context_noise: Annotated[int, Bounds(0, 1000)] = 0
    window: Annotated[int | None, Bounds(1, MAX_POSITIONS)] = None
    sink: Annotated[int, Bounds(0, MAX_FRAMES)] = 0
    positions: Literal["absolute", "relative"] = "absolute"
    rolling: bool = False
    precision: Literal["float32", "reference"] = "float32"
    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    kv: KVRule = field(default_factory=KVRule)
    parallel: ParallelRule = field(default_factory=ParallelRule)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    offload: bool = False
    text_on_host: bool = False
    kv_on_host: bool = False
    memory_limit: str = "auto"
    embedding_cache: Place = None
    attention_kernel: KernelName = "auto"
    compile: bool | None = None
    overlap: bool | None = None

    def lines(self) -> list[str]:
        """Return a line for every setting, with type, value and meaning."""
        return describe(self, commented=[PRESETS / "base.yaml"])

    def __post_init__(self) -> None:
        check_values(self)
        check_prompt("prompt", self.prompt)
        parse_limit(self.memory_limit)
        kept = KVRule(**{name: vars(self.kv)[name] for name in QUANTIZATION_SETTINGS})
        if self.reuse != ReuseConfig() or self.kv != kept:
            raise UserError(
                "settings of reuse and KV compression do not work with this model yet: leave them"
            )
        self._check_steps()
        self._check_window()

    def _check_steps(self) -> None:
        for name in ("step_list", "first_chunk_step_list"):
            entries = getattr(self, name)
            if entries is not None and (not entries or entries != sorted({*entries}, reverse=True)):
                raise UserError(f"{name} must fall from the first step to the last, not {entries}")
        if self.step_list and self.num_steps not in (None, len(self.step_list)):
            raise UserError(
                f"num_steps is {self.num_steps}, but step_list names {len(self.step_list)} steps: "
                "leave one of them out"
            )
        if self.step_list and self.guidance is not None:
            raise UserError(
                f"guidance is {self.guidance:g}, but a few-step model (step_list) has its guidance "
                "built in: leave guidance out"
            )
        if self.first_chunk_step_list and not self.step_list:
            raise UserError("first_chunk_step_list needs a step_list for the other chunks")

    def _check_window(self) -> None:
        if self.window is None and (self.rolling or self.sink):
            raise UserError("sink and rolling need a window: set window, in latent frames")
        if self.rolling:
            if not self.step_list or self.first_chunk_step_list or self.first_frame_alone:
                raise UserError("rolling needs one step_list for all chunks, which are of one size")
            if self.image or self.video or self.sink or self.positions == "relative":
                raise UserError("rolling takes no image, video or sink, and positions=absolute")
            needed = (len(self.step_list) + 1) * self.chunk_frames
        else:
            needed = self.chunk_frames + self.sink
        if self.window is not None and self.window < needed:
            raise UserError(
                f"window is {self.window} latent frames, fewer than the {needed} of the chunks "
                "that are denoised and of the first frames that stay (sink)"
            )
