"""MAGI-1 as a `flowcache.runtime.model.VideoModel`: files, settings, networks, generation."""

import logging
from collections.abc import Collection, Generator, Hashable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flowcache.errors import UserError
from flowcache.runtime.checks import check_finite
from flowcache.runtime.hub import Missing
from flowcache.runtime.model import Job, Progress, Source, VideoModel, Work
from flowcache.runtime.plan import cost_lines
from flowcache.runtime.profile import Setting
from flowcache.runtime.quantize import check
from flowcache.runtime.stats import scaled
from magi1 import checkpoint as checkpoints
from magi1 import released, text, vae
from magi1 import work as works
from magi1.config import PIXELS_PER_LATENT, RunConfig
from magi1.dit import DiT, compiled_parts, quantised_parts
from magi1.fp8 import has_fp8_gemm
from magi1.inputs import Media, num_latents
from magi1.memory import ClipMemory, networks_for
from magi1.pipeline import Conditioning, generate_clip
from magi1.schedule import SHIFT, Clock
from magi1.vae import VAE

logger = logging.getLogger(__name__)

ASSUMED_TOKENS = 100
"""Tokens of a prompt where no tokenizer is at hand to count them."""


class Magi(VideoModel):
    """MAGI-1; see `VideoModel` for what each method is for."""

    name = "magi1"
    presets = released.PRESETS
    schema = RunConfig
    keys: Mapping[str, str] = MappingProxyType(
        {
            **{key: key for key in ("prompt", "image", "video", "memory_limit", "embedding_cache")},
            "guidance": "guidance",
            **RunConfig.FLAT_NAMES,
        }
    )
    on_host: Mapping[str, tuple[str, Any]] = MappingProxyType(
        {
            # the release says by t5_device only whether the encoder shares the GPU
            "text_on_host": ("runtime_config.t5_device", "cpu"),
            "dit_aside": ("offload", True),
            "kv_on_host": ("engine_config.kv_offload", True),
        }
    )
    places: Collection[str] = (*checkpoints.PATH_FIELDS, "special_tokens")

    # Files and settings -----------------------------------------------------------------------

    def knows(self, name: str) -> bool:
        return name == "auto" or checkpoints.is_known(name)

    def find(self, name: str, *, is_dry: bool = False, download: bool = False) -> Source:
        return checkpoints.find_model(name, wants_download=download)

    def check(self, config: RunConfig, source: Source) -> RunConfig:
        return checkpoints.locate(config, source)

    def dtype(self, config: RunConfig, device: torch.device) -> torch.dtype:
        return works.dtype_of(config, device)

    def check_device(
        self, config: RunConfig, source: Source, device: torch.device, dtype: torch.dtype
    ) -> None:
        if config.quantize is not None:
            parts = self.quantised(works.empty_dit(config, dtype))
            check(config.quantize, parts, device=device, dtype=dtype)

    def missing(self, config: RunConfig, source: Source) -> Missing | None:
        if not checkpoints.is_released(source) or not _may_download(config, source):
            return None
        return checkpoints.missing_files(config, source)

    def fetch(self, config: RunConfig, source: Source) -> tuple[RunConfig, Source]:
        if _may_download(config, source):
            config = checkpoints.download(config, source)
        return config, replace(source, files=checkpoints.Checkpoint.find(config))

    def check_files(self, config: RunConfig, source: Source) -> None:
        source.files.check()
        folder, model = source.files.vae, config.model_config
        found = vae.read_config(folder)
        for name, value, wanted in (
            ("z_chans", found.z_chans, model.latent_channels),
            ("patch_size", found.patch_size, PIXELS_PER_LATENT),
            ("patch_length", found.patch_length, config.runtime_config.temporal_downsample_factor),
        ):
            if value != wanted:
                raise UserError(
                    f"{folder}: the VAE's {name} is {value}, the transformer takes {wanted}"
                )

    def fingerprint(self, source: Source) -> str:
        return source.files.fingerprint()

    def identity(self, job: Job) -> tuple[Hashable, ...]:
        # the config of its files holds the settings of the run, too: prompt, seed, number of steps
        config, files, run = job.config, job.source.files, job.config.runtime_config
        return (
            *(files.dit_files, files.vae, files.text_encoder),
            *(str(config.model_config), str(config.engine_config)),
            *(run.scale_factor, run.fps, run.t5_device),
            *(config.quantize, config.text_quantize),
        )

    def ingredients(self, job: Job) -> dict[str, Path | Sequence[Tensor]]:
        files, tokens = job.source.files, job.media.tokens
        found: dict[str, Path | Sequence[Tensor]] = {
            "vae": files.vae,
            "text_encoder": files.text_encoder,
        }
        return found if tokens is None else {**found, "special_tokens": astuple(tokens)}

    def setting(self, config: RunConfig) -> Setting:
        run, guidance = config.runtime_config, works.loop_of(config).guidance
        scales: list[float] = []
        if guidance is not None:
            scales = [*guidance.t_range, *guidance.prev_scales, *guidance.text_scales]
        return Setting(
            num_steps=run.num_steps, shift=SHIFT, lag=Clock.of(config).stage, guidance=scales
        )

    # Planning ---------------------------------------------------------------------------------

    def media(self, config: RunConfig, source: Source) -> Media:
        return Media.read(config, source)

    def work(self, config: RunConfig, source: Source, media: Media, dtype: torch.dtype) -> Work:
        stride = config.runtime_config.temporal_downsample_factor
        prompt_tokens = ASSUMED_TOKENS
        if source.files is not None:
            most = config.model_config.caption_max_length
            folder = source.files.text_encoder
            prompt_tokens = text.count_tokens(folder, config.prompt, max_length=most)
        return works.clip_work(
            config,
            num_prefix=num_latents(media.prefix, temporal_stride=stride),
            prompt_tokens=prompt_tokens,
            has_special_tokens=media.tokens is not None,
            dtype=dtype,
        )

    def title(self, job: Job) -> list[str]:
        config, engine, passes = job.config, job.config.engine_config, job.config.passes
        kind = "distilled" if engine.distill else "base"
        kind += ", 8-bit" if engine.fp8_quant else ""
        where = str(job.dtype).removeprefix("torch.")
        if job.source.files is None:
            where += f", by its sizes alone, for a prompt of {ASSUMED_TOKENS} tokens"
        else:
            where += f" on {job.device}"
        extra = {"clean": passes.clean_pass, "nearly clean": passes.nearly_clean_pass}
        made = ", ".join(name for name, is_made in extra.items() if is_made)
        return [
            f"model        {job.source.name} ({kind}), {where}",
            f"preset       {job.preset}: {config.reuse.policy} reuse, {config.kv.compress} "
            f"KV compression, extra passes: {made or 'none'}",
        ]

    def lines(self, config: RunConfig, work: Work) -> list[str]:
        run, clip = config.runtime_config, work.segments[0].cut
        asked, made = run.num_frames, clip.num_frames_out
        rounded = "" if asked == made else f" ({asked} asked, {made} made: whole chunks)"
        given = f", {clip.num_prefix} latents given" if clip.num_prefix else ""
        reach = "all chunks" if not run.noise2clean_kvrange else f"{list(run.noise2clean_kvrange)}"
        place = " (in the CPU's memory)" if config.engine_config.kv_offload else ""
        kv_chunks = work.segments[0].kv_tokens // work.pass_tokens
        return [
            f"video        {made} frames of {run.video_size_w}x{run.video_size_h} at {run.fps} fps"
            f"{rounded}, seed {run.seed}",
            f"chunks       {len(clip.generated)} of {run.chunk_width} latents{given}; "
            f"{run.window_size} at once, each sees {reach}",
            f"ticks        {work.num_ticks} of {run.num_steps} steps per chunk, guidance passes "
            f"{len(work.passes)}",
            f"tokens       {work.frame_tokens} per latent frame, "
            f"{work.frame_tokens * run.chunk_width} per chunk, text {work.text_tokens}",
            f"compute      {scaled(work.flops, 'FLOP', digits=4)} if every step is computed",
            *cost_lines(
                work,
                cache=f"{kv_chunks} chunks per layer and branch{place}",
                stored="results and signals",
            ),
        ]

    def footprint(self, job: Job, *, overlaps: bool) -> ClipMemory:
        return ClipMemory(
            job.config,
            job.work,
            networks=networks_for(job.source.files, job.config, dtype=job.dtype),
            dtype=job.dtype,
            layout=job.ranks.layout,
            overlaps=overlaps,
        )

    # Running ----------------------------------------------------------------------------------

    def text_facts(self, job: Job) -> dict[str, Any]:
        return {
            "prompts": [job.config.prompt],
            "encoder": text.hash_encoder(job.source.files.text_encoder),
            "max_length": job.config.model_config.caption_max_length,
            "dtype": "torch.float32",
        }

    def load_text(self, job: Job) -> text.TextEncoder:
        return text.load(
            job.source.files.text_encoder,
            max_length=job.config.model_config.caption_max_length,
            device=job.text_source_device,
        )

    def encode_text(self, job: Job, encoder: text.TextEncoder) -> Tensor:
        made = encoder.encode(job.config.prompt)
        modules = {"text encoder": encoder.model}
        return check_finite(made, "the embeddings of the prompt", modules=modules)

    def inputs(self, job: Job, encoded: Tensor) -> Conditioning:
        choice, tokens = job.config.tokens, job.media.tokens
        if tokens is None and (choice.names() or choice.duration or choice.negative):
            logger.warning(
                "no special tokens: the model is not told of quality and duration; set "
                "special_tokens to the path of special_tokens.npz"
            )
        return Conditioning(encoded, tokens=tokens, prefix=job.media.prefix)

    def load_dit(self, job: Job) -> DiT:
        engine = job.config.engine_config
        if engine.fp8_quant and not has_fp8_gemm(job.device):
            logger.warning("8-bit products are emulated in float32: %s has none", job.device)
        if engine.cp_size * engine.pp_size > 1:
            logger.warning(
                "cp_size and pp_size of the config are left out: several GPUs are used with "
                "torchrun and divided by parallel.branch and parallel.sequence"
            )
        return job.source.files.load_dit(device=job.dit_source_device, dtype=job.dtype)

    def blocks(self, dit: DiT) -> Sequence[nn.Module]:
        return list(dit.videodit_blocks.layers)

    def quantised(self, dit: DiT) -> Sequence[nn.Module]:
        return quantised_parts(dit.videodit_blocks.layers)

    def compile(self, job: Job, dit: DiT) -> None:
        dit.parts = compiled_parts()
        dit.compile_ahead(num_tokens=job.work.pass_tokens // job.ranks.layout.sequence)

    def load_vae(self, job: Job) -> VAE:
        """Load the VAE; with `offload` it waits on the CPU."""
        return vae.load(
            job.source.files.vae,
            scale=job.config.runtime_config.scale_factor,
            tiling=works.tiling_of(job.config),
            dtype=torch.bfloat16 if job.dtype == torch.bfloat16 else torch.float32,
            device="cpu" if job.placed.offload else job.device,
        )

    def generate(
        self, dit: DiT, vae: VAE, config: RunConfig, inputs: Conditioning, /, **rest: Any
    ) -> Generator[Progress, None, None]:
        return generate_clip(dit, vae, config, inputs, **rest)


MODEL = Magi()


def _may_download(config: RunConfig, source: Source) -> bool:
    """Tell whether weights come from the hub."""
    if source.download == "missing":
        return not checkpoints.are_there(config)
    return source.download == "always"
