"""Replicas of a service's model: a deployment of Ray Serve.

HTTP, page and the queue of jobs stay in one process, as without Ray. A replica holds one model, on
a GPU or several of its own where there are some, and makes one video at a time in the folder of its
job; what happens comes back as a stream of events. Ray starts replicas while jobs wait, ends idle
ones, and replaces those that died; a job whose replica failed begins again in another one.
"""

import asyncio
import logging
import threading
import uuid
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowcache.errors import UserError, first_line
from flowcache.runtime.cluster import cluster, import_ray
from flowcache.serve.group import Group, Load
from flowcache.serve.jobs import INPUT, JOB, BegunAgain, CancelledError, Event, Job, Made, Report

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
    """A process with a loaded model, or the first of several."""

    def __init__(self, load: Load, group_size: int = 1) -> None:
        """Load the model."""
        self.group = Group(load, group_size)

    async def make(self, job: Job, folder: Path) -> AsyncGenerator[Event, None]:
        """Make a job's video in a folder; yield what happens. Closing the generator ends it."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        is_unwanted = threading.Event()

        def report(event: Event) -> None:
            if is_unwanted.is_set():
                raise CancelledError
            loop.call_soon_threadsafe(events.put_nowait, event)

        work = loop.run_in_executor(None, self.group.make, job, folder, report)
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
    num_replicas: int
    """At most."""

    def make(self, job: Job, folder: Path, report: Report) -> None:
        """Let a replica make a job's video; see `flowcache.serve.jobs.Make`."""
        asyncio.run(self._make(job, folder, report))

    async def _make(self, job: Job, folder: Path, report: Report) -> None:
        reason: Exception = UserError("the stream of its events ended early")
        for seconds in (*RETRY_SECONDS, None):
            try:
                if await self._try(job, folder, report):
                    # a dead replica's encoder may have begun its file after the removal below
                    _remove(folder.glob(".*.part.mp4"))
                    return
            except CancelledError:
                raise
            except Exception as error:  # what Ray reports of a lost replica has many types
                reason = getattr(error, "cause", error)
                if isinstance(reason, UserError):
                    raise reason from None
                logger.warning("job %s: its replica failed", job.id, exc_info=True)
            _remove(path for path in folder.iterdir() if path.name != JOB and path.stem != INPUT)
            report(BegunAgain())
            if seconds is not None:
                await asyncio.sleep(seconds)
        raise UserError(
            f"the replica that made the video failed {len(RETRY_SECONDS) + 1} times, at last with: "
            f"{first_line(reason)}"
        )

    async def _try(self, job: Job, folder: Path, report: Report) -> bool:
        """Return whether the video is finished."""
        response = self.handle.make.remote(job, folder)
        is_made = False
        try:
            while True:
                event = asyncio.ensure_future(anext(response))
                while not (await asyncio.wait([event], timeout=POLL_SECONDS))[0]:
                    if job.is_cancelled:
                        raise CancelledError
                is_made = isinstance(event.result(), Made)
                report(event.result())
        except StopAsyncIteration:
            return is_made
        except CancelledError:
            response.cancel()
            raise


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)


@contextmanager
def replicas(
    load: Load, num_replicas: int | None, *, group_size: int = 1
) -> Generator[Replicas, None, None]:
    """Deploy replicas of a model; none is left at the end.

    Args:
        load: loads the model, in every process of a replica.
        num_replicas: at most; None: as `cluster` says.
        group_size: processes of a replica, each on a GPU where there are some.
    """
    serve = import_ray("ray.serve")
    with cluster(num_replicas, group_size=group_size) as found:
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
            handle = serve.run(deployment.bind(load, group_size), name=name, route_prefix=None)
        except RuntimeError:
            state = serve.status().applications[name].deployments["model"]
            reason = state.message.rstrip().rpartition("\n")[2]  # the last line of a traceback
            raise UserError(f"no replica could load the model: {reason}") from None
        try:
            yield Replicas(handle.options(stream=True), most)
        finally:
            if not found.is_own:
                serve.delete(name)
