"""The method in one picture: noise levels, decisions per chunk, the KV cache."""

import random
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

from explain_page.markup import element, number
from explain_page.plot import colour_of, text

from figures.drawing import arrow_down, box, document, lines_of_text

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
BAR = "fill:var(--flowcache)"
LIMIT = "stroke:var(--teacache);stroke-width:2.5"


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
    return document(
        *_window(),
        *_decisions(),
        *_cache(),
        width=WIDTH,
        height=HEIGHT,
        num_chunks=WAITING + 1,
        label="A window of chunks at their own noise levels; each active chunk adds up its own "
        "distance and is computed or reused; computed chunks write keys and values into one "
        "buffer, whose clean part is kept at a fixed number of tokens.",
    )


def _left_of(chunk: int) -> float:
    return LEFT + PITCH * chunk


def _middle_of(chunk: int) -> float:
    return _left_of(chunk) + BOX_WIDTH / 2


def _window() -> list[Element]:
    noise = random.Random(SEED)
    drawn = [
        text("1. A window of chunks, each at its own noise level", x=LEFT, y=34, class_="title")
    ]
    levels = {**dict.fromkeys(CLEAN, 0.0), **{each.chunk: each.noise for each in ACTIVE}}
    for chunk, level in levels.items():
        drawn.extend(_picture(chunk, level, noise))
        drawn.append(_caption(chunk, f"{100 * level:.0f} % noise" if level else "clean"))
    style = "fill:none;stroke:var(--line);stroke-dasharray:4 4"
    drawn.append(box(_left_of(WAITING), WINDOW_Y, BOX_WIDTH, BOX_HEIGHT, class_="", style=style))
    drawn.append(_caption(WAITING, "waiting"))
    return drawn


def _caption(chunk: int, state: str) -> Element:
    lines = (f"chunk {chunk}", state)
    return lines_of_text(lines, x=_middle_of(chunk), y=WINDOW_Y + BOX_HEIGHT + 19, class_="middle")


def _picture(chunk: int, level: float, noise: random.Random) -> list[Element]:
    """Draw a disc that moves from chunk to chunk, and noise over it."""
    left = _left_of(chunk)
    across, down = int(BOX_WIDTH) // CELL, int(BOX_HEIGHT) // CELL
    pixels = [
        f"M{number(left + CELL * column)} {number(WINDOW_Y + CELL * row)}h{CELL}v{CELL}h-{CELL}z"
        for column in range(across)
        for row in range(down)
        if noise.random() < level
    ]
    return [
        box(left, WINDOW_Y, BOX_WIDTH, BOX_HEIGHT, class_="ground"),
        element(
            "circle",
            cx=left + 22 + 7 * chunk,
            cy=WINDOW_Y + BOX_HEIGHT / 2,
            r=17,
            class_="chunk",
            style=colour_of(chunk),
        ),
        element("path", d="".join(pixels), style="fill:var(--noise)"),
        box(
            left,
            WINDOW_Y,
            BOX_WIDTH,
            BOX_HEIGHT,
            class_="curve",
            style=colour_of(chunk),
        ),
    ]


def _decisions() -> list[Element]:
    top = DECISION_Y + 34
    drawn = [
        text("2. Every chunk decides", x=LEFT, y=top, class_="title"),
        lines_of_text(
            (
                "Its signal's change since the last tick",
                "is added to its own sum.",
                "Below the threshold: its stored result",
                "is used once more. Else: it goes through",
                "the transformer, and the sum starts at 0.",
            ),
            x=LEFT,
            y=top + 26,
        ),
        *_gauge_legend(LEFT, top + 126),
    ]
    for each in ACTIVE:
        drawn.extend(_decision(each))
    return drawn


def _gauge_legend(x: float, y: float) -> list[Element]:
    return [
        element("rect", x=x, y=y - 11, width=12, height=12, style=f"{BAR};opacity:.45"),
        text("sum so far", x=x + 18, y=y),
        element("rect", x=x + 96, y=y - 11, width=12, height=12, style=BAR),
        text("change", x=x + 114, y=y),
        element("line", x1=x + 178, x2=x + 178, y1=y - 14, y2=y + 4, style=LIMIT),
        text("threshold", x=x + 186, y=y),
    ]


def _decision(each: Active) -> list[Element]:
    left, middle, top = _left_of(each.chunk), _middle_of(each.chunk), DECISION_Y + 28
    scale = BOX_WIDTH / GAUGE_FULL
    limit = left + scale * THRESHOLD
    old, new = scale * each.accumulated, scale * each.distance
    sign = "≥" if each.is_computed else "<"
    total = each.accumulated + each.distance
    drawn = [
        arrow_down(middle, WINDOW_Y + BOX_HEIGHT + 46, top - 8),
        box(left, top, BOX_WIDTH, 16, class_="ground"),
        element("rect", x=left, y=top, width=old, height=16, style=f"{BAR};opacity:.45"),
        element("rect", x=left + old, y=top, width=new, height=16, style=BAR),
        element(
            "line",
            x1=limit,
            x2=limit,
            y1=top - 5,
            y2=top + 21,
            style=LIMIT,
        ),
        text(f"{total:.2f} {sign} {THRESHOLD:.2f}", x=middle, y=top + 40, class_="middle name"),
        arrow_down(middle, top + 48, top + 68),
    ]
    outcome_y = top + 74
    if each.is_computed:
        drawn.append(
            box(left + 6, outcome_y, BOX_WIDTH - 12, 34, class_="", style="fill:var(--flowcache)")
        )
        word = text("compute", x=middle, y=outcome_y + 22, class_="middle strong")
        word.set("style", "fill:var(--page)")
    else:
        style = "fill:none;stroke:var(--flowcache);stroke-width:2;stroke-dasharray:5 3"
        drawn.append(box(left + 6, outcome_y, BOX_WIDTH - 12, 34, class_="", style=style))
        word = text("reuse", x=middle, y=outcome_y + 22, class_="middle strong")
    drawn.append(word)
    return drawn


def _cache() -> list[Element]:
    """Draw the buffer: kept tokens of the clean chunks, all tokens of the active ones."""
    top = KV_Y
    kept = [chunk for chunk, count in TOKENS_KEPT for _ in range(count)]
    first, last = ACTIVE[0].chunk, ACTIVE[-1].chunk
    drawn = [
        text("3. One KV buffer", x=LEFT, y=top, class_="title"),
        lines_of_text(
            (
                "Of the clean chunks a fixed",
                "number of tokens stays: those",
                "with most importance and",
                "least redundancy.",
            ),
            x=LEFT,
            y=top + 26,
        ),
        *_tokens(_left_of(CLEAN[-1]), kept),
        _brace(_left_of(CLEAN[-1]), _left_of(CLEAN[-1]) + BOX_WIDTH),
        text("budget", x=_middle_of(CLEAN[-1]), y=top + 68, class_="middle"),
        _brace(_left_of(first), _left_of(last) + BOX_WIDTH),
        lines_of_text(
            (
                "window: a computed chunk writes its keys and values, and sees",
                "all before it; a reused one leaves those of its last computed step",
            ),
            x=(_left_of(first) + _left_of(last) + BOX_WIDTH) / 2,
            y=top + 68,
            class_="middle",
        ),
    ]
    for each in ACTIVE:
        drawn.extend(_tokens(_left_of(each.chunk), [each.chunk] * NUM_TOKENS))
        if each.is_computed:
            drawn.append(arrow_down(_middle_of(each.chunk), DECISION_Y + 144, top - 6))
    return drawn


def _tokens(start: float, chunks: Sequence[int]) -> list[Element]:
    """Draw the tokens that fill the width of a chunk; each names its chunk."""
    width = BOX_WIDTH / NUM_TOKENS
    return [
        element(
            "rect",
            x=start + index * width,
            y=KV_Y,
            width=width - 1,
            height=TOKEN_HEIGHT,
            class_="chunk",
            style=colour_of(chunk),
        )
        for index, chunk in enumerate(chunks)
    ]


def _brace(start: float, stop: float) -> Element:
    path = f"M{number(start)} {number(KV_Y + TOKEN_HEIGHT + 6)}v6H{number(stop)}v-6"
    return element("path", d=path, class_="arrow")
