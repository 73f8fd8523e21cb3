"""Whether the table of reuse rules keeps what is claimed of tuned plans.

Only plans with the predictor of their profile are looked at, one per budget, so that no best one is
picked from many after the fact.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowcache.bench.reuse import AS_TUNED, FAITHFUL, TUNED

MORE_DECIBEL = 6.0
"""At FlowCache-fast's FLOPs, a plan's PSNR is to be better by this."""
MOST_FLOPS = 0.6
"""Of FlowCache-fast's, for the same PSNR."""
SAME_FLOPS = 1.005
"""What counts as FlowCache-fast's FLOPs at most."""
Row = Mapping[str, Any]


def claims(table: Sequence[Row]) -> list[str]:
    """Say of each claim whether it holds and by what figures; [] without the rows for it."""
    fast = next((row for row in table if row["method"].startswith(f"{FAITHFUL}, ")), None)
    plans = [
        row
        for row in table
        if row["group"] is not None
        and (row["group"]["policy"], row["group"]["predictor"]) == (TUNED, AS_TUNED)
    ]
    if fast is None or not plans:
        return []
    return [
        _better_at_same_cost(plans, fast),
        _cheaper_at_same_quality(plans, fast),
        _faster(plans, fast),
    ]


def _better_at_same_cost(plans: Sequence[Row], fast: Row) -> str:
    claim = (
        f"at {FAITHFUL}'s FLOPs at least {MORE_DECIBEL:g} dB more PSNR, and judge accuracy no lower"
    )
    best = _best(plans, fast, share=SAME_FLOPS)
    if best is None:
        return f"{claim}: not decided, no plan has so few FLOPs"
    gain = _decibel(best) - _decibel(fast)
    accuracy, other = best["judge_accuracy"], fast["judge_accuracy"]
    holds = gain >= MORE_DECIBEL and accuracy >= other
    return (
        f"{claim}: {_holds(holds)} ({best['method']}: {gain:+.2f} dB, judge {100 * accuracy:.0f} % "
        f"against {100 * other:.0f} %, {_cost(best, fast):.0f} % of the FLOPs)"
    )


def _cheaper_at_same_quality(plans: Sequence[Row], fast: Row) -> str:
    claim = f"the same PSNR at no more than {100 * MOST_FLOPS:.0f} % of {FAITHFUL}'s FLOPs"
    best = _best(plans, fast, share=MOST_FLOPS)
    if best is None:
        return f"{claim}: not decided, no plan has so few FLOPs"
    gain = _decibel(best) - _decibel(fast)
    return (
        f"{claim}: {_holds(gain >= 0)} ({best['method']}: {gain:+.2f} dB at "
        f"{_cost(best, fast):.0f} % of the FLOPs)"
    )


def _faster(plans: Sequence[Row], fast: Row) -> str:
    best = _best(plans, fast, share=SAME_FLOPS) or plans[0]
    return (
        f"DiT seconds: {best['method']} {best['dit_seconds']:.2f}, "
        f"{FAITHFUL} {fast['dit_seconds']:.2f}, every step "
        f"{best['dit_seconds'] * best['speedup_base']:.2f}"
    )


def _best(plans: Sequence[Row], fast: Row, *, share: float) -> Row | None:
    """Return the plan with the highest PSNR among those of at most this share of the FLOPs."""
    cheap = [plan for plan in plans if plan["gflops"] <= share * fast["gflops"]]
    return max(cheap, key=_decibel, default=None)


def _decibel(row: Row) -> float:
    """Return the PSNR against every step; that of clips which are all equal is infinite."""
    return math.inf if row["psnr_base"] is None else row["psnr_base"]


def _cost(row: Row, fast: Row) -> float:
    return 100 * row["gflops"] / fast["gflops"]


def _holds(is_kept: bool) -> str:
    return "holds" if is_kept else "DOES NOT HOLD"
