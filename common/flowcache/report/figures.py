"""The pages' figures that are drawn from results: distances, growth, quality against cost.

Drawings have colours for light and for dark pages.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from flowcache.errors import UserError
from flowcache.report.drawing import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    Pair,
    circle,
    colour_of,
    curve,
    document,
    horizontal,
    interleaved,
    line,
    number,
    path,
    placed,
    plot,
    polyline,
    rectangle,
    text,
    vertical,
)
from flowcache.report.run import Row, Run, load_run
from flowcache.runtime.files import read_json

Rows = Sequence[Mapping[str, Any]]

PANEL_WIDTH, MARGIN = 430.0, 12.0


# Distances ----------------------------------------------------------------------------------------

DISTANCES_HEIGHT, DISTANCES_HEAD = 270.0, 62.0
CHUNK_STEP = 34.0


class Spread(NamedTuple):
    """How far the distances of one tick lie apart."""

    tick: int
    smallest: float
    largest: float

    @property
    def ratio(self) -> float:
        """Largest / smallest, dimensionless."""
        return self.largest / self.smallest


def draw_distances(record: Path, *, model: str) -> str:
    """Return the drawing of a record of a run that measured every chunk at every tick."""
    run = load_run(record, "A")
    curves, spread = curves_of(run), widest_spread(run)
    y = vertical("relative change", max(run.distances), height=DISTANCES_HEIGHT)
    title = f"{model} demo: change of each chunk's signal since the last tick"
    finding = (
        f"At tick {spread.tick} the active chunks change by {spread.smallest:.2g} to "
        f"{spread.largest:.2g}: {spread.ratio:.0f} times as much"
    )
    width = 2 * PANEL_WIDTH + 2 * MARGIN
    by_tick = _distance_panel(curves, y, "tick", spread)
    by_step = _distance_panel(curves, y, "own step of the chunk", None)
    return document(
        text(title, x=MARGIN + 12, y=28, class_="title"),
        text(finding, x=MARGIN + 12, y=50),
        *_chunk_keys(list(curves), stop=width - MARGIN - 12),
        placed(by_tick, MARGIN, DISTANCES_HEAD),
        placed(by_step, MARGIN + PANEL_WIDTH, DISTANCES_HEAD),
        width=width,
        height=DISTANCES_HEAD + DISTANCES_HEIGHT + MARGIN,
        label=f"{finding}; over their own steps all chunks have the same growing curve.",
        num_chunks=max(curves) + 1,
    )


def curves_of(run: Run) -> Mapping[int, Sequence[Row]]:
    """Return the measured rows of each chunk in the first window's first guidance pass."""
    curves: dict[int, list[Row]] = defaultdict(list)
    for row in run.of(run.panels[0]):
        if row.distance is not None and math.isfinite(row.distance):
            curves[row.chunk].append(row)
    return dict(sorted(curves.items()))


def widest_spread(run: Run) -> Spread:
    """Return the tick at which the distances of the active chunks lie farthest apart."""
    by_tick: dict[int, list[float]] = defaultdict(list)
    for rows in curves_of(run).values():
        for row in rows:
            by_tick[row.tick].append(row.distance or 0.0)
    spreads = (Spread(tick, min(found), max(found)) for tick, found in by_tick.items())
    return max((each for each in spreads if each.smallest > 0), key=lambda each: each.ratio)


def _distance_panel(
    curves: Mapping[int, Sequence[Row]], y: Axis, name: str, marked: Spread | None
) -> Element:
    """Draw a curve per chunk by ticks, one of them marked, or by own steps."""
    points = {
        chunk: [(row.tick if marked else row.step, row.distance or 0.0) for row in rows]
        for chunk, rows in curves.items()
    }
    x = horizontal(
        name, 0, max(at for each in points.values() for at, _ in each), width=PANEL_WIDTH
    )
    marks: list[Element] = []
    words: list[Element] = []
    if marked is not None:
        at = x(marked.tick)
        marks.append(line(at, at, y.start, y.stop, class_="axis dashed"))
        words.append(text(f"tick {marked.tick}", x=at - 6, y=y.stop + 12, class_="end halo"))
    for index, (chunk, own) in enumerate(points.items()):
        style = colour_of(chunk)
        if marked is None:  # the curves lie on one another
            style += interleaved(index, len(points))
        marks.append(path(curve(own, x, y), class_="curve", style=style))
    return plot(x, y, marks=[*marks, *words], label=f"distances by {name}")


def _chunk_keys(chunks: Sequence[int], *, stop: float) -> list[Element]:
    start = stop - CHUNK_STEP * len(chunks)
    drawn = [text("chunk", x=start - 8, y=50, class_="end")]
    for index, chunk in enumerate(chunks):
        x = start + CHUNK_STEP * index
        drawn.append(line(x, x + 12, 46, 46, class_="curve", style=colour_of(chunk)))
        drawn.append(text(str(chunk), x=x + 17, y=50))
    return drawn


# Growth -------------------------------------------------------------------------------------------

GROWTH_HEIGHT, GROWTH_HEAD, GROWTH_TITLE = 210.0, 84.0, 34.0
GROWTH_STYLES = {
    "all keys and values": "--c:var(--teacache)",
    "KV compression": "--c:var(--flowcache)",
    "windows of 97 frames": "--c:var(--stride)",
}
GROWTH_KEY_STEP = 190.0
GROWTH_COMMAND = "python scripts/bench_gpu.py --growth"


class Panel(NamedTuple):
    """One chart of each model."""

    part: str
    """`planned` or `measured`."""
    name: str
    column: str
    unit: float


GROWTH_PANELS = (
    Panel("planned", "KV cache, GB", "kv_bytes", 1e9),
    Panel("planned", "PFLOP per chunk", "flops_per_chunk", 1e15),
    Panel("measured", "CPU s per chunk", "seconds_per_chunk", 1.0),
)


def draw_growth(file: Path) -> str:
    """Return the drawing of a file of `bench_gpu.py --growth`."""
    found = read_json(file, advice="measure anew with --overwrite")
    drawn: list[Element] = []
    titles: list[Element] = []
    try:
        models = list(found["models"].values())
        for index, model in enumerate(models):
            left, top = MARGIN + index * PANEL_WIDTH, GROWTH_HEAD + GROWTH_TITLE
            titles.append(text(model["title"], x=left + 12, y=top - 12, class_="strong"))
            for place, panel in enumerate(GROWTH_PANELS):
                chart = _growth_chart(model[panel.part], panel)
                drawn.append(placed(chart, left, top + place * GROWTH_HEIGHT))
        names = list(models[0]["planned"])
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{file}: no result of {GROWTH_COMMAND}: make it again") from None
    note = (
        "planned at the released sizes; measured on the demos, processor time; every step computed"
    )
    keys: list[Element] = []
    for place, name in enumerate(names):
        x = MARGIN + 12 + place * GROWTH_KEY_STEP
        keys.append(line(x, x + 16, 72, 72, class_="curve", style=GROWTH_STYLES[name]))
        keys.append(text(name, x=x + 22, y=76))
    return document(
        text("Cost against the length of the video", x=MARGIN + 12, y=28, class_="title"),
        text(note, x=MARGIN + 12, y=50),
        *keys,
        *drawn,
        *titles,
        width=len(models) * PANEL_WIDTH + 2 * MARGIN,
        height=GROWTH_HEAD + GROWTH_TITLE + len(GROWTH_PANELS) * GROWTH_HEIGHT + MARGIN,
        label="Memory and time per chunk against the number of frames: flat with KV compression",
    )


def _growth_chart(lines: Mapping[str, Rows], panel: Panel) -> Element:
    points = {
        name: [(row["frames"], row[panel.column] / panel.unit) for row in rows]
        for name, rows in lines.items()
    }
    last, highest = (max(at[i] for each in points.values() for at in each) for i in (0, 1))
    where = "released size, planned" if panel.part == "planned" else "demo, measured"
    x = horizontal(f"frames ({where})", 0, last, width=PANEL_WIDTH)
    y = vertical(panel.name, highest, height=GROWTH_HEIGHT)
    marks = [
        path(curve(own, x, y), tip=name, class_="curve", style=GROWTH_STYLES[name])
        for name, own in points.items()
    ]
    return plot(x, y, marks=marks, label=f"{panel.name} by frames")


# Quality against computation ----------------------------------------------------------------------

HEAD, LEGEND_WIDTH, LINE = 62.0, 250.0, 24.0
SIZE = 6.0
"""Half the size of a mark in CSS pixels."""
LETTER_WIDTH, TEXT_HEIGHT = 6.9, 13.0
"""Of a label, CSS pixels; the width is a mean."""
LINE_PIECE = 5.0
"""Distance of the points of a line that labels keep clear of, CSS pixels."""
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
    colours: Mapping[str, Pair] = field(default_factory=dict)
    """Of policies that no other figure has."""


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
RIVALS = replace(
    RULES,
    command="bash scripts/rivals.sh",
    looks={
        **RULES.looks,
        "searched": Look("planned", "circle"),
        "TRAC": Look("planned", "up"),
        "AutoTarget": Look("planned", "square"),
        "MotionCache": Look("motion", "square"),
        "MagCache, published bounds": Look("magcache", "diamond"),
        "RA-CFG": Look("risk", "down"),
        "RACER": Look("risk", "up"),
    },
    colours={
        **RULES.colours,
        "motion": ("#1d6b52", "#7fd3b4"),
        "risk": ("#8a3b12", "#e9a07a"),
    },
)


def _mark(
    look: Look, at: tuple[float, float], *, is_filled: bool = True, tip: str | None = None
) -> Element:
    """Draw the mark of a row or of a legend: filled, or with the page's colour inside."""
    x, y = at
    colour = f"var(--{look.colour})"
    style = f"stroke:{colour};stroke-width:2;fill:{colour if is_filled else 'var(--page)'}"
    if look.shape == "circle":
        return circle(x, y, SIZE, tip=tip, style=style)
    if look.shape == "box":
        side = 1.8 * SIZE
        return rectangle(x - side / 2, y - side / 2, side, side, style=style, tip=tip)
    if look.shape == "triangle":
        base = f"M{number(x - SIZE)} {number(y + 0.8 * SIZE)}H{number(x + SIZE)}"
        return path(f"{base}L{number(x)} {number(y - SIZE)}Z", tip=tip, style=style)
    corners = [(x + SIZE * across, y + SIZE * up) for across, up in CORNERS[look.shape]]
    return path(polyline(corners) + "Z", tip=tip, style=style)


def _underline(look: Look, at: tuple[float, float]) -> Element:
    (x, y), style = at, f"stroke:var(--{look.colour});stroke-width:2.5"
    return line(x - SIZE, x + SIZE, y + SIZE + 4, y + SIZE + 4, style=style)


class Box(NamedTuple):
    """A part of a drawing, CSS pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Tell whether two boxes share a point."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def around(x: float, y: float, size: float) -> Box:
    """Return the box around a mark or a piece of a line."""
    return Box(x - size, y - size, x + size, y + size)


def along(points: Sequence[tuple[float, float]]) -> list[Box]:
    """Return small boxes along lines between points, one after the other."""
    found: list[Box] = []
    for (x, y), (right, below) in pairwise(points):
        count = max(1, round(math.hypot(right - x, below - y) / LINE_PIECE))
        for index in range(count + 1):
            share = index / count
            found.append(around(x + share * (right - x), y + share * (below - y), 2.0))
    return found


def label_place(
    name: str, at: tuple[float, float], taken: Sequence[Box], *, inside: Box
) -> tuple[float, float, Box]:
    """Return where the text of a mark starts, on its base line, and the box that it takes.

    Of the places around the mark it is the nearest that is free, or that covers least.
    """
    (x, y), width = at, LETTER_WIDTH * len(name)
    places: list[tuple[int, int, float, float, Box]] = []
    for far in range(4):
        off = SIZE + 5 + 13 * far
        for order, (left, middle) in enumerate(
            (
                (x + off, y),
                (x - off - width, y),
                (x - width / 2, y - off - 5),
                (x - width / 2, y + off + 5),
                (x + off, y - off),
                (x + off, y + off),
                (x - off - width, y - off),
                (x - off - width, y + off),
            )
        ):
            box = Box(left, middle - TEXT_HEIGHT / 2, left + width, middle + TEXT_HEIGHT / 2)
            covered = sum(box.overlaps(other) for other in taken)
            outside = box.left < inside.left or box.right > inside.right
            outside = outside or box.top < inside.top or box.bottom > inside.bottom
            places.append((covered + 100 * outside, 8 * far + order, left, middle + 4, box))
    *_, left, base, box = min(places)
    return left, base, box


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
        self._labels: list[tuple[str, tuple[float, float]]] = []
        self.taken: list[Box] = []
        """Where no label may be."""
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
        look, at = self.table.looks[point.policy], self.at(point)
        self.marks.append(_mark(look, at, is_filled=point.is_filled, tip=tip))
        self.taken.append(around(*at, SIZE + 2))

    def join(self, points: Sequence[tuple[float, float]], *, style: str) -> None:
        """Draw lines between points, behind the marks that are added later."""
        self.marks.append(path(polyline(points), style=style))
        self.taken += along(points)

    def label(self, name: str, at: tuple[float, float]) -> None:
        """Write a text next to a mark, where it covers nothing."""
        self._labels.append((name, at))

    def explain(self, name: str, *marks: Element, class_: str | None = None) -> None:
        """Add a line to the legend with marks that were drawn at `place`."""
        x, y = self.place
        self._legend += [*marks, text(name, x=x + 16, y=y + 4, class_=class_)]
        self.place = (x, y + LINE)

    def drawing(self, *, title: str, subtitle: str, label: str) -> str:
        """Return the whole drawing, with the title above the chart."""
        x, y = self.axes
        inside, taken = Box(x.start, y.stop - 8, x.stop + RIGHT, y.start), list(self.taken)
        for name, at in self._labels:
            left, base, box = label_place(name, at, taken, inside=inside)
            taken.append(box)
            self.marks.append(text(name, x=left, y=base, class_="halo"))
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


def draw_tradeoff(file: Path, *, model: str) -> str:
    """Return the drawing of a table of `bench_demo.py`."""
    points = read_methods(file)
    chart = _Chart(METHODS, points)
    for point in points:
        amounts = f"{point.share:.0f} % of the FLOPs, {point.decibel:.1f} dB"
        chart.add(point, tip=f"{point.policy} {point.label}: {amounts}")
        look, (x, y) = METHODS.looks[point.policy], chart.at(point)
        if point.is_compressed:
            chart.marks.append(_underline(look, (x, y)))
            chart.taken.append(around(x, y + SIZE + 4, 3))
        elif point.label:
            chart.label(point.label, (x, y))
    if any(point.is_compressed for point in points):
        look, at = METHODS.looks["FlowCache"], chart.place
        chart.explain("with KV compression", _mark(look, at, is_filled=False), _underline(look, at))
    return chart.drawing(
        title=f"{model} demo: quality against computation",
        subtitle="PSNR against the same attention and passes with every step computed",
        label=f"{model} demo: PSNR of {len(points)} methods against their FLOPs",
    )


def read_methods(file: Path) -> list[Point]:
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
            if name is not None and row[base := base_column(row)] is not None
        ]

    return _read_table(file, METHODS, points_of)


def base_column(row: Mapping[str, object], metric: str = "psnr") -> str:
    """Name the column of a metric against the same attention and passes without reuse.

    A table of SkyReels-V2 may name the columns by method: there TeaCache-slow and -fast have full
    attention, as vanilla has, and all others causal attention.
    """
    if f"{metric}_base" in row:
        return f"{metric}_base"
    is_full = str(row["method"]).startswith("TeaCache-")
    return f"{metric}_vanilla" if is_full else f"{metric}_vanilla-causal"


def read_rules(file: Path) -> list[Point]:
    """Return the rows of a table of `bench_demo.py --table reuse` whose PSNR is known."""

    def points_of(table: Rows) -> list[Point]:
        return [
            _rule(row, row["group"], row["flops_share"], row["psnr_base"], row["psnr_error_base"])
            for row in table
            if row["group"] and row["psnr_base"] is not None
        ]

    return _read_table(file, RULES, points_of)


def _rule(
    row: Mapping[str, Any],
    group: Mapping[str, Any],
    share: float,
    decibel: float,
    error: float | None = None,
) -> Point:
    policy, predictor = group["policy"], group["predictor"]
    is_filled = predictor in EXTRAPOLATED
    return Point(policy, 100 * share, decibel, predictor, is_filled, row["method"], error or 0.0)


def draw_reuse(file: Path, *, model: str) -> str:
    """Return the drawing of a table of `bench_demo.py --table reuse`."""
    return _draw_rules(read_rules(file), title=f"{model} demo: reuse rules at three budgets")


def draw_tuning(table: Rows, front: Sequence[tuple[float, float]], *, model: str) -> str:
    """Return the drawing of the table with which `tune.py` checks a plan.

    Args:
        front: what the calibration expects of each number of computed steps, as (share of the
            FLOPs, PSNR in dB).
    """
    return _draw_measured(RULES, table, front, model=model, name="plans, as calibration expects")


def draw_rivals(table: Rows, front: Sequence[tuple[float, float]], *, model: str) -> str:
    """Return the drawing of every rule at three budgets.

    Args:
        front: the rules that no cheaper one beats, as (share of the FLOPs, PSNR in dB).
    """
    return _draw_measured(RIVALS, table, front, model=model, name="frontier of all rules")


def _draw_measured(
    kind: Table, table: Rows, front: Sequence[tuple[float, float]], *, model: str, name: str
) -> str:
    measured = [row for row in table if row["psnr"] is not None]
    if not measured:
        raise UserError("all methods make the same frames: nothing to draw")
    points = [_rule(row, row, row["flops"], row["psnr"]) for row in measured]
    expected = [(100 * share, decibel) for share, decibel in front]
    title = f"{model}: quality against computation"
    return _draw_rules(points, kind, title=title, front=expected, front_name=name)


def _draw_rules(
    points: Sequence[Point],
    table: Table = RULES,
    *,
    title: str,
    front: Sequence[tuple[float, float]] = (),
    front_name: str = "",
) -> str:
    """Draw rules; of the front, a line behind the points, what lies beyond them is left out."""
    chart = _Chart(table, points)
    x, y = chart.axes
    seen = [
        (x(share), y(decibel))
        for share, decibel in sorted(front)
        if x.low <= share <= x.high and y.low <= decibel <= y.high
    ]
    if len(seen) > 1:
        chart.marks.append(path(polyline(seen), class_="dashed", style=FRONT))
    if seen:
        key = f"M{chart.place[0] - 8} {chart.place[1]}h16"
        chart.explain(front_name, path(key, class_="dashed", style=FRONT))
    _join_budgets(chart, points)
    for point in points:
        at, style = x(point.share), f"stroke:var(--{table.looks[point.policy].colour});opacity:.55"
        low, high = y(point.decibel - point.error), y(point.decibel + point.error)
        chart.marks.append(line(at, at, low, high, style=style))
    for point in points:
        decibel = f"{point.decibel:.2f} ± {point.error:.2f} dB"
        chart.add(point, tip=f"{point.name}: {point.share:.1f} % of the FLOPs, {decibel}")
    for point in points:
        if point.policy == TUNED and not point.is_filled:
            chart.label(point.label, chart.at(point))
    bars = "; bars: its standard error" if any(point.error for point in points) else ""
    return chart.drawing(
        title=title,
        subtitle=f"PSNR against every step computed with the same attention and passes{bars}",
        label=f"{title}: PSNR of {len(points)} rows against their FLOPs",
    )


def _join_budgets(chart: _Chart, points: Sequence[Point]) -> None:
    """Join the budgets of a policy with the same predictor."""

    def rule(point: Point) -> tuple[str, str]:
        return point.policy, point.label

    for (policy, _), group in groupby(sorted(points, key=rule), key=rule):
        colour = chart.table.looks[policy].colour
        style = f"stroke:var(--{colour});fill:none;stroke-width:1.5;opacity:.55"
        chart.join(sorted(map(chart.at, group)), style=style)


def _read_table(file: Path, table: Table, points_of: Callable[[Rows], list[Point]]) -> list[Point]:
    """Return the points that a function makes of the rows of a table; at least one."""
    content = read_json(file, advice=f"make it with {table.command}")
    try:
        points = points_of(content["table"])
    except (ValueError, KeyError, TypeError, StopIteration):
        raise UserError(f"{file}: no table of {table.command}: make it again") from None
    if not points:
        raise UserError(f"{file}: no {table.row} reuses anything: nothing to draw")
    return points
