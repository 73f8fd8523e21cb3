"""The README's figures but the one of the method: drawings for light and dark pages, frames."""

import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from PIL import Image, ImageDraw, ImageFont

from flowcache.errors import UserError
from flowcache.report.drawing import (
    Axis,
    chunk_styles,
    colour_of,
    curve,
    element,
    horizontal,
    light_and_dark,
    number,
    plot,
    svg,
    text,
    vertical,
)
from flowcache.report.run import Row, Run, load_run
from flowcache.runtime.files import read_json
from flowcache.runtime.metrics import psnr
from flowcache.runtime.run import Clip

Rows = Sequence[Mapping[str, Any]]

FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif'
COLOURS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "page": ("#ffffff", "#14171a"),
        "ink": ("#1c1e21", "#e9ebed"),
        "soft": ("#545b63", "#a8b0b8"),
        "line": ("#c9ced3", "#444c54"),
        "grid": ("#e6e9ec", "#282d32"),
        "ground": ("#f3f5f7", "#1f2429"),
        "noise": ("#8c959e", "#7d8790"),
        "flowcache": ("#0072b2", "#56b4e9"),
        "teacache": ("#c04f00", "#ff9d57"),
        "stride": ("#00805c", "#4fd1a5"),
    }
)
"""On a light page, on a dark one. The last three: blue, vermilion, green of Okabe and Ito's
palette, dark enough for white."""
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
        num_chunks: how many chunks need a colour; they have those of explain.py's pages.
        colours: more than `COLOURS`.
    """
    variables = light_and_dark(
        *(
            ";".join(f"--{name}:{pair[mode]}" for name, pair in {**COLOURS, **colours}.items())
            for mode in (0, 1)
        )
    )
    style = element("style", variables + chunk_styles(num_chunks) + RULES)
    page = element("rect", width=width, height=height, rx=8, class_="page")
    root = svg(style, page, *children, width=width, height=height, label=label)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    ElementTree.indent(root, space=" ")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def placed(drawing: Element, x: float, y: float) -> Element:
    """Put a drawing at a place of another one."""
    drawing.set("x", number(x))
    drawing.set("y", number(y))
    return drawing


PANEL_WIDTH, MARGIN = 430.0, 12.0
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
        f"At tick {spread.tick} the active chunks change by {spread.smallest:.3f} to "
        f"{spread.largest:.3f}: {spread.ratio:.0f} times as much"
    )
    width = 2 * PANEL_WIDTH + 2 * MARGIN
    return document(
        text(title, x=MARGIN + 12, y=28, class_="title"),
        text(finding, x=MARGIN + 12, y=50),
        *_chunk_keys(list(curves), stop=width - MARGIN - 12),
        placed(_distance_panel(curves, y, "tick", spread), MARGIN, DISTANCES_HEAD),
        placed(
            _distance_panel(curves, y, "own step of the chunk", None),
            MARGIN + PANEL_WIDTH,
            DISTANCES_HEAD,
        ),
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
            assert row.distance is not None
            by_tick[row.tick].append(row.distance)
    return max(
        (Spread(tick, min(found), max(found)) for tick, found in by_tick.items() if min(found) > 0),
        key=lambda spread: spread.ratio,
    )


def _distance_panel(
    curves: Mapping[int, Sequence[Row]], y: Axis, name: str, marked: Spread | None
) -> Element:
    """Draw a curve per chunk by ticks, one of them marked, or by own steps."""
    places = {
        chunk: [row.step if marked is None else row.tick for row in rows]
        for chunk, rows in curves.items()
    }
    x = horizontal(name, 0, max(max(each) for each in places.values()), width=PANEL_WIDTH)
    marks: list[Element] = []
    if marked is not None:
        at = x(marked.tick)
        marks.append(element("line", x1=at, x2=at, y1=y.start, y2=y.stop, class_="axis dashed"))
        marks.append(text(f"tick {marked.tick}", x=at - 6, y=y.stop + 12, class_="end"))
    for chunk, rows in curves.items():
        points = list(zip(places[chunk], (row.distance or 0.0 for row in rows), strict=True))
        path = curve(points, x, y)
        marks.append(element("path", d=path, class_="curve", style=colour_of(chunk)))
    return plot(x, y, marks=marks, label=f"distances by {name}")


def _chunk_keys(chunks: Sequence[int], *, stop: float) -> list[Element]:
    start = stop - CHUNK_STEP * len(chunks)
    drawn = [text("chunk", x=start - 8, y=50, class_="end")]
    for index, chunk in enumerate(chunks):
        x = start + CHUNK_STEP * index
        drawn += _key(x, x + 12, 46, style=colour_of(chunk))
        drawn.append(text(str(chunk), x=x + 17, y=50))
    return drawn


def _key(start: float, stop: float, y: float, *, style: str) -> list[Element]:
    return [element("line", x1=start, x2=stop, y1=y, y2=y, class_="curve", style=style)]


GROWTH_HEIGHT, GROWTH_HEAD, GROWTH_TITLE = 240.0, 84.0, 30.0
GROWTH_COLOURS = {
    "all keys and values": "teacache",
    "KV compression": "flowcache",
    "windows of 97 frames": "stride",
}
GROWTH_KEY_STEP = 190.0
GROWTH_COMMAND = "python scripts/bench_gpu.py --growth"


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
    """Return the drawing of a file of `bench_gpu.py --growth`."""
    found = read_json(path, advice="measure anew with --overwrite")
    try:
        models = list(found["models"].values())
        titles = [model["title"] for model in models]
        rows = [[_growth_chart(panel, model[panel.part]) for panel in PANELS] for model in models]
        names = list(models[0]["planned"])
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path}: no result of {GROWTH_COMMAND}: make it again") from None
    row_height = GROWTH_TITLE + GROWTH_HEIGHT
    note = (
        "planned at the released sizes; measured on the demos, processor time; every step computed"
    )
    keys: list[Element] = []
    for place, name in enumerate(names):
        x = MARGIN + 12 + place * GROWTH_KEY_STEP
        keys += [*_key(x, x + 16, 72, style=_growth_colour(name)), text(name, x=x + 22, y=76)]
    return document(
        text("Cost against the length of the video", x=MARGIN + 12, y=28, class_="title"),
        text(note, x=MARGIN + 12, y=50),
        *keys,
        *(
            placed(
                panel,
                MARGIN + place * PANEL_WIDTH,
                GROWTH_HEAD + GROWTH_TITLE + index * row_height,
            )
            for index, panels in enumerate(rows)
            for place, panel in enumerate(panels)
        ),
        *(
            text(title, x=MARGIN + 12, y=GROWTH_HEAD + 18 + index * row_height, class_="strong")
            for index, title in enumerate(titles)
        ),
        width=len(PANELS) * PANEL_WIDTH + 2 * MARGIN,
        height=GROWTH_HEAD + len(rows) * row_height + MARGIN,
        label="Memory and time per chunk against the number of frames: flat with KV compression",
    )


def _growth_chart(panel: Panel, lines: Mapping[str, Rows]) -> Element:
    values = [panel.value(row) for rows in lines.values() for row in rows]
    last = max(row["frames"] for rows in lines.values() for row in rows)
    where = "released size, planned" if panel.part == "planned" else "demo, measured"
    x = horizontal(f"frames ({where})", 0, last, width=PANEL_WIDTH)
    y = vertical(panel.name, max(values), height=GROWTH_HEIGHT)
    marks = [
        element(
            "path",
            element("title", name),
            d=curve([(row["frames"], panel.value(row)) for row in rows], x, y),
            class_="curve",
            style=_growth_colour(name),
        )
        for name, rows in lines.items()
    ]
    return plot(x, y, marks=marks, label=f"{panel.name} by frames")


def _growth_colour(name: str) -> str:
    return f"--c:var(--{GROWTH_COLOURS[name]})"


NUM_SHOWN = 7
"""Frames of each clip in the picture."""
FRAME = 112
"""Width and height of a frame in the picture, pixels."""
GAP, EDGE, LABEL_WIDTH, TITLE_HEIGHT = 6, 16, 172, 44
INK, SOFT, PAGE = "#1c1e21", "#545b63", "#ffffff"
NAME_SIZE, NOTE_SIZE = 18, 15


@dataclass(frozen=True)
class Strip:
    """A row of the picture: frames of a clip, their name and notes at the left."""

    name: str
    notes: Sequence[str]
    clip: Clip


def strip_of(name: str, clip: Clip, reference: Clip) -> Strip:
    """Note the share of computed chunk passes, and the distance from the reference."""
    stats = clip.stats
    share = stats.num_computed / (stats.num_computed + stats.num_reused)
    notes = [f"{100 * share:.0f} % computed"]
    if clip is not reference:
        notes.append(f"{psnr(clip.frames, reference.frames):.1f} dB")
    return Strip(name, notes, clip)


def draw_strips(strips: Sequence[Strip], *, title: str) -> bytes:
    """Return a PNG with a row of frames per clip, from the first frame to the last.

    The page is opaque, so that the picture can be read on any ground.
    """
    width = EDGE + LABEL_WIDTH + NUM_SHOWN * (FRAME + GAP) - GAP + EDGE
    height = TITLE_HEIGHT + len(strips) * (FRAME + GAP) - GAP + EDGE
    page = Image.new("RGB", (width, height), PAGE)
    pen = ImageDraw.Draw(page)
    name_font, note_font = ImageFont.load_default(NAME_SIZE), ImageFont.load_default(NOTE_SIZE)
    pen.text((EDGE, 13), title, fill=INK, font=name_font)
    for index, strip in enumerate(strips):
        top = TITLE_HEIGHT + index * (FRAME + GAP)
        pen.text((EDGE, top + 22), strip.name, fill=INK, font=name_font)
        for line, note in enumerate(strip.notes):
            pen.text((EDGE, top + 48 + 20 * line), note, fill=SOFT, font=note_font)
        last = len(strip.clip.frames) - 1
        for column in range(NUM_SHOWN):
            frame = strip.clip.frames[round(last * column / (NUM_SHOWN - 1))].numpy()
            picture = Image.fromarray(frame).resize((FRAME, FRAME), Image.Resampling.BICUBIC)
            page.paste(picture, (EDGE + LABEL_WIDTH + column * (FRAME + GAP), top))
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
