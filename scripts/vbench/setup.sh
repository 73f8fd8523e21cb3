#!/usr/bin/env bash
# Makes the environment in which VBench runs; it needs older packages than this project.
# Not run by the authors: it downloads packages, and VBench's own models come at the first evaluation.
#
#   VBENCH_VENV   folder of the environment (default: .venv-vbench beside the README)
#   PYTHON        interpreter; VBench's packages are made for 3.10
#   TORCH         PyTorch and torchvision; detectron2 is compiled for them, with a CUDA of 12.1 or less
#   DETECTRON2    what pip installs as detectron2; color, multiple_objects, object_class and
#                 spatial_relationship need it; DETECTRON2= leaves it out
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
VBENCH_VENV=${VBENCH_VENV:-$root/.venv-vbench}
PYTHON=${PYTHON:-python3.10}
TORCH=${TORCH:-torch==2.1.2 torchvision==0.16.2}
DETECTRON2=${DETECTRON2-detectron2@git+https://github.com/facebookresearch/detectron2.git}
VERSION=0.1.5
wanted="vbench $VERSION, $TORCH, ${DETECTRON2:-no detectron2}"

if [[ -f $VBENCH_VENV/vbench.stamp && $(<"$VBENCH_VENV/vbench.stamp") == "$wanted" ]]; then
    exit 0
fi
for tool in "$PYTHON" wget unzip git; do # VBench calls the last three for its models
    if ! command -v "$tool" >/dev/null; then
        echo "error: $tool is missing: install it (python3.10: or set PYTHON to another interpreter)" >&2
        exit 2
    fi
done
"$PYTHON" -m venv "$VBENCH_VENV"
pip() { "$VBENCH_VENV/bin/python" -m pip "$@"; }
# openai-clip needs pkg_resources, which setuptools had before 81
# shellcheck disable=SC2086 # TORCH holds several words
pip install $TORCH "numpy<2" "setuptools<81" wheel
pip install "vbench==$VERSION"
if [[ -n $DETECTRON2 ]]; then
    pip install --no-build-isolation "$DETECTRON2"
fi
printf '%s\n' "$wanted" >"$VBENCH_VENV/vbench.stamp"
