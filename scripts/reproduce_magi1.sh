#!/usr/bin/env bash
# The table of MAGI-1: videos of every method, their cost, their distance from vanilla's.
# Edit the variables, or set them:      PROTOCOL=scripts/protocols/magi1_paper.yaml GPUS=8 bash scripts/reproduce_magi1.sh
# Start it again after whatever ended it: it makes what is missing. The result is OUT/table.md, .csv
# and .json; python scripts/reproduce.py --verify OUT checks it against videos and receipts.
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/sampling/launch.sh" # enters the Python environment

PROTOCOL=${PROTOCOL:-$here/protocols/magi1_demo.yaml} # what is made; magi1_paper.yaml: as published
MODEL=${MODEL:-}               # empty: the protocol's; 4.5B_distill, or a folder
NUM_PROMPTS=${NUM_PROMPTS:-}   # only the first prompts, for a short look; empty: all
GPUS=${GPUS:-}                 # processes; empty: one per GPU, one on a CPU
OUT=${OUT:-$here/../result/reproduce_magi1} # result folder
DEVICE=${DEVICE:-auto}         # of the metrics; auto: a GPU if there is one
LPIPS_WEIGHTS=${LPIPS_WEIGHTS:-} # AlexNet's file; empty: torch's cache

make_table "$@"
