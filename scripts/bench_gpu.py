#!/usr/bin/env python
"""Measure speed and memory at the released sizes on one GPU; see `flowcache.gpu.bench`."""

import sys

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.gpu.bench import main

if __name__ == "__main__":
    sys.exit(main())
