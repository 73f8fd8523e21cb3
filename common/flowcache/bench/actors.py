"""Divide the videos of a list by Ray: among actors that keep their model loaded, on any machine.

Ray starts an actor that died again, wherever there is room, and gives it the same video once more.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowcache.bench.render import Renderer
from flowcache.bench.tasks import Kind, Origin, Task
from flowcache.bench.worker import Worker, longest_first
from flowcache.errors import UserError
from flowcache.runtime.cluster import MAX_RETRIES, Cluster
from flowcache.runtime.ending import check_stopped

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Between two looks whether the command has to end."""


class Sampler:
    """A process of the cluster, with a GPU of its own where there is one."""

    def __init__(self, out: Path, origins: Mapping[Kind, Origin], device: str) -> None:
        """Load nothing yet.

        Args:
            out: output folder, which every machine sees under this name.
            origins: what the videos of each kind are made from.
        """
        renderer = Renderer(device, origins=dict(origins))
        self.worker = Worker(out, renderer.render, origins)

    def make(self, task: Task) -> str | None:
        """Make a video; return why it failed."""
        return self.worker.make(task)


def run(
    worker: Worker, tasks: Sequence[Task], costs: Mapping[Kind, float], cluster: Cluster
) -> dict[str, str]:
    """Make videos, the most expensive first.

    Args:
        worker: of this process, which makes nothing itself.

    Returns: for each failed task, by its label, why it failed.
    """
    ray = cluster.ray
    order = longest_first([costs[task.kind] for task in tasks])
    waiting = [tasks[index] for index in reversed(order)]
    actor = ray.remote(max_restarts=-1, max_task_retries=MAX_RETRIES, **cluster.resources)(Sampler)
    device = "cuda:0" if cluster.resources["num_gpus"] else "cpu"  # Ray shows each actor its own
    given = (worker.out.resolve(), dict(worker.origins), device)
    free = [actor.remote(*given) for _ in range(min(cluster.num_replicas, len(tasks)))]
    at_work: dict[Any, tuple[Any, Task]] = {}
    failures: dict[str, str] = {}
    while waiting or at_work:
        check_stopped()
        while waiting and free:
            task, sampler = waiting.pop(), free.pop()
            at_work[sampler.make.remote(task)] = sampler, task
        ended, _ = ray.wait([*at_work], num_returns=1, timeout=POLL_SECONDS)
        for reference in ended:
            sampler, task = at_work.pop(reference)
            free.append(sampler)
            reason = _result(ray, reference, worker, task)
            if reason is not None:
                failures[task.label] = reason
            num_ended = len(tasks) - len(waiting) - len(at_work)
            logger.info("%d of %d: %s", num_ended, len(tasks), task.label)
    return failures


def _result(ray: Any, reference: Any, worker: Worker, task: Task) -> str | None:
    """Return why a video failed; what ends the whole run, as a full disk, is raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError:
        times = MAX_RETRIES + 1
        return worker.record(
            task, UserError(f"the process that made it died {times} times: look at its memory")
        )
