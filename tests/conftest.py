"""What holds for every test: one thread, no network, GPU tests only where there is a GPU."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Before any test imports a hub client: a test that would download fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Keep tiny models from spending their time on handing work between threads."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


RunInRanks = Callable[..., None]
"""`(script, *arguments, num) -> None`"""


@pytest.fixture(scope="session")
def run_in_ranks() -> RunInRanks:
    """Return what runs a script in several processes that can meet, and waits for them."""

    def run(script: Path, *arguments: str, num: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env=os.environ
                | shared
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(num)
        ]
        told = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * num, "\n".join(told)

    return run
