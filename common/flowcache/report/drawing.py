"""HTML and SVG as trees, so that no text can end up as markup. Lengths are CSS pixels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

Child = Element | str | None
Pair = tuple[str, str]
"""A colour on a light page, and the same on a dark one."""
LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 10.0, 42.0
"""Room around a plot for numbers and names of the axes."""
PIXELS_PER_NUMBER_ACROSS, PIXELS_PER_NUMBER_UP = 55.0, 38.0
DASH = 7
"""Length of a dash among curves that lie on one another."""
MARK = 3.5
"""Half the size of a cross."""
LIGHT_CHUNKS = ("#3b1c6b", "#31688e", "#1f9e89", "#7ba428", "#d98a00")
"""From the first chunk to the last on a white page, dark to light: readable without hue."""
DARK_CHUNKS = ("#8a78e6", "#559fdc", "#3cc5ad", "#a8d455", "#fde05a")
FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif'
COLOURS: Mapping[str, Pair] = MappingProxyType(
    {
        "page": ("#ffffff", "#14171a"),
        "ink": ("#1c1e21", "#e9ebed"),
        "soft": ("#545b63", "#a8b0b8"),
        "line": ("#c9ced3", "#444c54"),
        "grid": ("#e6e9ec", "#282d32"),
        "ground": ("#f3f5f7", "#1f2429"),
        "noise": ("#8c959e", "#7d8790"),
        "computed": ("#0a5c99", "#3f93d6"),
        "reused": ("#f0b84a", "#f3cf7a"),
        # blue, vermilion and green of Okabe and Ito's palette, dark enough for white
        "flowcache": ("#0072b2", "#56b4e9"),
        "teacache": ("#c04f00", "#ff9d57"),
        "stride": ("#00805c", "#4fd1a5"),
    }
)
RULES = f"""
text{{font:13px {FONT};fill:var(--soft)}}
.middle{{text-anchor:middle}}.end{{text-anchor:end}}
.name,.strong,.title{{fill:var(--ink)}}.strong,.title{{font-weight:600}}.title{{font-size:16px}}
.page{{fill:var(--page)}}.ground{{fill:var(--ground)}}
.computed{{fill:var(--computed)}}.reused{{fill:var(--reused)}}.touch{{fill:none}}
.grid{{stroke:var(--grid)}}.axis{{stroke:var(--line)}}
.chunk{{fill:var(--c)}}.curve{{fill:none;stroke:var(--c);stroke-width:2.2;
stroke-linecap:round;stroke-linejoin:round}}
.arrow{{fill:none;stroke:var(--soft);stroke-width:1.6}}
.dashed{{stroke-dasharray:4 4}}
.halo{{paint-order:stroke;stroke:var(--page);stroke-width:4px;stroke-linejoin:round}}
"""
NO_COLOURS: Mapping[str, Pair] = MappingProxyType({})


def element(tag: str, *children: Child, **attributes: str | float | None) -> Element:
    """Make an element; a child or an attribute that is None is left out.

    `stroke_width=2` becomes `stroke-width="2"`, `class_` becomes `class`.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            written = value if isinstance(value, str) else number(value)
            made.set(name.rstrip("_").replace("_", "-"), written)
    for child in children:
        append(made, child)
    return made


def append(parent: Element, child: Child) -> None:
    """Add an element or a text at the end; None adds nothing."""
    if isinstance(child, Element):
        parent.append(child)
    elif child is not None and len(parent):
        parent[-1].tail = (parent[-1].tail or "") + child
    elif child is not None:
        parent.text = (parent.text or "") + child


def svg(*children: Child, width: float, height: float, label: str) -> Element:
    """Make a drawing of that size; it shrinks where there is less room."""
    made = element("svg", *children, width=width, height=height, role="img", aria_label=label)
    made.set("viewBox", f"0 0 {number(width)} {number(height)}")
    return made


def document(
    *children: Element,
    width: float,
    height: float,
    label: str,
    num_chunks: int = 0,
    colours: Mapping[str, Pair] = NO_COLOURS,
) -> str:
    """Return a whole SVG file with colours for light and for dark mode.

    Args:
        label: what the drawing shows, for those who can't see it.
        num_chunks: how many chunks need a colour.
        colours: in addition to `COLOURS`.
    """
    variables = light_and_dark(
        *(
            ";".join(f"--{name}:{pair[mode]}" for name, pair in {**COLOURS, **colours}.items())
            for mode in (0, 1)
        )
    )
    style = element("style", variables + chunk_styles(num_chunks) + RULES)
    page = rectangle(None, None, width, height, rx=8, class_="page")
    root = svg(style, page, *children, width=width, height=height, label=label)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    ElementTree.indent(root, space=" ")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def placed(drawing: Element, x: float, y: float) -> Element:
    """Put a drawing at a place of another one."""
    drawing.set("x", number(x))
    drawing.set("y", number(y))
    return drawing


def number(value: float) -> str:
    """Write a coordinate with at most two decimals: `3.10` as `3.1`, `4.0` as `4`."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def compact(value: float) -> str:
    """Write a number at an axis: `0.30000000000000004` as `0.3`, `20000` as `20k`."""
    for size, unit, prefix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= size:
            return f"{value / unit:g}{prefix}"
    return f"{value:.6g}"


def percent(share: float, *, digits: int = 1) -> str:
    """Write a share of 1: `percent(0.125)` is `12.5 %`."""
    return f"{100 * share:.{digits}f} %"


def seconds_text(seconds: float) -> str:
    """Write a time: `0.0123` as `12.3 ms`, `0.75` as `0.75 s`, `75` as `75.0 s`."""
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


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
        wanted = (self.high - self.low) / max(2.0, abs(length) / room)
        power = 10.0 ** math.floor(math.log10(wanted))
        step = power * next(each for each in (1, 2, 5, 10) if each * power >= wanted * 0.999)
        if self.is_whole:
            step = max(1.0, step)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def horizontal(name: str, low: float, high: float, *, width: float, is_whole: bool = True) -> Axis:
    """Return the x axis of a plot of that width, margins included."""
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
        grid.append(line(x.start, x.stop, at, at, class_="grid"))
        grid.append(text(compact(value), x=x.start - 8, y=at + 4, class_="end"))
    for value in x.numbers():
        at = x(value)
        grid.append(line(at, at, y.start, y.start + 4, class_="axis"))
        grid.append(text(compact(value), x=at, y=y.start + 17, class_="middle"))
    grid.append(line(x.start, x.stop, y.start, y.start, class_="axis"))
    return svg(*grid, *axis_names(x, y), *marks, width=width, height=height, label=label)


def axis_names(x: Axis, y: Axis) -> list[Element]:
    """Write the names of both axes: below, and upright at the left."""
    middle = (y.start + y.stop) / 2
    upright = text(y.name, x=12, y=middle, class_="middle name")
    upright.set("transform", f"rotate(-90 12 {number(middle)})")
    centre, bottom = (x.start + x.stop) / 2, max(y.start, y.stop) + BOTTOM - 6
    return [text(x.name, x=centre, y=bottom, class_="middle name"), upright]


def text(
    content: str, *, x: float, y: float, class_: str | None = None, style: str | None = None
) -> Element:
    """Write a text at a place."""
    return element("text", content, x=x, y=y, class_=class_, style=style)


def line(
    x1: float,
    x2: float,
    y1: float,
    y2: float,
    *,
    class_: str | None = None,
    style: str | None = None,
) -> Element:
    """Draw a straight line."""
    return element("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=class_, style=style)


def path(d: str, *, tip: str | None = None, **attributes: str | None) -> Element:
    """Draw a path; the tip shows when it is pointed at."""
    return element("path", _title(tip), d=d, **attributes)


def circle(
    x: float, y: float, r: float, *, tip: str | None = None, **attributes: str | None
) -> Element:
    """Draw a circle; the tip shows when it is pointed at."""
    return element("circle", _title(tip), cx=x, cy=y, r=r, **attributes)


def rectangle(
    x: float | None,
    y: float | None,
    width: float,
    height: float,
    *,
    rx: float | None = None,
    class_: str | None = None,
    style: str | None = None,
    tip: str | None = None,
) -> Element:
    """Draw a rectangle with corners of radius `rx`; the tip shows when it is pointed at."""
    return element(
        "rect", _title(tip), x=x, y=y, width=width, height=height, rx=rx, class_=class_, style=style
    )


def _title(tip: str | None) -> Element | None:
    return None if tip is None else element("title", tip)


def curve(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    """Return the path through points in order of x; a value that is not finite leaves a gap.

    A point without neighbours becomes a dot: a line of no length with round ends.
    """
    parts: list[str] = []
    is_open = False
    for at, value in points:
        if math.isfinite(value):
            place = f"{number(x(at))} {number(y(value))}"
            parts.append(f"L{place}" if is_open else f"M{place}h0")
        is_open = math.isfinite(value)
    return "".join(parts)


def polyline(points: Sequence[tuple[float, float]]) -> str:
    """Return the path through points in CSS pixels."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def cross(x: float, y: float, *, tip: str) -> Element:
    """Mark a value that is not a number, or infinite."""
    left, right, top, bottom = (number(at) for at in (x - MARK, x + MARK, y - MARK, y + MARK))
    return path(
        f"M{left} {top}L{right} {bottom}M{left} {bottom}L{right} {top}", tip=tip, class_="cross"
    )


def colour_of(chunk: int) -> str:
    """Return the style that gives an element of class `chunk` or `curve` its colour."""
    return f"--c:var(--chunk-{chunk})"


def interleaved(index: int, count: int) -> str:
    """Return the dashes of a curve among others that lie on it: each fills gaps of the others."""
    if count == 1:
        return ""
    return f";stroke-dasharray:{DASH} {DASH * (count - 1)};stroke-dashoffset:{-DASH * index}"


def chunk_styles(num_chunks: int) -> str:
    """Return the CSS variables `--chunk-0`, `--chunk-1`, ... for a light and a dark page."""
    last = max(1, num_chunks - 1)
    return light_and_dark(
        *(
            ";".join(f"--chunk-{i}:{_mixed(anchors, i / last)}" for i in range(num_chunks))
            for anchors in (LIGHT_CHUNKS, DARK_CHUNKS)
        )
    )


def light_and_dark(light: str, dark: str) -> str:
    """Return CSS variables that depend on the reader's mode."""
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _mixed(anchors: Sequence[str], share: float) -> str:
    """Return the colour at a share of the way from the first anchor to the last."""
    place = share * (len(anchors) - 1)
    index = min(int(place), len(anchors) - 2)
    weight = place - index
    first, second = (bytes.fromhex(anchors[at][1:]) for at in (index, index + 1))
    return "#" + "".join(
        f"{round(a + weight * (b - a)):02x}" for a, b in zip(first, second, strict=True)
    )
