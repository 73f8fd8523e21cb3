"""The figures of a clip, their averages over the prompts, and the table of these."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flowcache.bench.methods import REFERENCE, Method
from flowcache.runtime.text_files import escaped, table_row


def summarize(rows: Sequence[Mapping[str, Any]], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Average the figures of each method over the prompts."""
    by_method = {m: [row for row in rows if row["method"] == m.name] for m in methods}
    base_seconds = statistics.fmean(
        row["dit_seconds"] for row in rows if row["method"] == REFERENCE
    )
    table = [_average(method, own, base_seconds) for method, own in by_method.items()]
    bases = {row["method"]: row for row in table}
    return [_with_base(row, bases.get(row["base"] or row["method"], row)) for row in table]


def _with_base(row: dict[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Add cost and speed against the second method; one without it is compared with itself."""
    return {
        **row,
        "flops_share": row["gflops"] / base["gflops"],
        "speedup_base": base["dit_seconds"] / row["dit_seconds"],
    }


def _average(
    method: Method, rows: Sequence[Mapping[str, Any]], base_seconds: float
) -> dict[str, Any]:
    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if row.get(key) is not None]
        return statistics.fmean(values) if values else None

    seconds = statistics.fmean(row["dit_seconds"] for row in rows)
    return {
        "method": method.name,
        "preset": method.preset,
        "overrides": list(method.overrides),
        "base": method.base,
        "group": None if method.group is None else asdict(method.group),
        "num_clips": len(rows),
        "gflops": statistics.fmean(row["flops"] for row in rows) / 1e9,
        "computed_share": mean("computed_share"),
        "num_compressions": mean("num_compressions"),
        "dit_seconds": seconds,
        "speedup": base_seconds / seconds,
        "judge_accuracy": statistics.fmean(float(row["judge_all"]) for row in rows),
        "judge": {
            key: statistics.fmean(float(row["judge"][key]) for row in rows)
            for key in rows[0]["judge"]
        },
        **{f"{key}{of}": mean(f"{key}{of}") for of in ("", "_base") for key in ("psnr", "ssim")},
        **{f"psnr_error{of}": _standard_error(rows, f"psnr{of}") for of in ("", "_base")},
        **{f"num_equal{of}": _num_equal(rows, of) for of in ("", "_base")},
    }


def _standard_error(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the standard error of a mean over the clips; None for fewer than two."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _num_equal(rows: Sequence[Mapping[str, Any]], suffix: str) -> int:
    """Count the clips that equal what they are compared with; their PSNR is in no mean."""
    key = f"psnr{suffix}"
    return sum(key in row and row[key] is None for row in rows)


def markdown(table: Sequence[Mapping[str, Any]], *, base_label: str) -> str:
    """Return the averages as a Markdown table."""
    lines = [
        "| method | GFLOPs | computed | DiT s | speed-up | judge | PSNR | SSIM "
        f"| PSNR ({base_label}) | SSIM ({base_label}) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        cells: list[str] = [
            escaped(row["method"]),
            _shown(row["gflops"], ".0f"),
            _shown(100 * row["computed_share"], ".0f") + " %",
            _shown(row["dit_seconds"], ".2f"),
            _shown(row["speedup"], ".2f") + "x",
            _shown(100 * row["judge_accuracy"], ".0f") + " %",
        ]
        for of in ("", "_base"):
            is_equal = row[f"num_equal{of}"] == row["num_clips"]
            cells.append("equal" if is_equal else _shown(row[f"psnr{of}"], ".2f"))
            cells.append(_shown(row[f"ssim{of}"], ".3f"))
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


def reuse_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the averages of the table of reuse rules, for the README.

    FLOPs share, speed-up, PSNR and SSIM are against the row of the same attention and passes that
    computes every step; the last column is against vanilla.
    """
    attributes = list(table[0]["judge"])
    head = ["method", "FLOPs", "GFLOPs", "DiT s", "speed-up", "judge", *attributes]
    head += ["PSNR", "SSIM", "PSNR (vanilla)"]
    lines = [table_row(head), "|" + "---|" * len(head)]
    for row in table:
        is_equal = row["num_equal_base"] == row["num_clips"]
        error = "" if row["psnr_error_base"] is None else f" ± {row['psnr_error_base']:.2f}"
        decibel = "-" if row["psnr_base"] is None else f"{row['psnr_base']:.2f}{error}"
        cells = [
            escaped(row["method"]),
            f"{100 * row['flops_share']:.1f} %",
            f"{row['gflops']:.1f}",
            f"{row['dit_seconds']:.2f}",
            f"{row['speedup_base']:.2f}x",
            *(
                f"{100 * share:.0f} %"
                for share in (row["judge_accuracy"], *(row["judge"][key] for key in attributes))
            ),
            "equal" if is_equal else decibel,
            _shown(row["ssim_base"], ".3f"),
            _shown(row["psnr"], ".2f"),
        ]
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


def _shown(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
