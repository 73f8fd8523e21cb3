"""One run from its settings to the mp4 and the JSON beside it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowcache import job as jobs
from flowcache.attention import choose_kernel
from flowcache.cli import choose_device
from flowcache.config import find_preset, load_config, to_dict
from flowcache.errors import UserError
from flowcache.job import (
    Facts,
    Target,
    claim_output,
    config_layers,
    recorded_run,
    replay_lines,
    write_run,
)
from flowcache.record import Record, check_replay, replay_policies
from flowcache.settings import guidance_of, threshold_of
from flowcache.stats import RunStats
from flowcache.tune.applied import check_tuned_for, load_with_profile, profile_lines
from flowcache.video import check_ffmpeg
from magi1 import checkpoint as checkpoints
from magi1 import text, vae
from magi1.build import VAE_STRIDE, clip_of, dtype_of, setting_of
from magi1.captions import SpecialTokens, load_special_tokens
from magi1.checkpoint import Checkpoint
from magi1.dit import DiT
from magi1.fp8 import has_fp8_gemm
from magi1.inputs import num_latents, read_prefix
from magi1.pipeline import Conditioning, LatentCodec, generate
from magi1.plan import Plan, lines, make_plan, shown_frames
from magi1.released import FOLDER, Source, download, find_model, find_path, locate
from magi1.sampler import ALL_BRANCHES, GUIDANCE
from magi1.schedule import Clock
from magi1.settings import RunConfig

logger = logging.getLogger(__name__)

PRESETS = FOLDER / "configs"
BASE = PRESETS / "base.yaml"
ASSUMED_TOKENS = 100
"""Tokens of a prompt where no tokenizer is at hand to count them."""


@dataclass(frozen=True)
class Request(jobs.Request):
    """What a command line asks for; `model` is explained at `magi1.released.find_model`."""

    download: bool = False
    """Whether the weights of a released model come from the hub."""


@dataclass(frozen=True)
class Job:
    """A request that was found to be in order; nothing is loaded yet."""

    config: RunConfig
    source: Source
    checkpoint: Checkpoint
    tokens: SpecialTokens | None
    prefix: Tensor | None
    """Given frames, `[3, T, H, W]` in -1..1."""
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    path: Path
    overwrite: bool
    preset: str
    record: bool
    replay: Record | None


@dataclass(frozen=True)
class Models:
    """The loaded transformer and VAE."""

    dit: DiT
    vae: LatentCodec


def prepare(request: Request) -> Job:
    """Check everything that can be checked before anything large is loaded.

    Raises:
        UserError: the first thing that is wrong.
    """
    preset, source, config = read_settings(request)
    device = choose_device(config.device)
    dtype = dtype_of(config, device)
    path = claim_output(request, stem=f"{preset.stem}-{config.runtime_config.seed}")
    prefix = read_prefix(config)
    replay = _read_replay(request, config, num_prefix=_num_prefix(config, prefix))
    if request.download:
        config = download(config, source)
    checkpoint = checkpoints.find(config)
    tokens = _read_tokens(config, source)
    checkpoints.check(checkpoint)
    check_tuned_for(config.reuse, partial(checkpoints.fingerprint, checkpoint))
    _check_vae(config, checkpoint.vae)
    prompt_tokens = text.count_tokens(
        checkpoint.text_encoder, config.prompt, max_length=config.model_config.caption_max_length
    )
    plan = make_plan(
        config,
        num_prefix=_num_prefix(config, prefix),
        prompt_tokens=prompt_tokens,
        has_special_tokens=tokens is not None,
        dtype=dtype,
    )
    check_ffmpeg()
    return Job(
        config=config,
        source=source,
        checkpoint=checkpoint,
        tokens=tokens,
        prefix=prefix,
        plan=plan,
        device=device,
        dtype=dtype,
        path=path,
        overwrite=request.overwrite,
        preset=preset.stem,
        record=request.record,
        replay=replay,
    )


def read_settings(request: Request) -> tuple[Path, Source, RunConfig]:
    """Return the preset, where the model is, and all settings; only small files are read.

    Raises:
        UserError: a setting is wrong, or the profile that they name can't be used.
    """
    preset, source = find_preset(PRESETS, request.preset), find_model(request.model)
    folder = source.config_file.parent
    layers = config_layers(BASE, preset, checkpoint=folder, model=[source.config_file])

    def load(overrides: Sequence[str]) -> RunConfig:
        return load_config(RunConfig, layers, overrides=overrides)

    config = load_with_profile(load, request.overrides, folder=folder, setting_of=setting_of)
    return preset, source, locate(config, source)


def _read_replay(request: Request, config: RunConfig, *, num_prefix: int) -> Record | None:
    record = recorded_run(request)
    if record is not None:
        ticks = Clock.of(config).ticks(clip_of(config, num_prefix=num_prefix))
        check_replay(record, ticks={0: ticks}, branches=_recorded(config))
    return record


def _recorded(config: RunConfig) -> list[str]:
    """Return the branches that a run's record has."""
    return [ALL_BRANCHES, GUIDANCE] if guidance_of(config.reuse).is_on else [ALL_BRANCHES]


def _read_tokens(config: RunConfig, source: Source) -> SpecialTokens | None:
    if config.special_tokens is None:
        return None
    path = find_path(config.special_tokens, source)
    return load_special_tokens(path, channels=config.model_config.caption_channels)


def _num_prefix(config: RunConfig, prefix: Tensor | None) -> int:
    stride = config.runtime_config.temporal_downsample_factor
    return num_latents(prefix, temporal_stride=stride)


def _check_vae(config: RunConfig, folder: Path) -> None:
    """Check that VAE and transformer speak of the same latents."""
    found = vae.read_config(folder)
    for name, value, wanted in (
        ("z_chans", found.z_chans, config.model_config.latent_channels),
        ("patch_size", found.patch_size, VAE_STRIDE),
        ("patch_length", found.patch_length, config.runtime_config.temporal_downsample_factor),
    ):
        if value != wanted:
            raise UserError(
                f"{folder}: the VAE's {name} is {value}, the transformer takes {wanted}"
            )


def describe(job: Job) -> str:
    """Say what the run will do."""
    head = _head(job.source, job.config, job.preset, where=f"{_name(job.dtype)} on {job.device}")
    head += [*profile_lines(job.config.reuse), *replay_lines(job.replay)]
    return "\n".join([*head, *lines(job.plan, job.config), f"output       {job.path}"])


def plan_released(request: Request) -> str:
    """Say what a run of a released model will cost, by its sizes alone; no weights are needed.

    Raises:
        UserError: the settings are wrong.
    """
    preset, source, config = read_settings(request)
    dtype = dtype_of(config, torch.device("cuda"))
    num_prefix = _num_prefix(config, read_prefix(config))
    replay = _read_replay(request, config, num_prefix=num_prefix)
    plan = make_plan(
        config,
        num_prefix=num_prefix,
        prompt_tokens=ASSUMED_TOKENS,
        has_special_tokens=_read_tokens(config, source) is not None,
        dtype=dtype,
    )
    where = f"{_name(dtype)}, by its sizes alone, for a prompt of {ASSUMED_TOKENS} tokens"
    head = [*_head(source, config, preset.stem, where=where), *profile_lines(config.reuse)]
    return "\n".join([*head, *replay_lines(replay), *lines(plan, config)])


def _head(source: Source, config: RunConfig, preset: str, *, where: str) -> list[str]:
    engine, passes = config.engine_config, config.passes
    kind = "distilled" if engine.distill else "base"
    kind += ", 8-bit" if engine.fp8_quant else ""
    extra = {"clean": passes.clean_pass, "nearly clean": passes.nearly_clean_pass}
    made = ", ".join(name for name, is_made in extra.items() if is_made)
    return [
        f"model        {source.name} ({kind}), {where}",
        f"preset       {preset}: {config.reuse.policy} reuse, {config.kv.compress} KV compression, "
        f"extra passes: {made or 'none'}",
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_models(job: Job, *, stats: RunStats) -> Models:
    """Load the transformer and the VAE; with `offload` the VAE waits on the CPU."""
    config = job.config
    if config.engine_config.fp8_quant and not has_fp8_gemm(job.device):
        logger.warning("8-bit products are emulated in float32: %s has none", job.device)
    if config.engine_config.cp_size * config.engine_config.pp_size > 1:
        logger.warning("cp_size and pp_size of the config are left out: the run uses one device")
    with stats.stage("load", is_on_host=True):
        dit = checkpoints.load_dit(job.checkpoint, device=job.device, dtype=job.dtype)
        dit.kernel = choose_kernel(job.device, dtype=job.dtype)
        codec = vae.load(
            job.checkpoint.vae,
            scale=config.runtime_config.scale_factor,
            dtype=torch.bfloat16 if job.dtype == torch.bfloat16 else torch.float32,
            device="cpu" if config.offload else job.device,
        )
    return Models(dit, codec)


def load_text(job: Job) -> text.TextEncoder:
    """Load the text encoder."""
    config = job.config
    # the release says by t5_device only whether the encoder shares the GPU
    device = job.device if config.runtime_config.t5_device != "cpu" else torch.device("cpu")
    return text.load(
        job.checkpoint.text_encoder,
        max_length=config.model_config.caption_max_length,
        device=device,
    )


def encode_inputs(
    job: Job, *, stats: RunStats, encoder: text.TextEncoder | None = None
) -> Conditioning:
    """Encode the prompt; an encoder that is loaded for it is gone when this returns.

    Args:
        encoder: where it is loaded already.
    """
    config = job.config
    choice = config.tokens
    if job.tokens is None and (choice.names() or choice.duration or choice.negative):
        logger.warning(
            "no special tokens: the model is not told of quality and duration; set special_tokens "
            "to the path of special_tokens.npz"
        )
    with stats.stage("text"):
        encoded = (encoder or load_text(job)).encode(config.prompt)
    return Conditioning(encoded, tokens=job.tokens, prefix=job.prefix)


def run(job: Job) -> dict[str, Any]:
    """Make the video, write it and its JSON, and return what the JSON holds."""
    stats = RunStats(job.device, records=job.record)
    conditioning = encode_inputs(job, stats=stats)
    models = load_models(job, stats=stats)
    return render(job, models, conditioning, stats=stats)


def render(
    job: Job, models: Models, conditioning: Conditioning, *, stats: RunStats
) -> dict[str, Any]:
    """Denoise and write with models that are loaded already."""
    run_config = job.config.runtime_config
    size = (run_config.video_size_h, run_config.video_size_w)
    return write_run(
        generate(
            models.dit,
            models.vae,
            job.config,
            conditioning,
            stats=stats,
            policies=None if job.replay is None else partial(replay_policies, job.replay),
        ),
        Target(job.path, job.overwrite, fps=run_config.fps, size=size),
        stats=stats,
        num_ticks=job.plan.num_ticks,
        num_chunks=len(job.plan.clip.generated),
        facts=Facts(
            preset=job.preset,
            model=job.source.name,
            attention_kernel=models.dit.kernel.name,
            config=to_dict(job.config),
            policy=job.config.reuse.policy,
            threshold=threshold_of(job.config.reuse),
            replay=job.replay,
            num_steps=run_config.num_steps,
            chunk_frames={0: shown_frames(job.plan.clip)},
        ),
    )
