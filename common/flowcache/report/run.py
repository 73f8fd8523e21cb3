"""A run as the page shows it: its record, its video if that is there, its alarms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from flowcache.errors import UserError
from flowcache.runtime.files import read_json
from flowcache.runtime.record import alarms, read_record
from flowcache.runtime.stats import Period

SUFFIX = ".record.json"
NOTHING = "–"
"""Written where there is no value."""


class Row(NamedTuple):
    """What happened to one chunk in one branch at one tick."""

    segment: int
    tick: int
    chunk: int
    step: int
    branch: str
    computed: bool
    distance: float | None
    """None where none was measured; may be infinite or not a number."""
    accumulated: float | None
    flops: int
    flops_saved: int
    seconds: float | None


class Panel(NamedTuple):
    """One chart's share of a run: a window of the video, and a guidance pass."""

    segment: int
    branch: str


class ChunkFrames(NamedTuple):
    """The frames of the video that a chunk shows, from `first` to before `stop`."""

    segment: int
    chunk: int
    first: int
    stop: int

    @property
    def key_frames(self) -> tuple[int, int, int]:
        """The first, the middle and the last frame."""
        return self.first, (self.first + self.stop - 1) // 2, self.stop - 1


@dataclass(frozen=True)
class Run:
    """A record, and its alarms, video and time line."""

    letter: str
    """A or B: how the page names it if there are two."""
    record: Mapping[str, Any]
    rows: Sequence[Row]
    alarms: Sequence[str]
    video: Path
    timeline: Sequence[Period] = ()
    """When each stage was at work; empty if the report of the run is missing or does not say."""

    @property
    def name(self) -> str:
        return self.video.stem

    @property
    def threshold(self) -> float | None:
        """The accumulated distance from which a chunk is computed."""
        return self.record["threshold"]

    @cached_property
    def panels(self) -> list[Panel]:
        """The segments, and in each the branches in order of their first pass."""
        found = dict.fromkeys(Panel(row.segment, row.branch) for row in self.rows)
        return sorted(found, key=lambda panel: panel.segment)

    @cached_property
    def cache_panels(self) -> list[Panel]:
        """The segments, and in each the branches that have a KV cache of their own.

        MAGI-1 decides once for all branches, and each keeps its own keys.
        """
        found = dict.fromkeys(Panel(e["segment"], e["branch"]) for e in self.record["kv"])
        return sorted(found, key=lambda panel: panel.segment)

    @property
    def chunks(self) -> list[int]:
        """All chunks with a pass or with tokens in the cache, in order."""
        cached = (int(chunk) for entry in self.record["kv"] for chunk in entry["tokens"])
        return sorted({row.chunk for row in self.rows}.union(cached))

    @cached_property
    def num_computed(self) -> int:
        return sum(row.computed for row in self.rows)

    @property
    def computed_share(self) -> float:
        return self.num_computed / len(self.rows)

    @cached_property
    def flops(self) -> int:
        """FLOPs spent on chunk passes, without embeddings and clean passes."""
        return sum(row.flops for row in self.rows)

    @cached_property
    def flops_saved(self) -> int:
        """FLOPs that reuse saved; below 0 where measuring cost more than it saved."""
        return sum(row.flops_saved for row in self.rows)

    @property
    def seconds(self) -> float | None:
        """Seconds of all stages, or None if no stage was timed."""
        stages = self.record["stages"].values()
        return sum(stage["seconds"] for stage in stages if not stage["within"]) if stages else None

    @property
    def peak_tokens(self) -> float | None:
        """The most clean tokens in the cache of one branch, mean over layers and heads."""
        return max((sum(entry["tokens"].values()) for entry in self.record["kv"]), default=None)

    @cached_property
    def distances(self) -> list[float]:
        """All measured distances that are numbers."""
        measured = (row.distance for row in self.rows)
        return [value for value in measured if value is not None and math.isfinite(value)]

    @cached_property
    def chunk_frames(self) -> list[ChunkFrames]:
        """Which frames every chunk shows, in the order of the record."""
        return [
            ChunkFrames(int(segment), chunk, *ends)
            for segment, chunks in self.record["chunk_frames"].items()
            for chunk, ends in enumerate(chunks)
            if ends[0] < ends[1]
        ]

    def of(self, panel: Panel) -> list[Row]:
        """Return the rows of a panel."""
        return [row for row in self.rows if (row.segment, row.branch) == panel]


def dotted(settings: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Return nested settings as texts by dotted names, as in `reuse.threshold`."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= dotted(value, prefix=f"{prefix}{name}.")
        else:
            found[prefix + name] = NOTHING if value is None else str(value)
    return found


def find_record(path: Path) -> Path:
    """Return the record that is meant by its own name, or by that of its video or report."""
    if path.name.endswith(SUFFIX):
        record = path
    elif path.suffix in (".mp4", ".json"):
        record = path.with_name(path.stem + SUFFIX)
    else:
        raise UserError(f"{path}: give NAME{SUFFIX}, or the NAME.mp4 or NAME.json beside it")
    if not record.is_file():
        raise UserError(f"{record}: no such record; make the video again with --record")
    return record


def load_run(source: Path, letter: str) -> Run:
    """Read the record of a run, and its report if there is one."""
    record = read_record(source)
    rows = [_row(**decision) for decision in record["decisions"]]
    if not rows:
        raise UserError(f"{source}: holds no decision of the cache: nothing to explain")
    video = source.parent / Path(record["video"]).name
    timeline = _read_timeline(video.with_suffix(".json"))
    return Run(letter, record, rows, alarms(record), video, timeline)


def _read_timeline(report: Path) -> list[Period]:
    """Return the time line of a report; none if there is no report, or an older one."""
    if not report.is_file():
        return []
    try:
        rows = read_json(report)["stats"].get("timeline", [])
        return [_period(*row) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        rule = "not the report of a run: stats.timeline must hold rows of"
        raise UserError(f"{report}: {rule} {', '.join(Period._fields)}") from None


def _period(stage: Any, start_seconds: Any, stop_seconds: Any, is_concurrent: Any) -> Period:
    if not isinstance(stage, str) or not isinstance(is_concurrent, bool):
        raise TypeError
    start, stop = float(start_seconds), float(stop_seconds)
    if not (math.isfinite(start) and math.isfinite(stop) and start <= stop):
        raise ValueError
    return Period(stage, start, stop, is_concurrent)


def _row(*, distance: Any, accumulated: Any, **others: Any) -> Row:
    """Return a row; JSON has no words for numbers that are not finite: they come as text."""
    return Row(distance=_number(distance), accumulated=_number(accumulated), **others)


def _number(value: float | str | None) -> float | None:
    return float(value) if isinstance(value, str) else value
