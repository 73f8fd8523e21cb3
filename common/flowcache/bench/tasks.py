"""One video to make, and how far it is: missing, complete, or not what its receipt says."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowcache.errors import UserError
from flowcache.runtime.files import parse_json, read_json

Origin = Mapping[str, str]
"""What a video is made from in addition to its task, as hashes: see `Renderer.check`."""
Kind = tuple[str, str, str, tuple[str, ...]]

MAX_NAME_BYTES = 230
"""255 on common file systems, less the suffixes of what lies beside a video."""

MISSING = "missing"
BLOCK_BYTES = 2**20
SKETCH_BLOCKS = 16


@dataclass(frozen=True)
class Task:
    """One video to make."""

    name: str
    """Of the video, without `.mp4`."""
    family: str
    """Import package of the model, one of `MODELS`."""
    model: str
    preset: str
    prompt: str
    seed: int
    settings: tuple[str, ...] = ()
    """`key=value`."""
    video: str | None = None
    """Path of the clip to continue."""
    folder: str = ""
    """Inside the output folder; empty: the output folder itself."""

    @property
    def label(self) -> str:
        """Name the video in messages, and tell tasks apart."""
        return f"{self.folder}/{self.name}" if self.folder else self.name

    @property
    def kind(self) -> Kind:
        """Return what tasks share that differ in prompt, seed and given clip alone."""
        return self.family, self.model, self.preset, self.settings

    def path(self, out: Path, suffix: str) -> Path:
        """Return where a file of this task lies."""
        return out / self.folder / f"{self.name}{suffix}"

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain values, as receipts hold it."""
        return {**dataclasses.asdict(self), "settings": list(self.settings)}


def check_names(tasks: Sequence[Task]) -> None:
    """Check that every task has a file name of its own.

    Raises:
        UserError: one has not.
    """
    seen: set[str] = set()
    for task in tasks:
        is_plain = task.name and "/" not in task.name and not task.name.startswith(".")
        if not is_plain or len(task.name.encode()) > MAX_NAME_BYTES:
            raise UserError(
                f"{task.name!r} can't be the name of a video: 1 to {MAX_NAME_BYTES} bytes, "
                "no /, no dot in front"
            )
        if task.label in seen:
            raise UserError(f"two videos would be named {task.label}: leave one out")
        seen.add(task.label)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sketch_of(path: Path) -> str:
    """Return a hash of a file or of all files in a folder: names, sizes, parts of the contents.

    Of a large file `SKETCH_BLOCKS` blocks are read that lie evenly over it: enough to tell trained
    weights apart, and quick with an encoder of many gigabytes.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        num_bytes = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{num_bytes}\0".encode())
        last = max(0, num_bytes - BLOCK_BYTES)
        with file.open("rb") as stream:
            for start in sorted({last * n // (SKETCH_BLOCKS - 1) for n in range(SKETCH_BLOCKS)}):
                stream.seek(start)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def flaw(task: Task, out: Path, *, origin: Origin | None = None) -> str | None:
    """Say why a task is not complete; None: video and receipt are there and belong together.

    Args:
        origin: what the video must be made from; None: that is not compared.

    Raises:
        UserError: there is a result of that name which was made otherwise; it is kept.
    """
    receipt = task.path(out, ".json")
    try:
        text = receipt.read_text(encoding="utf-8")
        report = parse_json(text, source=str(receipt))
        stored, digest = dict(report["task"]), report["sha256"]
        found = dict(report.get("made_from", {}))
    except FileNotFoundError:
        return MISSING
    except (UnicodeDecodeError, UserError):
        return f"{receipt}: damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{receipt} is no receipt of this command and is kept: choose another output folder"
        ) from None
    wanted, stored = {**task.to_dict(), **(origin or {})}, {**stored, **found}
    changed = [key for key, value in wanted.items() if stored.get(key) != value]
    if changed:
        raise UserError(
            f"{receipt} is of another run ({', '.join(changed)} differ) and is kept: choose "
            "another output folder"
        )
    video = task.path(out, ".mp4")
    try:
        is_same = sha256_of(video) == digest
    except FileNotFoundError:
        return f"{video}: missing beside its receipt"
    return None if is_same else f"{video}: not the video of its receipt (SHA-256 differs)"


def read_receipt(task: Task, out: Path) -> dict[str, Any]:
    """Return what the JSON beside a complete video holds."""
    return read_json(task.path(out, ".json"))


def alarms_of(task: Task, out: Path) -> list[str]:
    """Return what the receipt of a complete video says is alarming about it."""
    return list(read_receipt(task, out).get("alarms", []))


def flaws(tasks: Iterable[Task], out: Path) -> dict[str, str]:
    """Return for each task that is not complete why, by its label."""
    found = {task.label: flaw(task, out) for task in tasks}
    return {label: reason for label, reason in found.items() if reason is not None}
