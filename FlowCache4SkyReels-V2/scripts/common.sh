# What the launchers share; they source it. It makes the Python environment the first time, enters
# it, sets `root` (the folder of this model) and defines `generate`.

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/../scripts/setup.sh"

# generate ARGUMENTS...: hand the variables of the launchers, then the arguments, to Python.
generate() {
    exec python ${GPUS:+-m flowcache.launch "$GPUS"} \
        -m skyreels_v2 --model "$MODEL" --prompt "$PROMPT" --out "$OUT" \
        ${IMAGE:+--image "$IMAGE"} ${END_IMAGE:+--end-image "$END_IMAGE"} ${VIDEO:+--video "$VIDEO"} \
        ${HEIGHT:+height="$HEIGHT"} ${WIDTH:+width="$WIDTH"} ${NUM_FRAMES:+num_frames="$NUM_FRAMES"} \
        ${NUM_STEPS:+num_steps="$NUM_STEPS"} ${SEED:+seed="$SEED"} "$@"
}
