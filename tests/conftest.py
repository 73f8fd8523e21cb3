"""What holds for every test: few threads, no network, GPU tests only where there is a GPU.

And what the tests of both models share: short runs, a picture, copies of the launchers.
"""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowcache.runtime.model import Request, VideoModel
from flowcache.runtime.parallel import Group, Ranks
from flowcache.runtime.record import read_record
from flowcache.runtime.run import prepare, run
from flowcache.runtime.video import read_video

# Before any test imports a hub client: a test that would download fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"


NUM_THREADS = os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Tiny models would spend their time on handing work between threads."""


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    torch.set_num_threads(int(NUM_THREADS))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread what another process computes again bit for bit.

    Sums are added up in parts, one per thread, and a process that sets no number takes another one.
    """
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(int(NUM_THREADS))


def pytest_report_header() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}: {capability}, threads: {NUM_THREADS}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=12, help="how often test_kills.py kills (12)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


QUANTIZE = Path(sys.prefix) / "quantize"
"""Where scripts/test.sh puts torchao."""


@pytest.fixture(scope="session")
def lent_modules() -> dict[str, ModuleType]:
    """Return torchao's modules by name, once they were imported: a process can do that once."""
    return {}


@pytest.fixture
def torchao(lent_modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lend torchao to one test: the libraries that look for it must not find it in the others."""
    if "torchao" in sys.modules:
        yield
        return
    monkeypatch.syspath_prepend(QUANTIZE)
    sys.modules.update(lent_modules)
    try:
        importlib.import_module("torchao.quantization")
        yield
    except ImportError as error:
        pytest.skip(f"torchao is missing, which scripts/test.sh puts into {QUANTIZE}: {error}")
    finally:
        own = [name for name in sys.modules if name.partition(".")[0] == "torchao"]
        lent_modules.update({name: sys.modules.pop(name) for name in own})


RunInRanks = Callable[..., None]
"""`(script, *arguments, num) -> None`"""


@pytest.fixture(scope="session")
def run_in_ranks() -> RunInRanks:
    """Return what runs a script in several processes that can meet, and waits for them."""

    def run(script: Path, *arguments: str, num: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
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
        errors = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * num, "\n".join(errors)

    return run


@pytest.fixture(scope="session")
def same_record() -> Callable[[Path, Path], None]:
    """Return what checks that two videos' records and reports are equal up to times and rounding.

    Nobody's times are compared, but that there are some.
    """
    close, clocked = ("distance", "accumulated"), ("seconds",)

    def of(video: Path) -> tuple[dict[str, Any], list[float]]:
        record = read_record(video.with_suffix(".record.json"))
        stats = json.loads(video.with_suffix(".json").read_text())["stats"]
        rows: dict[str, Any] = {
            name: [
                {key: value if key not in close + clocked else value is None for key, value in row}
                for row in map(dict.items, record[name])
            ]
            for name in ("decisions", "ticks")
        }
        rows["kv"] = [{**row, "tokens": [*row["tokens"]]} for row in record["kv"]]
        rows["passes"], rows["flops"] = stats["passes"], stats["flops"]
        values = [row[key] for row in record["decisions"] for key in close]
        values += [count for row in record["kv"] for count in row["tokens"].values()]
        return rows, [value for value in values if value is not None]

    def check(video: Path, other: Path) -> None:
        (rows, values), (other_rows, other_values) = of(video), of(other)
        assert rows == other_rows
        # ratios of float32 sums over a whole latent, a thousand of their last bits
        assert values == pytest.approx(other_values, rel=1e-4)

    return check


@dataclass(frozen=True)
class LoneShare(Ranks):
    """One of several processes whose exchanges bring nothing from the others."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(scope="session")
def lone_shares() -> Callable[[int], list[Ranks]]:
    """Return what makes the processes of a divided work; their results are to be added."""

    def make(num: int) -> list[Ranks]:
        return [LoneShare(sequence=Group(share, num)) for share in range(num)]

    return make


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SkyReels-V2 checkpoint."""
    from tiny_skyreels_v2 import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture(scope="session")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random distilled MAGI-1 checkpoint."""
    from tiny_magi1 import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "distilled")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MAGI-1 base checkpoint, which needs three passes."""
    from tiny_magi1 import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base", is_base=True)


@pytest.fixture(scope="session")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Self-Forcing checkpoint in upstream's layout."""
    from tiny_self_forcing import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "replica")


@dataclass(frozen=True)
class Made:
    """A finished run."""

    job: Any
    report: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.job.path.with_name(self.report["video"])

    @property
    def frames(self) -> np.ndarray:
        return read_video(self.path)[0]

    def check_costs(self) -> None:
        """Check that the plan said what the run then did."""
        stats, work = self.report["stats"], self.job.work
        assert stats["flops"]["without_reuse"] == work.flops
        assert len({(row[0], row[1]) for row in stats["decisions"]["rows"]}) == work.num_ticks


@pytest.fixture
def maker(tmp_path: Path) -> Callable[[VideoModel, Path], Callable[..., Made]]:
    """Return what gives a model's `make`, of the checkpoint it uses."""

    def make_with(video_model: VideoModel, checkpoint: Path) -> Callable[..., Made]:
        def make_video(*settings: str, preset: str = "vanilla", model: Path = checkpoint) -> Made:
            """Make a video in a fresh folder from settings given as `key=value`."""
            job = prepare(
                video_model,
                Request(
                    preset=preset,
                    model=str(model),
                    overrides=["prompt=a red circle moving right", *settings],
                    out=str(tmp_path / "videos"),
                ),
            )
            return Made(job, run(job))

        return make_video

    return make_with


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A landscape image with a gradient, of another aspect than the videos."""
    path = tmp_path / "picture.png"
    rows = np.linspace(0, 255, 40, dtype=np.uint8)[:, None, None]
    Image.fromarray(np.broadcast_to(rows, (40, 50, 3)).copy()).save(path)
    return path


@dataclass(frozen=True)
class Launchers:
    """A copy of a model's bash launchers in a path with blanks; its set-up enters `tools`."""

    folder: Path
    pattern: str
    """Where a launcher lies in the folder, as `run_{}.sh`."""
    package: str
    variables: tuple[str, ...]
    """What the launchers read of the environment."""
    tools: Path

    def run(
        self, name: str, *arguments: str, cwd: Path, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a launcher with only the given ones of its variables."""
        clean = {key: value for key, value in os.environ.items() if key not in self.variables}
        return subprocess.run(
            ["bash", str(self.folder / self.pattern.format(name)), *arguments],
            cwd=cwd,
            env=clean | variables | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    def use_python(self, script: str) -> None:
        """Put a script in place of the environment's Python."""
        path = self.tools / "python"
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    def handed_on(self, name: str, *arguments: str, **variables: str) -> list[str]:
        """Run a launcher from elsewhere and return what it hands to the model's command line."""
        kept = self.tools.parent / "arguments"
        self.use_python(f'printf "%s\\0" "$@" > "{kept}"')
        done = self.run(name, *arguments, cwd=self.tools.parent, **variables)
        assert done.returncode == 0, done.stderr
        handed = kept.read_text().removesuffix("\0").split("\0")
        assert handed[:2] == ["-m", self.package]
        return handed[2:]


@pytest.fixture
def copy_launchers(tmp_path: Path) -> Callable[..., Launchers]:
    """Return what copies files and folders of a model with its launchers."""

    def copy(
        source: Path,
        names: Iterable[str],
        *,
        pattern: str,
        package: str,
        variables: tuple[str, ...],
    ) -> Launchers:
        folder = tmp_path / "a copy" / "model"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            transfer = shutil.copytree if (source / name).is_dir() else shutil.copy
            transfer(source / name, folder / name)
        tools = tmp_path / "bin"
        tools.mkdir()
        setup = folder.parent / "scripts" / "setup.sh"
        setup.parent.mkdir()
        setup.write_text(f'export PATH="{tools}:$PATH"\n')
        return Launchers(folder, pattern, package, variables, tools)

    return copy


@pytest.fixture
def make_dit() -> Callable[..., Any]:
    """Return what builds a tiny Wan transformer: `(seed=0, **changes of its config)`."""
    from flowcache.wan.dit import DiT, DiTConfig

    def make(seed: int = 0, **changes: Any) -> DiT:
        tiny: dict[str, Any] = {
            "dim": 32,
            "ffn_dim": 48,
            "freq_dim": 16,
            "num_heads": 2,
            "num_layers": 2,
            "text_dim": 12,
            "text_len": 5,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return DiT(DiTConfig(**tiny | changes)).eval()

    return make
