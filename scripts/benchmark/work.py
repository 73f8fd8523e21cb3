"""The clips of one process: which there are, and rendering those that are still missing."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmark.family import REFERENCE, Family, Job, Method, Models, Source
from benchmark.figures import measure
from flowcache.demo.clips import Attributes, split_attributes
from flowcache.errors import UserError
from flowcache.runtime.config import to_dict

FIRST_SEED = 5000

Prompts = Mapping[int, tuple[Attributes, int]]
"""Index of a clip -> what it shows, and its seed."""


def unseen_prompts(count: int) -> Prompts:
    """Return captions that the demos were not trained on, each with a seed of its own."""
    _, held_out = split_attributes()
    return {i: (held_out[i % len(held_out)], FIRST_SEED + i) for i in range(count)}


def parse_part(text: str) -> tuple[int, int]:
    """Turn `2/4` into (2, 4).

    Raises:
        UserError: it isn't that, or not one of the parts.
    """
    part, _, num_parts = text.partition("/")
    if not (part.isdecimal() and num_parts.isdecimal() and 1 <= int(part) <= int(num_parts)):
        raise UserError(f"--part is {text!r}, but must be I/N with I in 1..N, as in 1/2")
    return int(part), int(num_parts)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of all processes that share a folder.

    Raises:
        UserError: a line is damaged.
    """
    rows: list[dict[str, Any]] = []
    for log in sorted(folder.glob("rows-*.jsonl")):
        for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                raise UserError(
                    f"{log}: line {number} is damaged (a run was cut short): delete the line"
                ) from None
    return rows


def render_missing(
    family: Family[Job, Models],
    methods: Sequence[Method],
    prompts: Prompts,
    *,
    source: Source,
    log: Path,
) -> None:
    """Render and measure what the folder does not hold yet; every clip is a line of the log.

    Raises:
        UserError: a method can't be run, or the folder holds rows of other settings.
    """
    jobs = {method.name: family.prepare(method, source) for method in methods}
    settings = {name: to_dict(job.config) for name, job in jobs.items()}
    done = {
        (row["method"], row["index"]): row["settings"] == _plain(settings[row["method"]])
        for row in read_rows(log.parent)
        if row["method"] in settings
    }
    for (name, _), is_same in done.items():
        if not is_same:
            raise UserError(
                f"{log.parent} holds rows of {name!r} with other settings: choose another --out"
            )
    models = family.load(jobs[REFERENCE])
    with log.open("a", encoding="utf-8") as stream:
        for index, (attributes, seed) in prompts.items():
            missing = [m for m in methods if (m.name, index) not in done]
            needed = {REFERENCE, *(m.base for m in missing)} if missing else set()
            frames: dict[str, Tensor] = {}
            for method in methods:
                if method not in missing and method.name not in needed:
                    continue
                clip = family.render(jobs[method.name], models, attributes.caption, seed)
                if method in missing:
                    figures = measure(
                        clip,
                        attributes,
                        reference=frames.get(REFERENCE),
                        base=None if method.base is None else frames[method.base],
                    )
                    row = {"method": method.name, "index": index, "seed": seed, **figures}
                    stream.write(json.dumps({**row, "settings": settings[method.name]}) + "\n")
                    stream.flush()
                if method.name in needed:
                    frames[method.name] = clip.frames
            sys.stderr.write(f"clip {index}: {attributes.caption}\n")


def _plain(settings: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(settings))
