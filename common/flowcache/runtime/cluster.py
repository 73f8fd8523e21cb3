"""Several replicas of a model on several GPUs or machines by Ray, an optional package.

Without RAY_ADDRESS a cluster of this machine alone is started, which ends with the command and
listens on the loopback interface only. Ray's usage statistics are off.
"""

import importlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flowcache.errors import UserError, first_line

ADDRESS = "RAY_ADDRESS"
"""Variable that names a running cluster, as Ray itself reads it."""
MAX_RETRIES = 2
"""Of a video whose replica died: after so many it is the video's own fault."""
MAX_REPLICAS = 10_000
ANSWER_SECONDS = 10.0
OBJECT_STORE_BYTES = 10**8
"""Only messages go through Ray's memory; videos are files."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    ray: Any
    """The module."""
    num_replicas: int
    resources: Mapping[str, int]
    """What Ray reserves for each replica."""
    is_own: bool
    """Whether it ends with this command."""


def check_replicas(num_replicas: int | None, *, is_wanted: bool) -> None:
    """Check what the command line says of replicas, and that Ray is there if it is wanted."""
    if not is_wanted:
        if num_replicas is not None:
            raise UserError("--replicas is how many models --ray loads: give --ray, too")
        return
    if num_replicas is not None and not 1 <= num_replicas <= MAX_REPLICAS:
        raise UserError(f"--replicas must be 1 to {MAX_REPLICAS}, not {num_replicas}")
    import_ray()


def import_ray(module: str = "ray") -> Any:
    """Return a module of Ray."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if ADDRESS not in os.environ:  # Ray reads it when it is imported
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # no other machine: loopback only
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install 'flowcache[ray]', or in the repository "
            "pip install -e '.[ray]'"
        ) from None


@contextmanager
def cluster(num_replicas: int | None) -> Generator[Cluster, None, None]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine.

    Args:
        num_replicas: None: one per GPU of the cluster; without GPUs one.
    """
    ray = import_ray()
    given: dict[str, Any] = {"address": os.environ.get(ADDRESS, "local")}
    is_own = given["address"] == "local"
    if not is_own:
        _check_address(given["address"])
    else:
        given["num_cpus"] = max(num_replicas or 1, os.cpu_count() or 1)
        given["include_dashboard"] = False
        given["object_store_memory"] = OBJECT_STORE_BYTES
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**given, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"Ray does not start or answer: {first_line(error)}") from None
    finally:
        if is_main:  # Ray takes the signal for itself
            signal.signal(signal.SIGTERM, handler)
    try:
        yield _chosen(ray, num_replicas, is_own=is_own)
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Check that a cluster listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        if address != "auto":  # one of this machine, which Ray finds
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError):
        raise UserError(
            f"{ADDRESS}={address}: no cluster of Ray listens there: give HOST:PORT as ray start "
            "prints it, or unset it"
        ) from None


def _chosen(ray: Any, num_replicas: int | None, *, is_own: bool) -> Cluster:
    """Return how many replicas the cluster gets, and what each takes."""
    resources: Mapping[str, float] = ray.cluster_resources()
    num_gpus, num_cpus = (int(resources.get(name, 0)) for name in ("GPU", "CPU"))
    most, noun = (num_gpus, "GPUs") if num_gpus else (num_cpus, "cores")
    if num_replicas is not None and num_replicas > most:
        raise UserError(f"--replicas {num_replicas} is above the {most} {noun} of the cluster")
    reserved = {"num_cpus": 1, "num_gpus": int(num_gpus > 0)}
    return Cluster(ray, num_replicas or max(num_gpus, 1), reserved, is_own)
