#!/usr/bin/env bash
# Says whether this machine's CUDA paths are right, and how fast; at most 8 minutes:
#
#     bash scripts/gpu_check.sh --out DIR
#
# Runs with the Python at hand if that has torch (transformers, einops, accelerate and safetensors
# come with most GPU images; nothing else is needed), else with the environment of setup.sh.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

python=""
for candidate in python python3; do
    if "$candidate" -c 'import importlib.util as i; raise SystemExit(i.find_spec("torch") is None)' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [[ -z "$python" ]]; then
    # shellcheck source=setup.sh
    source "$root/scripts/setup.sh"
    python=python
fi
for package in einops safetensors transformers; do
    "$python" -c "import importlib.util as i; raise SystemExit(i.find_spec('$package') is None)" || {
        echo "error: $(command -v "$python") has torch but not $package: pip install $package, or use a Python without torch" >&2
        exit 2
    }
done

export PYTHONPATH="$root/common:$root/FlowCache4MAGI-1:$root/FlowCache4SkyReels-V2${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m flowcache.gpu.check "$@"
