"""The page that shows what the cache did, in one run or in two: figures, charts, key frames."""

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import torch
from PIL import Image

from flowcache.errors import UserError
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
from flowcache.report.run import NOTHING, ChunkFrames, Panel, Run, dotted
from flowcache.runtime.checks import DegenerateCheck
from flowcache.runtime.metrics import psnr, psnr_per_frame, ssim_per_frame
from flowcache.runtime.stats import scaled
from flowcache.runtime.video import Pixels, read_video

FOLDER = Path(__file__).parent
FULL_WIDTH, HALF_WIDTH = 1120.0, 545.0
"""Of a chart in CSS pixels, alone in its row or one of two."""
POSITIONS = ("first", "middle", "last")
WIDTHS = (320, 240, 160, 112, 80)
"""Pixels; the widest is taken whose pictures all fit into the page."""
JPEG_QUALITY = 82
MAX_BYTES = 2_500_000
"""Of all pictures of a page, as text."""

TERMS = {
    "chunk": "latent frames that are denoised together, at one noise level",
    "tick": "one pass over the active chunks, each at its own step",
    "step": "one denoising step of a chunk; each chunk counts its own, from 0",
    "pass": "one chunk through the transformer at one step, for one branch: computed or reused",
    "segment": "one window of a long SkyReels-V2 video; segments share some frames",
    "branch": "a guidance pass, by name: with the prompt, without it",
    "signal": "what a policy compares from tick to tick",
    "threshold": "the accumulated distance from which a chunk is computed",
    "clean": "denoised",
    "stage": "a part of the run that is timed: texts, denoising, decoding, writing",
}
"""Words of the notes that are explained where they are pointed at; as in docs/glossary.md."""
PLURAL = r"(?:es|s)?"

Draw = Callable[..., Element | None]


@dataclass(frozen=True)
class Clip:
    """A decoded video, or why there is none."""

    frames_THW3: Pixels | None
    problem: str | None


@dataclass(frozen=True)
class Metrics:
    """How near video B is to video A: PSNR of the whole clip in dB, mean SSIM, and per frame."""

    psnr: float
    ssim: float
    psnr_T: Sequence[float]
    ssim_T: Sequence[float]


def read_clip(path: Path) -> Clip:
    """Read the video of a run; a missing or broken one is a problem to report, not an error."""
    try:
        return Clip(read_video(path)[0], None)
    except UserError as error:
        return Clip(None, str(error).replace(str(path), path.name))


def with_video_alarms(run: Run, clip: Clip) -> Run:
    """Add the alarms of the frames that a run made; those before its first chunk were given."""
    if clip.frames_THW3 is None:
        return run
    check = DegenerateCheck()
    check.see(clip.frames_THW3[min((each.first for each in run.chunk_frames), default=0) :])
    return replace(run, alarms=[*run.alarms, *check.alarms()])


def measure(clips: Sequence[Clip]) -> Metrics | str:
    """Compare video B with video A, or say why that can't be done."""
    reference, clip = (clip.frames_THW3 for clip in clips)
    if reference is None or clip is None:
        problems = (clip.problem for clip in clips if clip.problem is not None)
        return f"No metrics: {'; '.join(problems)}."
    pair = torch.from_numpy(clip), torch.from_numpy(reference)
    try:
        ssim_T = ssim_per_frame(*pair)
        return Metrics(
            psnr(*pair), ssim_T.mean().item(), psnr_per_frame(*pair).tolist(), ssim_T.tolist()
        )
    except UserError as error:
        return f"No metrics: {error}."


def decibel(value: float) -> str:
    return "∞ (equal pixels)" if math.isinf(value) else f"{value:.2f} dB"


def headline(run: Run) -> str:
    """Say which run it is in one line."""
    record = run.record
    threshold = "" if run.threshold is None else f", threshold {run.threshold:g}"
    preset = f", preset {record['preset']}" if record["preset"] else ""
    return (
        f"model {record['model']}{preset}, policy {record['policy']}{threshold}, "
        f"{record['num_steps']} steps"
    )


def summary(runs: Sequence[Run], metrics: Metrics | str | None) -> str:
    """Return what the page says in a few lines: settings, figures, alarms."""
    is_pair = len(runs) == 2
    lines = [f"{run.letter + ': ' if is_pair else ''}{run.name}: {headline(run)}" for run in runs]
    rows = figure_rows(runs, metrics)
    if is_pair:
        rows = [("", "A", "B", "B / A"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    if isinstance(metrics, str):
        lines.append(metrics)
    alarms = [f"ALARM {run.name}: {alarm}" for run in runs for alarm in run.alarms]
    return "\n".join([*lines, *(alarms or ["no alarm"])])


def figure_rows(runs: Sequence[Run], metrics: Metrics | str | None) -> list[tuple[str, ...]]:
    """Return rows of a table: a figure, its value in every run, and B / A if there are two."""
    columns = [_figures_of(run) for run in runs]
    rows: list[tuple[str, ...]] = []
    for name in columns[0]:
        values, cells = zip(*(column[name] for column in columns), strict=True)
        rows.append((name, *cells, *([_ratio(*values)] if len(runs) == 2 else [])))
    if isinstance(metrics, Metrics):
        rows.append(("PSNR of B against A", NOTHING, decibel(metrics.psnr), NOTHING))
        rows.append(("SSIM of B against A", NOTHING, f"{metrics.ssim:.4f}", NOTHING))
    return rows


def _figures_of(run: Run) -> dict[str, tuple[float | None, str]]:
    """Return figures by name, as a number and as people read it."""
    found, tokens, seconds = run.distances, run.peak_tokens, run.seconds
    spread = f"{min(found):.3g} to {max(found):.3g}" if found else NOTHING
    return {
        "chunk passes": (len(run.rows), str(len(run.rows))),
        "computed": (run.num_computed, f"{run.num_computed} ({percent(run.computed_share)})"),
        "FLOPs spent on chunk passes": (run.flops, scaled(run.flops, "FLOP")),
        "FLOPs saved by reuse": (run.flops_saved, scaled(run.flops_saved, "FLOP")),
        "seconds of all stages": (seconds, NOTHING if seconds is None else seconds_text(seconds)),
        "distances": (None, spread),
        "most clean tokens in the cache": (tokens, NOTHING if tokens is None else f"{tokens:.1f}"),
    }


def _ratio(reference: float | None, value: float | None) -> str:
    return f"{value / reference:.3f}" if value is not None and reference else NOTHING


def settings_of(run: Run) -> dict[str, str]:
    """Return every setting and the environment of a run by dotted names."""
    return dotted({name: run.record[name] for name in ("model", "preset", "config", "environment")})


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return the settings that differ between two runs: name, value in A, value in B."""
    first, second = (settings_of(run) for run in runs)
    rows = [(name, first.get(name, NOTHING), second.get(name, NOTHING)) for name in first | second]
    return [row for row in rows if row[1] != row[2]]


def pictures(clips: Sequence[Pixels], wanted: Sequence[int]) -> list[dict[int, str]]:
    """Return for every clip the wanted frames as JPEG data URIs, as wide as fits into the page."""
    numbers = sorted(set(wanted))
    for width in WIDTHS:
        found = [
            {at: _data_uri(clip[at], width=width) for at in numbers if at < len(clip)}
            for clip in clips
        ]
        if sum(len(uri) for uris in found for uri in uris.values()) <= MAX_BYTES:
            return found
    raise UserError(
        f"{len(numbers)} key frames do not fit into a page of 5 MB: explain a shorter video"
    )


def _data_uri(frame_HW3: Pixels, *, width: int) -> str:
    image = Image.fromarray(frame_HW3)
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def write_page(runs: Sequence[Run], clips: Sequence[Clip], metrics: Metrics | str | None) -> str:
    """Return the whole page as HTML; `metrics` is what `measure` says of two runs."""
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


def _note(words: str) -> Element:
    """Write a paragraph; each of `TERMS` is explained at its first place, on hover and on focus."""
    pattern = re.compile(rf"\b({'|'.join(TERMS)}){PLURAL}\b", re.IGNORECASE)
    made, end, seen = element("p"), 0, set[str]()
    for found in pattern.finditer(words):
        term = found[1].lower()
        if term not in seen:
            seen.add(term)
            append(made, words[end : found.start()])
            explained = element("dfn", found[0], tabindex="0", title=f"{term}: {TERMS[term]}")
            append(made, explained)
            end = found.end()
    append(made, words[end:])
    return made


def _header(runs: Sequence[Run]) -> Element:
    made = element("header", element("h1", "What the cache did"))
    for run in runs:
        environment = run.record["environment"]
        packages = environment.get("packages") or {}
        where = [str(environment.get("device") or "")]
        where += [f"torch {packages['torch']}"] if packages.get("torch") else []
        where += [f"commit {environment['commit'][:12]}"] if environment.get("commit") else []
        line = f" {headline(run)}. {', '.join(filter(None, where))}"
        append(made, element("p", _badge(run, runs), element("strong", run.name), line))
        if run.record["config"].get("prompt"):
            append(made, element("blockquote", str(run.record["config"]["prompt"])))
    return made


def _alarms(runs: Sequence[Run]) -> Element:
    lines = [element("li", _badge(run, runs), alarm) for run in runs for alarm in run.alarms]
    if not lines:
        return element("p", "✓ No alarm.", class_="fine", id="alarms")
    title = element("strong", "⚠ 1 alarm" if len(lines) == 1 else f"⚠ {len(lines)} alarms")
    return element("div", title, element("ul", *lines), class_="alarm", id="alarms")


def _figures(runs: Sequence[Run], metrics: Metrics | str | None) -> Element:
    if len(runs) == 1:
        return element("section", _cards(runs[0]), aria_label="figures")
    header = ("", *(f"{run.letter}: {run.name}" for run in runs), "B / A")
    return _section("Figures", _table(header, figure_rows(runs, metrics)))


def _cards(run: Run) -> Element:
    total = run.flops + run.flops_saved
    is_less = 0 < run.flops < total
    factor = f"{total / run.flops:.2f}× fewer than without reuse" if is_less else ""
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
    choices: list[Element] = []
    for branch in (*(deciding | caching), ""):
        button = element("input", type="radio", name="branch", value=branch)
        choices.append(element("label", button, f" {branch or 'every one'}"))
    return element("fieldset", element("legend", "Guidance branch"), *choices, id="branches")


def _decisions(runs: Sequence[Run], limits: charts.Limits) -> Element:
    legend = _legend(("computed", "computed"), ("reused", "reused"), ("ground", "not active"))
    note = "A row per chunk, a column per tick; at the right, the share that was computed."
    if not limits.has_tips:
        note += f" There are more than {charts.MAX_TIPS} passes: the cells have no texts."
    grid = _grid(runs, charts.heat_map, limits=limits, num_columns=len(runs))
    return _section("Decisions", _note(note), legend, grid)


def _distances(runs: Sequence[Run], limits: charts.Limits, chunks: Sequence[int]) -> Element:
    if not any(row.distance is not None for run in runs for row in run.rows):
        policies = " and ".join(run.record["policy"] for run in runs)
        return _section("Distances", element("p", f"The policy {policies} measured none."))
    note = (
        "Distance: how much each chunk's signal changed since the tick before. Accumulated "
        "distance: the sum since the chunk was last computed, which is compared with the "
        "threshold; a dot where the chunk was computed. Dashes of several colours are curves that "
        "lie on one another. A cross marks a value that is infinite or not a number."
    )
    draws = charts.distance_chart, charts.accumulated_chart
    grid = _grid(runs, *draws, limits=limits, num_columns=2)
    return _section("Distances", _note(note), _chunk_legend(chunks), grid)


def _cache(runs: Sequence[Run], limits: charts.Limits, chunks: Sequence[int]) -> Element:
    if not any(run.record["kv"] for run in runs):
        return _section("KV cache", element("p", "The record holds no tokens of the cache."))
    note = (
        "Clean tokens that are kept after each tick, stacked by chunk, the first one at the "
        "bottom; mean over layers and heads."
    )
    grid = _grid(runs, charts.cache_chart, limits=limits, num_columns=2, of_cache=True)
    return _section("KV cache", _note(note), _chunk_legend(chunks), grid)


def _times(runs: Sequence[Run], limits: charts.Limits) -> Element:
    cells = [
        _figure(draw(run, limits=limits, width=HALF_WIDTH), _caption(run, runs))
        if run.record[f"{name}s"]
        else element("p", f"{run.name}: no {name} was timed.")
        for draw, name in ((charts.stage_chart, "stage"), (charts.tick_chart, "tick"))
        for run in runs
    ]
    note = "Seconds of each stage; a pale bar is part of the stage above it. Seconds of each tick."
    parts = [_note(note), element("div", *cells, class_="grid two")]
    lanes = [
        _figure(charts.timeline_chart(run, limits=limits, width=FULL_WIDTH), _caption(run, runs))
        for run in runs
        if run.timeline
    ]
    if lanes:
        note = "When each stage was at work; bars above each other were at work together."
        keys = ("bar", "the run itself"), ("concurrent", "concurrent with the denoising")
        parts += [_note(note), _legend(*keys), element("div", *lanes, class_="grid")]
    return _section("Time", *parts)


def _key_frames(runs: Sequence[Run], clips: Sequence[Clip]) -> Element:
    notes = [element("p", f"{clip.problem}.") for clip in clips if clip.problem is not None]
    present = [
        (run, clip.frames_THW3)
        for run, clip in zip(runs, clips, strict=True)
        if clip.frames_THW3 is not None
    ]
    if not present:
        return _section("Key frames", *notes)
    chunks = runs[0].chunk_frames
    if not chunks:
        chunks = [ChunkFrames(0, -1, 0, min(len(frames) for _, frames in present))]
        note = "The record does not say which frames a chunk shows; these are of the whole video."
        notes.append(_note(note))
    wanted = [at for each in chunks for at in each.key_frames]
    uris = pictures([frames for _, frames in present], wanted)
    has_segments = len({each.segment for each in chunks}) > 1
    cards: list[Element] = []
    for each in chunks:
        where = "video" if each.chunk < 0 else f"chunk {each.chunk}"
        where = f"segment {each.segment}, {where}" if has_segments else where
        rows = [
            _strip(each, found, badge=_badge(run, runs))
            for (run, _), found in zip(present, uris, strict=True)
        ]
        caption = element("figcaption", f"{where}: frames {each.first} to {each.stop - 1}")
        cards.append(element("figure", *rows, caption))
    note = element("p", "First, middle and last frame of every chunk.")
    return _section("Key frames", note, *notes, element("div", *cards, class_="frames"))


def _strip(frames: ChunkFrames, uris: Mapping[int, str], *, badge: Element | None) -> Element:
    images = [
        element("img", src=uris[at], alt=f"{name} frame, {at}", title=f"frame {at}")
        if at in uris
        else element("span", f"no frame {at}")
        for name, at in zip(POSITIONS, frames.key_frames, strict=True)
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
    return _section("Pixels of B against A", _note(note), grid)


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
    keys: list[Element] = []
    for chunk in chunks:
        swatch = element("i", class_="swatch chunk", style=colour_of(chunk))
        keys.append(element("span", swatch, str(chunk), class_="key", data_chunk=str(chunk)))
    return element("div", element("span", "chunk"), *keys, class_="legend")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Element:
    """Make a table whose first column names the rows."""
    head = element("tr", *(element("th", name, scope="col") for name in header))
    body = [
        element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in cells))
        for name, *cells in rows
    ]
    made = element("table", element("thead", head), element("tbody", *body))
    return element("div", made, class_="scroll")


def _badge(run: Run, runs: Sequence[Run]) -> Element | None:
    return element("span", run.letter, class_="badge") if len(runs) == 2 else None


def _section(title: str, *children: Child) -> Element:
    return element("section", element("h2", title), *children)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
