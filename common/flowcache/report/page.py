"""The page that shows what the cache did: its sections in order, for one run or for two."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from flowcache.report import charts
from flowcache.report.drawing import (
    Child,
    append,
    chunk_styles,
    colour_of,
    element,
    percent,
    seconds_text,
)
from flowcache.report.pair import (
    Clip,
    Metrics,
    decibel,
    differing_settings,
    figure_rows,
    headline,
    pictures,
    settings_of,
)
from flowcache.report.run import Panel, Run, Shown
from flowcache.runtime.units import scaled

FOLDER = Path(__file__).parent
FULL_WIDTH, HALF_WIDTH = 1120.0, 545.0
"""Of a chart in CSS pixels, alone in its row or one of two."""
POSITIONS = ("first", "middle", "last")

Draw = Callable[..., Element | None]


def write_page(runs: Sequence[Run], clips: Sequence[Clip], metrics: Metrics | str | None) -> str:
    """Return the whole page as HTML; `metrics` is what `pair.measure` says of two runs."""
    limits = charts.limits_of(runs)
    chunks = sorted({chunk for run in runs for chunk in run.chunks})
    main = element(
        "main",
        _header(runs),
        _alarms(runs),
        _figures(runs, metrics),
        _branch_choice(runs),
        _decisions(runs, limits),
        _distances(runs, limits, chunks),
        _cache(runs, limits, chunks),
        _times(runs, limits),
        _key_frames(runs, clips),
        _metrics(metrics),
        _settings(runs),
    )
    title = " and ".join(run.name for run in runs)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title}: what the cache did"),
        element("link", rel="icon", href="data:,"),
        element("style", _read("page.css") + chunk_styles(1 + max(chunks))),
    )
    body = element(
        "body", main, element("div", id="tip", hidden=""), element("script", _read("page.js"))
    )
    root = element("html", head, body, lang="en")
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html")


def _header(runs: Sequence[Run]) -> Element:
    made = element("header", element("h1", "What the cache did"))
    for run in runs:
        environment = run.record["environment"]
        packages = environment.get("packages") or {}
        where = [str(environment.get("device") or "")]
        where += [f"torch {packages['torch']}"] if packages.get("torch") else []
        where += [f"commit {environment['commit'][:12]}"] if environment.get("commit") else []
        name = element("strong", run.name)
        line = f" {headline(run)}. {', '.join(part for part in where if part)}"
        append(made, element("p", _badge(run, runs), name, line))
        if run.record["config"].get("prompt"):
            append(made, element("blockquote", str(run.record["config"]["prompt"])))
    return made


def _alarms(runs: Sequence[Run]) -> Element:
    lines = [element("li", _badge(run, runs), alarm) for run in runs for alarm in run.alarms]
    if not lines:
        return element("p", "✓ No alarm.", class_="quiet", id="alarms")
    title = "⚠ 1 alarm" if len(lines) == 1 else f"⚠ {len(lines)} alarms"
    return element(
        "div", element("strong", title), element("ul", *lines), class_="alarm", id="alarms"
    )


def _figures(runs: Sequence[Run], metrics: Metrics | str | None) -> Element:
    if len(runs) == 1:
        return element("section", _cards(runs[0]), aria_label="figures")
    header = ("", *(f"{run.letter}: {run.name}" for run in runs), "B / A")
    return _section("Figures", _table(header, figure_rows(runs, metrics)))


def _cards(run: Run) -> Element:
    total = run.flops + run.flops_saved
    factor = f"{total / run.flops:.2f}× fewer than without reuse" if run.flops else ""
    cards = [
        (percent(run.computed_share), "computed", f"{run.num_computed} of {len(run.rows)} passes"),
        (scaled(run.flops, "FLOP"), "spent on chunk passes", factor),
        (scaled(run.flops_saved, "FLOP"), "saved by reuse", ""),
    ]
    if run.seconds is not None:
        cards.append((seconds_text(run.seconds), "in all stages", ""))
    if run.peak_tokens is not None:
        cards.append((f"{run.peak_tokens:.0f}", "clean tokens at most", "in the KV cache"))
    made = [
        element("div", element("b", value), element("span", name), element("small", more))
        for value, name, more in cards
    ]
    return element("div", *made, class_="cards")


def _branch_choice(runs: Sequence[Run]) -> Element | None:
    deciding = dict.fromkeys(panel.branch for run in runs for panel in run.panels)
    caching = dict.fromkeys(panel.branch for run in runs for panel in run.cache_panels)
    if len(deciding) == 1 and len(caching) <= 1:
        return None
    choices = [
        element(
            "label",
            element("input", type="radio", name="branch", value=branch),
            f" {branch or 'every one'}",
        )
        for branch in (*(deciding | caching), "")
    ]
    return element("fieldset", element("legend", "Guidance branch"), *choices, id="branches")


def _decisions(runs: Sequence[Run], limits: charts.Limits) -> Element:
    legend = _legend(("computed", "computed"), ("reused", "reused"), ("ground", "not active"))
    note = "A row per chunk, a column per tick; at the right, the share that was computed."
    if not limits.has_tips:
        note += f" There are more than {charts.MAX_TIPS} passes: the cells have no texts."
    grid = _grid(runs, charts.heat_map, limits=limits, num_columns=len(runs))
    return _section("Decisions", element("p", note), legend, grid)


def _distances(runs: Sequence[Run], limits: charts.Limits, chunks: Sequence[int]) -> Element:
    if not any(row.distance is not None for run in runs for row in run.rows):
        policies = " and ".join(run.record["policy"] for run in runs)
        return _section("Distances", element("p", f"The policy {policies} measured none."))
    one, other = ("Left", "Right") if len(runs) == 1 else ("Above", "Below")
    note = (
        f"{one}, how much each chunk's signal changed since the tick before. {other}, the sum "
        "since the chunk was last computed, which is compared with the threshold; a dot where the "
        "chunk was computed. A cross marks a value that is infinite or not a number."
    )
    draws = charts.distance_chart, charts.accumulated_chart
    grid = _grid(runs, *draws, limits=limits, num_columns=2)
    return _section("Distances", element("p", note), _chunk_legend(chunks), grid)


def _cache(runs: Sequence[Run], limits: charts.Limits, chunks: Sequence[int]) -> Element:
    if not any(run.record["kv"] for run in runs):
        return _section("KV cache", element("p", "The record holds no tokens of the cache."))
    note = (
        "Clean tokens that are kept after each tick, stacked by chunk, the first one at the "
        "bottom; mean over layers and heads."
    )
    grid = _grid(runs, charts.cache_chart, limits=limits, num_columns=2, of_cache=True)
    return _section("KV cache", element("p", note), _chunk_legend(chunks), grid)


def _times(runs: Sequence[Run], limits: charts.Limits) -> Element:
    def figures(draw: Callable[..., Element], field: str, name: str) -> list[Element]:
        return [
            _figure(draw(run, limits=limits, width=HALF_WIDTH), _caption(run, runs))
            if run.record[field]
            else element("p", f"{run.name}: no {name} was timed.")
            for run in runs
        ]

    stages = figures(charts.stage_chart, "stages", "stage")
    ticks = figures(charts.tick_chart, "ticks", "tick")
    note = "Seconds of each stage; a pale bar is part of the stage above it. Seconds of each tick."
    grid = element("div", *stages, *ticks, class_="grid two")
    return _section("Time", element("p", note), grid, *_timelines(runs, limits))


def _timelines(runs: Sequence[Run], limits: charts.Limits) -> list[Element]:
    """Draw when each stage was at work, where the runs' reports say it."""
    drawn = [
        _figure(charts.timeline_chart(run, limits=limits, width=FULL_WIDTH), _caption(run, runs))
        for run in runs
        if run.timeline
    ]
    if not drawn:
        return []
    legend = _legend(("bar", "the run itself"), ("beside", "beside the denoising"))
    note = "When each stage was at work; bars above each other were at work together."
    return [element("p", note), legend, element("div", *drawn, class_="grid")]


def _key_frames(runs: Sequence[Run], clips: Sequence[Clip]) -> Element:
    notes = [element("p", f"{clip.problem}.") for clip in clips if clip.problem is not None]
    present = [
        (run, clip.frames_THW3)
        for run, clip in zip(runs, clips, strict=True)
        if clip.frames_THW3 is not None
    ]
    if not present:
        return _section("Key frames", *notes)
    shown = runs[0].shown
    if not shown:
        shown = [Shown(0, -1, 0, min(len(frames) for _, frames in present))]
        note = "The record does not say which frames a chunk shows; these are of the whole video."
        notes.append(element("p", note))
    wanted = [at for entry in shown for at in entry.key_frames]
    uris = pictures([frames for _, frames in present], wanted)
    has_segments = len({entry.segment for entry in shown}) > 1
    cards: list[Element] = []
    for entry in shown:
        where = "video" if entry.chunk < 0 else f"chunk {entry.chunk}"
        where = f"segment {entry.segment}, {where}" if has_segments else where
        rows = [
            _strip(entry, found, badge=_badge(run, runs))
            for (run, _), found in zip(present, uris, strict=True)
        ]
        caption = element("figcaption", f"{where}: frames {entry.first} to {entry.stop - 1}")
        cards.append(element("figure", *rows, caption))
    note = element("p", "First, middle and last frame of every chunk.")
    return _section("Key frames", note, *notes, element("div", *cards, class_="frames"))


def _strip(entry: Shown, uris: Mapping[int, str], *, badge: Element | None) -> Element:
    images = [
        element("img", src=uris[at], alt=f"{name} frame, {at}", title=f"frame {at}")
        if at in uris
        else element("span", f"no frame {at}")
        for name, at in zip(POSITIONS, entry.key_frames, strict=True)
    ]
    return element("div", badge, *images, class_="strip")


def _metrics(metrics: Metrics | str | None) -> Element | None:
    if metrics is None:
        return None
    if isinstance(metrics, str):
        return _section("Pixels of B against A", element("p", metrics))
    num_equal = sum(value == float("inf") for value in metrics.psnr_T)
    note = (
        f"PSNR {decibel(metrics.psnr)} from one error over the whole clip, mean SSIM "
        f"{metrics.ssim:.4f}, on the frames as the mp4 holds them."
    )
    if num_equal:
        note += f" {num_equal} of {len(metrics.psnr_T)} frames are equal: their PSNR is infinite."
    drawn = [
        _figure(charts.metric_chart(values, name=name, width=HALF_WIDTH), name)
        for name, values in (("PSNR in dB", metrics.psnr_T), ("SSIM", metrics.ssim_T))
    ]
    grid = element("div", *drawn, class_="grid two")
    return _section("Pixels of B against A", element("p", note), grid)


def _settings(runs: Sequence[Run]) -> Element:
    parts: list[Child] = []
    if len(runs) == 2:
        rows = differing_settings(runs)
        header = ("differs", *(run.letter for run in runs))
        parts.append(_table(header, rows) if rows else element("p", "All settings are equal."))
    for run in runs:
        title = "All settings and the environment"
        title += f" of {run.letter}" if len(runs) == 2 else ""
        listed = _table(("setting", "value"), list(settings_of(run).items()))
        parts.append(element("details", element("summary", title), listed))
    return _section("Settings", *parts)


def _grid(
    runs: Sequence[Run],
    *draws: Draw,
    limits: charts.Limits,
    num_columns: int,
    of_cache: bool = False,
) -> Element:
    """Draw every panel of every run; of two runs, A is left and B right."""
    width = FULL_WIDTH if num_columns == 1 else HALF_WIDTH
    found = (panel for run in runs for panel in (run.cache_panels if of_cache else run.panels))
    cells: list[Element] = []
    for panel in sorted(dict.fromkeys(found), key=lambda panel: panel.segment):
        for draw in draws:
            for run in runs:
                drawn = draw(run, panel, limits=limits, width=width)
                if drawn is None:
                    drawn = element("p", "Nothing was recorded here.", class_="nothing")
                figure = _figure(drawn, _caption(run, runs, panel=panel))
                figure.set("data-branch", panel.branch)
                cells.append(figure)
    return element("div", *cells, class_="grid" if num_columns == 1 else "grid two")


def _figure(drawn: Element, caption: str) -> Element:
    return element("figure", element("figcaption", caption), drawn)


def _caption(run: Run, runs: Sequence[Run], *, panel: Panel | None = None) -> str:
    parts = [f"{run.letter}: {run.name}"] if len(runs) == 2 else []
    if panel is not None:
        if any(found.segment for other in runs for found in other.panels):
            parts.append(f"segment {panel.segment}")
        parts.append(f"branch {panel.branch}")
    return ", ".join(parts) or run.name


def _legend(*keys: tuple[str, str]) -> Element:
    """Name colours; a key is the class of a swatch, and the meaning of its colour."""
    named = [
        element("span", element("i", class_=f"swatch {kind}"), name, class_="key")
        for kind, name in keys
    ]
    return element("div", *named, class_="legend")


def _chunk_legend(chunks: Sequence[int]) -> Element:
    """Name the colour of every chunk; pointing at one brings it forward."""
    keys = [
        element(
            "span",
            element("i", class_="swatch chunk", style=colour_of(chunk)),
            str(chunk),
            class_="key",
            data_chunk=str(chunk),
        )
        for chunk in chunks
    ]
    return element("div", element("span", "chunk"), *keys, class_="legend")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Element:
    """Make a table whose first column names the rows."""
    body = [
        element(
            "tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])
        )
        for row in rows
    ]
    head = element("tr", *(element("th", name, scope="col") for name in header))
    made = element("table", element("thead", head), element("tbody", *body))
    return element("div", made, class_="scroll")


def _badge(run: Run, runs: Sequence[Run]) -> Element | None:
    return element("span", run.letter, class_="badge") if len(runs) == 2 else None


def _section(title: str, *children: Child) -> Element:
    return element("section", element("h2", title), *children)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
