#!/usr/bin/env bash
# Evaluates the videos of a folder with VBench and writes FOLDER/vbench.json, which tables read:
#
#     bash scripts/vbench/evaluate.sh result/vbench/flowcache_slow
#     bash scripts/vbench/evaluate.sh result/vbench/flowcache_slow result/table/videos/flowcache_slow
#
# The second form puts the file where a table of reproduce_*.sh looks for it. The videos are those of
# scripts/sample/*_vbench.sh: PROMPT-I.mp4, of all prompts of a dimension or of as many as
# NUM_PROMPTS said there, I from 0 to at most 4. Dimensions with a model need a GPU, and VBench
# downloads the model; temporal_flickering has none and is scored on a CPU, too:
#
#     DIMENSIONS=temporal_flickering bash scripts/vbench/evaluate.sh result/vbench/flowcache_slow
#
#   VBENCH_VENV   folder of VBench's environment, made by setup.sh (default: .venv-vbench)
#   DIMENSIONS    space-separated (default: the 11 of the published tables)
#   GPUS          processes (default: 1)
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
VBENCH_VENV=${VBENCH_VENV:-$here/../../.venv-vbench}
DIMENSIONS=${DIMENSIONS:-overall_consistency subject_consistency scene object_class multiple_objects
    color spatial_relationship temporal_style human_action temporal_flickering appearance_style}
GPUS=${GPUS:-1}

if [[ $# -lt 1 || ! -d $1 ]]; then
    echo "error: ${1:-no folder given}: give the folder of the videos (PROMPT-I.mp4)" >&2
    exit 2
fi
if [[ $# -gt 1 && ! -d $2 ]]; then
    echo "error: $2: no such folder: make the table's videos first" >&2
    exit 2
fi
if [[ ! -x $VBENCH_VENV/bin/vbench ]]; then
    echo "error: $VBENCH_VENV holds no VBench: run bash scripts/vbench/setup.sh first" >&2
    exit 2
fi
folder="$(CDPATH='' cd -- "$1" && pwd)"
results="$folder/vbench"
mkdir -p "$results"

# VBench takes the suffix of whichever file it lists first for that of all videos, so it gets a
# folder that holds nothing but videos; the prompts are beside that folder.
given="$(mktemp -d)"
trap 'rm -rf "$given"' EXIT
mkdir "$given/videos"
find "$folder" -maxdepth 1 -name '*.mp4' -exec ln -s -t "$given/videos" {} +
if [[ -f $folder/vbench_prompts.json ]]; then
    ln -s "$folder/vbench_prompts.json" "$given"
fi

run=("$VBENCH_VENV/bin/python")
if [[ $GPUS != 1 ]]; then
    run+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS")
fi
# shellcheck disable=SC2086 # DIMENSIONS holds several words
"${run[@]}" "$here/score.py" "$given" "$results" $DIMENSIONS
# shellcheck disable=SC2086 # DIMENSIONS holds several words
"$VBENCH_VENV/bin/python" "$here/collect.py" "$results" "$folder/vbench.json" $DIMENSIONS
if [[ $# -gt 1 ]]; then
    cp "$folder/vbench.json" "$2/.vbench.json.part"
    mv "$2/.vbench.json.part" "$2/vbench.json"
fi
