"""Models of the hub: the local copy, else a download that is announced, else one line.

A pretended hub is passed in; in the last tests the real client talks to a server of this machine.
"""

import hashlib
import http.server
import importlib
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from flowcache.errors import UserError
from flowcache.runtime.hub import Hub, Missing, fetch, find_missing, local_copy

REPOSITORY = "someone/model"
httpx: Any = importlib.import_module(HTTPError.__module__.partition(".")[0])
"""The network library of the hub's client; its name depends on the version."""


def info_of(**sizes: int) -> Any:
    """Return what the hub says of a repository with files of some sizes."""
    files = [SimpleNamespace(rfilename=f"{name}.bin", size=size) for name, size in sizes.items()]
    return lambda _repository, **_options: SimpleNamespace(sha="0" * 40, siblings=files)


class Snapshots:
    """A pretended `snapshot_download`: what is on the disk, and what was asked for."""

    def __init__(self, folder: Path, *, is_local: bool = False) -> None:
        self.folder, self.is_local = folder, is_local
        self.downloads = 0

    def __call__(self, repository: str, *, local_files_only: bool = False, **_: Any) -> str:
        assert repository == REPOSITORY
        if local_files_only and not self.is_local:
            raise LocalEntryNotFoundError("not there")
        self.downloads += not local_files_only
        return str(self.folder)


def always(_folder: Path) -> bool:
    return True


def test_a_whole_local_copy_is_used_and_the_hub_is_not_asked(tmp_path: Path):
    def ask(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    snapshots = Snapshots(tmp_path, is_local=True)
    assert fetch(REPOSITORY, is_whole=always, hub=Hub(ask, snapshots)) == tmp_path
    assert snapshots.downloads == 0


@pytest.mark.parametrize("is_local", [True, False])
def test_what_is_downloaded_is_announced_with_size_and_place(
    tmp_path: Path, is_local: bool, caplog: pytest.LogCaptureFixture
):
    snapshots = Snapshots(tmp_path, is_local=is_local)  # a copy, but not a whole one; or none
    hub = Hub(info_of(a=3_000_000, b=4_000_000), snapshots)
    with caplog.at_level(logging.INFO):
        folder = fetch(REPOSITORY, is_whole=lambda _folder: False, hub=hub)
    assert (folder, snapshots.downloads) == (tmp_path, 1)
    (line,) = caplog.messages
    start = f"downloading  someone/model, 2 files, 7 MB, to {constants.HF_HUB_CACHE} ("
    assert line.startswith(start)
    assert line.endswith("B free)")


def test_only_wanted_files_count(tmp_path: Path):
    hub = Hub(info_of(a=3, b=4, c=5), Snapshots(tmp_path))
    missing = find_missing(REPOSITORY, patterns=["a*", "c*"], hub=hub)
    assert (missing.num_files, missing.num_bytes) == (2, 8)


def test_a_disk_without_room_is_refused_before_the_download(tmp_path: Path):
    snapshots = Snapshots(tmp_path)
    with pytest.raises(UserError, match=r"1 EB are to be downloaded, but .* free: set HF_H"):
        fetch(REPOSITORY, is_whole=always, hub=Hub(info_of(a=10**18), snapshots))
    assert snapshots.downloads == 0
    assert Missing(REPOSITORY, 1, 1, tmp_path / "not" / "there").free_bytes > 0


def refusal(kind: type[Exception]) -> Exception:
    response = httpx.Response(403, request=httpx.Request("GET", "http://hub"))
    return kind("a\nb", response=response)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(GatedRepoError), "asks every user to accept terms"),
        (refusal(RepositoryNotFoundError), "the hub has no such model, or a private one"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE forbids a download"),
        (httpx.ConnectError("refused\nmore"), r"not to be had from the hub \(refused\): check"),
        (httpx.ReadTimeout("slow"), r"not to be had from the hub \(slow\)"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("transfer"), r"not to be had from the hub \(transfer\)"),
        (ValueError("name"), r"not to be had from the hub \(name\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("where", ["listing", "download"])
def test_what_the_hub_refuses_is_one_line(error: Exception, message: str, where: str):
    def fail(*_: Any, local_files_only: bool = False, **__: Any) -> None:
        raise LocalEntryNotFoundError("not there") if local_files_only else error

    hub = Hub(fail if where == "listing" else info_of(a=1), fail)
    with pytest.raises(UserError, match=message) as refused:
        fetch(REPOSITORY, is_whole=always, hub=hub)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("someone/model: no local copy, and ")


def test_a_name_that_no_hub_has_is_one_line():
    with pytest.raises(UserError, match="not to be had from the hub"):
        local_copy("a--b/..", is_whole=always)


# A server with the protocol of the hub ------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves repositories of small files.

    The file `cut` is sent by half only, until the sizes of its repository were asked three times:
    for a dry run, for the run that fails, and for the next one.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]], *, cut: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.cut = repositories, cut
        self.sent: list[str] = []
        self.num_asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        for name, files in self.server.repositories.items():
            if path.startswith(f"/api/models/{name}"):
                self.server.num_asked += self.server.cut in files and "blobs=" in self.path
                return self.send_json(name, files, is_tree="/tree/" in path)
            if found := re.fullmatch(rf"/{name}/resolve/[^/]+/(.+)", path):
                return self.send_file(found[1], files[found[1]], with_body=with_body)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def send_json(self, name: str, files: dict[str, bytes], *, is_tree: bool) -> None:
        tree = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
        info = {"id": name, "modelId": name, "sha": "1" * 40, "siblings": siblings}
        body = json.dumps(tree if is_tree else info).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, path: str, data: bytes, *, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        if with_body:
            is_cut = path == self.server.cut and self.server.num_asked < 3
            self.server.sent.append(path)
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
            self.close_connection = is_cut


def serve(server: Server) -> Iterator[Server]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
AUTO = """
import sys
import torch
torch.cuda.is_available = lambda: True  # this machine pretends to have a CUDA device
from magi1.__main__ import main as magi1
from skyreels_v2.__main__ import main as skyreels_v2
mains = {{"magi1": magi1, "skyreels_v2": skyreels_v2}}
codes = []
for package, *arguments in {runs!r}:
    sys.stderr.write("RUN\\n")
    sys.stderr.flush()
    given = ["--model", "auto", "--prompt", "a red circle", "device=cpu", *arguments]
    codes.append(mains[package](given))
print(codes)
"""


def files_of(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {
        prefix + path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_auto(tmp_path: Path, server: Server, *runs: list[str]) -> tuple[list[int], list[str]]:
    """Run command lines (package, arguments) with MODEL=auto; return codes and what was told."""
    script = tmp_path / "auto.py"
    script.write_text(AUTO.format(runs=runs))
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hub"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr.split("RUN\n")[1:]


SKYREELS = REPOSITORY_ROOT / "FlowCache4SkyReels-V2"
MAGI = REPOSITORY_ROOT / "FlowCache4MAGI-1"
SKYREELS_ID = "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers"


def skyreels_files() -> dict[str, bytes]:
    return files_of(SKYREELS / "demo")


def magi_files() -> dict[str, bytes]:
    """The demo's files where the release has its own."""
    demo = files_of(MAGI / "demo" / "ckpt", "ckpt/")
    return {path.replace("magi/distill", "magi/4.5B_distill"): data for path, data in demo.items()}


MAGI_SIZES = [
    f"{section}.{key}={value}".replace(" ", "")
    for section in ("model_config", "runtime_config")
    for key, value in json.loads((MAGI / "demo/distill_config.json").read_text())[section].items()
    if key not in ("load", "t5_pretrained", "vae_pretrained")
]


@pytest.mark.slow
def test_auto_downloads_once_where_there_is_cuda_in_both_models(tmp_path: Path):
    repositories = {SKYREELS_ID: skyreels_files(), "sand-ai/MAGI-1": magi_files()}
    cut = "transformer/diffusion_pytorch_model.safetensors"
    running = serve(Server(repositories, cut=cut))
    server = next(running)
    skyreels = ["skyreels_v2", "num_frames=17", "base_num_frames=17", "num_steps=1"]
    magi = ["magi1", *MAGI_SIZES, "runtime_config.num_frames=24", "runtime_config.num_steps=4"]
    to_file = {"skyreels_v2": ["--out", "s.mp4"], "magi1": ["--out", "m.mp4"]}
    dry = [[*run, "--dry-run"] for run in (skyreels, magi)]
    make = [[*run, *to_file[run[0]], "--overwrite"] for run in (skyreels, magi)]
    codes, told = run_auto(tmp_path, server, *dry, make[0], *make, *dry)
    assert codes == [0, 0, 2, 0, 0, 0, 0], told
    announced = [re.findall(r"downloading  (\S+), (\d+) files, .*B, to .*hub", t) for t in told]
    # of MAGI-1 one model of many
    wanted = {name: [f for f in files if "base/" not in f] for name, files in repositories.items()}
    num_files = {name: str(len(files)) for name, files in wanted.items()}
    (first,), (resumed,), (other,) = announced[2:5]
    assert first == (SKYREELS_ID, num_files[SKYREELS_ID])
    assert other == ("sand-ai/MAGI-1", num_files["sand-ai/MAGI-1"])
    # dry runs download nothing
    assert announced[:2] == announced[5:] == [[], []]
    # the hub ended in the middle of a file: told in one line, and what was whole is kept
    assert re.search(r"^error: .*no local copy, and not to be had from the hub", told[2], re.M)
    assert int(resumed[1]) < int(first[1])
    assert server.sent.count("model_index.json") == 1
    assert (tmp_path / "s.mp4").is_file()
    assert (tmp_path / "m.mp4").is_file()
    next(running, None)


def test_without_the_hub_auto_is_one_line_in_both_models(tmp_path: Path):
    server = Server({})
    server.server_close()  # nobody answers
    runs = [[name, *dry] for name in ("skyreels_v2", "magi1") for dry in ([], ["--dry-run"])]
    codes, told = run_auto(tmp_path, server, *runs)
    assert codes == [2, 2, 2, 2]
    for lines in told:
        (error,) = [line for line in lines.splitlines() if line.startswith("error: ")]
        assert "no local copy, and not to be had from the hub" in error
        assert "Traceback" not in lines
