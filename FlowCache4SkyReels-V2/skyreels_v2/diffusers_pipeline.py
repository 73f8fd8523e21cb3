"""Pipelines that are called as diffusers' diffusion forcing pipelines for SkyReels-V2.

    pipe = SkyReelsV2FlowCachePipeline.from_pretrained(folder, preset="flowcache_fast")
    pipe = SkyReelsV2FlowCachePipeline.from_pipe(pipe_of_diffusers, preset="flowcache_fast")
    frames = pipe("a swan on a misty lake", num_frames=97, generator=generator).frames[0]

Arguments of a call that are left out come from the preset. `docs/python.md` says what differs.

Axes: B videos, C latent channels, F latent frames, h/w latent rows/columns, T frames, H/W pixels,
L tokens of a prompt, D width.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.skyreels_v2.pipeline_output import SkyReelsV2PipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from tqdm.auto import tqdm

from flowcache.errors import UserError
from flowcache.runtime import profile
from flowcache.runtime.config import from_python, overrides_of
from flowcache.runtime.model import Job, Loaded, Request, Source
from flowcache.runtime.ops import Draw
from flowcache.runtime.run import finished, load_networks, prepare
from flowcache.runtime.stats import RunStats
from flowcache.wan.calibration import rescale_for
from flowcache.wan.dit import DiT
from flowcache.wan.given import Conditioning, Media
from flowcache.wan.unipc import timestep_grid
from flowcache.wan.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE, VAE, latent_frames
from skyreels_v2.components import Components, components_of, load_components
from skyreels_v2.config import RunConfig
from skyreels_v2.inputs import check_mode
from skyreels_v2.model import SkyReels
from skyreels_v2.pipeline import SegmentProgress, generate
from skyreels_v2.sampler import WAITING_TIMESTEP
from skyreels_v2.window import Window

__all__ = [
    "SkyReelsV2FlowCacheImageToVideoPipeline",
    "SkyReelsV2FlowCachePipeline",
    "SkyReelsV2FlowCacheVideoToVideoPipeline",
]

logger = logging.getLogger(__name__)

Pictures = Mapping[str, Tensor]
"""`image`, `end_image` as `[3, 1, H, W]`, `video` as `[3, T, H, W]`, in -1..1."""
Self = TypeVar("Self", bound="SkyReelsV2FlowCachePipeline")

SETTINGS = {
    "height": "height",
    "width": "width",
    "num_frames": "num_frames",
    "num_inference_steps": "num_steps",
    "guidance_scale": "guidance",
    "overlap_history": "overlap_history",
    "addnoise_condition": "addnoise_condition",
    "base_num_frames": "base_num_frames",
    "ar_step": "ar_step",
    "causal_block_size": "causal_block_size",
    "fps": "fps",
}
"""Argument of a call -> setting of a preset."""
TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
"""What a callback can ask for."""
OUTPUTS = ("np", "pil", "pt", "latent")
NO_SHIFT = 1.0
"""`flow_shift` that the published checkpoints carry because nobody set it."""


@dataclass(frozen=True)
class Call:
    """The arguments of a call, as diffusers names them; None: as the preset says."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_videos_per_prompt: int | None = 1
    generator: torch.Generator | list[torch.Generator] | None = None
    """Of all noise; None: PyTorch's own."""
    latents: Tensor | None = None
    """Noise of the first window, `[B, C, F, h, w]`."""
    prompt_embeds: Tensor | None = None
    """`[B, L, D]`"""
    negative_prompt_embeds: Tensor | None = None
    """`[B, L, D]`"""
    output_type: str | None = "np"
    return_dict: bool = True
    attention_kwargs: Mapping[str, Any] | None = None
    """Not supported."""
    callback_on_step_end: Callable[..., Mapping[str, Any]] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    max_sequence_length: int | None = None
    """Tokens of a prompt; only the model's own number is accepted."""
    overlap_history: int | None = None
    addnoise_condition: float | None = None
    base_num_frames: int | None = None
    ar_step: int | None = None
    causal_block_size: int | None = None
    fps: int | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Call:
        """Check the names and the combination of some arguments."""
        _check_names(arguments, [each.name for each in fields(cls)])
        call = cls(**arguments)
        for name, embeds in (("prompt", "prompt_embeds"), ("negative_prompt", TENSORS[2])):
            given, encoded = getattr(call, name), getattr(call, embeds)
            if given is not None and encoded is not None:
                raise UserError(f"give {name} or {embeds}, not both")
            texts: Any = given if isinstance(given, (list, tuple)) else [given or ""]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{name} must be a text or a list of texts, not {given!r:.80}")
        if call.prompt is None and call.prompt_embeds is None:
            raise UserError("give prompt or prompt_embeds")
        if call.output_type not in OUTPUTS:
            raise UserError(f"output_type {call.output_type!r} is none of {', '.join(OUTPUTS)}")
        for name, kind in (*((name, Tensor) for name in TENSORS), ("generator", torch.Generator)):
            given = getattr(call, name)
            if not all(isinstance(each, kind) for each in _listed(given)):
                raise UserError(f"{name} must be a {kind.__name__}, not {given!r:.80}")
        if call.num_videos_per_prompt is not None and call.num_videos_per_prompt < 1:
            raise UserError(
                f"num_videos_per_prompt must be 1 or more, not {call.num_videos_per_prompt}"
            )
        if call.attention_kwargs:
            raise UserError("attention_kwargs are not supported: fuse a LoRA before from_pipe")
        unknown = [name for name in call.tensor_inputs if name not in TENSORS]
        if unknown:
            raise UserError(
                f"callback_on_step_end_tensor_inputs must be of {', '.join(TENSORS)}, not "
                f"{', '.join(unknown)}"
            )
        return call

    @property
    def tensor_inputs(self) -> Sequence[str]:
        """What the callback is given."""
        callback = self.callback_on_step_end
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            return callback.tensor_inputs
        return self.callback_on_step_end_tensor_inputs

    @property
    def settings(self) -> dict[str, Any]:
        """The given settings, by their names in a preset."""
        given = {key: getattr(self, name) for name, key in SETTINGS.items()}
        given = {key: value for key, value in given.items() if value is not None}
        num_frames, noised = given.get("num_frames"), given.get("addnoise_condition")
        if isinstance(num_frames, int) and num_frames % TEMPORAL_STRIDE != 1:
            # as diffusers, whose video-to-video form has a default of 120
            given["num_frames"] = max(num_frames // TEMPORAL_STRIDE * TEMPORAL_STRIDE, 0) + 1
            logger.warning("num_frames %d is made %d", num_frames, given["num_frames"])
        if isinstance(noised, float) and noised.is_integer():
            given["addnoise_condition"] = int(noised)
        return given


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [] if given is None else [given]


def _check_names(arguments: Iterable[str], known: Sequence[str]) -> None:
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {near[0]}?" if near else f": use {', '.join(known)}"
            raise UserError(f"unknown argument {name!r}{hint}")


# One call as a model that the common run prepares -------------------------------------------------


class _Given(SkyReels):
    """The model of one call: networks that are loaded already, pictures that are in memory.

    Args:
        pictures: settings of those that the call gives.
    """

    def __init__(self, components: Components, pictures: Collection[str]) -> None:
        self.components = components
        self.pictures = pictures

    def find(self, name: str, *, is_dry: bool = False, download: bool = False) -> Source:
        return self.components.source

    def fetch(self, config: RunConfig, source: Source) -> tuple[RunConfig, Source]:
        return config, source

    def check(self, config: RunConfig, source: Source) -> RunConfig:
        if config.quantize is not None:
            raise UserError("quantize is not supported here: use flowcache.load")
        marks = dict.fromkeys(self.pictures, "given")  # what cuts a video asks whether there is one
        config = replace(config, **cast("dict[str, Any]", marks))
        check_mode(config, source.sizes)
        if config.reuse.kind.takes("rescale"):
            rescale_for(config, source.sizes)
        return config

    def check_files(self, config: RunConfig, source: Source) -> None: ...

    def fingerprint(self, source: Source) -> str:
        weights = self.components.dit.state_dict().items()
        return profile.fingerprint(
            asdict(self.components.dit.config), ((name, value.cpu()) for name, value in weights)
        )

    def dtype(self, config: RunConfig, device: torch.device) -> torch.dtype:
        return self.components.dit.dtype

    def media(self, config: RunConfig, source: Source) -> Media:
        return Media()

    def load_dit(self, job: Job) -> DiT:
        dit = self.components.dit  # of an earlier call: what streams stays on the host
        return dit.to(job.dit_device) if dit.stream is None else dit

    def load_vae(self, job: Job) -> VAE:
        return self.components.vae.to(job.device)


# The pipelines ------------------------------------------------------------------------------------


class SkyReelsV2FlowCachePipeline:
    """Text to video, called as `SkyReelsV2DiffusionForcingPipeline`."""

    def __init__(
        self, components: Components, *, preset: str = "flowcache_fast", **settings: Any
    ) -> None:
        """Keep what all calls share; see `from_pretrained`."""
        self.components = components
        self.preset = preset
        self.scheduler: Any = components.scheduler
        """Only its `flow_shift` is used; 1.0: as the preset says."""
        # diffusers, too, leaves it to its user where the networks are
        self.settings: dict[str, Any] = {
            "memory_limit": "none",
            "noise_dtype": "float32",
            **settings,
        }
        self.stats: RunStats | None = None
        """Decisions, FLOPs and seconds of the last video."""
        self.num_timesteps = 0
        """Ticks of a video of the last call, over all windows."""
        self._device = components.dit.patch_embedding.weight.device
        self._interrupt = False
        self._loaded: tuple[Any, Loaded] | None = None
        self._bar: dict[str, Any] = {}
        self._processor = VideoProcessor(vae_scale_factor=SPATIAL_STRIDE)
        self._check()

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: str | Path,
        *,
        preset: str = "flowcache_fast",
        torch_dtype: Any = None,
        dtype: Any = None,
        vae: Any = None,
        scheduler: Any = None,
        **settings: Any,
    ) -> Self:
        """Load a checkpoint on the CPU, in diffusers' or the original layout.

        Args:
            pretrained_model_name_or_path: `demo`, a folder, or a hub id, which is downloaded.
            preset: its name, or a YAML file.
            torch_dtype: of transformer and text encoder, default float32; the VAE is in float32.
            dtype: the same, as newer versions of diffusers name it.
            vae: takes the place of the checkpoint's.
            scheduler: whose `flow_shift` is the preset's shift.
            settings: of all calls, as in `reuse={"threshold": 0.2}`.

        Raises:
            UserError: the model, the preset or a setting is wrong.
        """
        wanted = dtype or torch_dtype or torch.float32
        if not isinstance(wanted, torch.dtype):
            raise UserError(f"torch_dtype must be a type as torch.bfloat16, not {wanted!r}")
        found = load_components(pretrained_model_name_or_path, dtype=wanted, given_vae=vae)
        if scheduler is not None:
            found = replace(found, scheduler=scheduler)
        return cls(found, preset=preset, **settings)

    @classmethod
    def from_pipe(
        cls: type[Self],
        pipe: DiffusionPipeline | SkyReelsV2FlowCachePipeline,
        *,
        preset: str | None = None,
        **settings: Any,
    ) -> Self:
        """Take the networks of a pipeline, of diffusers or of this module, where they are.

        Args:
            preset: its name, or a YAML file; None: that of the pipeline, or `flowcache_fast`.
            settings: of all calls.

        Raises:
            UserError: it is no pipeline of a SkyReels-V2 diffusion forcing model.
        """
        if isinstance(pipe, SkyReelsV2FlowCachePipeline):
            found = replace(pipe.components, scheduler=pipe.scheduler)
            return cls(found, preset=preset or pipe.preset, **{**pipe.settings, **settings})
        return cls(components_of(pipe), preset=preset or "flowcache_fast", **settings)

    # As pipelines of diffusers ----------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where a call computes."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the transformer's weights."""
        return self.components.dit.dtype

    @property
    def vae(self) -> Any:
        """diffusers' VAE."""
        return self.components.vae.model

    @property
    def interrupt(self) -> bool:
        """Whether the call is to end; a callback asks for it with `pipe._interrupt = True`."""
        return self._interrupt

    def to(self: Self, device: torch.device | str) -> Self:
        """Compute on a device; the networks move there with the next call."""
        try:
            wanted = torch.device(device)
        except RuntimeError:
            raise UserError(f"device {device!r} is none: use cpu, cuda or cuda:0") from None
        before, self._device = self._device, wanted
        try:
            self._check()
        except UserError:
            self._device = before
            raise
        return self

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Compute on a device, and keep there only the network that is at work."""
        self.to(device)
        self.settings["offload"] = True

    def set_progress_bar_config(self, **config: Any) -> None:
        """Set arguments of tqdm, as in `disable=True`."""
        self._bar = config

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        **arguments: Any,
    ) -> Any:
        """Make videos.

        Args:
            arguments: see `Call`.

        Returns: `SkyReelsV2PipelineOutput`, or a tuple of its `frames`.

        Raises:
            UserError: an argument is wrong; nothing large was computed.
        """
        first = (prompt, negative_prompt, height, width, num_frames)
        return self._make({}, first, arguments)

    def _make(
        self, pictures: Mapping[str, Any], first: Sequence[Any], arguments: Mapping[str, Any]
    ) -> Any:
        names = ("prompt", "negative_prompt", "height", "width", "num_frames")
        call = Call.of({**dict(zip(names, first, strict=True)), **arguments})
        job = self._prepare(call, pictures)
        shown = self._read(pictures, job.config)
        if "video" in shown and shown["video"].shape[1] < (job.config.overlap_history or 0):
            raise UserError(
                f"video has {shown['video'].shape[1]} frames, fewer than overlap_history "
                f"{job.config.overlap_history}, which the new frames continue"
            )
        prompts = self._encode(call, job)
        noises = self._noises(call, job, num_videos=len(prompts))
        self._interrupt = False
        self.num_timesteps = job.work.num_ticks
        made: list[_Made] = []
        bar = tqdm(total=job.work.num_ticks * len(prompts), **self._bar)
        with closing(bar):
            for number, branches in enumerate(prompts):
                conditioning = Conditioning(text=branches, **_continued(shown, job))
                draw = _replayed([noise[number] for noise in noises], call, number=number)
                made.append(self._one(call, job, conditioning, draw, bar))
                if self._interrupt:
                    break
        frames = self._output(made, shown, call.output_type or "np")
        return SkyReelsV2PipelineOutput(frames=frames) if call.return_dict else (frames,)

    # What a call needs ------------------------------------------------------------------------

    def _check(self) -> None:
        """Find a wrong preset, setting or device before the first call."""
        self._prepare(Call(prompt=""), {})

    def _prepare(self, call: Call, pictures: Collection[str]) -> Job:
        """Check all settings; load nothing.

        Args:
            pictures: settings of those that the call gives.
        """
        settings: dict[str, Any] = {"shift": self._shift(), **self.settings, **call.settings}
        if settings["shift"] is None:
            del settings["shift"]
        # the prompt itself is encoded apart: one of many, or given as embeddings
        settings |= {"device": str(self._device), "prompt": "given"}
        model = _Given(self.components, pictures)
        request = Request(preset=self.preset, overrides=list(overrides_of(settings)))
        with from_python():
            job = prepare(model, request, writes=False)
        text_len = self.components.dit.config.text_len
        if call.max_sequence_length not in (None, text_len):
            raise UserError(
                f"max_sequence_length is {call.max_sequence_length}, the model's is {text_len}"
            )
        return job

    def _shift(self) -> float | None:
        """Return the shift that the scheduler asks for; None: it does not."""
        config = self.scheduler.config
        if not isinstance(self.scheduler, UniPCMultistepScheduler) or (
            config["prediction_type"] != "flow_prediction"
        ):
            raise UserError("scheduler must be a UniPCMultistepScheduler for flow_prediction")
        shift = config["flow_shift"]
        return None if shift == NO_SHIFT else shift

    def _read(self, pictures: Mapping[str, Any], config: RunConfig) -> dict[str, Tensor]:
        """Scale pictures to the video's size, as diffusers does."""
        height, width = config.height, config.width
        read: dict[str, Tensor] = {}
        for name, given in pictures.items():
            try:
                if name == "video":
                    read[name] = self._processor.preprocess_video(given, height, width)[0].float()
                else:
                    image = self._processor.preprocess(given, height, width)
                    read[name] = image[0].float().unsqueeze(1)
            except (ValueError, TypeError, AttributeError, IndexError) as error:
                line = str(error).partition("\n")[0]
                raise UserError(f"{name} is no picture that diffusers reads: {line}") from None
        return read

    def _encode(self, call: Call, job: Job) -> list[dict[str, Tensor]]:
        """Return the encoded prompts of each video: branch -> `[1, L, D]`."""
        texts, num_each = self._texts(call, job), call.num_videos_per_prompt or 1
        encoder, known = self.components.encoder.to(job.device), dict[str, Tensor]()
        made: list[dict[str, Tensor]] = []
        for number in range(len(texts[0])):
            branches: dict[str, Tensor] = {}
            for name, given in zip(job.work.branches, texts, strict=False):
                one = given[number]
                if isinstance(one, str):
                    if one not in known:
                        known[one] = encoder.encode([one]).to(self.dtype)
                    one = known[one]
                branches[name] = one.reshape(1, *one.shape[-2:]).to(self.dtype)
            made += [branches] * num_each
        if job.config.offload:
            encoder.to("cpu")
        return made

    def _texts(self, call: Call, job: Job) -> list[Sequence[Any]]:
        """Return the prompts and the negative prompts, each a text or encoded."""
        sizes = self.components.dit.config
        texts: list[Sequence[Any]] = []
        for name, embeds in (("prompt", "prompt_embeds"), ("negative_prompt", TENSORS[2])):
            given, encoded = getattr(call, name), getattr(call, embeds)
            if encoded is not None and encoded.shape[-2:] != (sizes.text_len, sizes.text_dim):
                raise UserError(
                    f"{embeds} must be [B, {sizes.text_len}, {sizes.text_dim}], "
                    f"not {list(encoded.shape)}"
                )
            if given is None and encoded is None:
                given = job.config.negative_prompt
            if isinstance(given, str):
                given = [given] * (len(texts[0]) if texts else 1)
            texts.append(cast("Sequence[Any]", encoded) if given is None else list(given))
        if len(texts[0]) != len(texts[1]) or not len(texts[0]):
            raise UserError(
                f"there are {len(texts[0])} prompts, but {len(texts[1])} negative prompts"
            )
        return texts

    def _noises(self, call: Call, job: Job, *, num_videos: int) -> list[Tensor]:
        """Draw what each window starts from, `[B, C, F, h, w]`, for all videos as diffusers."""
        config = job.config
        generator = call.generator
        if isinstance(generator, list) and len(generator) != num_videos:
            raise UserError(f"there are {len(generator)} generators for {num_videos} videos")
        size = (config.height // SPATIAL_STRIDE, config.width // SPATIAL_STRIDE)
        shapes = [
            (num_videos, self.components.dit.config.out_dim, part.num_frames, *size)
            for part in job.work.loop.segments
        ]
        given = call.latents
        if given is not None and tuple(given.shape) != shapes[0]:
            raise UserError(f"latents must be {list(shapes[0])}, not {list(given.shape)}")
        drawn = [] if given is None else [given.to(job.device, torch.float32)]
        return drawn + [
            randn_tensor(shape, generator=generator, device=job.device, dtype=torch.float32)
            for shape in shapes[len(drawn) :]
        ]

    # One video --------------------------------------------------------------------------------

    def _networks(self, job: Job) -> Loaded:
        """Place the networks and choose kernels, unless it was done for such a call."""
        work, config = job.work, job.config
        wanted = (job.device, config.attention_kernel, config.compile, work.attention)
        identity = (*wanted, work.pass_tokens, work.frame_tokens)
        if self._loaded is None or self._loaded[0] != identity:
            self._loaded = (identity, load_networks(job, stats=RunStats(job.device)))
        return self._loaded[1]

    def _one(self, call: Call, job: Job, conditioning: Conditioning, draw: Draw, bar: Any) -> _Made:
        """Make one video, calling back after every tick."""
        networks, made = self._networks(job), _Made()
        self.stats = RunStats(job.device)
        shown = generate(
            networks.dit,
            networks.vae,
            job.placed,
            conditioning,
            stats=self.stats,
            work=job.work,
            draw=draw,
        )
        with closing(shown):
            for progress in shown:
                finished(progress, modules=networks.modules)  # raises if they are no numbers
                made.see(progress)
                if call.callback_on_step_end is not None:
                    self._call_back(call, job, progress, conditioning, made)
                bar.update()
                if self._interrupt:
                    break
        return made

    def _call_back(
        self,
        call: Call,
        job: Job,
        progress: SegmentProgress,
        conditioning: Conditioning,
        made: _Made,
    ) -> None:
        """Show a tick to the callback, and take the latents that it returns."""
        assert call.callback_on_step_end is not None
        window: Window = job.work.segments[progress.segment.index].cut
        frames = [
            frame
            for chunk in window.generated
            if chunk not in made.clean
            for frame in window.chunks[chunk]
        ]
        values: dict[str, Any] = {
            "latents": progress.latents[None].clone(),
            "prompt_embeds": conditioning.text["cond"],
            "negative_prompt_embeds": conditioning.text.get("uncond"),
        }
        given = {name: values[name] for name in call.tensor_inputs}
        times = made.timesteps(progress, window, job.config)
        returned = dict(call.callback_on_step_end(self, progress.tick.index, times, given) or {})
        for name in TENSORS[1:]:
            if returned.get(name, values[name]) is not values[name]:
                raise UserError(
                    f"callback_on_step_end cannot change {name} in the middle of a video"
                )
        changed: Tensor = returned.get("latents", values["latents"])
        if changed.shape != values["latents"].shape:
            raise UserError(
                f"callback_on_step_end returned latents {list(changed.shape)}, not "
                f"{list(values['latents'].shape)}"
            )
        progress.latents[:, frames] = changed[0, :, frames].to(progress.latents)

    # What a call returns ----------------------------------------------------------------------

    def _output(self, made: Sequence[_Made], shown: Pictures, output_type: str) -> Any:
        """Return the videos in the form that is asked for; cut short, those with frames."""
        whole = list(made)
        if self._interrupt:
            # the last one is shorter: it stands only where it is alone
            whole = whole[:-1] or [each for each in whole if each.frames]
            if not whole:
                raise UserError("interrupted before the first chunk was clean: there is no frame")
        if output_type == "latent":
            return torch.stack([each.latents() for each in whole])
        videos: list[Tensor] = []
        for each in whole:
            before = [shown["video"].to(each.frames[0].device)] if "video" in shown else []
            videos.append(torch.cat([*before, *each.frames], dim=1))
        return self._processor.postprocess_video(torch.stack(videos), output_type=output_type)


class SkyReelsV2FlowCacheImageToVideoPipeline(SkyReelsV2FlowCachePipeline):
    """Image to video, called as `SkyReelsV2DiffusionForcingImageToVideoPipeline`."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image: Any,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        *,
        last_image: Any = None,
        **arguments: Any,
    ) -> Any:
        """Make videos that begin with an image; see `SkyReelsV2FlowCachePipeline`.

        Args:
            image: PIL image, array or tensor, scaled to the video's size.
            last_image: that the video ends with.
        """
        pictures = {"image": image, "end_image": last_image}
        given = {name: value for name, value in pictures.items() if value is not None}
        if "image" not in given:
            raise UserError("give image: image_embeds are not supported")
        return self._make(given, (prompt, negative_prompt, height, width, num_frames), arguments)


class SkyReelsV2FlowCacheVideoToVideoPipeline(SkyReelsV2FlowCachePipeline):
    """Continue a video, called as `SkyReelsV2DiffusionForcingVideoToVideoPipeline`."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        video: Any,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        **arguments: Any,
    ) -> Any:
        """Make videos that begin with a video; see `SkyReelsV2FlowCachePipeline`.

        Args:
            video: list of PIL images, array or tensor, scaled to the video's size.
            num_frames: of `overlap_history` and of what is new.
        """
        first = (prompt, negative_prompt, height, width, num_frames)
        return self._make({"video": video}, first, arguments)


# One video in the making --------------------------------------------------------------------------


@dataclass
class _Made:
    """What there is of one video."""

    frames: list[Tensor] = field(default_factory=list)
    """`[3, T, H, W]` in about -1..1."""
    clean: set[int] = field(default_factory=set)
    """Chunks of the window at work."""
    windows: dict[int, SegmentProgress] = field(default_factory=dict)
    """The last tick of each window."""

    def see(self, progress: SegmentProgress) -> None:
        """Take what is finished after a tick."""
        if progress.segment.index not in self.windows:
            self.clean = set()
        self.windows[progress.segment.index] = progress
        self.clean.update(progress.tick.finishing)
        if progress.frames is not None:
            self.frames.append(progress.frames)

    def latents(self) -> Tensor:
        """Return the latents of all windows without those that repeat, `[C, F, h, w]`.

        Those of an end image are among them, as with diffusers.
        """
        parts: list[Tensor] = []
        for number, progress in self.windows.items():
            shared = latent_frames(progress.segment.prefix_pixels) if number else 0
            parts.append(progress.latents[:, shared:])
        return torch.cat(parts, dim=1)

    def timesteps(self, progress: SegmentProgress, window: Window, config: RunConfig) -> Tensor:
        """Return the timestep at which each latent frame was shown to the model, `[F]`."""
        grid, _ = timestep_grid(config.num_steps, shift=config.shift)
        times = torch.zeros(window.num_frames, dtype=torch.int64)
        for chunk in window.generated:
            step = progress.tick.steps.get(chunk)
            time = 0 if chunk in self.clean else WAITING_TIMESTEP
            times[list(window.chunks[chunk])] = time if step is None else grid[step]
        return times.to(progress.latents.device)


def _continued(shown: Mapping[str, Tensor], job: Job) -> dict[str, Any]:
    """Return the pictures of a run; of a video what its first window repeats."""
    pictures = {name: value.to(job.device) for name, value in shown.items()}
    if "video" in pictures:
        pictures["video"] = pictures["video"][:, -job.config.overlap_history :]
    return pictures


def _replayed(noises: Sequence[Tensor], call: Call, *, number: int) -> Draw:
    """Return a source of the drawn noises of a video, then of further noise for its prefixes."""
    left = list(noises)
    own = call.generator[number] if isinstance(call.generator, list) else call.generator
    device = noises[0].device

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if left:
            return left.pop(0).to(dtype)
        return randn_tensor(shape, generator=own, device=device, dtype=dtype)

    return draw
