"""The figure of how evenly a demo's clips move: the change from frame to frame, by preset.

A VAE that makes four frames of a latent shows its stride as a peak at every fourth frame.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from flowcache.demo.modes import DRAWN
from flowcache.report.drawing import (
    Axis,
    curve,
    document,
    horizontal,
    path,
    placed,
    plot,
    text,
    vertical,
)
from flowcache.runtime.files import read_json

WIDTH, HEIGHT, HEAD, TITLE, MARGIN = 430.0, 170.0, 62.0, 22.0, 12.0
COLUMNS = 2
LAST_FRAME = 48
"""Of those drawn: later ones look the same, and the stride must be seen."""


def draw_changes(file: Path, *, model: str) -> str:
    """Return the drawing of what `judge_demo.py --make` wrote, of its clips from text."""
    groups = read_json(file, advice="make it with judge_demo.py --make")["groups"]
    shown = [group for group in groups if group["mode"] == "t2v"]
    largest = max(max(group["changes"][:LAST_FRAME]) for group in shown)
    y = vertical("grey levels", largest, height=HEIGHT)
    num_rows = -(-len(shown) // COLUMNS)
    title = f"{model} demo: how much the picture changes from frame to frame"
    finding = f"mean of {max(group['clips'] for group in shown)} clips from text by preset"
    parts: list[Element] = []
    for index, group in enumerate(shown):
        row, column = divmod(index, COLUMNS)
        left, top = MARGIN + column * WIDTH, HEAD + row * (HEIGHT + TITLE)
        parts.append(text(_named(group), x=left + 46, y=top + TITLE - 8))
        parts.append(placed(_panel(group["changes"][:LAST_FRAME], y), left, top + TITLE - 4))
    return document(
        text(title, x=MARGIN + 12, y=28, class_="title"),
        text(finding, x=MARGIN + 12, y=50),
        *parts,
        width=COLUMNS * WIDTH + 2 * MARGIN,
        height=HEAD + num_rows * (HEIGHT + TITLE) + MARGIN,
        label=f"{title}; {finding}.",
    )


def _named(group: Mapping[str, Any]) -> str:
    if group["preset"] == DRAWN:
        return "clips as they are drawn"
    return f"{group['preset']}: {group['smooth']:.0%} of the clips move smoothly"


def _panel(changes: Sequence[float], y: Axis) -> Element:
    x = horizontal("frame", 0, LAST_FRAME, width=WIDTH)
    points = [(index + 1.0, change) for index, change in enumerate(changes)]
    drawn = path(curve(points, x, y), class_="curve single")
    return plot(x, y, marks=[drawn], label="change from frame to frame")
