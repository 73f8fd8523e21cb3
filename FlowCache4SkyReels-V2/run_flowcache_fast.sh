#!/usr/bin/env bash
# FlowCache, fast: every chunk decides for itself, with a higher threshold.
# Edit the variables, or set them:      PROMPT="a cat" SEED=7 bash run_flowcache_fast.sh
# Everything else follows as key=value: bash run_flowcache_fast.sh num_steps=30 guidance=5
# --dry-run checks and prints the plan, --help and --list-settings say what there is.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh" # enters the Python environment

MODEL=${MODEL:-auto}           # auto: the 1.3B model on a CUDA machine, else the demo; or a folder, or a hub id
PROMPT=${PROMPT-a blue triangle moving up on a black background}
IMAGE=${IMAGE:-}               # path of a start image
END_IMAGE=${END_IMAGE:-}       # path of an end image
VIDEO=${VIDEO:-}               # path of a video to extend
HEIGHT=${HEIGHT:-}             # pixels; 544 x 960 is 540P, 720 x 1280 is 720P; empty: the preset's
WIDTH=${WIDTH:-}
NUM_FRAMES=${NUM_FRAMES:-}     # 4 n + 1; empty: the preset's
NUM_STEPS=${NUM_STEPS:-}       # denoising steps of a chunk; empty: the preset's
THRESHOLD=${THRESHOLD:-}       # accumulated change at which a step is computed; empty: 0.15
SEED=${SEED:-}                 # of all noise; empty: 1024
GPUS=${GPUS:-}                 # processes, one per GPU, that make the video together; empty: one
OUT=${OUT:-$root/result}       # an .mp4 file, or a folder in which a fresh name is found

generate --preset flowcache_fast ${THRESHOLD:+reuse.threshold="$THRESHOLD"} "$@"
