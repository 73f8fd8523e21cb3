"""One run from its settings to the mp4 and the JSON beside it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowcache.attention import check_available, choose_kernels, describe_choice
from flowcache.errors import UserError
from flowcache.runtime import job as jobs
from flowcache.runtime.cli import choose_device
from flowcache.runtime.compiling import should_compile
from flowcache.runtime.config import find_preset, load_config, to_dict
from flowcache.runtime.embeddings import cached_embedding, check_cache
from flowcache.runtime.finite import check_finite
from flowcache.runtime.job import (
    Facts,
    Target,
    claim_output,
    config_layers,
    follow,
    recorded_run,
    replay_lines,
    write_run,
)
from flowcache.runtime.memory import MemoryPlan, limit_of, parse_limit
from flowcache.runtime.overlap import should_overlap
from flowcache.runtime.parallel import layout_lines, layout_of, own_bytes
from flowcache.runtime.precision import release_cache, set_float32_precision
from flowcache.runtime.profiled import check_tuned_for, load_with_profile, profile_lines
from flowcache.runtime.ranks import Layout, Ranks
from flowcache.runtime.record import Record, check_replay, replay_policies
from flowcache.runtime.settings import guidance_of, threshold_of
from flowcache.runtime.stats import RunStats
from flowcache.runtime.video import check_ffmpeg
from magi1 import checkpoint as checkpoints
from magi1 import text, vae
from magi1.build import VAE_STRIDE, clip_of, dtype_of, sampling_of, setting_of, tiling_of
from magi1.build import layout_of as layout_tokens
from magi1.checkpoint import Checkpoint
from magi1.config import RunConfig
from magi1.dit import DiT, compiled_parts
from magi1.fp8 import has_fp8_gemm
from magi1.inputs import num_latents, read_prefix
from magi1.memory import placed, plan_memory
from magi1.pipeline import Conditioning, generate
from magi1.plan import Plan, attention_shape, lines, make_plan, shown_frames
from magi1.released import (
    FOLDER,
    RELEASED,
    Source,
    are_there,
    download,
    find_download,
    find_model,
    find_path,
    locate,
)
from magi1.sampler import ALL_BRANCHES, GUIDANCE
from magi1.schedule import Clock
from magi1.text import SpecialTokens, load_special_tokens

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
    memory: MemoryPlan | None
    """None: it is not known how much there is, and nothing is moved."""
    device: torch.device
    dtype: torch.dtype
    path: Path
    overwrite: bool
    preset: str
    record: bool
    replay: Record | None
    ranks: Ranks
    """The processes that make the video; before `run` their layout only."""
    keeps_partial: bool = True
    """Whether the frames of an unfinished video are kept."""

    @property
    def placed(self) -> RunConfig:
        """The settings, with things kept on the host as the memory plan says."""
        return self.config if self.memory is None else placed(self.config, self.memory.residence)


@dataclass(frozen=True)
class Models:
    """The loaded transformer and VAE."""

    dit: DiT
    vae: vae.VAE


def prepare(request: Request, ranks: Ranks | None = None) -> Job:
    """Check everything that can be checked before anything large is loaded.

    Args:
        ranks: the processes that make the video; None: this one.

    Raises:
        UserError: the first thing that is wrong.
    """
    preset, source, config = read_settings(request)
    ranks = Ranks() if ranks is None else ranks
    device = choose_device(config.device, local_rank=ranks.place.shared_rank)
    layout = divide(config, ranks)
    dtype = dtype_of(config, device)
    check_available(config.attention_kernel, device, dtype=dtype)
    if config.compile:
        should_compile(config.compile, device)
    check_cache(config.embedding_cache)
    path = claim_output(request, stem=f"{preset.stem}-{config.runtime_config.seed}")
    prefix = read_prefix(config)
    replay = _read_replay(request, config, num_prefix=_num_prefix(config, prefix))
    if request.download or (source.may_download and not are_there(config)):
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
    plan = per_process(plan, layout)
    check_ffmpeg()
    limit, memory = limit_of(config.memory_limit, device), None
    if config.memory_limit != "none" and (limit or request.is_dry):
        memory = plan_memory(
            config,
            checkpoint,
            plan,
            dtype=dtype,
            limit=limit,
            has_host=device.type != "cpu",
            layout=layout,
        )
    return Job(
        config=config,
        source=source,
        checkpoint=checkpoint,
        tokens=tokens,
        prefix=prefix,
        plan=plan,
        memory=memory,
        device=device,
        dtype=dtype,
        path=path,
        overwrite=request.overwrite,
        preset=preset.stem,
        record=request.record,
        replay=replay,
        ranks=replace(ranks, layout=layout),
    )


def divide(config: RunConfig, ranks: Ranks) -> Layout:
    """Return how the processes divide the run.

    Raises:
        UserError: they can't.
    """
    return layout_of(
        config.parallel,
        ranks.place.size,
        num_branches=len(sampling_of(config).passes),
        num_heads=config.model_config.num_query_groups,
        num_tokens=layout_tokens(config).chunk_tokens,
    )


def per_process(plan: Plan, layout: Layout) -> Plan:
    """Return the plan with the caches that each process has at most."""
    num_branches = plan.num_branches
    return replace(
        plan,
        kv_bytes=own_bytes(plan.kv_bytes, layout, num_branches=num_branches),
        scoring_bytes=own_bytes(plan.scoring_bytes, layout, num_branches=num_branches),
        query_bytes=own_bytes(plan.query_bytes, layout, num_branches=num_branches),
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
    head += layout_lines(job.ranks.layout)
    memory = [] if job.memory is None else job.memory.lines()
    return "\n".join([*head, *lines(job.plan, job.config), *memory, f"output       {job.path}"])


def plan_without_files(request: Request, ranks: Ranks | None = None) -> str | None:
    """Return the plan of a dry run that has no weights to look at; None: it has.

    Args:
        ranks: the processes that would make the video; None: this one.

    Raises:
        UserError: the settings are wrong, or the weights are not to be had.
    """
    if not request.is_dry:
        return None
    _, source, config = read_settings(request)
    may_download = request.download or (source.may_download and not are_there(config))
    missing = find_download(config, source) if source.is_released and may_download else None
    if missing is None and request.model not in RELEASED:
        return None
    plan = plan_released(request, ranks)
    return plan if missing is None else f"{plan}\ndownload     {missing.describe()}"


def plan_released(request: Request, ranks: Ranks | None = None) -> str:
    """Say what a run of a released model will cost, by its sizes alone; no weights are needed.

    Args:
        ranks: the processes that would make the video; None: this one.

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
    layout = divide(config, Ranks() if ranks is None else ranks)
    plan, head = per_process(plan, layout), [*head, *layout_lines(layout)]
    limit = parse_limit(config.memory_limit)
    logger.info("planning the memory: some seconds")
    memory = plan_memory(config, None, plan, dtype=dtype, limit=limit, has_host=True, layout=layout)
    return "\n".join([*head, *replay_lines(replay), *lines(plan, config), *memory.lines()])


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
    """Load transformer and VAE, compile layers; with `offload` the VAE waits on the CPU."""
    config = job.config
    set_float32_precision(job.dtype)
    if config.engine_config.fp8_quant and not has_fp8_gemm(job.device):
        logger.warning("8-bit products are emulated in float32: %s has none", job.device)
    if config.engine_config.cp_size * config.engine_config.pp_size > 1:
        logger.warning(
            "cp_size and pp_size of the config are left out: several GPUs are used with torchrun "
            "and divided by parallel.branch and parallel.sequence"
        )
    with stats.stage("load", is_on_host=True):
        dit = checkpoints.load_dit(job.checkpoint, device=job.device, dtype=job.dtype)
        dit.kernel, dit.cross_kernel = choose_kernels(
            job.device,
            dtype=job.dtype,
            shape=attention_shape(config, job.plan),
            num_text=job.plan.text_tokens,
            wanted=config.attention_kernel,
        )
        logger.info("%s", describe_choice(dit.kernel, dit.cross_kernel))
        if should_compile(config.compile, job.device):
            dit.parts = compiled_parts()
            # here, where processes may differ by minutes; in the first tick they may not
            tokens = layout_tokens(config).chunk_tokens // job.ranks.layout.sequence
            dit.compile_ahead(num_tokens=tokens)
        codec = vae.load(
            job.checkpoint.vae,
            scale=config.runtime_config.scale_factor,
            tiling=tiling_of(config),
            dtype=torch.bfloat16 if job.dtype == torch.bfloat16 else torch.float32,
            device="cpu" if job.placed.offload else job.device,
        )
    return Models(dit, codec)


def load_text(job: Job) -> text.TextEncoder:
    """Load the text encoder."""
    config = job.placed
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

    def encode() -> Tensor:
        own = encoder or load_text(job)
        made = own.encode(config.prompt)
        modules = {"text encoder": own.model}
        return check_finite(made, "the embeddings of the prompt", modules=modules)

    with stats.stage("text"):
        encoded = job.ranks.from_first(
            lambda: cached_embedding(
                job.config.embedding_cache,
                lambda: _text_facts(job),
                encode,
            ).cpu()
        )
    return Conditioning(encoded, tokens=job.tokens, prefix=job.prefix)


def _text_facts(job: Job) -> dict[str, Any]:
    """Return what the encoded prompt depends on."""
    is_on_host = job.placed.runtime_config.t5_device == "cpu"
    return {
        "prompts": [job.config.prompt],
        "encoder": text.fingerprint(job.checkpoint.text_encoder),
        "max_length": job.config.model_config.caption_max_length,
        "dtype": "torch.float32",
        "device": "cpu" if is_on_host else job.device.type,
    }


def run(job: Job) -> dict[str, Any]:
    """Make the video, write it and its JSON, and return what the JSON holds.

    With several processes the first one writes; the others return nothing.
    """
    job = replace(job, ranks=job.ranks.divided(job.device))
    stats = RunStats(job.device, records=job.record)
    conditioning = encode_inputs(job, stats=stats)
    release_cache(job.device)
    models = load_models(job, stats=stats)
    release_cache(job.device)
    job.ranks.wait()
    return render(job, models, conditioning, stats=stats)


def render(
    job: Job, models: Models, conditioning: Conditioning, *, stats: RunStats
) -> dict[str, Any]:
    """Denoise and write with models that are loaded already."""
    run_config = job.config.runtime_config
    size = (run_config.video_size_h, run_config.video_size_w)
    shown = generate(
        models.dit,
        models.vae,
        job.placed,
        conditioning,
        stats=stats,
        policies=None if job.replay is None else partial(replay_policies, job.replay),
        ranks=job.ranks,
    )
    if not job.ranks.is_first:
        return follow(shown, stats=stats, ranks=job.ranks)
    return write_run(
        shown,
        Target(
            job.path,
            job.overwrite,
            fps=run_config.fps,
            size=size,
            keeps_partial=job.keeps_partial,
        ),
        stats=stats,
        ranks=job.ranks,
        num_ticks=job.plan.num_ticks,
        num_chunks=len(job.plan.clip.generated),
        modules={"transformer": models.dit, "VAE": models.vae.model},
        overlaps=should_overlap(
            job.placed.overlap, job.device, takes_turns=job.ranks.place.size > 1
        ),
        facts=Facts(
            preset=job.preset,
            model=job.source.name,
            attention_kernel=models.dit.kernel.name,
            attention_probe=dict(models.dit.kernel.probed),
            cross_attention_kernel=models.dit.cross_kernel.name,
            cross_attention_probe=dict(models.dit.cross_kernel.probed),
            compilation=models.dit.parts.compilation,
            config=to_dict(job.config),
            policy=job.config.reuse.policy,
            threshold=threshold_of(job.config.reuse),
            replay=job.replay,
            memory=None if job.memory is None else job.memory.to_dict(),
            num_steps=run_config.num_steps,
            chunk_frames={0: shown_frames(job.plan.clip)},
        ),
    )
