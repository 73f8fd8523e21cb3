"""The gate `.ci/run`: each of its three runs counts, however it ends."""

import os
import subprocess
from pathlib import Path

import pytest
from signals import heed_signals

GATE = Path(__file__).parents[1] / ".ci" / "run"
RUNS = ("all", "default", "avx2")
"""All checks, then the numeric tests as on processors with these vector widths."""


def gate(folder: Path, **ends: str) -> tuple[int, list[str]]:
    """Run a copy of the gate whose runs end with the given commands (default: well).

    Returns:
        The exit code, and the runs in order with what they were asked.
    """
    for name in (".ci", "scripts", "bin"):
        (folder / name).mkdir()
    (folder / ".ci" / "run").write_text(GATE.read_text())
    notes = folder / "notes"
    checks = f'#!/usr/bin/env bash\necho "all $*" >> "{notes}"\n{ends.get("all", "true")}\n'
    (folder / "scripts" / "test.sh").write_text(checks)
    (folder / "scripts" / "setup.sh").write_text(f'export PATH="{folder / "bin"}:$PATH"\n')
    python = folder / "bin" / "python"
    cases = "\n".join(f"{name}) {ends.get(name, 'true')} ;;" for name in RUNS[1:])
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$ATEN_CPU_CAPABILITY $OMP_NUM_THREADS $*" >> "{notes}"\n'
        f'case "$ATEN_CPU_CAPABILITY" in\n{cases}\nesac\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(folder / ".ci" / "run")],
        env=os.environ,
        capture_output=True,
        check=False,
        preexec_fn=heed_signals,
    )
    return done.returncode, notes.read_text().splitlines()


def test_all_tests_run_and_the_numeric_ones_again_as_on_two_other_processors(tmp_path: Path):
    code, asked = gate(tmp_path)
    assert code == 0
    assert [line.split()[0] for line in asked] == list(RUNS)
    assert asked[0] == "all -m slow or not slow"
    assert all("-m numeric and not slow" in line for line in asked[1:])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("end", ["exit 1", "exit 2", "exit 5", "kill -INT $$", "kill -KILL $$"])
def test_a_run_that_fails_finds_no_tests_or_is_killed_fails_the_gate(
    tmp_path: Path, run: str, end: str
):
    code, asked = gate(tmp_path, **{run: end})
    assert code != 0
    # the runs after it are made all the same, unless it was interrupted by hand
    assert len(asked) == len(RUNS) or "INT" in end
