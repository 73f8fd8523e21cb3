"""The charts of one run: decisions, distances, cache, times."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard
from xml.etree.ElementTree import Element

from flowcache.report.drawing import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    axis_names,
    circle,
    colour_of,
    compact,
    cross,
    curve,
    horizontal,
    interleaved,
    line,
    number,
    path,
    percent,
    plot,
    rectangle,
    seconds_text,
    svg,
    text,
    vertical,
)
from flowcache.report.run import Panel, Row, Run
from flowcache.runtime.stats import scaled

PLOT_HEIGHT = 250.0
SHARE_WIDTH = 52.0
"""Room at the right of a heat map for the share of each chunk, in CSS pixels."""
MAX_CELL_WIDTH, CELL_HEIGHT = 26.0, 20.0
BAR_HEIGHT = 22.0
STAGE_NAME_WIDTH, STAGE_NUMBER_WIDTH, LANE_NAME_WIDTH = 150.0, 110.0, 90.0
PEN_WIDTH = 2.0
DOT, RINGS = 2.0, 3.5
"""Radius of the smallest dot, and by how much that of the first chunk is larger."""
MAX_TIPS = 12_000
"""Cells with a text of their own on one page; it would get too large with more."""


@dataclass(frozen=True)
class Limits:
    """The largest values of all runs on the page, so that their charts can be compared."""

    num_ticks: int
    num_steps: int
    distance: float
    accumulated: float
    tokens: float
    tick_seconds: float
    stage_seconds: float
    timeline_seconds: float
    has_tips: bool


def limits_of(runs: Sequence[Run]) -> Limits:
    """Measure the runs of a page."""

    def most(values: Iterable[float | None]) -> float:
        return max(filter(_is_number, values), default=0.0)

    rows = [row for run in runs for row in run.rows]
    sums = [row.accumulated for row in rows] + [run.threshold for run in runs]
    stages = [stage for run in runs for stage in run.record["stages"].values()]
    return Limits(
        num_ticks=1 + max(row.tick for row in rows),
        num_steps=max(run.record["num_steps"] for run in runs),
        distance=most(row.distance for row in rows),
        accumulated=most(sums),
        tokens=most(run.peak_tokens for run in runs),
        tick_seconds=most(tick["seconds"] for run in runs for tick in run.record["ticks"]),
        stage_seconds=most(stage["seconds"] for stage in stages),
        timeline_seconds=most(period.stop_seconds for run in runs for period in run.timeline),
        has_tips=len(rows) <= MAX_TIPS,
    )


def heat_map(run: Run, panel: Panel, *, limits: Limits, width: float) -> Element | None:
    """Draw a row per chunk and a column per tick: computed, reused, or not active."""
    rows = run.of(panel)
    if not rows:
        return None
    chunks = sorted({row.chunk for row in rows})
    cell = min(MAX_CELL_WIDTH, (width - LEFT - SHARE_WIDTH) / limits.num_ticks)
    top = TOP + 12
    bottom = top + CELL_HEIGHT * len(chunks)
    x = Axis("tick", 0, limits.num_ticks, LEFT, LEFT + cell * limits.num_ticks, is_whole=True)
    y = Axis("chunk", 0, len(chunks), top, bottom)
    right = x.stop + SHARE_WIDTH
    drawn = [
        rectangle(LEFT, top, x.stop - LEFT, bottom - top, class_="ground"),
        text("computed", x=right - 2, y=top - 6, class_="end"),
    ]
    for row in rows:
        left, above = x(row.tick), y(chunks.index(row.chunk)) + 1
        kind = "computed" if row.computed else "reused"
        tip = describe(row) if limits.has_tips else None
        length = max(cell - _gap(cell), 0.4)
        drawn.append(rectangle(left, above, length, CELL_HEIGHT - 2, class_=kind, tip=tip))
    for index, chunk in enumerate(chunks):
        computed = [row.computed for row in rows if row.chunk == chunk]
        share = percent(sum(computed) / len(computed), digits=0)
        for words, at in ((str(chunk), LEFT - 8), (share, right - 2)):
            drawn.append(text(words, x=at, y=y(index + 0.5) + 4, class_="end"))
    for value in x.numbers():
        if value < limits.num_ticks:
            drawn.append(text(compact(value), x=x(value + 0.5), y=bottom + 15, class_="middle"))
    label = f"decisions of {_name_of(run, panel)}: a row per chunk, a column per tick"
    return svg(*drawn, *axis_names(x, y), width=right, height=bottom + 42, label=label)


def distance_chart(run: Run, panel: Panel, *, limits: Limits, width: float) -> Element | None:
    """Draw how much every chunk's signal changed since the tick before, over its own steps."""
    x = _own_steps(limits, width=width)
    y = vertical("distance", limits.distance, height=PLOT_HEIGHT)
    return _curves(run, panel, x, y, value=lambda row: row.distance)


def accumulated_chart(run: Run, panel: Panel, *, limits: Limits, width: float) -> Element | None:
    """Draw the accumulated distance over own steps, the threshold, and a dot where computed."""
    x = _own_steps(limits, width=width)
    y = vertical("accumulated distance", limits.accumulated, height=PLOT_HEIGHT)
    chunks = sorted({row.chunk for row in run.of(panel)})
    rings = [DOT + RINGS * (1 - chunks.index(chunk) / len(chunks)) for chunk in chunks]
    marks = [
        circle(
            x(row.step),
            y(row.accumulated),
            rings[chunks.index(row.chunk)],  # those of one place are rings
            class_="chunk",
            style=colour_of(row.chunk),
            data_chunk=str(row.chunk),
            tip=describe(row),
        )
        for row in sorted(run.of(panel), key=lambda row: row.chunk)
        if row.computed and _is_number(row.accumulated)
    ]
    if run.threshold is not None:
        at, label = y(run.threshold), f"threshold {run.threshold:g}"
        limit = line(x.start, x.stop, at, at, class_="threshold")
        marks = [limit, *marks, text(label, x=x.stop - 4, y=at - 6, class_="end strong")]
    return _curves(run, panel, x, y, value=lambda row: row.accumulated, marks=marks)


def cache_chart(run: Run, panel: Panel, *, limits: Limits, width: float) -> Element | None:
    """Draw the clean tokens in the cache after every tick, stacked by chunk."""
    entries = [e for e in run.record["kv"] if Panel(e["segment"], e["branch"]) == panel]
    if not entries:
        return None
    x = horizontal("tick", -0.5, limits.num_ticks - 0.5, width=width)
    y = vertical("clean tokens in the cache", limits.tokens, height=PLOT_HEIGHT)
    bar = x(1) - x(0)
    paths: dict[int, str] = {}
    tips: list[Element] = []
    for entry in entries:
        at, height = x(entry["tick"] - 0.5), 0.0
        right = number(at + bar - _gap(bar))
        tokens = sorted((int(chunk), value) for chunk, value in entry["tokens"].items())
        for chunk, value in tokens:
            low, high = number(y(height)), number(y(height + value))
            paths[chunk] = paths.get(chunk, "") + f"M{number(at)} {low}V{high}H{right}V{low}Z"
            height += value
        listed = ", ".join(f"{chunk}: {value:.1f}" for chunk, value in tokens)
        tip = f"tick {entry['tick']}\n{height:.1f} clean tokens\nchunk {listed or 'none'}"
        tips.append(rectangle(at, y.stop, bar, y.start - y.stop, class_="touch", tip=tip))
    bars = [
        path(d, class_="chunk", style=colour_of(chunk), data_chunk=str(chunk))
        for chunk, d in sorted(paths.items())
    ]
    label = f"clean tokens in the cache of {_name_of(run, panel)} over ticks, stacked by chunk"
    return plot(x, y, marks=[*bars, *tips], label=label)


def stage_chart(run: Run, *, limits: Limits, width: float) -> Element:
    """Draw a bar per stage; a stage inside another one comes below it, indented and pale."""
    stages = run.record["stages"]
    ordered = _nested(stages, parent=None, depth=0)
    start = STAGE_NAME_WIDTH
    x = Axis("seconds", 0.0, limits.stage_seconds or 1.0, start, width - STAGE_NUMBER_WIDTH)
    drawn: list[Element] = []
    for index, (name, depth) in enumerate(ordered):
        stage = stages[name]
        top = TOP + BAR_HEIGHT * index
        middle = top + BAR_HEIGHT / 2 + 3
        length = max(x(stage["seconds"]) - start, 1.0)
        seconds = seconds_text(stage["seconds"])
        tip = f"{name}: {seconds} in {stage['num_uses']} uses"
        tip += f", part of {stage['within']}" if stage["within"] else ""
        kind = "bar" if depth == 0 else "bar nested"
        drawn += [
            text(name.replace("_", " "), x=4 + 14 * depth, y=middle),
            rectangle(start, top + 2, length, BAR_HEIGHT - 5, class_=kind, tip=tip),
            text(seconds, x=start + length + 6, y=middle),
        ]
    height = TOP + BAR_HEIGHT * len(ordered) + 4
    return svg(*drawn, width=width, height=height, label=f"seconds per stage of {run.name}")


def timeline_chart(run: Run, *, limits: Limits, width: float) -> Element:
    """Draw a lane per stage, in order of their starts, and a bar wherever it was at work."""
    lanes = list(dict.fromkeys(period.stage for period in run.timeline))
    bottom = TOP + BAR_HEIGHT * len(lanes)
    high = limits.timeline_seconds or 1.0
    x = Axis("seconds since the start", 0.0, high, LANE_NAME_WIDTH, width - RIGHT)
    drawn: list[Element] = []
    for value in x.numbers():
        drawn.append(line(x(value), x(value), TOP, bottom + 4, class_="grid"))
        drawn.append(text(compact(value), x=x(value), y=bottom + 17, class_="middle"))
    for index, name in enumerate(lanes):
        top = TOP + BAR_HEIGHT * index
        drawn.append(text(name.replace("_", " "), x=4, y=top + BAR_HEIGHT / 2 + 4))
        for period in (period for period in run.timeline if period.stage == name):
            start, stop = period.start_seconds, period.stop_seconds
            length = max(x(stop) - x(start), 0.5)
            tip = f"{name}: {seconds_text(stop - start)}\nfrom {start:.3f} s to {stop:.3f} s"
            tip += "\nconcurrent with the denoising" if period.is_concurrent else ""
            kind = "bar concurrent" if period.is_concurrent else "bar"
            drawn.append(rectangle(x(start), top + 2, length, BAR_HEIGHT - 4, class_=kind, tip=tip))
    axis = line(x.start, x.stop, bottom, bottom, class_="axis")
    name = text(x.name, x=(x.start + x.stop) / 2, y=bottom + BOTTOM - 6, class_="middle name")
    label = f"time line of {run.name}: a lane per stage"
    return svg(*drawn, axis, name, width=width, height=bottom + BOTTOM, label=label)


def tick_chart(run: Run, *, limits: Limits, width: float) -> Element:
    """Draw the seconds of every tick, the segments one after the other."""
    ticks = run.record["ticks"]
    num_segments = 1 + max(tick["segment"] for tick in ticks)
    name = "tick" if num_segments == 1 else f"tick, counted through {num_segments} segments"
    x = horizontal(name, -0.5, len(ticks) - 0.5, width=width)
    y = vertical("seconds", limits.tick_seconds, height=PLOT_HEIGHT)
    bar = x(1) - x(0)
    bars: list[Element] = []
    for index, tick in enumerate(ticks):
        seconds = tick["seconds"]
        tip = f"segment {tick['segment']}, tick {tick['tick']}\n{seconds_text(seconds)}"
        length, height = max(bar - _gap(bar), 0.4), y(0) - y(seconds)
        bars.append(rectangle(x(index - 0.5), y(seconds), length, height, class_="bar", tip=tip))
    return plot(x, y, marks=bars, label=f"seconds per tick of {run.name}")


def metric_chart(values: Sequence[float], *, name: str, width: float) -> Element:
    """Draw a metric over the frames of a video; a value that is infinite leaves a gap."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    margin = 0.05 * (high - low) or 0.05
    x = horizontal("frame", 0, max(len(values) - 1, 1), width=width)
    y = Axis(name, low - margin, high + margin, PLOT_HEIGHT - BOTTOM, TOP)
    bar, height = x(1) - x(0), y.start - y.stop
    tips = [f"frame {index}\n{name} {value:.4g}" for index, value in enumerate(values)]
    touch = [
        rectangle(x(index - 0.5), y.stop, bar, height, class_="touch", tip=tip)
        for index, tip in enumerate(tips)
    ]
    drawn = path(curve(list(enumerate(values)), x, y), class_="curve single")
    return plot(x, y, marks=[drawn, *touch], label=f"{name} over frames")


def describe(row: Row) -> str:
    """Say in a few lines what happened to a chunk at a tick."""
    decision = "computed" if row.computed else "reused"
    lines = [f"chunk {row.chunk}, step {row.step}, tick {row.tick}: {decision}"]
    if row.distance is not None:
        lines.append(f"distance {row.distance:.4g}")
    if row.accumulated is not None:
        lines.append(f"accumulated {row.accumulated:.4g}")
    lines.append(f"{scaled(row.flops, 'FLOP')} spent, {scaled(row.flops_saved, 'FLOP')} saved")
    if row.seconds is not None:
        lines.append(f"{1000 * row.seconds:.1f} ms")
    return "\n".join(lines)


def _curves(
    run: Run,
    panel: Panel,
    x: Axis,
    y: Axis,
    *,
    value: Callable[[Row], float | None],
    marks: Sequence[Element] = (),
) -> Element | None:
    """Draw a line per chunk over its own steps; mark what is infinite or not a number."""
    rows = sorted(run.of(panel), key=lambda row: row.step)
    if all(value(row) is None for row in rows):
        return None
    curves: list[Element] = []
    chunks = sorted({row.chunk for row in rows})
    shares = coincide([[value(row) for row in rows if row.chunk == chunk] for chunk in chunks], y)
    for index, chunk in enumerate(chunks):
        points: list[tuple[float, float]] = []
        for row in (row for row in rows if row.chunk == chunk):
            found = value(row)
            points.append((row.step, math.nan if found is None else found))
            if found is not None and not math.isfinite(found):
                tip = f"{describe(row)}\n{y.name} is {found}"
                curves.append(cross(x(row.step), y.stop + 6, tip=tip))
        curves.append(
            path(
                curve(points, x, y),
                class_="curve",
                style=colour_of(chunk) + (interleaved(index, len(chunks)) if shares else ""),
                data_chunk=str(chunk),
                tip=f"chunk {chunk}",
            )
        )
    label = f"{y.name} of {_name_of(run, panel)} over own steps, a line per chunk"
    return plot(x, y, marks=[*curves, *marks], label=label)


def coincide(curves: Sequence[Sequence[float | None]], y: Axis) -> bool:
    """Tell whether curves lie on one another: at most own steps closer than the pen is wide."""
    spreads = [
        max(map(y, found)) - min(map(y, found))
        for values in zip(*curves, strict=False)
        if len(found := [value for value in values if _is_number(value)]) == len(curves) > 1
    ]
    return sum(spread < PEN_WIDTH for spread in spreads) > len(spreads) / 2


def _own_steps(limits: Limits, *, width: float) -> Axis:
    return horizontal("own step of the chunk", 0, max(limits.num_steps - 1, 1), width=width)


def _name_of(run: Run, panel: Panel) -> str:
    return f"{run.name}, segment {panel.segment}, branch {panel.branch}"


def _gap(width: float) -> float:
    """Return the gap between bars of that width: none where they are thin."""
    return 1.0 if width > 4 else 0.0


def _nested(
    stages: Mapping[str, Mapping[str, Any]], *, parent: str | None, depth: int
) -> list[tuple[str, int]]:
    """Return the names of the stages with their depth, each after the one it is part of."""
    found: list[tuple[str, int]] = []
    for name, stage in stages.items():
        if stage["within"] == parent:
            found += [(name, depth), *_nested(stages, parent=name, depth=depth + 1)]
    return found


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
