#!/usr/bin/env bash
# VBench's videos without caching: every step of every chunk is computed.
# Edit the variables, or set them:      PROMPTS=VBench/prompts GPUS=8 bash scripts/sample/vanilla_vbench.sh
# Settings follow as key=value. Start it again after whatever ended it: it makes what is missing.
# --ray behind it: on all GPUs of a Ray cluster, with an OUT that its machines see.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../scripts/sampling/launch.sh" # enters the Python environment

PROMPTS=${PROMPTS:-VBench/prompts} # VBench's folder of prompts: git clone https://github.com/Vchitect/VBench
OUT=${OUT:-}                   # empty: result/vbench/PRESET in the model's folder
PRESET=${PRESET:-vanilla} # every step of every chunk
MODEL=${MODEL:-auto}           # auto: 4.5B_distill on CUDA, else the demo; or a name, folder, config
DIMENSIONS=${DIMENSIONS:-}     # as in color,scene; empty: the 11 of the published tables
NUM_PROMPTS=${NUM_PROMPTS:-}   # of each dimension, evenly spread; empty: all
PER_PROMPT=${PER_PROMPT:-1}    # videos per prompt: 1 as in the paper, 5 as VBench asks for
SEED=${SEED:-0} GPUS=${GPUS:-} # seed of the first video of a prompt; processes, empty: one per GPU

sample_vbench magi1 "$@"
