# What the models' serve.sh share; they source it, with `root`, and hand it the package of the model
# and all arguments. It enters the Python environment and becomes the service.
source "$root/../scripts/setup.sh"

MODEL=${MODEL:-auto}                # auto: the real model on a CUDA machine, else the demo
HOST=${HOST:-127.0.0.1}             # this machine only; 0.0.0.0: everybody who reaches it, so set TOKEN
PORT=${PORT:-8000}
TOKEN=${TOKEN:-}                    # what clients must send; empty: nothing
FOLDER=${FOLDER:-$root/result/serve} # where videos are kept

exec python -m flowcache.serve --architecture "$1" --model "$MODEL" --preset "$PRESET" \
    --host "$HOST" --port "$PORT" --folder "$FOLDER" ${TOKEN:+--token "$TOKEN"} "${@:2}"
