#!/usr/bin/env bash
# Video continuation without caching: every step of every chunk is computed.
# Edit the variables, or set them:      VIDEO=cat.mp4 SEED=7 bash scripts/single_run/vanilla_v2v.sh
# Everything else follows as key=value: bash scripts/single_run/vanilla_v2v.sh kv.compress=recent
# --dry-run checks and prints the plan, --help and --list-settings say what there is.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh" # enters the Python environment

MODEL=${MODEL:-auto}               # auto: 4.5B_distill on CUDA, else the demo; or a name, folder, config
PROMPT=${PROMPT-a blue triangle moving up on a black background}
VIDEO=${VIDEO:-$(newest_video "$root/result/t2v")} # path of the video to continue
PREFIX_FRAMES=${PREFIX_FRAMES:-}   # how many of its first frames; null: its last seconds, up to 5; empty: 32
HEIGHT=${HEIGHT:-}                 # pixels, multiples of 16; empty: the model's own
WIDTH=${WIDTH:-}
NUM_FRAMES=${NUM_FRAMES:-}         # frames, rounded up to whole chunks of 24; empty: the model's own
NUM_STEPS=${NUM_STEPS:-}           # denoising steps of a chunk, a multiple of WINDOW; empty: the model's own
WINDOW=${WINDOW:-}                 # chunks that are denoised at once; empty: the model's own
SEED=${SEED:-}                     # of all noise; empty: the model's own
SPECIAL_TOKENS=${SPECIAL_TOKENS:-} # path of special_tokens.npz; empty: the checkpoint's own, if any
GPUS=${GPUS:-}                     # processes, one per GPU, that make the video together; empty: one
OUT=${OUT:-$root/result/v2v}       # an .mp4 file, or a folder in which a fresh name is found

generate --preset vanilla --video "$VIDEO" ${PREFIX_FRAMES:+prefix_frames="$PREFIX_FRAMES"} "$@"
