# What the launchers share; they source it. It makes the Python environment the first time, enters
# it, sets `root` (the folder of this model) and defines the functions below.

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$root/../scripts/setup.sh"

# generate ARGUMENTS...: hand the variables that all launchers have, then the arguments, to Python.
generate() {
    exec python ${GPUS:+-m flowcache.launch "$GPUS"} \
        -m magi1 --model "$MODEL" --prompt "$PROMPT" --out "$OUT" \
        ${HEIGHT:+runtime_config.video_size_h="$HEIGHT"} \
        ${WIDTH:+runtime_config.video_size_w="$WIDTH"} \
        ${NUM_FRAMES:+runtime_config.num_frames="$NUM_FRAMES"} \
        ${NUM_STEPS:+runtime_config.num_steps="$NUM_STEPS"} \
        ${WINDOW:+runtime_config.window_size="$WINDOW"} \
        ${SEED:+runtime_config.seed="$SEED"} \
        ${SPECIAL_TOKENS:+special_tokens="$SPECIAL_TOKENS"} "$@"
}

# newest_video FOLDER: print the path of its newest video.
newest_video() {
    local newest='' video
    for video in "$1"/*.mp4; do
        if [[ -f $video && $video != *.part.mp4 && (-z $newest || $video -nt $newest) ]]; then
            newest=$video
        fi
    done
    if [[ -z $newest ]]; then
        echo "error: no video to continue: set VIDEO=clip.mp4, or make one first:" \
            "bash scripts/single_run/flowcache_t2v.sh" >&2
        return 2
    fi
    printf '%s' "$newest"
}
