"""The pages: short enough, their links lead somewhere, every command is there, and is run.

Commands are run here with short videos, or by a test of their own.
"""

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MODELS = {"FlowCache4SkyReels-V2": "skyreels_v2", "FlowCache4MAGI-1": "magi1"}
"""Folder of a model -> its Python package."""
FRONT_PAGES = sorted(path.parent.name for path in REPOSITORY.glob("FlowCache4*/README.md"))
MAX_WORDS = {"README.md": 1500} | {f"{folder}/README.md": 1200 for folder in FRONT_PAGES}
MAX_PROSE = 2000
"""Words of a page of docs/, blocks of code and tables left out."""
ALL_PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.md", "FlowCache4*/*.md", "docs/*.md", "integrations/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
"""Whose links lead somewhere."""
DOCS = sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))
PAGES = [
    "README.md",
    *(f"{folder}/README.md" for folder in MODELS),
    *DOCS,
]
"""Whose commands are checked."""
MAX_COLUMNS = 10
DRY = {"--dry-run", "--paper"}
"""Flags of commands that read no weights and write nothing."""
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")
COMMAND = re.compile(r'(?:[A-Z_]+=(?:"[^"]*"|\S+) )*(?:bash|python|source|torchrun) .*')
OPENED = (*MODELS, "scripts")
"""Folders in which something is written, or that hold what enters the environment."""
NOTHING_HERE = {
    *(f"docs/{name}.md" for name in ("architecture", "development", "glossary", "install")),
    *(f"docs/{name}.md" for name in ("magi1", "output", "python", "reproduction", "results")),
    *(f"docs/{name}.md" for name in ("serving", "skyreels_v2", "small_cards", "speed")),
}
"""Pages whose commands, if any, are all run elsewhere."""
SHORT = (
    (r"run_\w+\.sh|sample\.py skyreels_v2", "num_frames=37 num_steps=8 reuse.warmup_steps=1"),
    (r"single_run/\w+\.sh|entry\.py", "runtime_config.num_frames=48 runtime_config.num_steps=16"),
)
"""What makes a video -> settings behind it that make it short."""
ELSEWHERE = {
    "scripts/setup.sh": ("tests/runtime/test_setup.py", "setup.sh"),
    "scripts/memory_tables.py": ("tests/scripts/test_memory_tables.py", "memory_tables"),
    "scripts/gpu_check.sh": ("tests/scripts/test_gpu_check.py", "gpu_check.sh"),
    "scripts/bench_gpu.py": ("tests/scripts/test_bench_gpu.py", "flowcache.gpu"),
    "scripts/bench_peers.py": ("tests/scripts/test_bench_peers.py", "bench_peers"),
    "scripts/rehearse_gpu.py": ("tests/scripts/test_rehearsal.py", "rehearse_gpu"),
    "scripts/quantize_error.py": ("tests/scripts/test_quantize_error.py", "quantize_error"),
    "bash serve.sh": ("tests/serve/test_app.py", "serve.sh"),
    "scripts/test.sh": (".ci/run", "test.sh"),
    "_vbench.sh": ("tests/scripts/test_sample.py", "vbench"),
    "vbench/evaluate.sh": ("tests/scripts/test_vbench.py", "evaluate.sh"),
    "_physicsiq.sh": ("tests/scripts/test_sample.py", "physicsiq"),
    "scripts/rivals.sh": ("tests/demo/test_rivals.py", "rivals"),
    "scripts/reproduce": ("tests/scripts/test_table.py", "reproduce_"),
    "scripts/bench_demo.py": ("tests/demo/test_bench.py", "bench_demo"),
    "scripts/make_tables.py": ("tests/scripts/test_make_tables.py", "make_tables"),
    "scripts/make_figures.py": ("tests/scripts/test_make_figures.py", "make_figures"),
    "scripts/train_demo.py": ("tests/demo/test_train_demo.py", "recipe"),
    "scripts/check_golden.py": ("tests/test_check_golden.py", "check_golden"),
    "scripts/tune_budgets.py": ("tests/demo/test_bench.py", "tune_budgets"),
    "scripts/tune.py": ("tests/scripts/test_tune.py", "tune"),
    "reuse.profile=profile.yaml": ("tests/models/test_tuned.py", "reuse.profile="),
    "--ray": ("tests/serve/test_replicas.py", "--ray"),
    "MODEL=/data": ("tests/models/test_launchers.py", "MODEL="),
    "MODEL=Skywork": ("tests/runtime/test_hub.py", "snapshot"),
    "--download": ("tests/magi1/test_checkpoint.py", "download"),
    "python -c": ("tests/models/test_launchers.py", "the_shipped_picture"),
}
"""Part of a command -> the file that runs it, and a word in there: it takes long, or needs what is
not here."""


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def prose_of(page: str) -> str:
    """Return the page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def folder_of(page: str) -> Path:
    """Return the folder in which the commands of a page are run."""
    return (REPOSITORY / page).parent if page.endswith("README.md") else REPOSITORY


def blocks(page: str) -> list[str]:
    """Return the page's bash blocks with continued lines joined."""
    pattern = r"^ *```bash\n(.*?)^ *```$"
    found = re.findall(pattern, text_of(page), flags=re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", " ") for block in found]


def lines(page: str) -> list[str]:
    """Return the commands of all blocks, without comments; `cd -` ends each block."""
    text = "\n".join(f"{block}cd -" for block in blocks(page))
    parts = (re.split(r"\s*&&\s*", line.partition(" #")[0].strip()) for line in text.splitlines())
    return [part for found in parts for part in found]


def commands(page: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folder and the words of every command, without variables in front of it."""
    for block in blocks(page):
        folder = folder_of(page)
        for line in re.split(r"\n|&&", re.sub(r'python -c ".*?"', "", block, flags=re.DOTALL)):
            words = shlex.split(line.partition("; wait")[0], comments=True)
            while words and ASSIGNMENT.fullmatch(words[0]):
                del words[0]
            if words and words[0] == "cd":
                folder = (folder / words[1]).resolve()
            elif words:
                yield folder, words


COMMANDS = [(folder, words) for page in PAGES for folder, words in commands(page)]
LINKS = [
    (page, link)
    for page in ALL_PAGES
    for link in sorted(set(re.findall(r"\]\(((?!https?:)[^)]+)\)", prose_of(page))))
]


# The text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "most"), MAX_WORDS.items())
def test_a_front_page_is_short(page: str, most: int):
    assert len(text_of(page).split()) <= most


@pytest.mark.parametrize("page", DOCS)
def test_a_page_of_the_docs_is_not_a_book(page: str):
    lines = [line for line in prose_of(page).splitlines() if not line.lstrip().startswith("|")]
    assert len(" ".join(lines).split()) <= MAX_PROSE


def test_the_first_screen_says_shows_and_runs_something():
    screen = "\n".join(text_of("README.md").splitlines()[:30])
    assert re.search(r"!\[[^\]]+\]\(assets/moving_[^)]+\)", screen)
    for words in (*(f"bash {folder}/" for folder in MODELS), "chunk passes"):
        assert words in screen


@pytest.mark.parametrize("page", DOCS)
def test_a_page_is_found_from_the_front_page(page: str):
    assert f"]({page})" in text_of("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_a_table_is_a_table_that_fits_a_page(page: str):
    rows = [line.strip() for line in prose_of(page).splitlines()]
    for before, line in zip(["", *rows], rows, strict=False):
        if line.startswith("|"):
            columns = line.count("|") - 1
            assert columns <= MAX_COLUMNS, line
            assert not before.startswith("|") or before.count("|") - 1 == columns, line


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page: str, link: str):
    path, _, anchor = link.partition("#")
    target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
    assert target.exists()
    if anchor:
        titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
        names = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in names


# The commands -------------------------------------------------------------------------------------


@functools.cache
def help_of(*program: str) -> str:
    return subprocess.run([*program, "--help"], capture_output=True, text=True, check=True).stdout


def known_flags(folder: Path, words: list[str]) -> str:
    """Return the text that names the flags of what a command starts; that must be there."""
    if words[:2] == ["python", "-m"]:
        module = words[len(words) - 1 - words[::-1].index("-m") + 1]
        assert importlib.util.find_spec(module) is not None, module
        return help_of(sys.executable, "-m", module)
    assert words[0] in ("bash", "python", "source"), f"unknown command: {shlex.join(words)}"
    file = folder / words[1]
    assert file.is_file(), f"{file} is not there"
    if words[0] == "python":
        return help_of(sys.executable, str(file))
    model = MODELS.get(file.relative_to(REPOSITORY).parts[0])
    text = file.read_text(encoding="utf-8")
    return text if model is None else text + help_of(sys.executable, "-m", model)


@pytest.mark.parametrize(("folder", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_command_starts_what_is_there_with_flags_that_it_knows(folder: Path, words: list[str]):
    known = known_flags(folder, words)
    for word in words[2:]:
        if word.startswith("--") and word != "--":
            assert re.search(rf"{word}\b", known), f"{word} is no flag of {words[:3]}"


@pytest.mark.parametrize("page", PAGES)
def test_every_line_of_a_block_is_bash_and_a_command_in_a_form_that_is_run(page: str):
    for block in blocks(page):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    found = lines(page)
    if 'python -c "' in found:  # its lines are Python up to the closing quote
        start = found.index('python -c "')
        end = next(i for i in range(start + 1, len(found)) if found[i].endswith('"'))
        del found[start : end + 1]
    for line in found:
        assert not line or line.startswith("cd ") or COMMAND.fullmatch(line), line


@pytest.mark.parametrize(
    "words",
    [words for _, words in commands("README.md") if words[0] == "python" and DRY & set(words)],
    ids=lambda words: words[2] if words[1] == "-m" else words[1],
)
def test_a_command_that_only_says_something_does(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    if words[1] == "-m":
        module, arguments = f"{words[2]}.__main__", words[3:]
    else:
        monkeypatch.syspath_prepend(REPOSITORY / "scripts")
        module, arguments = Path(words[1]).stem, words[2:]
    assert importlib.import_module(module).main(arguments) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("part", ELSEWHERE)
def test_what_is_not_run_here_is_run_by_the_file_that_is_named(part: str):
    file, word = ELSEWHERE[part]
    assert word in text_of(file)
    assert any(part in text_of(page) for page in PAGES)


def runnable(page: str) -> list[str]:
    """Return what is run here: commands with short videos, and `cd` between them."""
    found: list[str] = []
    for line in lines(page):
        is_elsewhere = "--dry-run" not in line and any(part in line for part in ELSEWHERE)
        if line.startswith("cd"):
            found.append("cd $START" if line == "cd -" else line)
        elif COMMAND.fullmatch(line) and not is_elsewhere:
            settings = [short for maker, short in SHORT if re.search(maker, line)]
            found.append(" ".join([line, *settings]))
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
    found = runnable(page)
    if not any(COMMAND.fullmatch(line) for line in found):
        assert page in NOTHING_HERE
        return
    start = checkout / folder_of(page).relative_to(REPOSITORY)
    head = ["set -euo pipefail", f"START={start}", "source scripts/setup.sh", "cd $START"]
    run = subprocess.run(
        ["bash", "-c", "\n".join([*head, *found])],
        cwd=checkout,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{found}\n{run.stderr[-3000:]}"
