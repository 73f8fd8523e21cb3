"""The methods of a comparison, and rendering the clips that are still missing."""

import importlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from flowcache.demo.clips import Attributes, split_attributes
from flowcache.demo.judge import judge
from flowcache.errors import UserError
from flowcache.runtime.config import to_dict
from flowcache.runtime.metrics import psnr, ssim
from flowcache.runtime.model import Job, Loaded, Request, VideoModel
from flowcache.runtime.run import Clip, collect, encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats
from flowcache.tune.runs import Words

REFERENCE = "vanilla"
"""The method that every other one is compared with; each family has one of this name."""


@dataclass(frozen=True)
class Group:
    """Where a row of the table of reuse rules belongs."""

    policy: str
    predictor: str
    level: str
    """Its budget."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    preset: str
    overrides: tuple[str, ...] = ()
    base: str | None = None
    """A second method that this one is compared with."""
    group: Group | None = None


@dataclass(frozen=True)
class Comparison:
    """A model's part of the comparison; its package has it as `bench.COMPARISON`.

    A method stands below those that it is compared with.
    """

    methods: tuple[Method, ...]
    """Rows of the table."""
    base_label: str
    """Says in the table's head what the second comparison is with."""
    computed: tuple[Method, ...]
    """Rows of the table of reuse rules that compute every step; the last one has the attention and
    the passes of all rows that reuse."""
    preset: str
    """FlowCache-fast of that attention and these passes."""
    words: Words
    has_clean: bool
    """Whether a held clean estimate is another thing than a held velocity."""
    has_guidance: bool
    """Whether a step has a pass without text, which can be left out."""
    longer: str | None = None
    """What to change where a clip is too short to be compressed; None: such rows are allowed."""

    def chosen(self, names: Iterable[str]) -> list[Method]:
        """Return methods by name and those that they are compared with, in the table's order."""
        wanted = {REFERENCE, *names}
        wanted |= {m.base for m in self.methods if m.name in wanted and m.base is not None}
        return [method for method in self.methods if method.name in wanted]


def comparison_of(name: str) -> Comparison:
    """Return a model's part of the comparison, by the name of its package."""
    return cast("Comparison", importlib.import_module(f"{name}.bench").COMPARISON)


@dataclass(frozen=True)
class Source:
    """What all methods are run with."""

    model: VideoModel
    checkpoint: str
    settings: tuple[str, ...]
    folder: Path
    """Where a run may write."""

    def overrides(self, method: Method) -> list[str]:
        """Return the changes of a preset for a method; the prompt is a placeholder."""
        return [*self.settings, *method.overrides, "prompt=-"]


def prepare_method(method: Method, source: Source, *, longer: str | None = None) -> Job:
    """Check a method's settings.

    Args:
        longer: what to change where nothing would be compressed; None: that is allowed.
    """
    request = Request(
        method.preset, source.checkpoint, source.overrides(method), str(source.folder)
    )
    job = prepare(source.model, request)
    budget, num_chunks = job.config.kv, len(job.work.segments[0].tokens)
    if longer is not None and budget.compress != "none" and num_chunks <= budget.total_chunks:
        raise UserError(
            f"{method.name}: nothing would be dropped, since the clip has {num_chunks} chunks and "
            f"the KV cache holds {budget.total_chunks}: {longer}"
        )
    return job


def load(job: Job) -> Loaded:
    """Load transformer and VAE."""
    return load_networks(job, stats=RunStats(job.device))


def render(job: Job, networks: Loaded, prompt: str, seed: int) -> Clip:
    """Make a clip in memory."""
    job, stats = job.changed(prompt=prompt, seed=seed), RunStats(job.device)
    inputs = encode_inputs(job, stats=stats)
    shown = job.model.generate(
        networks.dit, networks.vae, job.config, inputs, stats=stats, work=job.work
    )
    return collect(shown, stats)


# The clips of one process ----------------------------------------------------------------------

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


def measure(
    clip: Clip, attributes: Attributes, *, reference: Tensor | None, base: Tensor | None
) -> dict[str, Any]:
    """Return the figures of one clip.

    Args:
        reference: frames of the method that all are compared with; None: this is it.
        base: frames of the second method that this one is compared with, if there is one.
    """
    stats, agrees = clip.stats, judge(clip.frames.numpy()).agrees(attributes)
    times = stats.stage_times()
    compressing = times.get("kv_compression")
    row: dict[str, Any] = {
        "flops": stats.computed_flops,
        "dit_seconds": times["dit"].seconds,
        "vae_seconds": times["vae"].seconds,
        "computed_share": stats.num_computed / (stats.num_computed + stats.num_reused),
        "num_compressions": 0 if compressing is None else compressing.num_uses,
        "judge": agrees,
        "judge_all": all(agrees.values()),
    }
    for suffix, other in (("", reference), ("_base", base)):
        if other is not None:
            value = psnr(clip.frames, other)
            row[f"psnr{suffix}"] = value if math.isfinite(value) else None
            row[f"ssim{suffix}"] = ssim(clip.frames, other)
    return row


def render_missing(
    comparison: Comparison,
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
    jobs = {
        method.name: prepare_method(method, source, longer=comparison.longer) for method in methods
    }
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
    models = load(jobs[REFERENCE])
    with log.open("a", encoding="utf-8") as stream:
        for index, (attributes, seed) in prompts.items():
            missing = [m for m in methods if (m.name, index) not in done]
            needed = {REFERENCE, *(m.base for m in missing)} if missing else set()
            frames: dict[str, Tensor] = {}
            for method in methods:
                if method not in missing and method.name not in needed:
                    continue
                clip = render(jobs[method.name], models, attributes.caption, seed)
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
