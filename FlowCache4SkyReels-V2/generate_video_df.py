"""Make a video with a SkyReels-V2 diffusion forcing model, by upstream's flags; see --help."""

import sys

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from skyreels_v2.upstream import main

if __name__ == "__main__":
    sys.exit(main("generate_video_df.py"))
