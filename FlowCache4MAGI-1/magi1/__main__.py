"""The command line: `python -m magi1`."""

import sys
from collections.abc import Sequence

from flowcache.runtime.starting import start_quietly

start_quietly(__name__)

from flowcache.runtime.cli import overrides_of, run_command, run_parser
from flowcache.runtime.config import describe as describe_keys
from flowcache.runtime.parallel import run_in_ranks
from flowcache.runtime.ranks import Ranks
from magi1.config import ReleaseConfig, RunConfig
from magi1.released import CONFIGS, RELEASED
from magi1.run import BASE, PRESETS, Request, describe, plan_without_files, prepare, run

EXAMPLES = """examples:
  python -m magi1 --preset flowcache_fast --model demo \\
      --prompt "a red circle moving right on a black background"
  python -m magi1 --preset vanilla --model /data/4.5B_distill_config.json \\
      --prompt "a cat sitting on the grass" runtime_config.num_frames=240 reuse.threshold=0.02
  python -m magi1 --preset flowcache_fast --model 4.5B_distill --prompt "..." --dry-run
  python -m magi1 --model demo --prompt "..." --out a.mp4 --record
  python -m magi1 --model demo --prompt "..." --out b.mp4 --replay a.record.json

Settings are changed by key=value; --list-settings shows all keys. A run prints what it will do, a
progress bar, and a summary, and writes NAME.mp4 and NAME.json (settings, versions, every decision
of the cache, seconds per stage).
"""

RUN_ARGUMENTS = ("prompt", "image", "video", "memory_limit", "embedding_cache")
"""Arguments that are settings of the same name."""

FIELDS = CONFIGS / "fields.yaml"
"""What the fields of the release's JSON files mean."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2: something given is wrong)."""
    parser = run_parser(
        "python -m magi1",
        description="Make a video with MAGI-1 and FlowCache.",
        examples=EXAMPLES,
        presets=PRESETS,
        model="JSON config of the release, folder that holds one, demo, demo-base (three guidance "
        f"passes), {', '.join(RELEASED)}, or auto: 4.5B_distill where there is CUDA, else the demo",
        dry_run="plans a released model without its files",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the released --model from the hub"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.list_settings:
        return run_command(lambda: print("\n".join(list_settings()), flush=True))
    named = {name: name for name in RUN_ARGUMENTS}
    request = Request(
        preset=options.preset,
        model=options.model,
        overrides=overrides_of(options, {**named, "seed": "runtime_config.seed"}),
        out=options.out,
        overwrite=options.overwrite,
        record=options.record,
        replay=options.replay,
        is_dry=options.dry_run,
        download=options.download,
    )
    return run_in_ranks(lambda ranks: execute(request, ranks))


def list_settings() -> list[str]:
    """Return one line per setting: the release's fields, then the others."""
    release = describe_keys(ReleaseConfig, commented=FIELDS)
    return [*release, *describe_keys(RunConfig, commented=BASE)[len(release) :]]


def execute(request: Request, ranks: Ranks) -> None:
    """Check, say what will be done, and do it unless the run is dry."""
    plan = ranks.together(lambda: plan_without_files(request, ranks))
    if plan is not None:
        if ranks.is_first:
            print(plan)
        return
    job = ranks.together(lambda: prepare(request, ranks))
    if ranks.is_first:
        print(describe(job), flush=True)
    if not request.is_dry:
        run(job)


if __name__ == "__main__":
    sys.exit(main())
