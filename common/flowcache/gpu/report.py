"""The table of all methods, and which of the project's targets they meet."""

from collections.abc import Mapping, Sequence
from typing import Any

from flowcache.gpu.benchmark import Benchmark, Target, load_benchmark
from flowcache.runtime.stats import scaled
from flowcache.runtime.text_files import csv_of, escaped, table_row

Row = Mapping[str, Any]
HEAD = (
    *("method", "FLOPs", "s end to end", "latency speed-up", "of matrix product"),
    *("attention / linears / other", "caching", "outside DiT", "peak memory", "measured"),
)
KINDS = ("attention", "linears", "other")


def judged(benchmark: Benchmark, rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Compare figures with their targets.

    Args:
        rows: by method.

    Returns: for each target what it says, its bound, the figure, whose it is, and whether it is
        met; None: the figure was not measured.
    """
    good, lean = _with_speedups(benchmark, rows), {m.name for m in benchmark.methods if m.is_lean}
    quick = [name for name in good if name not in lean]
    return [
        _judge(target, good, names=quick if target.method is None else [target.method])
        for target in benchmark.targets
    ]


def _with_speedups(benchmark: Benchmark, rows: Mapping[str, Row]) -> dict[str, Row]:
    good = {name: row for name, row in rows.items() if "error" not in row}
    base = good.get(benchmark.methods[0].name, {}).get("total_seconds")
    return {
        name: {**row, "speedup": None if base is None else base / row["total_seconds"]}
        for name, row in good.items()
    }


def _judge(target: Target, rows: Mapping[str, Row], *, names: Sequence[str]) -> dict[str, Any]:
    found = {
        name: rows[name][target.figure]
        for name in names
        if name in rows and rows[name][target.figure] is not None
    }
    verdict: dict[str, Any] = {
        "says": target.says,
        "figure": target.figure,
        "least": target.least,
        "most": target.most,
        "method": target.method,
        "value": None,
        "is_met": None,
    }
    if found:
        worst = min if target.least is not None else max
        method = worst(found, key=lambda name: found[name])
        value = found[method]
        is_met = value >= target.least if target.least is not None else value <= target.most
        verdict |= {"method": method, "value": value, "is_met": is_met}
    return verdict


def said(verdict: Mapping[str, Any], *, is_judged: bool) -> str:
    """Return one line about a target.

    Args:
        is_judged: whether the machine and the size are those that the targets are about.
    """
    side, sign = ("most", "<=") if verdict["least"] is None else ("least", ">=")
    bound = f"{verdict['says']} {sign} {_value(verdict, side)}"
    if verdict["value"] is None:
        return f"not measured: {bound}"
    word = "not judged" if not is_judged else "met" if verdict["is_met"] else "NOT met"
    return f"{word}: {bound}: {_value(verdict, 'value')} ({verdict['method']})"


def _value(verdict: Mapping[str, Any], key: str) -> str:
    value = verdict[key]
    if verdict["figure"] == "peak_bytes":
        return f"{value / 1e9:.1f} GB"
    if verdict["figure"] == "speedup":
        return f"{value:.2f}x"
    return f"{100 * value:.3g} %"


def markdown(document: Mapping[str, Any]) -> str:
    """Return everything that was measured as a page."""
    environment = document["environment"]
    lines = [
        f"# {document['name']}",
        "",
        f"{document['note']} Random weights; decisions made from the published curve of distances "
        "unless a row names a record. Made by:",
        "",
        "```bash",
        document["command"],
        "```",
        "",
        f"{environment['device']} ({environment['memory']}), driver {environment['driver']}, "
        f"torch {environment['packages']['torch']}, CUDA {environment['cuda']}, "
        f"commit {environment['commit']}.",
    ]
    for model, rows in document["models"].items():
        benchmark = load_benchmark(model)
        lines += ["", f"## {benchmark.title}", "", *_table(benchmark, rows), ""]
        is_judged = document["is_judged"]
        lines += [f"- {said(one, is_judged=is_judged)}" for one in judged(benchmark, rows)]
    return "\n".join(lines) + "\n"


def _table(benchmark: Benchmark, rows: Mapping[str, Row]) -> list[str]:
    good = _with_speedups(benchmark, rows)
    lines = [table_row(HEAD), f"|{'---|' * len(HEAD)}"]
    for method in benchmark.methods:
        if method.name in good:
            lines.append(table_row(_cells(escaped(method.name), good[method.name])))
        elif method.name in rows:
            error = escaped(rows[method.name]["error"])
            lines.append(table_row([escaped(method.name), error, *[""] * (len(HEAD) - 2)]))
    return lines


def _cells(name: str, row: Row) -> Sequence[str]:
    kinds = row["kinds"]
    measured = f"{row['measured_ticks']} of {row['num_ticks']} ticks"
    how = "whole" if row["factor"] == 1 else f"{measured}, scaled up, decoded apart"
    if row["compilation"] is not None and row["compilation"]["failure"] is not None:
        how += f", not compiled: {row['compilation']['failure']}".replace("|", "\\|")
    if "trace" in row:
        how += f", decisions of {row['trace']}"
    return (
        name,
        scaled(row["flops"], "FLOP"),
        f"{row['total_seconds']:.3g}",
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        _percent(row["rate_share"]),
        "-" if kinds is None else " / ".join(f"{100 * kinds[k]:.0f}" for k in KINDS) + " %",
        _percent(row["caching_share"]),
        _percent(row["exposed_share"]),
        scaled(row["peak_bytes"], "B"),
        how,
    )


def csv_text(document: Mapping[str, Any]) -> str:
    """Return every figure that is a number or a word, a row per model and method."""
    rows = [
        {"model": model, "method": method, **row}
        for model, methods in document["models"].items()
        for method, row in _with_speedups(load_benchmark(model), methods).items()
    ]
    names = dict.fromkeys(
        name
        for row in rows
        for name, value in row.items()
        if value is None or isinstance(value, (str, int, float))
    )
    return csv_of([names, *([row.get(name) for name in names] for row in rows)])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2g} %"
