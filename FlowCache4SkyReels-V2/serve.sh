#!/usr/bin/env bash
# A live page and an HTTP service (OpenAI's /v1/videos) with this model loaded once.
# Edit the variables, or set them:      PORT=9000 MODEL=demo bash serve.sh
# Settings of all videos follow as key=value: bash serve.sh num_steps=30
# --help says what else there is.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$root/../scripts/setup.sh" # enters the Python environment

MODEL=${MODEL:-auto}                # auto: the real model on a CUDA machine, else the demo
PRESET=${PRESET:-flowcache_fast}    # where a client names none
HOST=${HOST:-127.0.0.1}             # this machine only; 0.0.0.0: everybody who reaches it, so set TOKEN
PORT=${PORT:-8000}
TOKEN=${TOKEN:-}                    # what clients must send; empty: nothing
FOLDER=${FOLDER:-$root/result/serve} # where videos are kept

exec python -m flowcache.serve --architecture skyreels_v2 --model "$MODEL" --preset "$PRESET" \
    --host "$HOST" --port "$PORT" --folder "$FOLDER" ${TOKEN:+--token "$TOKEN"} "$@"
