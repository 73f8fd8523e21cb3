"""SkyReels-V2 as a `flowcache.runtime.model.VideoModel`: files, settings, networks, generation."""

from collections.abc import Collection, Generator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from flowcache.runtime.model import Job, Source, Work
from flowcache.runtime.plan import cost_lines
from flowcache.runtime.profile import Setting
from flowcache.runtime.stats import scaled
from flowcache.wan.calibration import rescale_for
from flowcache.wan.codec import LatentCodec
from flowcache.wan.dit import CLIP_WIDTH, DiT, DiTConfig, compiled_parts
from flowcache.wan.folder import Folders
from flowcache.wan.given import Conditioning, Media, read_media
from flowcache.wan.memory import Held
from flowcache.wan.model import SAME_KEYS, WanModel
from skyreels_v2 import work as works
from skyreels_v2.config import RunConfig
from skyreels_v2.inputs import check_mode, fit_image, turn_to_fit
from skyreels_v2.pipeline import SegmentProgress, generate
from skyreels_v2.released import DEMO, PRESETS, REAL_MODEL, RELEASED, released_name
from skyreels_v2.window import describe

FOLDERS = Folders(
    "SkyReels-V2 checkpoint",
    demo=DEMO,
    no_demo="the demo checkpoint is missing: restore it from the repository",
    real=REAL_MODEL,
    released=RELEASED,
)


def released_sizes(name: str) -> DiTConfig:
    """Return the sizes of a released model, which plan a run without its files.

    Source: the `config.json` files of the released checkpoints.
    """
    sizes = DiTConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
    if "-1.3b-" in name:
        sizes = DiTConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
    if name.startswith("i2v-"):
        return replace(sizes, model_type="i2v", in_dim=36, image_dim=CLIP_WIDTH)
    return replace(sizes, inject_sample_info=name == "df-1.3b-540p")


class SkyReels(WanModel):
    """SkyReels-V2; see `VideoModel` for what each method is for."""

    name = "skyreels_v2"
    presets = PRESETS
    schema = RunConfig
    folders = FOLDERS
    keys: Mapping[str, str] = MappingProxyType({**SAME_KEYS, "end_image": "end_image"})

    # Files and settings -----------------------------------------------------------------------

    def knows(self, name: str) -> bool:
        if name in ("demo", "auto", *RELEASED):
            return True
        return FOLDERS.holds(name) or released_name(name) is not None

    def required(self, source: Source) -> Collection[str]:
        is_i2v = source.sizes is not None and source.sizes.model_type == "i2v"
        return {"image"} if is_i2v else set()

    def sizes_of(self, name: str) -> DiTConfig | None:
        known = released_name(name)
        return None if known is None else released_sizes(known)

    def check(self, config: RunConfig, source: Source) -> RunConfig:
        if source.sizes is None:
            return config
        check_mode(config, source.sizes)
        config = turn_to_fit(config)
        if config.reuse.kind.takes("rescale"):
            rescale_for(config, source.sizes)
        return config

    def identity(self, job: Job) -> tuple[object, ...]:
        config = job.config
        modes = (config.quantize, config.text_quantize)
        return str(job.source.files), *modes, config.vae_dtype, config.vae_compile

    def setting(self, config: RunConfig) -> Setting:
        return Setting(
            num_steps=config.num_steps,
            shift=config.shift,
            lag=config.ar_step,
            guidance=[config.guidance] if len(works.branches_of(config)) > 1 else [],
        )

    # Planning ---------------------------------------------------------------------------------

    def media(self, config: RunConfig, source: Source) -> Media:
        return read_media(config, fit=fit_image, end_image=config.end_image)

    def work(self, config: RunConfig, source: Source, media: Media, dtype: torch.dtype) -> Work:
        return works.work_of(config, source.sizes, dtype=dtype)

    def title(self, job: Job) -> list[str]:
        config, source = job.config, job.source
        if source.files is None:
            name = source.name if source.plans_by_sizes else released_name(source.name)
            model = f"sizes of the released {name}, {config.dtype} = {job.dtype}; no files"
        else:
            dtype = str(job.dtype).removeprefix("torch.")
            model = f"{source.name}, {source.files.dit.layout} layout, {dtype} on {job.device}"
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
            f"{scaled(work.flops, 'FLOP', digits=4)} if every step is computed",
            *cost_lines(work, cache=f"{kv_tokens} tokens per layer and branch", stored="results"),
        ]

    def held(self, job: Job) -> Held:
        return works.held_of(job.config, job.work, job.source.sizes)

    # Running ----------------------------------------------------------------------------------

    def load_dit(self, job: Job) -> DiT:
        return job.source.files.dit.load(dtype=job.dtype, device=job.dit_source_device)

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
