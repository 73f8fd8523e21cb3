"""Where prompts come from: a text file, VBench's prompt files, Physics-IQ's descriptions."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flowcache.errors import UserError
from sampling.tasks import Task

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

    The clip that belongs to a description begins with the same four digits and lies below a folder
    or has a name with "conditioning"; of several frame rates the lowest (24) is taken.

    Raises:
        UserError: the table or a clip is missing.
    """
    tables = [folder / place for place in PHYSICS_IQ_TABLES if (folder / place).is_file()]
    if not tables:
        raise UserError(f"{folder}: holds no {PHYSICS_IQ_TABLES[0]}: {PHYSICS_IQ_ADVICE}")
    with tables[0].open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not set(PHYSICS_IQ_COLUMNS) <= rows[0].keys():
        raise UserError(f"{tables[0]}: must have the columns {', '.join(PHYSICS_IQ_COLUMNS)}")
    if run.per_prompt != 1:
        raise UserError(f"Physics-IQ has one video per clip: per-prompt is {run.per_prompt}, not 1")
    clips = _conditioning_clips(folder)
    tasks: dict[str, Task] = {}
    for row in rows:
        name = Path(row["generated_video_name"]).stem
        key = name[:4]
        if key not in clips:
            raise UserError(f"{folder}: no conditioning clip {key}_*.mp4: {PHYSICS_IQ_ADVICE}")
        tasks[name] = replace(
            run.template, name=name, prompt=row["description"], video=str(clips[key])
        )
    return list(tasks.values())


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


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that hold something.

    Raises:
        UserError: it can't be read, or holds nothing.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as text ({error})") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path}: holds no prompt; write one per line")
    return lines
