#!/usr/bin/env bash
# A live page and an HTTP service (OpenAI's /v1/videos) with this model loaded once.
# Set the variables below, or those of scripts/serve.sh:      PORT=9000 bash serve.sh
# Settings of all videos follow as key=value: bash serve.sh precision=reference
# --help says what else there is.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

PRESET=${PRESET:-self_forcing} # where a client names none
CHECKPOINT=${CHECKPOINT:-}     # the transformer's weights, a file or ORG/NAME/FILE of the hub; empty: the preset's

source "$root/../scripts/serve.sh" self_forcing ${CHECKPOINT:+checkpoint="$CHECKPOINT"} "$@"
