"""Axes, grid, lines and legends of a chart in SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from explain_page.markup import element, number, svg

LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 10.0, 42.0
"""Room around the plot in CSS pixels, for numbers and names of the axes."""
PIXELS_PER_NUMBER_ACROSS, PIXELS_PER_NUMBER_UP = 55.0, 38.0
MARK = 3.5
"""Half the size of a mark in CSS pixels."""


@dataclass(frozen=True)
class Axis:
    """Maps values to CSS pixels."""

    name: str
    low: float
    high: float
    start: float
    stop: float
    is_whole: bool = False
    """Only whole values are written at the axis."""

    def __call__(self, value: float) -> float:
        """Return where a value lies."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def numbers(self) -> list[float]:
        """Return round values to write at the axis: 1, 2 or 5 times a power of ten apart.

        From 0 to 0.25 in 200 pixels upwards: 0, 0.05, 0.1, 0.15, 0.2, 0.25.
        """
        length = self.stop - self.start
        room = PIXELS_PER_NUMBER_ACROSS if length > 0 else PIXELS_PER_NUMBER_UP
        count = max(2.0, abs(length) / room)
        step = _round_step((self.high - self.low) / count)
        if self.is_whole:
            step = max(1.0, step)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def horizontal(name: str, low: float, high: float, *, width: float, is_whole: bool = True) -> Axis:
    """Return the x axis of a plot that is `width` CSS pixels wide with its margins."""
    return Axis(name, low, high, LEFT, width - RIGHT, is_whole)


def vertical(name: str, high: float, *, height: float) -> Axis:
    """Return the y axis from 0 up to a little more than `high`."""
    return Axis(name, 0.0, high * 1.05 if high > 0 else 1.0, height - BOTTOM, TOP)


def plot(x: Axis, y: Axis, *, marks: Sequence[Element], label: str) -> Element:
    """Draw axes and grid, and the marks on them."""
    width, height = x.stop + RIGHT, y.start + BOTTOM
    grid: list[Element] = []
    for value in y.numbers():
        at = y(value)
        grid.append(element("line", x1=x.start, x2=x.stop, y1=at, y2=at, class_="grid"))
        grid.append(text(compact(value), x=x.start - 8, y=at + 4, class_="end"))
    for value in x.numbers():
        at = x(value)
        grid.append(element("line", x1=at, x2=at, y1=y.start, y2=y.start + 4, class_="axis"))
        grid.append(text(compact(value), x=at, y=y.start + 17, class_="middle"))
    grid.append(element("line", x1=x.start, x2=x.stop, y1=y.start, y2=y.start, class_="axis"))
    return svg(*grid, *axis_names(x, y), *marks, width=width, height=height, label=label)


def axis_names(x: Axis, y: Axis) -> list[Element]:
    """Write the names of both axes: below, and upright at the left."""
    middle = (y.start + y.stop) / 2
    upright = text(y.name, x=12, y=middle, class_="middle name")
    upright.set("transform", f"rotate(-90 12 {number(middle)})")
    centre = (x.start + x.stop) / 2
    bottom = max(y.start, y.stop) + BOTTOM - 6
    return [text(x.name, x=centre, y=bottom, class_="middle name"), upright]


def text(content: str, *, x: float, y: float, class_: str | None = None) -> Element:
    """Write a text at a place."""
    return element("text", content, x=x, y=y, class_=class_)


def rectangle(
    x: float, y: float, width: float, height: float, *, class_: str, tip: str | None = None
) -> Element:
    """Draw a rectangle with an optional text that shows when it is pointed at."""
    title = None if tip is None else element("title", tip)
    return element("rect", title, x=x, y=y, width=width, height=height, class_=class_)


def line(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    """Return the path through points in order of x; a value that is not finite leaves a gap.

    A point without neighbours becomes a dot: a line of no length with round ends.
    """
    parts: list[str] = []
    is_open = False
    for at, value in points:
        if not math.isfinite(value):
            is_open = False
            continue
        place = f"{number(x(at))} {number(y(value))}"
        parts.append(f"L{place}" if is_open else f"M{place}h0")
        is_open = True
    return "".join(parts)


def cross(x: float, y: float, *, tip: str) -> Element:
    """Mark a value that is not a number, or infinite."""
    path = (
        f"M{number(x - MARK)} {number(y - MARK)}L{number(x + MARK)} {number(y + MARK)}"
        f"M{number(x - MARK)} {number(y + MARK)}L{number(x + MARK)} {number(y - MARK)}"
    )
    return element("path", element("title", tip), d=path, class_="cross")


def compact(value: float) -> str:
    """Write a number at an axis: `0.30000000000000004` as `0.3`, `20000` as `20k`."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if prefix == 'k' else size):g}{prefix}"
    return f"{value:.6g}"


def chunk_legend(chunks: Sequence[int]) -> Element:
    """Name the colour of every chunk; pointing at one brings it forward."""
    keys = [
        element("span", swatch(chunk), str(chunk), class_="key", data_chunk=str(chunk))
        for chunk in chunks
    ]
    return element("div", element("span", "chunk"), *keys, class_="legend")


def swatch(chunk: int) -> Element:
    """Show the colour of a chunk."""
    return element("i", class_="swatch chunk", style=colour_of(chunk))


def colour_of(chunk: int) -> str:
    """Return the style that gives an element of class `chunk` or `curve` its colour."""
    return f"--c:var(--chunk-{chunk})"


def _round_step(wanted: float) -> float:
    power = 10.0 ** math.floor(math.log10(wanted))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= wanted * 0.999)
