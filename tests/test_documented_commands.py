"""Every command of the documentation is run: here with short videos, or by a test of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = {
    "README.md": "",
    "FlowCache4SkyReels-V2/README.md": "FlowCache4SkyReels-V2",
    "FlowCache4MAGI-1/README.md": "FlowCache4MAGI-1",
} | {f"docs/{path.name}": "" for path in sorted((REPOSITORY / "docs").glob("*.md"))}
"""Page -> the folder in which its commands are run."""
OPENED = ("FlowCache4SkyReels-V2", "FlowCache4MAGI-1", "scripts")
"""Folders in which something is written, or that hold what enters the environment."""
COMMAND = re.compile(r'(?:[A-Z_]+=(?:"[^"]*"|\S+) )*(?:bash|python|source|torchrun) .*')
NOTHING_HERE = {
    "docs/architecture.md",
    "docs/development.md",
    "docs/glossary.md",
    "docs/install.md",
    "docs/output.md",
    "docs/results.md",
    "docs/skyreels_v2.md",
    "docs/speed.md",
}
"""Pages whose commands, if any, are all run elsewhere."""
SHORT = (
    (r"run_\w+\.sh|sample\.py skyreels_v2", "num_frames=37 num_steps=8 reuse.warmup_steps=1"),
    (r"single_run/\w+\.sh|entry\.py", "runtime_config.num_frames=48 runtime_config.num_steps=16"),
)
"""What makes a video -> settings behind it that make it short."""
ELSEWHERE = {
    "scripts/setup.sh": ("tests/common/test_setup.py", "setup.sh"),
    "scripts/gpu_check.sh": ("tests/scripts/test_gpu_check.py", "gpu_check.sh"),
    "scripts/bench_gpu.py": ("tests/scripts/test_bench_gpu.py", "bench_gpu"),
    "scripts/rehearse_gpu.py": ("tests/scripts/test_rehearsal.py", "rehearse_gpu"),
    "scripts/quantize_error.py": ("tests/scripts/test_quantize_error.py", "quantize_error"),
    "scripts/test.sh": (".ci/run", "test.sh"),
    "scripts/reproduce": ("tests/scripts/test_reproduce.py", "reproduce_"),
    "scripts/bench_demo.py": ("tests/demo/test_bench_demo.py", "bench_demo"),
    "scripts/make_figures.py": ("tests/scripts/test_make_figures.py", "make_figures"),
    "scripts/train_demo.py": ("tests/demo/test_train_demo.py", "recipe"),
    "scripts/check_golden.py": ("tests/test_check_golden.py", "check_golden"),
    "scripts/tune_budgets.py": ("tests/demo/test_bench_reuse.py", "tune_budgets"),
    "scripts/tune.py": ("tests/scripts/test_tune.py", "tune"),
    "reuse.profile=profile.yaml": ("tests/models/test_tuned.py", "reuse.profile="),
    "MODEL=/data": ("tests/models/test_launchers.py", "MODEL="),
    "MODEL=Skywork": ("tests/common/test_hub.py", "snapshot"),
    "--download": ("tests/magi1/test_checkpoint.py", "download"),
    "python -c": ("tests/models/test_launchers.py", "the_shipped_picture"),
}
"""Part of a command -> the file that runs it, and a word in there: it takes long, or needs what is
not here."""


def shown(page: str) -> list[str]:
    """Return the lines of the page's bash blocks, continued ones joined, comments left out."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(block.replace("\\\n", " ") + "cd -" for block in blocks).splitlines()
    return [line.partition(" #")[0].strip() for line in lines]


def is_elsewhere(line: str) -> bool:
    return "--dry-run" not in line and any(part in line for part in ELSEWHERE)


def runnable(page: str) -> list[str]:
    """Return what is run here: commands with short videos, and `cd` between them."""
    found: list[str] = []
    for line in shown(page):
        for part in re.split(r"\s*&&\s*", line):
            if part.startswith("cd"):
                found.append("cd $START" if part == "cd -" else part)
            elif COMMAND.fullmatch(part) and not is_elsewhere(part):
                settings = [short for maker, short in SHORT if re.search(maker, part)]
                found.append(" ".join([part, *settings]))
    return found


@pytest.fixture(name="checkout")
def _checkout(tmp_path: Path) -> Path:
    """A folder that looks like the repository, in which commands may write."""
    for path in REPOSITORY.iterdir():
        if path.name in OPENED:
            (tmp_path / path.name).mkdir()
            for part in path.iterdir():
                if part.name != "result":
                    (tmp_path / path.name / part.name).symlink_to(part)
        elif path.name != "result" and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    setup = tmp_path / "scripts" / "setup.sh"
    setup.unlink()
    setup.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    (tmp_path / "prompts.txt").write_text("a red circle moving right on a black background\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, checkout: Path):
    commands = runnable(page)
    if not any(COMMAND.fullmatch(line) for line in commands):
        assert page in NOTHING_HERE
        return
    head = ["set -euo pipefail", f"START={checkout / PAGES[page]}", "source scripts/setup.sh"]
    run = subprocess.run(
        ["bash", "-c", "\n".join([*head, "cd $START", *commands])],
        cwd=checkout,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{commands}\n{run.stderr[-3000:]}"


@pytest.mark.parametrize("part", ELSEWHERE)
def test_what_is_not_run_here_is_run_by_the_file_that_is_named(part: str):
    file, word = ELSEWHERE[part]
    assert word in (REPOSITORY / file).read_text(encoding="utf-8")
    assert any(part in (REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_line_of_a_block_is_a_command_in_a_form_that_is_run(page: str):
    lines = [part for line in shown(page) for part in re.split(r"\s*&&\s*", line)]
    if 'python -c "' in lines:  # its lines are Python up to the closing quote
        start = lines.index('python -c "')
        end = next(i for i in range(start + 1, len(lines)) if lines[i].endswith('"'))
        del lines[start : end + 1]
    for line in lines:
        assert not line or line.startswith("cd ") or COMMAND.fullmatch(line), line
