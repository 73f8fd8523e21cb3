"""The tables of results on the pages are those of the kept figures."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
RESULTS = "docs/results.md"


def rows_below(page: str, heading: str, *, table: int = 0) -> list[dict[str, str]]:
    """Return the rows of a table below a heading; without bold and italic marks."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    _, found, part = text.partition(f"\n{heading}\n")
    assert found, heading
    tables: list[list[list[str]]] = []
    before = ""
    for line in part.splitlines():
        if line.startswith("#") and line.count("#", 0, 3) <= heading.count("#", 0, 3):
            break
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            tables[-1].append([cell.strip().strip("*") for cell in line[1:-1].split("|")])
        before = line
    head, _, *rows = tables[table]
    return [dict(zip(head, row, strict=True)) for row in rows]


def kept(name: str) -> dict[str, dict[str, Any]]:
    text = (REPOSITORY / f"assets/bench/{name}.json").read_text(encoding="utf-8")
    return {row["method"]: row for row in json.loads(text)["table"]}


def reproduced(model: str) -> list[dict[str, str]]:
    with (REPOSITORY / f"assets/bench/reproduce_{model}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cell(figures: Mapping[str, Any], column: str) -> str:
    """Return a figure as a page writes it; `gflops .1` is the column with one decimal.

    The other forms: `%1` a share, `x2` a factor, `±2` with its standard error.
    """
    key, form = column.split()
    if figures[key] is None:
        return "-"
    kind, digits = form[0], form[1:]
    value = f"{figures[key] * (100 if kind == '%' else 1):.{digits}f}"
    if kind == "±":
        return f"{value} ± {figures[key.replace('psnr', 'psnr_error')]:.{digits}f}"
    return value + {"%": " %", "x": "x", ".": ""}[kind]


METHODS = {
    "GFLOPs": "gflops .0",
    "computed": "computed_share %0",
    "DiT s": "dit_seconds .2",
    "speed-up": "speedup x2",
    "judge": "judge_accuracy %0",
}
PLANNED = {
    "FLOPs": "flops_share %1",
    "GFLOPs": "gflops .1",
    "DiT s": "dit_seconds .2",
    "speed-up": "speedup_base x2",
    "judge": "judge_accuracy %0",
    "PSNR": "psnr_base ±2",
    "SSIM": "ssim_base .3",
    "PSNR (vanilla)": "psnr .2",
}
FRONT = {
    "FLOPs": "flops_share %0",
    "DiT s": "dit_seconds .2",
    "speed-up": "speedup_base x2",
    "judge": "judge_accuracy %0",
    "PSNR, dB": "psnr_base ±1",
}
MODEL = {
    "FLOPs": "flops_share %1",
    "DiT speed-up": "speedup_base x2",
    "PSNR, dB": "psnr_base ±2",
}
FRONT_ROWS = [
    "every step computed",
    "TeaCache",
    "FlowCache-fast, as published",
    "even spacing, velocity + trend",
    "planned",
]
SKYREELS = ["vanilla-causal", "FlowCache-fast, residual", "planned (mid), as tuned"]
MAGI = ["vanilla, neither pass", "FlowCache-fast, latent update", "planned (mid), as tuned"]
TABLES = [
    pytest.param(
        ("skyreels_v2_demo", RESULTS, "## Caching methods on the SkyReels-V2 demo", 0),
        METHODS
        | {"PSNR": "psnr_vanilla .2", "SSIM": "ssim_vanilla .3"}
        | {"PSNR (causal)": "psnr_vanilla-causal .2", "SSIM (causal)": "ssim_vanilla-causal .3"},
        None,
        id="methods of SkyReels-V2",
    ),
    pytest.param(
        ("magi1_demo", RESULTS, "## Caching methods on the MAGI-1 demo", 0),
        METHODS
        | {"PSNR": "psnr .2", "SSIM": "ssim .3"}
        | {"PSNR (no reuse)": "psnr_base .2", "SSIM (no reuse)": "ssim_base .3"},
        None,
        id="methods of MAGI-1",
    ),
    *(
        pytest.param(
            (f"{key}_reuse", RESULTS, f"## Planned steps on the {model} demo", 0),
            PLANNED,
            None,
            id=f"planned steps of {model}",
        )
        for key, model in (("skyreels_v2", "SkyReels-V2"), ("magi1", "MAGI-1"))
    ),
    *(
        pytest.param(
            (f"{key}_reuse", "README.md", "### Measured by us", table),
            FRONT,
            [own[0], teacache, own[1], "stride (mid), velocity + trend", own[2]],
            id=f"front page, {key}",
        )
        for table, key, own, teacache in (
            (0, "skyreels_v2", SKYREELS, "TeaCache (mid), residual"),
            (1, "magi1", MAGI, "TeaCache (mid), latent update"),
        )
    ),
    pytest.param(
        ("skyreels_v2_reuse", "FlowCache4SkyReels-V2/README.md", "## Presets", 1),
        MODEL,
        SKYREELS,
        id="page of SkyReels-V2",
    ),
    pytest.param(
        ("magi1_reuse", "FlowCache4MAGI-1/README.md", "## Presets", 1),
        MODEL,
        MAGI,
        id="page of MAGI-1",
    ),
]
"""What is kept and where it is shown; columns of the page -> of the file; the methods in the order
of the page, None: all of the file, by their names."""


@pytest.mark.parametrize(("place", "columns", "methods"), TABLES)
def test_a_measured_table_is_the_kept_one(
    place: tuple[str, str, str, int], columns: Mapping[str, str], methods: Sequence[str] | None
):
    name, page, heading, table = place
    figures, rows = kept(name), rows_below(page, heading, table=table)
    first = next(iter(rows[0]))
    if methods is None:
        methods = [row[first] for row in rows]
        assert set(methods) == set(figures)
    if page == "README.md":
        assert [row[first] for row in rows] == FRONT_ROWS
    for row, method in zip(rows, methods, strict=True):
        own = {column: cell(figures[method], form) for column, form in columns.items()}
        assert row == {first: row[first]} | own, method


@pytest.mark.parametrize(("model", "key"), [("SkyReels-V2", "skyreels_v2"), ("MAGI-1", "magi1")])
def test_the_reproduced_table_is_the_kept_one(model: str, key: str):
    heading = f"## The paper's table on the {model} demo"
    page = (REPOSITORY / RESULTS).read_text(encoding="utf-8").partition(heading)[2]
    lines = page.partition("\n## ")[0].splitlines()
    table = [[text.strip() for text in line[1:-1].split("|")] for line in lines if line[:1] == "|"]
    assert sum(bool(cells[1]) for cells in table[2:]) == len(reproduced(key))

    def number(row: Mapping[str, str], column: str, form: str) -> str:
        return f"{float(row[column]):{form}}" if row[column] else "-"

    for row in reproduced(key):
        cells = [
            row["method"],
            f"{float(row['pflops']) * 1e6:.1f}",
            number(row, "published_pflops", "g"),
            f"{100 * float(row['reused_share']):.1f} %",
            number(row, "ssim", ".4f"),
            number(row, "published_ssim", "g"),
            number(row, "psnr", ".2f"),
            number(row, "published_psnr", "g"),
            number(row, "dit_seconds", ".2f"),
            number(row, "dit_speedup", ".2f") + "x",
        ]
        assert cells in table, row["method"]


@pytest.mark.parametrize(("table", "model"), [(0, "skyreels_v2"), (1, "magi1")])
@pytest.mark.parametrize(
    ("page", "heading"),
    [(RESULTS, "## Published, on an A800"), ("README.md", "### Published")],
)
def test_the_published_tables_are_those_of_the_kept_results(
    page: str, heading: str, table: int, model: str
):
    figures = {row["method"]: row for row in reproduced(model)}
    rows = rows_below(page, heading, table=table)
    assert len(rows) == 5
    renamed = {"latency s": "latency_seconds", "speed-up": "speedup"}
    for row in rows:
        method, *cells = row.items()
        for name, text in cells:
            value = figures[method[1]][f"published_{renamed.get(name, name.lower())}"]
            assert (float(text) if text else None) == (float(value) if value else None), name
