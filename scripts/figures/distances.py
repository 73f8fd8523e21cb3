"""How much every chunk changes from tick to tick: why each one decides for itself."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

from explain_page.markup import element
from explain_page.plot import Axis, colour_of, horizontal, line, plot, text, vertical
from explain_page.run import Row, Run, load_run

from figures.drawing import document, placed

PANEL_WIDTH, PANEL_HEIGHT = 430.0, 270.0
MARGIN, HEAD = 12.0, 62.0
LEGEND_STEP = 34.0


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
    """Return the drawing of a record.

    Args:
        record: of a run that measured the distance of every chunk at every tick.
        model: its name in the headline.

    Raises:
        UserError: the record is missing or broken.
    """
    run = load_run(record, "A")
    curves = curves_of(run)
    spread = widest_spread(run)
    y = vertical("relative change", max(run.distances()), height=PANEL_HEIGHT)
    by_tick = _panel(curves, y, "tick", spread)
    by_step = _panel(curves, y, "own step of the chunk", None)
    width = 2 * PANEL_WIDTH + 2 * MARGIN
    said = (
        f"At tick {spread.tick} the active chunks change by {spread.smallest:.3f} to "
        f"{spread.largest:.3f}: {spread.ratio:.0f} times as much"
    )
    return document(
        text(
            f"{model} demo: change of each chunk's signal since the last tick",
            x=MARGIN + 12,
            y=28,
            class_="title",
        ),
        text(said, x=MARGIN + 12, y=50),
        *_legend(list(curves), stop=width - MARGIN - 12),
        placed(by_tick, MARGIN, HEAD),
        placed(by_step, MARGIN + PANEL_WIDTH, HEAD),
        width=width,
        height=HEAD + PANEL_HEIGHT + MARGIN,
        label=f"{said}; over their own steps all chunks have the same growing curve.",
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
            assert row.distance is not None
            by_tick[row.tick].append(row.distance)
    return max(
        (Spread(tick, min(found), max(found)) for tick, found in by_tick.items() if min(found) > 0),
        key=lambda spread: spread.ratio,
    )


def _panel(
    curves: Mapping[int, Sequence[Row]], y: Axis, name: str, marked: Spread | None
) -> Element:
    def place(row: Row) -> int:
        return row.step if marked is None else row.tick

    last = max(place(row) for rows in curves.values() for row in rows)
    x = horizontal(name, 0, last, width=PANEL_WIDTH)
    marks: list[Element] = []
    if marked is not None:
        at = x(marked.tick)
        marks.append(element("line", x1=at, x2=at, y1=y.start, y2=y.stop, class_="axis dashed"))
        marks.append(text(f"tick {marked.tick}", x=at - 6, y=y.stop + 12, class_="end"))
    for chunk, rows in curves.items():
        path = line([(place(row), row.distance or 0.0) for row in rows], x, y)
        marks.append(element("path", d=path, class_="curve", style=colour_of(chunk)))
    return plot(x, y, marks=marks, label=f"distances by {name}")


def _legend(chunks: Sequence[int], *, stop: float) -> list[Element]:
    start = stop - LEGEND_STEP * len(chunks)
    drawn = [text("chunk", x=start - 8, y=50, class_="end")]
    for index, chunk in enumerate(chunks):
        x = start + LEGEND_STEP * index
        drawn.append(
            element("line", x1=x, x2=x + 12, y1=46, y2=46, class_="curve", style=colour_of(chunk))
        )
        drawn.append(text(str(chunk), x=x + 17, y=50))
    return drawn
