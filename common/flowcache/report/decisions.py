"""What the cache decides: of one run, per chunk and tick, with the tokens that stay; and, of three
chunks, as the project's mark.
"""

from pathlib import Path
from xml.etree.ElementTree import Element

from flowcache.errors import UserError
from flowcache.report.charts import SHARE_WIDTH, cache_chart, heat_map, limits_of
from flowcache.report.drawing import (
    RIGHT,
    Pair,
    colour_of,
    document,
    line,
    number,
    percent,
    placed,
    rectangle,
    text,
)
from flowcache.report.run import load_run

WIDTH, MARGIN = 884.0, 12.0
HEAD, TITLE = 84.0, 26.0
KEYS = (("computed", "computed"), ("reused", "reused"), ("ground", "not active"))
KEY_STEP = 110.0
EDGE = "stroke:var(--line)"
CHUNK_STEP = 34.0

MARK_ROWS = ("110100", "101001", "110010")
"""Of three chunks, each starting one tick after the one before: 1 computed, 0 reused."""
CELL, PITCH = 14.0, 17.0
WORD_X, WORD_WIDTH, MARK_WIDTH, MARK_HEIGHT = 158.0, 250.0, 420.0, 76.0
WORD_STYLE = "font-size:44px;font-weight:650;letter-spacing:-1px"
MARK_COLOURS: dict[str, Pair] = {"page": ("none", "none")}
"""The page behind it shows through."""


def draw_decisions(record: Path, *, model: str) -> str:
    """Return the drawing of a record: a row per chunk, a column per tick; below, the KV cache."""
    run = load_run(record, "A")
    panel, limits = run.panels[0], limits_of([run])
    width = WIDTH - 2 * MARGIN
    aligned = width - SHARE_WIDTH + RIGHT  # both have their ticks at the same places
    decisions = heat_map(run, panel, limits=limits, width=width)
    tokens = next(
        (cache_chart(run, each, limits=limits, width=aligned) for each in run.cache_panels), None
    )
    if decisions is None or tokens is None:
        raise UserError(f"{record}: holds no decisions or no KV cache: nothing to draw")
    for cell in (*decisions.iter("rect"), *tokens.iter("rect")):
        for tip in cell.findall("title"):  # a picture on a page has none
            cell.remove(tip)
    below = HEAD + float(decisions.get("height", "0")) + TITLE
    found = f"{model} demo: which chunk is computed when, and what the KV cache keeps"
    share = percent(run.computed_share, digits=0)
    note = f"preset {run.record['preset']}: {share} of the chunk passes are computed"
    return document(
        text(found, x=MARGIN + 12, y=28, class_="title"),
        text(note, x=MARGIN + 12, y=50),
        *_keys(),
        placed(decisions, MARGIN, HEAD - 10),
        text(
            "KV cache: clean tokens that stay after each tick, by chunk",
            x=MARGIN + 12,
            y=below - 6,
            class_="strong",
        ),
        *_chunk_keys(run.chunks, y=below - 6),
        placed(tokens, MARGIN, below + 4),
        width=WIDTH,
        height=below + float(tokens.get("height", "0")) + MARGIN,
        label=f"{found}; {note}.",
        num_chunks=max(run.chunks) + 1,
    )


def _keys() -> list[Element]:
    drawn: list[Element] = []
    for index, (class_, name) in enumerate(KEYS):
        x = WIDTH - MARGIN - 12 - KEY_STEP * (len(KEYS) - index) + 10
        drawn.append(rectangle(x, 39, 14, 14, rx=2, class_=class_, style=EDGE))
        drawn.append(text(name, x=x + 20, y=50))
    return drawn


def _chunk_keys(chunks: list[int], *, y: float) -> list[Element]:
    start = WIDTH - MARGIN - 12 - CHUNK_STEP * len(chunks)
    drawn = [text("chunk", x=start - 8, y=y, class_="end")]
    for index, chunk in enumerate(chunks):
        x = start + CHUNK_STEP * index
        drawn.append(rectangle(x, y - 10, 12, 12, rx=2, class_="chunk", style=colour_of(chunk)))
        drawn.append(text(str(chunk), x=x + 17, y=y))
    return drawn


def draw_mark() -> str:
    """Return the project's mark: three chunks' decisions, each a tick later, and its name."""
    drawn: list[Element] = []
    for chunk, steps in enumerate(MARK_ROWS):
        for step, decision in enumerate(steps):
            x, y = 6 + PITCH * (step + chunk), 13 + PITCH * chunk
            class_ = "computed" if decision == "1" else "reused"
            drawn.append(rectangle(x, y, CELL, CELL, rx=4, class_=class_))
    drawn.append(line(6, 6 + PITCH * 8 - 3, 68, 68, class_="axis"))
    word = text("FlowCache", x=WORD_X, y=55, class_="name", style=WORD_STYLE)
    word.set("textLength", number(WORD_WIDTH))  # whatever font the reader has
    return document(
        *drawn,
        word,
        width=MARK_WIDTH,
        height=MARK_HEIGHT,
        label="FlowCache",
        colours=MARK_COLOURS,
    )
