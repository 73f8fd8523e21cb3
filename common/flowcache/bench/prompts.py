"""Where prompts come from: a text file, VBench's prompt files, Physics-IQ's descriptions."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flowcache.bench.tasks import Task
from flowcache.errors import UserError
from flowcache.runtime.text_files import TableRow, read_lines, read_table

logger = logging.getLogger(__name__)

VBENCH_DIMENSIONS = (
    *("overall_consistency", "subject_consistency", "scene", "object_class", "multiple_objects"),
    *("color", "spatial_relationship", "temporal_style", "human_action", "temporal_flickering"),
    "appearance_style",
)
"""Those of the published tables. Each has a prompt file of its own."""
VBENCH_PLACES = ("prompts_per_dimension", "prompts/prompts_per_dimension")
VBENCH_ADVICE = (
    "download VBench with: git clone https://github.com/Vchitect/VBench, and give the folder "
    "VBench/prompts"
)
PHYSICS_IQ_TABLES = (
    *("descriptions.csv", "descriptions/descriptions.csv"),
    "descriptions/descriptions_original.csv",
)
PHYSICS_IQ_COLUMNS = ("description", "generated_video_name")
PHYSICS_IQ_ADVICE = (
    "download Physics-IQ with the script of https://github.com/google-deepmind/"
    "physics-IQ-benchmark, and give the folder that holds descriptions.csv and split-videos"
)
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

    def tasks(self, name: str, prompt: str, *, video: str | None = None) -> list[Task]:
        """Return the tasks of one prompt: `NAME-0`, `NAME-1`, ..."""
        return [
            replace(
                self.template,
                name=f"{name}-{index}",
                prompt=prompt,
                seed=self.template.seed + index,
                video=video,
            )
            for index in range(self.per_prompt)
        ]


def from_lines(path: Path, run: Run) -> list[Task]:
    """Return the tasks of a text file, one prompt per line: `0000-0`, `0001-0`, ...

    Raises:
        UserError: it can't be read, or holds no prompt.
    """
    prompts = read_lines(path)
    return [task for n, prompt in enumerate(prompts) for task in run.tasks(f"{n:04d}", prompt)]


def from_vbench(folder: Path, run: Run, *, dimensions: Sequence[str]) -> list[Task]:
    """Return the tasks of VBench: `PROMPT-0`, ...; a prompt of two dimensions is made once.

    Args:
        folder: holds `prompts_per_dimension/DIMENSION.txt`, or `prompts/` with that.

    Raises:
        UserError: the folder or a dimension is missing.
    """
    places = [folder / place for place in VBENCH_PLACES if (folder / place).is_dir()]
    if not places:
        raise UserError(f"{folder}: holds no {VBENCH_PLACES[0]} folder: {VBENCH_ADVICE}")
    prompts: dict[str, None] = {}
    for dimension in dimensions:
        path = places[0] / f"{dimension}.txt"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in places[0].glob("*.txt")))
            raise UserError(
                f"{dimension!r} is no dimension of VBench here; there are: {known or 'none'}"
            )
        prompts |= dict.fromkeys(read_lines(path))
    return [task for prompt in prompts for task in run.tasks(prompt, prompt)]


def from_physics_iq(folder: Path, run: Run) -> list[Task]:
    """Return the tasks of Physics-IQ: clips to be continued, named as its evaluation wants them.

    Every scene was filmed twice, and only the first take is to be generated; the second shows how
    much two takes differ. The clip that belongs to a description begins with the same four digits
    and lies below a folder or has a name with "conditioning"; of several frame rates the lowest
    (24) is taken.

    Raises:
        UserError: the table can't be read, or a clip is missing.
    """
    tables = [folder / place for place in PHYSICS_IQ_TABLES if (folder / place).is_file()]
    if not tables:
        raise UserError(f"{folder}: holds no {PHYSICS_IQ_TABLES[0]}: {PHYSICS_IQ_ADVICE}")
    rows = read_table(tables[0], columns=PHYSICS_IQ_COLUMNS)
    if run.per_prompt != 1:
        raise UserError(f"Physics-IQ has one video per clip: per-prompt is {run.per_prompt}, not 1")
    clips = _conditioning_clips(folder)
    first = [row for row in rows if _take(row, clips) == FIRST_TAKE]
    if not first:
        raise UserError(f"{tables[0]}: has no row of take-{FIRST_TAKE}, which alone is generated")
    if len(first) < len(rows):
        logger.info(
            "%s: %d of %d rows are left out: Physics-IQ generates take-%d only",
            *(tables[0], len(rows) - len(first), len(rows), FIRST_TAKE),
        )
    tasks: dict[str, Task] = {}
    for row in first:
        name = Path(row.cells["generated_video_name"]).stem
        if name in tasks:
            raise UserError(
                f"{tables[0]}: row {row.number}, column generated_video_name: {name} is there "
                "twice: leave one out"
            )
        if name[:4] not in clips:
            raise UserError(f"{folder}: no conditioning clip {name[:4]}_*.mp4: {PHYSICS_IQ_ADVICE}")
        tasks[name] = replace(
            run.template, name=name, prompt=row.cells["description"], video=str(clips[name[:4]])
        )
    return list(tasks.values())


def _take(row: TableRow, clips: Mapping[str, Path]) -> int:
    """Return which take a row is of, by its scenario, its name, or its clip; else the first."""
    name = row.cells["generated_video_name"]
    clip = clips.get(name[:4])
    places = (row.cells.get("scenario", ""), name, "" if clip is None else clip.name)
    found = [match for place in places if (match := TAKE.search(place))]
    return int(found[0][1]) if found else FIRST_TAKE


def _conditioning_clips(folder: Path) -> dict[str, Path]:
    """Return the clip of each number; where there are several, of the lowest frame rate."""
    clips: dict[str, Path] = {}
    found = [
        path
        for path in folder.rglob("*.mp4")
        if CONDITIONING in str(path.relative_to(folder)) and path.name[:4].isdecimal()
    ]
    for path in sorted(found, key=lambda path: (_rate(path), str(path))):
        clips.setdefault(path.name[:4], path)
    return clips


def _rate(path: Path) -> int:
    """Return the frames per second that the folder says (`24FPS`), or 0."""
    digits = path.parent.name.upper().removesuffix("FPS")
    return int(digits) if digits.isdecimal() else 0
