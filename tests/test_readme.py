"""The pages: short enough, their links lead somewhere, their commands are of this repository."""

import functools
import importlib
import importlib.util
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
MAX_WORDS = {"README.md": 1500} | {f"{folder}/README.md": 1200 for folder in MODELS}
DOCS = sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))
PAGES = [*MAX_WORDS, *DOCS]
MAX_COLUMNS = 10
DRY = {"--dry-run", "--paper"}
"""Flags of commands that read no weights and write nothing."""
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def prose_of(page: str) -> str:
    """Return the page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[str]:
    return re.findall(r"^ *```bash\n(.*?)^ *```$", text_of(page), flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folder and the words of every command, without variables in front of it."""
    for block in blocks(page):
        folder = (REPOSITORY / page).parent if page.endswith("README.md") else REPOSITORY
        without_python = re.sub(r'python -c ".*?"', "", block, flags=re.DOTALL)
        for line in re.split(r"\n|&&", without_python.replace("\\\n", " ")):
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
    for page in PAGES
    for link in sorted(set(re.findall(r"\]\(((?!https?:)[^)]+)\)", prose_of(page))))
]


@functools.cache
def help_of(*program: str) -> str:
    run = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
    return run.stdout


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


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("page", "most"), MAX_WORDS.items())
def test_a_front_page_is_short(page: str, most: int):
    assert len(text_of(page).split()) <= most


def test_the_first_screen_says_shows_and_runs_something():
    screen = "\n".join(text_of("README.md").splitlines()[:30])
    assert re.search(r"!\[[^\]]+\]\(assets/[^)]+\)", screen)
    for folder in MODELS:
        assert f"bash {folder}/" in screen
    assert "chunk passes" in screen


@pytest.mark.parametrize("page", DOCS)
def test_a_page_is_found_from_the_front_page(page: str):
    assert f"]({page})" in text_of("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_a_table_is_a_table_that_fits_a_page(page: str):
    lines = [line.strip() for line in prose_of(page).splitlines()]
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            columns = line.count("|") - 1
            assert columns <= MAX_COLUMNS, line
            assert not before.startswith("|") or before.count("|") - 1 == columns, line


@pytest.mark.parametrize(("folder", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_command_starts_what_is_there_with_flags_that_it_knows(folder: Path, words: list[str]):
    known = known_flags(folder, words)
    for word in words[2:]:
        if word.startswith("--") and word != "--":
            assert re.search(rf"{word}\b", known), f"{word} is no flag of {words[:3]}"


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_are_bash(page: str):
    for block in blocks(page):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


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


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page: str, link: str):
    path, _, anchor = link.partition("#")
    source = REPOSITORY / page
    target = source.parent / path if path else source
    assert target.exists()
    if anchor:
        assert anchor in anchors(target)
