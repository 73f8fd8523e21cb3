"""Upstream's command lines, `generate_video_df.py` and `generate_video.py`, told in our settings.

Source: flags, defaults and meanings of the released SkyReels-V2 scripts and of the FlowCache code
published with arXiv 2602.10825. The texts are our own.
"""

import logging
import random
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowcache.bounds import given_path
from flowcache.errors import UserError
from flowcache.runtime.config import read_yaml
from flowcache.runtime.model import Job, Request
from flowcache.runtime.parallel import Ranks, run_in_ranks
from flowcache.runtime.run import describe, plan_without_files, prepare, run
from flowcache.wan.dit import DiTConfig
from skyreels_v2 import checkpoint as checkpoints
from skyreels_v2.calibration import coefficients_for
from skyreels_v2.enhance import enhance
from skyreels_v2.model import MODEL
from skyreels_v2.released import released_name
from skyreels_v2.upstream_flags import SIZES, Script, parser_of
from skyreels_v2.window import latent_frames

logger = logging.getLogger(__name__)

DEFAULTS = {"num_steps": 30, "shift": 8.0, "guidance": 6.0, "fps": 24}
"""Upstream's values for what a checkpoint of its own kind, such as the demo, may know better."""
ENGLISH_NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, "
    "images, static, overall gray, worst quality, low quality, JPEG compression residue, ugly, "
    "incomplete, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, "
    "misshapen limbs, fused fingers, still picture, messy background, three legs, many people in "
    "the background, walking backwards"
)
"""What upstream's generate_video.py leads away from; generate_video_df.py has the Chinese text."""
MAX_SEED = 4294967293
"""The largest seed that upstream draws."""
NAME_CHARACTERS = 100
NAME_BYTES = 180
"""Of the prompt in a file name: upstream's limit, and what file systems allow, less the rest."""


def main(script: Script, arguments: Sequence[str] | None = None) -> int:
    """Run one of the two command lines; return the exit code (2: something given is wrong)."""
    options = parser_of(script).parse_intermixed_args(arguments)
    return run_in_ranks(lambda ranks: _execute(script, options, ranks))


def _execute(script: Script, options: Namespace, ranks: Ranks) -> None:
    options.seed = ranks.from_first(lambda: _seed_of(options))
    request = ranks.together(lambda: _request(script, options, ranks))
    planned = replace(request, is_dry=options.dry_run)
    plan = ranks.together(lambda: plan_without_files(MODEL, planned, ranks))
    if plan is not None:
        if ranks.is_first:
            print(plan)
        return
    job = ranks.together(lambda: _prepare(script, request, ranks))
    if ranks.is_first:
        print(describe(job), flush=True)
    if options.dry_run:
        return
    if options.prompt_enhancer and options.image is not None:
        logger.warning(
            "--prompt_enhancer is left out: it writes prompts for videos without --image"
        )
    elif options.prompt_enhancer:
        prompt = ranks.from_first(
            lambda: enhance(
                job.config.prompt, model=options.prompt_enhancer_model, device=job.device
            )
        )
        if ranks.is_first:
            print(f"prompt       {prompt}", flush=True)
        job = replace(job, config=replace(job.config, prompt=prompt))
    run(job)


def _request(script: Script, options: Namespace, ranks: Ranks) -> Request:
    if options.use_usp and ranks.place.size == 1:
        raise UserError(
            f"--use_usp divides the work among processes, but one runs: start it with torchrun "
            f"--nproc_per_node=N {script}"
        )
    return request_of(script, options)


def _prepare(script: Script, request: Request, ranks: Ranks) -> Job:
    job = prepare(MODEL, request, ranks)
    _check_model(script, job)
    return job


def _seed_of(options: Namespace) -> int:
    return random.randint(0, MAX_SEED) if options.seed is None else options.seed


def request_of(script: Script, options: Namespace) -> Request:
    """Translate the flags.

    Raises:
        UserError: a flag is missing or not supported.
    """
    model = checkpoints.choose(options.model_id)
    own = _own_keys(given_path(str(model), name="model"))
    seed = _seed_of(options)
    settings = [f"prompt={options.prompt}", f"seed={seed}", *_model_settings(options, own)]
    if options.image is not None:
        settings.append(f"image={options.image}")
    if options.offload:
        settings.append("offload=true")
    if script == "generate_video_df.py":
        settings += [*_forcing_settings(options), *_df_cache_settings(options, own)]
        expname = options.expname
    else:
        settings += [
            *_one_window_settings(options, own),
            *_reuse_settings(options, policy=_policy(options)),
        ]
        expname = None
    return Request(
        model=str(model),
        overrides=[*settings, *options.settings],
        folder=Path("result") / options.outdir,
        stem=_file_stem(options.prompt, seed=seed) if expname is None else f"{expname}-0",
    )


def _own_keys(folder: Path) -> set[str]:
    """Return the settings that a checkpoint on disk brings with it, as dotted keys."""
    path = folder / "presets" / "base.yaml"
    return set(_dotted(read_yaml(path))) if path.is_file() else set()


def _dotted(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _model_settings(options: Namespace, own: set[str]) -> Iterator[str]:
    """Size, steps, shift, guidance, rate: the flag, else the checkpoint's own, else upstream's."""
    for key, default in DEFAULTS.items():
        value = getattr(options, key)
        if value is not None or key not in own:
            yield f"{key}={default if value is None else value}"
    if {"height", "width"} <= own:
        if options.resolution is not None:
            logger.warning(
                "--resolution %s is left out: this checkpoint makes videos of its own size",
                options.resolution,
            )
        return
    if options.resolution is None:
        raise UserError("--resolution is missing: give 540P (960x544) or 720P (1280x720)")
    height, width = SIZES[options.resolution]
    yield f"height={height}"
    yield f"width={width}"


def _forcing_settings(options: Namespace) -> Iterator[str]:
    overlap = "null" if options.overlap_history is None else options.overlap_history
    yield f"num_frames={options.num_frames}"
    yield f"base_num_frames={options.base_num_frames}"
    yield f"overlap_history={overlap}"
    yield f"addnoise_condition={options.addnoise_condition}"
    yield f"ar_step={options.ar_step}"
    yield f"causal_block_size={options.causal_block_size}"
    if options.end_image is not None:
        yield f"end_image={options.end_image}"
    if options.video_path:
        yield f"video={options.video_path}"
        if options.overlap_history is None:
            raise UserError("--video_path needs --overlap_history: 17 or 37 frames are recommended")


def _one_window_settings(options: Namespace, own: set[str]) -> Iterator[str]:
    """One window of any length, denoised as one chunk with full attention."""
    if options.guidance is not None and options.guidance < 1:
        raise UserError(
            f"--guidance_scale must be 1 (none) or more, not {options.guidance:g}: below 1 the "
            "video would follow the negative prompt"
        )
    if "negative_prompt" not in own:
        yield f"negative_prompt={ENGLISH_NEGATIVE_PROMPT}"
    yield f"num_frames={options.num_frames}"
    yield f"base_num_frames={options.num_frames}"
    yield "overlap_history=null"
    yield "addnoise_condition=0"
    yield "ar_step=0"
    yield f"causal_block_size={max(latent_frames(options.num_frames), 1)}"
    yield "attention=full"
    yield "noise_dtype=float32"


def _df_cache_settings(options: Namespace, own: set[str]) -> Iterator[str]:
    is_flowcache = options.flowcache or options.use_compress or options.use_kvrange
    is_causal = is_flowcache or options.causal_attention
    yield f"attention={'causal' if is_causal else 'full'}"
    yield f"clean_pass={str(options.causal_attention).lower()}"
    if not is_flowcache:
        yield from _reuse_settings(options, policy=_policy(options))
        if options.teacache and options.expname is not None:
            logger.warning(
                "--teacache is upstream's TeaCache here; add --flowcache for the chunk-wise reuse "
                "of the published FlowCache code"
            )
        return
    yield from _flowcache_settings(options, own)
    if options.use_compress and options.budget_block > 0:
        yield from ("kv.compress=importance", f"kv.budget_chunks={options.budget_block}")
        yield "kv.order=score"
    elif options.use_kvrange and not options.use_compress:
        yield from ("kv.compress=recent", f"kv.budget_chunks={options.kvrange}")


def _policy(options: Namespace) -> str:
    return "teacache" if options.teacache else "vanilla"


def _flowcache_settings(options: Namespace, own: set[str]) -> Iterator[str]:
    """Chunk-wise reuse, which compares the modulation with either set of coefficients."""
    is_on = options.teacache or options.flowcache
    yield from _reuse_settings(options, policy="flowcache" if is_on else "vanilla")
    yield "reuse.signal=timestep"
    if is_on and not options.use_ret_steps and "reuse.rescale" not in own:
        model = _sizes_of(checkpoints.choose(options.model_id))
        name = coefficients_for(model, signal="timestep_embedding", height=0, width=0)
        if name is not None:
            yield f"reuse.rescale={name}"


def _sizes_of(model: str | Path) -> DiTConfig:
    """Return the sizes of a model; of a released one without a download."""
    name = released_name(str(model))
    if name is not None and not Path(model).expanduser().exists():
        return checkpoints.released_sizes(name)
    return checkpoints.find(model).config


def _reuse_settings(options: Namespace, *, policy: str) -> Iterator[str]:
    yield f"reuse.policy={policy}"
    yield f"reuse.threshold={options.teacache_thresh}"
    yield f"reuse.warmup_steps={5 if options.use_ret_steps else 1}"
    yield f"reuse.signal={'timestep' if options.use_ret_steps else 'timestep_embedding'}"


def _file_stem(prompt: str, *, seed: int) -> str:
    """Name a file after a prompt, its seed and the time; never longer than a file system allows."""
    shown = "".join(c for c in prompt[:NAME_CHARACTERS] if c.isprintable() and c != "/").strip()
    shown = shown.encode()[:NAME_BYTES].decode(errors="ignore").lstrip(".")
    return f"{shown}_{seed}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"


def _check_model(script: Script, job: Job) -> None:
    """Check that the model is of the script's kind, as far as its files tell."""
    is_i2v = job.source.files.is_i2v
    if script == "generate_video_df.py" and is_i2v:
        raise UserError(f"{job.source.folder} is an image-to-video model: use generate_video.py")
    if script == "generate_video.py" and not is_i2v and job.config.image is not None:
        raise UserError(
            f"{job.source.folder} takes no image: use an I2V model, or a DF model with "
            "generate_video_df.py"
        )
