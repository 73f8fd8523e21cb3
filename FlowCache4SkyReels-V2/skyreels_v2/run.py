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
from flowcache.runtime.bounds import given_path
from flowcache.runtime.cli import DTYPES, choose_device, choose_dtype
from flowcache.runtime.compiling import should_compile
from flowcache.runtime.config import find_preset, load_config, to_dict
from flowcache.runtime.embeddings import cached_embedding, check_cache
from flowcache.runtime.finite import check_finite
from flowcache.runtime.job import (
    Facts,
    Request,
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
from flowcache.runtime.settings import threshold_of
from flowcache.runtime.stats import RunStats
from flowcache.runtime.video import check_ffmpeg, to_pixels
from flowcache.wan import quantize, text, vae
from flowcache.wan.dit import DiT, DiTConfig, compiled_parts
from skyreels_v2 import checkpoint as checkpoints
from skyreels_v2.build import (
    batches_branches,
    branches_of,
    rescale_for,
    sampling_of,
    setting_of,
    tokens_per_frame,
)
from skyreels_v2.checkpoint import Checkpoint
from skyreels_v2.config import RunConfig
from skyreels_v2.inputs import Media, check_mode, read_media, turn_to_fit
from skyreels_v2.memory import placed, plan_memory
from skyreels_v2.pipeline import Conditioning, generate
from skyreels_v2.plan import Plan, attention_shape, lines, make_plan, shown_frames
from skyreels_v2.released import RELEASED, released_name

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent.parent
PRESETS = FOLDER / "configs"
BASE = PRESETS / "base.yaml"
DEMO = FOLDER / "demo"
REAL_MODEL = "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers"


@dataclass(frozen=True)
class Job:
    """A request that was found to be in order; nothing is loaded yet."""

    config: RunConfig
    checkpoint: Checkpoint
    media: Media
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
    preset = find_preset(PRESETS, request.preset)
    model = choose_model(request.model)
    if not Path(model).expanduser().exists():
        # a hub id: tell a mistake in the settings before gigabytes are downloaded
        load_config(
            RunConfig, config_layers(BASE, preset, checkpoint=None), overrides=request.overrides
        )
    checkpoint = checkpoints.find(model)
    config = read_settings(request, preset, folder=checkpoint.folder)
    check_mode(config, checkpoint.config)
    config = turn_to_fit(config)
    ranks = Ranks() if ranks is None else ranks
    device = choose_device(config.device, local_rank=ranks.place.shared_rank)
    dtype = choose_dtype(config.dtype, device)
    check_available(config.attention_kernel, device, dtype=dtype)
    if config.compile:
        should_compile(config.compile, device)
    check_cache(config.embedding_cache)
    quantize.check(config.quantize, checkpoint.config, device=device, dtype=dtype)
    if config.reuse.policy in ("flowcache", "teacache"):
        rescale_for(config, checkpoint.config)
    layout = divide(config, checkpoint.config, ranks)
    plan = per_process(make_plan(config, checkpoint.config, dtype=dtype), layout)
    replay = read_replay(request, config, plan)
    path = claim_output(request, stem=f"{preset.stem}-{config.seed}")
    media = read_media(config)
    checkpoints.check(checkpoint)
    check_tuned_for(config.reuse, partial(checkpoints.fingerprint, checkpoint))
    check_ffmpeg()
    limit, memory = limit_of(config.memory_limit, device), None
    if config.memory_limit != "none" and (limit or request.is_dry):
        memory = plan_memory(
            config,
            checkpoint.config,
            plan,
            checkpoint=checkpoint,
            dtype=dtype,
            limit=limit,
            has_host=device.type != "cpu",
            layout=layout,
        )
    return Job(
        config,
        checkpoint,
        media,
        plan,
        memory,
        device,
        dtype,
        path,
        overwrite=request.overwrite,
        preset=preset.stem,
        record=request.record,
        replay=replay,
        ranks=replace(ranks, layout=layout),
    )


def divide(config: RunConfig, dit: DiTConfig, ranks: Ranks) -> Layout:
    """Return how the processes divide the run.

    Raises:
        UserError: they can't.
    """
    return layout_of(
        config.parallel,
        ranks.place.size,
        num_branches=len(branches_of(config)),
        num_heads=dit.num_heads,
        num_tokens=tokens_per_frame(config),
    )


def per_process(plan: Plan, layout: Layout) -> Plan:
    """Return the plan with the caches that each process has at most."""
    num_branches = plan.num_branches
    return replace(
        plan,
        kv_bytes=own_bytes(plan.kv_bytes, layout, num_branches=num_branches),
        scoring_bytes=plan.scoring_bytes // layout.sequence,
    )


def read_settings(request: Request, preset: Path, *, folder: Path | None) -> RunConfig:
    """Return all settings of a run.

    Args:
        folder: the checkpoint's; None: it isn't there.

    Raises:
        UserError: one is wrong, or the profile that they name can't be used.
    """
    layers = config_layers(BASE, preset, checkpoint=folder)

    def load(overrides: Sequence[str]) -> RunConfig:
        return load_config(RunConfig, layers, overrides=overrides)

    return load_with_profile(load, request.overrides, folder=folder, setting_of=setting_of)


def read_replay(request: Request, config: RunConfig, plan: Plan) -> Record | None:
    """Return the record that a request replays, or None.

    Raises:
        UserError: it is no record, or does not fit the run.
    """
    record = recorded_run(request)
    if record is not None:
        sampling = sampling_of(config)
        check_replay(
            record,
            ticks={i: sampling.ticks(own.window) for i, own in enumerate(plan.segments)},
            branches=branches_of(config),
            is_whole_window=config.attention == "full",
        )
    return record


def describe(job: Job) -> str:
    """Say what the run will do."""
    head = [
        f"model        {job.checkpoint.folder.name}, {job.checkpoint.layout} layout, "
        f"{str(job.dtype).removeprefix('torch.')} on {job.device}",
        _preset_line(job.preset, job.config),
    ]
    head += [*profile_lines(job.config.reuse), *replay_lines(job.replay)]
    head += layout_lines(job.ranks.layout)
    memory = [] if job.memory is None else job.memory.lines()
    return "\n".join([*head, *lines(job.plan, job.config), *memory, f"output       {job.path}"])


def _preset_line(name: str, config: RunConfig) -> str:
    return (
        f"preset       {name}: {config.attention} attention, {config.reuse.policy} reuse, "
        f"{config.kv.compress} KV compression"
    )


def plan_without_files(request: Request, ranks: Ranks | None = None) -> str | None:
    """Return the plan of a dry run that has no files to look at; None: it has.

    Args:
        ranks: the processes that would make the video; None: this one.

    Raises:
        UserError: the settings are wrong, or the model is not to be had.
    """
    if not request.is_dry:
        return None
    if request.model in RELEASED:
        return plan_released(request, ranks)
    model = choose_model(request.model)
    missing = checkpoints.find_download(model)
    if missing is None:
        return None
    name = released_name(str(model))
    if name is None:
        raise UserError(
            f"{missing.describe()}: is not downloaded in a dry run, and its sizes are not known: "
            f"give --model as one of {', '.join(RELEASED)}, or run without --dry-run"
        )
    plan = plan_released(replace(request, model=name), ranks)
    return f"{plan}\ndownload     {missing.describe()}"


def plan_released(request: Request, ranks: Ranks | None = None) -> str:
    """Say what a run of a released model will cost, by its sizes alone; no file of it is needed.

    Args:
        ranks: the processes that would make the video; None: this one.

    Raises:
        UserError: the settings are wrong.
    """
    preset = find_preset(PRESETS, request.preset)
    config = read_settings(request, preset, folder=None)
    sizes = RELEASED[request.model]
    check_mode(config, sizes)
    config = turn_to_fit(config)
    dtype = DTYPES.get(config.dtype, torch.bfloat16)
    if config.reuse.policy in ("flowcache", "teacache"):
        rescale_for(config, sizes)
    head = f"model        sizes of the released {request.model}, {config.dtype} = {dtype}; no files"
    layout = divide(config, sizes, Ranks() if ranks is None else ranks)
    plan = per_process(make_plan(config, sizes, dtype=dtype), layout)
    replay = read_replay(request, config, plan)
    logger.info("planning the memory: some seconds")
    memory = plan_memory(
        config,
        sizes,
        plan,
        checkpoint=None,
        dtype=dtype,
        limit=parse_limit(config.memory_limit),
        layout=layout,
    )
    head_lines = [head, _preset_line(preset.stem, config)]
    head_lines += [*profile_lines(config.reuse), *replay_lines(replay)]
    head_lines += layout_lines(layout)
    return "\n".join([*head_lines, *lines(plan, config), *memory.lines()])


def load_models(job: Job, *, stats: RunStats) -> Models:
    """Load the transformer, compile its blocks, load the VAE."""
    set_float32_precision(job.dtype)
    with stats.stage("load", is_on_host=True):
        kernel, cross_kernel = choose_kernels(
            job.device,
            dtype=job.dtype,
            shape=attention_shape(job.config, job.checkpoint.config, job.plan),
            num_text=job.checkpoint.config.text_len,
            wanted=job.config.attention_kernel,
        )
        logger.info("%s", describe_choice(kernel, cross_kernel))
        dit = checkpoints.load_dit(
            job.checkpoint,
            dtype=job.dtype,
            device=job.device if job.config.quantize is None else "cpu",
            kernel=kernel,
        )
        dit.cross_kernel = cross_kernel
        if job.config.quantize is not None:
            quantize.quantize(dit, job.config.quantize, device=job.device)
        if should_compile(job.config.compile, job.device):
            dit.parts = compiled_parts()
            # here, where processes may differ by minutes; in the first tick they may not
            dit.compile_ahead(
                num_frames=job.plan.forward_tokens // job.plan.frame_tokens,
                frame_tokens=job.plan.frame_tokens // job.ranks.layout.sequence,
                batches=_batches(job),
            )
        decoder = vae.load(job.checkpoint.vae, device=job.device)
    return Models(dit, decoder)


def _batches(job: Job) -> list[int]:
    """Return how many guidance branches go through the blocks together; one may reuse alone."""
    num_own = len(job.ranks.own(branches_of(job.config)))
    return [num_own, 1] if num_own > 1 and batches_branches(job.config) else [1]


def load_text(job: Job) -> text.TextEncoder:
    """Load the text encoder."""
    return text.load_encoder(
        job.checkpoint.text_encoder,
        tokenizer=job.checkpoint.tokenizer,
        text_len=job.checkpoint.config.text_len,
        dtype=job.dtype,
        device=torch.device("cpu") if job.placed.text_on_host else job.device,
    )


def encode_inputs(
    job: Job, *, stats: RunStats, encoder: text.TextEncoder | None = None
) -> Conditioning:
    """Encode prompts and start image; what is loaded for it is gone when this returns.

    Args:
        encoder: of texts, where it is loaded already.
    """
    config, checkpoint = job.config, job.checkpoint
    prompts = {"cond": config.prompt}
    if config.guidance > 1:
        prompts["uncond"] = config.negative_prompt

    def encode() -> Tensor:
        own = encoder or load_text(job)
        made = own.encode(list(prompts.values()))
        return check_finite(
            made, "the embeddings of the prompts", modules={"text encoder": own.model}
        )

    with stats.stage("text"):
        encoded = job.ranks.from_first(
            lambda: cached_embedding(
                job.config.embedding_cache,
                lambda: _text_facts(job, list(prompts.values())),
                encode,
            ).cpu()
        )
        features = None
        if checkpoint.image_encoder is not None and job.media.image is not None:
            vision = text.load_vision(checkpoint.image_encoder, dtype=job.dtype, device=job.device)
            features = check_finite(
                vision.encode(job.media.image.movedim(1, 0)),
                "the features of the start image",
                modules={"image encoder": vision.model},
            )
    video = None
    if job.media.video is not None and config.overlap_history is not None:
        video = to_pixels(job.media.video[-config.overlap_history :]).to(job.device)
    return Conditioning(
        text={name: encoded[i : i + 1] for i, name in enumerate(prompts)},
        image_features=features,
        image=job.media.image,
        end_image=job.media.end_image,
        video=video,
    )


def _text_facts(job: Job, prompts: list[str]) -> dict[str, Any]:
    """Return what encoded prompts depend on."""
    checkpoint = job.checkpoint
    return {
        "prompts": prompts,
        "encoder": text.fingerprint(checkpoint.text_encoder, tokenizer=checkpoint.tokenizer),
        "text_len": checkpoint.config.text_len,
        "dtype": str(job.dtype),
        "device": "cpu" if job.placed.text_on_host else job.device.type,
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
    config = job.config
    num_chunks = sum(len(segment.window.generated) for segment in job.plan.segments)
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
            fps=config.fps,
            size=(config.height, config.width),
            keeps_partial=job.keeps_partial,
        ),
        stats=stats,
        ranks=job.ranks,
        num_ticks=job.plan.num_ticks,
        num_chunks=num_chunks,
        modules={"transformer": models.dit, "VAE": models.vae.model},
        before=job.media.video,
        overlaps=should_overlap(
            job.placed.overlap, job.device, takes_turns=job.ranks.place.size > 1
        ),
        facts=Facts(
            preset=job.preset,
            model=job.checkpoint.folder.name,
            attention_kernel=models.dit.kernel.name,
            attention_probe=dict(models.dit.kernel.probed),
            cross_attention_kernel=models.dit.cross_kernel.name,
            cross_attention_probe=dict(models.dit.cross_kernel.probed),
            compilation=models.dit.parts.compilation,
            config=to_dict(config),
            policy=config.reuse.policy,
            threshold=threshold_of(config.reuse),
            replay=job.replay,
            memory=None if job.memory is None else job.memory.to_dict(),
            num_steps=config.num_steps,
            chunk_frames=shown_frames(
                config,
                job.plan,
                num_before=0 if job.media.video is None else len(job.media.video),
            ),
        ),
    )


def choose_model(name: str, *, has_cuda: bool | None = None) -> str | Path:
    """Return the folder or hub id of a model; `demo` and `auto` are names, see `Request`.

    Args:
        has_cuda: whether there is a CUDA device; None: look for one.
    """
    has_cuda = torch.cuda.is_available() if has_cuda is None else has_cuda
    if name == "demo" or (name == "auto" and not has_cuda):
        if not DEMO.is_dir():
            raise UserError(
                f"{DEMO}: the demo checkpoint is missing: restore it from the repository"
            )
        return DEMO
    if name in RELEASED and not Path(name).exists():
        raise UserError(
            f"{name} names sizes, for --dry-run: to make a video give the checkpoint's folder or "
            f"its hub id, as {REAL_MODEL}"
        )
    given_path(name, name="model")
    return REAL_MODEL if name == "auto" else name
