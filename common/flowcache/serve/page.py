"""The page of a service: prompt, settings, the decisions of the cache, chunks that play early."""

import html
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import

import gradio as gr
from fastapi import FastAPI

from flowcache.serve.app import RequestError, add_job, presets, settings_of
from flowcache.serve.jobs import DONE, RESULTS, WAITING, Job, Jobs

UPDATE_SECONDS = 0.25
MAX_MAP_COLUMNS = 400
"""Ticks drawn one by one; of more, neighbours share a column."""
EXAMPLE = "a red circle moving right on a black background"
VANILLA = "vanilla"
CSS = """
.flowcache video { width: 100%; max-height: 60vh; background: #000; object-fit: contain }
.flowcache table { border-collapse: collapse; display: block; overflow-x: auto }
.flowcache figure { margin: 0 }
.flowcache svg { width: 100%; height: auto; display: block }
.flowcache .computed { fill: #d9480f } .flowcache .reused { fill: #4dabf7 }
.flowcache .idle { fill: color-mix(in srgb, currentColor 12%, transparent) }
.flowcache .label { fill: currentColor; font: 11px system-ui, sans-serif }
.flowcache progress { width: 100% }
"""


def mount_page(app: FastAPI, jobs: Jobs, *, max_upload_bytes: int) -> FastAPI:
    """Return the application with the page at `/`."""
    system = ["system-ui", "sans-serif"]
    return gr.mount_gradio_app(
        app,
        make_page(jobs),
        path="/",
        css=CSS,
        theme=gr.themes.Base(font=system, font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        max_file_size=max_upload_bytes,
        ssr_mode=False,
    )


def make_page(jobs: Jobs) -> gr.Blocks:
    """Return the page."""
    plan = jobs.pipe.plan()
    with gr.Blocks(title="FlowCache", analytics_enabled=False) as page:
        gr.Markdown(f"# FlowCache\n{_escaped(jobs.pipe.request.model)}: chunks play as they finish")
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(EXAMPLE, label="Prompt", lines=2, elem_id="prompt")
                with gr.Row():
                    preset = gr.Dropdown(
                        presets(jobs), value=jobs.pipe.request.preset, label="Preset"
                    )
                    num_frames = gr.Number(plan.num_frames, label="Frames", precision=0)
                    seed = gr.Number(0, label="Seed", precision=0)
                with gr.Accordion("More", open=False):
                    threshold = gr.Textbox(label="reuse.threshold (empty: as in the preset)")
                    num_steps = gr.Textbox(label="num_steps (empty: as in the preset)")
                    image = gr.Image(label="Start picture", type="filepath", height=160)
                with gr.Row():
                    make = gr.Button("Generate", variant="primary", elem_id="generate")
                    compare = gr.Button("Compare with vanilla", elem_id="compare")
                    cancel = gr.Button("Cancel", variant="stop", elem_id="cancel")
            with gr.Column(scale=3):
                with gr.Row():
                    shown = gr.HTML(elem_id="live", elem_classes="flowcache")
                    reference = gr.HTML(
                        elem_id="reference", elem_classes="flowcache", visible=False
                    )
                state = gr.HTML(elem_id="state", elem_classes="flowcache")
                chart = gr.HTML(elem_id="map", elem_classes="flowcache")
        recent = gr.HTML(elem_id="recent", elem_classes="flowcache")
        current: Any = gr.State(None)

        def start(
            text: str,
            name: str,
            frames: float,
            number: float,
            limit: str,
            steps: str,
            picture: str | None,
        ) -> str:
            fields: dict[str, Any] = {
                "prompt": text, "preset": name, "num_frames": frames, "seed": number,
                "reuse.threshold": limit, "num_steps": steps,
            }  # fmt: skip
            fields = {key: value for key, value in fields.items() if value not in (None, "")}
            files = {} if picture is None else {"image": Path(picture).read_bytes()}
            try:
                wanted, chosen, settings = settings_of(fields, jobs)
                job = add_job(jobs, wanted, preset=chosen, settings=settings, files=files)
            except RequestError as error:
                raise gr.Error(str(error), print_exception=False) from None
            return job.id

        def start_pair(current_id: str | None) -> tuple[str, str]:
            job = jobs.jobs.get(current_id or "")
            if job is None:
                raise gr.Error("generate a video first", print_exception=False)
            settings = {
                key: value for key, value in job.settings.items() if key != "reuse.threshold"
            }
            try:
                other = add_job(jobs, job.prompt, preset=VANILLA, settings=settings, files={})
            except RequestError as error:
                raise gr.Error(str(error), print_exception=False) from None
            return other.id, job.id

        def show(job_id: str | None) -> Any:
            job = jobs.jobs.get(job_id or "")
            return hide() if job is None else gr.HTML(player(job), visible=True)

        def hide() -> Any:
            return gr.HTML("", visible=False)

        def stop(current_id: str | None) -> None:
            job = jobs.jobs.get(current_id or "")
            if job is not None:
                jobs.cancel(job)

        def watch(current_id: str | None) -> Iterator[tuple[str, str, str, str]]:
            job = jobs.jobs.get(current_id or "")
            if job is None:
                return
            while True:
                is_over = job.status not in WAITING
                yield player(job), state_of(job), map_of(job), list_of(jobs)
                if is_over:
                    return
                time.sleep(UPDATE_SECONDS)

        def reload() -> tuple[str | None, str]:
            newest = next(reversed(jobs.jobs), None)
            return newest, list_of(jobs)

        fields = [prompt, preset, num_frames, seed, threshold, num_steps, image]
        views = [shown, state, chart, recent]
        make.click(start, fields, current).then(hide, None, reference).then(watch, current, views)
        pair: Any = gr.State(None)
        compare.click(start_pair, current, [current, pair]).then(show, pair, reference).then(
            watch, current, views
        )
        cancel.click(stop, current)
        page.load(reload, None, [current, recent]).then(watch, current, views)
    page.queue(default_concurrency_limit=None)
    return page


def _escaped(text: object) -> str:
    return html.escape(str(text), quote=True)


def player(job: Job) -> str:
    """Return what plays a job: while it is made what is there, then the finished video."""
    name = "stream" if job.status != DONE else "content"
    # the same element while the job goes on: it is not started again
    part = job.num_frames > 0
    if not part:
        return "<p>the first chunk is being made</p>" if job.status in WAITING else ""
    caption = f"{_escaped(job.preset)}: {_escaped(job.prompt[:120])}"
    return (
        f'<figure><video controls autoplay muted loop playsinline src="v1/videos/{job.id}/{name}">'
        f"</video><figcaption>{caption}</figcaption></figure>"
    )


def state_of(job: Job) -> str:
    """Return progress, times and downloads of a job."""
    rows = [f"<b>{job.status}</b>"]
    if job.error:
        rows.append(_escaped(job.error))
    if job.status in WAITING:
        rows.append(f'<progress max="100" value="{job.progress}"></progress>')
    if job.seconds_left is not None:
        rows.append(f"about {job.seconds_left:.0f} s left")
    if job.first_part_seconds is not None:
        rows.append(f"first chunk after {job.first_part_seconds:.1f} s")
    if job.total_seconds is not None:
        rows.append(f"{job.num_frames} frames in {job.total_seconds:.1f} s")
    if job.saving_factor is not None:
        rows.append(f"{job.saving_factor:.2f}x fewer FLOPs than without reuse")
    if job.status == DONE:
        rows += [
            f'<a href="v1/videos/{job.id}/content?file={name}" download>{name}</a>'
            for name in RESULTS
        ]
    return f"<p>{' &middot; '.join(rows)}</p>"


def map_of(job: Job) -> str:
    """Return a drawing of the decisions: a row per chunk, a column per tick."""
    ticks = list(job.ticks)
    if not ticks:
        return ""
    cells: dict[tuple[int, int], bool] = {}
    share = max(1, -(-job.num_ticks // MAX_MAP_COLUMNS))
    keys: dict[tuple[int, int], int] = {}
    for tick in ticks:
        for decision in tick.decisions:
            row = keys.setdefault((decision.segment, decision.chunk), len(keys))
            place = (row, tick.index // share)
            cells[place] = cells.get(place, False) or decision.is_computed
    num_columns, left, height = -(-job.num_ticks // share), 40, 14
    width = 600 / num_columns
    shapes = [
        f'<rect class="{"computed" if is_computed else "reused"}" x="{left + column * width:.2f}" '
        f'y="{row * height}" width="{max(width - 0.4, 0.4):.2f}" height="{height - 2}"/>'
        for (row, column), is_computed in cells.items()
    ]
    labels = [
        f'<text class="label" x="0" y="{row * height + 11}">{chunk}</text>'
        for (_, chunk), row in keys.items()
    ]
    size = f"0 0 {left + 600} {len(keys) * height + 22}"
    base = len(keys) * height + 16
    legend = (
        f'<text class="label" x="{left}" y="{base}">chunk by tick: orange computed, blue reused '
        f"(tick {len(ticks)} of {job.num_ticks})</text>"
    )
    drawn = "".join((*shapes, *labels, legend))
    return f'<svg viewBox="{size}" role="img" aria-label="decisions of the cache">{drawn}</svg>'


def list_of(jobs: Jobs) -> str:
    """Return the newest jobs, with links to what they made."""
    rows = [
        f"<tr><td>{job.status}</td><td>{_escaped(job.preset)}</td>"
        f"<td>{_escaped(job.prompt[:80])}</td><td>"
        + (f'<a href="v1/videos/{job.id}/content">mp4</a>' if job.status == DONE else "")
        + "</td></tr>"
        for job in list(reversed(jobs.jobs.values()))[:10]
    ]
    return f"<table>{''.join(rows)}</table>" if rows else ""
