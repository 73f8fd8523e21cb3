"""The HTTP interface of a service: `/v1/videos` in OpenAI's form, live streams, metrics.

Source: the request and response fields of OpenAI's video API (platform.openai.com, "Videos").
"""

import asyncio
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, SummaryMetricFamily

from flowcache.errors import UserError
from flowcache.runtime.cli import in_one_line
from flowcache.runtime.config import preset_names
from flowcache.serve.jobs import (
    DONE,
    LIVE,
    RESULTS,
    WAITING,
    DiskFullError,
    Job,
    Jobs,
    QueueFullError,
)

NUMBERS = ("num_frames", "height", "width", "num_steps", "seed", "fps", "guidance")
SECTIONS = ("reuse.threshold", "kv.budget_chunks")
SETTINGS = (*NUMBERS, *SECTIONS, "negative_prompt")
"""What clients may set: no paths, no devices."""
TOKEN_COOKIE = "flowcache_token"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
POLL_SECONDS = 0.05
"""Between two looks at a file that grows."""
MAX_LENGTH_DIGITS = 15
MAX_FRAMES_AWAY = 12
"""Of the frames of `seconds`: half a chunk of MAGI-1."""


class RequestError(Exception):
    """What a client gave is wrong."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None) -> None:
        """Keep the line that the client gets."""
        super().__init__(in_one_line(message))
        self.status = status
        self.code = code


def make_app(
    jobs: Jobs, *, max_upload_bytes: int, token: str | None = None, is_local: bool = True
) -> FastAPI:
    """Return the application.

    Args:
        jobs: the queue.
        max_upload_bytes: of a request.
        token: what clients must send, as `Authorization: Bearer TOKEN`; the page takes it once
            as `/?token=TOKEN`.
        is_local: whether only names of this machine are taken as host.
    """
    app = FastAPI(title="FlowCache", docs_url="/docs", redoc_url=None)
    app.state.jobs = jobs
    app.include_router(_routes(jobs))
    if is_local:  # a page elsewhere cannot reach the service under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL_HOSTS))

    @app.middleware("http")
    async def guard(  # pyright: ignore[reportUnusedFunction]
        request: Request, go_on: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        length, origin = (request.headers.get(name) for name in ("content-length", "origin"))
        is_of_api = request.url.path.startswith("/v1")
        if is_of_api and is_local and origin and urlsplit(origin).netloc != request.url.netloc:
            return _error("a page of another origin may not ask for this", status=403)
        if is_of_api and request.method in ("POST", "PUT"):
            if length is None or not length.isdecimal():
                return _error("the request must say its Content-Length", status=411)
            # digits first: Python refuses to read thousands of them
            if len(length) > MAX_LENGTH_DIGITS or int(length) > max_upload_bytes:
                most = f"{max_upload_bytes / 1e6:g} MB"
                return _error(f"a request may have at most {most}", status=413)
        if token is None or request.url.path == "/health":
            return await go_on(request)
        given = request.query_params.get("token") or request.cookies.get(TOKEN_COOKIE, "")
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = bearer
        if not hmac.compare_digest(given.encode(), token.encode()):
            return _error("the bearer token is missing or wrong", status=401)
        response = await go_on(request)
        if request.query_params.get("token"):
            response.set_cookie(TOKEN_COOKIE, token, httponly=True, samesite="strict")
        return response

    @app.exception_handler(RequestError)
    async def refuse(  # pyright: ignore[reportUnusedFunction]
        _request: Request, error: RequestError
    ) -> JSONResponse:
        return _error(str(error), status=error.status, code=error.code)

    async def refuse_form(_request: Request, error: Exception) -> JSONResponse:
        return _error(in_one_line(str(error)), status=400)

    app.add_exception_handler(400, refuse_form)

    @app.exception_handler(RequestValidationError)
    async def refuse_query(  # pyright: ignore[reportUnusedFunction]
        _request: Request, error: RequestValidationError
    ) -> JSONResponse:
        first = error.errors()[0]
        return _error(in_one_line(f"{first['loc'][-1]}: {first['msg']}"), status=400)

    @app.exception_handler(Exception)
    async def fail(  # pyright: ignore[reportUnusedFunction]
        _request: Request, error: Exception
    ) -> JSONResponse:
        return _error(f"internal error: {type(error).__name__}", status=500)

    return app


def _error(message: str, *, status: int, code: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": content}, status_code=status)


def _routes(jobs: Jobs) -> APIRouter:
    routes = APIRouter()

    def find(video_id: str) -> Job:
        job = jobs.jobs.get(video_id)
        if job is None:
            raise RequestError(f"there is no video {video_id[:80]}", status=404, code="not_found")
        return job

    @routes.post("/v1/videos")
    async def create(request: Request) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """Put a video into the queue: JSON or a form, pictures as `input_reference`."""
        fields, files = await _read_request(request)
        prompt, preset, settings = await asyncio.to_thread(settings_of, fields, jobs)
        job = await asyncio.to_thread(
            add_job, jobs, prompt, preset=preset, settings=settings, files=files
        )
        return video_of(job, jobs)

    @routes.get("/v1/videos")
    async def listing(  # pyright: ignore[reportUnusedFunction]
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """List videos, newest first."""
        found = list(jobs.jobs.values())
        if order == "desc":
            found.reverse()
        names = [job.id for job in found]
        start = names.index(after) + 1 if after in names else 0
        data = [video_of(job, jobs) for job in found[start : start + limit]]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": start + limit < len(found),
        }

    @routes.get("/v1/videos/{video_id}")
    async def retrieve(video_id: str) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """Return the state of a video."""
        return video_of(find(video_id), jobs)

    @routes.post("/v1/videos/{video_id}/cancel")
    async def cancel(video_id: str) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """End a video; the chunks that are finished can still be watched."""
        job = find(video_id)
        await asyncio.to_thread(jobs.cancel, job)
        return video_of(job, jobs)

    @routes.delete("/v1/videos/{video_id}")
    async def delete(video_id: str) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """End a video if need be, and remove it."""
        await asyncio.to_thread(jobs.delete, find(video_id))
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @routes.get("/v1/videos/{video_id}/content")
    async def content(  # pyright: ignore[reportUnusedFunction]
        video_id: str, file: str = "mp4"
    ) -> FileResponse:
        """Return the finished video, or with `?file=json` or `?file=record` what belongs to it."""
        job = find(video_id)
        if file not in RESULTS:
            raise RequestError(f"file must be one of {', '.join(RESULTS)}")
        if job.status != DONE:
            raise RequestError(f"the video is {job.status}, not completed", status=409)
        name = RESULTS[file]
        return FileResponse(jobs.path(job, name), filename=f"{job.id}{name.removeprefix('video')}")

    @routes.get("/v1/videos/{video_id}/stream")
    async def stream(video_id: str) -> StreamingResponse:  # pyright: ignore[reportUnusedFunction]
        """Return the video while it is made: a fragmented mp4 that grows by every chunk."""
        return StreamingResponse(_follow(find(video_id), jobs), media_type="video/mp4")

    @routes.get("/v1/videos/{video_id}/ticks")
    async def ticks(video_id: str, start: int = 0) -> list[dict[str, Any]]:  # pyright: ignore[reportUnusedFunction]
        """Return what every tick from `start` on decided."""
        return [
            {
                "tick": tick.index,
                "clean": tick.clean,
                "passes": [[p.branch, p.segment, p.chunk, p.is_computed] for p in tick.decisions],
            }
            for tick in find(video_id).ticks[max(start, 0) :]
        ]

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """List the one model that is loaded."""
        name = jobs.pipe.request.model
        data = [{"id": name, "object": "model", "created": 0, "owned_by": jobs.pipe.model.name}]
        return {"object": "list", "data": data}

    @routes.get("/health")
    async def health() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        """Say that the service answers."""
        return {"status": "ok"}

    @routes.get("/metrics")
    async def metrics() -> PlainTextResponse:  # pyright: ignore[reportUnusedFunction]
        """Return counts and times for Prometheus."""
        registry = CollectorRegistry()
        registry.register(_Metrics(jobs))
        return PlainTextResponse(generate_latest(registry).decode())

    return routes


def add_job(jobs: Jobs, prompt: str, **given: Any) -> Job:
    """Put a job into the queue; a mistake of the client becomes a `RequestError`."""
    try:
        return jobs.add(prompt, **given)
    except QueueFullError as error:
        raise RequestError(str(error), status=429, code="queue_full") from None
    except DiskFullError as error:
        raise RequestError(str(error), status=507, code="disk_full") from None
    except UserError as error:
        # of an upload its kind, not its place here
        place = rf"{re.escape(str(jobs.folder))}/\w+/input\.(\w+)"
        raise RequestError(re.sub(place, r"\1", str(error))) from None


# Requests -----------------------------------------------------------------------------------------


async def _read_request(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the fields and the uploaded pictures, by setting, of a JSON or form request."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            given: Any = await request.json()
        except (ValueError, RecursionError):
            raise RequestError("the request is not valid JSON") from None
        if not isinstance(given, dict):
            raise RequestError("the request must be a JSON object")
        return cast("dict[str, Any]", given), {}
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise RequestError("send JSON or a form", status=415)
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    async with request.form() as form:
        for name, value in form.multi_items():
            if isinstance(value, str):
                fields[name] = value
            else:
                files[await _kind_of(name, value)] = await value.read()
    return fields, files


async def _kind_of(name: str, upload: Any) -> str:
    """Return whether an upload is an `image` or a `video`."""
    if name in ("image", "video"):
        return name
    if name != "input_reference":
        raise RequestError(f"{name[:80]} is unknown: upload input_reference, image or video")
    return "video" if str(upload.content_type).startswith("video/") else "image"


def settings_of(fields: Mapping[str, Any], jobs: Jobs) -> tuple[str, str | None, dict[str, Any]]:
    """Return prompt, preset and settings of a request; refuse what clients may not set."""
    given = dict(fields)
    prompt, preset = given.pop("prompt", None), given.pop("preset", None)
    if prompt is None:
        raise RequestError("prompt is missing: say what the video shows")
    if preset is not None and preset not in presets(jobs):
        raise RequestError(f"preset {preset!r:.80} is unknown: use {', '.join(presets(jobs))}")
    model = given.pop("model", None)
    if model not in (None, jobs.pipe.request.model):
        raise RequestError(
            f"this service has the model {jobs.pipe.request.model}, not {model!r:.80}", status=404
        )
    settings: dict[str, Any] = {}
    size, seconds = given.pop("size", None), given.pop("seconds", None)
    if size is not None:
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(size))
        if match is None:
            raise RequestError(f"size must be WIDTHxHEIGHT, as 960x544, not {size!r:.80}")
        settings |= {"width": int(match[1]), "height": int(match[2])}
    if seconds is not None:
        given.setdefault("num_frames", _frames_of(seconds, jobs, preset))
    for name, value in given.items():
        if name not in SETTINGS:
            raise RequestError(f"{name[:80]!r} is unknown; known: {', '.join(SETTINGS)}")
        if not isinstance(value, (str, int, float, bool)):
            raise RequestError(f"{name} must be a number or a text")
        settings[name] = value
    return prompt, preset, settings


def _frames_of(seconds: Any, jobs: Jobs, preset: str | None) -> int:
    """Return the number of frames, as the model takes it, that lasts about so many seconds."""
    try:
        wanted = float(seconds)
    except (TypeError, ValueError):
        wanted = -1.0
    if not 0 < wanted <= 86_400:
        raise RequestError(f"seconds must be a number above 0, not {seconds!r:.80}")
    near = round(wanted * jobs.pipe.plan(preset=preset).fps)
    # models take some numbers only: the nearest one that this model takes
    refusal = UserError("seconds is too short")
    for away in sorted(range(-MAX_FRAMES_AWAY, MAX_FRAMES_AWAY + 1), key=abs):
        try:
            return jobs.pipe.plan(preset=preset, num_frames=max(near + away, 1)).num_frames
        except UserError as error:
            refusal = error
    raise RequestError(str(refusal))


def presets(jobs: Jobs) -> list[str]:
    """Return the names of the model's presets."""
    return preset_names(jobs.pipe.model.presets)


# Answers ------------------------------------------------------------------------------------------


def video_of(job: Job, jobs: Jobs) -> dict[str, Any]:
    """Return the state of a job as OpenAI's `video` object, and more of our own."""
    done = job.completed_at
    return {
        "id": job.id,
        "object": "video",
        "model": jobs.pipe.request.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": job.created_at,
        "completed_at": None if done is None else int(done),
        "expires_at": None,
        "prompt": job.prompt,
        "seconds": f"{job.num_frames / job.fps:g}",
        "size": job.size,
        "remixed_from_video_id": None,
        "error": None if job.error is None else {"code": job.status, "message": job.error},
        "preset": job.preset,
        "settings": {key: value for key, value in job.settings.items() if key in SETTINGS},
        "num_frames": job.num_frames,
        "first_part_seconds": job.first_part_seconds,
        "total_seconds": job.total_seconds,
        "seconds_left": job.seconds_left,
        "saving_factor": job.saving_factor,
    }


async def _follow(job: Job, jobs: Jobs) -> AsyncIterator[bytes]:
    """Yield a file while it grows, until its job has ended."""
    path = jobs.path(job, LIVE)
    while not path.is_file():
        if job.status not in WAITING:
            return
        await asyncio.sleep(POLL_SECONDS)
    with path.open("rb") as file:
        while True:
            has_ended = job.status not in WAITING
            if data := file.read():
                yield data
            elif has_ended:
                return
            else:
                await asyncio.sleep(POLL_SECONDS)


class _Metrics:
    """What Prometheus collects."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    def collect(self) -> list[Any]:
        found = list(self.jobs.jobs.values())
        by_status = GaugeMetricFamily("flowcache_videos", "Videos by status.", labels=["status"])
        for status in ("queued", "in_progress", "completed", "failed", "cancelled"):
            by_status.add_metric([status], sum(job.status == status for job in found))
        made = [job for job in found if job.total_seconds is not None]
        metrics: list[Any] = [by_status]
        for name, text, values in (
            ("first_part_seconds", "Start to first chunk.", [j.first_part_seconds for j in made]),
            ("video_seconds", "Start to the whole video.", [j.total_seconds for j in made]),
            ("video_frames", "Frames of a video.", [j.num_frames for j in made]),
        ):
            given = [value for value in values if value is not None]
            summary = SummaryMetricFamily(f"flowcache_{name}", text)
            summary.add_metric([], count_value=len(given), sum_value=sum(given))
            metrics.append(summary)
        metrics.append(
            GaugeMetricFamily(
                "flowcache_disk_bytes", "Space that videos take.", value=self.jobs.num_bytes()
            )
        )
        return metrics
