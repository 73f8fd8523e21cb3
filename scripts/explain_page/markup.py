"""Write HTML and SVG as trees, so that no text can end up as markup."""

from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

Child = Element | str | None
Attribute = str | float | None


def element(tag: str, *children: Child, **attributes: Attribute) -> Element:
    """Make an element.

    Args:
        tag: the name of the element.
        children: elements and texts in order; None is left out.
        attributes: `stroke_width=2` becomes `stroke-width="2"`, `class_` becomes `class`, a number
            gets at most two decimals, None is left out.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), _text(value))
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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Element:
    """Make a table whose first column names the rows."""
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    ]
    head = element("tr", *(element("th", name, scope="col") for name in header))
    made = element("table", element("thead", head), element("tbody", *body))
    return element("div", made, class_="scroll")


def svg(*children: Child, width: float, height: float, label: str) -> Element:
    """Make a drawing of that size in CSS pixels; it shrinks where there is less room."""
    made = element("svg", *children, width=width, height=height, role="img", aria_label=label)
    made.set("viewBox", f"0 0 {number(width)} {number(height)}")
    return made


def number(value: float) -> str:
    """Write a coordinate with at most two decimals: `3.10` as `3.1`, `4.0` as `4`."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def to_html(root: Element) -> str:
    """Return a whole document."""
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html")


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else number(value)
