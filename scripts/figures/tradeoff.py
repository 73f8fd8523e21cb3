"""Quality against computation: every method that reuses, in one chart."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from explain_page.markup import element, number
from explain_page.plot import BOTTOM, LEFT, RIGHT, TOP, Axis, plot, text

from figures.drawing import Rows, document, placed, read_table, whole_axis
from flowcache.errors import UserError

WIDTH, HEIGHT, HEAD = 880.0, 400.0, 62.0
LEGEND_WIDTH = 250.0
SIZE = 6.0
"""Half the size of a mark in CSS pixels."""
POLICIES = ("FlowCache", "TeaCache", "stride")
NAME = re.compile(r"(FlowCache|TeaCache|stride)(?:-(slow|fast)|, (causal|neither pass))?(?![-\w])")
REFERENCE = "vanilla"
EXAMPLE = "python scripts/bench_demo.py"


@dataclass(frozen=True)
class Point:
    """One row of a table, as it is drawn."""

    policy: str
    variant: str
    """slow, fast, how it differs from those, or nothing."""
    has_velocity: bool
    """What is reused is the velocity, not what was published."""
    is_compressed: bool
    share: float
    """FLOPs of the transformer / those of vanilla, per cent."""
    decibel: float
    """PSNR against the same attention, passes and KV cache with every step computed."""


def read_points(path: Path) -> list[Point]:
    """Return the rows of a table that reuse and whose PSNR is known.

    Raises:
        UserError: the table is missing, broken, or holds no such row.
    """
    points = read_table(path, _points, command=EXAMPLE)
    if not points:
        raise UserError(f"{path}: no method reuses anything: nothing to draw")
    return points


def draw_tradeoff(path: Path, *, model: str) -> str:
    """Return the drawing of a table of `bench_demo.py`.

    Raises:
        UserError: the table is missing or broken.
    """
    points = read_points(path)
    x = whole_axis(
        "FLOPs of the transformer, % of vanilla",
        [point.share for point in points],
        (LEFT, WIDTH - LEGEND_WIDTH - RIGHT),
        margin=4,
    )
    y = whole_axis(
        "PSNR, dB", [point.decibel for point in points], (HEIGHT - BOTTOM, TOP), margin=1
    )
    marks = [mark for point in points for mark in _drawn(point, x, y)]
    chart = plot(x, y, marks=marks, label="every method")
    return document(
        text(f"{model} demo: quality against computation", x=24, y=28, class_="title"),
        text("PSNR against the same attention and passes with every step computed", x=24, y=50),
        placed(chart, 0, HEAD),
        *_legend(points, x=WIDTH - LEGEND_WIDTH + 20, y=HEAD + 30),
        width=WIDTH,
        height=HEAD + HEIGHT + 10,
        label=f"{model} demo: PSNR of {len(points)} methods against their FLOPs",
    )


def _points(table: Rows) -> list[Point]:
    whole = next(row["gflops"] for row in table if row["method"] == REFERENCE)
    return [point for row in table if (point := _point(row, whole)) is not None]


def _point(row: Mapping[str, Any], whole: float) -> Point | None:
    found = NAME.match(row["method"])
    decibel = None if found is None else _decibel(row)
    if found is None or decibel is None:
        return None
    return Point(
        policy=found[1],
        variant=found[2] or found[3] or "",
        has_velocity="velocity" in row["method"],
        is_compressed="KV compression" in row["method"],
        share=100 * row["gflops"] / whole,
        decibel=decibel,
    )


def _decibel(row: Mapping[str, Any]) -> float | None:
    """Return the PSNR against the same attention and passes without reuse.

    A table of SkyReels-V2 may name the columns by method: there TeaCache-slow and -fast have full
    attention, as vanilla has, and all others causal attention.
    """
    if "psnr_base" in row:
        return row["psnr_base"]
    is_full = row["method"].startswith("TeaCache-")
    return row["psnr_vanilla" if is_full else "psnr_vanilla-causal"]


def _drawn(point: Point, x: Axis, y: Axis) -> list[Element]:
    at = (x(point.share), y(point.decibel))
    tip = (
        f"{point.policy} {point.variant}: {point.share:.0f} % of the FLOPs, {point.decibel:.1f} dB"
    )
    drawn = [_mark(point.policy, at, is_full=point.has_velocity, tip=tip)]
    if point.is_compressed:
        drawn.append(_underline(point.policy, at))
    else:
        y_text = at[1] - SIZE - 5 if point.has_velocity else at[1] + SIZE + 13
        drawn.append(text(point.variant, x=at[0], y=y_text, class_="middle"))
    return drawn


def _mark(policy: str, at: tuple[float, float], *, is_full: bool, tip: str | None) -> Element:
    x, y = at
    colour = f"var(--{policy.lower()})"
    style = f"stroke:{colour};stroke-width:2;fill:{colour if is_full else 'var(--page)'}"
    title = None if tip is None else element("title", tip)
    if policy == "FlowCache":
        return element("circle", title, cx=x, cy=y, r=SIZE, style=style)
    if policy == "stride":
        side = 1.8 * SIZE
        return element(
            "rect", title, x=x - side / 2, y=y - side / 2, width=side, height=side, style=style
        )
    path = (
        f"M{number(x - SIZE)} {number(y + 0.8 * SIZE)}H{number(x + SIZE)}"
        f"L{number(x)} {number(y - SIZE)}Z"
    )
    return element("path", title, d=path, style=style)


def _underline(policy: str, at: tuple[float, float]) -> Element:
    x, y = at
    low = y + SIZE + 4
    style = f"stroke:var(--{policy.lower()});stroke-width:2.5"
    return element("line", x1=x - SIZE, x2=x + SIZE, y1=low, y2=low, style=style)


def _legend(points: Sequence[Point], *, x: float, y: float) -> list[Element]:
    drawn: list[Element] = []
    present = [policy for policy in POLICIES if any(p.policy == policy for p in points)]
    for policy in present:
        drawn.append(_mark(policy, (x, y), is_full=True, tip=None))
        name = "stride: every n-th step" if policy == "stride" else policy
        drawn.append(text(name, x=x + 16, y=y + 4, class_="name"))
        y += 24
    y += 12
    for is_full, meaning in ((False, "reuses what was published"), (True, "reuses the velocity")):
        drawn.append(_mark("FlowCache", (x, y), is_full=is_full, tip=None))
        drawn.append(text(meaning, x=x + 16, y=y + 4))
        y += 24
    if any(point.is_compressed for point in points):
        drawn.append(_mark("FlowCache", (x, y), is_full=False, tip=None))
        drawn.append(_underline("FlowCache", (x, y)))
        drawn.append(text("with KV compression", x=x + 16, y=y + 4))
    return drawn
