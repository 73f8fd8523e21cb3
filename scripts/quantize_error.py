#!/usr/bin/env python
"""Measure what 8-bit linears change in a model, and what they save.

Every row is a way to make one short clip, compared with another one: bfloat16 with float32, each
setting of `quantize` with bfloat16. Two errors are of the transformer's first pass, for which all
ways get the same: of the first quantised layer, and of the last block; relative, by the Euclidean
norm. The PSNR is of the clip. A setting that can't run here is named with the reason.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

import torch
from torch import Tensor, nn

from flowcache.errors import UserError
from flowcache.gpu.paths import relative_error
from flowcache.runtime.cli import Parser, add_checkpoint, run_command, settle_checkpoint
from flowcache.runtime.config import QuantizeName, check_left_out
from flowcache.runtime.metrics import psnr
from flowcache.runtime.model import Job, Request, VideoModel, load_model
from flowcache.runtime.quantize import linears
from flowcache.runtime.run import collect, encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats
from flowcache.runtime.text_files import escaped, table_row

MODES: tuple[QuantizeName, ...] = get_args(QuantizeName)
PROMPT = "a red circle moving right on a black background"
CLIP = (f"prompt={PROMPT}", "num_frames=37", "memory_limit=none", "compile=false")
BY_TABLE = "is set by the table: leave it out"
COMPARED = {
    "quantize": f"{BY_TABLE}, or take --mode",
    "dtype": BY_TABLE,
    "device": f"{BY_TABLE}, or take --device",
}
"""Settings of each way."""
COLUMNS = ("", "compared with", "first layer", "all blocks", "clip", "weights")
EXAMPLES = """examples:
  python scripts/quantize_error.py
  python scripts/quantize_error.py --architecture magi1 --mode int8_weight
  python scripts/quantize_error.py --model /data/SkyReels-V2-DF-1.3B-540P --mode fp8_weight
"""


@dataclass(frozen=True)
class Way:
    """A way to compute."""

    name: str
    dtype: str
    mode: QuantizeName | None
    base: str | None
    """The name of what it is compared with; None: nothing."""


@dataclass(frozen=True)
class Made:
    """What came out of one way."""

    layer: Tensor
    """Of the first quantised layer, in the first pass."""
    blocks: Tensor
    """Of the last block, in the first pass."""
    clip_THW3: Tensor
    weight_bytes: int
    """Of the transformer."""


def ways(modes: Sequence[QuantizeName]) -> list[Way]:
    """Return all ways, each after the one that it is compared with."""
    plain = [Way("float32", "float32", None, None), Way("bfloat16", "bfloat16", None, "float32")]
    return plain + [Way(mode, "bfloat16", mode, "bfloat16") for mode in modes]


def prepare_way(way: Way, model: VideoModel, options: argparse.Namespace) -> Job:
    """Plan the clip; raises `UserError` where the way can't run."""
    own = (f"device={options.device}", f"dtype={way.dtype}", f"quantize={way.mode or 'null'}")
    request = Request(options.preset, options.model, [*CLIP, *options.settings, *own])
    return prepare(model, request, writes=False)


@torch.no_grad()
def compute(job: Job, model: VideoModel) -> Made:
    """Make the clip in memory, and keep what the first pass gives."""
    stats = RunStats(job.device)
    loaded, inputs = load_networks(job, stats=stats), encode_inputs(job, stats=stats)
    layer = first_output(next(linears(model.quantised(loaded.dit))))
    blocks = first_output(model.blocks(loaded.dit)[-1])
    shown = model.generate(loaded.dit, loaded.vae, job.placed, inputs, stats=stats, work=job.work)
    clip = collect(shown, stats)
    return Made(layer[0], blocks[0], clip.frames, job.work.weight_bytes)


def first_output(module: nn.Module) -> list[Tensor]:
    """Return a list that is given what a module returns when it is called next."""
    made: list[Tensor] = []

    def keep(_module: nn.Module, _given: Any, output: Tensor) -> None:
        made.append(output.float().cpu())
        hook.remove()

    hook = module.register_forward_hook(keep)
    return made


def row(way: Way, made: Made, base: Made) -> str:
    """Return a row of the table."""
    errors = [
        f"{relative_error(getattr(made, part), getattr(base, part)):.2%}"
        for part in ("layer", "blocks")
    ]
    decibel = psnr(made.clip_THW3, base.clip_THW3)
    shown = "equal" if math.isinf(decibel) else f"{decibel:.1f} dB"
    size = f"{made.weight_bytes / 1e6:.2f} MB"
    return table_row([escaped(way.name), way.base or "", *errors, shown, size])


def measure(options: argparse.Namespace) -> None:
    """Print the table, then what could not run.

    Raises:
        UserError: the one setting that was asked for can't run.
    """
    settle_checkpoint(options)
    check_left_out(options.settings, COMPARED)
    model = load_model(options.architecture)
    jobs: dict[Way, Job] = {}
    reasons: dict[str, str] = {}
    for way in ways([options.mode] if options.mode else MODES):
        try:
            jobs[way] = prepare_way(way, model, options)
        except UserError as error:
            if way.mode in (None, options.mode):
                raise
            reasons[way.name] = str(error)
    made: dict[str, Made] = {}
    for way, job in jobs.items():
        made[way.name] = compute(job, model)
        if way.base is None:
            print(f"{table_row(COLUMNS)}\n|---|---|---:|---:|---:|---:|")
        else:
            print(row(way, made[way.name], made[way.base]), flush=True)
    if reasons:
        print("\nnot run here:")
        print("\n".join(f"  {name}: {reason}" for name, reason in reasons.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(
        prog="python scripts/quantize_error.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mode", choices=MODES, help="one setting of quantize (default: all)")
    add_checkpoint(parser)
    parser.add_argument("--preset", default="vanilla", help="of the clip (default: vanilla)")
    parser.add_argument("--device", default="auto", help="cuda, cpu (default: cuda if there is)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the clip")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
