#!/usr/bin/env bash
# The autoregressive model before distillation with FlowCache: most of its 102 passes per chunk are reused.
# Edit the variables, or set them:      PROMPT="a cat" SEED=7 bash run_flowcache_ar.sh
# Everything else follows as key=value: bash run_flowcache_ar.sh --preset ar_flowcache_fast
# --dry-run checks and prints the plan, --help and --list-settings say what there is.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/common.sh" # enters the Python environment

MODEL=${MODEL:-auto}           # auto: Wan2.1-T2V-1.3B on a CUDA machine, else the demo; or a folder, or a hub id
CHECKPOINT=${CHECKPOINT:-}     # the transformer's weights, a file or ORG/NAME/FILE of the hub; empty: the preset's
PROMPT=${PROMPT-a blue triangle moving up on a black background}
IMAGE=${IMAGE:-}               # path of a start image, frame-wise models only
HEIGHT=${HEIGHT:-}             # pixels; empty: 480 x 832
WIDTH=${WIDTH:-}
NUM_FRAMES=${NUM_FRAMES:-}     # 4 n + 1, n + 1 latent frames in whole chunks; empty: the preset's
THRESHOLD=${THRESHOLD:-}       # accumulated change at which a step is computed; empty: 0.1
SEED=${SEED:-}                 # of all noise; empty: 0
GPUS=${GPUS:-}                 # processes, one per GPU, that make the video together; empty: one
OUT=${OUT:-$root/result}       # an .mp4 file, or a folder in which a fresh name is found

generate --preset ar_flowcache_slow ${THRESHOLD:+reuse.threshold="$THRESHOLD"} "$@"
