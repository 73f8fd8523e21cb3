#!/usr/bin/env bash
# Enters the Python environment, and makes it the first time. An active environment (venv or conda)
# in which this repository is installed is used as it is. Launchers source this file:
#
#     source "$ROOT/scripts/setup.sh"
#
# Once made, it does nothing but enter: a stamp in the environment, written last, tells that exactly
# this constraints.txt and pyproject.toml are installed.
#
#   FLOWCACHE_VENV   folder of the environment (default: .venv beside the README)
#   PYTHON           interpreter to make it with (default: the first Python >= 3.10 found)

flowcache_root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
flowcache_venv="${FLOWCACHE_VENV:-$flowcache_root/.venv}"
[[ "$flowcache_venv" == /* ]] || flowcache_venv="$PWD/$flowcache_venv"
flowcache_is_active=""

# Tells whether this clone is installed in an environment, as by `pip install -r requirements.txt`.
flowcache_in() {
    # -I: what PYTHONPATH or the current folder hold is not installed
    [[ -n "$1" && -x "$1/bin/python" ]] && "$1/bin/python" -I -c '
import importlib.util, pathlib, sys
found = importlib.util.find_spec("flowcache")
sys.exit(found is None or pathlib.Path(sys.argv[1]) not in pathlib.Path(found.origin).resolve().parents)
' "$flowcache_root" 2>/dev/null
}

if [[ -z "${FLOWCACHE_VENV:-}" ]]; then
    for flowcache_candidate in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        [[ "$flowcache_candidate" != "$flowcache_venv" ]] || break # the usual one, kept up to date
        if flowcache_in "$flowcache_candidate"; then
            flowcache_venv="$flowcache_candidate" flowcache_is_active=yes
            break
        fi
    done
    unset flowcache_candidate
fi

# Prints what the stamp must hold. A moved environment does not work, so the folders are part of it.
flowcache_wanted() {
    printf '%s\n' "$flowcache_root" "$flowcache_venv"
    cat "$flowcache_root/constraints.txt" "$flowcache_root/pyproject.toml"
}

if [[ -z "$flowcache_is_active" ]] &&
    [[ ! -x "$flowcache_venv/bin/python" || ! -f "$flowcache_venv/flowcache.stamp" ||
        "$(flowcache_wanted)" != "$(<"$flowcache_venv/flowcache.stamp")" ]]; then
    # A failure ends a launcher (set -e) with the installer's status, and leaves a terminal open.
    bash "$flowcache_root/scripts/install.sh" "$flowcache_root" "$flowcache_venv" || {
        flowcache_status=$?
        return "$flowcache_status" 2>/dev/null || exit "$flowcache_status"
    }
fi

[[ "$flowcache_venv" == "${CONDA_PREFIX:-}" ]] || export VIRTUAL_ENV="$flowcache_venv"
export PATH="$flowcache_venv/bin:$PATH"
unset PYTHONHOME flowcache_root flowcache_venv flowcache_is_active
unset -f flowcache_wanted flowcache_in
