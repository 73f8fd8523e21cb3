"""What all drawings share: colours for light and dark pages, texts, boxes, arrows, whole files."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from explain_page.markup import element, number, svg
from explain_page.palette import chunk_styles
from explain_page.plot import Axis, text

from flowcache.errors import UserError
from flowcache.runtime.files import read_json

PointType = TypeVar("PointType")
Rows = Sequence[Mapping[str, Any]]

FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif'
LIGHT = {
    "page": "#ffffff",
    "ink": "#1c1e21",
    "soft": "#545b63",
    "line": "#c9ced3",
    "grid": "#e6e9ec",
    "ground": "#f3f5f7",
    "noise": "#8c959e",
    "flowcache": "#0072b2",
    "teacache": "#c04f00",
    "stride": "#00805c",
}
"""The last three: blue, vermilion, green of Okabe and Ito's palette, dark enough for white."""
DARK = {
    "page": "#14171a",
    "ink": "#e9ebed",
    "soft": "#a8b0b8",
    "line": "#444c54",
    "grid": "#282d32",
    "ground": "#1f2429",
    "noise": "#7d8790",
    "flowcache": "#56b4e9",
    "teacache": "#ff9d57",
    "stride": "#4fd1a5",
}
NO_COLOURS: Mapping[str, tuple[str, str]] = MappingProxyType({})
RULES = f"""
text{{font:13px {FONT};fill:var(--soft)}}
.middle{{text-anchor:middle}}.end{{text-anchor:end}}
.name,.strong,.title{{fill:var(--ink)}}.strong,.title{{font-weight:600}}.title{{font-size:16px}}
.page{{fill:var(--page)}}.ground{{fill:var(--ground)}}
.grid{{stroke:var(--grid)}}.axis{{stroke:var(--line)}}
.chunk{{fill:var(--c)}}.curve{{fill:none;stroke:var(--c);stroke-width:2.2;
stroke-linecap:round;stroke-linejoin:round}}
.arrow{{fill:none;stroke:var(--soft);stroke-width:1.6}}
.dashed{{stroke-dasharray:4 4}}
"""


def document(
    *children: Element | None,
    width: float,
    height: float,
    label: str,
    num_chunks: int = 0,
    colours: Mapping[str, tuple[str, str]] = NO_COLOURS,
) -> str:
    """Return a whole SVG file on a page of its own colour, for light and for dark mode.

    Args:
        label: what the drawing shows, for those who can't see it.
        num_chunks: how many chunks need a colour.
        colours: more of them: name -> on a light page, on a dark one.
    """
    page = element("rect", width=width, height=height, rx=8, class_="page")
    root = svg(
        styles(num_chunks, colours), page, *children, width=width, height=height, label=label
    )
    root.set("xmlns", "http://www.w3.org/2000/svg")
    ElementTree.indent(root, space=" ")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def styles(num_chunks: int, colours: Mapping[str, tuple[str, str]] = NO_COLOURS) -> Element:
    """Return the style sheet of a drawing; chunks have the colours of explain.py's pages."""
    light, dark = (
        ";".join(f"--{name}:{colour}" for name, colour in page.items())
        for page in (
            LIGHT | {name: pair[0] for name, pair in colours.items()},
            DARK | {name: pair[1] for name, pair in colours.items()},
        )
    )
    variables = f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return element("style", variables + chunk_styles(num_chunks) + RULES)


def read_table(
    path: Path, points_of: Callable[[Rows], list[PointType]], *, command: str
) -> list[PointType]:
    """Return the points that a function makes of a table's rows.

    Args:
        command: makes the table.

    Raises:
        UserError: the table is missing or broken.
    """
    try:
        return points_of(read_json(path, advice=f"make it with {command}")["table"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, StopIteration):
        raise UserError(f"{path}: no table of {command}: make it again") from None


def whole_axis(
    name: str, values: Sequence[float], ends: tuple[float, float], *, margin: int
) -> Axis:
    """Return an axis between whole numbers, `margin` beyond the lowest and the highest value."""
    return Axis(name, math.floor(min(values)) - margin, math.ceil(max(values)) + margin, *ends)


def placed(drawing: Element, x: float, y: float) -> Element:
    """Put a drawing at a place of another one."""
    drawing.set("x", number(x))
    drawing.set("y", number(y))
    return drawing


def box(
    x: float, y: float, width: float, height: float, *, class_: str, style: str | None = None
) -> Element:
    """Draw a rectangle with round corners."""
    return element("rect", x=x, y=y, width=width, height=height, rx=4, class_=class_, style=style)


def lines_of_text(
    lines: Sequence[str], *, x: float, y: float, class_: str | None = None
) -> Element:
    """Write lines below one another, 18 CSS pixels apart."""
    return element(
        "g", *(text(line, x=x, y=y + 18 * index, class_=class_) for index, line in enumerate(lines))
    )


def arrow_down(x: float, start: float, stop: float, *, class_: str = "arrow") -> Element:
    """Draw an arrow from above."""
    path = f"M{number(x)} {number(start)}V{number(stop)}m-4 -6l4 6l4 -6"
    return element("path", d=path, class_=class_)
