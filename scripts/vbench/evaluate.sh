#!/usr/bin/env bash
# Evaluates the videos of a folder with VBench and writes FOLDER/vbench.json, which tables read:
#
#     bash scripts/vbench/evaluate.sh result/vbench/flowcache_slow
#     bash scripts/vbench/evaluate.sh result/vbench/flowcache_slow result/table/videos/flowcache_slow
#
# The second form puts the file where a table of reproduce_*.sh looks for it.
# Not run by the authors: it needs a GPU and VBench's models, which VBench itself downloads.
#
#   VBENCH_VENV   folder of VBench's environment, made by setup.sh (default: .venv-vbench)
#   DIMENSIONS    space-separated (default: the 11 of the published tables)
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
VBENCH_VENV=${VBENCH_VENV:-$here/../../.venv-vbench}
DIMENSIONS=${DIMENSIONS:-overall_consistency subject_consistency scene object_class multiple_objects
    color spatial_relationship temporal_style human_action temporal_flickering appearance_style}

if [[ $# -lt 1 || ! -d $1 ]]; then
    echo "error: ${1:-no folder given}: give the folder of the videos (PROMPT-I.mp4)" >&2
    exit 2
fi
if [[ ! -x $VBENCH_VENV/bin/vbench ]]; then
    echo "error: $VBENCH_VENV holds no VBench: run bash scripts/vbench/setup.sh first" >&2
    exit 2
fi
folder=$1
results="$folder/vbench"
mkdir -p "$results"
for dimension in $DIMENSIONS; do
    "$VBENCH_VENV/bin/vbench" evaluate --videos_path "$folder" --dimension "$dimension" \
        --output_path "$results/$dimension"
done
"$VBENCH_VENV/bin/python" "$here/collect.py" "$results" "$folder/vbench.json"
if [[ $# -gt 1 ]]; then
    cp "$folder/vbench.json" "$2/vbench.json"
fi
