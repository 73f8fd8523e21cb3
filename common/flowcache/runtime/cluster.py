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
"""Also of the GPUs of a replica."""
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


def check_replicas(
    num_replicas: int | None, *, is_wanted: bool, group_size: int | None = None
) -> None:
    """Check what the command line says of replicas, and that Ray is there if it is wanted."""
    for option, number, meaning in (
        ("--replicas", num_replicas, "how many models --ray loads"),
        ("--gpus-per-replica", group_size, "how many GPUs --ray gives to each model"),
    ):
        if number is None:
            continue
        if not is_wanted:
            raise UserError(f"{option} is {meaning}: give --ray, too")
        if not 1 <= number <= MAX_REPLICAS:
            raise UserError(f"{option} must be 1 to {MAX_REPLICAS}, not {number}")
    if is_wanted:
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
def cluster(num_replicas: int | None, *, group_size: int = 1) -> Generator[Cluster, None, None]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine.

    Args:
        num_replicas: None: as many as the cluster has GPUs for; without GPUs one.
        group_size: GPUs of a replica, all of one machine; without GPUs cores.
    """
    ray = import_ray()
    given: dict[str, Any] = {"address": os.environ.get(ADDRESS, "local")}
    is_own = given["address"] == "local"
    if not is_own:
        _check_address(given["address"])
    else:
        given["num_cpus"] = max((num_replicas or 1) * group_size, os.cpu_count() or 1)
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
        yield _chosen(ray, num_replicas, group_size, is_own=is_own)
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


def _chosen(ray: Any, num_replicas: int | None, group_size: int, *, is_own: bool) -> Cluster:
    """Return how many replicas the cluster gets, and what each takes."""
    machines: list[Mapping[str, float]] = [
        each["Resources"] for each in ray.nodes() if each["Alive"]
    ]
    has_gpus = any(each.get("GPU", 0) for each in machines)
    kind, noun = ("GPU", "GPUs") if has_gpus else ("CPU", "cores")
    found = [int(each.get(kind, 0)) for each in machines]
    most = sum(number // group_size for number in found)
    if not most:
        raise UserError(
            f"--gpus-per-replica {group_size} is above the {max(found, default=0)} {noun} that a "
            "machine of the cluster has"
        )
    if num_replicas is None and has_gpus and any(number % group_size for number in found):
        numbers = ", ".join(map(str, dict.fromkeys(found)))
        raise UserError(
            f"--gpus-per-replica {group_size} does not divide the {numbers} GPUs of a machine: "
            "give a number that does, or say by --replicas how many are to be used"
        )
    if num_replicas is not None and num_replicas > most:
        each = "" if group_size == 1 else f" of {group_size} {noun} each"
        raise UserError(
            f"--replicas {num_replicas}{each} is above the {sum(found)} {noun} of the cluster"
        )
    reserved = (
        {"num_cpus": 1, "num_gpus": group_size}
        if has_gpus
        else {
            "num_cpus": group_size,
            "num_gpus": 0,
        }
    )
    return Cluster(ray, num_replicas or (most if has_gpus else 1), reserved, is_own)
