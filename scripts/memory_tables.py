#!/usr/bin/env python
"""Plan the released models for cards of several sizes, by arithmetic: a table in Markdown.

A row is what `--dry-run --memory-limit` says of a run: the planned peak, the host's memory, what is
on the host, and the seconds over those with everything on the GPU. Nothing is loaded or measured.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowcache.errors import UserError
from flowcache.runtime.cli import Parser, run_command
from flowcache.runtime.config import check_left_out, parse_limit
from flowcache.runtime.memory import Footprint, MemoryPlan, make_memory_plan
from flowcache.runtime.model import Job, Request, load_model
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import job_of, read_settings
from flowcache.runtime.stats import scaled

EXAMPLES = """examples:
  python scripts/memory_tables.py
  python scripts/memory_tables.py --limits 24GB 48GB --runs "MAGI-1 24B"
  python scripts/memory_tables.py quantize=int8_weight --limits 8GB --runs "SkyReels-V2"
"""
LIMITS = ("8GB", "12GB", "16GB", "24GB", "48GB", "80GB")
GPU = torch.device("cuda")
HEAD = "| run | limit | planned peak | on the host | seconds | what is moved |"


@dataclass(frozen=True)
class Run:
    """A run at a released size."""

    model: str
    checkpoint: str
    preset: str
    settings: tuple[str, ...] = ()

    def job(self, *settings: str) -> Job:
        """Return the run with more settings, by the sizes of the checkpoint."""
        model = load_model(self.model)
        overrides = ["prompt=a swan", *self.settings, *settings]
        request = Request(self.preset, self.checkpoint, overrides, is_dry=True)
        source = model.find(self.checkpoint, is_dry=True)
        config = read_settings(model, request, source)
        media, dtype = model.media(config, source), model.dtype(config, GPU)
        ranks = Ranks()
        return job_of(model, request, config, source, media, device=GPU, dtype=dtype, ranks=ranks)


SQUARE = ("runtime_config.video_size_h=720", "runtime_config.video_size_w=720")
RUNS = {
    "SkyReels-V2 1.3B, 544x960, 97 frames": Run(
        "skyreels_v2", "df-1.3b-540p", "flowcache_fast", ("num_frames=97",)
    ),
    "SkyReels-V2 1.3B, 544x960, 177 frames": Run(
        "skyreels_v2",
        "df-1.3b-540p",
        "flowcache_fast",
        ("num_frames=177", "base_num_frames=177", "overlap_history=null"),
    ),
    "SkyReels-V2 1.3B, 544x960, 177 frames in two windows": Run(
        "skyreels_v2", "df-1.3b-540p", "flowcache_fast", ("num_frames=177",)
    ),
    "SkyReels-V2 1.3B, 544x960, 257 frames in two windows": Run(
        "skyreels_v2", "df-1.3b-540p", "flowcache_fast", ("num_frames=257", "base_num_frames=137")
    ),
    "SkyReels-V2 14B, 720x1280, 97 frames": Run(
        "skyreels_v2",
        "df-14b-720p",
        "flowcache_fast",
        ("num_frames=97", "height=720", "width=1280"),
    ),
    "MAGI-1 4.5B distilled, 720x720, 240 frames": Run(
        "magi1", "4.5B_distill", "flowcache_fast", SQUARE
    ),
    "MAGI-1 24B distilled, 720x720, 240 frames": Run(
        "magi1", "24B_distill", "flowcache_fast", SQUARE
    ),
    "MAGI-1 24B distilled 8-bit, 720x720, 240 frames": Run(
        "magi1", "24B_distill_quant", "flowcache_fast", SQUARE
    ),
    "Self-Forcing (long), 480x832, 1917 frames": Run(
        "self_forcing", "wan2.1-t2v-1.3b", "long", ("num_frames=1917",)
    ),
}


def line(name: str, limit: str, needs: Footprint, job: Job) -> str:
    """Return a row of the table."""
    try:
        plan = make_memory_plan(
            needs,
            wanted=job.model.residence(job.config),
            limit_bytes=parse_limit(limit),
            has_host=True,
        )
    except UserError as error:
        return f"| {name} | {limit} | does not fit | | | {str(error).partition('but ')[2]} |"
    return f"| {name} | {limit} | {' | '.join(cells(plan))} |"


def cells(plan: MemoryPlan) -> list[str]:
    """Return what a plan says: peak, host, seconds over those with all on the GPU, what moved."""
    cost = plan.cost
    ratio = (cost.seconds + cost.added_seconds) / cost.seconds
    return [
        scaled(plan.peak_bytes, "B"),
        scaled(cost.host_bytes, "B"),
        f"x{ratio:.2f}",
        plan.residence.describe(),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(
        prog="python scripts/memory_tables.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--limits", nargs="+", default=LIMITS, metavar="SIZE", help="of cards")
    parser.add_argument(
        "--runs", nargs="+", default=("",), metavar="START", help="runs whose names begin so"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all runs")
    options = parser.parse_args(arguments)

    def command() -> None:
        for limit in options.limits:
            if parse_limit(limit) is None:
                raise UserError(f"--limits takes amounts such as 24GB, not {limit}")
        chosen = [name for name in RUNS if name.startswith(tuple(options.runs))]
        if not chosen:
            raise UserError(f"--runs {options.runs[0]!r} is none of: {'; '.join(RUNS)}")
        check_left_out(
            options.settings, {"memory_limit": "is what --limits says here: leave it out"}
        )
        jobs = {name: RUNS[name].job(*options.settings) for name in chosen}
        print(f"{HEAD}\n|---|---:|---:|---:|---:|---|", flush=True)
        for name, job in jobs.items():
            needs = job.model.footprint(job, overlaps=True)
            for limit in options.limits:
                print(line(name, limit, needs, job), flush=True)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
