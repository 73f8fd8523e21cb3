"""One fair table: every rule at three budgets, from one engine, on one machine.

The budgets are the FLOPs of FlowCache-slow, of FlowCache-fast, and half of the latter. Every row is
compared with the run of the same attention and passes that computes every step. The noise row is
that run from noise that differs by a thousandth: no rule needs to come nearer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowcache.bench.continuity import EDGE_SHARE
from flowcache.bench.methods import Comparison, Method, shown, summarize
from flowcache.bench.quantized import NOISE
from flowcache.bench.reuse import (
    NAMES,
    OWN_PROFILES,
    SAME_FLOPS,
    TREND,
    TUNED,
    Budgets,
    RowMaker,
    profile_next_to,
    rule_names,
)
from flowcache.runtime.metrics import average
from flowcache.runtime.text_files import escaped, table_row
from flowcache.tuning.methods import AS_TUNED

SLOW, FAST, HALF = "slow", "fast", "half"
RIVAL_LEVELS = (SLOW, FAST, HALF)
MOTION = "motioncache"
"""Rule and preset of MotionCache."""
MORE_DECIBEL, MORE_THAN_RIVALS = 10.0, 3.0
"""At FlowCache-fast's FLOPs, our best plan is to be better by this than FlowCache as published, and
than the best rule of others."""
OWN = (TUNED, *OWN_PROFILES, "guarded", "stride")
"""Policies that are no rule of others; those of TRAC and AutoTarget improve our plans."""


def rival_rules(comparison: Comparison, presets: Path) -> list[str]:
    """Return the adaptive rules of a model; MotionCache where it has a preset."""
    has_motion = (presets / f"{MOTION}.yaml").is_file()
    return rule_names(comparison.words, [name for name in NAMES if name != MOTION or has_motion])


def rival_methods(
    comparison: Comparison, budgets: Budgets, folder: Path, *, rules: Sequence[str]
) -> tuple[Method, ...]:
    """Return the rows of the table.

    Args:
        folder: where the budgets' profiles are.
        rules: see `rival_rules`.
    """
    rows, computed = RowMaker(comparison, budgets, folder), comparison.computed
    base = computed[-1]
    noisy = replace(base, name=f"noise + {NOISE:g}", noise=NOISE, base=base.name)
    made = [*computed, noisy]
    for level in RIVAL_LEVELS:
        made += [rows.adaptive(rule, level, is_published=True) for rule in rules]
        # whose weights come from what a velocity has not
        trending = [rule for rule in rules if rule != MOTION]
        made += [rows.adaptive(rule, level, is_published=False) for rule in trending]
        made += [rows.stride(level), rows.profiled(TUNED, level, AS_TUNED)]
        for policy in OWN_PROFILES:
            if profile_next_to(folder / budgets.levels[level].profile, policy).is_file():
                made.append(rows.profiled(policy, level, AS_TUNED))
    return tuple(made)


# Table --------------------------------------------------------------------------------------------


def rival_table(
    rows: Sequence[Mapping[str, Any]], methods: Sequence[Method]
) -> list[dict[str, Any]]:
    """Average the figures of each method over the prompts, with their 95 % intervals."""
    table = summarize(rows, methods)
    for entry in table:
        own = [row for row in rows if row["method"] == entry["method"]]
        for key in ("psnr_base", "ssim_base", "drift", "seams"):
            over = average(row[key] for row in own if row.get(key) is not None)
            entry[key], entry[f"{key}_half_width"] = over.mean, over.half_width
        peaks = [row["peak_bytes"] for row in own if row.get("peak_bytes") is not None]
        entry["peak_bytes"] = max(peaks, default=None)
    best = -math.inf
    for entry in sorted(table, key=lambda entry: (entry["gflops"], -_decibel(entry))):
        entry["is_best"] = entry["group"] is not None and _decibel(entry) > best
        if entry["is_best"]:
            best = _decibel(entry)
    return table


def _decibel(entry: Mapping[str, Any]) -> float:
    """Return the PSNR of a row; clips that are all equal have none and mark no frontier."""
    return -math.inf if entry["psnr_base"] is None else entry["psnr_base"]


NOTES = (
    "FLOPs: share of those with every step computed, of the same attention and passes; a rule that "
    "cannot be set to its budget has those that come nearest",
    "PSNR and SSIM: against that run, ± half of their 95 % interval over the clips (Student's t)",
    f"drift: PSNR of the first {100 * EDGE_SHARE:g} % of the frames less that of the last; above 0 "
    "a clip gets worse",
    "seams: change from frame to frame at borders of chunks over that elsewhere, divided by the "
    "same ratio of that run; 1: the borders show no more",
    "peak: tensors on the GPU; - on a CPU, where methods share a process",
    "*: no cheaper rule is better",
)


def rival_markdown(
    table: Sequence[Mapping[str, Any]], published: Sequence["Published"] = ()
) -> str:
    """Return the averages as a Markdown table, with notes and, apart, the published figures."""
    head = ["method", "FLOPs", "GFLOP", "DiT s", "PSNR, dB", "SSIM", "judge"]
    head += ["drift, dB", "seams", "peak, bytes"]
    lines = [table_row(head), "|" + "---|" * len(head)]
    for row in table:
        is_equal = row["num_equal_base"] == row["num_clips"]
        cells = [
            f"{escaped(row['method'])}{' *' if row['is_best'] else ''}",
            f"{100 * row['flops_share']:.1f} %",
            f"{row['gflops']:.1f}",
            f"{row['dit_seconds']:.2f}",
            "equal" if is_equal else _with_interval(row, "psnr_base", ".2f"),
            _with_interval(row, "ssim_base", ".4f"),
            f"{100 * row['judge_accuracy']:.0f} %",
            shown(row["drift"], "+.2f"),
            shown(row["seams"], ".3f"),
            shown(row["peak_bytes"], ",d"),
        ]
        lines.append(table_row(cells))
    lines += ["", *(f"- {note}" for note in NOTES)]
    if published:
        heads = ["published", "source", "PFLOPs", "seconds", "speed-up", "VBench", "PSNR", "SSIM"]
        lines += ["", table_row(heads), "|" + "---|" * len(heads)]
        lines += [table_row(each.cells()) for each in published]
    return "\n".join(lines) + "\n"


def _with_interval(row: Mapping[str, Any], key: str, spec: str) -> str:
    width = row[f"{key}_half_width"]
    return shown(row[key], spec) + ("" if width is None else f" ± {width:{spec}}")


def rival_claims(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say how far our best plan is from FlowCache and from the best rule of others, at its FLOPs.

    A rule has FlowCache-fast's FLOPs if it has no more than half a per cent above them.
    """
    rules = [row for row in table if row["group"] is not None and row["psnr_base"] is not None]
    is_fast = {"policy": "FlowCache", "level": FAST}.items()
    fast = next(
        (
            row
            for row in rules
            if is_fast <= row["group"].items() and row["group"]["predictor"] != TREND
        ),
        None,
    )
    if fast is None:
        return []

    def best(limit: float, *, is_ours: bool) -> Mapping[str, Any] | None:
        chosen = [
            row
            for row in rules
            if row["gflops"] <= limit * SAME_FLOPS and (row["group"]["policy"] in OWN) == is_ours
        ]
        return max(chosen, key=lambda row: row["psnr_base"], default=None)

    lines: list[str] = []
    ours, theirs = best(fast["gflops"], is_ours=True), best(fast["gflops"], is_ours=False)
    for name, other, gain in (
        ("FlowCache-fast as published", fast, MORE_DECIBEL),
        ("the best rule of others", theirs, MORE_THAN_RIVALS),
    ):
        if ours is not None and other is not None:
            more = ours["psnr_base"] - other["psnr_base"]
            is_true = more >= gain and ours["judge_accuracy"] >= other["judge_accuracy"]
            lines.append(
                f"at FlowCache-fast's FLOPs at least {gain:g} dB above {name}, judge not lower: "
                f"{'holds' if is_true else 'DOES NOT HOLD'} ({ours['method']}: {more:+.2f} dB, "
                f"judge {100 * ours['judge_accuracy']:.0f} % against "
                f"{100 * other['judge_accuracy']:.0f} %, over {other['method']})"
            )
    half = best(fast["gflops"] / 2, is_ours=True)
    if half is not None:
        more = half["psnr_base"] - fast["psnr_base"]
        lines.append(
            "at half of FlowCache-fast's FLOPs at least its PSNR: "
            f"{'holds' if more >= 0 else 'DOES NOT HOLD'} ({half['method']}: {more:+.2f} dB)"
        )
    return lines


def figure_rows(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rules of a table as `flowcache.report.figures.draw_rivals` takes them."""
    return [
        {
            **{key: row["group"][key] for key in ("policy", "predictor")},
            "method": row["method"],
            "flops": row["flops_share"],
            "psnr": row["psnr_base"],
        }
        for row in table
        if row["group"] is not None
    ]


def frontier(table: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return the rules that no cheaper one beats, as (share of the FLOPs, PSNR in dB)."""
    return [(row["flops_share"], row["psnr_base"]) for row in table if row["is_best"]]


# Published figures --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """What authors report, on their machine and model; never to be compared with ours by number."""

    rule: str
    source: str
    pflops: float | None = None
    seconds: float | None = None
    speedup: float | None = None
    vbench: float | None = None
    psnr: float | None = None
    ssim: float | None = None

    def cells(self) -> list[str]:
        """Return the cells of its row."""
        return [
            escaped(self.rule),
            self.source,
            shown(self.pflops, "g"),
            shown(self.seconds, "g"),
            "-" if self.speedup is None else f"{self.speedup:.2f}x",
            shown(self.vbench, ".2f"),
            shown(self.psnr, ".2f"),
            shown(self.ssim, ".4f"),
        ]


_FLOWCACHE, _MOTION = "FlowCache, arXiv 2602.10825", "MotionCache, arXiv 2605.01725"
_FAST_AR = "FAST-AR, arXiv 2602.01801"
PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    "skyreels_v2": (
        Published("Vanilla", _FLOWCACHE, 113, 1540, 1.0, 83.84),
        Published("TeaCache-slow", _FLOWCACHE, 58, 814, 1.89, 82.67, 21.96, 0.7501),
        Published("TeaCache-fast", _FLOWCACHE, 49, 686, 2.20, 80.06, 18.39, 0.6121),
        Published("FlowCache-slow", _FLOWCACHE, 36, 262, 5.88, 83.12, 23.74, 0.7890),
        Published("FlowCache-fast", _FLOWCACHE, 28, 230, 6.70, 83.05, 22.95, 0.7635),
        Published("MotionCache-slow", _MOTION, 30, 245, 6.28, 82.84, 23.46, 0.9093),
        Published("MotionCache-fast", _MOTION, 26, 212, 7.26, 82.75, 21.78, 0.8723),
        Published("TempCache", _FAST_AR, 11, 146, 10.5, 83.82, 23.99, 0.8020),
        Published("ARCache-slow", "ARCache, CVPR 2026", None, None, 1.53, None, 29.10, 0.8835),
        Published("ARCache-fast", "ARCache, CVPR 2026", None, None, 1.87, None, 25.70),
        Published("SCOPE", "SCOPE, arXiv 2604.02979", None, None, 4.73),
    ),
    "magi1": (
        Published("Vanilla", _FLOWCACHE, 306, 2873, 1.0, 77.06),
        Published("TeaCache-slow", _FLOWCACHE, 294, 2579, 1.12, 77.50, 13.26, 0.2801),
        Published("TeaCache-fast", _FLOWCACHE, 225, 1998, 1.44, 70.11, 8.94, 0.1138),
        Published("FlowCache-slow", _FLOWCACHE, 161, 1546, 1.86, 78.96, 22.34, 0.6497),
        Published("FlowCache-fast", _FLOWCACHE, 140, 1209, 2.38, 77.93, 19.27, 0.5140),
        Published("MotionCache-slow, 168 frames", _MOTION, 100, 925, 1.64, 77.25, 19.71, 0.7231),
        Published("MotionCache-fast, 168 frames", _MOTION, 64, 733, 2.07, 74.59, 17.70, 0.5600),
        Published("TempCache", _FAST_AR, 110, 1009, 2.85, 78.99, 23.12, 0.6555),
        Published("SCOPE", "SCOPE, arXiv 2604.02979", None, None, 2.55),
    ),
}
"""By model; all on one A800 but where a source says otherwise."""
