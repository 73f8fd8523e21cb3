"""Make videos one after the other with models that are loaded once."""

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flowcache.bench.protocol import contradiction
from flowcache.bench.tasks import Kind, Origin, Task, sha256_of, sketch_of
from flowcache.errors import UserError
from flowcache.runtime.cli import choose_device
from flowcache.runtime.config import to_dict
from flowcache.runtime.model import Job, Request, load_model
from flowcache.runtime.run import KeptNetworks, encode_inputs, prepare, render
from flowcache.runtime.stats import RunStats

OWN_KEYS = frozenset({"prompt", "seed", "image", "video"})
"""Settings in which the videos of a kind differ; a task names them itself."""
SETTINGS, CHECKPOINT = "resolved_settings", "checkpoint"
"""Parts of an origin, as messages name them."""
GPU_FIELDS = (
    *("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem"),
    *("temperature.gpu", "power.limit"),
)
TIMEOUT_SECONDS = 20


@dataclass
class Renderer:
    """Makes videos of any model on one device."""

    device: str
    """As the setting `device`; settings of a task come after it."""
    networks: KeptNetworks = field(default_factory=KeptNetworks)
    origins: dict[Kind, Origin] = field(default_factory=dict)
    costs: dict[Kind, float] = field(default_factory=dict)
    """FLOPs of a video by its plan; reuse saves about the same share of each."""
    _hashes: dict[Hashable, str] = field(default_factory=dict)

    def check(self, task: Task, *, pins: Mapping[str, Any] | None = None) -> Origin:
        """Check the settings of a task without its prompt, and load nothing.

        Args:
            pins: what a protocol says that settings come to.

        Returns: hashes of all settings, those of the preset included, and of the checkpoint.
        """
        choose_device(self.device)
        plain = Task("check", task.family, task.model, task.preset, "-", 0, task.settings)
        with tempfile.TemporaryDirectory() as folder:
            job = self._prepare(plain, Path(folder))
        wrong = contradiction(pins or {}, to_dict(job.config))
        if wrong is not None:
            raise UserError(
                f"preset {task.preset} with model {task.model}: {wrong} by the protocol: undo what "
                "changed it, or write a protocol of your own"
            )
        origin = {SETTINGS: hash_settings(job), **self._hashes_of(job)}
        self.origins[task.kind] = origin
        self.costs[task.kind] = job.work.flops
        return origin

    def _hashes_of(self, job: Job) -> dict[str, str]:
        """Return a hash of each part of the model; little of large files is read, and once."""
        model, identity = job.model, job.model.identity(job)
        found = {
            CHECKPOINT: self._once((model.name, identity), lambda: model.fingerprint(job.source))
        }
        for name, ingredient in model.ingredients(job).items():
            if isinstance(ingredient, Path):
                found[name] = self._once(ingredient, partial(sketch_of, ingredient))
            else:
                found[name] = hash_tensors(ingredient)
        return found

    def _once(self, key: Hashable, make: Callable[[], str]) -> str:
        if key not in self._hashes:
            self._hashes[key] = make()
        return self._hashes[key]

    def render(self, task: Task, folder: Path) -> dict[str, Any]:
        """Make one video in a folder; return what its JSON holds."""
        job = self._prepare(task, folder)
        origin = self.origins.get(task.kind)
        # a clip to continue may turn the video upright: then the settings differ anyway
        if origin and task.video is None and hash_settings(job) != origin[SETTINGS]:
            raise UserError(
                f"preset {task.preset} has changed since the start: undo that, or choose another "
                "output folder"
            )
        kept = self.networks.load(job)
        stats = RunStats(job.device)
        inputs = encode_inputs(job, stats=stats, encoder=kept.encoder)
        # evaluations want the new frames; what is left unfinished is made again as a whole
        job = replace(job, before=None, keeps_partial=False)
        report = render(job, kept.networks, inputs, stats=stats)
        return {**report, "kv_cache_bytes": job.work.kv_bytes, "gpus": describe_gpus()}

    def _prepare(self, task: Task, folder: Path) -> Job:
        model = load_model(task.family)
        settings = [
            f"device={self.device}",
            *task.settings,
            f"prompt={task.prompt}",
            f"{model.keys['seed']}={task.seed}",
        ]
        if task.video is not None:
            settings.append(f"video={task.video}")
        out = str(folder / f"{task.name}.mp4")
        return prepare(model, Request(task.preset, task.model, settings, out))


def hash_settings(job: Job) -> str:
    """Return a hash of what the videos of a kind share, wherever their files are.

    A profile counts by what it says.
    """
    ignored, rule = OWN_KEYS | {"device", *job.model.places}, job.config.reuse

    def kept(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            key: kept(value) if isinstance(value, dict) else value
            for key, value in settings.items()
            if key not in ignored
        }

    shared = kept(to_dict(job.config))
    shared["dtype"] = str(job.dtype)
    shared["reuse"]["profile"] = sha256_of(Path(rule.profile)) if rule.needs_profile else None
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a hash of the values of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


def describe_gpus() -> list[dict[str, str]]:
    """Return the fields of each GPU with their units; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = run.stdout.splitlines() if run.returncode == 0 else []
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    return [dict(zip(GPU_FIELDS, row, strict=True)) for row in cells if len(row) == len(GPU_FIELDS)]
