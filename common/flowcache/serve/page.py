"""The page of a service: prompt, settings, the decisions of the cache, chunks that play early."""

import html
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import

import gradio as gr
from fastapi import FastAPI

from flowcache.serve.app import RequestError, add_job, presets, settings_of
from flowcache.serve.jobs import DONE, QUEUED, RESULTS, RUNNING, WAITING, Job, Jobs

UPDATE_SECONDS = 0.25
MAX_MAP_COLUMNS = 400
"""Ticks drawn one by one; of more, neighbours share a column."""
MAX_LISTED = 10
UPLOADS_KEPT = (600, 3600)
"""Every so many seconds, uploads of the page older than so many are removed; jobs have copies."""
EXAMPLE = "a red circle moving right on a black background"
VANILLA = "vanilla"
CSS = """
.flowcache figure { margin: 0 }
.flowcache video { width: 100%; max-height: 60vh; background: #000; object-fit: contain }
.flowcache progress { width: 100%; height: 8px; accent-color: #1c7ed6; display: block }
.flowcache ul { list-style: none; margin: 8px 0; padding: 0 }
.flowcache .facts { display: flex; flex-wrap: wrap; column-gap: 20px }
.flowcache #map-of-decisions { display: flex; gap: 8px; font-size: 12px; line-height: 16px }
.flowcache #map-of-decisions svg { flex: 1; min-width: 0 }
.flowcache .legend { font-size: 12px; margin-top: 4px }
.flowcache .legend i { display: inline-block; width: 10px; height: 10px; margin: 0 2px 0 8px }
.flowcache .computed { fill: #d9480f; background: #d9480f }
.flowcache .reused { fill: #4dabf7; background: #4dabf7 }
.flowcache li { overflow-wrap: anywhere; padding: 4px 0; border-top: 1px solid #8884 }
"""
ROW_PIXELS = 16


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
    with gr.Blocks(title="FlowCache", analytics_enabled=False, delete_cache=UPLOADS_KEPT) as page:
        gr.Markdown(f"# FlowCache\n{_escaped(jobs.pipe.request.model)}: chunks play as they finish")
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(EXAMPLE, label="Prompt", lines=2, elem_id="prompt")
                preset = gr.Dropdown(presets(jobs), value=jobs.pipe.request.preset, label="Preset")
                with gr.Row():
                    num_frames = gr.Number(plan.num_frames, label="Frames", precision=0)
                    seed = gr.Number(0, label="Seed", precision=0)
                with gr.Accordion("More", open=False):
                    threshold = gr.Textbox(label="reuse.threshold (empty: as in the preset)")
                    num_steps = gr.Textbox(label="num_steps (empty: as in the preset)")
                    # gr.Image, given a path without Gradio's mark of an upload, would read it
                    image = gr.File(label="Start picture", file_types=["image"], height=120)
                make = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Row():
                    # few-step models have no preset of that name
                    has_vanilla = VANILLA in presets(jobs)
                    compare = gr.Button(
                        "Compare with vanilla", elem_id="compare", visible=has_vanilla
                    )
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
            fields.setdefault("prompt", "")
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
                yield player(job), state_of(job, jobs), map_of(job), list_of(jobs)
                if is_over:
                    return
                time.sleep(UPDATE_SECONDS)

        def reload() -> tuple[str | None, str]:
            newest = next(reversed(jobs.jobs), None)
            return newest, list_of(jobs)

        fields = [prompt, preset, num_frames, seed, threshold, num_steps, image]
        views = [shown, state, chart, recent]
        pair: Any = gr.State(None)
        for event in (
            make.click(start, fields, current).success(hide, None, reference),
            compare.click(start_pair, current, [current, pair]).success(show, pair, reference),
            page.load(reload, None, [current, recent]),
        ):
            event.success(watch, current, views, show_progress="hidden")
        cancel.click(stop, current)
    page.queue(default_concurrency_limit=None)
    page.has_launched = True  # a mounted page would else copy whatever file a client names
    return page


def _escaped(text: object) -> str:
    return html.escape(str(text), quote=True)


def player(job: Job) -> str:
    """Return what plays a job: while it is made what is there, then the finished video."""
    name = "stream" if job.status != DONE else "content"
    # the same element while the job goes on: it is not started again
    if job.num_frames == 0:
        return "<p>the first chunk is being made</p>" if job.status == RUNNING else ""
    caption = f"{_escaped(job.preset)}: {_escaped(job.prompt[:120])}"
    return (
        f'<figure><video controls autoplay muted loop playsinline src="v1/videos/{job.id}/{name}" '
        f'style="aspect-ratio: {_escaped(job.size.replace("x", " / "))}"></video>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def state_of(job: Job, jobs: Jobs) -> str:
    """Return progress, times and downloads of a job."""
    facts = [f"<b>{job.status.replace('_', ' ')}</b>"]
    if job.status == QUEUED:
        earlier = itertools.takewhile(lambda other: other is not job, list(jobs.jobs.values()))
        facts.append(f"{sum(other.status in WAITING for other in earlier)} before it")
    if job.error:
        facts.append(_escaped(job.error))
    if job.seconds_left is not None:
        facts.append(f"about {job.seconds_left:.0f} s left")
    if job.first_part_seconds is not None:
        facts.append(f"first chunk after {job.first_part_seconds:.1f} s")
    if job.total_seconds is not None:
        facts.append(f"{job.num_frames} frames in {job.total_seconds:.1f} s")
    if job.saving_factor is not None and job.saving_factor > 1:
        facts.append(f"{job.saving_factor:.2f}x fewer FLOPs than without reuse")
    if job.status == DONE:
        facts += [
            f'<a href="v1/videos/{job.id}/content?file={name}" download>{name}</a>'
            for name in RESULTS
        ]
    shown = "".join(f"<span>{fact}</span>" for fact in facts)
    bar = f'<progress max="100" value="{job.progress}"></progress>' if job.status in WAITING else ""
    return f'<div class="facts">{shown}</div>{bar}'


def map_of(job: Job) -> str:
    """Return a drawing of the decisions: a row per chunk, a column per tick."""
    ticks = list(job.ticks)
    if not ticks:
        return ""
    cells: dict[tuple[int, int], bool] = {}
    share = max(1, -(-job.num_ticks // MAX_MAP_COLUMNS))
    rows: dict[tuple[int, int], int] = {}
    for tick in ticks:
        for decision in tick.decisions:
            row = rows.setdefault((decision.segment, decision.chunk), len(rows))
            place = (row, tick.index // share)
            cells[place] = cells.get(place, False) or decision.is_computed
    shapes = "".join(
        f'<rect class="{"computed" if is_computed else "reused"}" x="{column}" y="{row}" '
        'width=".94" height=".86"/>'
        for (row, column), is_computed in cells.items()
    )
    # the drawing is stretched to the page's width, its labels are text next to it
    labels = "<br>".join(map(str, rows.values()))
    size = f"0 0 {-(-job.num_ticks // share)} {len(rows)}"
    return (
        f'<div id="map-of-decisions"><div>{labels}</div><svg viewBox="{size}" role="img" '
        'preserveAspectRatio="none" aria-label="decisions of the cache" '
        f'style="height: {ROW_PIXELS * len(rows)}px">{shapes}</svg></div>'
        '<p class="legend">a row per chunk, a column per tick:<i class="computed"></i> computed'
        f'<i class="reused"></i> reused (tick {len(ticks)} of {job.num_ticks})</p>'
    )


def list_of(jobs: Jobs) -> str:
    """Return the newest jobs, with links to what they made."""
    rows = [
        f"<li>{job.status.replace('_', ' ')} &middot; {_escaped(job.preset)} &middot; "
        f"{_escaped(job.prompt[:80])}"
        + (f' &middot; <a href="v1/videos/{job.id}/content">mp4</a>' if job.status == DONE else "")
        + "</li>"
        for job in list(reversed(jobs.jobs.values()))[:MAX_LISTED]
    ]
    return f"<ul>{''.join(rows)}</ul>" if rows else ""
