#!/usr/bin/env python
"""Compare every caching method on the demo checkpoint: cost, speed, quality, in one run.

Each prompt is rendered with every method before the next prompt, so that a machine whose speed
drifts slows all methods alike. Results are kept row by row; a second start with the same --out goes
on where the first one stopped.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowcache.cli import run_command
from flowcache.demo.clips import Attributes, split_attributes
from flowcache.demo.judge import judge
from flowcache.errors import UserError
from flowcache.files import check_writable, write_json
from flowcache.metrics import psnr, ssim
from flowcache.stats import RunStats, environment
from flowcache.video import to_uint8
from skyreels_v2.pipeline import generate
from skyreels_v2.run import Job, Models, Request, encode_inputs, load_models, prepare

FIRST_SEED = 5000
REFERENCE = "vanilla"
REFERENCES = (REFERENCE, "vanilla-causal")
"""Methods that the others are compared with; they are rendered first."""
BEST = ("reuse.predict=velocity", "reuse.extrapolate=0.5")
"""The predictor that serves best on the demo, beside the published one (block residual)."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    preset: str
    overrides: tuple[str, ...] = ()


def with_predictors(name: str, preset: str, *overrides: str) -> list[Method]:
    """Return a method with the published predictor and with the best one."""
    return [
        Method(f"{name}, residual", preset, overrides),
        Method(f"{name}, velocity + 0.5", preset, (*overrides, *BEST)),
    ]


METHODS = (
    Method(REFERENCE, "vanilla"),
    Method(REFERENCES[1], "vanilla_causal"),
    *with_predictors("TeaCache-slow", "teacache_slow"),
    *with_predictors("TeaCache-fast", "teacache_fast"),
    *with_predictors("TeaCache, causal (FlowCache-fast's FLOPs)", "teacache_causal"),
    *with_predictors("FlowCache-slow", "flowcache_slow"),
    *with_predictors("FlowCache-fast", "flowcache_fast"),
    *with_predictors("FlowCache-slow + KV compression", "flowcache_kvcompress"),
    *with_predictors("stride (FlowCache-fast's FLOPs)", "stride"),
)


def render(job: Job, models: Models) -> tuple[Tensor, RunStats]:
    """Make one clip in memory: uint8 `[T, H, W, 3]` and what it cost."""
    stats = RunStats(job.device)
    conditioning = encode_inputs(job, stats=stats)
    parts = [
        to_uint8(progress.frames)
        for progress in generate(models.dit, models.vae, job.config, conditioning, stats=stats)
        if progress.frames is not None
    ]
    return torch.cat(parts), stats


def measure(
    frames: Tensor, stats: RunStats, attributes: Attributes, references: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the figures of one clip."""
    agrees = judge(frames.numpy()).agrees(attributes)
    times = stats.stage_times()
    row: dict[str, Any] = {
        "flops": stats.computed_flops,
        "dit_seconds": times["dit"].seconds,
        "vae_seconds": times["vae"].seconds,
        "computed_share": stats.num_computed / (stats.num_computed + stats.num_reused),
        "judge": agrees,
        "judge_all": all(agrees.values()),
    }
    for name, reference in references.items():
        value = psnr(frames, reference)
        row[f"psnr_{name}"] = value if math.isfinite(value) else None
        row[f"ssim_{name}"] = ssim(frames, reference)
    return row


def run_all(
    methods: Sequence[Method],
    prompts: Mapping[int, tuple[Attributes, int]],
    *,
    model: str,
    settings: Sequence[str],
    log: Path,
) -> None:
    """Render and measure what the log does not hold yet."""
    rows = read_rows([log] if log.is_file() else [])
    done = {(row["method"], row["index"]) for row in rows}
    jobs = {
        method.name: prepare(
            Request(
                method.preset, model, [*settings, *method.overrides, "prompt=-"], str(log.parent)
            )
        )
        for method in methods
    }
    models = load_models(jobs[REFERENCE], stats=RunStats(jobs[REFERENCE].device))
    with log.open("a") as stream:
        for index, (attributes, seed) in prompts.items():
            missing = [m for m in methods if (m.name, index) not in done]
            if not missing:
                continue
            references: dict[str, Tensor] = {}
            for method in [m for m in methods if m in missing or m.name in REFERENCES]:
                job = jobs[method.name]
                config = replace(job.config, prompt=attributes.caption, seed=seed)
                frames, stats = render(replace(job, config=config), models)
                if method.name in REFERENCES:
                    references[method.name] = frames
                if method in missing:
                    figures = measure(frames, stats, attributes, references)
                    row = {"method": method.name, "index": index, "seed": seed, **figures}
                    stream.write(json.dumps(row) + "\n")
                    stream.flush()
            sys.stderr.write(f"clip {index}: {attributes.caption}\n")


def read_rows(logs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows of some logs."""
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def summarize(rows: Sequence[Mapping[str, Any]], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Average the figures of each method over the prompts."""
    by_method = {m.name: [row for row in rows if row["method"] == m.name] for m in methods}
    base_seconds = statistics.fmean(row["dit_seconds"] for row in by_method[REFERENCE])
    return [_average(name, own, base_seconds) for name, own in by_method.items()]


def _average(name: str, rows: Sequence[Mapping[str, Any]], base_seconds: float) -> dict[str, Any]:
    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if row.get(key) is not None]
        return statistics.fmean(values) if values else None

    seconds = statistics.fmean(row["dit_seconds"] for row in rows)
    attributes = rows[0]["judge"]
    summary: dict[str, Any] = {
        "method": name,
        "num_clips": len(rows),
        "gflops": statistics.fmean(row["flops"] for row in rows) / 1e9,
        "computed_share": mean("computed_share"),
        "dit_seconds": seconds,
        "speedup": base_seconds / seconds,
        "judge_accuracy": statistics.fmean(float(row["judge_all"]) for row in rows),
        "judge": {
            key: statistics.fmean(float(row["judge"][key]) for row in rows) for key in attributes
        },
    }
    for reference in REFERENCES:
        summary[f"psnr_{reference}"] = mean(f"psnr_{reference}")
        summary[f"ssim_{reference}"] = mean(f"ssim_{reference}")
    return summary


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the averages as a Markdown table."""
    lines = [
        "| method | GFLOPs | computed | DiT s | speed-up | judge | PSNR | SSIM | PSNR (causal) "
        "| SSIM (causal) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        cells: list[str] = [
            row["method"],
            _shown(row["gflops"], ".0f"),
            _shown(100 * row["computed_share"], ".0f") + " %",
            _shown(row["dit_seconds"], ".2f"),
            _shown(row["speedup"], ".2f") + "x",
            _shown(100 * row["judge_accuracy"], ".0f") + " %",
        ]
        for reference in REFERENCES:
            cells += [
                _shown(row[f"psnr_{reference}"], ".2f"),
                _shown(row[f"ssim_{reference}"], ".3f"),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def unseen_prompts(count: int) -> dict[int, tuple[Attributes, int]]:
    """Return captions that the demo was not trained on, each with a seed of its own."""
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


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python scripts/bench_demo.py --prompts 16 --out result/bench\n"
        "  python scripts/bench_demo.py --prompts 64 --out result/judge --methods vanilla",
    )
    parser.add_argument("--model", default="demo", help="checkpoint (default: demo)")
    parser.add_argument("--prompts", type=int, default=16, help="clips per method (default: 16)")
    parser.add_argument("--out", type=Path, default=Path("result/bench_demo"), help="result folder")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help=f"rows of the table (default: all): {'; '.join(m.name for m in METHODS)}",
    )
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="render every N-th clip only, from the I-th: several processes share the work, the "
        "last one to finish writes the table",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all methods")
    options = parser.parse_args()

    def command() -> None:
        if options.prompts < 1:
            raise UserError(f"--prompts must be 1 or more, not {options.prompts}")
        check_writable(options.out)
        names = options.methods or [method.name for method in METHODS]
        unknown = set(names) - {method.name for method in METHODS}
        if unknown:
            raise UserError(f"--methods: {unknown.pop()!r} is no row of the table: see --help")
        methods = [m for m in METHODS if m.name in (REFERENCE, *names)]
        part, num_parts = parse_part(options.part)
        prompts = unseen_prompts(options.prompts)
        run_all(
            methods,
            {i: prompt for i, prompt in prompts.items() if i % num_parts == part - 1},
            model=options.model,
            settings=options.settings,
            log=options.out / f"rows-{part}.jsonl",
        )
        rows = read_rows(sorted(options.out.glob("rows-*.jsonl")))
        if len(rows) < len(methods) * len(prompts):
            print(f"{len(rows)} clips are there: the other parts are still missing")
            return
        table = summarize(rows, methods)
        report: dict[str, Any] = {
            "command": " ".join(["python", *sys.argv]),
            "environment": environment(torch.device("cpu")),
            "table": table,
        }
        write_json(options.out / "table.json", report)
        (options.out / "table.md").write_text(markdown(table))
        print(markdown(table))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
