#!/usr/bin/env python
"""Compare videos with reference videos of the same prompts and seeds: PSNR, SSIM, LPIPS.

A and B are two clips, or two folders whose clips are matched by name without suffix. A clip is a
video, an .npy or .npz of uint8 pixels [T, H, W, 3], or a folder of PNG files. Published figures
are of decoded mp4 files, so they hold the codec's noise; compare arrays or PNG files to leave it
out.

Per frame and per clip: PSNR of one mean squared error over the whole clip, SSIM with data range 1,
LPIPS as the mean of AlexNet's spatial map. Over clips: the mean and its 95 % confidence interval
by Student's t.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

import torch
from tqdm import tqdm

from flowcache.errors import UserError
from flowcache.runtime.cli import Parser, choose_device, run_command
from flowcache.runtime.files import check_writable, write_json, write_text
from flowcache.runtime.lpips import BACKBONE_DIGEST, LPIPS, find_weights, load_lpips
from flowcache.runtime.metrics import (
    CONFIDENCE,
    METRICS,
    ClipFigures,
    average,
    compare_clips,
    worst_frames,
)
from flowcache.runtime.stats import environment
from flowcache.runtime.text_files import escaped, table_row
from flowcache.runtime.video import is_clip, list_clips

EXIT_SOME_FAILED = 1
FILES = ("compare.json", "compare.csv", "compare.md")
UNITS = {"psnr": "PSNR dB", "ssim": "SSIM", "lpips": "LPIPS"}
DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4}

EXAMPLES = """examples:
  python scripts/compare.py flowcache.mp4 vanilla.mp4
  python scripts/compare.py result/flowcache result/vanilla --out result/compare
  python scripts/compare.py flowcache.npy vanilla.npy --metrics psnr,ssim --device cpu
  python scripts/compare.py flowcache.mp4 vanilla.mp4 --lpips-weights weights/

LPIPS needs the weights of AlexNet, alexnet-owt-7be5be79.pth: in torch's cache, or where
--lpips-weights says. Nothing is downloaded. --out writes compare.json (everything), compare.csv
(a row per frame, and one whose frame is "all" per clip) and compare.md (the table).

Exit code: 0; 1 if some clips of two folders could not be compared; 2 if something given is wrong.
"""


@dataclass(frozen=True)
class Network:
    """What computes LPIPS, or why there is none."""

    network: LPIPS | None
    digests: dict[str, str]
    note: str
    """One line for people; empty: nothing to say."""


@dataclass(frozen=True)
class Report:
    """All results of a comparison."""

    metrics: tuple[str, ...]
    clips: list[ClipFigures]
    failures: dict[str, str]
    """Clip -> why it could not be compared."""
    network: Network
    num_worst: int


def make_network(metrics: Sequence[str], weights: Path | None, *, device: torch.device) -> Network:
    """Load what computes LPIPS if that is asked for.

    Raises:
        UserError: weights were named but can't be used, or LPIPS alone was asked for.
    """
    if "lpips" not in metrics:
        return Network(None, {}, "")
    try:
        found = find_weights(weights)
    except UserError as error:
        if weights is not None or len(metrics) == 1:
            raise
        return Network(None, {}, f"LPIPS is empty: {error}")
    digests = found.digests()
    note = ""
    if not digests["backbone"].startswith(BACKBONE_DIGEST):
        note = (
            f"LPIPS is not comparable with published values: {found.backbone} is not the released "
            f"AlexNet, whose SHA-256 starts with {BACKBONE_DIGEST}"
        )
    return Network(load_lpips(found, device=device), digests, note)


def match(ours: Path, reference: Path) -> tuple[dict[str, tuple[Path, Path]], dict[str, str]]:
    """Return the pairs to compare by name, and why others have none.

    Raises:
        UserError: one is a clip and the other a folder of clips, or something is missing.
    """
    for path in (ours, reference):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    is_single = [not path.is_dir() or is_clip(path) for path in (ours, reference)]
    if all(is_single):
        return {ours.stem if ours.is_file() else ours.name: (ours, reference)}, {}
    if any(is_single):
        raise UserError(f"{ours} and {reference}: compare two clips or two folders of clips")
    first, second = list_clips(ours), list_clips(reference)
    pairs = {name: (path, second[name]) for name, path in first.items() if name in second}
    failures = {name: f"{name}: not in {reference}" for name in first if name not in second}
    failures |= {name: f"{name}: not in {ours}" for name in second if name not in first}
    return pairs, failures


def header(metrics: Sequence[str]) -> list[str]:
    """Return the heads of the table's columns."""
    return ["clip", "frames", *(UNITS[metric] for metric in metrics)]


def table(report: Report) -> list[list[str]]:
    """Return the table's rows: every clip, the mean, its confidence interval."""
    rows = [
        [clip.name, str(clip.num_frames), *(shown(clip.clip.get(m), m) for m in report.metrics)]
        for clip in report.clips
    ]
    means, intervals = ["mean", ""], [f"{CONFIDENCE:.0%} interval", ""]
    for metric in report.metrics:
        over = average(clip.clip[metric] for clip in report.clips if metric in clip.clip)
        means.append(shown(over.mean, metric))
        intervals.append("-" if over.half_width is None else "± " + shown(over.half_width, metric))
    return [*rows, means, intervals]


def shown(value: float | None, metric: str) -> str:
    """Write a value of a metric, `-` if there is none."""
    return "-" if value is None else f"{value:.{DIGITS[metric]}f}"


def notes(report: Report) -> list[str]:
    """Return what people should know beside the table."""
    lines = [f"note: {report.network.note}"] if report.network.note else []
    if "psnr" in report.metrics:
        equal = average(clip.clip["psnr"] for clip in report.clips).num_infinite
        if equal:
            lines.append(
                f"note: {equal} of {len(report.clips)} clips equal their references: their PSNR is "
                "infinite and left out of the mean"
            )
    lines += dict.fromkeys(f"ALARM {alarm}" for clip in report.clips for alarm in clip.alarms)
    for metric in measured(report):
        worst = worst_frames(report.clips, metric, count=report.num_worst)
        frames = ", ".join(f"{f.clip} #{f.index} {shown(f.value, metric)}" for f in worst)
        lines.append(f"worst {UNITS[metric]}: {frames}")
    return lines


def measured(report: Report) -> list[str]:
    """Return the metrics that have values."""
    return [m for m in report.metrics if report.clips and m in report.clips[0].clip]


def text_table(report: Report) -> str:
    """Return the table for a terminal."""
    rows = [header(report.metrics), *table(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([*lines, *notes(report)])


def markdown(report: Report) -> str:
    """Return the table and the notes as Markdown."""
    head = header(report.metrics)
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *table(report)]
    lines = [table_row(map(escaped, row)) for row in rows]
    bullets = [f"- {escaped(line)}" for line in notes(report)]
    bullets += [f"- not compared: {escaped(reason)}" for reason in report.failures.values()]
    return "\n".join([*lines, "", *bullets]) + "\n"


def csv_text(report: Report) -> str:
    """Return a row per frame and one per clip."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["clip", "frame", *report.metrics])
    for clip in report.clips:
        for index in range(clip.num_frames):
            values = [clip.frames[m][index] if m in clip.frames else "" for m in report.metrics]
            writer.writerow([clip.name, index, *values])
        writer.writerow([clip.name, "all", *(clip.clip.get(m, "") for m in report.metrics)])
    return stream.getvalue()


def to_dict(report: Report, paths: Sequence[Path], *, device: torch.device) -> dict[str, Any]:
    """Return everything as plain values for JSON; an infinite PSNR is the text `inf`."""
    averages: dict[str, Any] = {}
    for metric in measured(report):
        over = average(clip.clip[metric] for clip in report.clips)
        averages[metric] = {**vars(over), "method": f"Student's t, {CONFIDENCE:.0%}"}
    return {
        "schema_version": 1,
        "inputs": [str(path) for path in paths],
        "metrics": list(report.metrics),
        "averages": averages,
        "worst": {
            metric: [
                [frame.clip, frame.index, finite(frame.value)]
                for frame in worst_frames(report.clips, metric, count=report.num_worst)
            ]
            for metric in measured(report)
        },
        "clips": {
            clip.name: {
                "num_frames": clip.num_frames,
                "alarms": list(clip.alarms),
                "clip": {metric: finite(value) for metric, value in clip.clip.items()},
                "frames": {m: [finite(value) for value in v] for m, v in clip.frames.items()},
            }
            for clip in report.clips
        },
        "failures": report.failures,
        "lpips": {"sha256": report.network.digests, "note": report.network.note},
        "environment": environment(device),
    }


def finite(value: float) -> float | str:
    """Return a number that JSON can hold, or its name."""
    return value if abs(value) != float("inf") else str(value)


def parse_metrics(text: str) -> tuple[str, ...]:
    """Turn `psnr,ssim` into a tuple.

    Raises:
        UserError: there is none, or one is unknown or given twice.
    """
    names = tuple(text.split(","))
    if len(set(names)) != len(names) or not set(names) <= set(METRICS):
        raise UserError(f"--metrics is {text!r}, but must be some of {','.join(METRICS)}")
    return names


def execute(options: argparse.Namespace) -> int:
    """Compare, print, write; return the exit code."""
    metrics = parse_metrics(options.metrics)
    if options.worst < 1:
        raise UserError(f"--worst must be 1 or more, not {options.worst}")
    out: Path | None = options.out
    if out is not None:
        check_writable(out)
        there = [out / name for name in FILES if (out / name).exists()]
        if there and not options.overwrite:
            raise UserError(f"{there[0]} exists and is kept: choose another --out, or --overwrite")
    device = choose_device(options.device)
    pairs, failures = match(options.a, options.b)
    is_folder = options.a.is_dir() and not is_clip(options.a)
    network = make_network(metrics, options.lpips_weights, device=device)
    computed = [m for m in metrics if m != "lpips" or network.network is not None]
    clips: list[ClipFigures] = []
    for name, (path, reference) in tqdm(pairs.items(), unit="clip", disable=None):
        try:
            clips.append(
                compare_clips(
                    path,
                    reference,
                    name=name,
                    metrics=computed,
                    network=network.network,
                    device=device,
                )
            )
        except UserError as error:
            if not is_folder:
                raise
            failures[name] = str(error)
    report = Report(metrics, clips, failures, network, options.worst)
    print(text_table(report) if clips else "no clip could be compared")
    if out is not None:
        write_json(out / FILES[0], to_dict(report, (options.a, options.b), device=device))
        write_text(out / FILES[1], csv_text(report))
        write_text(out / FILES[2], markdown(report))
    for reason in failures.values():
        sys.stderr.write(f"not compared: {reason}\n")
    return EXIT_SOME_FAILED if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(
        prog="python scripts/compare.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", type=Path, help="clip or folder of clips to judge")
    parser.add_argument("b", metavar="B", type=Path, help="reference clip or folder")
    parser.add_argument("--metrics", default=",".join(METRICS), help="default: psnr,ssim,lpips")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--lpips-weights", type=Path, metavar="PATH", help="AlexNet's file, or its folder"
    )
    parser.add_argument("--worst", type=int, default=3, metavar="N", help="worst frames named")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for {', '.join(FILES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    options = parser.parse_args(arguments)
    codes: list[int] = []
    return run_command(lambda: codes.append(execute(options))) or codes[0]


if __name__ == "__main__":
    sys.exit(main())
