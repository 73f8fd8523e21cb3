"""The command line: `python -m magi1`."""

import sys
from collections.abc import Sequence

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.runtime.cli import run_parser
from flowcache.runtime.entry import main_of
from magi1.released import PRESETS, RELEASED

_EXAMPLES = """examples:
  python -m magi1 --preset flowcache_fast --model demo \\
      --prompt "a red circle moving right on a black background"
  python -m magi1 --preset vanilla --model /data/4.5B_distill_config.json \\
      --prompt "a cat sitting on the grass" runtime_config.num_frames=240 reuse.threshold=0.02
  python -m magi1 --preset flowcache_fast --model 4.5B_distill --prompt "..." --dry-run
  python -m magi1 --model demo --prompt "..." --out a.mp4 --record
  python -m magi1 --model demo --prompt "..." --out b.mp4 --replay a.record.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2: something given is wrong)."""
    parser = run_parser(
        "python -m magi1",
        description="Make a video with MAGI-1 and FlowCache.",
        examples=_EXAMPLES,
        presets=PRESETS,
        model="JSON config of the release, folder that holds one, demo, demo-base (three guidance "
        f"passes), {', '.join(RELEASED)}, or auto: 4.5B_distill where there is CUDA, else the demo",
        dry_run="plans a released model without its files",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the released --model from the hub"
    )
    options = parser.parse_intermixed_args(arguments)
    from magi1.config import RunConfig  # which --help does without

    return main_of("magi1", options, schema=RunConfig)


if __name__ == "__main__":
    sys.exit(main())
