"""Text files that people write, read strictly (prompts, CSV tables), and Markdown written for them.

UTF-8 with or without a byte order mark, and UTF-16 or UTF-32 with one. What is wrong is said with
its row (the first is 1) and, in a table, its column.
"""

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowcache.errors import UserError

MAX_CHARACTERS = 10_000
"""Of a line or a cell: as much as a prompt may have."""
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
ADVICE = "save it as UTF-8 text"
SPECIAL = re.compile(r"[\\`*\[\]|~]")
"""Characters with a meaning in Markdown; `_` inside a word has none."""
HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


@dataclass(frozen=True)
class TableRow:
    """A row of a table."""

    number: int
    """As a spreadsheet counts: the head is row 1."""
    cells: Mapping[str, str]
    """Column -> cell."""


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that hold something, without the spaces around them."""
    lines: list[str] = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", _read_text(path)), start=1):
        _check_text(line, f"{path}: row {number}")
        if line.strip():
            lines.append(line.strip())
    if not lines:
        raise UserError(f"{path}: holds no prompt; write one per line")
    return lines


def read_table(path: Path, *, columns: Sequence[str]) -> list[TableRow]:
    """Return the rows of a CSV table with a head; empty lines are left out."""
    head: list[str] = []
    rows: list[TableRow] = []
    for number, cells in _records(path, _read_text(path), head):
        if not cells:
            continue
        if not head:
            head += [cell.strip() for cell in cells]
            _check_head(path, head, columns)
            continue
        for name, cell in zip(head, cells, strict=False):
            _check_text(cell, f"{path}: row {number}, column {name}")
        if len(cells) != len(head):
            raise UserError(_miscounted(path, number, cells, head))
        row = TableRow(number, dict(zip(head, cells, strict=True)))
        for name in columns:
            if not row.cells[name].strip():
                raise UserError(f"{path}: row {number}, column {name} is empty: fill it in")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no row below a head with {', '.join(columns)}")
    return rows


def _read_text(path: Path) -> str:
    """Return a file's text; bytes that are no UTF-8 come as lone surrogates."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    is_utf_8 = encoding.startswith("utf-8")
    try:
        return data.decode(encoding, "surrogateescape" if is_utf_8 else "strict")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: begins as {encoding.upper()}, but byte {error.start + 1} is none: {ADVICE}"
        ) from None


def _check_text(text: str, place: str) -> None:
    """Check that a line or cell is text of a sensible length."""
    for character in text:
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:
            raise UserError(f"{place}: byte 0x{code - 0xDC00:02x} is no UTF-8: {ADVICE}")
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\r\n":
            raise UserError(f"{place}: character U+{code:04X} is no text: {ADVICE}")
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{place}: {len(text)} characters, at most {MAX_CHARACTERS} are allowed: shorten it"
        )


def _check_head(path: Path, head: Sequence[str], columns: Sequence[str]) -> None:
    for name in head:
        _check_text(name, f"{path}: row 1")
    missing = [name for name in columns if name not in head]
    if missing:
        raise UserError(f"{path}: must have the columns {', '.join(columns)}: no {missing[0]}")
    twice = [name for name in head if head.count(name) > 1]
    if twice:
        raise UserError(f"{path}: row 1 names the column {twice[0]} twice: rename one")


def _miscounted(path: Path, number: int, cells: Sequence[str], head: Sequence[str]) -> str:
    if len(cells) < len(head):
        return f"{path}: row {number}, column {head[len(cells)]} is missing: fill it in"
    return (
        f"{path}: row {number} goes on after column {head[-1]}, {len(cells)} cells instead of "
        f"{len(head)}: put quotes around texts with commas"
    )


def _records(path: Path, text: str, head: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of every row, empty ones included.

    Args:
        head: names of the columns, as soon as the caller knows them.
    """
    lines = [line + "\n" for line in re.split(r"\r\n|\r|\n", text)]
    reader = csv.reader(lines, strict=True)
    number = start = 0
    while True:
        number += 1
        try:
            # the library's own limit, which says no place, is lifted for this row only
            cells = _unlimited(lambda: next(reader, None), len(text))
        except csv.Error:
            place = _faulty_cell("".join(lines[start:]))
            column = head[place] if place < len(head) else place + 1
            raise UserError(
                f"{path}: row {number}, column {column}: a quote is open or in a wrong place: "
                'write a quote inside of quotes twice ("")'
            ) from None
        if cells is None:
            return
        start = reader.line_num
        yield number, cells


def _unlimited(read: Callable[[], list[str] | None], limit: int) -> list[str] | None:
    """Read a row whose cells may have `limit` characters."""
    before = csv.field_size_limit(limit + 1)
    try:
        return read()
    finally:
        csv.field_size_limit(before)


def _faulty_cell(text: str) -> int:
    """Return in which cell of the first row, from 0, a quote is open or in a wrong place."""

    def breaks(length: int) -> bool:
        try:
            for _ in csv.reader([text[:length]], strict=True):
                pass
        except csv.Error as error:
            return "unexpected end" not in str(error)
        return False

    low, high = 0, len(text)
    if breaks(high):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if breaks(middle) else (middle, high)
    return len(next(csv.reader([text[:high]]), [""])) - 1


# Markdown -----------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    r"""Return a name so that Markdown shows it as it is, on one line."""
    plain = " ".join(text.split())
    marked = SPECIAL.sub(lambda found: "\\" + found[0], plain)
    return "".join(HTML.get(character, character) for character in marked)


def csv_of(rows: Iterable[Iterable[object]]) -> str:
    """Return rows as a CSV table, numbers in full; None is an empty cell."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def table_row(cells: Iterable[str]) -> str:
    """Return a row of a table; cells that are not ours to write are `escaped` before."""
    return f"| {' | '.join(cells)} |"
