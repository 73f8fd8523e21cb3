# What the launchers share; they source it. It makes the Python environment the first time, enters
# it, sets `root` (the folder of this model) and defines `generate`.

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/../scripts/setup.sh"

# generate ARGUMENTS...: hand the variables of the launchers, then the arguments, to Python.
generate() {
    exec python ${GPUS:+-m flowcache.launch "$GPUS"} \
        -m self_forcing --model "$MODEL" --prompt "$PROMPT" --out "$OUT" \
        ${IMAGE:+--image "$IMAGE"} ${CHECKPOINT:+checkpoint="$CHECKPOINT"} \
        ${HEIGHT:+height="$HEIGHT"} ${WIDTH:+width="$WIDTH"} ${NUM_FRAMES:+num_frames="$NUM_FRAMES"} \
        ${SEED:+seed="$SEED"} "$@"
}
