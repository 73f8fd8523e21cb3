"""Make a video with MAGI-1, by upstream's flags; see --help."""

import sys

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from magi1.upstream import main

if __name__ == "__main__":
    sys.exit(main())
