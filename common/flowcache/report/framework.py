"""The method in one picture: noise levels, decisions per chunk, the KV cache."""

import random
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

from flowcache.report.drawing import (
    circle,
    colour_of,
    document,
    element,
    line,
    number,
    path,
    rectangle,
    text,
)

WIDTH, HEIGHT = 900.0, 508.0
LEFT, PITCH = 24.0, 108.0
BOX_WIDTH, BOX_HEIGHT = 96.0, 56.0
WINDOW_Y, DECISION_Y, KV_Y = 54.0, 182.0, 390.0
CELL = 4
"""Size of a noise pixel in CSS pixels."""
GAUGE_FULL = 0.2
"""Accumulated distance at the right end of a gauge, dimensionless."""
THRESHOLD = 0.15
TOKENS_KEPT = ((0, 4), (1, 6), (2, 14))
"""Chunk and how many of its tokens are drawn as kept."""
NUM_TOKENS = 24
"""Tokens that are drawn of a whole chunk, and of all clean chunks together."""
TOKEN_HEIGHT = 36.0
SEED = 3
BAR, FAINT_BAR = "fill:var(--flowcache)", "fill:var(--flowcache);opacity:.45"
LIMIT = "stroke:var(--teacache);stroke-width:2.5"
WAITS = "fill:none;stroke:var(--line);stroke-dasharray:4 4"
REUSES = "fill:none;stroke:var(--flowcache);stroke-width:2;stroke-dasharray:5 3"
LABEL = (
    "A window of chunks at their own noise levels; each active chunk adds up its own distance and "
    "is computed or reused; computed chunks write keys and values into one buffer, whose clean "
    "part is kept at a fixed number of tokens."
)
DECISION_TEXT = (
    "Its signal's change since the last tick",
    "is added to its own sum.",
    "Below the threshold: its stored result",
    "is used once more. Else: it goes through",
    "the transformer, and the sum starts at 0.",
)
CLEAN_TEXT = (
    "Of the clean chunks a fixed",
    "number of tokens stays: those",
    "with most importance and",
    "least redundancy.",
)
WINDOW_TEXT = (
    "window: a computed chunk writes its keys and values, and sees",
    "all before it; a reused one leaves those of its last computed step",
)


class Active(NamedTuple):
    """An active chunk of the drawing."""

    chunk: int
    noise: float
    """Share of the picture that is noise."""
    accumulated: float
    distance: float

    @property
    def is_computed(self) -> bool:
        """Whether the accumulated distance reaches the threshold."""
        return self.accumulated + self.distance >= THRESHOLD


CLEAN = (0, 1, 2)
ACTIVE = (
    Active(3, 0.15, 0.04, 0.13),
    Active(4, 0.4, 0.05, 0.05),
    Active(5, 0.65, 0.13, 0.03),
    Active(6, 0.9, 0.03, 0.02),
)
WAITING = 7


def draw_framework() -> str:
    """Return the drawing."""
    drawn = [*_window(), *_decisions(), *_cache()]
    return document(*drawn, width=WIDTH, height=HEIGHT, num_chunks=WAITING + 1, label=LABEL)


def _left_of(chunk: int) -> float:
    return LEFT + PITCH * chunk


def _middle_of(chunk: int) -> float:
    return _left_of(chunk) + BOX_WIDTH / 2


def _window() -> list[Element]:
    noise = random.Random(SEED)
    title = "1. A window of chunks, each at its own noise level"
    drawn = [text(title, x=LEFT, y=34, class_="title")]
    levels = {**dict.fromkeys(CLEAN, 0.0), **{each.chunk: each.noise for each in ACTIVE}}
    for chunk, level in levels.items():
        drawn += _picture(chunk, level, noise)
        drawn.append(_caption(chunk, f"{100 * level:.0f} % noise" if level else "clean"))
    drawn.append(_box(_left_of(WAITING), WINDOW_Y, BOX_WIDTH, BOX_HEIGHT, style=WAITS))
    drawn.append(_caption(WAITING, "waiting"))
    return drawn


def _caption(chunk: int, state: str) -> Element:
    lines = (f"chunk {chunk}", state)
    return _lines(lines, x=_middle_of(chunk), y=WINDOW_Y + BOX_HEIGHT + 19, class_="middle")


def _picture(chunk: int, level: float, noise: random.Random) -> list[Element]:
    """Draw a disc that moves from chunk to chunk, and noise over it."""
    left, colour = _left_of(chunk), colour_of(chunk)
    across, down = int(BOX_WIDTH) // CELL, int(BOX_HEIGHT) // CELL
    pixels = [
        f"M{number(left + CELL * column)} {number(WINDOW_Y + CELL * row)}h{CELL}v{CELL}h-{CELL}z"
        for column in range(across)
        for row in range(down)
        if noise.random() < level
    ]
    x, y = left + 22 + 7 * chunk, WINDOW_Y + BOX_HEIGHT / 2
    return [
        _box(left, WINDOW_Y, BOX_WIDTH, BOX_HEIGHT, class_="ground"),
        circle(x, y, 17, class_="chunk", style=colour),
        path("".join(pixels), style="fill:var(--noise)"),
        _box(left, WINDOW_Y, BOX_WIDTH, BOX_HEIGHT, class_="curve", style=colour),
    ]


def _decisions() -> list[Element]:
    top = DECISION_Y + 34
    y = top + 126
    drawn = [
        text("2. Every chunk decides", x=LEFT, y=top, class_="title"),
        _lines(DECISION_TEXT, x=LEFT, y=top + 26),
        rectangle(LEFT, y - 11, 12, 12, style=FAINT_BAR),
        text("sum so far", x=LEFT + 18, y=y),
        rectangle(LEFT + 96, y - 11, 12, 12, style=BAR),
        text("change", x=LEFT + 114, y=y),
        _limit(LEFT + 178, y - 14, y + 4),
        text("threshold", x=LEFT + 186, y=y),
    ]
    return drawn + [part for each in ACTIVE for part in _decision(each)]


def _decision(each: Active) -> list[Element]:
    left, middle, top = _left_of(each.chunk), _middle_of(each.chunk), DECISION_Y + 28
    scale = BOX_WIDTH / GAUGE_FULL
    old, new = scale * each.accumulated, scale * each.distance
    sign = "≥" if each.is_computed else "<"
    total = each.accumulated + each.distance
    word = "compute" if each.is_computed else "reuse"
    style, ink = (BAR, "fill:var(--page)") if each.is_computed else (REUSES, None)
    return [
        _arrow(middle, WINDOW_Y + BOX_HEIGHT + 46, top - 8),
        _box(left, top, BOX_WIDTH, 16, class_="ground"),
        rectangle(left, top, old, 16, style=FAINT_BAR),
        rectangle(left + old, top, new, 16, style=BAR),
        _limit(left + scale * THRESHOLD, top - 5, top + 21),
        text(f"{total:.2f} {sign} {THRESHOLD:.2f}", x=middle, y=top + 40, class_="middle name"),
        _arrow(middle, top + 48, top + 68),
        _box(left + 6, top + 74, BOX_WIDTH - 12, 34, style=style),
        text(word, x=middle, y=top + 96, class_="middle strong", style=ink),
    ]


def _cache() -> list[Element]:
    """Draw the buffer: kept tokens of the clean chunks, all tokens of the active ones."""
    kept = [chunk for chunk, count in TOKENS_KEPT for _ in range(count)]
    clean = _left_of(CLEAN[-1])
    start, stop = _left_of(ACTIVE[0].chunk), _left_of(ACTIVE[-1].chunk) + BOX_WIDTH
    drawn = [
        text("3. One KV buffer", x=LEFT, y=KV_Y, class_="title"),
        _lines(CLEAN_TEXT, x=LEFT, y=KV_Y + 26),
        *_tokens(clean, kept),
        _brace(clean, clean + BOX_WIDTH),
        text("budget", x=_middle_of(CLEAN[-1]), y=KV_Y + 68, class_="middle"),
        _brace(start, stop),
        _lines(WINDOW_TEXT, x=(start + stop) / 2, y=KV_Y + 68, class_="middle"),
    ]
    for each in ACTIVE:
        drawn += _tokens(_left_of(each.chunk), [each.chunk] * NUM_TOKENS)
        if each.is_computed:
            drawn.append(_arrow(_middle_of(each.chunk), DECISION_Y + 144, KV_Y - 6))
    return drawn


def _tokens(start: float, chunks: Sequence[int]) -> list[Element]:
    """Draw the tokens that fill the width of a chunk; each names its chunk."""
    width = BOX_WIDTH / NUM_TOKENS
    return [
        rectangle(
            start + index * width,
            KV_Y,
            width - 1,
            TOKEN_HEIGHT,
            class_="chunk",
            style=colour_of(chunk),
        )
        for index, chunk in enumerate(chunks)
    ]


def _brace(start: float, stop: float) -> Element:
    top = KV_Y + TOKEN_HEIGHT + 6
    return path(f"M{number(start)} {number(top)}v6H{number(stop)}v-6", class_="arrow")


def _box(
    x: float, y: float, width: float, height: float, *, class_: str = "", style: str | None = None
) -> Element:
    """Draw a rectangle with round corners."""
    return rectangle(x, y, width, height, rx=4, class_=class_, style=style)


def _limit(x: float, start: float, stop: float) -> Element:
    return line(x, x, start, stop, style=LIMIT)


def _lines(lines: Sequence[str], *, x: float, y: float, class_: str | None = None) -> Element:
    """Write lines below one another, 18 CSS pixels apart."""
    return element(
        "g", *(text(words, x=x, y=y + 18 * at, class_=class_) for at, words in enumerate(lines))
    )


def _arrow(x: float, start: float, stop: float) -> Element:
    """Draw an arrow from above."""
    return path(f"M{number(x)} {number(start)}V{number(stop)}m-4 -6l4 6l4 -6", class_="arrow")
