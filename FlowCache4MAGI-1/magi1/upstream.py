"""Upstream's command line, `inference/pipeline/entry.py`, told in our settings.

Source: flags, environment variables and meanings of the released MAGI-1 code; keys of the YAML
files of the FlowCache code published with arXiv 2602.10825. The texts are our own.
"""

import logging
import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flowcache.errors import UserError
from flowcache.runtime.cli import Parser
from flowcache.runtime.config import load_config
from flowcache.runtime.model import Request
from flowcache.runtime.parallel import Ranks, run_in_ranks
from flowcache.runtime.run import describe, prepare, run
from magi1.model import MODEL

logger = logging.getLogger(__name__)

_FLAGS = {"image_path": "i2v", "prefix_video_path": "v2v"}
"""Flag of a given picture or video -> the mode that starts from it."""
TOKENS = {
    "PAD_STATIC": "static",
    "PAD_DYNAMIC": "dynamic",
    "PAD_BORDERNESS": "borderness",
    "PAD_HQ": "quality",
    "PAD_THREE_D_MODEL": "three_d_model",
    "PAD_TWO_D_ANIME": "two_d_anime",
    "PAD_DURATION": "duration",
    "NEG_PROMPT": "negative",
}
"""Environment variable of upstream -> the special token that it switches on."""
SWITCHED_ON = ("1", "true", "yes", "y", "on", "enabled")

NOTES = """\
All steps are computed and all keys kept, unless --additional_config or settings say otherwise.
All settings of python -m magi1 (--list-settings there) can follow as key=value and win over the
JSON config. Upstream's environment variables are not read: a line says which setting to use.

examples:
  python inference/pipeline/entry.py --config_file demo/distill_config.json --mode t2v \\
      --prompt "a red circle moving right on a black background" --output_path red.mp4
  python inference/pipeline/entry.py --config_file demo/distill_config.json --mode v2v \\
      --prefix_video_path red.mp4 --prompt "a red circle moving right on a black background" \\
      --output_path more.mp4 reuse.policy=flowcache reuse.threshold=0.015 tokens.quality=false
"""


@dataclass(frozen=True)
class Additional:
    """The YAML file of the published FlowCache code, with that code's defaults."""

    reuse_strategy: Literal["chunkwise", "all"] = "chunkwise"
    rel_l1_thresh: float = 0.01
    warmup_steps: int = 0
    discard_nearly_clean_chunk: bool = False
    compress_kv_cache: bool | None = None
    """None: as the published code does, with `chunkwise` only."""
    total_cache_chunk_nums: int = 5
    budget_cache_chunk_nums: int | None = None
    """Read by nothing, there and here: what is kept follows from the total and the window."""
    compress_strategy: Literal["token", "frame", "chunk"] = "token"
    query_granularity: Literal["token", "frame", "chunk"] = "chunk"
    mix_lambda: float = 0.07
    score_weighting_method: str = "no_weight"
    power: float = 3.0
    log: bool = False
    """This and the next two print more there; here the JSON beside the video always holds it."""
    print_peak_memory: bool = False
    debug: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2: something given is wrong)."""
    options = new_parser().parse_intermixed_args(arguments)
    return run_in_ranks(lambda ranks: _run(options, ranks))


def new_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="python inference/pipeline/entry.py",
        description="Make a video with MAGI-1, by upstream's flags.",
        epilog=NOTES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config_file", required=True, help="JSON config of the release")
    add(
        "--mode",
        required=True,
        choices=("t2v", "i2v", "v2v"),
        help="text, image or video to video",
    )
    add("--prompt", required=True, help="what the video shows")
    add("--image_path", help="picture that the video starts with (i2v)")
    add("--prefix_video_path", help="video to continue (v2v)")
    add("--output_path", required=True, help="an .mp4 file, or a folder for a fresh name in it")
    add(
        "--additional_config",
        help="YAML file of the published FlowCache code: reuse and KV compression by its keys",
    )
    add("--overwrite", action="store_true", help="replace an existing file (upstream always does)")
    add("--dry_run", "--dry-run", action="store_true", help="check all, print the plan, stop")
    add("settings", nargs="*", metavar="key=value", help="further settings, see below")
    return parser


def _run(options: Namespace, ranks: Ranks) -> None:
    for line in environment_lines(os.environ):
        logger.warning("%s", line)
    job = ranks.together(lambda: prepare(MODEL, to_request(options), ranks))
    if ranks.is_first:
        print(describe(job), flush=True)
    if not options.dry_run:
        run(job)


def to_request(options: Namespace) -> Request:
    """Translate the flags."""
    settings = [f"prompt={options.prompt}", *_media_settings(options)]
    if options.additional_config is not None:
        additional = load_config(Additional, [Path(options.additional_config)])
        settings += additional_settings(additional)
    return Request(
        preset="base",
        model=options.config_file,
        overrides=[*settings, *options.settings],
        out=options.output_path,
        overwrite=options.overwrite,
    )


def _media_settings(options: Namespace) -> Iterator[str]:
    for flag, mode in _FLAGS.items():
        path = getattr(options, flag)
        if options.mode == mode:
            if not path:
                raise UserError(f"--mode {mode} needs --{flag}: give the path of a file")
            yield f"{'image' if mode == 'i2v' else 'video'}={path}"
        elif path:
            logger.warning("--%s is left out: --mode %s does not start from it", flag, options.mode)


def additional_settings(additional: Additional) -> Iterator[str]:
    """Translate the keys of the published code's YAML file."""
    is_chunkwise = additional.reuse_strategy == "chunkwise"
    has_budget = additional.compress_kv_cache
    yield f"reuse.policy={'flowcache' if is_chunkwise else 'teacache'}"
    yield f"reuse.threshold={additional.rel_l1_thresh}"
    # a chunk's first step is computed in any case
    yield f"reuse.warmup_steps={max(1, additional.warmup_steps)}"
    yield "reuse.compute_last_step=false"
    yield "reuse.predict=latent_update"
    yield "reuse.extrapolate=0"
    yield "prefix_frames=null"
    yield "passes.clean_pass=false"
    yield f"passes.nearly_clean_pass={str(not additional.discard_nearly_clean_chunk).lower()}"
    if not (is_chunkwise if has_budget is None else has_budget):
        yield "kv.compress=none"
        return
    yield "kv.compress=importance"
    yield f"kv.total_chunks={additional.total_cache_chunk_nums}"
    yield f"kv.granularity={additional.compress_strategy}"
    yield f"kv.queries={additional.query_granularity}"
    yield f"kv.mix={additional.mix_lambda}"
    # whole frames and chunks are scored without weights there
    is_weighted = additional.compress_strategy == "token"
    yield f"kv.weighting={additional.score_weighting_method if is_weighted else 'none'}"
    yield f"kv.power={additional.power}"
    yield "kv.order=score"


def environment_lines(variables: Mapping[str, str]) -> Iterator[str]:
    """Name the variables of upstream that are set, each with the setting that replaces it."""
    replaced = {
        name: f"tokens.{token}={_switched(variables, name)}" for name, token in TOKENS.items()
    }
    replaced["SPECIAL_TOKEN_PATH"] = f"special_tokens={variables.get('SPECIAL_TOKEN_PATH')}"
    replaced["prev_chunks_scale"] = f"passes.prev_share={variables.get('prev_chunks_scale')}"
    for name in ("OFFLOAD_T5_CACHE", "OFFLOAD_VAE_CACHE"):
        replaced[name] = f"offload={_switched(variables, name)}"
    for name, setting in replaced.items():
        if name in variables:
            yield f"{name} is set, but no environment variable changes a run: use {setting}"


def _switched(variables: Mapping[str, str], name: str) -> str:
    return str(variables.get(name, "").lower() in SWITCHED_ON).lower()


if __name__ == "__main__":
    sys.exit(main())
