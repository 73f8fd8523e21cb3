"""The tables of results on the pages are those of the kept figures."""

import csv
import json
from collections.abc import Mapping
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


def share(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def decimals(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def with_error(value: float | None, error: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f} ± {error:.{digits}f}"


@pytest.mark.parametrize(
    ("model", "heading", "columns"),
    [
        (
            "skyreels_v2",
            "## Caching methods on the SkyReels-V2 demo",
            {
                "PSNR": "psnr_vanilla",
                "SSIM": "ssim_vanilla",
                "PSNR (causal)": "psnr_vanilla-causal",
                "SSIM (causal)": "ssim_vanilla-causal",
            },
        ),
        (
            "magi1",
            "## Caching methods on the MAGI-1 demo",
            {
                "PSNR": "psnr",
                "SSIM": "ssim",
                "PSNR (no reuse)": "psnr_base",
                "SSIM (no reuse)": "ssim_base",
            },
        ),
    ],
)
def test_the_table_of_caching_methods_is_the_kept_one(
    model: str, heading: str, columns: Mapping[str, str]
):
    figures, rows = kept(f"{model}_demo"), rows_below(RESULTS, heading)
    assert {row["method"] for row in rows} == set(figures)
    for row in rows:
        of = figures[row["method"]]
        assert row == {
            "method": row["method"],
            "GFLOPs": f"{of['gflops']:.0f}",
            "computed": share(of["computed_share"]),
            "DiT s": f"{of['dit_seconds']:.2f}",
            "speed-up": f"{of['speedup']:.2f}x",
            "judge": share(of["judge_accuracy"]),
        } | {name: decimals(of[key], 2 if "PSNR" in name else 3) for name, key in columns.items()}


@pytest.mark.parametrize(
    ("model", "heading"),
    [
        ("skyreels_v2", "## Planned steps on the SkyReels-V2 demo"),
        ("magi1", "## Planned steps on the MAGI-1 demo"),
    ],
)
def test_the_table_of_planned_steps_is_the_kept_one(model: str, heading: str):
    figures, rows = kept(f"{model}_reuse"), rows_below(RESULTS, heading)
    assert {row["method"] for row in rows} == set(figures)
    for row in rows:
        of = figures[row["method"]]
        assert row == {
            "method": row["method"],
            "FLOPs": share(of["flops_share"], 1),
            "GFLOPs": f"{of['gflops']:.1f}",
            "DiT s": f"{of['dit_seconds']:.2f}",
            "speed-up": f"{of['speedup_base']:.2f}x",
            "judge": share(of["judge_accuracy"]),
            "PSNR": with_error(of["psnr_base"], of["psnr_error_base"], 2),
            "SSIM": decimals(of["ssim_base"], 3),
            "PSNR (vanilla)": decimals(of["psnr"], 2),
        }


@pytest.mark.parametrize(
    ("model", "table", "methods"),
    [
        (
            "skyreels_v2",
            0,
            {
                "every step computed": "vanilla-causal",
                "TeaCache": "TeaCache (mid), residual",
                "FlowCache-fast, as published": "FlowCache-fast, residual",
            },
        ),
        (
            "magi1",
            1,
            {
                "every step computed": "vanilla, neither pass",
                "TeaCache": "TeaCache (mid), latent update",
                "FlowCache-fast, as published": "FlowCache-fast, latent update",
            },
        ),
    ],
)
def test_the_measured_tables_of_the_front_page_are_rows_of_the_kept_ones(
    model: str, table: int, methods: Mapping[str, str]
):
    figures = kept(f"{model}_reuse")
    names = dict(methods) | {
        "even spacing, velocity + trend": "stride (mid), velocity + trend",
        "planned": "planned (mid), as tuned",
    }
    rows = rows_below("README.md", "### Measured by us", table=table)
    first = next(iter(rows[0]))
    assert [row[first] for row in rows] == list(names)
    for row in rows:
        of = figures[names[row[first]]]
        assert row == {
            first: row[first],
            "FLOPs": share(of["flops_share"]),
            "DiT s": f"{of['dit_seconds']:.2f}",
            "speed-up": f"{of['speedup_base']:.2f}x",
            "judge": share(of["judge_accuracy"]),
            "PSNR, dB": with_error(of["psnr_base"], of["psnr_error_base"], 1),
        }


@pytest.mark.parametrize(
    ("model", "readme", "methods"),
    [
        (
            "skyreels_v2",
            "FlowCache4SkyReels-V2/README.md",
            ["vanilla-causal", "FlowCache-fast, residual", "planned (mid), as tuned"],
        ),
        (
            "magi1",
            "FlowCache4MAGI-1/README.md",
            ["vanilla, neither pass", "FlowCache-fast, latent update", "planned (mid), as tuned"],
        ),
    ],
)
def test_the_measured_table_of_a_model_page_is_the_kept_one(
    model: str, readme: str, methods: list[str]
):
    figures = kept(f"{model}_reuse")
    rows = rows_below(readme, "## Presets", table=1)
    for row, method in zip(rows, methods, strict=True):
        of = figures[method]
        assert list(row.values())[1:] == [
            share(of["flops_share"], 1),
            f"{of['speedup_base']:.2f}x",
            with_error(of["psnr_base"], of["psnr_error_base"], 2),
        ]


def reproduced(model: str) -> list[dict[str, str]]:
    with (REPOSITORY / f"assets/bench/reproduce_{model}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("model", "heading"),
    [
        ("skyreels_v2", "## The paper's table on the SkyReels-V2 demo"),
        ("magi1", "## The paper's table on the MAGI-1 demo"),
    ],
)
def test_the_reproduced_table_is_the_kept_one(model: str, heading: str):
    page = (REPOSITORY / RESULTS).read_text(encoding="utf-8").partition(heading)[2]
    lines = page.partition("\n## ")[0].splitlines()
    shown = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line[:1] == "|"]
    assert sum(bool(cells[1]) for cells in shown[2:]) == len(reproduced(model))
    for row in reproduced(model):
        cells = [
            row["method"],
            f"{float(row['pflops']) * 1e6:.1f}",
            f"{float(row['published_pflops']):g}" if row["published_pflops"] else "-",
            share(float(row["reused_share"]), 1),
            f"{float(row['ssim']):.4f}" if row["ssim"] else "-",
            f"{float(row['published_ssim']):g}" if row["published_ssim"] else "-",
            f"{float(row['psnr']):.2f}" if row["psnr"] else "-",
            f"{float(row['published_psnr']):g}" if row["published_psnr"] else "-",
            f"{float(row['dit_seconds']):.2f}",
            f"{float(row['dit_speedup']):.2f}x",
        ]
        assert cells in shown, row["method"]


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
    keys = {
        "PFLOPs": "pflops",
        "latency s": "latency_seconds",
        "speed-up": "speedup",
        "VBench": "vbench",
        "LPIPS": "lpips",
        "SSIM": "ssim",
        "PSNR": "psnr",
    }
    for row in rows:
        of = figures[next(iter(row.values()))]
        for name, cell in list(row.items())[1:]:
            value = of[f"published_{keys[name]}"]
            assert (float(cell) if cell else None) == (float(value) if value else None), name
