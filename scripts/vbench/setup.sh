#!/usr/bin/env bash
# Makes the environment in which VBench runs; it needs older packages than this project.
# Not run by the authors: it downloads packages, and VBench's own models come at the first evaluation.
#
#   VBENCH_VENV   folder of the environment (default: .venv-vbench beside the README)
#   PYTHON        interpreter; VBench's packages are made for 3.10
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
VBENCH_VENV=${VBENCH_VENV:-$root/.venv-vbench}
PYTHON=${PYTHON:-python3.10}
VERSION=0.1.5

if [[ -f $VBENCH_VENV/vbench.stamp && $(<"$VBENCH_VENV/vbench.stamp") == "$VERSION" ]]; then
    exit 0
fi
if ! command -v "$PYTHON" >/dev/null; then
    echo "error: $PYTHON is missing: install Python 3.10, or set PYTHON to another interpreter" >&2
    exit 2
fi
"$PYTHON" -m venv "$VBENCH_VENV"
"$VBENCH_VENV/bin/pip" install "vbench==$VERSION"
printf '%s\n' "$VERSION" >"$VBENCH_VENV/vbench.stamp"
