"""SkyReels-V2 as a `flowcache.runtime.model.VideoModel`: files, settings, networks, generation."""

from collections.abc import Collection, Generator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.checks import check_finite
from flowcache.runtime.hub import Missing
from flowcache.runtime.model import Job, Source, Work
from flowcache.runtime.plan import cost_lines
from flowcache.runtime.profile import Setting
from flowcache.runtime.video import to_pixels
from flowcache.wan import quantize, text
from flowcache.wan.dit import DiT, compiled_parts
from flowcache.wan.model import SAME_KEYS, WanModel, vae_dtype
from skyreels_v2 import checkpoint as checkpoints
from skyreels_v2 import work as works
from skyreels_v2.calibration import rescale_for
from skyreels_v2.config import RunConfig
from skyreels_v2.inputs import Media, check_mode, read_media, turn_to_fit
from skyreels_v2.memory import WindowMemory, networks_of
from skyreels_v2.pipeline import Conditioning, LatentCodec, SegmentProgress, generate
from skyreels_v2.released import PRESETS, RELEASED, released_name
from skyreels_v2.window import describe


class SkyReels(WanModel):
    """SkyReels-V2; see `VideoModel` for what each method is for."""

    name = "skyreels_v2"
    presets = PRESETS
    schema = RunConfig
    keys: Mapping[str, str] = MappingProxyType({**SAME_KEYS, "end_image": "end_image"})

    # Files and settings -----------------------------------------------------------------------

    def knows(self, name: str) -> bool:
        return name in ("demo", "auto", *RELEASED) or checkpoints.is_checkpoint(name)

    def required(self, source: Source) -> Collection[str]:
        is_i2v = source.sizes is not None and source.sizes.model_type == "i2v"
        return {"image"} if is_i2v else set()

    def find(self, name: str, *, is_dry: bool = False, download: bool = False) -> Source:
        if is_dry and name in RELEASED:
            return Source(name, plans_by_sizes=True, sizes=checkpoints.released_sizes(name))
        place = checkpoints.choose(name)
        if Path(place).expanduser().exists():
            return _source(checkpoints.find(place))
        known = released_name(str(place))
        sizes = None if known is None else checkpoints.released_sizes(known)
        return Source(str(place), sizes=sizes)

    def check(self, config: RunConfig, source: Source) -> RunConfig:
        if source.sizes is None:
            return config
        check_mode(config, source.sizes)
        config = turn_to_fit(config)
        if config.reuse.kind.takes("rescale"):
            rescale_for(config, source.sizes)
        return config

    def check_device(
        self, config: RunConfig, source: Source, device: torch.device, dtype: torch.dtype
    ) -> None:
        quantize.check(config.quantize, source.sizes, device=device, dtype=dtype)

    def missing(self, config: RunConfig, source: Source) -> Missing | None:
        if source.folder is not None or source.plans_by_sizes:
            return None
        missing = checkpoints.find_download(source.name)
        if missing is not None and source.sizes is None:
            raise UserError(
                f"{missing.describe()}: is not downloaded in a dry run, and its sizes are not "
                f"known: give --model as one of {', '.join(RELEASED)}, or run without --dry-run"
            )
        return missing

    def fetch(self, config: RunConfig, source: Source) -> tuple[RunConfig, Source]:
        return config, source if source.files else _source(checkpoints.find(source.name))

    def folder(self, source: Source) -> checkpoints.Checkpoint:
        return source.files

    def check_files(self, config: RunConfig, source: Source) -> None:
        checkpoints.check(source.files)

    def fingerprint(self, source: Source) -> str:
        return checkpoints.fingerprint(source.files)

    def identity(self, job: Job) -> tuple[object, ...]:
        config = job.config
        return str(job.source.files), config.quantize, config.vae_dtype, config.vae_compile

    def ingredients(self, job: Job) -> dict[str, Path]:
        image_encoder = job.source.files.image_encoder
        more = {} if image_encoder is None else {"image_encoder": image_encoder}
        return {**super().ingredients(job), **more}

    def setting(self, config: RunConfig) -> Setting:
        return Setting(
            num_steps=config.num_steps,
            shift=config.shift,
            lag=config.ar_step,
            guidance=[config.guidance] if len(works.branches_of(config)) > 1 else [],
        )

    # Planning ---------------------------------------------------------------------------------

    def media(self, config: RunConfig, source: Source) -> Media:
        return read_media(config)

    def work(self, config: RunConfig, source: Source, media: Media, dtype: torch.dtype) -> Work:
        return works.work_of(config, source.sizes, dtype=dtype)

    def title(self, job: Job) -> list[str]:
        config, source = job.config, job.source
        if source.files is None:
            name = source.name if source.plans_by_sizes else released_name(source.name)
            model = f"sizes of the released {name}, {config.dtype} = {job.dtype}; no files"
        else:
            dtype = str(job.dtype).removeprefix("torch.")
            model = f"{source.name}, {source.files.layout} layout, {dtype} on {job.device}"
        return [
            f"model        {model}",
            f"preset       {job.preset}: {config.attention} attention, {config.reuse.policy} "
            f"reuse, {config.kv.compress} KV compression",
        ]

    def lines(self, config: RunConfig, work: Work) -> list[str]:
        windows = ", ".join(describe(part.cut) for part in work.segments)
        in_first = work.segments[0].cut.num_frames * work.frame_tokens
        ticks = sum(
            len(part.ticks) if work.is_whole else sum(len(tick.steps) for tick in part.ticks)
            for part in work.segments
        )
        num_branches = len(work.branches)
        kv_tokens = max(part.kv_tokens for part in work.segments)
        return [
            f"video        {config.num_frames} frames of {config.width}x{config.height} at "
            f"{config.fps} fps, seed {config.seed}",
            f"segments     {len(work.segments)}: {windows}",
            f"ticks        {work.num_ticks} of {config.num_steps} steps per chunk, "
            f"{config.attention} attention, lag {config.ar_step}, {num_branches} branches",
            f"tokens       {work.frame_tokens} per latent frame, {in_first} in the first window",
            f"forwards     {ticks * num_branches}, "
            f"{work.flops / 1e15:.4g} PFLOPs if every step is computed",
            *cost_lines(work, cache=f"{kv_tokens} tokens per layer and branch", stored="results"),
        ]

    def footprint(self, job: Job, *, overlaps: bool) -> WindowMemory:
        sizes = job.source.sizes
        return WindowMemory(
            sizes,
            job.config,
            job.work,
            networks=networks_of(
                job.source.files, sizes, dtype=job.dtype, vae_dtype=vae_dtype(job.config)
            ),
            dtype=job.dtype,
            layout=job.ranks.layout,
            overlaps=overlaps,
        )

    # Running ----------------------------------------------------------------------------------

    def inputs(self, job: Job, encoded: Tensor) -> Conditioning:
        media, overlap = job.media, job.config.overlap_history
        video = None
        if media.video is not None and overlap is not None:
            video = to_pixels(media.video[-overlap:]).to(job.device)
        branches = job.work.branches
        return Conditioning(
            text={name: encoded[i : i + 1] for i, name in enumerate(branches)},
            image_features=self._image_features(job),
            image=media.image,
            end_image=media.end_image,
            video=video,
        )

    def _image_features(self, job: Job) -> Tensor | None:
        """Return what CLIP sees in the start image; None for models without."""
        path, image = job.source.files.image_encoder, job.media.image
        if path is None or image is None:
            return None
        vision = text.load_vision(path, dtype=job.dtype, device=job.device)
        return check_finite(
            vision.encode(image.movedim(1, 0)),
            "the features of the start image",
            modules={"image encoder": vision.model},
        )

    def load_dit(self, job: Job) -> DiT:
        mode = job.config.quantize
        device = job.device if mode is None else torch.device("cpu")
        dit = checkpoints.load_dit(job.source.files, dtype=job.dtype, device=device)
        if mode is not None:
            quantize.quantize(dit, mode, device=job.device)
        return dit

    def compile(self, job: Job, dit: DiT) -> None:
        work, num_own = job.work, len(job.ranks.local_branches(job.work.branches))
        # of two branches in one batch one may reuse alone
        is_batched = num_own > 1 and work.loop.sampling.batch_branches
        dit.parts = compiled_parts()
        dit.compile_ahead(
            num_frames=work.pass_tokens // work.frame_tokens,
            frame_tokens=work.frame_tokens // job.ranks.layout.sequence,
            batches=[num_own, 1] if is_batched else [1],
        )

    def generate(
        self, dit: DiT, vae: LatentCodec, config: RunConfig, inputs: Conditioning, /, **rest: Any
    ) -> Generator[SegmentProgress, None, None]:
        return generate(dit, vae, config, inputs, **rest)


MODEL = SkyReels()


def _source(found: checkpoints.Checkpoint) -> Source:
    return Source(found.folder.name, found.folder, files=found, sizes=found.config)
