#!/usr/bin/env bash
# Makes or updates the Python environment: install.sh ROOT VENV. Called by setup.sh.
#
# Files in VENV:   flowcache.made_by      the clone that made the environment, and may empty it
#                  flowcache.incomplete   from the start of a set-up to its end
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

# Tells whether this clone made the environment: only then is it ever emptied.
is_own() {
    [[ -f "$venv/flowcache.made_by" ]] &&
        [[ "$(<"$venv/flowcache.made_by")" == "$root" || "$(cd "$venv" && pwd -P)" == "$root/.venv" ]]
}

# Prints the clone whose code is installed in the environment; nothing if none is.
clone_in() {
    "$venv/bin/python" -c '
import importlib.metadata, json, urllib.parse, urllib.request
try:
    text = importlib.metadata.distribution("flowcache").read_text("direct_url.json")
except importlib.metadata.PackageNotFoundError:
    text = None
url = urllib.parse.urlparse(json.loads(text)["url"] if text else "")
print(urllib.request.url2pathname(url.path) if url.scheme == "file" else "")'
}

# Prints what in the environment is not as pinned here, and with "complete" also what is missing.
misfits() {
    "$venv/bin/python" -c '
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
try:
    import tomllib
except ImportError:
    import pip._vendor.tomli as tomllib
constraints, project, *is_complete = sys.argv[1:]
lines = [line.split("#")[0].strip() for line in open(constraints, encoding="utf-8")]
needed = tomllib.loads(open(project, encoding="utf-8").read())["project"].get("dependencies", [])
found = {}
for text in [*filter(None, lines), *(needed if is_complete else [])]:
    wanted = Requirement(text)
    if wanted.marker is not None and not wanted.marker.evaluate():
        continue
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        if text in needed:
            found[wanted.name] = f"no {wanted.name}"
        continue
    if not wanted.specifier.contains(version, prereleases=True):
        found[wanted.name] = f"{wanted.name} {version}, not {wanted.specifier}"
shown = list(found.values())
print("; ".join(shown[:3]) + (f"; {len(shown) - 3} more" if len(shown) > 3 else ""))' \
        "$root/constraints.txt" "$root/pyproject.toml" "$@" 2>/dev/null ||
        printf '%s\n' "pip does not run in it"
}

# Looks at an environment that this clone did not make. Ends the script where another clone works in
# it: with 0 if its packages are those wanted here. Returns where this clone may be installed into it.
look_at_foreign() {
    local clone wrong=''
    local advice="set FLOWCACHE_VENV to another folder"
    "$venv/bin/python" -c '' 2>/dev/null ||
        fail 2 "the Python of $venv does not run: delete that folder, or $advice"
    [[ ! -f "$venv/flowcache.incomplete" ]] ||
        fail 2 "another set-up of $venv runs or was interrupted: end it there, or $advice"
    clone="$(clone_in 2>/dev/null)" || clone=''
    [[ -n "$clone" || ! -f "$venv/flowcache.stamp" ]] || clone="$(head -n 1 "$venv/flowcache.stamp")"
    if [[ -n "$clone" && "$clone" != "$root" && -d "$clone" ]]; then
        wrong="$(misfits complete)"
        [[ -z "$wrong" ]] || fail 2 "$venv belongs to the clone $clone and does not fit ($wrong): $advice"
        exit 0
    fi
    [[ "$clone" == "$root" ]] || wrong="$(misfits)"
    [[ -z "$wrong" ]] || fail 2 "$venv does not fit this clone ($wrong): $advice"
}

# Leaves an environment to install into.
prepare() { # prepare PYTHON
    if is_own; then
        if [[ -f "$venv/flowcache.incomplete" ]]; then
            say "an earlier set-up was interrupted: starting again"
        elif "$venv/bin/python" -c '' 2>/dev/null && [[ -f "$venv/flowcache.stamp" &&
            "$(head -n 2 "$venv/flowcache.stamp")" == "$root"$'\n'"$venv" ]]; then
            : >"$venv/flowcache.incomplete"
            return # complete, for other versions: update it
        fi
        clear_environment
    elif is_environment; then
        return
    elif [[ -n "$(find "$venv/" -mindepth 1 -maxdepth 1 ! -name 'flowcache.*')" ]]; then
        fail 2 "$venv is neither empty nor a Python environment: set FLOWCACHE_VENV to another folder"
    fi
    printf '%s\n' "$root" >"$venv/flowcache.made_by"
    : >"$venv/flowcache.incomplete"
    step "environment" "$1" -m venv "$venv"
}

is_environment() { [[ -e "$venv/bin/python" || -L "$venv/bin/python" || -f "$venv/pyvenv.cfg" ]]; }

interrupted() { # interrupted STATUS
    printf '\n' >&2
    fail "$1" "interrupted: run the same command again to start over"
}
trap 'interrupted 129' HUP
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

if is_environment && ! is_own; then
    [[ -w "$venv" ]] || look_at_foreign # which needs no writing where nothing is to be installed
    python="$venv/bin/python"
else
    python="$(find_python)"
fi
mkdir -p "$venv" 2>/dev/null || fail 2 "cannot make the folder $venv"
[[ -w "$venv" ]] || fail 2 "cannot write in the folder $venv"
venv="$(cd "$venv" && pwd -P)"
lock "$python"
if is_environment && ! is_own; then
    look_at_foreign
fi
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
