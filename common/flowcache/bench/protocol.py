"""A protocol: everything that a table depends on, in one YAML file whose SHA-256 names it.

A row names a preset, but what the preset comes to stands in the protocol as well, under `pinned`:
a preset that has changed since is refused instead of silently giving another table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from flowcache.bench.tasks import Task, check_names, sha256_of
from flowcache.bounds import OneOf
from flowcache.errors import UserError
from flowcache.runtime.config import load_config
from flowcache.runtime.files import write_text
from flowcache.runtime.model import MODELS
from flowcache.runtime.video import VIDEO_QUALITY

VIDEOS, METRICS_FOLDER, COPY = "videos", "metrics", "protocol.yaml"
"""In a result folder: the videos, what comparing each of them gave, the protocol."""


@dataclass
class Published:
    """The figures of the paper for a row; null where it has none."""

    pflops: float | None = None
    speedup: float | None = None
    latency_seconds: float | None = None
    vbench: float | None = None
    lpips: float | None = None
    ssim: float | None = None
    psnr: float | None = None


@dataclass
class Method:
    """A row of the table."""

    name: str = ""
    """As the table shows it."""
    folder: str = ""
    """Of its videos; rows may share one."""
    preset: str = ""
    settings: list[str] = field(default_factory=list)
    """`key=value`, after those of the protocol."""
    pinned: dict[str, Any] = field(default_factory=dict)
    """Setting -> its value, as in `reuse.threshold: 0.1`; wins over the protocol's."""
    part: Literal["paper", "ingredient", "baseline"] = "paper"
    """paper: a row of the published table; ingredient: one step from vanilla to FlowCache."""
    published: Published = field(default_factory=Published)


@dataclass
class Protocol:
    """What is made, and what it is compared with."""

    title: str = ""
    family: Annotated[str, OneOf(tuple(MODELS))] = "skyreels_v2"
    model: str = "demo"
    """The model where the command names none."""
    codec_quality: int = 0
    """Of the mp4 files that are compared, as `VideoWriter` counts it."""
    reference: str = ""
    """Folder of the method that the others are compared with."""
    published_setting: str = ""
    """Model, size, machine of the published figures."""
    seeds: list[int] = field(default_factory=list)
    """Every prompt is made with each."""
    prompts: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    """`key=value` of every method."""
    pinned: dict[str, Any] = field(default_factory=dict)
    """Setting -> what it comes to in every method that does not say otherwise."""
    methods: list[Method] = field(default_factory=list)

    def check(self, path: Path) -> None:
        """Check what the types can't say."""
        if self.codec_quality != VIDEO_QUALITY:
            raise UserError(
                f"{path}: codec_quality is {self.codec_quality}, but this version writes videos "
                f"with {VIDEO_QUALITY}: the figures would be others"
            )
        for key in ("prompts", "seeds", "methods"):
            if not getattr(self, key):
                raise UserError(f"{path}: {key} is empty: name at least one")
        kinds: dict[str, tuple[str, list[str], dict[str, Any]]] = {}
        for method in self.methods:
            if not method.name or not method.preset or not method.folder.replace("_", "").isalnum():
                raise UserError(
                    f"{path}: method {method.name or method.folder!r} needs name, preset, and a "
                    "folder of letters, digits and _"
                )
            kind = (method.preset, method.settings, method.pinned)
            if kinds.setdefault(method.folder, kind) != kind:
                raise UserError(
                    f"{path}: two methods have the folder {method.folder}, but differ in preset, "
                    "settings or pinned: give each a folder of its own"
                )
        if self.reference not in kinds:
            raise UserError(
                f"{path}: reference is {self.reference!r}, but must be one of {', '.join(kinds)}"
            )

    def pins(self, folder: str) -> dict[str, Any]:
        """Return what the settings of the videos in a folder must come to.

        Those that the protocol itself sets are left out: they come after the preset's.
        """
        method = next(method for method in self.methods if method.folder == folder)
        given = {text.partition("=")[0] for text in (*self.settings, *method.settings)}
        pins = {**self.pinned, **method.pinned}
        return {key: value for key, value in pins.items() if key not in given}

    def tasks(self, model: str | None, *, num_prompts: int | None = None) -> list[Task]:
        """Return all videos, prompt by prompt, so that a slow hour slows all methods alike.

        Args:
            model: None: the protocol's own.
            num_prompts: the first so many prompts only; None: all.
        """
        if num_prompts is not None and not 1 <= num_prompts <= len(self.prompts):
            raise UserError(
                f"--num-prompts must be in 1..{len(self.prompts)}, the prompts of the protocol, "
                f"not {num_prompts}"
            )
        kinds = {method.folder: method for method in self.methods}
        tasks = [
            Task(
                name=f"{index:03d}-{seed}",
                family=self.family,
                model=model or self.model,
                preset=method.preset,
                prompt=prompt,
                seed=seed,
                settings=(*self.settings, *method.settings),
                folder=method.folder,
            )
            for index, prompt in enumerate(self.prompts[:num_prompts])
            for seed in self.seeds
            for method in kinds.values()
        ]
        check_names(tasks)
        return tasks


def contradiction(pins: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Say which setting is not what is pinned, with both values; None: all are.

    Args:
        config: all settings of a run as nested plain values.
    """
    for key, wanted in pins.items():
        found: Any = config
        for name in key.split("."):
            if not isinstance(found, Mapping) or name not in found:
                return f"{key} is pinned to {wanted!r}, but is no setting"
            found = found[name]
        if found != wanted:
            return f"{key} is {found!r}, but pinned to {wanted!r}"
    return None


def read_protocol(path: Path) -> Protocol:
    """Read a protocol and check it."""
    protocol = load_config(Protocol, [path])
    protocol.check(path)
    return protocol


def keep_protocol(path: Path, out: Path) -> None:
    """Put a copy of the protocol into a result folder, which must not be of another one."""
    copy = out / COPY
    if not copy.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_text(copy, path.read_text(encoding="utf-8"))
    elif sha256_of(copy) != sha256_of(path):
        raise UserError(f"{out}: holds results of another protocol than {path}: choose another OUT")
