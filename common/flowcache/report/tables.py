"""The tables of the pages, from the figures that are kept in assets/bench.

A page holds a comment, a table and a second comment; what is between them is replaced:

    <!-- table: measured skyreels_v2 -->
    | method | FLOPs | ...
    <!-- end -->
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowcache.bench.table import table_lines
from flowcache.demo.judge import ATTRIBUTE_NAMES
from flowcache.demo.modes import STEADY_NAMES
from flowcache.demo.recipe import RECORD
from flowcache.errors import UserError
from flowcache.report.figures import base_column
from flowcache.runtime.files import read_json
from flowcache.runtime.model import load_model
from flowcache.runtime.text_files import escaped, table_row

Row = Mapping[str, Any]
Columns = Mapping[str, str]
"""Head of a column -> the figure and how it is written, see `cell`."""

BENCH = Path(__file__).resolve().parents[3] / "assets" / "bench"
TITLES = {"skyreels_v2": "SkyReels-V2", "magi1": "MAGI-1"}
MARKED = re.compile(r"<!-- table: (\w+) (\w+) -->\n.*?<!-- end -->", re.DOTALL)
MISSING = "-"
PUBLISHED: Columns = {
    "PFLOP": "pflops g",
    "latency s": "latency_seconds g",
    "latency speed-up": "speedup x2",
    "VBench": "vbench .2",
    "LPIPS": "lpips .4",
    "SSIM": "ssim .4",
    "PSNR, dB": "psnr .2",
}
MORE = ("LPIPS", "SSIM")
"""Not on the front page."""
METHODS: Columns = {
    "GFLOP": "gflops .0",
    "computed": "computed_share %0",
    "DiT s": "dit_seconds .2",
    "DiT speed-up": "speedup x2",
    "judge": "judge_accuracy %0",
    "PSNR, dB": "psnr_base .2",
    "SSIM": "ssim_base .3",
}
RULES: Columns = {
    "FLOPs": "flops_share %1",
    "DiT s": "dit_seconds .2",
    "DiT speed-up": "speedup_base x2",
    "judge": "judge_accuracy %0",
    "PSNR, dB": "psnr_base ±2",
    "SSIM": "ssim_base .3",
}
FRONT: Columns = {
    "FLOPs": "flops_share %0",
    "DiT s": "dit_seconds .2",
    "DiT speed-up": "speedup_base x2",
    "judge": "judge_accuracy %0",
    "PSNR, dB": "psnr_base ±1",
}
PRESETS: Columns = {
    "FLOPs": "flops_share %1",
    "DiT speed-up": "speedup_base x2",
    "PSNR, dB": "psnr_base ±2",
}
JUDGED: Columns = {
    "clips": "clips g",
    **{name: f"{name} %0" for name in (*ATTRIBUTE_NAMES, "all", *STEADY_NAMES)},
}
PUBLISHED_PREDICTOR = {"skyreels_v2": "residual", "magi1": "latent update"}
BASE = {"skyreels_v2": "vanilla-causal", "magi1": "vanilla, neither pass"}


def fill(page: str) -> str:
    """Return a page with its marked tables made anew."""

    def table(found: re.Match[str]) -> str:
        name, model = found.groups()
        if name not in TABLES or model not in TITLES:
            raise UserError(
                f"table: {name} {model} is unknown; there are {', '.join(TABLES)} of "
                f"{' and '.join(TITLES)}"
            )
        lines = TABLES[name](model)
        return "\n".join([f"<!-- table: {name} {model} -->", *lines, "<!-- end -->"])

    return MARKED.sub(table, page)


def cell(row: Row, column: str) -> str:
    """Write a figure of a row: `gflops .1` is the figure `gflops` with one decimal.

    Other forms: `g` as short as it is, `%1` a share, `x2` a factor, `±2` with its standard error.
    """
    key, form = column.split()
    if row.get(key) is None:
        return MISSING
    kind, digits = form[0], form[1:]
    if kind == "g":
        return f"{row[key]:g}"
    value = f"{row[key] * (100 if kind == '%' else 1):.{digits}f}"
    if kind == "±":
        return f"{value} ± {row[key.replace('psnr', 'psnr_error')]:.{digits}f}"
    return value + {"%": " %", "x": "x", ".": ""}[kind]


def lines_of(head: str, rows: Mapping[str, Row], columns: Columns) -> list[str]:
    """Return a Markdown table: the first column has the keys of `rows`."""
    lines = [table_row([head, *columns]), "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        lines.append(table_row([name, *(cell(row, column) for column in columns.values())]))
    return lines


def published(model: str) -> list[str]:
    """Return the paper's figures."""
    return _paper(model, PUBLISHED)


def _paper(model: str, columns: Columns) -> list[str]:
    report = _kept(f"reproduce_{model}", command="bash scripts/reproduce_MODEL.sh")
    rows = {row["method"]: row["published"] for row in report["rows"] if row["part"] == "paper"}
    setting = ", ".join(report["published_setting"].split(", ")[:3])
    return lines_of(escaped(setting), rows, columns)


def paper(model: str) -> list[str]:
    """Return the paper's figures that the front page shows."""
    return _paper(model, {name: PUBLISHED[name] for name in PUBLISHED if name not in MORE})


def reproduced(model: str, keys: Sequence[str]) -> list[str]:
    """Return columns of the paper's table on a demo."""
    report = _kept(f"reproduce_{model}", command="bash scripts/reproduce_MODEL.sh")
    return table_lines(report["rows"], keys)


def methods(model: str) -> list[str]:
    """Return the published methods; without the rows of other predictors, which the CSV has."""
    table = _kept(f"{model}_demo", command="bench_demo.py")["table"]
    rows: dict[str, Row] = {}
    for row in table:
        name = row["method"]
        is_extra = "velocity" in name or (
            "KV compression" in name and not name.startswith("FlowCache")
        )
        if not is_extra:
            own = {f"{key}_base": row.get(base_column(row, key)) for key in ("psnr", "ssim")}
            rows[escaped(name)] = {**row, **own}
    return lines_of("method", rows, METHODS)


def rules(model: str) -> list[str]:
    """Return the rules at the middle budget, and the plans at all; the CSV has every row."""
    shown = ("as tuned", "velocity + trend", PUBLISHED_PREDICTOR[model])
    rows: dict[str, Row] = {}
    for row in _rules(model).values():
        group = row["group"]
        is_plan = group is not None and (group["policy"], group["predictor"]) == PLAN
        is_middle = group is not None and group["level"] == "mid" and group["predictor"] in shown
        if is_plan or is_middle or row["method"] == BASE[model]:
            rows[escaped(row["method"])] = row
    return lines_of("method", rows, RULES)


def claims(model: str) -> list[str]:
    """Return what `bench_demo.py` says of its table."""
    report = _kept(f"{model}_reuse", command="bench_demo.py --table reuse")
    return [f"- {escaped(claim)}" for claim in report["claims"]]


def measured(model: str) -> list[str]:
    """Return what the front page shows: five ways at the middle budget."""
    table, predictor = _rules(model), PUBLISHED_PREDICTOR[model]
    rows = {
        "every step computed": table[BASE[model]],
        "TeaCache": table[f"TeaCache (mid), {predictor}"],
        "FlowCache-fast, as published": table[f"FlowCache-fast, {predictor}"],
        "even spacing, velocity + trend": table["stride (mid), velocity + trend"],
        "**planned**": table["planned (mid), as tuned"],
    }
    return lines_of(f"{TITLES[model]} demo", rows, FRONT)


def presets(model: str) -> list[str]:
    """Return what a model's own page shows."""
    table, predictor = _rules(model), PUBLISHED_PREDICTOR[model]
    rows = {
        "none": table[BASE[model]],
        "FlowCache-fast, as published": table[f"FlowCache-fast, {predictor}"],
        "planned, of the same FLOPs": table["planned (mid), as tuned"],
    }
    return lines_of("reuse", rows, PRESETS)


def modes(model: str) -> list[str]:
    """Return the judge's shares by mode and preset."""
    groups = _kept(f"{model}_judge", command="judge_demo.py --make")["groups"]
    rows = {f"{group['mode']}, {group['preset']}": group for group in groups}
    return lines_of("mode, preset", rows, JUDGED)


def training(model: str) -> list[str]:
    """Return how a demo was trained, from its record."""
    folder = load_model(model).find("demo").folder
    assert folder is not None
    record = read_json(folder / RECORD, advice="make it with train_demo.py")
    sizes = ", ".join(
        f"{name.replace('_', ' ')} {count / 1e6:.2f} M"
        for name, count in record["num_parameters"].items()
    )
    rows = {"command": f"`{record['command']}`", "parameters": sizes}
    rows |= {
        name.replace("_", " "): f"{stage['steps']:,} steps, {stage['seconds'] / 60:.0f} min, "
        f"final loss {stage['final_loss']:g}"
        for name, stage in record.items()
        if isinstance(stage, dict) and "final_loss" in stage
    }
    rows["VAE on unseen clips"] = f"{record['vae_psnr_db_on_unseen_clips']:g} dB"
    if record["note"]:
        rows["note"] = escaped(record["note"])
    return ["| | |", "|---|---|", *(table_row([name, value]) for name, value in rows.items())]


PLAN = ("planned", "as tuned")
TABLES: Mapping[str, Callable[[str], list[str]]] = {
    "published": published,
    "paper": paper,
    "measured": measured,
    "presets": presets,
    "methods": methods,
    "rules": rules,
    "claims": claims,
    "modes": modes,
    "training": training,
    "cost": lambda model: reproduced(model, COST),
    "quality": lambda model: reproduced(model, QUALITY),
}
"""Name in a page -> what returns its lines."""
COST = ("pflops", "latency_seconds", "speedup", "dit_speedup", "reused_share")
QUALITY = ("ssim", "psnr")


def _rules(model: str) -> dict[str, Row]:
    table = _kept(f"{model}_reuse", command="bench_demo.py --table reuse")["table"]
    return {row["method"]: row for row in table}


def _kept(name: str, *, command: str) -> dict[str, Any]:
    return read_json(BENCH / f"{name}.json", advice=f"make it with {command}")
