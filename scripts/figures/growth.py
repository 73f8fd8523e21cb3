"""How cost grows with the length of a video: flat with KV compression, without it not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from explain_page.markup import element
from explain_page.plot import horizontal, line, plot, text, vertical
from gpu.growth import read_json

from figures.drawing import document, placed
from flowcache.errors import UserError

PANEL_WIDTH, PANEL_HEIGHT = 430.0, 240.0
MARGIN, HEAD, TITLE = 12.0, 84.0, 30.0
COLOURS = {
    "all keys and values": "teacache",
    "KV compression": "flowcache",
    "windows of 97 frames": "stride",
}
LEGEND_STEP = 190.0
EXAMPLE = "python scripts/bench_gpu.py --growth"


@dataclass(frozen=True)
class Panel:
    """One chart of each model."""

    part: str
    """`planned` or `measured`."""
    name: str
    value: Callable[[Mapping[str, Any]], float]


PANELS = (
    Panel("planned", "KV cache, GB", lambda row: row["kv_bytes"] / 1e9),
    Panel("planned", "TFLOPs per chunk", lambda row: row["flops_per_chunk"] / 1e12),
    Panel("measured", "CPU s per chunk", lambda row: row["seconds_per_chunk"]),
)


def draw_growth(path: Path) -> str:
    """Return the drawing of a file of `bench_gpu.py --growth`.

    Raises:
        UserError: the file is missing or broken.
    """
    found = read_json(path)
    try:
        models = list(found["models"].values())
        rows = [_row(model) for model in models]
        names = list(models[0]["planned"])
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path}: no result of {EXAMPLE}: make it again") from None
    width = len(PANELS) * PANEL_WIDTH + 2 * MARGIN
    said = (
        "planned at the released sizes; measured on the demos, processor time; every step computed"
    )
    return document(
        text("Cost against the length of the video", x=MARGIN + 12, y=28, class_="title"),
        text(said, x=MARGIN + 12, y=50),
        *_legend(names, start=MARGIN + 12),
        *(
            placed(panel, MARGIN + place * PANEL_WIDTH, HEAD + TITLE + index * _row_height())
            for index, (_, panels) in enumerate(rows)
            for place, panel in enumerate(panels)
        ),
        *(
            text(title, x=MARGIN + 12, y=HEAD + 18 + index * _row_height(), class_="strong")
            for index, (title, _) in enumerate(rows)
        ),
        width=width,
        height=HEAD + len(rows) * _row_height() + MARGIN,
        label="Memory and time per chunk against the number of frames: flat with KV compression",
    )


def _row_height() -> float:
    return TITLE + PANEL_HEIGHT


def _row(model: Mapping[str, Any]) -> tuple[str, list[Element]]:
    return model["title"], [_chart(panel, model[panel.part]) for panel in PANELS]


def _chart(panel: Panel, lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> Element:
    values = [panel.value(row) for rows in lines.values() for row in rows]
    last = max(row["frames"] for rows in lines.values() for row in rows)
    where = "released size, planned" if panel.part == "planned" else "demo, measured"
    x = horizontal(f"frames ({where})", 0, last, width=PANEL_WIDTH)
    y = vertical(panel.name, max(values), height=PANEL_HEIGHT)
    marks = [
        element(
            "path",
            element("title", name),
            d=line([(row["frames"], panel.value(row)) for row in rows], x, y),
            class_="curve",
            style=_colour(name),
        )
        for name, rows in lines.items()
    ]
    return plot(x, y, marks=marks, label=f"{panel.name} by frames")


def _legend(names: Sequence[str], *, start: float) -> list[Element]:
    drawn: list[Element] = []
    for place, name in enumerate(names):
        x = start + place * LEGEND_STEP
        drawn.append(
            element("line", x1=x, x2=x + 16, y1=72, y2=72, class_="curve", style=_colour(name))
        )
        drawn.append(text(name, x=x + 22, y=76))
    return drawn


def _colour(name: str) -> str:
    return f"--c:var(--{COLOURS[name]})"
