"""Every setting of a run, with its type and default; presets and the command line change them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

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
from flowcache.compress import STRATEGIES, Density, KVRule
from flowcache.errors import UserError
from flowcache.head_classes import HeadClasses
from flowcache.policies import guidance_of
from flowcache.runtime.config import (
    KernelName,
    NumBlocks,
    NumStrips,
    ParallelRule,
    describe,
    parse_limit,
)
from flowcache.wan.calibration import ReuseConfig, check_rule
from flowcache.wan.scenes import Scenes, check_scenes, scenes_of
from self_forcing.released import PRESETS

MAX_POSITIONS = 1024
"""Latent frames for which the models have positions. Source: table of rotations upstream."""

CleanPass: TypeAlias = Literal["separate", "merged", "skipped", "refined"]
"""What makes the final keys of a chunk in few steps: a clean pass of its own; one that is made
together with the first step of the next chunk, with the same result; the chunk's last step, which
saves the pass; or a pass on the slightly noised chunk, whose velocity moves the chunk once more.

Source: of the last, UnStep (arXiv 2609.32518)."""
Entries = Annotated[list[int] | None, Bounds(0, 1000)]


@dataclass(frozen=True)
class RunConfig:
    """One video."""

    prompt: str = ""
    prompts: Scenes | None = None
    recache: bool = False
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
    clean_pass: CleanPass = "separate"
    refine_noise: Annotated[float, Bounds(0, 1, is_open=True)] = 0.05
    reuse_blocks: bool = False
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
    blocks_on_device: NumBlocks = None
    vae_strips: NumStrips = None
    memory_limit: str = "auto"
    embedding_cache: Place = None
    attention_kernel: KernelName = "auto"
    compile: bool | None = None
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    vae_compile: bool = False
    overlap: bool | None = None

    def lines(self) -> list[str]:
        """Return a line for every setting, with type, value and meaning."""
        return describe(self, commented=[PRESETS / "base.yaml"])

    def __post_init__(self) -> None:
        check_values(self)
        self._check_prompts()
        parse_limit(self.memory_limit)
        self._check_steps()
        self._check_reuse()
        self._check_clean_pass()
        self._check_window()

    @property
    def scale(self) -> float:
        """Of guidance in many steps."""
        return 3.0 if self.guidance is None else self.guidance

    @property
    def hidden_frames(self) -> int:
        """Pixel frames of the given video that the new ones go on from, which were shown before."""
        return self.overlap_history or 0 if self.video else 0

    @property
    def scenes(self) -> Scenes:
        """Prompts, each with the latent frame from which on it holds; the first one with 0."""
        return scenes_of(self.prompt) if self.prompts is None else self.prompts

    def _check_prompts(self) -> None:
        check_scenes(self.scenes)
        if len(self.scenes) > 1 and self.rolling:
            raise UserError("prompts for later frames do not work with rolling: give one prompt")
        if self.recache and (len(self.scenes) == 1 or self.kv.compress != "none"):
            raise UserError(
                "recache makes the keys of the newest frames anew where a prompt begins: it needs "
                "prompts for later frames, and kv.compress=none, which keeps whole frames"
            )

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

    def _check_reuse(self) -> None:
        if self.reuse.tokens.is_on:
            raise UserError(
                f"reuse.tokens.choice={self.reuse.tokens.choice} saves where several chunks are "
                "denoised at once (SkyReels-V2, MAGI-1): set reuse.tokens.choice=all"
            )
        if self.step_list is None:
            num_passes = 2 if self.scale > 1 else 1
            check_rule(self.reuse, num_steps=self.num_steps or 50, num_passes=num_passes)
        elif self.reuse.policy != "vanilla" or guidance_of(self.reuse).is_on:
            raise UserError(
                f"reuse.policy={self.reuse.policy} and guidance_every save where there are many "
                "steps: set step_list=null (a model before distillation), or leave them out"
            )

    def _check_clean_pass(self) -> None:
        how = self.clean_pass
        if self.reuse_blocks and (
            not self.step_list
            or self.rolling
            or how in ("merged", "skipped")
            or self.kv.compress != "none"
        ):
            raise UserError(
                "reuse_blocks works with a step_list, without rolling and kv.compress, and where "
                "keys come from a pass of their own: clean_pass=separate or refined"
            )
        if how == "separate":
            return
        if not self.step_list or self.rolling or self.kv.compress != "none":
            raise UserError(
                f"clean_pass={how} works with a step_list, without rolling and kv.compress"
            )
        if how == "merged" and self.positions == "relative":
            raise UserError("clean_pass=merged needs positions=absolute")
        if how != "merged" and self.context_noise:
            raise UserError(f"clean_pass={how} makes no pass to which context_noise could apply")

    def _check_window(self) -> None:
        if self.window is None and (self.rolling or self.sink):
            raise UserError("sink and rolling need a window: set window, in latent frames")
        if self.kv.compress != "none":
            self._check_compression()
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

    def _check_compression(self) -> None:
        name, kind = self.kv.compress, STRATEGIES[self.kv.compress]
        sorts = kind is not None and issubclass(kind, HeadClasses)
        if self.rolling or self.sink:
            raise UserError(
                f"kv.compress={name} says what stays of all chunks before: leave out rolling, and "
                "sink (kv.sink_frames goes with it)"
            )
        if sorts and self.window is not None:
            raise UserError(f"kv.compress={name} says itself how much stays: leave out window")
        if sorts and self.kv.dtype != "model":
            raise UserError(
                f"kv.compress={name} gives each class of heads a cache of its own, which holds no "
                f"quantised keys: set kv.dtype=model, not {self.kv.dtype}, or another kv.compress"
            )
        if not sorts and self.window is None:
            raise UserError(f"kv.compress={name} needs a window: set window, in latent frames")
        if kind is Density and self.positions != "relative":
            raise UserError(
                "kv.compress=density compares keys before rotation: set positions=relative"
            )
