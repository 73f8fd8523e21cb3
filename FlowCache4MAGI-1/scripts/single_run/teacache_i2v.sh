#!/usr/bin/env bash
# Image to video with TeaCache: all active chunks together are computed or reuse their last result.
# Edit the variables, or set them:      IMAGE=cat.png SEED=7 bash scripts/single_run/teacache_i2v.sh
# Everything else follows as key=value: bash scripts/single_run/teacache_i2v.sh kv.compress=recent
# --dry-run checks and prints the plan, --help and --list-settings say what there is.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh" # enters the Python environment

MODEL=${MODEL:-auto}               # auto: 4.5B_distill on CUDA, else the demo; or a name, folder, config
PRESET=${PRESET:-fast}             # slow or fast: the published thresholds 0.01 and 0.015
PROMPT=${PROMPT-a blue circle moving right on a black background}
IMAGE=${IMAGE:-$root/assets/blue_circle.png} # path of the picture that the video starts with
HEIGHT=${HEIGHT:-}                 # pixels, multiples of 16; empty: the model's own
WIDTH=${WIDTH:-}
NUM_FRAMES=${NUM_FRAMES:-}         # frames, rounded up to whole chunks of 24; empty: the model's own
NUM_STEPS=${NUM_STEPS:-}           # denoising steps of a chunk, a multiple of WINDOW; empty: the model's own
WINDOW=${WINDOW:-}                 # chunks that are denoised at once; empty: the model's own
THRESHOLD=${THRESHOLD:-}           # accumulated change at which a step is computed; empty: the preset's
SEED=${SEED:-}                     # of all noise; empty: the model's own
SPECIAL_TOKENS=${SPECIAL_TOKENS:-} # path of special_tokens.npz; empty: the checkpoint's own, if any
GPUS=${GPUS:-}                     # processes, one per GPU, that make the video together; empty: one
OUT=${OUT:-$root/result/i2v}       # an .mp4 file, or a folder in which a fresh name is found

generate --preset "teacache_$PRESET" --image "$IMAGE" \
    ${THRESHOLD:+reuse.threshold="$THRESHOLD"} "$@"
