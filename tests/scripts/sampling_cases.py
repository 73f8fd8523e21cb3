"""What the tests of sampling and tables share: small tasks, workers, protocols, data sets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flowcache.bench.tasks import Task
from flowcache.runtime.video import VideoWriter

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts"
FOLDERS = {
    "skyreels_v2": REPOSITORY / "FlowCache4SkyReels-V2",
    "magi1": REPOSITORY / "FlowCache4MAGI-1",
}
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
from flowcache.bench.worker import Worker, divide

def render(task, folder):
    path = folder / f"{{task.name}}.mp4"
    with path.open("wb", buffering=0) as stream:
        for part in range(10):
            stream.write(f"{{task.name}} {{part}} ".encode() * (1 + task.seed) * {repeat})
            time.sleep({pause})
    return {{"video": path.name, "maker": str(time.time_ns())}}

limit = {limit}
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
family = ("skyreels_v2", "demo", "vanilla", "-")
tasks = [Task(f"{{n:02d}}", *family, n, folder="a") for n in range(12)]
rank, size = map(int, sys.argv[2:])
share = divide([1] * len(tasks), size)[rank]
try:
    failures = Worker(Path(sys.argv[1]), render).run(tasks[index] for index in share)
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
    "prompts": list(PROMPTS),
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


def drive(
    out: Path,
    *,
    rank: int = 0,
    size: int = 1,
    pause: float = 0.0,
    repeat: int = 20,
    limit: int = 0,
):
    """Start a process that makes its share of twelve files, each larger than the one before."""
    code = DRIVER.format(pause=pause, repeat=repeat, limit=limit)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out), str(rank), str(size)],
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


def make_task(name: str, **changes: Any) -> Task:
    given = {"family": "skyreels_v2", "model": "demo", "preset": "vanilla", "prompt": "-"}
    return Task(name, **{**given, "seed": 0, **changes})


def make_file(task: Task, folder: Path) -> dict[str, Any]:
    (folder / f"{task.name}.mp4").write_bytes(task.name.encode())
    return {"video": f"{task.name}.mp4"}


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
            writer.append(np.zeros((num_frames, 64, 64, 3), "uint8"))
    (folder / "descriptions.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_protocol(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(PROTOCOL | changes))
    return path
