#!/usr/bin/env bash
# VBench's videos without caching: every step of every chunk is computed.
# Edit the variables, or set them:      PROMPTS=VBench/prompts GPUS=8 bash scripts/sample/vanilla_vbench.sh
# Settings follow as key=value. Start it again after whatever ended it: it makes what is missing.
# On several machines start it on each, with one OUT that all of them see.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$root/../scripts/sampling/launch.sh" # enters the Python environment

MODEL=${MODEL:-auto}           # auto: 4.5B_distill on CUDA, else the demo; or a name, folder, config
PRESET=${PRESET:-vanilla} # every step of every chunk
PROMPTS=${PROMPTS:-VBench/prompts} # VBench's folder of prompts: git clone https://github.com/Vchitect/VBench
DIMENSIONS=${DIMENSIONS:-}     # as in color,scene; empty: the 11 of the published tables
PER_PROMPT=${PER_PROMPT:-1}    # videos per prompt: 1 as in the paper, 5 as VBench asks for
SEED=${SEED:-0}                # of the first video of a prompt, the next has one more
GPUS=${GPUS:-}                 # processes; empty: one per GPU
OUT=${OUT:-$root/result/vbench/$PRESET}

sample_videos magi1 --preset "$PRESET" --model "$MODEL" --vbench "$PROMPTS" --out "$OUT" \
    --seed "$SEED" --per-prompt "$PER_PROMPT" ${DIMENSIONS:+--dimensions "$DIMENSIONS"} "$@"
