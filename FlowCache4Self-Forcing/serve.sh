#!/usr/bin/env bash
# A live page and an HTTP service (OpenAI's /v1/videos) with this model loaded once.
# Edit the variables, or set them:      PORT=9000 bash serve.sh
# Settings of all videos follow as key=value: bash serve.sh precision=reference
# --help says what else there is.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$root/../scripts/setup.sh" # enters the Python environment

MODEL=${MODEL:-auto}                # auto: the real model on a CUDA machine, else the demo
CHECKPOINT=${CHECKPOINT:-}          # the transformer's weights, a file or ORG/NAME/FILE of the hub; empty: the preset's
PRESET=${PRESET:-self_forcing}      # where a client names none
HOST=${HOST:-127.0.0.1}             # this machine only; 0.0.0.0: everybody who reaches it, so set TOKEN
PORT=${PORT:-8000}
TOKEN=${TOKEN:-}                    # what clients must send; empty: nothing
FOLDER=${FOLDER:-$root/result/serve} # where videos are kept

exec python -m flowcache.serve --architecture self_forcing --model "$MODEL" --preset "$PRESET" \
    --host "$HOST" --port "$PORT" --folder "$FOLDER" ${TOKEN:+--token "$TOKEN"} \
    ${CHECKPOINT:+checkpoint="$CHECKPOINT"} "$@"
