"""The tables of the pages: those of the kept figures, in the form that pages have."""

import csv
import importlib
import io
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from flowcache.errors import UserError
from flowcache.report import tables

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("make_tables")


def test_the_pages_hold_what_the_command_makes(script: ModuleType):
    """If not: python scripts/make_tables.py"""
    for path, text in script.contents().items():
        assert path.read_text(encoding="utf-8") == text, path


def test_only_what_differs_is_written_and_named(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "README.md").write_text(
        "before\n<!-- table: measured magi1 -->\nold\n<!-- end -->\nafter\n"
    )
    monkeypatch.setattr(script, "REPOSITORY", tmp_path)
    monkeypatch.setattr(script, "KEPT", ())
    assert script.main([]) == 0
    assert capsys.readouterr().out == "wrote README.md\n"
    before, first, *lines, last, after = (tmp_path / "README.md").read_text().splitlines()
    assert (before, first, last, after) == (
        "before",
        "<!-- table: measured magi1 -->",
        "<!-- end -->",
        "after",
    )
    assert lines == tables.measured("magi1")
    assert script.main([]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("model", tables.TITLES)
@pytest.mark.parametrize("name", [name for name in tables.TABLES if name != "claims"])
def test_every_table_is_one_that_people_can_read(name: str, model: str):
    head, ruler, *rows = tables.TABLES[name](model)
    assert head.count("|") <= 11
    assert rows
    assert {line.count("|") for line in (ruler, *rows)} == {head.count("|")}


@pytest.mark.parametrize("model", tables.TITLES)
def test_what_is_published_is_what_the_protocol_says(model: str):
    """The protocol was copied from the paper by hand; one row of each table here, too."""
    rows = {line.split(" | ")[0].lstrip("| "): line for line in tables.published(model)[2:]}
    assert list(rows) == [
        "Vanilla",
        "TeaCache-slow",
        "TeaCache-fast",
        "FlowCache-slow",
        "FlowCache-fast",
    ]
    expected = {
        "skyreels_v2": "| FlowCache-fast | 28 | 230 | 6.70x | 83.05 | 0.1467 | 0.7635 | 22.95 |",
        "magi1": "| FlowCache-fast | 140 | 1209 | 2.38x | 77.93 | 0.4311 | 0.5140 | 19.27 |",
    }
    assert rows["FlowCache-fast"] == expected[model]


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("gflops .1", "12.3"),
        ("share %0", "37 %"),
        ("speed x2", "2.50x"),
        ("psnr ±1", "35.3 ± 0.9"),
        ("pflops g", "113"),
        ("none .1", "-"),
        ("absent .1", "-"),
    ],
)
def test_a_figure_is_written_in_its_form(column: str, text: str):
    row = {"gflops": 12.34, "share": 0.371, "speed": 2.4999, "psnr": 35.3, "psnr_error": 0.91}
    assert tables.cell({**row, "pflops": 113.0, "none": None}, column) == text


@pytest.mark.parametrize("mark", ["table: nothing magi1", "table: measured other"])
def test_an_unknown_table_is_one_line(mark: str):
    with pytest.raises(UserError, match="is unknown; there are published, paper"):
        tables.fill(f"<!-- {mark} -->\n<!-- end -->")


@pytest.mark.parametrize("model", tables.TITLES)
@pytest.mark.parametrize("kind", ["demo", "reuse"])
def test_the_csv_has_every_row_and_figure(model: str, kind: str):
    path = tables.BENCH / f"{model}_{kind}.json"
    table = json.loads(path.read_text())["table"]
    rows = list(csv.DictReader(io.StringIO(path.with_suffix(".csv").read_text())))
    assert [row["method"] for row in rows] == [row["method"] for row in table]
    for row, figures in zip(rows, table, strict=True):
        assert float(row["dit_seconds"]) == figures["dit_seconds"]
        assert float(row["judge_shape"]) == figures["judge"]["shape"]


def test_no_table_of_figures_is_typed_by_hand_on_the_front_page():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    by_hand = tables.MARKED.sub("", text).partition("## Results")[2].partition("## Tools")[0]
    assert not re.search(r"^\|", by_hand, flags=re.MULTILINE)
