"""The queue of a service: jobs on the disk, and one or more models that make them in order.

A job is a folder with `job.json`; when it is done with `video.mp4`, its JSON and its record, too.
While it is made, `live.mp4` grows by every finished chunk. A restarted service lists finished jobs
and marks those that it had not finished.
"""

import json
import logging
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from flowcache.api import Part, Pipeline, Tick
from flowcache.errors import UserError, first_line
from flowcache.runtime.files import read_json, write_json
from flowcache.runtime.video import LiveWriter

logger = logging.getLogger(__name__)

QUEUED, RUNNING, DONE, FAILED, CANCELLED = (
    *("queued", "in_progress", "completed", "failed", "cancelled"),
)
WAITING = (QUEUED, RUNNING)
VIDEO, LIVE, JOB, INPUT = "video.mp4", "live.mp4", "job.json", "input"
RESULTS = {"mp4": "video.mp4", "json": "video.json", "record": "video.record.json"}


class QueueFullError(Exception):
    """No further job is taken at the moment."""


class DiskFullError(Exception):
    """The jobs that are kept fill the space that they may take."""


class CancelledError(Exception):
    """Somebody asked for the end of the job."""


@dataclass
class Job:
    """One video that somebody asked for."""

    id: str
    prompt: str
    preset: str
    settings: Mapping[str, Any]
    """Of the flat vocabulary; pictures as paths inside the job's folder."""
    fps: int
    size: str
    """WIDTHxHEIGHT in pixels."""
    created_at: int
    """Seconds since 1970."""
    status: str = QUEUED
    error: str | None = None
    started_at: float | None = None
    completed_at: float | None = None
    num_ticks: int = 0
    num_frames: int = 0
    first_part_seconds: float | None = None
    """From the start of the work to the first finished chunk."""
    total_seconds: float | None = None
    saving_factor: float | None = None
    """FLOPs without reuse / FLOPs."""
    ticks: list[Tick] = field(default_factory=list, repr=False)
    """What has been done; kept in memory while the service runs."""
    is_cancelled: bool = False

    @property
    def progress(self) -> int:
        """Percent of the ticks."""
        if self.status == DONE:
            return 100
        return 100 * len(self.ticks) // self.num_ticks if self.num_ticks else 0

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the ticks so far; None: there is none."""
        if self.status != RUNNING or not self.ticks:
            return None
        last = self.ticks[-1]
        return last.elapsed_seconds / len(self.ticks) * (last.num_ticks - len(self.ticks))

    def to_dict(self) -> dict[str, Any]:
        """Return what `job.json` holds."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("ticks", "is_cancelled")
        }


# The work -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """Frames can be watched."""

    num_frames: int
    first_part_seconds: float | None
    """As of a `Job`; None: given frames that the video begins with."""


@dataclass(frozen=True)
class Made:
    """The video is finished."""

    total_seconds: float
    saving_factor: float


@dataclass(frozen=True)
class BegunAgain:
    """The process that made the video died; another one begins."""


Event: TypeAlias = Tick | Shown | Made | BegunAgain
Report: TypeAlias = Callable[[Event], None]
"""Takes what happens to a job; raises `CancelledError` if its end is wanted."""
Make: TypeAlias = Callable[[Job, Path, Report], None]
"""Makes a job's video in the job's folder."""


def make_video(pipe: Pipeline, job: Job, folder: Path, report: Report) -> None:
    """Make a job's video in a folder."""
    start = time.perf_counter()
    with LiveWriter(folder / LIVE, fps=job.fps) as live:

        def on_part(part: Part) -> None:
            live.append(part.frames)
            report(Shown(len(part.frames), time.perf_counter() - start if part.chunks else None))

        video = pipe(
            job.prompt,
            preset=job.preset,
            record=True,
            on_tick=report,
            on_part=on_part,
            **job.settings,
        )
    video.save(folder / VIDEO, overwrite=True)
    report(Made(time.perf_counter() - start, video.stats["flops"]["saving_factor"]))


class Jobs:
    """All jobs of a service, and the threads that carry them out."""

    def __init__(
        self,
        pipe: Pipeline,
        folder: Path,
        *,
        max_waiting: int,
        max_bytes: int,
        make: Make | None = None,
        num_at_once: int = 1,
    ) -> None:
        """Read the jobs of earlier services, and start.

        Args:
            pipe: plans the videos.
            folder: where jobs are kept; made if it is missing.
            max_waiting: jobs that wait or run at most.
            max_bytes: space that all jobs may take.
            make: makes a video; None: `pipe` does.
            num_at_once: videos that are made concurrently.
        """
        self.pipe = pipe
        self.folder = folder.resolve()  # processes that make videos have folders of their own
        self.make = partial(make_video, pipe) if make is None else make
        self.max_waiting = max_waiting
        self.max_bytes = max_bytes
        self.jobs = _read_jobs(folder)
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_stopped = False
        self._threads = [
            threading.Thread(target=self._work, name="flowcache-jobs", daemon=True)
            for _ in range(num_at_once)
        ]
        for thread in self._threads:
            thread.start()

    # What clients ask for -----------------------------------------------------------------------

    def add(
        self,
        prompt: str,
        *,
        preset: str | None,
        settings: Mapping[str, Any],
        files: Mapping[str, bytes],
    ) -> Job:
        """Check a job, keep it on the disk, and put it at the end of the queue.

        Args:
            files: uploaded pictures by setting, `image` or `video`.

        Raises:
            UserError: a setting is wrong.
            QueueFullError: too many jobs wait.
            DiskFullError: there is no room for its results.
        """
        self._check_room()
        job_id = f"video_{uuid.uuid4().hex}"
        folder = self.folder / job_id
        folder.mkdir()
        try:
            paths = {name: folder / f"{INPUT}.{name}" for name in files}
            for name, path in paths.items():
                path.write_bytes(files[name])
            given = {**settings, **{name: str(path) for name, path in paths.items()}}
            preset = preset or self.pipe.request.preset
            plan = self.pipe.plan(prompt, preset=preset, **given)
            job = Job(
                job_id,
                prompt,
                preset,
                given,
                fps=plan.fps,
                size=f"{plan.width}x{plan.height}",
                created_at=int(time.time()),
                num_ticks=plan.num_ticks,
            )
            self._keep(job)
            with self._changed:
                self._check_room()
                self.jobs[job.id] = job
                self._queue.append(job)
                self._changed.notify_all()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return job

    def _check_room(self) -> None:
        if sum(job.status in WAITING for job in list(self.jobs.values())) >= self.max_waiting:
            raise QueueFullError(f"{self.max_waiting} jobs wait already: try again later")
        if self.num_bytes() > self.max_bytes:
            raise DiskFullError(
                f"kept videos take more than {self.max_bytes / 1e9:.3g} GB: delete some"
            )

    def num_bytes(self) -> int:
        """Return the space that all jobs take."""
        total = 0
        for path in self.folder.glob("*/*"):
            with suppress(OSError):  # a file of a job at work may get its name just now
                total += path.stat().st_size
        return total

    def cancel(self, job: Job) -> None:
        """End a job; what it made so far can still be watched."""
        with self._changed:
            job.is_cancelled = True
            if job in self._queue:
                self._queue.remove(job)
                self._end(job, CANCELLED)

    def delete(self, job: Job) -> None:
        """End a job, and remove its files."""
        self.cancel(job)
        self.wait(lambda: job.status not in WAITING)
        self.jobs.pop(job.id, None)
        shutil.rmtree(self.folder / job.id, ignore_errors=True)

    def wait(self, is_so: Callable[[], bool], *, timeout_seconds: float | None = None) -> bool:
        """Wait until something about the jobs is so; return whether it is."""
        with self._changed:
            return self._changed.wait_for(is_so, timeout_seconds)

    def path(self, job: Job, name: str) -> Path:
        """Return a file of a job, by its own name."""
        return self.folder / job.id / name

    def close(self) -> None:
        """Stop taking jobs, end those at work, wait for the threads."""
        with self._changed:
            self._is_stopped = True
            for job in self.jobs.values():
                job.is_cancelled = job.is_cancelled or job.status in WAITING
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    # What the threads do ------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_stopped)
                if self._is_stopped:
                    return
                job = self._queue.popleft()
                job.status, job.started_at = RUNNING, time.time()
                self._keep(job)
                self._changed.notify_all()
            try:
                self.make(job, self.folder / job.id, partial(self._note, job))
            except CancelledError:
                if self._is_stopped:
                    self._end(job, FAILED, "the service was stopped before the video was done")
                else:
                    self._end(job, CANCELLED)
            except UserError as error:
                self._end(job, FAILED, first_line(error))
            except Exception as error:  # one job must not end the service
                logger.exception("job %s failed", job.id)
                self._end(job, FAILED, f"internal error: {type(error).__name__}")
            else:
                self._end(job, DONE)

    def _note(self, job: Job, event: Event) -> None:
        with self._changed:
            if isinstance(event, Tick):
                if job.is_cancelled:
                    raise CancelledError
                job.ticks.append(event)
                job.num_ticks = event.num_ticks
            elif isinstance(event, Shown):
                job.num_frames += event.num_frames
                if job.first_part_seconds is None:
                    job.first_part_seconds = event.first_part_seconds
            elif isinstance(event, Made):
                job.total_seconds = event.total_seconds
                job.saving_factor = event.saving_factor
            else:
                job.ticks, job.num_frames, job.first_part_seconds = [], 0, None
            self._changed.notify_all()

    def _end(self, job: Job, status: str, error: str | None = None) -> None:
        with self._changed:
            job.status, job.error, job.completed_at = status, error, time.time()
            if (self.folder / job.id).is_dir():
                self._keep(job)
            self._changed.notify_all()

    def _keep(self, job: Job) -> None:
        write_json(self.path(job, JOB), job.to_dict())


def _read_jobs(folder: Path) -> dict[str, Job]:
    """Return the jobs of earlier services, oldest first; what was under way has failed."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Job] = []
    for path in folder.glob(f"*/{JOB}"):
        try:
            job = Job(**read_json(path))
        except (UserError, TypeError, json.JSONDecodeError):
            logger.warning("%s is no job of this service: left as it is", path)
            continue
        if job.status in WAITING:
            job.status, job.error = FAILED, "the service ended before the video was done"
            write_json(path, job.to_dict())
        found.append(job)
    return {job.id: job for job in sorted(found, key=lambda job: job.created_at)}
