"""One colour per chunk, in order from dark to light, so that it can be told without hue."""

from collections.abc import Sequence

LIGHT = ("#3b1c6b", "#31688e", "#1f9e89", "#7ba428", "#d98a00")
"""From the first chunk to the last, on a white page."""
DARK = ("#8a78e6", "#559fdc", "#3cc5ad", "#a8d455", "#fde05a")
"""The same on a black page."""


def chunk_styles(num_chunks: int) -> str:
    """Return the CSS variables `--chunk-0`, `--chunk-1`, ... for a light and a dark page."""
    light, dark = (_variables(anchors, num_chunks) for anchors in (LIGHT, DARK))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _variables(anchors: Sequence[str], num_chunks: int) -> str:
    last = max(1, num_chunks - 1)
    colours = (_mixed(anchors, chunk / last) for chunk in range(num_chunks))
    return ";".join(f"--chunk-{chunk}:{colour}" for chunk, colour in enumerate(colours))


def _mixed(anchors: Sequence[str], share: float) -> str:
    """Return the colour at a share of the way from the first anchor to the last."""
    place = share * (len(anchors) - 1)
    index = min(int(place), len(anchors) - 2)
    weight = place - index
    pair = zip(_channels(anchors[index]), _channels(anchors[index + 1]), strict=True)
    return "#" + "".join(f"{round(a + weight * (b - a)):02x}" for a, b in pair)


def _channels(colour: str) -> list[int]:
    return list(bytes.fromhex(colour[1:]))
