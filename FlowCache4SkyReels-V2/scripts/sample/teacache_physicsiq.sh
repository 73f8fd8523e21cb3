#!/usr/bin/env bash
# Physics-IQ's clips continued with TeaCache: one decision for the whole window.
# The videos hold the new frames only, as the evaluation wants them.
# Edit the variables, or set them:      DATA=physics-IQ GPUS=8 bash scripts/sample/teacache_physicsiq.sh
# Settings follow as key=value. Start it again after whatever ended it: it makes what is missing.
# --ray behind it: on all GPUs of a Ray cluster, with an OUT that its machines see.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../scripts/sampling/launch.sh" # enters the Python environment

DATA=${DATA:-physics-IQ}       # holds descriptions.csv and the conditioning clips, see --help
DESCRIPTIONS=${DESCRIPTIONS:-} # a CSV, as that of Physics-IQ Verified; empty: that in DATA
OUT=${OUT:-}                   # empty: result/physicsiq/PRESET in the model's folder
PRESET=${PRESET:-teacache_slow} # teacache_slow or teacache_fast
MODEL=${MODEL:-auto}           # auto: the 1.3B model on CUDA, else the demo; or a folder, or a hub id
OVERLAP=${OVERLAP:-17}         # last frames of each clip that are continued, 4 n + 1
NUM_FRAMES=${NUM_FRAMES:-137}  # OVERLAP and the new frames: five seconds at 24 fps
SEED=${SEED:-0} GPUS=${GPUS:-} # seed of all noise; processes, empty: one per GPU

sample_physics_iq skyreels_v2 overlap_history="$OVERLAP" num_frames="$NUM_FRAMES" "$@"
