#!/usr/bin/env python
"""Compare the time of SkyReels-V2 here with diffusers' own pipeline, and the results.

Both make the same video of the demo from the same noise, in turn, on one thread: a machine whose
speed drifts slows both alike. Times are processor time. A ratio is diffusers' time over ours, pair
by pair; above 1 ours is faster. "transformer" ends at the latents, "with VAE" at the frames.

Vanilla computes what diffusers computes. If its latents or frames differ by more than rounding, the
exit code is 1. FlowCache reuses steps, so that its video is another one: its PSNR against
diffusers' frames is reported.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.cli import Parser, run_command
from flowcache.runtime.files import fresh_path, made_folder, write_json
from flowcache.runtime.metrics import psnr
from flowcache.runtime.stats import environment
from flowcache.runtime.text_files import table_row
from flowcache.wan.unipc import SIGMA_MAX
from skyreels_v2.diffusers_pipeline import SkyReelsV2FlowCachePipeline
from skyreels_v2.released import DEMO

PROMPT = "a red circle moving right on a black background"
TEXT_LEN = 24
"""Prompt tokens of the demo."""
TOLERANCE = 1e-4
"""Of results, relative to the largest value: float32 rounding, which the steps enlarge."""
VANILLA = "vanilla"
SHIFT, GUIDANCE, SEED = 5.0, 4.0, 3
CPU = torch.device("cpu")
OUTPUTS = {"transformer": "latent", "with VAE": "pt"}
COLUMNS = ("", "", "diffusers, s", "ours, s", "least ratio", "median ratio", "result")
EXAMPLES = """examples:
  python scripts/bench_peers.py
  python scripts/bench_peers.py --runs 3 --frames 17 --steps 10 --methods vanilla
"""


class ReleasedGrid(UniPCMultistepScheduler):
    """diffusers' solver on the noise levels of the released code, which ours follows."""

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        grid: Any = np.linspace(SIGMA_MAX, 0.0, num_inference_steps + 1)[:-1]
        super().set_timesteps(sigmas=grid, device=device)


@dataclass(frozen=True)
class Row:
    """One comparison."""

    method: str
    part: str
    their_seconds: list[float]
    our_seconds: list[float]
    difference: float
    """Largest, of the largest value of diffusers' result."""
    psnr: float | None = None
    """dB, of frames."""

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.their_seconds, self.our_seconds, strict=True)]

    @property
    def is_equal(self) -> bool:
        return self.difference <= TOLERANCE

    def cells(self) -> tuple[str, ...]:
        """Return what the table shows."""
        result = f"{self.difference:.1e}, {'equal' if self.is_equal else 'DIFFERENT'}"
        if self.method != VANILLA:
            result = "other steps" if self.psnr is None else f"{self.psnr:.1f} dB"
        seconds = (statistics.median(each) for each in (self.their_seconds, self.our_seconds))
        ratios = (min(self.ratios), statistics.median(self.ratios))
        figures = (*(f"{s:.2f}" for s in seconds), *(f"{ratio:.2f}" for ratio in ratios))
        return (self.method, self.part, *figures, result)


def timed(make: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return what a call makes, and the processor time that it takes, in seconds."""
    start = time.process_time()
    made = make()
    return made, time.process_time() - start


def compare(
    method: str, part: str, makers: Sequence[Callable[[], Tensor]], *, num_runs: int
) -> Row:
    """Run diffusers' pipeline and ours in turn, once before anything is measured."""
    for make in makers:
        make()
    pairs = [[timed(make) for make in makers] for _ in range(num_runs)]
    (theirs, _), (ours, _) = pairs[-1]
    difference = float((theirs - ours).abs().max() / theirs.abs().max())
    their_seconds, our_seconds = ([s for _, s in column] for column in zip(*pairs, strict=True))
    return Row(
        method,
        part,
        their_seconds,
        our_seconds,
        difference,
        None if OUTPUTS[part] == "latent" else psnr(_pixels(ours), _pixels(theirs)),
    )


def _pixels(frames_BT3HW: Tensor) -> Tensor:
    return (frames_BT3HW[0] * 255).round().to(torch.uint8).movedim(1, -1)


def rows(options: argparse.Namespace) -> list[Row]:
    """Return the comparison of every method and part; each is printed when it is done."""
    theirs: Any = SkyReelsV2DiffusionForcingPipeline.from_pretrained(DEMO, dtype=torch.float32)
    theirs.scheduler = ReleasedGrid.from_config(theirs.scheduler.config, flow_shift=SHIFT)
    theirs.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "guidance_scale": GUIDANCE,
        "addnoise_condition": 0,
        "height": options.size,
        "width": options.size,
        "num_frames": options.frames,
        "num_inference_steps": options.steps,
    }
    print(f"{table_row(COLUMNS)}\n|---|---|---:|---:|---:|---:|---|", flush=True)
    found: list[Row] = []
    for method in options.methods:
        ours = SkyReelsV2FlowCachePipeline.from_pretrained(DEMO, preset=method, shift=SHIFT)
        ours.set_progress_bar_config(disable=True)
        # diffusers' transformer sees the whole window, all of it at one noise level
        alike = {"ar_step": 0, "causal_block_size": 1} if method == VANILLA else {}
        ways: Any = ((theirs, {"ar_step": 0, "max_sequence_length": TEXT_LEN}), (ours, alike))
        for part, output in OUTPUTS.items():
            makers = [partial(make, pipe, output, {**call, **more}) for pipe, more in ways]
            found.append(compare(method, part, makers, num_runs=options.runs))
            print(table_row(found[-1].cells()), flush=True)
    return found


def make(pipe: Any, output: str, call: Mapping[str, Any]) -> Tensor:
    """Make a video from the same noise every time."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.as_tensor(pipe(**call, output_type=output, generator=generator)[0])


def measure(options: argparse.Namespace) -> bool:
    """Print and write all comparisons; return whether the results are equal that must be."""
    if options.runs < 1:
        raise UserError(f"--runs must be 1 or more, not {options.runs}")
    torch.set_num_threads(1)
    with made_folder(options.out):
        found = rows(options)
    path = fresh_path(options.out, "bench_peers", ".json")
    report = {"command": " ".join(["python", *sys.argv]), "environment": environment(CPU)}
    write_json(path, {**report, "rows": [{**asdict(row), "ratios": row.ratios} for row in found]})
    print(f"wrote {path}")
    return all(row.is_equal for row in found if row.method == VANILLA)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 if results differ that must be equal."""
    parser = Parser(
        prog="python scripts/bench_peers.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, value, what in (
        ("--runs", 5, "pairs that are measured"),
        ("--size", 64, "rows and columns, pixels"),
        ("--frames", 77, "of the video"),
        ("--steps", 30, "of a chunk"),
    ):
        meaning = f"{what} (default: {value})"
        parser.add_argument(name, type=int, metavar="N", default=value, help=meaning)
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="PRESET",
        default=[VANILLA, "flowcache_slow", "flowcache_fast"],
        help="presets of ours (default: vanilla flowcache_slow flowcache_fast)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("result/bench_peers"), help="folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    equal: list[bool] = []
    failed = run_command(lambda: equal.append(measure(options)))
    return failed or int(not equal[0])


if __name__ == "__main__":
    sys.exit(main())
