#!/usr/bin/env python
"""Make many videos, with any number of processes on any number of machines.

Models are loaded once per process. Processes of one launcher divide the videos in advance, by the
FLOPs of their plans; --ray gives the next video to whoever is free, and starts processes that died
again. Every NAME.mp4 gets a receipt, NAME.json, written just before: settings, versions,
statistics, the video's SHA-256. A second start makes only what has no valid receipt, whatever ended
the first one; videos of another preset, model or setting are kept, and end it. A video that fails
is recorded in NAME.error.json, the others go on; the next start tries it again.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

import torch

from flowcache.bench import actors
from flowcache.bench.protocol import VIDEOS, keep_protocol, read_protocol
from flowcache.bench.render import Renderer
from flowcache.bench.tasks import (
    VBENCH_DIMENSIONS,
    Kind,
    Origin,
    Run,
    Task,
    alarms,
    check_names,
    from_lines,
    from_physics_iq,
    from_vbench,
    keep_descriptions,
    keep_vbench_prompts,
    physics_iq_table,
    read_vbench_prompts,
)
from flowcache.bench.worker import Worker, divide, warned_once
from flowcache.bounds import MAX_SEED
from flowcache.errors import UserError
from flowcache.runtime.cli import Parser, choose_device
from flowcache.runtime.cluster import check_replicas, cluster
from flowcache.runtime.ending import Place
from flowcache.runtime.files import check_writable
from flowcache.runtime.model import MODELS
from flowcache.runtime.parallel import Ranks, run_in_ranks

EXIT_SOME_FAILED = 1
MAX_PER_PROMPT = 10_000
PATIENCE = timedelta(days=30)
"""How long a process that has made its share waits for the others."""

DEFAULTS = {"preset": "flowcache_fast", "seed": 0, "per_prompt": 1}
"""What a protocol says itself."""

EXAMPLES = """examples:
  python scripts/sample.py skyreels_v2 --preset flowcache_fast --prompts prompts.txt --out result/a
  python scripts/sample.py magi1 --vbench VBench/prompts --dimensions color,scene --per-prompt 5 \\
      --out result/vbench
  python scripts/sample.py magi1 --physics-iq physics-IQ --out result/physics prefix_frames=72
  python -m flowcache.launch 8 scripts/sample.py skyreels_v2 \\
      --model /data/SkyReels-V2-DF-1.3B-540P --vbench VBench/prompts --out /shared/vbench
  python scripts/sample.py --protocol scripts/protocols/skyreels_v2_demo.yaml \\
      --out result/reproduce_skyreels_v2

Several machines: --ray with RAY_ADDRESS, or accelerate launch on each, and an output folder that
all of them see. A video of VBench is named PROMPT-I.mp4, I = 0 .. per-prompt - 1, and made
with the seed plus I.

Exit code: 0; 1 if a video failed; 2 if something given is wrong or the disk is full; 128 + N after
signal N, with one line.
"""


def make_parser() -> Parser:
    """Return the arguments."""
    parser = Parser(
        prog="python scripts/sample.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", nargs="?", help=f"{' or '.join(MODELS)}")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, metavar="FILE", help="a text file, a prompt a line")
    source.add_argument("--vbench", type=Path, metavar="DIR", help="VBench's folder of prompts")
    source.add_argument("--physics-iq", type=Path, metavar="DIR", help="Physics-IQ's data")
    source.add_argument("--protocol", type=Path, metavar="FILE", help="all videos of a table")
    parser.add_argument(
        "--descriptions",
        type=Path,
        metavar="CSV",
        help="of Physics-IQ, as descriptions/best_practice/descriptions_base.csv of its repository "
        "for Physics-IQ Verified (default: those in its data)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="output folder; a protocol's videos are in DIR/videos",
    )
    parser.add_argument("--preset", help="default: flowcache_fast")
    parser.add_argument("--model", help="as the family's own command (default: auto)")
    parser.add_argument("--seed", type=int, help="of the first video of a prompt (default: 0)")
    parser.add_argument(
        "--per-prompt", type=int, metavar="N", help="videos per prompt (default: 1)"
    )
    parser.add_argument(
        "--num-prompts",
        type=int,
        metavar="N",
        help="the first N of a protocol, or N of each dimension of VBench (default: all)",
    )
    parser.add_argument(
        "--dimensions",
        help="of VBench (default: the 11 of the published tables)",
    )
    parser.add_argument(
        "--ray", action="store_true", help="divide the videos by Ray, an optional package"
    )
    parser.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="models that --ray loads (default: one per GPU of the cluster; on CPUs 1)",
    )
    parser.set_defaults(**DEFAULTS)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings to change")
    return parser


def list_tasks(options: argparse.Namespace, prompts: Mapping[str, Sequence[str]]) -> list[Task]:
    """Return everything that is to be made.

    Args:
        prompts: of VBench, if it is that.
    """
    settings: list[str] = options.settings
    family: str | None = options.family
    if options.protocol is not None:
        if family is not None or settings:
            raise UserError("--protocol says family and settings: give neither beside it")
        for name, default in DEFAULTS.items():
            if getattr(options, name) != default:
                option = name.replace("_", "-")
                raise UserError(f"--protocol says the {name}: leave out --{option}")
        protocol = read_protocol(options.protocol)
        return protocol.tasks(options.model, num_prompts=options.num_prompts)
    if options.num_prompts is not None and options.vbench is None:
        raise UserError("--num-prompts is of a protocol's or VBench's prompts: leave it out")
    if options.descriptions is not None and options.physics_iq is None:
        raise UserError("--descriptions are of Physics-IQ: give --physics-iq, too")
    if family not in MODELS:
        raise UserError(f"the first argument must be {' or '.join(MODELS)}, not {family}")
    check_numbers(options.per_prompt, options.seed)
    model, given = options.model or "auto", tuple(settings)
    template = Task("", family, model, options.preset, "", options.seed, given)
    run = Run(template, options.per_prompt)
    if options.prompts is not None:
        tasks = from_lines(options.prompts, run)
    elif options.vbench is not None:
        tasks = from_vbench(prompts, run)
    else:
        tasks = from_physics_iq(options.physics_iq, run, table=options.descriptions)
    check_names(tasks)
    return tasks


def vbench_prompts(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the prompts of each of VBench's dimensions that count, if it is that."""
    if options.vbench is None:
        if options.dimensions is not None:
            raise UserError("--dimensions are of VBench: give --vbench, too")
        return {}
    dimensions = options.dimensions.split(",") if options.dimensions else VBENCH_DIMENSIONS
    return read_vbench_prompts(options.vbench, dimensions, num_prompts=options.num_prompts)


def check_numbers(per_prompt: int, seed: int) -> None:
    """Check the numbers of an own list."""
    if not 1 <= per_prompt <= MAX_PER_PROMPT:
        raise UserError(
            f"--per-prompt must be 1 to {MAX_PER_PROMPT}, not {per_prompt}: give more prompts, or "
            "start again with another --seed"
        )
    last = MAX_SEED - (per_prompt - 1)
    if not 0 <= seed <= last:
        raise UserError(
            f"--seed must be 0 to {last}, so that that of every video is a seed, not {seed}"
        )


def prepare_folder(options: argparse.Namespace, prompts: Mapping[str, Sequence[str]]) -> Path:
    """Return the folder of the videos; that of a protocol gets its copy first."""
    check_writable(options.out)
    if options.vbench is not None:
        is_part = options.num_prompts is not None
        keep_vbench_prompts(prompts, options.out, is_part=is_part)
    if options.physics_iq is not None:  # which benchmark it is; a submission needs it
        keep_descriptions(options.descriptions or physics_iq_table(options.physics_iq), options.out)
    if options.protocol is None:
        return options.out
    keep_protocol(options.protocol, options.out)
    return options.out / VIDEOS


def check_kinds(
    tasks: Sequence[Task], renderer: Renderer, protocol: Path | None
) -> dict[Kind, Origin]:
    """Check the settings of every kind of task once, before anything is loaded.

    Returns: what the videos of each kind are made from.
    """
    pinned = None if protocol is None else read_protocol(protocol)
    return {
        task.kind: renderer.check(task, pins=None if pinned is None else pinned.pins(task.folder))
        for task in {(task.kind, task.folder): task for task in tasks}.values()
    }


def prepare(
    options: argparse.Namespace, place: Place
) -> tuple[list[Task], Path, Renderer, dict[Kind, Origin]]:
    """Check everything; return the videos, their folder, what makes them, and from what."""
    if options.ray and place.size > 1:
        raise UserError("--ray starts its processes itself: start one, without a launcher")
    check_replicas(options.replicas, is_wanted=options.ray)
    prompts = vbench_prompts(options)
    tasks, renderer = list_tasks(options, prompts), Renderer(_device(place))
    origins = check_kinds(tasks, renderer, options.protocol)
    return tasks, prepare_folder(options, prompts), renderer, origins


def execute(options: argparse.Namespace, ranks: Ranks) -> int:
    """Make everything; return the exit code."""
    tasks, out, renderer, origins = ranks.together(lambda: prepare(options, ranks.place))
    worker = Worker(out, renderer.render, origins)
    failures: dict[str, str] = {}
    if options.ray:
        missing = [task for task in tasks if worker.flaw(task) is not None]
        if missing:
            with cluster(options.replicas) as found:
                failures = actors.run(worker, missing, renderer.costs, found)
        worker.tidy()
    else:
        shares = divide([renderer.costs[task.kind] for task in tasks], ranks.place.size)
        with warned_once(MODELS.values()):
            own = worker.run([tasks[index] for index in shares[ranks.place.rank]])
        for each in ranks.world.all_gather(own):
            failures |= each
    if not ranks.is_first:
        return 0
    return report(tasks, out, failures)


def report(tasks: Sequence[Task], out: Path, failures: Mapping[str, str]) -> int:
    """Say what is complete and what failed; return the exit code."""
    done = [task for task in tasks if task.label not in failures]
    print(f"{len(done)} of {len(tasks)} videos are complete in {out}")
    for line in alarms(done, out):
        sys.stderr.write(f"{line}\n")
    for task in tasks:
        if task.label in failures:
            sys.stderr.write(f"failed: {task.label}: {failures[task.label]}\n")
    return EXIT_SOME_FAILED if failures else 0


def _device(place: Place) -> str:
    """Return the device of this process, as the setting `device`: each has a GPU of its own."""
    if not torch.cuda.is_available():
        return "cpu"
    device = choose_device("cuda", local_rank=place.shared_rank)
    torch.cuda.set_device(device)
    return str(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = make_parser().parse_intermixed_args(arguments)
    codes = [0]
    code = run_in_ranks(lambda ranks: codes.append(execute(options, ranks)), timeout=PATIENCE)
    return code or codes[-1]


if __name__ == "__main__":
    sys.exit(main())
