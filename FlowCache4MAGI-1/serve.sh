#!/usr/bin/env bash
# A live page and an HTTP service (OpenAI's /v1/videos) with this model loaded once.
# Set the variables below, or those of scripts/serve.sh:      PORT=9000 MODEL=demo bash serve.sh
# Settings of all videos follow as key=value: bash serve.sh num_steps=30
# --help says what else there is.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

PRESET=${PRESET:-flowcache_fast} # where a client names none

source "$root/../scripts/serve.sh" magi1 "$@"
