"""The comparison of all methods, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from flowcache.runtime.text_files import escaped
from flowcache.tune.methods import REFERENCE, Method
from flowcache.tune.rows import mean


def summarize(
    measured: Mapping[str, Sequence[Mapping[str, Any]]],
    methods: Sequence[Method],
    expected: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Average over the prompts, cheapest first; mark what nothing beats in cost and quality."""
    table: list[dict[str, Any]] = []
    base = mean(measured[REFERENCE], "seconds")
    for method in methods:
        rows = measured[method.name]
        finite = [row for row in rows if row["psnr"] is not None]
        table.append(
            {
                "method": method.name,
                "policy": method.policy,
                "predictor": method.predictor,
                "num_clips": len(rows),
                "computed": mean(rows, "computed"),
                "flops": mean(rows, "flops"),
                "seconds": mean(rows, "seconds"),
                "speedup": base / mean(rows, "seconds"),
                "psnr": mean(finite, "psnr") if finite else None,
                "predicted_psnr": expected.get(method.name),
            }
        )
    table.sort(key=lambda row: row["flops"])
    best = float("-inf")
    for row in table:
        row["is_best"] = row["psnr"] is None or row["psnr"] > best
        best = max(best, float("inf") if row["psnr"] is None else row["psnr"])
    return table


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the table; `*` marks a method that no cheaper one beats."""
    lines = [
        "| method | computed | FLOPs | DiT s | speed-up | PSNR | predicted | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        predicted, found = row["predicted_psnr"], row["psnr"]
        lines.append(
            f"| {escaped(row['method'])} "
            f"| {100 * row['computed']:.0f} % | {100 * row['flops']:.1f} % | "
            f"{row['seconds']:.2f} | {row['speedup']:.2f}x | "
            f"{'equal' if found is None else f'{found:.2f}'} | "
            f"{'' if predicted is None else f'{predicted:.2f}'} | {'*' if row['is_best'] else ''} |"
        )
    return "\n".join(lines) + "\n"
