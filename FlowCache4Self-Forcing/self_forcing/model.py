"""Self-Forcing as a `flowcache.runtime.model.VideoModel`: files, settings, networks, generation."""

from collections.abc import Collection, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowcache.runtime.hub import Missing
from flowcache.runtime.model import Job, Progress, Source, Work
from flowcache.runtime.plan import cost_lines
from flowcache.runtime.profile import Setting
from flowcache.runtime.stats import scaled
from flowcache.wan.calibration import rescale_for
from flowcache.wan.dit import DiT, DiTConfig
from flowcache.wan.given import Conditioning, Media
from flowcache.wan.memory import Held
from flowcache.wan.model import WanModel, source_of
from flowcache.wan.rounded import RoundedDiT
from flowcache.wan.scenes import scene_lines
from flowcache.wan.vae import VAE
from self_forcing.checkpoint import FOLDERS, SIZES, find_weights_download, with_weights
from self_forcing.config import RunConfig
from self_forcing.pipeline import generate
from self_forcing.released import PRESETS, REAL_MODEL, RELEASED
from self_forcing.work import held_of, work_of


class SelfForcing(WanModel):
    """Self-Forcing and Causal-Forcing; see `VideoModel` for what each method is for."""

    name = "self_forcing"
    presets = PRESETS
    schema = RunConfig
    folders = FOLDERS
    places: Collection[str] = ("checkpoint",)

    # Files and settings -----------------------------------------------------------------------

    def knows(self, name: str) -> bool:
        return name in (*RELEASED, REAL_MODEL) or FOLDERS.is_whole(Path(name).expanduser())

    def sizes_of(self, name: str) -> DiTConfig | None:
        return SIZES if name in (*RELEASED, REAL_MODEL) else None

    def check(self, config: RunConfig, source: Source) -> RunConfig:
        num_steps = len(config.step_list or ()) or config.num_steps or 50
        if source.sizes is not None and config.reuse.kind.takes("rescale"):
            rescale_for(config, source.sizes)
        return replace(config, num_steps=num_steps)

    def missing(self, config: RunConfig, source: Source) -> Missing | None:
        if source.plans_by_sizes:
            return None
        return super().missing(config, source) or find_weights_download(config, source.files)

    def fetch(self, config: RunConfig, source: Source) -> tuple[RunConfig, Source]:
        config, source = super().fetch(config, source)
        return config, source_of(with_weights(config, source.files))

    def identity(self, job: Job) -> tuple[object, ...]:
        config = job.config
        modes = (config.quantize, config.text_quantize, config.precision)
        return str(job.source.files), *modes, config.vae_dtype, config.vae_compile

    def setting(self, config: RunConfig) -> Setting:
        num_steps = config.num_steps or 50
        guidance = [config.scale] if config.step_list is None and config.scale > 1 else []
        return Setting(num_steps=num_steps, shift=config.shift, lag=num_steps, guidance=guidance)

    def prompts(self, job: Job) -> list[str]:
        (_, first), *later = job.config.scenes
        branches = [first, job.config.negative_prompt][: len(job.work.branches)]
        return [*branches, *(text for _, text in later)]

    # Planning ---------------------------------------------------------------------------------

    def work(self, config: RunConfig, source: Source, media: Media, dtype: torch.dtype) -> Work:
        return work_of(config, source.sizes, dtype=dtype)

    def title(self, job: Job) -> list[str]:
        config, files = job.config, job.source.files
        dtype = str(job.dtype).removeprefix("torch.")
        model = f"sizes of {job.source.name}, {dtype}; no files"
        if files is not None:
            model = f"{job.source.name}, {files.dit.files[0].name}, {dtype} on {job.device}"
        loop = "rolling" if config.rolling else "few steps" if config.step_list else "many steps"
        return [
            f"model        {model}",
            f"preset       {job.preset}: {loop}, chunks of {config.chunk_frames} latent frames, "
            f"{config.precision} precision, {config.reuse.policy} reuse",
        ]

    def lines(self, config: RunConfig, work: Work) -> list[str]:
        (part,) = work.segments
        seen = "all" if config.window is None else f"{config.window}, the first {config.sink} stay"
        if config.kv.compress != "none":
            seen = f"tokens kept by {config.kv.compress}, window {config.window or 'its own'}"
        calls = (work.num_ticks + len(part.tokens) - 1) * len(work.branches)
        return [
            f"video        {config.num_frames} frames of {config.width}x{config.height} at "
            f"{config.fps} fps, seed {config.seed}",
            f"chunks       {len(part.tokens)}, {len(part.given)} given; latent frames seen: {seen}",
            *scene_lines(config.scenes, recaches=config.recache),
            f"ticks        {work.num_ticks}, {len(work.branches)} branches",
            f"tokens       {work.frame_tokens} per latent frame",
            f"forwards     {calls} with clean passes, {scaled(work.flops, 'FLOP', digits=4)}",
            *cost_lines(
                work, cache=f"{part.kv_tokens} tokens per layer and branch", stored="results"
            ),
        ]

    def held(self, job: Job) -> Held:
        return held_of(job.config, job.work, job.source.sizes)

    # Running ----------------------------------------------------------------------------------

    def load_dit(self, job: Job) -> DiT:
        kind = RoundedDiT if job.config.precision == "reference" else DiT
        return job.source.files.dit.load(dtype=job.dtype, device=job.dit_source_device, kind=kind)

    def compile(self, job: Job, dit: DiT) -> None:
        if job.config.precision != "reference":  # its parts are others
            super().compile(job, dit)

    def generate(
        self, dit: DiT, vae: VAE, config: RunConfig, inputs: Conditioning, /, **rest: Any
    ) -> Generator[Progress, None, None]:
        return generate(dit, vae, config, inputs, **rest)


MODEL = SelfForcing()
