#!/usr/bin/env python
"""Measure what 8-bit linears change in SkyReels-V2, and what they save.

Every row is a way to compute, compared with another one: bfloat16 with float32, each setting of
`quantize` with bfloat16. Two errors are of a small random transformer, from a file of reference
tensors: of its first quantised layer alone, for normal tokens, and of its velocity; relative, by
the Euclidean norm. The PSNR is of one short clip of --model. A setting that can't run here is named
with the reason.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

import torch
from golden.case import Case, read_case
from golden.skyreels_v2_loops import build_dit
from torch import Tensor

from flowcache.errors import UserError
from flowcache.gpu.paths import relative_error
from flowcache.runtime.cli import Parser, choose_device, run_command
from flowcache.runtime.config import QuantizeName
from flowcache.runtime.metrics import psnr
from flowcache.runtime.model import Request
from flowcache.runtime.run import collect, encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats
from flowcache.runtime.text_files import escaped, table_row
from flowcache.wan.quantize import check, linears, quantize
from skyreels_v2.model import MODEL

CASE = Path(__file__).resolve().parents[1] / "tests/golden/skyreels_v2/dit_t2v.safetensors"
MODES: tuple[QuantizeName, ...] = get_args(QuantizeName)
NUM_TOKENS = 256
"""That the single layer gets."""
CLIP = (
    *("prompt=a red circle moving right on a black background", "num_frames=37"),
    *("memory_limit=none", "compile=false"),
)
COLUMNS = ("", "compared with", "one layer", "velocity", "clip", "weights")
EXAMPLES = """examples:
  python scripts/quantize_error.py
  python scripts/quantize_error.py --mode int8_weight num_steps=10
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

    layer_SD: Tensor
    velocity: Tensor
    clip_THW3: Tensor
    weight_bytes: int
    """Of the transformer of the clip."""


def ways(modes: Sequence[QuantizeName]) -> list[Way]:
    """Return all ways, each after the one that it is compared with."""
    plain = [Way("float32", "float32", None, None), Way("bfloat16", "bfloat16", None, "float32")]
    return plain + [Way(mode, "bfloat16", mode, "bfloat16") for mode in modes]


@torch.no_grad()
def compute(way: Way, case: Case, options: argparse.Namespace) -> Made:
    """Compute the layer, the velocity and the clip in one way."""
    layer, velocity = forward(way, case, device=choose_device(options.device))
    own = (f"device={options.device}", f"dtype={way.dtype}", f"quantize={way.mode or 'null'}")
    clip, weight_bytes = make_clip(options.model, [*CLIP, *options.settings, *own])
    return Made(layer, velocity, clip, weight_bytes)


def forward(way: Way, case: Case, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what the first quantised layer and the whole transformer give."""
    dtype = getattr(torch, way.dtype)
    dit = build_dit(case).to(device, dtype)
    check(way.mode, dit.config, device=device, dtype=dtype)
    if way.mode is not None:
        quantize(dit, way.mode, device=device)
    first = next(linears(dit))
    tokens = torch.randn(NUM_TOKENS, first.in_features, generator=torch.Generator().manual_seed(0))
    x, t, context = (case.tensor(f"in.{name}").to(device) for name in ("x", "t", "context"))
    return first(tokens.to(device, dtype)).float(), dit(x, t, context)


def make_clip(model: str, settings: Sequence[str]) -> tuple[Tensor, int]:
    """Make a clip in memory; return it and the bytes of the transformer's weights."""
    job = prepare(MODEL, Request("vanilla", model, settings))
    stats = RunStats(job.device)
    loaded, inputs = load_networks(job, stats=stats), encode_inputs(job, stats=stats)
    shown = MODEL.generate(loaded.dit, loaded.vae, job.placed, inputs, stats=stats, work=job.work)
    clip = collect(shown, stats)
    return clip.frames, job.work.weight_bytes


def row(way: Way, made: Made, base: Made) -> str:
    """Return a row of the table."""
    errors = [
        f"{relative_error(getattr(made, part), getattr(base, part)):.2%}"
        for part in ("layer_SD", "velocity")
    ]
    decibel = psnr(made.clip_THW3, base.clip_THW3)
    shown = "equal" if math.isinf(decibel) else f"{decibel:.1f} dB"
    size = f"{made.weight_bytes / 1e6:.2f} MB"
    return table_row([escaped(way.name), way.base or "", *errors, shown, size])


def measure(options: argparse.Namespace) -> None:
    """Print the table, then what could not run."""
    case = read_case(CASE, folder=CASE.parent)
    made: dict[str, Made] = {}
    reasons: dict[str, str] = {}
    print(f"{table_row(COLUMNS)}\n|---|---|---:|---:|---:|---:|")
    for way in ways([options.mode] if options.mode else MODES):
        try:
            made[way.name] = compute(way, case, options)
        except UserError as error:
            if way.mode is None:
                raise
            reasons[way.name] = str(error)
            continue
        if way.base is not None:
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
    parser.add_argument("--model", default="demo", help="makes the clip (default: demo)")
    parser.add_argument("--device", default="auto", help="cuda, cpu (default: cuda if there is)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the clip")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
