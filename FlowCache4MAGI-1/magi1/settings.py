"""Every setting of a run: the release's JSON config, and what the release has no field for."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from flowcache.bounds import MAX_FRAMES, Bounds, Place, Share, Threshold, check_values
from flowcache.compress import KVRule, strategy_of
from flowcache.errors import UserError
from flowcache.policies import ReuseRule, check_guidance, check_reuse
from flowcache.runtime.memory import parse_limit
from flowcache.runtime.parallel import ParallelRule
from flowcache.runtime.settings import KernelName, check_prompt
from magi1.captions import TokenChoice
from magi1.config import MagiConfig, check_model, check_runtime
from magi1.sampling import Quantity
from magi1.vae import RELEASED, Tiling, check_decoding


@dataclass(frozen=True)
class PassConfig:
    """Passes through the model beside those that denoise."""

    clean_pass: bool = True
    nearly_clean_pass: bool = True
    prev_share: Share = 0.7


@dataclass(frozen=True)
class ReuseConfig(ReuseRule):
    """When a chunk is recomputed, and what it gets when it is not."""

    threshold: Threshold = 0.01
    compute_last_step: bool = False
    predict: Quantity = "latent_update"


@dataclass(frozen=True)
class KVConfig(KVRule):
    """How many chunks the KV cache holds, and which clean tokens stay."""

    total_chunks: Annotated[int, Bounds(1, MAX_FRAMES)] = 5


@dataclass(frozen=True)
class RunConfig(MagiConfig):
    """One video: a JSON config of the release, under its own names, and more."""

    prompt: str = ""
    image: Place = None
    video: Place = None
    prefix_frames: Annotated[int | None, Bounds(1, MAX_FRAMES)] = 32
    special_tokens: Place = None
    tokens: TokenChoice = field(default_factory=TokenChoice)
    passes: PassConfig = field(default_factory=PassConfig)
    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    parallel: ParallelRule = field(default_factory=ParallelRule)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    offload: bool = False
    memory_limit: str = "auto"
    embedding_cache: Place = None
    attention_kernel: KernelName = "auto"
    compile: bool | None = None
    overlap: bool | None = None

    def __post_init__(self) -> None:
        check_values(self)
        check_model(self.model_config, source="model_config")
        check_runtime(self.runtime_config, self.engine_config, source="runtime_config")
        check_prompt("prompt", self.prompt)
        check_reuse(self.reuse, num_steps=self.runtime_config.num_steps, least_warmup=0)
        check_guidance(self.reuse, num_passes=self.runtime_config.cfg_number)
        self._check_given()
        check_decoding(
            Tiling.of_rate(self.runtime_config.fps),
            chunk_width=self.runtime_config.chunk_width,
            temporal_stride=RELEASED.patch_length,  # whether the VAE's is another is checked later
        )
        self._check_kv()
        parse_limit(self.memory_limit)
        if self.engine_config.fp8_quant and self.dtype not in ("auto", "bfloat16"):
            raise UserError(
                f"dtype is {self.dtype}, but an 8-bit checkpoint (fp8_quant) works in bfloat16: "
                "leave dtype at auto"
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
