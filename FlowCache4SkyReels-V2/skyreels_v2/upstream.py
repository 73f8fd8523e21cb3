"""Upstream's command lines, `generate_video_df.py` and `generate_video.py`, in our settings.

Source: flags, defaults and meanings of the released SkyReels-V2 scripts and of the FlowCache code
published with arXiv 2602.10825. The texts are our own.
"""

import logging
import random
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flowcache.errors import UserError
from flowcache.runtime.cli import Parser
from flowcache.runtime.config import read_yaml
from flowcache.runtime.files import prompt_stem
from flowcache.runtime.model import Job, Request
from flowcache.runtime.parallel import Ranks, run_in_ranks
from flowcache.runtime.run import planned, prepare, run
from flowcache.wan.calibration import coefficients_for
from flowcache.wan.dit import DiTConfig
from flowcache.wan.vae import latent_frames
from skyreels_v2.enhance import enhance
from skyreels_v2.model import FOLDERS, MODEL, released_sizes
from skyreels_v2.released import released_name

logger = logging.getLogger(__name__)

Script = Literal["generate_video_df.py", "generate_video.py"]

SIZES = {"540P": (544, 960), "720P": (720, 1280)}
"""Name of a resolution -> height and width in pixels."""
DF_DEFAULTS = {
    "model_id": "Skywork/SkyReels-V2-DF-1.3B-540P",
    "prompt": "A motorcycle races across a desert at dusk, dust rising behind it",
    "outdir": "diffusion_forcing",
}
PLAIN_DEFAULTS = {
    "model_id": "Skywork/SkyReels-V2-T2V-14B-540P",
    "prompt": "A pair of swans glides over a still lake at sunrise",
    "outdir": "video_out",
}
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

# Flags --------------------------------------------------------------------------------------------


class Flag(NamedTuple):
    """A flag of upstream's scripts; `HELP` says what it does."""

    name: str
    kind: type = str
    """Of its value; bool: a switch, which has none."""
    default: Any = None
    setting: str | None = None
    """The setting that is its value, where one is given."""
    is_df: bool = False
    """Whether generate_video_df.py alone has it."""
    dest: str | None = None
    """Its name among the parsed arguments, if it is another one."""

    @property
    def key(self) -> str:
        return self.dest or self.name.strip("-")


_FLAGS: Mapping[str, Sequence[Flag]] = {
    "the video": (
        Flag("--model_id"),
        Flag("--prompt", setting="prompt"),
        Flag("--image", setting="image"),
        Flag("--end_image", setting="end_image", is_df=True),
        Flag("--video_path", default="", setting="video", is_df=True),
        Flag("--resolution"),
        Flag("--num_frames", int, 97, setting="num_frames"),
        Flag("--fps", int),
        Flag("--seed", int),
        Flag("--prompt_enhancer", bool),
        Flag("--prompt_enhancer_model", default="Qwen/Qwen2.5-32B-Instruct"),
    ),
    "sampling": (
        Flag("--inference_steps", int, dest="num_steps"),
        Flag("--shift", float),
        Flag("--guidance_scale", float, dest="guidance"),
    ),
    "diffusion forcing and long videos": (
        Flag("--base_num_frames", int, 97, setting="base_num_frames", is_df=True),
        Flag("--overlap_history", int, setting="overlap_history", is_df=True),
        Flag("--addnoise_condition", int, 0, setting="addnoise_condition", is_df=True),
        Flag("--ar_step", int, 0, setting="ar_step", is_df=True),
        Flag("--causal_block_size", int, 1, setting="causal_block_size", is_df=True),
        Flag("--causal_attention", bool, is_df=True),
    ),
    "caches": (
        Flag("--teacache", bool),
        Flag("--teacache_thresh", float, 0.2),
        Flag("--use_ret_steps", bool),
        Flag("--flowcache", bool, is_df=True),
        Flag("--use_compress", bool, is_df=True),
        Flag("--budget_block", int, 0, is_df=True),
        Flag("--use_kvrange", bool, is_df=True),
        Flag("--kvrange", int, 0, is_df=True),
    ),
    "running": (
        Flag("--outdir"),
        Flag("--expname", is_df=True),
        Flag("--offload", bool, setting="offload"),
        Flag("--use_usp", bool),
        Flag("--dry_run", bool),
    ),
}
HELP = {
    "--model_id": "checkpoint folder, hub id, or demo for the tiny checkpoint of this repository "
    "(default: %(default)s)",
    "--prompt": "what the video shows (default: %(default)s)",
    "--image": "start image; cropped to the video's aspect, a portrait one turns the size",
    "--end_image": "end image; alone or with --image",
    "--video_path": "video to extend; needs --overlap_history",
    "--resolution": "540P (960x544) or 720P (1280x720); required",
    "--num_frames": "frames, 4 n + 1; when a video is extended: overlap and new ones (default: 97)",
    "--fps": "frames per second (default: 24)",
    "--seed": "of all noise (default: drawn, and printed)",
    "--prompt_enhancer": "let a chat model write the prompt out; not with --image",
    "--prompt_enhancer_model": "its folder or hub id (default: %(default)s)",
    "--inference_steps": "denoising steps of every frame (default: 30)",
    "--shift": "of the noise schedule (default: 8; 5 or 3 with images)",
    "--guidance_scale": "classifier-free guidance; 1 is none (default: 6; 5 with images)",
    "--base_num_frames": "frames of one window; longer videos are made in segments (default: 97)",
    "--overlap_history": "frames that segments share, 17 or 37; required above --base_num_frames",
    "--addnoise_condition": "timestep 0..60 to which the shared frames are noised; 20 is usual "
    "(default: 0)",
    "--ar_step": "steps that each chunk runs behind the one before; 0: all together (default: 0)",
    "--causal_block_size": "latent frames of a chunk; need not divide the window (default: 1)",
    "--causal_attention": "chunks see only earlier ones; done with a KV cache and a clean "
    "pass per chunk, which equals upstream's mask and is faster",
    "--teacache": "reuse the last computed step where little changes",
    "--teacache_thresh": "accumulated change at which a step is computed; 0.1 slow, 0.2 fast "
    "(default: 0.2)",
    "--use_ret_steps": "decide by the timestep modulation, always compute the first 5 steps; "
    "without: by the timestep embedding, first step",
    "--flowcache": "FlowCache: reuse chunk by chunk, see below",
    "--use_compress": "FlowCache with a compressed KV cache",
    "--budget_block": "chunks' worth of clean tokens that --use_compress keeps; 0: all "
    "(default: 0)",
    "--use_kvrange": "FlowCache that sees only the last clean chunks",
    "--kvrange": "how many --use_kvrange keeps; it is ignored with --use_compress (default: 0)",
    "--outdir": "folder under result/; the file is PROMPT_SEED_TIME.mp4 (default: %(default)s)",
    "--expname": "name the file EXPNAME-0.mp4 instead",
    "--offload": "keep the transformer off the GPU while the VAE works",
    "--use_usp": "several GPUs: start it with torchrun --nproc_per_node=N (which is enough)",
    "--dry_run": "check all, print the plan, stop",
}

DF_NOTES = """caches:
  --teacache alone is upstream's TeaCache: one decision for the whole window, full attention.
  The published FlowCache code gave --teacache another meaning: every chunk decides for itself, and
  attention is causal through a KV cache. --flowcache selects that, and so do --use_compress and
  --use_kvrange, which need the KV cache. A command line of that code keeps its meaning when
  --flowcache is added to it.

examples:
  python generate_video_df.py --model_id demo \\
      --prompt "a red circle moving right on a black background"
  python generate_video_df.py --resolution 540P --num_frames 257 --overlap_history 17 \\
      --addnoise_condition 20 --prompt "a swan on a lake" --offload
  python generate_video_df.py --resolution 540P --num_frames 177 --overlap_history 17 --ar_step 5 \\
      --causal_block_size 5 --inference_steps 50 --addnoise_condition 20 --teacache \\
      --teacache_thresh 0.15 --use_ret_steps --flowcache --prompt "a swan on a lake"
"""
PLAIN_NOTES = """examples:
  python generate_video.py --resolution 540P --prompt "a swan on a lake" --teacache --use_ret_steps
  python generate_video.py --model_id Skywork/SkyReels-V2-I2V-1.3B-540P --resolution 540P \\
      --image swan.png --shift 3 --guidance_scale 5 --prompt "a swan on a lake"
"""
COMMON_NOTES = """
A checkpoint that brings its own size and step count (the demo: 64x64) is used with these where the
command line names none, and always at its own size. All other settings of python -m skyreels_v2
(--list-settings there) can follow as key=value and win over the flags.
"""


def parser_of(script: Script) -> Parser:
    """Return the parser of one of the two command lines."""
    is_df = script == "generate_video_df.py"
    kind = "diffusion forcing (DF)" if is_df else "T2V or I2V"
    parser = Parser(
        prog=f"python {script}",
        description=f"Make a video with a SkyReels-V2 {kind} model, by upstream's flags.",
        epilog=(DF_NOTES if is_df else PLAIN_NOTES) + COMMON_NOTES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    for title, flags in _FLAGS.items():
        own = [flag for flag in flags if is_df or not flag.is_df]
        if own:
            add = parser.add_argument_group(title).add_argument
        for flag in own:
            options: dict[str, Any] = {"dest": flag.key, "help": HELP[flag.name]}
            if flag.kind is bool:
                options["action"] = "store_true"
            else:
                options |= {"type": flag.kind, "default": flag.default}
            if flag.name == "--resolution":
                options["choices"] = list(SIZES)
            spellings = [flag.name] + ["--dry-run"] * (flag.name == "--dry_run")
            add(*spellings, **options)
    add("settings", nargs="*", metavar="key=value", help="further settings, see below")
    parser.set_defaults(**(DF_DEFAULTS if is_df else PLAIN_DEFAULTS))
    return parser


# Settings -----------------------------------------------------------------------------------------


def request_of(script: Script, options: Namespace) -> Request:
    """Translate the flags.

    Raises:
        UserError: a flag is missing or not supported.
    """
    model = FOLDERS.choose(options.model_id)
    own = _own_keys(Path(model))
    seed = _seed_of(options)
    settings = [f"seed={seed}", *_given_settings(options), *_model_settings(options, own)]
    expname = None
    if script == "generate_video_df.py":
        settings += [*_forcing_settings(options), *_df_cache_settings(options, own)]
        expname = options.expname
    else:
        settings += _one_window_settings(options, own)
        settings += _reuse_settings(options, policy=_policy(options))
    return Request(
        model=model,
        overrides=[*settings, *options.settings],
        folder=Path("result") / options.outdir,
        stem=_file_stem(options.prompt, seed=seed) if expname is None else f"{expname}-0",
    )


def _seed_of(options: Namespace) -> int:
    return random.randint(0, MAX_SEED) if options.seed is None else options.seed


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


def _given_settings(options: Namespace) -> Iterator[str]:
    """Yield the settings that are a flag's value as it is."""
    for flag in (flag for flags in _FLAGS.values() for flag in flags):
        value = getattr(options, flag.key, None)
        is_given = value is not None and value is not False and (value or flag.default != "")
        if flag.setting is not None and is_given:
            yield f"{flag.setting}={'true' if value is True else value}"


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
    if options.overlap_history is None:
        yield "overlap_history=null"
        if options.video_path:
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
        model = _sizes_of(FOLDERS.choose(options.model_id))
        name = coefficients_for(model, signal="timestep_embedding", height=0, width=0)
        if name is not None:
            yield f"reuse.rescale={name}"


def _sizes_of(model: str | Path) -> DiTConfig:
    """Return the sizes of a model; of a released one without a download."""
    name = released_name(str(model))
    if name is not None and not Path(model).expanduser().exists():
        return released_sizes(name)
    return FOLDERS.find(model).config


def _reuse_settings(options: Namespace, *, policy: str) -> Iterator[str]:
    yield f"reuse.policy={policy}"
    yield f"reuse.threshold={options.teacache_thresh}"
    yield f"reuse.warmup_steps={5 if options.use_ret_steps else 1}"
    yield f"reuse.signal={'timestep' if options.use_ret_steps else 'timestep_embedding'}"


def _file_stem(prompt: str, *, seed: int) -> str:
    """Name a file after a prompt, its seed and the time; never longer than a file system allows."""
    return f"{prompt_stem(prompt)}_{seed}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"


# The run ------------------------------------------------------------------------------------------


def main(script: Script, arguments: Sequence[str] | None = None) -> int:
    """Run one of the two command lines; return the exit code (2: something given is wrong)."""
    options = parser_of(script).parse_intermixed_args(arguments)
    return run_in_ranks(lambda ranks: _execute(script, options, ranks))


def _execute(script: Script, options: Namespace, ranks: Ranks) -> None:
    options.seed = ranks.from_first(lambda: _seed_of(options))
    request = ranks.together(lambda: _request(script, options, ranks))
    asked = replace(request, is_dry=options.dry_run)
    job = planned(MODEL, asked, ranks, lambda: _prepare(script, request, ranks))
    if job is None:
        return
    if options.prompt_enhancer and options.image is not None:
        logger.warning(
            "--prompt_enhancer is left out: it writes prompts for videos without --image"
        )
    elif options.prompt_enhancer:
        short, device = job.config.prompt, job.device
        prompt = ranks.from_first(
            lambda: enhance(short, model=options.prompt_enhancer_model, device=device)
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
    """Prepare the run; the model must be of the script's kind, as far as its files show."""
    job = prepare(MODEL, request, ranks)
    is_i2v = job.source.sizes.model_type == "i2v"
    if script == "generate_video_df.py" and is_i2v:
        raise UserError(f"{job.source.folder} is an image-to-video model: use generate_video.py")
    if script == "generate_video.py" and not is_i2v and job.config.image is not None:
        raise UserError(
            f"{job.source.folder} takes no image: use an I2V model, or a DF model with "
            "generate_video_df.py"
        )
    return job
