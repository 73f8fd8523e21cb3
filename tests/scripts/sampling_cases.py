"""What the tests of sampling and tables share: small tasks, workers, protocols, data sets."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from flowcache.runtime.video import VideoWriter

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts"
FOLDERS = {
    "skyreels_v2": REPOSITORY / "FlowCache4SkyReels-V2",
    "magi1": REPOSITORY / "FlowCache4MAGI-1",
}
PROTOCOLS = sorted((SCRIPTS / "protocols").glob("*.yaml"))
SIZES = {"skyreels_v2": "df-1.3b-540p", "magi1": "4.5B_distill"}
"""Family -> a released model whose sizes are known without its files."""
SHORT = (
    *("num_frames=9", "base_num_frames=9", "overlap_history=null", "num_steps=2"),
    *("reuse.warmup_steps=1", "causal_block_size=3"),
)
"""Settings of a video that the demo makes in a second."""
PROMPTS = ("a red circle moving right on a black background", "a blue square moving up")

# Makes small files slowly, with nothing but the sampler itself: no model, no PyTorch.
DRIVER = """
import resource, sys, time
from pathlib import Path
from flowcache.errors import UserError
from flowcache.bench.tasks import Task
from flowcache.bench.worker import Worker

def render(task, folder):
    path = folder / f"{{task.name}}.mp4"
    with path.open("wb", buffering=0) as stream:
        for part in range(10):
            stream.write(f"{{task.name}} {{part}} ".encode() * {repeat})
            time.sleep({pause})
    return {{"video": path.name, "maker": str(time.time_ns())}}

limit = {limit}
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
family = ("skyreels_v2", "demo", "vanilla", "-")
tasks = [Task(f"{{n:02d}}", *family, n, folder="a") for n in range(12)]
worker = Worker(tasks, Path(sys.argv[1]), render, poll_seconds=0.01)
try:
    failures = worker.run(first=int(sys.argv[2]))
except UserError as error:
    sys.stderr.write(f"error: {{error}}\\n")
    sys.exit(2)
sys.exit(1 if failures else 0)
"""

PROTOCOL: dict[str, Any] = {
    "title": "A small table",
    "family": "skyreels_v2",
    "model": "demo",
    "codec_quality": 8,
    "reference": "vanilla",
    "published_setting": "another model",
    "seeds": [3],
    "prompts": ["a red circle moving right on a black background", "a blue square moving up"],
    "settings": [
        *("num_frames=9", "base_num_frames=9", "overlap_history=null", "num_steps=6"),
        *("reuse.warmup_steps=1", "causal_block_size=3", "ar_step=1"),
    ],
    "pinned": {"guidance": 4.0, "reuse.policy": "vanilla", "reuse.rescale": "none"},
    "methods": [
        {
            "name": "Vanilla",
            "folder": "vanilla",
            "preset": "vanilla",
            "published": {"pflops": 113, "vbench": 83.84},
        },
        {
            "name": "every 2nd",
            "folder": "half",
            "preset": "stride",
            "settings": ["reuse.every=2"],
            "pinned": {"reuse.policy": "stride", "attention": "causal"},
            "published": {"pflops": 28, "psnr": 22.95},
        },
        {
            "name": "the same | again",
            "folder": "vanilla",
            "preset": "vanilla",
            "part": "ingredient",
        },
    ],
}


def drive(out: Path, *, first: int = 0, pause: float = 0.0, repeat: int = 20, limit: int = 0):
    """Start a process that makes twelve files."""
    code = DRIVER.format(pause=pause, repeat=repeat, limit=limit)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out), str(first)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "common")},
    )


def videos(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.mp4"))}


def receipts(out: Path) -> dict[str, Any]:
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted(out.rglob("*.json"))
        if not path.name.endswith(".error.json")
    }


def make_task(name: str, **changes: Any) -> Any:
    tasks = importlib.import_module("flowcache.bench.tasks")
    return tasks.Task(name, "skyreels_v2", "demo", "vanilla", "-", 0, **changes)


def make_file(task: Any, folder: Path) -> dict[str, Any]:
    (folder / f"{task.name}.mp4").write_bytes(task.name.encode())
    return {"video": f"{task.name}.mp4"}


def make_worker(tasks: list[Any], out: Path, render: Any = make_file, **changes: Any) -> Any:
    worker = importlib.import_module("flowcache.bench.worker")
    return worker.Worker(tasks, out, render, poll_seconds=0.01, **changes)


def write_vbench(folder: Path) -> Path:
    place = folder / "prompts_per_dimension"
    place.mkdir(parents=True)
    (place / "color.txt").write_text("a red bird\na white cat\n")
    (place / "scene.txt").write_text("a white cat\nan alley\n\n")
    return folder


def write_physics_iq(folder: Path, *, num_frames: int = 12) -> Path:
    clips = folder / "split-videos" / "conditioning" / "24FPS"
    clips.mkdir(parents=True)
    rows = ["scenario,description,category,generated_video_name"]
    for number, view in ((1, "left"), (2, "right")):
        name = f"{number:04d}_perspective-{view}_trimmed-ball.mp4"
        rows.append(f'{number:04d}_take-1,"A ball, {view}.",Solid Mechanics,{name}')
        path = clips / f"{number:04d}_conditioning-videos_24FPS_perspective-{view}.mp4"
        with VideoWriter(path, fps=24, size=(64, 64)) as writer:
            writer.append(importlib.import_module("numpy").zeros((num_frames, 64, 64, 3), "uint8"))
    (folder / "descriptions.csv").write_text("\n".join(rows) + "\n")
    return folder


def list_tasks(sample: ModuleType, *arguments: str) -> list[Any]:
    return sample.list_tasks(sample.make_parser().parse_intermixed_args([*arguments, "--out", "o"]))


def demo(prompts: Path, out: Path) -> list[str]:
    return [
        *("skyreels_v2", "--model", "demo", "--preset", "flowcache_fast"),
        *("--prompts", str(prompts), "--out", str(out), *SHORT),
    ]


def launch_two(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_processes", "2", "--num_machines", "1", "--main_process_port", "29533"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *(str(SCRIPTS / "sample.py"), *arguments),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def write_protocol(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(PROTOCOL | changes))
    return path


def make_table(protocol: Path, out: Path) -> tuple[int, int]:
    """Make videos and table; return both exit codes."""
    arguments = ["--protocol", str(protocol), "--out", str(out)]
    made = importlib.import_module("sample").main(arguments)
    return made, importlib.import_module("reproduce").main(arguments)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "table.json").read_text())


def timeless(folder: Path) -> list[dict[str, Any]]:
    return importlib.import_module("flowcache.bench.table").without_times(report_of(folder)["rows"])


def verify(
    reproduce: ModuleType, folder: Path, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    code = reproduce.main(["--verify", str(folder / "out")])
    return code, capfd.readouterr().err
