"""Replicas of a service's model: a deployment of Ray Serve.

HTTP, page and the queue of jobs stay in one process, as without Ray. A replica holds one model,
on a GPU of its own where there is one, and makes one video at a time in the folder of its job; what
happens comes back as a stream of events. Ray starts replicas while jobs wait, ends idle ones, and
replaces those that died; a job whose replica died begins again in another one.
"""

import asyncio
import logging
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowcache.api import Pipeline
from flowcache.errors import UserError, first_line
from flowcache.runtime.cluster import cluster, import_ray
from flowcache.serve.jobs import INPUT, JOB, BegunAgain, CancelledError, Event, Job, Report
from flowcache.serve.jobs import make_video as make_here

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
"""Between two looks whether a job is cancelled."""
SCALING = {"upscale_delay_s": 1.0, "downscale_delay_s": 600.0, "target_ongoing_requests": 1}
"""A model takes long to load, so that one without work stays for ten minutes."""
HEALTH = {"health_check_period_s": 1.0, "health_check_timeout_s": 120.0}
"""Soon, as a replica may have died; patient, as one that compiles may not answer."""
RETRY_SECONDS = (1.0, 10.0)
"""Before a job begins again: Ray may need so long to see that a replica died."""
MAX_LOADS = 3
"""How often a replica that can't be loaded is tried."""


class Replica:
    """A process with a loaded model."""

    def __init__(self, load: Callable[[], Pipeline]) -> None:
        """Load the model."""
        self.pipe = load()

    async def make(self, job: Job, folder: Path) -> AsyncGenerator[Event, None]:
        """Make a job's video in a folder; yield what happens. Closing the generator ends it."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        is_unwanted = threading.Event()

        def report(event: Event) -> None:
            if is_unwanted.is_set():
                raise CancelledError
            loop.call_soon_threadsafe(events.put_nowait, event)

        work = loop.run_in_executor(None, make_here, self.pipe, job, folder, report)
        work.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            await work
        finally:
            is_unwanted.set()
            await asyncio.wait([work])


@dataclass(frozen=True)
class Replicas:
    """All replicas, as the service sees them."""

    handle: Any
    """Of the deployment, for streams."""
    failed: type[Exception]
    """Holds as its `cause` what a replica raised."""
    died: tuple[type[Exception], ...]
    """What Ray raises where a replica did not end the job."""
    num_replicas: int
    """At most."""

    def make(self, job: Job, folder: Path, report: Report) -> None:
        """Let a replica make a job's video; see `flowcache.serve.jobs.Make`."""
        asyncio.run(self._make(job, folder, report))

    async def _make(self, job: Job, folder: Path, report: Report) -> None:
        for seconds in (*RETRY_SECONDS, None):
            try:
                await self._try(job, folder, report)
                # a dead replica's encoder may have begun its file after the removal below
                _remove(folder.glob(".*.part.mp4"))
                return
            except self.failed as error:
                cause: Exception = getattr(error, "cause", error)
                if not isinstance(cause, self.died):
                    raise cause from None
                reason = cause
            except self.died as error:
                reason = error
            logger.warning("job %s: its replica died (%s)", job.id, first_line(reason))
            _remove(path for path in folder.iterdir() if path.name != JOB and path.stem != INPUT)
            report(BegunAgain())
            if seconds is not None:
                await asyncio.sleep(seconds)
        raise UserError(f"the replica that made the video died {len(RETRY_SECONDS) + 1} times")

    async def _try(self, job: Job, folder: Path, report: Report) -> None:
        response = self.handle.make.remote(job, folder)
        try:
            while True:
                event = asyncio.ensure_future(anext(response))
                while not (await asyncio.wait([event], timeout=POLL_SECONDS))[0]:
                    if job.is_cancelled:
                        raise CancelledError
                report(event.result())
        except StopAsyncIteration:
            return
        except CancelledError:
            response.cancel()
            raise


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)


@contextmanager
def replicas(
    load: Callable[[], Pipeline], num_replicas: int | None
) -> Generator[Replicas, None, None]:
    """Deploy replicas of a model; none is left at the end.

    Args:
        load: loads the model, in the process of a replica.
        num_replicas: at most; None: as `cluster` says.
    """
    serve = import_ray("ray.serve")
    with cluster(num_replicas) as found:
        name = f"flowcache-{uuid.uuid4().hex[:8]}"  # a cluster may have several services
        most = found.num_replicas
        deployment = serve.deployment(
            Replica,
            name="model",
            max_ongoing_requests=1,
            autoscaling_config={"min_replicas": 1, "max_replicas": most, **SCALING},
            ray_actor_options=dict(found.resources),
            max_constructor_retry_count=MAX_LOADS,
            graceful_shutdown_timeout_s=1.0,
            logging_config={"log_level": "ERROR", "enable_access_log": False},
            **HEALTH,
        )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        try:
            handle = serve.run(deployment.bind(load), name=name, route_prefix=None)
        except RuntimeError:
            state = serve.status().applications[name].deployments["model"]
            reason = state.message.rstrip().rpartition("\n")[2]  # the last line of a traceback
            raise UserError(f"no replica could load the model: {reason}") from None
        try:
            errors = found.ray.exceptions
            died = (errors.RayError, serve.exceptions.RayServeException)
            yield Replicas(handle.options(stream=True), errors.RayTaskError, died, most)
        finally:
            if not found.is_own:
                serve.delete(name)
