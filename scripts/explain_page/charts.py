"""The charts of one run: decisions, distances, cache, times."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard
from xml.etree.ElementTree import Element

from explain_page.markup import element, number, svg
from explain_page.plot import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    axis_names,
    colour_of,
    compact,
    cross,
    horizontal,
    line,
    plot,
    rectangle,
    text,
    vertical,
)
from explain_page.run import Panel, Row, Run
from explain_page.units import percent, seconds_text
from flowcache.runtime.stats import scaled

PLOT_HEIGHT = 250.0
SHARE_WIDTH = 52.0
"""Room at the right of a heat map for the share of each chunk, in CSS pixels."""
MAX_CELL_WIDTH, CELL_HEIGHT = 26.0, 20.0
BAR_HEIGHT = 22.0
STAGE_NAME_WIDTH = 150.0
STAGE_NUMBER_WIDTH = 110.0
LANE_NAME_WIDTH = 90.0
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
    rows = [row for run in runs for row in run.rows]
    return Limits(
        num_ticks=1 + max(row.tick for row in rows),
        num_steps=max(run.record["num_steps"] for run in runs),
        distance=max((value for run in runs for value in run.distances()), default=0.0),
        accumulated=max(
            [row.accumulated for row in rows if _is_number(row.accumulated)]
            + [run.threshold for run in runs if run.threshold is not None],
            default=0.0,
        ),
        tokens=max((run.peak_tokens or 0.0 for run in runs), default=0.0),
        tick_seconds=max(
            (tick["seconds"] for run in runs for tick in run.record["ticks"]), default=0.0
        ),
        stage_seconds=max(
            (stage["seconds"] for run in runs for stage in run.record["stages"].values()),
            default=0.0,
        ),
        timeline_seconds=max(
            (period.stop_seconds for run in runs for period in run.timeline), default=0.0
        ),
        has_tips=len(rows) <= MAX_TIPS,
    )


def heat_map(run: Run, panel: Panel, *, limits: Limits, width: float) -> Element | None:
    """Draw a row per chunk and a column per tick: computed, reused, or not active."""
    rows = run.of(panel)
    if not rows:
        return None
    chunks = sorted({row.chunk for row in rows})
    room = width - LEFT - SHARE_WIDTH
    cell = min(MAX_CELL_WIDTH, room / limits.num_ticks)
    top = TOP + 12
    bottom = top + CELL_HEIGHT * len(chunks)
    x = Axis("tick", 0, limits.num_ticks, LEFT, LEFT + cell * limits.num_ticks, is_whole=True)
    y = Axis("chunk", 0, len(chunks), top, bottom)
    gap = 1.0 if cell > 4 else 0.0
    drawn = [
        rectangle(LEFT, top, x.stop - LEFT, bottom - top, class_="ground"),
        text("computed", x=x.stop + SHARE_WIDTH - 2, y=top - 6, class_="end"),
    ]
    for row in rows:
        drawn.append(
            rectangle(
                x(row.tick),
                y(chunks.index(row.chunk)) + 1,
                max(cell - gap, 0.4),
                CELL_HEIGHT - 2,
                class_="computed" if row.computed else "reused",
                tip=describe(row) if limits.has_tips else None,
            )
        )
    for index, chunk in enumerate(chunks):
        own = [row.computed for row in rows if row.chunk == chunk]
        middle = y(index + 0.5) + 4
        drawn.append(text(str(chunk), x=LEFT - 8, y=middle, class_="end"))
        share = percent(sum(own) / len(own), digits=0)
        drawn.append(text(share, x=x.stop + SHARE_WIDTH - 2, y=middle, class_="end"))
    for value in x.numbers():
        if value < limits.num_ticks:
            at = x(value + 0.5)
            drawn.append(text(compact(value), x=at, y=bottom + 15, class_="middle"))
    label = f"decisions of {name_of(run, panel)}: a row per chunk, a column per tick"
    names = axis_names(x, y)
    return svg(*drawn, *names, width=x.stop + SHARE_WIDTH, height=bottom + 42, label=label)


def distance_chart(run: Run, panel: Panel, *, limits: Limits, width: float) -> Element | None:
    """Draw the distance of every chunk's signal to the tick before, over its own steps."""
    return _curves(
        run,
        panel,
        value=lambda row: row.distance,
        y=vertical("distance", limits.distance, height=PLOT_HEIGHT),
        limits=limits,
        width=width,
    )


def accumulated_chart(run: Run, panel: Panel, *, limits: Limits, width: float) -> Element | None:
    """Draw the accumulated distance over own steps, the threshold, and a dot where computed."""
    y = vertical("accumulated distance", limits.accumulated, height=PLOT_HEIGHT)
    x = _own_steps(limits, width=width)
    marks: list[Element] = []
    if run.threshold is not None:
        at = y(run.threshold)
        marks.append(element("line", x1=x.start, x2=x.stop, y1=at, y2=at, class_="threshold"))
    for row in run.of(panel):
        if row.computed and _is_number(row.accumulated):
            dot = element(
                "circle",
                element("title", describe(row)),
                cx=x(row.step),
                cy=y(row.accumulated),
                r=3,
                class_="chunk",
                style=colour_of(row.chunk),
                data_chunk=str(row.chunk),
            )
            marks.append(dot)
    if run.threshold is not None:
        said = f"threshold {run.threshold:g}"
        marks.append(text(said, x=x.stop - 4, y=y(run.threshold) - 6, class_="end strong"))
    return _curves(
        run,
        panel,
        value=lambda row: row.accumulated,
        y=y,
        limits=limits,
        width=width,
        marks=marks,
    )


def cache_chart(run: Run, panel: Panel, *, limits: Limits, width: float) -> Element | None:
    """Draw the clean tokens in the cache after every tick, stacked by chunk."""
    entries = [
        entry
        for entry in run.record["kv"]
        if (entry["segment"], entry["branch"]) == (panel.segment, panel.branch)
    ]
    if not entries:
        return None
    x = horizontal("tick", -0.5, limits.num_ticks - 0.5, width=width)
    y = vertical("clean tokens in the cache", limits.tokens, height=PLOT_HEIGHT)
    bar = x(1) - x(0)
    inner = bar - (1.0 if bar > 4 else 0.0)
    paths: dict[int, str] = {}
    tips: list[Element] = []
    for entry in entries:
        at, height = x(entry["tick"] - 0.5), 0.0
        tokens = {int(chunk): value for chunk, value in entry["tokens"].items()}
        for chunk, value in sorted(tokens.items()):
            low, high = number(y(height)), number(y(height + value))
            right = number(at + inner)
            paths[chunk] = paths.get(chunk, "") + f"M{number(at)} {low}V{high}H{right}V{low}Z"
            height += value
        listed = ", ".join(f"{chunk}: {value:.1f}" for chunk, value in sorted(tokens.items()))
        tip = f"tick {entry['tick']}\n{height:.1f} clean tokens\nchunk {listed or 'none'}"
        tips.append(rectangle(at, y.stop, bar, y.start - y.stop, class_="touch", tip=tip))
    bars = [
        element("path", d=path, class_="chunk", style=colour_of(chunk), data_chunk=str(chunk))
        for chunk, path in sorted(paths.items())
    ]
    label = f"clean tokens in the cache of {name_of(run, panel)} over ticks, stacked by chunk"
    return plot(x, y, marks=[*bars, *tips], label=label)


def stage_chart(run: Run, *, limits: Limits, width: float) -> Element:
    """Draw a bar per stage; a stage inside another one comes below it, indented and pale."""
    stages = run.record["stages"]
    ordered = _nested(stages, parent=None, depth=0)
    start, stop = STAGE_NAME_WIDTH, width - STAGE_NUMBER_WIDTH
    x = Axis("seconds", 0.0, limits.stage_seconds or 1.0, start, stop)
    drawn: list[Element] = []
    for index, (name, depth) in enumerate(ordered):
        stage = stages[name]
        top = TOP + BAR_HEIGHT * index
        middle = top + BAR_HEIGHT / 2 + 3
        length = max(x(stage["seconds"]) - start, 1.0)
        tip = f"{name}: {seconds_text(stage['seconds'])} in {stage['num_uses']} uses"
        tip += f", part of {stage['within']}" if stage["within"] else ""
        style = "bar" if depth == 0 else "bar nested"
        drawn += [
            text(name.replace("_", " "), x=4 + 14 * depth, y=middle),
            rectangle(start, top + 2, length, BAR_HEIGHT - 5, class_=style, tip=tip),
            text(seconds_text(stage["seconds"]), x=start + length + 6, y=middle),
        ]
    height = TOP + BAR_HEIGHT * len(ordered) + 4
    label = f"seconds per stage of {run.name}"
    return svg(*drawn, width=width, height=height, label=label)


def timeline_chart(run: Run, *, limits: Limits, width: float) -> Element:
    """Draw a lane per stage, in order of their starts, and a bar wherever it was at work."""
    lanes = list(dict.fromkeys(period.stage for period in run.timeline))
    bottom = TOP + BAR_HEIGHT * len(lanes)
    high = limits.timeline_seconds or 1.0
    x = Axis("seconds since the start", 0.0, high, LANE_NAME_WIDTH, width - RIGHT)
    drawn: list[Element] = []
    for value in x.numbers():
        at = x(value)
        drawn.append(element("line", x1=at, x2=at, y1=TOP, y2=bottom + 4, class_="grid"))
        drawn.append(text(compact(value), x=at, y=bottom + 17, class_="middle"))
    for index, name in enumerate(lanes):
        top = TOP + BAR_HEIGHT * index
        drawn.append(text(name.replace("_", " "), x=4, y=top + BAR_HEIGHT / 2 + 4))
        for period in run.timeline:
            if period.stage != name:
                continue
            start, stop = period.start_seconds, period.stop_seconds
            tip = f"{name}: {seconds_text(stop - start)}\nfrom {start:.3f} s to {stop:.3f} s"
            tip += "\nbeside the denoising" if period.is_concurrent else ""
            drawn.append(
                rectangle(
                    x(start),
                    top + 2,
                    max(x(stop) - x(start), 0.5),
                    BAR_HEIGHT - 4,
                    class_="bar beside" if period.is_concurrent else "bar",
                    tip=tip,
                )
            )
    axis = element("line", x1=x.start, x2=x.stop, y1=bottom, y2=bottom, class_="axis")
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
    bars = [
        rectangle(
            x(index - 0.5),
            y(tick["seconds"]),
            max(bar - (1.0 if bar > 4 else 0.0), 0.4),
            y(0) - y(tick["seconds"]),
            class_="bar",
            tip=f"segment {tick['segment']}, tick {tick['tick']}\n{seconds_text(tick['seconds'])}",
        )
        for index, tick in enumerate(ticks)
    ]
    return plot(x, y, marks=bars, label=f"seconds per tick of {run.name}")


def metric_chart(values: Sequence[float], *, name: str, width: float) -> Element:
    """Draw a metric over the frames of a video; a value that is infinite leaves a gap."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    margin = 0.05 * (high - low) or 0.05
    x = horizontal("frame", 0, max(len(values) - 1, 1), width=width)
    y = Axis(name, low - margin, high + margin, PLOT_HEIGHT - BOTTOM, TOP)
    path = line(list(enumerate(values)), x, y)
    touch = [
        rectangle(
            x(index - 0.5),
            y.stop,
            x(1) - x(0),
            y.start - y.stop,
            class_="touch",
            tip=f"frame {index}\n{name} {value:.4g}",
        )
        for index, value in enumerate(values)
    ]
    marks = [element("path", d=path, class_="curve single"), *touch]
    return plot(x, y, marks=marks, label=f"{name} over frames")


def describe(row: Row) -> str:
    """Say in a few lines what happened to a chunk at a tick."""
    lines = [
        f"chunk {row.chunk}, step {row.step}, tick {row.tick}: "
        + ("computed" if row.computed else "reused")
    ]
    if row.distance is not None:
        lines.append(f"distance {row.distance:.4g}")
    if row.accumulated is not None:
        lines.append(f"accumulated {row.accumulated:.4g}")
    spent, saved = scaled(row.flops, "FLOP"), scaled(row.flops_saved, "FLOP")
    lines.append(f"{spent} spent, {saved} saved")
    if row.seconds is not None:
        lines.append(f"{1000 * row.seconds:.1f} ms")
    return "\n".join(lines)


def name_of(run: Run, panel: Panel) -> str:
    """Name a panel in words."""
    return f"{run.name}, segment {panel.segment}, branch {panel.branch}"


def _curves(
    run: Run,
    panel: Panel,
    *,
    value: Callable[[Row], float | None],
    y: Axis,
    limits: Limits,
    width: float,
    marks: Sequence[Element] = (),
) -> Element | None:
    """Draw a line per chunk over its own steps; mark what is infinite or not a number."""
    x = _own_steps(limits, width=width)
    rows = run.of(panel)
    if all(value(row) is None for row in rows):
        return None
    curves: list[Element] = []
    for chunk in sorted({row.chunk for row in rows}):
        points: list[tuple[float, float]] = []
        for row in sorted((row for row in rows if row.chunk == chunk), key=lambda row: row.step):
            found = value(row)
            points.append((row.step, math.nan if found is None else found))
            if found is not None and not math.isfinite(found):
                tip = f"{describe(row)}\n{y.name} is {found}"
                curves.append(cross(x(row.step), y.stop + 6, tip=tip))
        path = element(
            "path",
            element("title", f"chunk {chunk}"),
            d=line(points, x, y),
            class_="curve",
            style=colour_of(chunk),
            data_chunk=str(chunk),
        )
        curves.append(path)
    label = f"{y.name} of {name_of(run, panel)} over own steps, a line per chunk"
    return plot(x, y, marks=[*curves, *marks], label=label)


def _own_steps(limits: Limits, *, width: float) -> Axis:
    return horizontal("own step of the chunk", 0, max(limits.num_steps - 1, 1), width=width)


def _nested(stages: dict[str, dict], *, parent: str | None, depth: int) -> list[tuple[str, int]]:
    """Return the names of the stages with their depth, each after the one it is part of."""
    found: list[tuple[str, int]] = []
    for name, stage in stages.items():
        if stage["within"] == parent:
            found += [(name, depth), *_nested(stages, parent=name, depth=depth + 1)]
    return found


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
