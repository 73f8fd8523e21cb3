"""Quality against computation of all reuse rules."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from benchmark.reuse import NAMES, TREND, TUNED
from explain_page.markup import element, number
from explain_page.plot import BOTTOM, LEFT, RIGHT, TOP, Axis, plot, text
from tuning.methods import AS_TUNED, TRENDS, VELOCITY

from figures.drawing import Rows, document, placed, read_table, whole_axis
from flowcache.errors import UserError

WIDTH, HEIGHT, HEAD = 920.0, 460.0, 62.0
LEGEND_WIDTH = 250.0
SIZE = 6.0
"""Half the size of a mark in CSS pixels."""
LABEL_GAP = 15.0
"""Least distance of two labels, CSS pixels."""
EXAMPLE = "python scripts/bench_demo.py --table reuse"
MOVED = (AS_TUNED, TREND, *(name for name, settings in TRENDS.items() if settings != VELOCITY))
COLOURS: Mapping[str, tuple[str, str]] = {
    "content": ("#4a6572", "#9fb6c1"),
    "magcache": ("#7a6400", "#e3cf57"),
    "planned": ("#a0337f", "#f08bcf"),
}
"""Of light and dark pages, for the rules that no other figure has."""
FRONT = "stroke:var(--planned);fill:none;stroke-width:1.5"
_UP, _DOWN = ((-1, 0.8), (1, 0.8), (0, -1)), ((-1, -0.8), (1, -0.8), (0, 1))
_SQUARE = ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
_DIAMOND = ((0, -1.15), (1.15, 0), (0, 1.15), (-1.15, 0))
_STAR = tuple(
    (radius * math.sin(i * math.pi / 5), -radius * math.cos(i * math.pi / 5))
    for i, radius in enumerate((1.4, 0.6) * 5)
)


@dataclass(frozen=True)
class Look:
    """How the rows of a policy are drawn."""

    colour: str
    corners: Sequence[tuple[float, float]]
    """Of its mark, in units of `SIZE`; none: a circle."""


LOOKS: Mapping[str, Look] = {
    TUNED: Look("planned", _STAR),
    "guarded": Look("planned", _DIAMOND),
    "stride": Look("stride", _SQUARE),
    NAMES["magcache"]: Look("magcache", _DOWN),
    NAMES["teacache"]: Look("teacache", _UP),
    NAMES["flowcache"]: Look("flowcache", ()),
    NAMES["content"]: Look("content", _DIAMOND),
}


@dataclass(frozen=True)
class Point:
    """One row that reuses, as it is drawn."""

    name: str
    policy: str
    predictor: str
    share: float
    """FLOPs of those of every step, per cent."""
    decibel: float
    """PSNR against the same attention and passes with every step computed."""
    error: float
    """Standard error of that over the clips; 0 where it is unknown."""

    @property
    def is_moved(self) -> bool:
        """Tell whether what is reused is extrapolated."""
        return self.predictor in MOVED


def read_points(path: Path) -> list[Point]:
    """Return the rows of a table that reuse and whose PSNR is known.

    Raises:
        UserError: the table is missing, broken, or holds no such row.
    """
    points = read_table(path, _points, command=EXAMPLE)
    if not points:
        raise UserError(f"{path}: no rule reuses anything: nothing to draw")
    return points


def draw_reuse(path: Path, *, model: str) -> str:
    """Return the drawing of a table of `bench_demo.py --table reuse`.

    Raises:
        UserError: the table is missing or broken.
    """
    return draw_points(read_points(path), title=f"{model} demo: reuse rules at three budgets")


def draw_tuning(table: Rows, front: Sequence[tuple[float, float]], *, model: str) -> str:
    """Return the drawing of the table with which `tune.py` checks a plan.

    Args:
        table: of `tuning.table`.
        front: what the calibration expects of each number of computed steps, as (share of the
            FLOPs, PSNR in dB).

    Raises:
        UserError: no row differs from every step computed.
    """
    points = [
        Point(row["method"], row["policy"], row["predictor"], 100 * row["flops"], row["psnr"], 0.0)
        for row in table
        if row["psnr"] is not None
    ]
    if not points:
        raise UserError("all methods make the same frames: nothing to draw")
    expected = [(100 * share, decibel) for share, decibel in front]
    return draw_points(points, title=f"{model}: quality against computation", front=expected)


def draw_points(
    points: Sequence[Point], *, title: str, front: Sequence[tuple[float, float]] = ()
) -> str:
    """Return a drawing of PSNR against FLOPs.

    Args:
        front: (share of the FLOPs in per cent, PSNR in dB) of a line behind the points; what lies
            beyond them is left out.
    """
    x = whole_axis(
        "FLOPs of the transformer, % of those with every step computed",
        [point.share for point in points],
        (LEFT, WIDTH - LEGEND_WIDTH - RIGHT),
        margin=2,
    )
    ends = [point.decibel + sign * point.error for point in points for sign in (-1, 1)]
    y = whole_axis("PSNR, dB", ends, (HEIGHT - BOTTOM, TOP), margin=1)
    seen = [
        (share, decibel)
        for share, decibel in front
        if x.low <= share <= x.high and y.low <= decibel <= y.high
    ]
    marks = [*_front(seen, x, y), *_lines(points, x, y), *_bars(points, x, y)]
    marks += [*_marks(points, x, y), *_labels(points, x, y)]
    chart = plot(x, y, marks=marks, label="every rule")
    bars = "; bars: its standard error" if any(point.error for point in points) else ""
    return document(
        text(title, x=24, y=28, class_="title"),
        text(
            f"PSNR against every step computed with the same attention and passes{bars}", x=24, y=50
        ),
        placed(chart, 0, HEAD),
        *_legend(points, x=WIDTH - LEGEND_WIDTH + 20, y=HEAD + 30, has_front=bool(seen)),
        width=WIDTH,
        height=HEAD + HEIGHT + 10,
        label=f"{title}: PSNR of {len(points)} rows against their FLOPs",
        colours=COLOURS,
    )


def _points(table: Rows) -> list[Point]:
    return [_point(row) for row in table if row["group"] and row["psnr_base"] is not None]


def _point(row: Mapping[str, Any]) -> Point:
    group = row["group"]
    return Point(
        name=row["method"],
        policy=group["policy"],
        predictor=group["predictor"],
        share=100 * row["flops_share"],
        decibel=row["psnr_base"],
        error=row["psnr_error_base"] or 0.0,
    )


def _front(seen: Sequence[tuple[float, float]], x: Axis, y: Axis) -> list[Element]:
    if len(seen) < 2:
        return []
    path = "L".join(f"{number(x(across))} {number(y(up))}" for across, up in sorted(seen))
    return [element("path", d=f"M{path}", class_="dashed", style=FRONT)]


def _lines(points: Sequence[Point], x: Axis, y: Axis) -> list[Element]:
    """Join the budgets of a policy with the same predictor."""

    def family(point: Point) -> tuple[str, str]:
        return point.policy, point.predictor

    drawn: list[Element] = []
    for (policy, _), own in groupby(sorted(points, key=family), key=family):
        places = sorted((x(point.share), y(point.decibel)) for point in own)
        path = "L".join(f"{number(across)} {number(up)}" for across, up in places)
        style = f"stroke:var(--{LOOKS[policy].colour});fill:none;stroke-width:1.5;opacity:.55"
        drawn.append(element("path", d=f"M{path}", style=style))
    return drawn


def _bars(points: Sequence[Point], x: Axis, y: Axis) -> list[Element]:
    return [
        element(
            "line",
            x1=x(point.share),
            x2=x(point.share),
            y1=y(point.decibel - point.error),
            y2=y(point.decibel + point.error),
            style=f"stroke:var(--{LOOKS[point.policy].colour});opacity:.55",
        )
        for point in points
    ]


def _marks(points: Sequence[Point], x: Axis, y: Axis) -> list[Element]:
    drawn: list[Element] = []
    for point in points:
        tip = (
            f"{point.name}: {point.share:.1f} % of the FLOPs, {point.decibel:.2f} ± "
            f"{point.error:.2f} dB"
        )
        at = (x(point.share), y(point.decibel))
        drawn.append(_mark(LOOKS[point.policy], at, is_full=point.is_moved, tip=tip))
    return drawn


def _mark(look: Look, at: tuple[float, float], *, is_full: bool, tip: str | None) -> Element:
    x, y = at
    colour = f"var(--{look.colour})"
    style = f"stroke:{colour};stroke-width:2;fill:{colour if is_full else 'var(--page)'}"
    title = None if tip is None else element("title", tip)
    if not look.corners:
        return element("circle", title, cx=x, cy=y, r=SIZE, style=style)
    corners = "L".join(
        f"{number(x + SIZE * across)} {number(y + SIZE * up)}" for across, up in look.corners
    )
    return element("path", title, d=f"M{corners}Z", style=style)


def _labels(points: Sequence[Point], x: Axis, y: Axis) -> list[Element]:
    """Name the predictors of plans that are not as tuned, none over another one."""
    drawn: list[Element] = []
    last = -math.inf
    named = [point for point in points if point.policy == TUNED and not point.is_moved]
    for point in sorted(named, key=lambda point: y(point.decibel)):
        last = max(y(point.decibel), last + LABEL_GAP)
        drawn.append(text(point.predictor, x=x(point.share) + SIZE + 8, y=last + 4))
    return drawn


def _legend(points: Sequence[Point], *, x: float, y: float, has_front: bool) -> list[Element]:
    drawn: list[Element] = []
    present = {point.policy for point in points}
    for policy in (policy for policy in LOOKS if policy in present):
        drawn.append(_mark(LOOKS[policy], (x, y), is_full=True, tip=None))
        name = "stride: even spacing" if policy == "stride" else policy
        drawn.append(text(name, x=x + 16, y=y + 4, class_="name"))
        y += 24
    y += 12
    meanings = ((True, "velocity along its trend"), (False, "as published, or as named"))
    for is_full, meaning in meanings:
        drawn.append(_mark(LOOKS[NAMES["flowcache"]], (x, y), is_full=is_full, tip=None))
        drawn.append(text(meaning, x=x + 16, y=y + 4))
        y += 24
    if has_front:
        drawn.append(element("path", d=f"M{x - 8} {y}h16", class_="dashed", style=FRONT))
        drawn.append(text("plans, as calibration expects", x=x + 16, y=y + 4))
    return drawn
