"""Tables in Markdown whose cells show what they hold, whatever that is."""

import re
from collections.abc import Iterable

SPECIAL = re.compile(r"[\\`*\[\]|~]")
"""Characters that Markdown takes for its own; `_` inside a word is none."""
HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escaped(text: str) -> str:
    r"""Return a name so that Markdown shows it as it is, on one line.

    Example: "a|b" becomes "a\|b", "<i>" becomes "&lt;i&gt;", a line break a space.
    """
    plain = " ".join(text.split())
    marked = SPECIAL.sub(lambda found: "\\" + found[0], plain)
    return "".join(HTML.get(character, character) for character in marked)


def table_row(cells: Iterable[str]) -> str:
    """Return a row of a table; cells that are not ours to write are `escaped` before."""
    return f"| {' | '.join(cells)} |"
