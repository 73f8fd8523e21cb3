"""The flags of upstream's two scripts, with what they mean here.

Source: flags and defaults of the released SkyReels-V2 scripts and of the FlowCache code published
with arXiv 2602.10825. The texts are our own.
"""

from argparse import RawDescriptionHelpFormatter
from typing import Literal

from flowcache.runtime.cli import Parser

Script = Literal["generate_video_df.py", "generate_video.py"]

SIZES = {"540P": (544, 960), "720P": (720, 1280)}
"""Name of a resolution -> height and width in pixels."""

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
    parser = Parser(
        prog=f"python {script}",
        description=(
            "Make a video with a SkyReels-V2 diffusion forcing (DF) model, by upstream's flags."
            if is_df
            else "Make a video with a SkyReels-V2 T2V or I2V model, by upstream's flags."
        ),
        epilog=(DF_NOTES if is_df else PLAIN_NOTES) + COMMON_NOTES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    _add_video_flags(parser, is_df=is_df)
    _add_sampling_flags(parser)
    if is_df:
        _add_forcing_flags(parser)
    _add_cache_flags(parser, is_df=is_df)
    _add_run_flags(parser, is_df=is_df)
    return parser


def _add_video_flags(parser: Parser, *, is_df: bool) -> None:
    add = parser.add_argument_group("the video").add_argument
    name = "DF-1.3B-540P" if is_df else "T2V-14B-540P"
    add(
        "--model_id",
        default=f"Skywork/SkyReels-V2-{name}",
        help="checkpoint folder, hub id, or demo for the tiny checkpoint of this repository "
        "(default: %(default)s)",
    )
    add(
        "--prompt",
        default="A motorcycle races across a desert at dusk, dust rising behind it"
        if is_df
        else "A pair of swans glides over a still lake at sunrise",
        help="what the video shows (default: %(default)s)",
    )
    add("--image", help="start image; cropped to the video's aspect, a portrait one turns the size")
    if is_df:
        add("--end_image", help="end image; alone or with --image")
        add("--video_path", default="", help="video to extend; needs --overlap_history")
    add("--resolution", choices=list(SIZES), help="540P (960x544) or 720P (1280x720); required")
    add(
        "--num_frames",
        type=int,
        default=97,
        help="frames, 4 n + 1; when a video is extended: overlap and new ones (default: 97)",
    )
    add("--fps", type=int, help="frames per second (default: 24)")
    add("--seed", type=int, help="of all noise (default: drawn, and printed)")
    add(
        "--prompt_enhancer",
        action="store_true",
        help="let a chat model write the prompt out; not with --image",
    )
    add(
        "--prompt_enhancer_model",
        default="Qwen/Qwen2.5-32B-Instruct",
        help="its folder or hub id (default: %(default)s)",
    )


def _add_sampling_flags(parser: Parser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--inference_steps",
        dest="num_steps",
        type=int,
        help="denoising steps of every frame (default: 30)",
    )
    add("--shift", type=float, help="of the noise schedule (default: 8; 5 or 3 with images)")
    add(
        "--guidance_scale",
        dest="guidance",
        type=float,
        help="classifier-free guidance; 1 is none (default: 6; 5 with images)",
    )


def _add_forcing_flags(parser: Parser) -> None:
    add = parser.add_argument_group("diffusion forcing and long videos").add_argument
    add(
        "--base_num_frames",
        type=int,
        default=97,
        help="frames of one window; longer videos are made in segments (default: 97)",
    )
    add(
        "--overlap_history",
        type=int,
        help="frames that segments share, 17 or 37; required above --base_num_frames",
    )
    add(
        "--addnoise_condition",
        type=int,
        default=0,
        help="timestep 0..60 to which the shared frames are noised; 20 is usual (default: 0)",
    )
    add(
        "--ar_step",
        type=int,
        default=0,
        help="steps that each chunk runs behind the one before; 0: all together (default: 0)",
    )
    add(
        "--causal_block_size",
        type=int,
        default=1,
        help="latent frames of a chunk; need not divide the window (default: 1)",
    )
    add(
        "--causal_attention",
        action="store_true",
        help="chunks see only earlier ones; done with a KV cache and a clean pass per chunk, which "
        "equals upstream's mask and is faster",
    )


def _add_cache_flags(parser: Parser, *, is_df: bool) -> None:
    add = parser.add_argument_group("caches").add_argument
    add("--teacache", action="store_true", help="reuse the last computed step where little changes")
    add(
        "--teacache_thresh",
        type=float,
        default=0.2,
        help="accumulated change at which a step is computed; 0.1 slow, 0.2 fast (default: 0.2)",
    )
    add(
        "--use_ret_steps",
        action="store_true",
        help="decide by the timestep modulation, always compute the first 5 steps; without: by the "
        "timestep embedding, first step",
    )
    if not is_df:
        return
    add("--flowcache", action="store_true", help="FlowCache: reuse chunk by chunk, see below")
    add("--use_compress", action="store_true", help="FlowCache with a compressed KV cache")
    add(
        "--budget_block",
        type=int,
        default=0,
        help="chunks' worth of clean tokens that --use_compress keeps; 0: all (default: 0)",
    )
    add("--use_kvrange", action="store_true", help="FlowCache that sees only the last clean chunks")
    add(
        "--kvrange",
        type=int,
        default=0,
        help="how many --use_kvrange keeps; it is ignored with --use_compress (default: 0)",
    )


def _add_run_flags(parser: Parser, *, is_df: bool) -> None:
    add = parser.add_argument_group("running").add_argument
    add(
        "--outdir",
        default="diffusion_forcing" if is_df else "video_out",
        help="folder under result/; the file is PROMPT_SEED_TIME.mp4 (default: %(default)s)",
    )
    if is_df:
        add("--expname", help="name the file EXPNAME-0.mp4 instead")
    add(
        "--offload",
        action="store_true",
        help="keep the transformer off the GPU while the VAE works",
    )
    add(
        "--use_usp",
        action="store_true",
        help="several GPUs: start it with torchrun --nproc_per_node=N (which is enough)",
    )
    add("--dry_run", "--dry-run", action="store_true", help="check all, print the plan, stop")
    add("settings", nargs="*", metavar="key=value", help="further settings, see below")
