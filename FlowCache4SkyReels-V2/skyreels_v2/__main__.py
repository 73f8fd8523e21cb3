"""The command line: `python -m skyreels_v2`."""

import sys
from collections.abc import Sequence

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.runtime.cli import run_parser
from flowcache.runtime.entry import main_of
from skyreels_v2.released import PRESETS, RELEASED

_EXAMPLES = """examples:
  python -m skyreels_v2 --preset flowcache_fast --model demo \\
      --prompt "a red circle moving right on a black background"
  python -m skyreels_v2 --preset vanilla --model /data/SkyReels-V2-DF-1.3B-540P \\
      --prompt "a swan on a lake" num_frames=97 seed=7 reuse.threshold=0.2
  python -m skyreels_v2 --preset flowcache_fast --prompt "..." --dry-run
  python -m skyreels_v2 --model demo --prompt "..." --out a.mp4 --record
  python -m skyreels_v2 --model demo --prompt "..." --out b.mp4 --replay a.record.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2: something given is wrong)."""
    parser = run_parser(
        "python -m skyreels_v2",
        description="Make a video with SkyReels-V2 and FlowCache.",
        examples=_EXAMPLES,
        presets=PRESETS,
        model="checkpoint folder (original or *-Diffusers layout), hub id, demo, or auto: the real "
        "1.3B model where there is CUDA, else the demo",
        dry_run="plans a released model without its files if --model is one of "
        + ", ".join(RELEASED),
    )
    parser.add_argument("--end-image", dest="end_image", help="end image")
    options = parser.parse_intermixed_args(arguments)
    from skyreels_v2.config import RunConfig  # which --help does without

    return main_of("skyreels_v2", options, schema=RunConfig)


if __name__ == "__main__":
    sys.exit(main())
