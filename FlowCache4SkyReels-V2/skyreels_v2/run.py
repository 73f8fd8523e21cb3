"""One run from its settings to the mp4 and the JSON beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowcache.attention import choose_kernel
from flowcache.cli import DTYPES, choose_device, choose_dtype
from flowcache.config import find_preset, load_config, to_dict
from flowcache.errors import UserError
from flowcache.job import (
    Facts,
    Request,
    Target,
    claim_output,
    config_layers,
    recorded_run,
    replay_lines,
    write_run,
)
from flowcache.record import Record, check_replay, replay_policies
from flowcache.settings import threshold_of
from flowcache.stats import RunStats
from flowcache.tune.applied import check_tuned_for, load_with_profile, profile_lines
from flowcache.video import check_ffmpeg, to_pixels
from skyreels_v2 import checkpoint as checkpoints
from skyreels_v2 import text, vae
from skyreels_v2.build import branches_of, rescale_for, sampling_of, setting_of
from skyreels_v2.checkpoint import Checkpoint
from skyreels_v2.config import RunConfig
from skyreels_v2.dit import DiT
from skyreels_v2.inputs import Media, check_mode, read_media, turn_to_fit
from skyreels_v2.pipeline import Conditioning, generate
from skyreels_v2.plan import Plan, lines, make_plan, shown_frames
from skyreels_v2.released import RELEASED

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
    vae: vae.VAE


def prepare(request: Request) -> Job:
    """Check everything that can be checked before anything large is loaded.

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
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if config.reuse.policy in ("flowcache", "teacache"):
        rescale_for(config, checkpoint.config)
    plan = make_plan(config, checkpoint.config, dtype=dtype)
    replay = read_replay(request, config, plan)
    path = claim_output(request, stem=f"{preset.stem}-{config.seed}")
    media = read_media(config)
    checkpoints.check(checkpoint)
    check_tuned_for(config.reuse, partial(checkpoints.fingerprint, checkpoint))
    check_ffmpeg()
    return Job(
        config,
        checkpoint,
        media,
        plan,
        device,
        dtype,
        path,
        overwrite=request.overwrite,
        preset=preset.stem,
        record=request.record,
        replay=replay,
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
        f"preset       {job.preset}: {job.config.attention} attention, "
        f"{job.config.reuse.policy} reuse, {job.config.kv.compress} KV compression",
    ]
    head += [*profile_lines(job.config.reuse), *replay_lines(job.replay)]
    return "\n".join([*head, *lines(job.plan, job.config), f"output       {job.path}"])


def plan_released(request: Request) -> str:
    """Say what a run of a released model will cost, by its sizes alone; no file of it is needed.

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
    plan = make_plan(config, sizes, dtype=dtype)
    replay = read_replay(request, config, plan)
    head_lines = [head, *profile_lines(config.reuse), *replay_lines(replay)]
    return "\n".join([*head_lines, *lines(plan, config)])


def load_models(job: Job, *, stats: RunStats) -> Models:
    """Load the transformer and the VAE."""
    with stats.stage("load", is_on_host=True):
        kernel = choose_kernel(job.device, dtype=job.dtype)
        dit = checkpoints.load_dit(
            job.checkpoint, dtype=job.dtype, device=job.device, kernel=kernel
        )
        decoder = vae.load(job.checkpoint.vae, device=job.device)
    return Models(dit, decoder)


def load_text(job: Job) -> text.TextEncoder:
    """Load the text encoder."""
    return text.load_encoder(
        job.checkpoint.text_encoder,
        tokenizer=job.checkpoint.tokenizer,
        text_len=job.checkpoint.config.text_len,
        dtype=job.dtype,
        device=job.device,
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
    with stats.stage("text"):
        encoded = (encoder or load_text(job)).encode(list(prompts.values()))
        features = None
        if checkpoint.image_encoder is not None and job.media.image is not None:
            vision = text.load_vision(checkpoint.image_encoder, dtype=job.dtype, device=job.device)
            features = vision.encode(job.media.image.movedim(1, 0))
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
    config = job.config
    num_chunks = sum(len(segment.window.generated) for segment in job.plan.segments)
    return write_run(
        generate(
            models.dit,
            models.vae,
            config,
            conditioning,
            stats=stats,
            policies=None if job.replay is None else partial(replay_policies, job.replay),
        ),
        Target(job.path, job.overwrite, fps=config.fps, size=(config.height, config.width)),
        stats=stats,
        num_ticks=job.plan.num_ticks,
        num_chunks=num_chunks,
        before=job.media.video,
        facts=Facts(
            preset=job.preset,
            model=job.checkpoint.folder.name,
            attention_kernel=models.dit.kernel.name,
            config=to_dict(config),
            policy=config.reuse.policy,
            threshold=threshold_of(config.reuse),
            replay=job.replay,
            num_steps=config.num_steps,
            chunk_frames=shown_frames(
                config,
                job.plan,
                num_before=0 if job.media.video is None else len(job.media.video),
            ),
        ),
    )


def choose_model(name: str) -> str | Path:
    """Return the folder or hub id of a model; `demo` and `auto` are names, see `Request`."""
    if name == "demo" or (name == "auto" and not torch.cuda.is_available()):
        if not DEMO.is_dir():
            raise UserError(
                f"{DEMO}: the demo checkpoint is missing: restore it from the repository"
            )
        return DEMO
    return REAL_MODEL if name == "auto" else name
