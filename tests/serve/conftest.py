"""A service with the demo of SkyReels-V2 in this process, and as a process of its own."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import flowcache
from flowcache.api import Pipeline
from flowcache.serve.app import make_app
from flowcache.serve.jobs import Jobs

START_SECONDS = 600


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    return flowcache.load("demo", progress_bar=False, device="cpu", num_frames=33, num_steps=8)


@pytest.fixture
def start(pipe: Pipeline, tmp_path: Path) -> Iterator[Callable[..., Jobs]]:
    """Return what starts the queue of a service, each time in the same folder."""
    started: list[Jobs] = []

    def make(*, max_waiting: int = 64, max_bytes: int = 10**9) -> Jobs:
        started.append(Jobs(pipe, tmp_path / "jobs", max_waiting=max_waiting, max_bytes=max_bytes))
        return started[-1]

    yield make
    for jobs in started:
        jobs.close()


@pytest.fixture
def client_of() -> Callable[..., TestClient]:
    def make(jobs: Jobs, *, token: str | None = None, max_upload_bytes: int = 10**6) -> TestClient:
        app = make_app(jobs, max_upload_bytes=max_upload_bytes, token=token)
        return TestClient(app, base_url="http://127.0.0.1")

    return make


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return what starts `python -m flowcache.serve` and returns its address."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "flowcache.serve", "--model", "demo", "device=cpu"]
        command += ["--port", str(port), "--folder", str(tmp_path / "jobs"), *arguments]
        said = tmp_path / "said"
        with said.open("w") as file:  # a pipe that nobody reads would stop the service
            process = subprocess.Popen(command, stderr=file)
        processes.append(process)
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert process.poll() is None, said.read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                return address
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise TimeoutError(f"no answer at {address}")

    yield run
    for process in processes:
        process.terminate()
        process.wait(60)
