#!/usr/bin/env bash
# Physics-IQ's clips continued with FlowCache: every chunk decides for itself.
# The videos hold the new frames only, as the evaluation wants them.
# Edit the variables, or set them:      DATA=physics-IQ GPUS=8 bash scripts/sample/flowcache_physicsiq.sh
# Settings follow as key=value. Start it again after whatever ended it: it makes what is missing.
# --ray behind it: on all GPUs of a Ray cluster, with an OUT that its machines see.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../scripts/sampling/launch.sh" # enters the Python environment

DATA=${DATA:-physics-IQ}       # holds descriptions.csv and the conditioning clips, see --help
DESCRIPTIONS=${DESCRIPTIONS:-} # a CSV, as that of Physics-IQ Verified; empty: that in DATA
OUT=${OUT:-}                   # empty: result/physicsiq/PRESET in the model's folder
PRESET=${PRESET:-flowcache_slow} # flowcache_slow, flowcache_fast, or another of configs/
MODEL=${MODEL:-auto}           # auto: 4.5B_distill on CUDA, else the demo; or a name, folder, config
PREFIX_FRAMES=${PREFIX_FRAMES:-72} # given frames of each clip, three seconds at 24 fps
NUM_FRAMES=${NUM_FRAMES:-120}  # new frames: five seconds, rounded up to whole chunks of 24
SEED=${SEED:-0} GPUS=${GPUS:-} # seed of all noise; processes, empty: one per GPU

sample_physics_iq magi1 prefix_frames="$PREFIX_FRAMES" runtime_config.num_frames="$NUM_FRAMES" "$@"
