"""Make videos by the command line and YAML files of Self-Forcing and Causal-Forcing; see --help.

Source: flags, keys, defaults and meanings of the released `inference.py` and configs of both
repositories. Every video has the seed that is given, whatever was made before it.
"""

import sys

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

import json
import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowcache.errors import UserError
from flowcache.runtime.cli import Parser
from flowcache.runtime.config import read_yaml
from flowcache.runtime.files import prompt_stem
from self_forcing.released import REAL_MODEL

logger = logging.getLogger(__name__)

CODE_DEFAULTS = {"num_frame_per_block": 1, "context_noise": 0}
KWARGS_DEFAULTS = {"timestep_shift": 8.0, "local_attn_size": -1, "sink_size": 0}
"""What upstream takes where neither the config nor `configs/default_config.yaml` has a key."""
WARPED = "warp_denoising_step"


def parser_of() -> Parser:
    """Return upstream's arguments, and ours for the base model and further settings."""
    parser = Parser(prog="inference.py", description="Make videos by upstream's flags.")
    for name, text in {
        "config_path": "YAML file of either repository",
        "checkpoint_path": "weights: .pt or .safetensors, or ORG/NAME/FILE of the hub",
        "data_path": "prompts, one a line; with --i2v the folder of images and captions",
        "output_folder": "folder of the videos",
    }.items():
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--extended_prompt_path", help="what the model reads, line by line")
    parser.add_argument("--num_output_frames", type=int, default=21, help="latent frames")
    parser.add_argument("--i2v", action="store_true", help="start from images")
    parser.add_argument("--use_ema", action="store_true", help="take the averaged weights")
    parser.add_argument("--seed", type=int, default=0, help="of every prompt's first video")
    parser.add_argument("--num_samples", type=int, default=1, help="videos of each prompt")
    parser.add_argument("--save_with_index", action="store_true", help="name videos by number")
    parser.add_argument("--report_timing", action="store_true", help="upstream's; the JSON has it")
    parser.add_argument("--rolling", action="store_true", help="loop of long_video/inference.py")
    parser.add_argument("--model", help=f"base model (default: wan_models/..., {REAL_MODEL})")
    parser.add_argument("--dry-run", dest="dry_run", action="store_true", help="print the plan")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings to change")
    return parser


def settings_of(config: Mapping[str, Any], options: Namespace) -> Iterator[str]:
    """Translate a merged YAML file and the flags to settings.

    Raises:
        UserError: a value is one that our model has not.
    """
    kwargs = {**KWARGS_DEFAULTS, **(config.get("model_kwargs") or {})}
    config = {**CODE_DEFAULTS, **config}
    if config.get("num_train_timestep", 1000) != 1000:
        raise UserError(f"num_train_timestep is {config['num_train_timestep']}, expected 1000")
    steps = config.get("denoising_step_list")
    yield f"step_list={json.dumps(steps)}"
    yield f"first_chunk_step_list={json.dumps(config.get('denoising_step_list_first_chunk'))}"
    yield f"warp_steps={json.dumps(bool(config.get(WARPED, False)))}"
    yield f"shift={kwargs['timestep_shift'] if steps else config.get('timestep_shift', 5.0)}"
    if not steps:
        yield f"guidance={config.get('guidance_scale', 3.0)}"
    if not steps and config.get("negative_prompt") is not None:
        yield f"negative_prompt={config['negative_prompt']}"
    yield f"chunk_frames={config['num_frame_per_block']}"
    yield f"first_frame_alone={json.dumps(bool(config.get('independent_first_frame', False)))}"
    yield f"context_noise={config['context_noise']}"
    window = kwargs["local_attn_size"] if kwargs["local_attn_size"] > 0 else None
    yield f"window={json.dumps(21 if options.rolling else window)}"
    yield f"sink={kwargs['sink_size']}"
    yield f"rolling={json.dumps(options.rolling)}"
    yield f"checkpoint={options.checkpoint_path}"
    yield f"use_ema={json.dumps(options.use_ema)}"
    yield f"num_frames={4 * options.num_output_frames - 3}"


def read_config(path: Path) -> dict[str, Any]:
    """Read a config over upstream's `configs/default_config.yaml`, if it is here."""
    default = Path("configs/default_config.yaml")
    return {**(read_yaml(default) if default.is_file() else {}), **read_yaml(path)}


def prompts_of(options: Namespace) -> list[tuple[str, str, str | None]]:
    """Return for each video its name's text, what the model reads, and the start image."""
    path = Path(options.data_path)
    if options.i2v:
        found = sorted(path.glob("target_crop_info_*.json"))
        if len(found) != 1:
            raise UserError(f"{path}: holds {len(found)} target_crop_info_*.json, expected one")
        folder = path / found[0].stem.removeprefix("target_crop_info_")
        rows = json.loads(found[0].read_text(encoding="utf-8"))
        return [(row["caption"], row["caption"], str(folder / row["file_name"])) for row in rows]
    names = _lines(path)
    texts = names if options.extended_prompt_path is None else _lines(options.extended_prompt_path)
    if len(texts) != len(names):
        raise UserError(f"{len(names)} prompts, but {len(texts)} extended ones: expected as many")
    return [(name, text, None) for name, text in zip(names, texts, strict=True)]


def _lines(path: str | Path) -> list[str]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; it holds prompts, one a line")
    return [line.rstrip() for line in Path(path).read_text(encoding="utf-8").splitlines()]


def stem_of(name: str, *, number: int, sample: int, options: Namespace) -> str:
    """Name a video as upstream, without what no file name holds."""
    if options.save_with_index:
        return f"{number}-{sample}_{'ema' if options.use_ema else 'regular'}"
    return f"{prompt_stem(name)}-{sample}"


def make_all(options: Namespace) -> None:
    """Make every video that is not there yet; networks are loaded once."""
    from flowcache.runtime.model import Request
    from flowcache.runtime.run import describe, encode_inputs, load_networks, prepare, render
    from flowcache.runtime.stats import RunStats
    from self_forcing.model import MODEL

    config = read_config(Path(options.config_path))
    name = (config.get("model_kwargs") or {}).get("model_name", "Wan2.1-T2V-1.3B")
    local = Path("wan_models") / name
    model = options.model or (str(local) if local.is_dir() else REAL_MODEL)
    settings, loaded = list(settings_of(config, options)), None
    for number, (shown, prompt, image) in enumerate(prompts_of(options)):
        for sample in range(options.num_samples):
            stem = stem_of(shown, number=number, sample=sample, options=options)
            out = Path(options.output_folder) / f"{stem}.mp4"
            if out.exists():
                logger.info("%s exists and is left as it is", out)
                continue
            own = [f"prompt={prompt}", f"seed={options.seed + sample}"]
            own += [] if image is None else [f"image={image}"]
            own += [*settings, *options.settings]
            job = prepare(MODEL, Request("self_forcing", model, own, str(out)))
            print(describe(job), flush=True)
            if options.dry_run:
                return
            stats = RunStats(job.device)
            inputs = encode_inputs(job, stats=stats)
            loaded = load_networks(job, stats=stats) if loaded is None else loaded
            render(job, loaded, inputs, stats=stats)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2: something given is wrong)."""
    from flowcache.runtime.cli import run_command

    options = parser_of().parse_intermixed_args(arguments)
    return run_command(lambda: make_all(options))


if __name__ == "__main__":
    sys.exit(main())
