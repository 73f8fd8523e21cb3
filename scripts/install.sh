#!/usr/bin/env bash
# Makes or updates the Python environment: install.sh ROOT VENV. Called by setup.sh.
#
# Files in VENV:   flowcache.incomplete   from the start of a set-up to its end
#                  flowcache.stamp        what is installed; written last
#                  flowcache.lock         held while a set-up runs
#                  flowcache.log          output of pip
set -euo pipefail

root="$1"
venv="$2"
log="$venv/flowcache.log"
unset PYTHONHOME PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

say() { printf 'setup: %s\n' "$*" >&2; }

fail() { # fail STATUS MESSAGE
    say "$2"
    exit "$1"
}

# Prints the interpreter to use. A name on the PATH may be a dead shim, so each one is run.
find_python() {
    local candidate without_venv=""
    local -a candidates=(python3 python3.13 python3.12 python3.11 python3.10 python3.14 python)
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv="$candidate"
    done
    [[ -z "$without_venv" ]] ||
        fail 2 "$without_venv has no venv module: install it (Debian, Ubuntu: apt install python3-venv)"
    [[ -z "${PYTHON:-}" ]] || fail 2 "PYTHON=$PYTHON is not a Python 3.10 or newer"
    fail 2 "no Python 3.10 or newer found: install one, or set PYTHON=/path/to/python3"
}

# Takes a lock that this shell and its children hold; the system drops it when they end.
lock() { # lock PYTHON
    local take='import fcntl, sys; fcntl.flock(9, fcntl.LOCK_EX | (fcntl.LOCK_NB if sys.argv[1:] else 0))'
    exec 9>>"$venv/flowcache.lock"
    if ! "$1" -c "$take" at_once 2>/dev/null; then
        say "another set-up of $venv is running: waiting for it"
        "$1" -c "$take"
    fi
}

step() { # step WHAT COMMAND...: output to the log; on failure show its end
    local what="$1" start=$SECONDS
    shift
    printf 'setup:   %s ... ' "$what" >&2
    if ! "$@" >>"$log" 2>&1; then
        printf 'failed\n' >&2
        tail -n 15 "$log" >&2
        fail 1 "not finished: run the same command again to retry (log: $log)"
    fi
    printf '%d s\n' "$((SECONDS - start))" >&2
}

wanted() {
    printf '%s\n' "$root" "$venv"
    cat "$root/constraints.txt" "$root/pyproject.toml"
}

clear_environment() { # all but our own files, so that an interruption here is seen, too
    find "$venv/" -mindepth 1 -maxdepth 1 ! -name 'flowcache.*' -exec rm -rf {} +
}

# Leaves an environment to install into. Only one that a set-up made is ever emptied.
prepare() { # prepare PYTHON
    if [[ -f "$venv/flowcache.incomplete" ]]; then
        say "an earlier set-up was interrupted: starting again"
        clear_environment
    elif [[ -f "$venv/flowcache.stamp" ]]; then
        : >"$venv/flowcache.incomplete"
        if "$venv/bin/python" -c '' 2>/dev/null &&
            [[ "$(head -n 2 "$venv/flowcache.stamp")" == "$root"$'\n'"$venv" ]]; then
            return # complete, for other versions: update it
        fi
        clear_environment
    elif [[ -f "$venv/pyvenv.cfg" ]]; then
        "$venv/bin/python" -c '' 2>/dev/null || fail 2 "the Python of $venv does not run: delete that folder"
        return # made by hand: install into it
    elif [[ -n "$(find "$venv/" -mindepth 1 -maxdepth 1 ! -name 'flowcache.*')" ]]; then
        fail 2 "$venv is neither empty nor a Python environment: set FLOWCACHE_VENV to another folder"
    fi
    : >"$venv/flowcache.incomplete"
    step "environment" "$1" -m venv "$venv"
}

trap 'printf "\n" >&2; fail 130 "interrupted: run the same command again to start over"' INT TERM

python="$(find_python)"
mkdir -p "$venv" 2>/dev/null || fail 2 "cannot make the folder $venv"
[[ -w "$venv" ]] || fail 2 "cannot write in the folder $venv"
lock "$python"
if [[ -x "$venv/bin/python" && -f "$venv/flowcache.stamp" && "$(wanted)" == "$(<"$venv/flowcache.stamp")" ]]; then
    exit 0 # the set-up that was waited for did it
fi

say "installing FlowCache and its pinned packages; once, 2 to 6 GB, some minutes"
say "  with    $("$python" -c 'import sys; print("Python", sys.version.split()[0])') ($python)"
say "  into    $venv"
say "  log     $log"
: >"$log"
prepare "$python"
rm -f "$venv/flowcache.stamp"
cd "$root"
pip=("$venv/bin/python" -m pip install -c constraints.txt)
step "torch (the largest part)" "${pip[@]}" torch hatchling editables
step "all other packages" "${pip[@]}" --no-build-isolation -e '.[dev]'
step "check" "$venv/bin/python" -c 'import torch, flowcache, skyreels_v2'
wanted >"$venv/flowcache.stamp.new"
rm -f "$venv/flowcache.incomplete"
mv "$venv/flowcache.stamp.new" "$venv/flowcache.stamp"
say "ready"
