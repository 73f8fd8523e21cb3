"""The command line: `python -m self_forcing`."""

import sys
from collections.abc import Sequence

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.runtime.cli import run_parser
from flowcache.runtime.entry import main_of
from self_forcing.released import PRESETS, RELEASED

EXAMPLES = """examples:
  python -m self_forcing --preset causal_forcing_framewise --model /data/Wan2.1-T2V-1.3B \\
      --prompt "a swan on a lake" checkpoint=/data/framewise/causal_forcing.pt seed=7
  python -m self_forcing --prompt "a swan" --model wan2.1-t2v-1.3b --dry-run

Settings are changed by key=value; --list-settings shows all keys.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2: something given is wrong)."""
    parser = run_parser(
        "python -m self_forcing",
        description="Make a video with Self-Forcing or Causal-Forcing.",
        examples=EXAMPLES,
        presets=PRESETS,
        model="folder of the Wan2.1-T2V-1.3B model (original or *-Diffusers layout), hub id, demo, "
        "or auto: the real model where there is CUDA, else the demo",
        dry_run=f"plans without files if --model is {', '.join(RELEASED)}",
    )
    parser.set_defaults(preset="self_forcing")
    options = parser.parse_intermixed_args(arguments)
    from self_forcing.config import RunConfig  # which --help does without

    return main_of("self_forcing", options, schema=RunConfig)


if __name__ == "__main__":
    sys.exit(main())
