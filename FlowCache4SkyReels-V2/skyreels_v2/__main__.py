"""The command line: `python -m skyreels_v2`."""

import argparse
import sys
from collections.abc import Sequence

from flowcache.cli import Parser, run_command
from flowcache.config import describe as describe_keys
from skyreels_v2.config import RunConfig
from skyreels_v2.released import RELEASED
from skyreels_v2.run import PRESETS, Request, describe, plan_released, prepare, run

EXAMPLES = """examples:
  python -m skyreels_v2 --preset flowcache_fast --model demo \\
      --prompt "a red circle moving right on a black background"
  python -m skyreels_v2 --preset vanilla --model /data/SkyReels-V2-DF-1.3B-540P \\
      --prompt "a swan on a lake" num_frames=97 seed=7 reuse.threshold=0.2
  python -m skyreels_v2 --preset flowcache_fast --prompt "..." --dry-run

Settings are changed by key=value; --list-settings shows all keys. A run prints what it will do, a
progress bar, and a summary, and writes NAME.mp4 and NAME.json (settings, versions, every decision
of the cache, seconds per stage).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2: something given is wrong)."""
    parser = Parser(
        prog="python -m skyreels_v2",
        description="Make a video with SkyReels-V2 and FlowCache.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    presets = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    parser.add_argument("--preset", default="flowcache_fast", help=f"name or YAML file ({presets})")
    parser.add_argument(
        "--model",
        default="auto",
        help="checkpoint folder (original or *-Diffusers layout), hub id, demo, or auto: the real "
        "1.3B model where there is CUDA, else the demo (default: auto)",
    )
    parser.add_argument("--prompt", help="what the video shows")
    parser.add_argument("--image", help="start image")
    parser.add_argument("--end-image", dest="end_image", help="end image")
    parser.add_argument("--video", help="video to extend")
    parser.add_argument("--seed", help="seed of all noise")
    parser.add_argument(
        "--out", help="an .mp4 file, or a folder in which a fresh name is found (default: result)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the plan, make nothing; plans a released model without its "
        f"files if --model is one of {', '.join(RELEASED)}",
    )
    parser.add_argument(
        "--list-settings", action="store_true", help="print every setting with type and default"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings to change")
    options = parser.parse_intermixed_args(arguments)
    if options.list_settings:
        print("\n".join(describe_keys(RunConfig, commented=PRESETS / "base.yaml")))
        return 0
    named = ("prompt", "image", "end_image", "video", "seed")
    given = [f"{key}={getattr(options, key)}" for key in named if getattr(options, key) is not None]
    request = Request(
        preset=options.preset,
        model=options.model,
        overrides=[*given, *options.settings],
        out=options.out,
        overwrite=options.overwrite,
    )
    return run_command(lambda: execute(request, is_dry=options.dry_run))


def execute(request: Request, *, is_dry: bool) -> None:
    """Check, say what will be done, and do it unless the run is dry."""
    if is_dry and request.model in RELEASED:
        print(plan_released(request))
        return
    job = prepare(request)
    print(describe(job), flush=True)
    if not is_dry:
        run(job)


if __name__ == "__main__":
    sys.exit(main())
