"""Make videos one after the other with models that are loaded once."""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowcache.errors import UserError
from flowcache.runtime.cli import choose_device
from flowcache.runtime.config import to_dict
from flowcache.runtime.model import Job, Loaded, Request, load_model
from flowcache.runtime.run import encode_inputs, load_networks, prepare, render
from flowcache.runtime.stats import RunStats
from sampling.gpus import describe_gpus
from sampling.protocol import contradiction
from sampling.tasks import Kind, Origin, Task, sha256_of, sketch_of

OWN_KEYS = frozenset({"prompt", "seed", "image", "video"})
"""Settings in which the videos of a kind differ; a task names them itself."""
PLACES = frozenset({"device", "load", "t5_pretrained", "vae_pretrained", "special_tokens"})
"""Settings that say where something is on this machine."""
SETTINGS, CHECKPOINT, TOKENS = "resolved_settings", "checkpoint", "special_tokens"
"""Parts of an origin, as messages name them."""
FILES = {
    "skyreels_v2": ("vae", "text_encoder", "tokenizer", "image_encoder"),
    "magi1": ("vae", "text_encoder"),
}
"""Family -> other parts of an origin: what its checkpoint has beside the transformer."""


@dataclass(frozen=True)
class _Loaded:
    identity: Hashable
    networks: Loaded
    encoder: Any
    """The text encoder; None: it is loaded for every prompt, as with `offload`."""


@dataclass
class Renderer:
    """Makes videos of any model on one device."""

    device: str
    """As the setting `device`; settings of a task come after it."""
    loaded: _Loaded | None = None
    origins: dict[Kind, Origin] = field(default_factory=dict)
    _fingerprints: dict[Hashable, dict[str, str]] = field(default_factory=dict)

    def check(self, task: Task, *, pins: Mapping[str, Any] | None = None) -> Origin:
        """Check the settings of a task without its prompt, and load nothing.

        Args:
            pins: what a protocol says that settings come to.

        Returns: hashes of all settings, those of the preset included, and of the checkpoint.

        Raises:
            UserError: something is wrong that would stop every task of its kind.
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
        origin = {SETTINGS: hash_settings(job), **self._checkpoint_of(task, job)}
        self.origins[task.kind] = origin
        return origin

    def _checkpoint_of(self, task: Task, job: Job) -> dict[str, str]:
        """Return a hash of each part of the checkpoint; little of large files is read."""
        model = _identity(task, job)
        if model not in self._fingerprints:
            found = {CHECKPOINT: job.model.fingerprint(job.source)}
            for part in FILES[task.family]:
                path = getattr(job.source.files, part)
                if path is not None:
                    found[part] = sketch_of(path)
            self._fingerprints[model] = found
        tokens = hash_tokens(job) if task.family == "magi1" else None
        return {**self._fingerprints[model], **({} if tokens is None else {TOKENS: tokens})}

    def render(self, task: Task, folder: Path) -> dict[str, Any]:
        """Make one video in a folder; return what its JSON holds.

        Raises:
            UserError: the task is not possible, or the video can't be written.
        """
        job = self._prepare(task, folder)
        self._check_origin(task, job)
        loaded = self._load(task, job)
        stats = RunStats(job.device)
        inputs = encode_inputs(job, stats=stats, encoder=loaded.encoder)
        # evaluations want the new frames; what is left unfinished is made again as a whole
        job = replace(job, before=None, keeps_partial=False)
        report = render(job, loaded.networks, inputs, stats=stats)
        return {**report, "kv_cache_bytes": job.work.kv_bytes, "gpus": describe_gpus()}

    def _check_origin(self, task: Task, job: Job) -> None:
        """Check that nobody has edited the preset since the start.

        A clip to continue may turn the video upright: then the settings differ anyway.
        """
        origin = self.origins.get(task.kind)
        if origin and task.video is None and hash_settings(job) != origin[SETTINGS]:
            raise UserError(
                f"preset {task.preset} has changed since the start: undo that, or choose another "
                "output folder"
            )

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

    def _load(self, task: Task, job: Job) -> _Loaded:
        identity = _identity(task, job)
        if self.loaded is None or self.loaded.identity != identity:
            self.loaded = None  # frees the memory first
            networks = load_networks(job, stats=RunStats(job.device))
            encoder = None if job.config.offload else job.model.load_text(job)
            self.loaded = _Loaded(identity, networks, encoder)
        return self.loaded


def hash_settings(job: Job) -> str:
    """Return a hash of what the videos of a kind share, wherever their files are.

    A profile counts by what it says.
    """
    rule = job.config.reuse
    shared = _without(to_dict(job.config), OWN_KEYS | PLACES)
    shared["dtype"] = str(job.dtype)
    shared["reuse"]["profile"] = sha256_of(Path(rule.profile)) if rule.needs_profile else None
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


def hash_tokens(job: Job) -> str | None:
    """Return a hash of MAGI-1's special tokens; None: the run has none."""
    if job.media.tokens is None:
        return None
    digest = hashlib.sha256()
    for part in dataclasses.astuple(job.media.tokens):
        digest.update(part.float().numpy().tobytes())
    return digest.hexdigest()


def _without(settings: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """Return settings without some keys, in all sections."""
    return {
        key: _without(value, keys) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in keys
    }


def _identity(task: Task, job: Job) -> Hashable:
    """Return what loaded models depend on, and nothing that differs between their videos."""
    config, checkpoint = job.config, job.source.files
    own: tuple[Hashable, ...] = (str(checkpoint),)
    if task.family == "magi1":
        # its checkpoint holds the settings of the run, too: prompt, seed, number of steps
        run = config.runtime_config
        own = (
            *(checkpoint.dit_files, checkpoint.vae, checkpoint.text_encoder),
            *(str(config.model_config), str(config.engine_config)),
            *(run.scale_factor, run.fps, run.t5_device),
        )
    return (task.family, job.device, job.dtype, config.offload, own)
