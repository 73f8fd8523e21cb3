"""The repository as a drawing: floors, rooms (folders), files, the ways of a prompt and a key."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

from flowcache.report.drawing import circle, document, element, rectangle, text

REPOSITORY = Path(__file__).resolve().parents[3]
WIDTH, MARGIN, GAP = 830.0, 12.0, 10.0
HEAD, CHIP_HEIGHT, CHIP_GAP = 46.0, 24.0, 6.0
LETTER_WIDTH = 7.2
"""Mean width of a letter of 12 CSS pixels, for boxes that are as wide as their text."""
BADGE = 7.5
"""Radius of a number on a file."""
CHIP = "fill:var(--page);stroke:var(--line)"
COLOURS = {"prompt": "fill:var(--flowcache)", "key": "fill:var(--teacache)"}
LABEL = (
    "Floors of the repository from the method at the bottom to the commands at the top, with the "
    "files that a prompt and a key pass."
)


class Room(NamedTuple):
    """A folder of Python files."""

    folder: str
    title: str
    words: str
    """What it is for."""


FLOORS: Sequence[Sequence[Room]] = (
    (Room("scripts", "scripts/", "commands: arguments, then a call"),),
    (
        Room("FlowCache4SkyReels-V2/skyreels_v2", "skyreels_v2", "a model: its sampling algorithm"),
        Room("FlowCache4Self-Forcing/self_forcing", "self_forcing", "a model: its three loops"),
        Room("FlowCache4MAGI-1/magi1", "magi1", "a model: sampling, DiT, VAE, text"),
    ),
    (
        Room("common/flowcache/report", "flowcache.report", "pages and figures"),
        Room("common/flowcache/demo", "flowcache.demo", "clips, judge, training"),
        Room("common/flowcache/tuning", "flowcache.tuning", "planned steps"),
    ),
    (
        Room("common/flowcache/bench", "flowcache.bench", "many videos, tables"),
        Room("common/flowcache/gpu", "flowcache.gpu", "speed, CUDA paths"),
        Room("common/flowcache/serve", "flowcache.serve", "HTTP, live page"),
    ),
    (Room("common/flowcache/wan", "flowcache.wan", "the Wan 2.1 backbone, for several models"),),
    (
        Room(
            "common/flowcache/runtime",
            "flowcache.runtime",
            "everything a run needs, once for all models; model.py is the contract",
        ),
    ),
    (Room("common/flowcache", "flowcache", "the method"),),
)
"""From top to bottom."""
WAYS = {
    "prompt": (
        "FlowCache4SkyReels-V2/skyreels_v2/__main__.py",
        "common/flowcache/runtime/cli.py",
        "common/flowcache/runtime/entry.py",
        "common/flowcache/runtime/run.py",
        "common/flowcache/runtime/config.py",
        "FlowCache4SkyReels-V2/skyreels_v2/model.py",
        "common/flowcache/runtime/plan.py",
        "common/flowcache/wan/text.py",
        "FlowCache4SkyReels-V2/skyreels_v2/pipeline.py",
        "FlowCache4SkyReels-V2/skyreels_v2/sampler.py",
        "common/flowcache/policies.py",
        "common/flowcache/wan/dit.py",
        "common/flowcache/predict.py",
        "common/flowcache/wan/unipc.py",
        "common/flowcache/wan/vae.py",
        "common/flowcache/runtime/video.py",
    ),
    "key": (
        "common/flowcache/wan/dit.py",
        "common/flowcache/kv.py",
        "common/flowcache/compress.py",
        "common/flowcache/attention.py",
    ),
}
"""The files that each passes, in order; docs/architecture.md says what happens there."""


def draw_architecture(root: Path = REPOSITORY) -> str:
    """Return the drawing of a checkout."""
    drawn: list[Element] = []
    y = MARGIN
    for floor in FLOORS:
        width = (WIDTH - 2 * MARGIN - GAP * (len(floor) - 1)) / len(floor)
        rooms = [
            _room(room, root, x=MARGIN + index * (width + GAP), y=y, width=width)
            for index, room in enumerate(floor)
        ]
        height = max(bottom for _, bottom in rooms) - y
        for index, (parts, _) in enumerate(rooms):
            x = MARGIN + index * (width + GAP)
            drawn.append(rectangle(x, y, width, height, rx=8, class_="ground"))
            drawn += parts
        y += height + GAP
    drawn.append(_legend(y + 6))
    return document(*drawn, width=WIDTH, height=y + 24, label=LABEL)


def _room(
    room: Room, root: Path, *, x: float, y: float, width: float
) -> tuple[list[Element], float]:
    """Draw a room without its ground; return its lower edge, too."""
    files = sorted(path for path in (root / room.folder).glob("*.py") if path.stem != "__init__")
    drawn = [
        text(room.title, x=x + 12, y=y + 20, class_="strong"),
        text(room.words, x=x + 12, y=y + 37),
    ]
    left, top = x + 12, y + HEAD
    for path in files:
        wide = LETTER_WIDTH * len(path.stem) + 20
        if left + wide > x + width - 8:
            left, top = x + 12, top + CHIP_HEIGHT + CHIP_GAP
        drawn += _chip(path.stem, x=left, y=top, width=wide)
        place = str(path.relative_to(root))
        stops = [
            (kind, number)
            for kind, stations in WAYS.items()
            for number, station in enumerate(stations, start=1)
            if station == place
        ]
        for index, (kind, number) in enumerate(stops):
            drawn += _badge(kind, number, x=left + wide - 2 * BADGE * index, y=top)
        left += wide + CHIP_GAP + 4
    return drawn, top + CHIP_HEIGHT + 12


def _chip(caption: str, *, x: float, y: float, width: float) -> list[Element]:
    return [
        rectangle(x, y, width, CHIP_HEIGHT, rx=4, style=CHIP),
        text(caption, x=x + 7, y=y + 16, class_="name", style="font-size:12px"),
    ]


def _badge(kind: str, number: int, *, x: float, y: float) -> list[Element]:
    style = "font-size:11px;fill:var(--page)"
    return [
        circle(x, y, BADGE, style=COLOURS[kind]),
        text(str(number), x=x, y=y + 4, class_="middle", style=style),
    ]


def _legend(y: float) -> Element:
    parts: list[Element] = []
    for index, (kind, words) in enumerate(
        (("prompt", "stations of a prompt"), ("key", "stations of a key"))
    ):
        x = MARGIN + 12 + 200 * index
        parts += [circle(x, y - 4, BADGE, style=COLOURS[kind]), text(words, x=x + 14, y=y)]
    return element("g", *parts)
