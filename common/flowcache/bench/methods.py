"""Compare methods on clips: render those that are missing, measure them, average, write tables."""

import json
import math
import statistics
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from flowcache.bench.continuity import borders_of, drift, seams
from flowcache.bounds import number
from flowcache.demo.clips import Attributes, split_attributes
from flowcache.demo.judge import judge
from flowcache.errors import UserError
from flowcache.runtime.config import to_dict
from flowcache.runtime.files import read_json_lines
from flowcache.runtime.metrics import psnr, ssim
from flowcache.runtime.model import Job, Loaded, Progress, Request, VideoModel, load_bench
from flowcache.runtime.ops import seeded_noise
from flowcache.runtime.run import Clip, collect, encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats
from flowcache.runtime.text_files import csv_of, escaped, table_row
from flowcache.tuning.runs import Words

REFERENCE = "vanilla"
"""The method that every other one is compared with; each model has one of this name."""


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
    noise: float = 0.0
    """Standard deviation of what is added to the noise of its runs."""


def with_predictors(
    name: str, preset: str, *, base: str, predictors: Mapping[str, tuple[str, ...]]
) -> list[Method]:
    """Return a method with each of several predictors, given by name with their settings."""
    return [
        Method(f"{name}, {predictor}", preset, overrides, base)
        for predictor, overrides in predictors.items()
    ]


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
    compression: tuple[str, ...] = ("kv.compress=importance",)
    """Settings of compressed caches in the table of quantised ones."""
    long: tuple[Method, ...] = ()
    """Ways to bound the KV cache of a video of any length."""

    @property
    def slow_preset(self) -> str:
        """FlowCache-slow of the same attention and passes."""
        return self.preset.replace("_fast", "_slow")

    def chosen(self, names: Iterable[str]) -> list[Method]:
        """Return methods by name and those that they are compared with, in the table's order."""
        wanted = {REFERENCE, *names}
        wanted |= {m.base for m in self.methods if m.name in wanted and m.base is not None}
        return [method for method in self.methods if method.name in wanted]


def comparison_of(name: str) -> Comparison:
    """Return a model's part of the comparison, by the name of its package."""
    return cast("Comparison", load_bench(name).COMPARISON)


@dataclass(frozen=True)
class Source:
    """What all methods are run with."""

    model: VideoModel
    checkpoint: str
    settings: tuple[str, ...]
    folder: Path
    """Where a run may write."""


def prepare_method(method: Method, source: Source, *, longer: str | None = None) -> Job:
    """Check a method's settings.

    Args:
        longer: what to change where nothing would be compressed; None: that is allowed.
    """
    overrides = [*source.settings, *method.overrides, "prompt=-"]
    request = Request(method.preset, source.checkpoint, overrides, str(source.folder))
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


class Probe(Protocol):
    """Follows a run and says more of its clip than every table does."""

    def follow(self, progress: Iterable[Progress], stats: RunStats, /) -> Iterable[Progress]:
        """Pass on what the run shows."""
        ...

    def figures(self, clip: Clip, /) -> Mapping[str, Any]:
        """Return figures of the clip."""
        ...


def render(
    job: Job,
    networks: Loaded,
    prompt: str,
    seed: int,
    *,
    noise: float = 0.0,
    probe: Probe | None = None,
) -> Clip:
    """Make a clip in memory.

    Args:
        noise: standard deviation of what is added to the run's noise, from the next seed.
    """
    job, stats = job.changed(prompt=prompt, seed=seed), RunStats(job.device)
    inputs = encode_inputs(job, stats=stats)
    draws = [seeded_noise(number, device=job.device) for number in (seed, seed + 1)]

    def disturbed(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        own, other = (draw(shape, dtype) for draw in draws)
        return own + noise * other

    shown = job.model.generate(
        networks.dit,
        networks.vae,
        job.config,
        inputs,
        stats=stats,
        work=job.work,
        draw=disturbed if noise else None,
    )
    return collect(shown if probe is None else probe.follow(shown, stats), stats)


# The clips of one process -------------------------------------------------------------------------

FIRST_SEED = 5000
MAX_PROMPTS = 99_999
"""Clips of a table."""

Prompts = Mapping[int, tuple[Attributes, int]]
"""Index of a clip -> what it shows, and its seed."""


def unseen_prompts(count: int) -> Prompts:
    """Return captions that the demos were not trained on, each with a seed of its own."""
    if not 1 <= count <= MAX_PROMPTS:
        raise UserError(f"--prompts must be in 1..{MAX_PROMPTS}, not {number(count)}")
    _, held_out = split_attributes()
    return {i: (held_out[i % len(held_out)], FIRST_SEED + i) for i in range(count)}


def parse_part(text: str) -> tuple[int, int]:
    """Turn `2/4` into (2, 4)."""
    part, _, num_parts = text.partition("/")
    if not (part.isdecimal() and num_parts.isdecimal() and 1 <= int(part) <= int(num_parts)):
        raise UserError(f"--part is {text!r}, but must be I/N with I in 1..N, as in 1/2")
    return int(part), int(num_parts)


def read_rows(folder: Path, *, own: Path | None = None) -> list[dict[str, Any]]:
    """Return the rows of all processes that share a folder.

    Args:
        own: log of this process, to which rows are added afterwards.
    """
    logs = sorted(folder.glob("rows-*.jsonl"))
    advice = "delete the line"
    return [row for log in logs for row in read_json_lines(log, advice=advice, repairs=log == own)]


def measure(
    clip: Clip,
    attributes: Attributes,
    *,
    reference: Tensor | None,
    base: Tensor | None,
    borders: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the figures of one clip.

    Args:
        reference: frames of the method that all are compared with; None: this is it.
        base: frames of the second method that this one is compared with, if there is one.
        borders: the first frame of each chunk but the first.
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
    if base is not None:
        row["drift"] = drift(clip.frames, base)
        row["seams"] = seams(clip.frames, base, borders=borders)
    if stats.device.type == "cuda":  # a process's own peak would be that of all methods so far
        row["peak_bytes"] = stats.peak_memory_bytes()
    return row


def render_missing(
    comparison: Comparison,
    methods: Sequence[Method],
    prompts: Prompts,
    *,
    source: Source,
    log: Path,
    probe_of: Callable[[Job, Attributes], Probe] | None = None,
) -> None:
    """Render and measure what the folder does not hold yet; every clip is a line of the log."""
    jobs = {
        method.name: prepare_method(method, source, longer=comparison.longer) for method in methods
    }
    settings = {name: json.loads(json.dumps(to_dict(job.config))) for name, job in jobs.items()}
    done: set[tuple[str, int]] = set()
    for row in read_rows(log.parent, own=log):
        name = row["method"]
        if name in settings and row["settings"] != settings[name]:
            raise UserError(
                f"{log.parent} holds rows of {name!r} with other settings: choose another --out"
            )
        done.add((name, row["index"]))
    loaded = dict[Hashable, Loaded]()
    with log.open("a", encoding="utf-8") as stream:
        for index, (attributes, seed) in prompts.items():
            missing = [m for m in methods if (m.name, index) not in done]
            needed = {REFERENCE, *(m.base for m in missing)} if missing else set()
            frames: dict[str, Tensor] = {}
            for method in methods:
                if method not in missing and method.name not in needed:
                    continue
                job = jobs[method.name]
                weights = source.model.identity(job)
                if weights not in loaded:
                    loaded[weights] = load(job)
                probe = None if probe_of is None else probe_of(job, attributes)
                clip = render(
                    job,
                    loaded[weights],
                    attributes.caption,
                    seed,
                    noise=method.noise,
                    probe=probe,
                )
                if method in missing:
                    figures = measure(
                        clip,
                        attributes,
                        reference=frames.get(REFERENCE),
                        base=None if method.base is None else frames[method.base],
                        borders=borders_of(jobs[method.name].work.segments),
                    )
                    figures |= {} if probe is None else probe.figures(clip)
                    row = {"method": method.name, "index": index, "seed": seed, **figures}
                    stream.write(json.dumps({**row, "settings": settings[method.name]}) + "\n")
                    stream.flush()
                if method.name in needed:
                    frames[method.name] = clip.frames
            sys.stderr.write(f"clip {index}: {attributes.caption}\n")


# Averages and tables ------------------------------------------------------------------------------


def summarize(rows: Sequence[Mapping[str, Any]], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Average the figures of each method over the prompts."""
    own = {m.name: [row for row in rows if row["method"] == m.name] for m in methods}
    table = {method.name: _average(method, own[method.name]) for method in methods}
    reference = statistics.fmean(row["dit_seconds"] for row in rows if row["method"] == REFERENCE)
    for row in table.values():
        row["speedup"] = reference / row["dit_seconds"]
        # a row without a base in the table is compared with itself
        base = table.get(row["base"] or row["method"], row)
        row["flops_share"] = row["gflops"] / base["gflops"]
        row["speedup_base"] = base["dit_seconds"] / row["dit_seconds"]
    return list(table.values())


def _average(method: Method, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def known(key: str) -> list[float]:
        return [row[key] for row in rows if row.get(key) is not None]

    def mean(key: str) -> float | None:
        return statistics.fmean(known(key)) if known(key) else None

    def standard_error(key: str) -> float | None:
        values = known(key)
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

    def num_equal(key: str) -> int:
        return sum(key in row and row[key] is None for row in rows)

    return {
        "method": method.name,
        "preset": method.preset,
        "overrides": list(method.overrides),
        "base": method.base,
        "group": None if method.group is None else asdict(method.group),
        "num_clips": len(rows),
        "gflops": statistics.fmean(known("flops")) / 1e9,
        "computed_share": mean("computed_share"),
        "num_compressions": mean("num_compressions"),
        "dit_seconds": statistics.fmean(known("dit_seconds")),
        "speedup": None,
        "judge_accuracy": mean("judge_all"),
        "judge": {
            key: statistics.fmean(row["judge"][key] for row in rows) for key in rows[0]["judge"]
        },
        **{f"{key}{of}": mean(f"{key}{of}") for of in ("", "_base") for key in ("psnr", "ssim")},
        **{f"psnr_error{of}": standard_error(f"psnr{of}") for of in ("", "_base")},
        # the PSNR of clips that are equal is in no mean
        **{f"num_equal{of}": num_equal(f"psnr{of}") for of in ("", "_base")},
    }


def markdown(table: Sequence[Mapping[str, Any]], *, base_label: str) -> str:
    """Return the averages as a Markdown table."""
    lines = [
        "| method | GFLOP | computed | DiT s | DiT speed-up | judge | PSNR, dB | SSIM "
        f"| PSNR ({base_label}) | SSIM ({base_label}) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        cells: list[str] = [
            escaped(row["method"]),
            f"{row['gflops']:.0f}",
            f"{100 * row['computed_share']:.0f} %",
            f"{row['dit_seconds']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{100 * row['judge_accuracy']:.0f} %",
        ]
        for of in ("", "_base"):
            is_equal = row[f"num_equal{of}"] == row["num_clips"]
            cells.append("equal" if is_equal else shown(row[f"psnr{of}"], ".2f"))
            cells.append(shown(row[f"ssim{of}"], ".3f"))
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


def reuse_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the averages of the table of reuse rules for people.

    FLOPs share, speed-up, PSNR and SSIM are against the row of the same attention and passes that
    computes every step; the last column is against vanilla.
    """
    head = ["method", "FLOPs", "GFLOP", "DiT s", "DiT speed-up", "judge"]
    head += ["PSNR, dB", "SSIM", "PSNR (vanilla)"]
    lines = [table_row(head), "|" + "---|" * len(head)]
    for row in table:
        is_equal = row["num_equal_base"] == row["num_clips"]
        error = "" if row["psnr_error_base"] is None else f" ± {row['psnr_error_base']:.2f}"
        decibel = "-" if row["psnr_base"] is None else f"{row['psnr_base']:.2f}{error}"
        cells = [
            escaped(row["method"]),
            f"{100 * row['flops_share']:.1f} %",
            f"{row['gflops']:.1f}",
            f"{row['dit_seconds']:.2f}",
            f"{row['speedup_base']:.2f}x",
            f"{100 * row['judge_accuracy']:.0f} %",
            "equal" if is_equal else decibel,
            shown(row["ssim_base"], ".3f"),
            shown(row["psnr"], ".2f"),
        ]
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


def csv_text(table: Sequence[Mapping[str, Any]]) -> str:
    """Return every figure of the averages, a row per method, numbers in full."""
    rows = [
        {
            **{key: value for key, value in row.items() if key not in ("group", "judge")},
            "overrides": " ".join(row.get("overrides", ())),
            **{f"judge_{key}": share for key, share in row["judge"].items()},
        }
        for row in table
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return csv_of([names, *([row.get(name) for name in names] for row in rows)])


def shown(value: float | None, spec: str) -> str:
    """Return a number as a cell, or a dash where there is none."""
    return "-" if value is None else format(value, spec)
