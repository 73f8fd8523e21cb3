#!/usr/bin/env bash
# Every rule at three budgets, one table and one drawing per model, on the demo checkpoint:
#   bash scripts/rivals.sh                                # skyreels_v2, 64 prompts
#   bash scripts/rivals.sh magi1 8                        # another model, fewer prompts
#   bash scripts/rivals.sh skyreels_v2 2 num_frames=37    # settings of all runs follow
# Start it again after whatever ended it: it makes what is missing. The result is OUT/table.md, .csv,
# .json and rivals.svg. Processes share the rows: PART=1/2 and PART=2/2 on the same OUT.
set -euo pipefail

MODEL=${1:-skyreels_v2}
PROMPTS=${2:-64}
SEARCH=${SEARCH:-24}  # plans tried on finished clips, per budget; 0: none
CLIPS=${CLIPS:-8}     # to calibrate on
PART=${PART:-1/1}
refuse() { # here, as the budgets take hours
    echo "error: $1" >&2
    exit 2
}
[[ $PROMPTS =~ ^[1-9][0-9]{0,4}$ ]] ||
    refuse "the number of prompts must be in 1..99999, not $PROMPTS"
[[ $PART =~ ^([1-9][0-9]{0,4})/([1-9][0-9]{0,4})$ ]] && ((BASH_REMATCH[1] <= BASH_REMATCH[2])) ||
    refuse "PART must be I/N with I in 1..N, as in 1/2, not $PART"

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/setup.sh" # enters the Python environment
OUT=${OUT:-$here/../result/rivals_$MODEL}

python "$here/tune_budgets.py" --architecture "$MODEL" --levels rivals --search "$SEARCH" \
    --clips "$CLIPS" --out "$OUT/budgets" "${@:3}"
python "$here/bench_demo.py" --architecture "$MODEL" --table rivals --profiles "$OUT/budgets" \
    --prompts "$PROMPTS" --part "$PART" --out "$OUT" "${@:3}"
