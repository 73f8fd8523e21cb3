"""The front page: its links lead somewhere, its commands are commands of this repository."""

import csv
import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MODULES = {
    "skyreels_v2": (
        "FlowCache4SkyReels-V2/skyreels_v2/__main__.py",
        "common/flowcache/runtime/cli.py",
    ),
    "magi1": ("FlowCache4MAGI-1/magi1/__main__.py", "common/flowcache/runtime/cli.py"),
}
DRY = {"--dry-run", "--paper"}
"""Flags of commands that read no weights and write nothing."""
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Yield the folder and the words of every command, without variables in front of it."""
    for block in blocks():
        folder = REPOSITORY
        for line in re.split(r"\n|&&", block):
            words = shlex.split(line, comments=True)
            while words and ASSIGNMENT.fullmatch(words[0]):
                del words[0]
            if words and words[0] == "cd":
                folder = folder / words[1]
            elif words:
                yield folder, words


COMMANDS = list(commands())


def source_of(folder: Path, words: list[str]) -> str:
    """Return the text of what a command starts; it must be there."""
    match words:
        case ["python", "-m", module, *_]:
            return "".join((REPOSITORY / path).read_text() for path in MODULES[module])
        case ["bash" | "python" | "source", path, *_]:
            file = folder / path
            assert file.is_file(), f"{file} is not there"
            text = file.read_text()
            found = re.search(r"-m (skyreels_v2|magi1)", text) if words[0] == "bash" else None
            return (
                text if found is None else text + source_of(folder, ["python", *found[0].split()])
            )
    raise AssertionError(f"unknown command: {shlex.join(words)}")


def anchors(text: str) -> set[str]:
    """Return the names that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("folder", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_command_starts_what_is_there_with_flags_that_it_knows(folder: Path, words: list[str]):
    source = source_of(folder, words)
    for word in words[2:]:
        if word.startswith("--"):
            assert f'"{word}"' in source, f"{word} is no flag of {words[:3]}"


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.strip()[:60])
def test_a_block_is_bash(block: str):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.mark.parametrize(
    "words",
    [words for _, words in COMMANDS if words[0] == "python" and DRY & set(words)],
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


def test_the_page_has_commands_of_both_models():
    text = " ".join(blocks())
    assert "run_flowcache_fast.sh" in text
    assert "flowcache_t2v.sh" in text


@pytest.mark.parametrize(
    "link", sorted(set(re.findall(r"\]\(((?!https?:)[^)]+)\)", TEXT))), ids=str
)
def test_a_link_leads_somewhere(link: str):
    path, _, anchor = link.partition("#")
    target = REPOSITORY / path if path else REPOSITORY / "README.md"
    assert target.exists()
    if anchor:
        assert anchor in anchors(target.read_text(encoding="utf-8"))


def test_the_measured_table_is_that_of_the_repository():
    """Compare GFLOPs, share, seconds, speed-up and PSNR with the raw figures."""
    table = json.loads((REPOSITORY / "assets/bench/skyreels_v2_demo.json").read_text())["table"]
    known = {
        "vanilla": "vanilla",
        "vanilla, causal, active chunks only": "vanilla-causal",
        "TeaCache, causal": "TeaCache, causal (FlowCache-fast's FLOPs), residual",
        "stride (every fourth step)": "stride (FlowCache-fast's FLOPs), residual",
    }
    rows = {row["method"]: row for row in table}
    part = TEXT.partition("### Measured by us, on the SkyReels-V2 demo")[2].partition("###")[0]
    shown = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    assert len(shown) == 11
    for name, gflops, computed, seconds, speedup, judge, psnr in shown[2:]:
        row = rows[known.get(name, f"{name}, residual")]
        is_full = name in ("vanilla", "TeaCache-slow", "TeaCache-fast")
        decibel = row["psnr_vanilla" if is_full else "psnr_vanilla-causal"]
        assert gflops == f"{row['gflops']:.0f}"
        assert computed == f"{100 * row['computed_share']:.0f} %"
        assert seconds == f"{row['dit_seconds']:.2f}"
        assert speedup == f"{row['speedup']:.2f}x"
        assert judge == f"{100 * row['judge_accuracy']:.0f} %"
        assert psnr == ("-" if decibel is None else f"{decibel:.2f}")


@pytest.mark.parametrize(
    ("family", "readme"),
    [("skyreels_v2", "FlowCache4SkyReels-V2/README.md"), ("magi1", "FlowCache4MAGI-1/README.md")],
)
def test_the_reproduced_table_of_a_readme_is_that_of_the_kept_result(family: str, readme: str):
    text = (REPOSITORY / readme).read_text(encoding="utf-8")
    with (REPOSITORY / f"assets/bench/reproduce_{family}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        start = f"| {row['method']} | {float(row['pflops']) * 1e6:.1f} |"
        lines = [line for line in text.splitlines() if line.startswith(start)]
        cells = [cell.strip() for line in lines for cell in line.split("|")]
        assert lines, row["method"]
        assert f"{float(row['reused_share']) * 100:.1f} %" in cells, row["method"]
        assert not row["psnr"] or f"{float(row['psnr']):.2f}" in cells, row["method"]
