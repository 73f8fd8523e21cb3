"""Make videos one after the other with models that are loaded once."""

import importlib
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowcache.cli import choose_device
from flowcache.stats import RunStats
from sampling.tasks import Task

SEED_KEYS = {"skyreels_v2": "seed", "magi1": "runtime_config.seed"}
"""Family -> its setting of the seed."""


@dataclass(frozen=True)
class _Loaded:
    identity: Hashable
    models: Any
    """Transformer and VAE, as the family's `load_models` returns them."""
    encoder: Any
    """The text encoder; None: it is loaded for every prompt, as with `offload`."""


@dataclass
class Renderer:
    """Makes videos on one device. Both families have functions of the same names in `run`."""

    device: str
    """As the setting `device`; settings of a task come after it."""
    loaded: _Loaded | None = None

    def check(self, task: Task) -> None:
        """Check the settings of a task without its prompt, and load nothing.

        Raises:
            UserError: something is wrong that would stop every task of its kind.
        """
        choose_device(self.device)
        plain = Task("check", task.family, task.model, task.preset, "-", 0, task.settings)
        with tempfile.TemporaryDirectory() as folder:
            self._prepare(plain, Path(folder))

    def render(self, task: Task, folder: Path) -> dict[str, Any]:
        """Make one video in a folder; return what its JSON holds.

        Raises:
            UserError: the task is not possible, or the video can't be written.
        """
        run = _module(task.family)
        job = self._prepare(task, folder)
        loaded = self._load(task, job)
        stats = RunStats(job.device)
        conditioning = run.encode_inputs(job, stats=stats, encoder=loaded.encoder)
        report = run.render(_only_new(task, job), loaded.models, conditioning, stats=stats)
        return {**report, "kv_cache_bytes": job.plan.kv_bytes}

    def _prepare(self, task: Task, folder: Path) -> Any:
        run = _module(task.family)
        settings = [
            f"device={self.device}",
            *task.settings,
            f"prompt={task.prompt}",
            f"{SEED_KEYS[task.family]}={task.seed}",
        ]
        if task.video is not None:
            settings.append(f"video={task.video}")
        out = str(folder / f"{task.name}.mp4")
        return run.prepare(run.Request(task.preset, task.model, settings, out))

    def _load(self, task: Task, job: Any) -> _Loaded:
        identity = _identity(task, job)
        if self.loaded is None or self.loaded.identity != identity:
            self.loaded = None  # frees the memory first
            run = _module(task.family)
            models = run.load_models(job, stats=RunStats(job.device))
            encoder = None if job.config.offload else run.load_text(job)
            self.loaded = _Loaded(identity, models, encoder)
        return self.loaded


def _module(family: str) -> Any:
    """Import a family's `run`: only the one that is needed."""
    return importlib.import_module(f"{family}.run")


def _only_new(task: Task, job: Any) -> Any:
    """Leave the given clip out of the video, as MAGI-1 does: evaluations want the new frames."""
    if task.family != "skyreels_v2" or task.video is None:
        return job
    return replace(job, media=replace(job.media, video=None))


def _identity(task: Task, job: Any) -> Hashable:
    """Return what loaded models depend on, and nothing that differs between their videos."""
    config, checkpoint = job.config, job.checkpoint
    own: tuple[Hashable, ...] = (str(checkpoint),)
    if task.family == "magi1":
        # its checkpoint holds the settings of the run, too: prompt, seed, number of steps
        run = config.runtime_config
        own = (
            *(checkpoint.dit_files, checkpoint.vae, checkpoint.text_encoder),
            *(str(config.model_config), str(config.engine_config)),
            *(run.scale_factor, run.t5_device),
        )
    return (task.family, job.device, job.dtype, config.offload, own)
