#!/usr/bin/env bash
# All figures of a demo made anew, after its checkpoint has changed: profile, tables, judge, the
# paper's table, records and pictures. Hours of one core; start it again after whatever ended it.
#   bash scripts/refresh_demo.sh                  # skyreels_v2
#   bash scripts/refresh_demo.sh magi1
#   STEPS="judge bench" bash scripts/refresh_demo.sh magi1
# Each step is done once per OUT; results are copied to assets/ and to the demo's profiles. At the
# end make_tables.py and make_figures.py write pages and pictures.
set -euo pipefail

MODEL=${1:-skyreels_v2}
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$here/setup.sh" # enters the Python environment
cd "$here/.."
OUT=${OUT:-result/refresh_$MODEL}
STEPS=${STEPS:-tune judge bench budgets reuse reproduce copy}
export OMP_NUM_THREADS=1

case "$MODEL" in
skyreels_v2)
    folder=FlowCache4SkyReels-V2 target=flops=0.37
    presets=(vanilla vanilla_causal flowcache_fast)
    judge_frames=97 judge_clips=64 bench_clips=16 reuse_clips=32
    bench_settings=(num_frames=77) reuse_settings=(num_frames=37)
    ;;
magi1) # several times slower a clip
    folder=FlowCache4MAGI-1 target=flops=0.69
    presets=(vanilla flowcache_fast)
    judge_frames=96 judge_clips=64 bench_clips=8 reuse_clips=24
    bench_settings=() reuse_settings=(runtime_config.num_frames=72)
    ;;
*)
    echo "error: the model must be skyreels_v2 or magi1, not $MODEL" >&2
    exit 2
    ;;
esac

tune() {
    python scripts/tune.py --architecture "$MODEL" --target "$target" --work "$OUT/tuned" \
        --out "$OUT/flowcache_tuned.yaml"
    cp "$OUT/flowcache_tuned.yaml" "$folder/demo/profiles/"
}

judge() {
    python scripts/judge_demo.py "$OUT/judge" --architecture "$MODEL" --make "$judge_clips" \
        --presets "${presets[@]}" --num-frames "$judge_frames"
}

bench() {
    python scripts/bench_demo.py --architecture "$MODEL" --prompts "$bench_clips" \
        --out "$OUT/bench" "${bench_settings[@]}"
}

budgets() {
    python scripts/tune_budgets.py --architecture "$MODEL" --out "$OUT/budgets" \
        "${reuse_settings[@]}"
}

reuse() {
    python scripts/bench_demo.py --architecture "$MODEL" --table reuse --profiles "$OUT/budgets" \
        --prompts "$reuse_clips" --out "$OUT/reuse" "${reuse_settings[@]}"
}

reproduce() {
    OUT="$PWD/$OUT/reproduce" bash "scripts/reproduce_$MODEL.sh"
    python scripts/reproduce.py --verify "$OUT/reproduce"
}

copy() {
    cp "$OUT/bench/table.json" "assets/bench/${MODEL}_demo.json"
    cp "$OUT/reuse/table.json" "assets/bench/${MODEL}_reuse.json"
    cp "$OUT/judge/judge.json" "assets/bench/${MODEL}_judge.json"
    for kind in csv json md; do
        cp "$OUT/reproduce/table.$kind" "assets/bench/reproduce_$MODEL.$kind"
    done
    for sheet in "$OUT/judge"/sheet-*.png; do
        cp "$sheet" "assets/${MODEL}_$(basename "$sheet")"
    done
    python scripts/make_figures.py
    python scripts/make_tables.py
}

mkdir -p "$OUT/done"
for step in $STEPS; do
    [[ $(type -t "$step") == function ]] || {
        echo "error: STEPS has no step $step" >&2
        exit 2
    }
    if [[ -e $OUT/done/$step ]]; then continue; fi
    echo "== $MODEL: $step" >&2
    "$step"
    touch "$OUT/done/$step"
done
