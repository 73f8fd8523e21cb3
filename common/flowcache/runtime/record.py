"""The record of a run: every decision, what it cost, what the KV caches held.

`flops` and `seconds` of a decision are those of the chunk's own passes; embeddings and clean passes
are in the totals of the run only. Distances that are not finite are written as "nan" and "inf".
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from flowcache.errors import UserError
from flowcache.policies import Replay, compute_together
from flowcache.runtime.files import read_json
from flowcache.runtime.stats import Pass, PassId, RunStats, Traced
from flowcache.schedule import Tick

RECORD_SCHEMA_VERSION = 1
REPLAY = "replay"
"""The policy of a run that makes recorded decisions again."""
NOT_FINITE = ("nan", "inf", "-inf")
MAX_INDEX = 1_000_000
"""Of a segment, tick or step. No run is planned that has more."""
MAX_CHUNK = 250_000
"""A million frames, four to a chunk."""
MAX_NUMBER = 1e30
"""Of FLOPs, seconds, tokens and distances: larger ones are no measurement, and overflow in sums."""
MIN_CONSTANT = 3
"""So many equal distances of one chunk are no accident."""

Record: TypeAlias = dict[str, Any]
"""Plain values as in the JSON file."""


def build_record(
    stats: RunStats,
    traced: Traced,
    *,
    video: str,
    model: str,
    preset: str,
    policy: str,
    threshold: float | None,
    num_steps: int,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    chunk_frames: Mapping[int, list[list[int]]] | None = None,
) -> Record:
    """Return the record of a finished run.

    Args:
        traced: by all processes of the run, see `flowcache.runtime.stats.merged`.
        threshold: of an adaptive policy; None: the policy has none.
        chunk_frames: segment -> for each chunk the pixel frames `[first, stop)` of the video that
            show it.
    """
    decisions: list[dict[str, Any]] = []
    for row in stats.passes:
        each = PassId(row.segment, row.tick, row.chunk, row.branch)
        flops = traced.flops[each]
        decisions.append(
            {
                **dict(zip(Pass._fields[:5], row[:5], strict=True)),
                "computed": row.is_computed,
                "distance": _plain(row.distance),
                "accumulated": _plain(row.accumulated),
                "flops": flops.spent,
                "flops_saved": flops.saved,
                "seconds": traced.pass_seconds.get(each),
            }
        )
    return {
        "schema_version": RECORD_SCHEMA_VERSION,
        "video": video,
        "model": model,
        "preset": preset,
        "policy": policy,
        "threshold": threshold,
        "num_steps": num_steps,
        "config": dict(config),
        "chunk_frames": {str(segment): rows for segment, rows in (chunk_frames or {}).items()},
        "ticks": [
            {**tick._asdict(), "seconds": seconds} for tick, seconds in traced.tick_seconds.items()
        ],
        "decisions": decisions,
        "kv": [
            {**row._asdict(), "tokens": {str(chunk): n for chunk, n in row.tokens.items()}}
            for row in traced.kv_tokens
        ],
        "stages": stats.to_dict()["stages"],
        "environment": dict(environment),
    }


# Reading ------------------------------------------------------------------------------------------


_Kind: TypeAlias = "tuple[str, Callable[[Any], bool]]"
"""A rule in words, and whether a value keeps it."""


def _is_int(value: Any, low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float = -MAX_NUMBER) -> bool:
    return _is_int(value, low) or (isinstance(value, float) and low <= value <= MAX_NUMBER)


def _is_by_number(value: Any, highest: int, is_right: Callable[[Any], bool]) -> bool:
    """Tell whether a value is an object whose keys are numbers of chunks or segments."""
    return isinstance(value, dict) and all(
        key.isdecimal() and len(key) <= len(str(highest)) and int(key) <= highest and is_right(item)
        for key, item in cast("dict[str, Any]", value).items()
    )


def _are_ranges(value: Any) -> bool:
    """Tell whether a value is a list of pairs `[first, stop]`."""
    return isinstance(value, list) and all(
        isinstance(row, list)
        and len(row) == 2
        and all(_is_int(end, 0, 2**53) for end in row)
        and row[0] <= row[1]
        for row in cast("list[Any]", value)
    )


def _whole(low: int, high: float) -> _Kind:
    high_text = f"{high:g}" if isinstance(high, float) else high
    return f"a whole number in {low}..{high_text}", lambda value: _is_int(value, low, high)


def _or_null(rule: str, is_right: Callable[[Any], bool]) -> _Kind:
    return f"{rule} or null", lambda value: value is None or is_right(value)


_TEXT: _Kind = ("a text", lambda value: isinstance(value, str))
_OBJECT: _Kind = ("an object", lambda value: isinstance(value, dict))
_LIST: _Kind = ("a list", lambda value: isinstance(value, list))
_SECONDS: _Kind = ("a time in seconds", lambda value: _is_number(value, 0))
_TOKENS: _Kind = (
    "an object of chunks with tokens",
    lambda value: _is_by_number(value, MAX_CHUNK, _SECONDS[1]),
)
_FRAMES: _Kind = (
    "an object of segments with lists of [first, stop) frames",
    lambda value: _is_by_number(value, MAX_INDEX, _are_ranges),
)
_DISTANCE: _Kind = (
    f"a number, null, or one of {', '.join(NOT_FINITE)}",
    lambda value: value is None or _is_number(value) or value in NOT_FINITE,
)
_SAVED: _Kind = (f"a whole number of at most {MAX_NUMBER:g}", _is_int)
RECORD_FIELDS: Mapping[str, _Kind] = {
    "schema_version": _whole(0, MAX_INDEX),
    **dict.fromkeys(("video", "model", "preset", "policy"), _TEXT),
    "threshold": _or_null("a number", _is_number),
    "num_steps": _whole(1, MAX_INDEX),
    "config": _OBJECT,
    "chunk_frames": _FRAMES,
    **dict.fromkeys(("ticks", "decisions", "kv"), _LIST),
    **dict.fromkeys(("stages", "environment"), _OBJECT),
}
_PLACE: Mapping[str, _Kind] = {"segment": _whole(0, MAX_INDEX), "tick": _whole(0, MAX_INDEX)}
ROW_FIELDS: Mapping[str, Mapping[str, _Kind]] = {
    "ticks": {**_PLACE, "seconds": _SECONDS},
    "decisions": {
        **_PLACE,
        "chunk": _whole(0, MAX_CHUNK),
        "step": _whole(0, MAX_INDEX),
        "branch": _TEXT,
        "computed": ("true or false", lambda value: isinstance(value, bool)),
        "distance": _DISTANCE,
        "accumulated": _DISTANCE,
        "flops": _whole(0, MAX_NUMBER),
        "flops_saved": _SAVED,
        "seconds": _or_null(*_SECONDS),
    },
    "kv": {**_PLACE, "branch": _TEXT, "tokens": _TOKENS},
}
STAGE_FIELDS: Mapping[str, _Kind] = {
    "seconds": _SECONDS,
    "num_uses": _whole(0, MAX_INDEX),
    "within": _or_null(*_TEXT),
    "overlapped_seconds": _SECONDS,  # only where a stage ran concurrently with denoising
}


def read_record(path: Path) -> Record:
    """Read a record and check every field of it."""
    content = read_json(path, advice="write a record with --record")
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a record: it must be a JSON object")
    record = cast("Record", content)
    version = record.get("schema_version")
    if version != RECORD_SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version must be {RECORD_SCHEMA_VERSION}, found {version!r}; record "
            "the run again"
        )
    _check_fields(path, "", record, RECORD_FIELDS)
    for name, fields in ROW_FIELDS.items():
        for place, row in enumerate(record[name]):
            _check_fields(path, f"{name}[{place}]", row, fields)
    for name, stage in record["stages"].items():
        whole = {"overlapped_seconds": 0.0, **stage} if isinstance(stage, dict) else stage
        _check_fields(path, f"stages.{name}", whole, STAGE_FIELDS)
    return record


def _check_fields(path: Path, where: str, value: Any, fields: Mapping[str, _Kind]) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where} must be an object, found {_short(value)}")
    row = cast("Record", value)
    prefix = f"{where}." if where else ""
    for name in row:
        if name not in fields:
            raise UserError(
                f"{path}: {prefix}{_short(name)} is unknown; known: {', '.join(fields)}"
            )
    for name, (rule, is_right) in fields.items():
        if name not in row:
            raise UserError(f"{path}: {prefix}{name} is missing; record the run again")
        if not is_right(row[name]):
            raise UserError(f"{path}: {prefix}{name} must be {rule}, found {_short(row[name])}")


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# Using it -----------------------------------------------------------------------------------------


def replay_policies(record: Record, *, segment: int, branch: str) -> Replay:
    """Return the policy that computes what a record's branch computed in a segment."""
    rows = [
        row for row in record["decisions"] if row["segment"] == segment and row["branch"] == branch
    ]
    if not rows:
        raise UserError(
            f"the record does not fit this run: it has no decisions of segment {segment}, branch "
            f"{branch}; replay it with the settings it was made with"
        )
    ticks: dict[int, dict[int, tuple[int, bool]]] = defaultdict(dict)
    for row in rows:
        ticks[row["tick"]][row["chunk"]] = (row["step"], row["computed"])
    return Replay(dict(ticks))


def check_replay(
    record: Record,
    *,
    ticks: Mapping[int, Sequence[Tick]],
    branches: Collection[str],
    is_whole_window: bool = False,
    chooses_tokens: bool = False,
) -> None:
    """Check that a run can make the decisions of a record, which names no tokens.

    Args:
        is_whole_window: whether the run computes all chunks of a tick, or none.
        chooses_tokens: whether it computes chunks in part.
    """
    found: Any = record
    for key in ("config", "reuse", "tokens", "choice"):  # traces and older records have none
        found = cast("Record", found).get(key) if isinstance(found, dict) else None
    if chooses_tokens or found not in (None, "all"):
        raise UserError(
            "a record does not say which tokens of a chunk were computed: replay one that was made "
            "with reuse.tokens.choice=all, and with that setting"
        )
    rows = record["decisions"]
    more = {(row["segment"], row["branch"]) for row in rows}
    more -= {(segment, branch) for segment in ticks for branch in branches}
    if more:
        segment, branch = min(more)
        raise UserError(
            f"the record does not fit this run: it has decisions of segment {segment}, branch "
            f"{branch}, which the run does not make; replay it with the settings it was made with"
        )
    for segment, planned in ticks.items():
        for branch in branches:
            policy = replay_policies(record, segment=segment, branch=branch)
            stored: set[int] = set()
            for tick in planned:
                known = tick.steps if is_whole_window and stored else stored
                plan = policy.plan(tick, {}, stored=known)
                computed = {chunk for chunk, decision in plan.items() if decision.is_computed}
                if is_whole_window:
                    compute_together(policy, plan)
                stored |= computed


def alarms(record: Record) -> list[str]:
    """Return a line for each sign that a cache did not do what it is for."""
    rows = cast("list[Record]", record["decisions"])
    if record["policy"] in ("vanilla", REPLAY) or not rows:
        return []
    threshold = cast("float | None", record["threshold"])
    series: dict[tuple[int, str, int], list[Record]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["tick"]):
        series[row["segment"], row["branch"], row["chunk"]].append(row)
    lines: list[str] = []
    if all(row["computed"] for row in rows):
        lines.append(f"never hit: policy {record['policy']} computed every step of every chunk")
    elif threshold is not None and all(_is_always_hit(chunk) for chunk in series.values()):
        lines.append(
            "always hit: once a chunk was reused, it was never computed again before its last step"
        )
    lines += _strange_distances(rows, series)
    sums = [float(row["accumulated"]) for row in rows if row["accumulated"] is not None]
    if threshold is not None and sums and not any(total >= threshold for total in sums):
        largest = max((total for total in sums if not math.isnan(total)), default=math.nan)
        lines.append(
            f"threshold never reached: it is {threshold:g}, the largest accumulated distance "
            f"{largest:.3g}"
        )
    return lines


def _strange_distances(
    rows: list[Record], series: Mapping[tuple[int, str, int], list[Record]]
) -> list[str]:
    lines: list[str] = []
    nan = [row for row in rows if row["distance"] == "nan"]
    if nan:
        first = nan[0]
        lines.append(
            f"distance is not a number: {len(nan)} times, first in segment {first['segment']}, "
            f"tick {first['tick']}, chunk {first['chunk']}, branch {first['branch']}"
        )
    for (segment, branch, chunk), chunk_rows in series.items():
        found = [row["distance"] for row in chunk_rows if row["distance"] not in (None, "nan")]
        if len(found) >= MIN_CONSTANT and len(set(found)) == 1:
            lines.append(
                f"distance is constant: {found[0]} in all {len(found)} ticks of chunk {chunk} in "
                f"segment {segment}, branch {branch}"
            )
    return lines


def _is_always_hit(chunk: list[Record]) -> bool:
    """Tell whether a chunk was reused from its first reused step up to its last but one."""
    is_computed = [row["computed"] for row in chunk]
    if all(is_computed):
        return True
    return not any(is_computed[is_computed.index(False) : -1])


def _plain(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
