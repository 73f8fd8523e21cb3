"""The videos to make: which there are (a text file, VBench, Physics-IQ), and which are complete."""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowcache.errors import UserError
from flowcache.runtime.files import parse_json, read_json, write_json, write_text
from flowcache.runtime.text_files import TableRow, read_lines, read_table

logger = logging.getLogger(__name__)

Origin = Mapping[str, str]
"""What a video is made from in addition to its task, as hashes: see `Renderer.check`."""
Kind = tuple[str, str, str, tuple[str, ...]]

MAX_NAME_BYTES = 230
"""255 on common file systems, less the suffixes of the files next to a video."""
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
        """The video in messages; no two tasks of a list share one."""
        return f"{self.folder}/{self.name}" if self.folder else self.name

    @property
    def kind(self) -> Kind:
        """What tasks share that differ in prompt, seed and given clip alone."""
        return self.family, self.model, self.preset, self.settings

    def path(self, out: Path, suffix: str) -> Path:
        """Return where a file of this task lies."""
        return out / self.folder / f"{self.name}{suffix}"

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain values, as receipts hold it."""
        return {**dataclasses.asdict(self), "settings": list(self.settings)}


def check_names(tasks: Sequence[Task]) -> None:
    """Check that every task has a file name, and one of its own."""
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


# Receipts -----------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sketch_of(path: Path) -> str:
    """Return a hash of a file or of all files in a folder: names, sizes, parts of the contents.

    Of a large file `SKETCH_BLOCKS` blocks are read that lie evenly over it: enough to distinguish
    trained weights, and fast with an encoder of many gigabytes.
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


def read_receipt(task: Task, out: Path) -> dict[str, Any]:
    """Return the JSON of a complete video."""
    return read_json(task.path(out, ".json"))


def alarms(tasks: Iterable[Task], out: Path) -> list[str]:
    """Name the complete videos that are of one colour or frozen: their figures mean nothing."""
    return [
        f"ALARM {task.label}: {alarm}"
        for task in tasks
        for alarm in read_receipt(task, out).get("alarms", [])
    ]


def flaw(task: Task, out: Path, *, origin: Origin | None = None) -> str | None:
    """Say why a task is not complete; None: video and receipt are there and belong together.

    Args:
        origin: what the video must be made from; None: that is not compared.

    Raises:
        UserError: there is a result of that name which was made otherwise; it is kept.
    """
    receipt, video = task.path(out, ".json"), task.path(out, ".mp4")
    try:
        report = parse_json(receipt.read_text(encoding="utf-8"), source=str(receipt))
        stored, digest = dict(report["task"]), report["sha256"]
        stored |= dict(report.get("made_from", {}))
    except FileNotFoundError:
        return MISSING
    except (UnicodeDecodeError, UserError):
        return f"{receipt}: damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{receipt} is no receipt of this command and is kept: choose another output folder"
        ) from None
    wanted = {**task.to_dict(), **(origin or {})}
    changed = [key for key, value in wanted.items() if stored.get(key) != value]
    if changed:
        raise UserError(
            f"{receipt} is of another run ({', '.join(changed)} differ) and is kept: choose "
            "another output folder"
        )
    try:
        is_same = sha256_of(video) == digest
    except FileNotFoundError:
        return f"{video}: missing beside its receipt"
    return None if is_same else f"{video}: not the video of its receipt (SHA-256 differs)"


# Lists of prompts ---------------------------------------------------------------------------------

VBENCH_DIMENSIONS = (
    *("overall_consistency", "subject_consistency", "scene", "object_class", "multiple_objects"),
    *("color", "spatial_relationship", "temporal_style", "human_action", "temporal_flickering"),
    "appearance_style",
)
"""Those of the published tables. Each has a prompt file of its own."""
VBENCH_PROMPTS_FILE = "vbench_prompts.json"
"""{dimension: [prompt, ...]}, read by scripts/vbench/score.py."""
VBENCH_PLACES = ("prompts_per_dimension", "prompts/prompts_per_dimension")
VBENCH_ADVICE = (
    "download VBench with: git clone https://github.com/Vchitect/VBench, and give the folder "
    "VBench/prompts"
)
PHYSICS_IQ_TABLES = (
    *("descriptions.csv", "descriptions/descriptions.csv"),
    "descriptions/descriptions_original.csv",
)
PHYSICS_IQ_ADVICE = (
    "download Physics-IQ with the script of https://github.com/google-deepmind/"
    "physics-IQ-benchmark, and give the folder that holds descriptions.csv and split-videos"
)
DESCRIPTIONS_FILE = "descriptions.csv"
TAKE = re.compile(r"take-?(\d+)", re.IGNORECASE)
FIRST_TAKE = 1
CONDITIONING = "conditioning"
"""Part of the path of every clip that is to be continued."""


@dataclass(frozen=True)
class Run:
    """How every video of a list is made; names, prompts and clips are filled in per video."""

    template: Task
    per_prompt: int = 1
    """Videos of each prompt; the i-th has the template's seed + i."""

    def tasks(self, name: str, prompt: str) -> list[Task]:
        """Return the tasks of one prompt: `NAME-0`, `NAME-1`, ..."""
        return [
            replace(self.template, name=f"{name}-{i}", prompt=prompt, seed=self.template.seed + i)
            for i in range(self.per_prompt)
        ]


def from_lines(path: Path, run: Run) -> list[Task]:
    """Return the tasks of a text file, one prompt per line: `0000-0`, `0001-0`, ..."""
    prompts = read_lines(path)
    return [task for n, prompt in enumerate(prompts) for task in run.tasks(f"{n:04d}", prompt)]


def read_vbench_prompts(
    folder: Path, dimensions: Sequence[str], *, num_prompts: int | None = None
) -> dict[str, list[str]]:
    """Return the prompts of each dimension of VBench.

    Args:
        folder: holds `prompts_per_dimension/DIMENSION.txt`, or `prompts/` with that.
        num_prompts: of each dimension, evenly spread over its list; None: all.
    """
    places = [folder / place for place in VBENCH_PLACES if (folder / place).is_dir()]
    if not places:
        raise UserError(f"{folder}: holds no {VBENCH_PLACES[0]} folder: {VBENCH_ADVICE}")
    prompts: dict[str, list[str]] = {}
    for dimension in dimensions:
        path = places[0] / f"{dimension}.txt"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in places[0].glob("*.txt")))
            raise UserError(
                f"{dimension!r} is no dimension of VBench here; there are: {known or 'none'}"
            )
        lines = read_lines(path)
        wanted = len(lines) if num_prompts is None else num_prompts
        if not 1 <= wanted <= len(lines):
            raise UserError(
                f"--num-prompts must be 1 to {len(lines)}, the prompts of {dimension}, not {wanted}"
            )
        prompts[dimension] = [lines[n * len(lines) // wanted] for n in range(wanted)]
    return prompts


def from_vbench(prompts: Mapping[str, Sequence[str]], run: Run) -> list[Task]:
    """Return the tasks of VBench: `PROMPT-0`, ...; a prompt of two dimensions is made once."""
    unique = dict.fromkeys(prompt for each in prompts.values() for prompt in each)
    return [task for prompt in unique for task in run.tasks(prompt, prompt)]


def keep_vbench_prompts(prompts: Mapping[str, Sequence[str]], out: Path, *, is_part: bool) -> None:
    """Note beside the videos which prompts count, where they are a part of a dimension's."""
    path = out / VBENCH_PROMPTS_FILE
    kept = dict(read_json(path)) if path.is_file() else {}
    for dimension in prompts:
        kept.pop(dimension, None)
    kept |= {key: list(each) for key, each in prompts.items()} if is_part else {}
    if kept or path.is_file():
        write_json(path, kept)


def physics_iq_table(folder: Path) -> Path:
    """Return the descriptions in a folder of Physics-IQ's data."""
    tables = [folder / place for place in PHYSICS_IQ_TABLES if (folder / place).is_file()]
    if not tables:
        raise UserError(f"{folder}: holds no {PHYSICS_IQ_TABLES[0]}: {PHYSICS_IQ_ADVICE}")
    return tables[0]


def from_physics_iq(folder: Path, run: Run, *, table: Path | None = None) -> list[Task]:
    """Return the tasks of Physics-IQ: clips to be continued, named as its evaluation wants them.

    Every scene was filmed twice, and only the first take is to be generated; the second shows how
    much two takes differ. The clip that belongs to a description begins with the same four digits.

    Args:
        table: descriptions, as those of Physics-IQ Verified; None: those in the folder.
    """
    table = table or physics_iq_table(folder)
    rows = read_table(table, columns=("description", "generated_video_name"))
    if run.per_prompt != 1:
        raise UserError(f"Physics-IQ has one video per clip: per-prompt is {run.per_prompt}, not 1")
    clips = _conditioning_clips(folder)
    first = [row for row in rows if _take(row, clips) == FIRST_TAKE]
    if not first:
        raise UserError(f"{table}: has no row of take-{FIRST_TAKE}, which alone is generated")
    if len(first) < len(rows):
        logger.info(
            "%s: %d of %d rows are left out: Physics-IQ generates take-%d only",
            *(table, len(rows) - len(first), len(rows), FIRST_TAKE),
        )
    tasks: dict[str, Task] = {}
    for row in first:
        name = Path(row.cells["generated_video_name"]).stem
        if name in tasks:
            raise UserError(
                f"{table}: row {row.number}, column generated_video_name: {name} is there "
                "twice: leave one out"
            )
        if name[:4] not in clips:
            raise UserError(f"{folder}: no conditioning clip {name[:4]}_*.mp4: {PHYSICS_IQ_ADVICE}")
        tasks[name] = replace(
            run.template, name=name, prompt=row.cells["description"], video=str(clips[name[:4]])
        )
    return list(tasks.values())


def keep_descriptions(table: Path, out: Path) -> None:
    """Copy Physics-IQ's descriptions beside the videos: a submission needs those that were used."""
    path, text = out / DESCRIPTIONS_FILE, table.read_text(encoding="utf-8-sig")
    if path.is_file() and path.read_text(encoding="utf-8-sig") != text:
        raise UserError(f"{path} differs from {table} and is kept: choose another output folder")
    write_text(path, text)


def _take(row: TableRow, clips: Mapping[str, Path]) -> int:
    """Return which take a row is of, by its scenario, its name, or its clip; else the first."""
    name = row.cells["generated_video_name"]
    clip = clips.get(name[:4], Path())
    places = (row.cells.get("scenario", ""), name, clip.name)
    found = [match for place in places if (match := TAKE.search(place))]
    return int(found[0][1]) if found else FIRST_TAKE


def _conditioning_clips(folder: Path) -> dict[str, Path]:
    """Return the clip of each number; where there are several, of the lowest frame rate (24)."""

    def rate(path: Path) -> int:
        digits = path.parent.name.upper().removesuffix("FPS")
        return int(digits) if digits.isdecimal() else 0

    found = [
        path
        for path in folder.rglob("*.mp4")
        if CONDITIONING in str(path.relative_to(folder)) and path.name[:4].isdecimal()
    ]
    clips: dict[str, Path] = {}
    for path in sorted(found, key=lambda path: (rate(path), str(path))):
        clips.setdefault(path.name[:4], path)
    return clips
