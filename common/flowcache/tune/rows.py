"""Results kept row by row, so that a second start goes on where the first one stopped."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowcache.errors import UserError


class Rows:
    """A file of JSON lines in a working folder that belongs to one set of settings."""

    def __init__(self, folder: Path, *, identity: Mapping[str, Any]) -> None:
        """Open the folder.

        Raises:
            UserError: it holds results of other settings, or is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path = folder / "rows.jsonl"
        self._rows: list[dict[str, Any]] = []
        wanted = json.loads(json.dumps(identity))
        for number, line in enumerate(self._lines()):
            try:
                row: dict[str, Any] = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(
                    f"{self._path}: line {number + 1} is damaged: delete it, or choose another "
                    "--work folder"
                ) from None
            self._rows.append(row)
        if self._rows and self._rows[0] != wanted:
            raise UserError(
                f"{folder} holds the results of other settings: choose another --work folder, or "
                "delete it"
            )
        if not self._rows:
            self.add(wanted)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        self._rows.append(dict(row))

    def find(self, **values: Any) -> list[dict[str, Any]]:
        """Return the rows that have these values."""
        return [r for r in self._rows[1:] if all(r.get(k) == v for k, v in values.items())]

    def _lines(self) -> list[str]:
        return self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []


def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the mean of a column."""
    return statistics.fmean(float(row[key]) for row in rows)


def geometric_mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the geometric mean of a column; 0 if one of its values is 0."""
    values = [float(row[key]) for row in rows]
    return statistics.geometric_mean(values) if all(values) else 0.0
