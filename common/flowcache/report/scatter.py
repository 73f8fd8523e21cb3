"""Quality against computation: the methods of `bench_demo.py`, and all reuse rules."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

from flowcache.errors import UserError
from flowcache.report.drawing import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    element,
    number,
    plot,
    polyline,
    text,
)
from flowcache.report.figures import Rows, document, placed
from flowcache.runtime.files import read_json

HEAD, LEGEND_WIDTH, LINE = 62.0, 250.0, 24.0
SIZE = 6.0
"""Half the size of a mark in CSS pixels."""
LABEL_GAP = 15.0
"""Least distance of two labels, CSS pixels."""
METHOD = re.compile(
    r"(FlowCache|TeaCache|stride)(?:-(slow|fast)|, (causal|neither pass))?(?![-\w])"
)
TUNED = "planned"
EXTRAPOLATED = ("as tuned", "velocity + trend", "velocity + 0.5")
"""Predictors, as tables name them, that move what is reused along its trend."""
FRONT = "stroke:var(--planned);fill:none;stroke-width:1.5"
CORNERS: Mapping[str, Sequence[tuple[float, float]]] = {
    "up": ((-1, 0.8), (1, 0.8), (0, -1)),
    "down": ((-1, -0.8), (1, -0.8), (0, 1)),
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "diamond": ((0, -1.15), (1.15, 0), (0, 1.15), (-1.15, 0)),
    "star": tuple(
        (radius * math.sin(i * math.pi / 5), -radius * math.cos(i * math.pi / 5))
        for i, radius in enumerate((1.4, 0.6) * 5)
    ),
}
"""Of marks that are polygons, in units of `SIZE`."""


class Look(NamedTuple):
    """How the rows of a policy are drawn: a shape of `CORNERS`, or a circle, box or triangle."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Point:
    """One row of a table that reuses, as it is drawn."""

    policy: str
    share: float
    """FLOPs of those with every step computed, per cent."""
    decibel: float
    """PSNR against the same attention, passes and KV cache with every step computed."""
    label: str
    """How a method differs from others of its policy; the predictor of a rule."""
    is_filled: bool
    """The velocity is reused, not what was published; of a rule: it is extrapolated."""
    name: str = ""
    error: float = 0.0
    """Standard error of the PSNR over the clips; 0 where it is unknown."""
    is_compressed: bool = False


@dataclass(frozen=True)
class Table:
    """A kind of table, and how it is drawn."""

    row: str
    command: str
    """Makes the table."""
    x_name: str
    margin: int
    """Of the x axis beyond the points, per cent."""
    size: tuple[float, float]
    """Width, legend included, and height without the title, CSS pixels."""
    looks: Mapping[str, Look]
    """Of the policies as the table names them, in the order of the legend."""
    stride: str
    meanings: Mapping[str, bool]
    """Of marks -> whether they are filled."""
    colours: Mapping[str, tuple[str, str]]
    """On light and on dark pages, of policies that no other figure has."""


METHODS = Table(
    "method",
    "python scripts/bench_demo.py",
    x_name="FLOPs of the transformer, % of vanilla",
    margin=4,
    size=(880.0, 400.0),
    looks={
        "FlowCache": Look("flowcache", "circle"),
        "TeaCache": Look("teacache", "triangle"),
        "stride": Look("stride", "box"),
    },
    stride="every n-th step",
    meanings={"reuses what was published": False, "reuses the velocity": True},
    colours={},
)
RULES = Table(
    "rule",
    "python scripts/bench_demo.py --table reuse",
    x_name="FLOPs of the transformer, % of those with every step computed",
    margin=2,
    size=(920.0, 460.0),
    looks={
        TUNED: Look("planned", "star"),
        "guarded": Look("planned", "diamond"),
        "stride": Look("stride", "square"),
        "MagCache": Look("magcache", "down"),
        "TeaCache": Look("teacache", "up"),
        "FlowCache": Look("flowcache", "circle"),
        "FlowCache, content signal": Look("content", "diamond"),
    },
    stride="even spacing",
    meanings={"velocity along its trend": True, "as published, or as named": False},
    colours={
        "content": ("#4a6572", "#9fb6c1"),
        "magcache": ("#7a6400", "#e3cf57"),
        "planned": ("#a0337f", "#f08bcf"),
    },
)


def _mark(
    look: Look, at: tuple[float, float], *, is_filled: bool = True, tip: str | None = None
) -> Element:
    """Draw the mark of a row or of a legend: filled, or with the page's colour inside."""
    x, y = at
    colour = f"var(--{look.colour})"
    style = f"stroke:{colour};stroke-width:2;fill:{colour if is_filled else 'var(--page)'}"
    title = None if tip is None else element("title", tip)
    if look.shape == "circle":
        return element("circle", title, cx=x, cy=y, r=SIZE, style=style)
    if look.shape == "box":
        side = 1.8 * SIZE
        x, y = x - side / 2, y - side / 2
        return element("rect", title, x=x, y=y, width=side, height=side, style=style)
    if look.shape == "triangle":
        base = f"M{number(x - SIZE)} {number(y + 0.8 * SIZE)}H{number(x + SIZE)}"
        path = f"{base}L{number(x)} {number(y - SIZE)}Z"
    else:
        corners = CORNERS[look.shape]
        path = polyline([(x + SIZE * across, y + SIZE * up) for across, up in corners]) + "Z"
    return element("path", title, d=path, style=style)


def _underline(look: Look, at: tuple[float, float]) -> Element:
    (x, y), style = at, f"stroke:var(--{look.colour});stroke-width:2.5"
    low = y + SIZE + 4
    return element("line", x1=x - SIZE, x2=x + SIZE, y1=low, y2=low, style=style)


class _Chart:
    """Marks between axes; at the right a legend: the policies drawn, then meanings of marks."""

    def __init__(self, table: Table, points: Sequence[Point]) -> None:
        self.table, (self.width, self.height) = table, table.size
        shares = [point.share for point in points]
        ends = [point.decibel + sign * point.error for point in points for sign in (-1, 1)]
        low, high = math.floor(min(shares)) - table.margin, math.ceil(max(shares)) + table.margin
        x = Axis(table.x_name, low, high, LEFT, self.width - LEGEND_WIDTH - RIGHT)
        low, high = math.floor(min(ends)) - 1, math.ceil(max(ends)) + 1
        self.axes = x, Axis("PSNR, dB", low, high, self.height - BOTTOM, TOP)
        self.marks: list[Element] = []
        self._legend: list[Element] = []
        self.place = (self.width - LEGEND_WIDTH + 20, HEAD + 30)
        """Of the next line of the legend."""
        present = {point.policy for point in points}
        for policy, look in table.looks.items():
            if policy in present:
                name = f"stride: {table.stride}" if policy == "stride" else policy
                self.explain(name, _mark(look, self.place), class_="name")
        self.place = (self.place[0], self.place[1] + LINE / 2)
        for name, is_filled in table.meanings.items():
            self.explain(name, _mark(table.looks["FlowCache"], self.place, is_filled=is_filled))

    def at(self, point: Point) -> tuple[float, float]:
        """Return the place of a point."""
        x, y = self.axes
        return x(point.share), y(point.decibel)

    def add(self, point: Point, *, tip: str) -> None:
        """Draw a point; the tip shows when it is pointed at."""
        look = self.table.looks[point.policy]
        self.marks.append(_mark(look, self.at(point), is_filled=point.is_filled, tip=tip))

    def explain(self, name: str, *marks: Element, class_: str | None = None) -> None:
        """Add a line to the legend with marks that were drawn at `place`."""
        x, y = self.place
        self._legend += [*marks, text(name, x=x + 16, y=y + 4, class_=class_)]
        self.place = (x, y + LINE)

    def drawing(self, *, title: str, subtitle: str, label: str) -> str:
        """Return the whole drawing, with the title above the chart."""
        return document(
            text(title, x=24, y=28, class_="title"),
            text(subtitle, x=24, y=50),
            placed(plot(*self.axes, marks=self.marks, label=f"every {self.table.row}"), 0, HEAD),
            *self._legend,
            width=self.width,
            height=HEAD + self.height + 10,
            label=label,
            colours=self.table.colours,
        )


def draw_tradeoff(path: Path, *, model: str) -> str:
    """Return the drawing of a table of `bench_demo.py`."""
    points = read_methods(path)
    chart = _Chart(METHODS, points)
    for point in points:
        tip = (
            f"{point.policy} {point.label}: {point.share:.0f} % of the FLOPs, "
            f"{point.decibel:.1f} dB"
        )
        chart.add(point, tip=tip)
        look, (x, y) = METHODS.looks[point.policy], chart.at(point)
        if point.is_compressed:
            chart.marks.append(_underline(look, (x, y)))
        else:
            y += -SIZE - 5 if point.is_filled else SIZE + 13
            chart.marks.append(text(point.label, x=x, y=y, class_="middle"))
    if any(point.is_compressed for point in points):
        look, at = METHODS.looks["FlowCache"], chart.place
        chart.explain("with KV compression", _mark(look, at, is_filled=False), _underline(look, at))
    return chart.drawing(
        title=f"{model} demo: quality against computation",
        subtitle="PSNR against the same attention and passes with every step computed",
        label=f"{model} demo: PSNR of {len(points)} methods against their FLOPs",
    )


def read_methods(path: Path) -> list[Point]:
    """Return the rows of a table of `bench_demo.py` that reuse and whose PSNR is known."""

    def points_of(table: Rows) -> list[Point]:
        whole = next(row["gflops"] for row in table if row["method"] == "vanilla")
        found = [(row, METHOD.match(row["method"])) for row in table]
        return [
            Point(
                policy=name[1],
                share=100 * row["gflops"] / whole,
                decibel=row[base],
                label=name[2] or name[3] or "",
                is_filled="velocity" in row["method"],
                is_compressed="KV compression" in row["method"],
            )
            for row, name in found
            if name is not None and row[base := _base_column(row)] is not None
        ]

    return _read_table(path, METHODS, points_of)


def _base_column(row: Mapping[str, object]) -> str:
    """Name the column of the PSNR against the same attention and passes without reuse.

    A table of SkyReels-V2 may name the columns by method: there TeaCache-slow and -fast have full
    attention, as vanilla has, and all others causal attention.
    """
    if "psnr_base" in row:
        return "psnr_base"
    is_full = str(row["method"]).startswith("TeaCache-")
    return "psnr_vanilla" if is_full else "psnr_vanilla-causal"


def read_rules(path: Path) -> list[Point]:
    """Return the rows of a table of `bench_demo.py --table reuse` whose PSNR is known."""

    def points_of(table: Rows) -> list[Point]:
        return [
            _rule(
                row["method"],
                **{name: row["group"][name] for name in ("policy", "predictor")},
                share=100 * row["flops_share"],
                decibel=row["psnr_base"],
                error=row["psnr_error_base"] or 0.0,
            )
            for row in table
            if row["group"] and row["psnr_base"] is not None
        ]

    return _read_table(path, RULES, points_of)


def _rule(
    name: str, *, policy: str, predictor: str, share: float, decibel: float, error: float = 0.0
) -> Point:
    return Point(policy, share, decibel, predictor, predictor in EXTRAPOLATED, name, error)


def draw_reuse(path: Path, *, model: str) -> str:
    """Return the drawing of a table of `bench_demo.py --table reuse`."""
    return _draw_rules(read_rules(path), title=f"{model} demo: reuse rules at three budgets")


def draw_tuning(table: Rows, front: Sequence[tuple[float, float]], *, model: str) -> str:
    """Return the drawing of the table with which `tune.py` checks a plan.

    Args:
        front: what the calibration expects of each number of computed steps, as (share of the
            FLOPs, PSNR in dB).
    """
    points = [
        _rule(
            row["method"],
            policy=row["policy"],
            predictor=row["predictor"],
            share=100 * row["flops"],
            decibel=row["psnr"],
        )
        for row in table
        if row["psnr"] is not None
    ]
    if not points:
        raise UserError("all methods make the same frames: nothing to draw")
    expected = [(100 * share, decibel) for share, decibel in front]
    return _draw_rules(points, title=f"{model}: quality against computation", front=expected)


def _draw_rules(
    points: Sequence[Point], *, title: str, front: Sequence[tuple[float, float]] = ()
) -> str:
    """Draw rules; of the front, a line behind the points, what lies beyond them is left out."""
    chart = _Chart(RULES, points)
    x, y = chart.axes
    seen = [
        (x(share), y(decibel))
        for share, decibel in sorted(front)
        if x.low <= share <= x.high and y.low <= decibel <= y.high
    ]
    if len(seen) > 1:
        chart.marks.append(element("path", d=polyline(seen), class_="dashed", style=FRONT))
    if seen:
        key = f"M{chart.place[0] - 8} {chart.place[1]}h16"
        name = "plans, as calibration expects"
        chart.explain(name, element("path", d=key, class_="dashed", style=FRONT))
    chart.marks += _budget_lines(chart, points)
    for point in points:
        at, colour = x(point.share), RULES.looks[point.policy].colour
        low, high = y(point.decibel - point.error), y(point.decibel + point.error)
        style = f"stroke:var(--{colour});opacity:.55"
        chart.marks.append(element("line", x1=at, x2=at, y1=low, y2=high, style=style))
    for point in points:
        decibel = f"{point.decibel:.2f} ± {point.error:.2f} dB"
        chart.add(point, tip=f"{point.name}: {point.share:.1f} % of the FLOPs, {decibel}")
    chart.marks += _predictors(chart, points)
    bars = "; bars: its standard error" if any(point.error for point in points) else ""
    return chart.drawing(
        title=title,
        subtitle=f"PSNR against every step computed with the same attention and passes{bars}",
        label=f"{title}: PSNR of {len(points)} rows against their FLOPs",
    )


def _budget_lines(chart: _Chart, points: Sequence[Point]) -> list[Element]:
    """Join the budgets of a policy with the same predictor."""

    def rule(point: Point) -> tuple[str, str]:
        return point.policy, point.label

    drawn: list[Element] = []
    for (policy, _), group in groupby(sorted(points, key=rule), key=rule):
        style = f"stroke:var(--{RULES.looks[policy].colour});fill:none;stroke-width:1.5;opacity:.55"
        drawn.append(element("path", d=polyline(sorted(map(chart.at, group))), style=style))
    return drawn


def _predictors(chart: _Chart, points: Sequence[Point]) -> list[Element]:
    """Name the predictors of plans that are not as tuned, none over another one."""
    drawn: list[Element] = []
    last = -math.inf
    named = [point for point in points if point.policy == TUNED and not point.is_filled]
    for point in sorted(named, key=lambda point: chart.at(point)[1]):
        x, y = chart.at(point)
        last = max(y, last + LABEL_GAP)
        drawn.append(text(point.label, x=x + SIZE + 8, y=last + 4))
    return drawn


def _read_table(path: Path, table: Table, points_of: Callable[[Rows], list[Point]]) -> list[Point]:
    """Return the points that a function makes of the rows of a table; at least one."""
    try:
        points = points_of(read_json(path, advice=f"make it with {table.command}")["table"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, StopIteration):
        raise UserError(f"{path}: no table of {table.command}: make it again") from None
    if not points:
        raise UserError(f"{path}: no {table.row} reuses anything: nothing to draw")
    return points
