#!/usr/bin/env bash
# Physics-IQ's clips continued without caching: every step of every chunk is computed.
# The videos hold the new frames only, as the evaluation wants them.
# Edit the variables, or set them:      DATA=physics-IQ GPUS=8 bash scripts/sample/vanilla_physicsiq.sh
# Settings follow as key=value. Start it again after whatever ended it: it makes what is missing.
# On several machines start it on each, with one OUT that all of them see.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$root/../scripts/sampling/launch.sh" # enters the Python environment

MODEL=${MODEL:-auto}           # auto: 4.5B_distill on CUDA, else the demo; or a name, folder, config
PRESET=${PRESET:-vanilla} # every step of every chunk
DATA=${DATA:-physics-IQ}       # holds descriptions.csv and the conditioning clips, see --help
PREFIX_FRAMES=${PREFIX_FRAMES:-72} # given frames of each clip, three seconds at 24 fps
NUM_FRAMES=${NUM_FRAMES:-120}  # new frames: five seconds, rounded up to whole chunks of 24
SEED=${SEED:-0}                # of all noise
GPUS=${GPUS:-}                 # processes; empty: one per GPU
OUT=${OUT:-$root/result/physicsiq/$PRESET}

sample_videos magi1 --preset "$PRESET" --model "$MODEL" --physics-iq "$DATA" --out "$OUT" \
    --seed "$SEED" prefix_frames="$PREFIX_FRAMES" runtime_config.num_frames="$NUM_FRAMES" "$@"
