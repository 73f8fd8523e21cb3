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
#
# Only an environment that this clone made is ever emptied. In one that FLOWCACHE_VENV names:
#
#   another clone works in it, versions as pinned here   it is left as it is, and this clone's code
#                                                        comes first by PYTHONPATH
#   nobody does, no version differs from the pins here   this clone is installed into it
#   versions differ                                      one line, exit code 2

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

# Prints what the stamp must hold after its first line, the clone. A moved environment does not work,
# so its folder is part of it.
flowcache_wanted() {
    printf '%s\n' "$flowcache_venv"
    cat "$flowcache_root/constraints.txt" "$flowcache_root/pyproject.toml"
}

# Reads the stamp: flowcache_clone is the clone that it names, flowcache_stamp the rest.
flowcache_read_stamp() {
    flowcache_clone='' flowcache_stamp=''
    [[ -f "$flowcache_venv/flowcache.stamp" ]] || return 0
    flowcache_stamp="$(<"$flowcache_venv/flowcache.stamp")"
    flowcache_clone="${flowcache_stamp%%$'\n'*}"
    flowcache_stamp="${flowcache_stamp#*$'\n'}"
}

# one name for one folder, however it is written
[[ ! -d "$flowcache_venv" ]] || flowcache_venv="$(CDPATH='' cd -- "$flowcache_venv" && pwd -P)"
flowcache_read_stamp
[[ -z "$flowcache_is_active" ]] || flowcache_clone="$flowcache_root"
if [[ -z "$flowcache_is_active" ]] &&
    [[ ! -x "$flowcache_venv/bin/python" || "$(flowcache_wanted)" != "$flowcache_stamp" ]]; then
    # A failure ends a launcher (set -e) with the installer's status, and leaves a terminal open.
    bash "$flowcache_root/scripts/install.sh" "$flowcache_root" "$flowcache_venv" || {
        flowcache_status=$?
        return "$flowcache_status" 2>/dev/null || exit "$flowcache_status"
    }
    flowcache_read_stamp
fi

if [[ "$flowcache_clone" != "$flowcache_root" ]]; then
    for flowcache_part in FlowCache4Self-Forcing FlowCache4SkyReels-V2 FlowCache4MAGI-1 common; do
        PYTHONPATH="$flowcache_root/$flowcache_part${PYTHONPATH:+:$PYTHONPATH}"
    done
    export PYTHONPATH
    unset flowcache_part
fi

[[ "$flowcache_venv" == "${CONDA_PREFIX:-}" ]] || export VIRTUAL_ENV="$flowcache_venv"
export PATH="$flowcache_venv/bin:$PATH"
unset PYTHONHOME flowcache_root flowcache_venv flowcache_is_active flowcache_clone flowcache_stamp
unset -f flowcache_in flowcache_wanted flowcache_read_stamp
