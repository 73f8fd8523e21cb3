"""Train a demo checkpoint from nothing: draw clips, train a VAE, encode, train the transformer.

    python scripts/train_demo.py --architecture skyreels_v2 --out build/demo            everything
    python scripts/train_demo.py --architecture skyreels_v2 --out build/demo --stage vae   one stage

Every stage saves what it has reached under --out and goes on from there when it is started again,
also after a kill; a finished stage is a no-op. A longer --vae-steps or --dit-steps prolongs a
training that is not yet finished. Nothing is downloaded. One thread trains a checkpoint in about
three hours on one CPU core. self_forcing takes VAE, text encoder and first weights of the transformer
from the demo of skyreels_v2.

The stages of a model are in the `demo.py` of its package; `export` writes the checkpoint folder and
its training.json.
"""

import argparse
import logging
import sys
from importlib import import_module
from pathlib import Path

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

import torch

from flowcache.demo.recipe import Recipe, Training, write_record
from flowcache.runtime.cli import Parser, run_command

logger = logging.getLogger("train_demo")
MODELS = ("magi1", "self_forcing", "skyreels_v2")
EXPORT, ALL = "export", "all"
STEP_NAMES = {
    "vae": "steps of the VAE",
    "decoder": "further steps of its decoder alone",
    "dit": "steps of the transformer",
    "refine": "further steps of it on smaller batches",
    "distill": "steps of the distilled transformer",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = parse_options(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return run_command(lambda: train(options))


def recipe_of(model: str) -> Recipe:
    """Return how a model's demo is trained, from the `demo` module of its package."""
    return import_module(f"{model}.demo").RECIPE


def train(options: argparse.Namespace) -> None:
    """Run the stages asked for."""
    torch.set_num_threads(options.threads)
    recipe = recipe_of(options.architecture)
    options.out.mkdir(parents=True, exist_ok=True)
    steps = {
        name: getattr(options, f"{name}_steps") or default
        for name, default in recipe.default_steps.items()
    }
    training = Training(options.out, options.threads, options.num_clips, steps, options.start)
    for stage in (*recipe.stages, EXPORT) if options.stage == ALL else (options.stage,):
        logger.info("stage %s", stage)
        if stage == EXPORT:
            folder = options.export_to or recipe.shipped
            parts = recipe.export(training, folder)
            write_record(
                training, folder, model=options.architecture, parts=parts, note=options.note
            )
        else:
            recipe.stages[stage](training)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--architecture", choices=MODELS, help="package of the model")
    # as the commands of the shipped demos name it
    model.add_argument("--model", dest="architecture", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--stage", default=ALL, help="one stage of the model, export, or all")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the training's own files"
    )
    parser.add_argument(
        "--start", type=Path, help="checkpoint folder whose weights the training begins with"
    )
    parser.add_argument(
        "--export-to", type=Path, help="checkpoint folder to write (default: the shipped one)"
    )
    for name, what in STEP_NAMES.items():
        parser.add_argument(f"--{name}-steps", type=_positive, help=what)
    parser.add_argument(
        "--num-clips", type=_positive, default=1350, help="clips the transformer sees (1350)"
    )
    parser.add_argument("--note", default="", help="a remark that training.json keeps")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads (default 1)")
    options = parser.parse_args(argv)
    recipe = recipe_of(options.architecture)
    stages = (*recipe.stages, EXPORT, ALL)
    if options.stage not in stages:
        parser.error(f"--stage is {options.stage!r}, must be one of {', '.join(stages)}")
    for name in STEP_NAMES:
        if getattr(options, f"{name}_steps") is not None and name not in recipe.default_steps:
            parser.error(
                f"--{name}-steps: {options.architecture} has no stage {name}; leave it out"
            )
    return options


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
