# Launchers source this file. It enters the Python environment (made the first time) and defines:
#
#   sample_videos ARGUMENTS...              scripts/sample.py in $GPUS processes
#   sample_vbench MODEL ARGUMENTS...        the same with VBench's prompts
#   sample_physics_iq MODEL ARGUMENTS...    the same with Physics-IQ's clips
#   make_table ARGUMENTS...                 the videos of a protocol, then its table
#
# All take the variables of the launcher; samples go into the folder of its model. With --ray among
# the arguments, one process gives the videos to the GPUs of all machines of a Ray cluster.

flowcache_scripts="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
flowcache_model="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[1]}")/../.." && pwd)"
source "$flowcache_scripts/setup.sh"

sample_videos() {
    local count=${GPUS:-}
    if [[ -z $count ]]; then
        count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || count=1
    fi
    if [[ ! $count =~ ^[1-9][0-9]{0,2}$ ]]; then
        echo "error: GPUS=$count must be a whole number of processes, 1 to 999" >&2
        return 2
    fi
    if [[ $count == 1 || " $* " == *" --ray "* ]]; then
        python "$flowcache_scripts/sample.py" "$@"
    else
        python -m flowcache.launch "$count" "$flowcache_scripts/sample.py" "$@"
    fi
}

sample_vbench() {
    sample_videos "$1" --preset "$PRESET" --model "$MODEL" --vbench "$PROMPTS" \
        --out "${OUT:-$flowcache_model/result/vbench/$PRESET}" --seed "$SEED" --per-prompt "$PER_PROMPT" \
        ${DIMENSIONS:+--dimensions "$DIMENSIONS"} ${NUM_PROMPTS:+--num-prompts "$NUM_PROMPTS"} "${@:2}"
}

sample_physics_iq() {
    sample_videos "$1" --preset "$PRESET" --model "$MODEL" --physics-iq "$DATA" \
        ${DESCRIPTIONS:+--descriptions "$DESCRIPTIONS"} \
        --out "${OUT:-$flowcache_model/result/physicsiq/$PRESET}" --seed "$SEED" "${@:2}"
}

make_table() {
    local given=(--protocol "$PROTOCOL" --out "$OUT" ${MODEL:+--model "$MODEL"}
        ${NUM_PROMPTS:+--num-prompts "$NUM_PROMPTS"})
    sample_videos "${given[@]}" "$@"
    python "$flowcache_scripts/reproduce.py" "${given[@]}" \
        --device "$DEVICE" ${LPIPS_WEIGHTS:+--lpips-weights "$LPIPS_WEIGHTS"}
}
