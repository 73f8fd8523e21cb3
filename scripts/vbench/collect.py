#!/usr/bin/env python
"""Collect VBench's results into one small JSON: `collect.py RESULTS OUT DIMENSION...`.

Runs in VBench's environment, so it uses the standard library alone. RESULTS holds a folder per
dimension with what VBench 0.1.5 writes at each evaluation:

    results_TIME_eval_results.json   {dimension: [score, [{"video_path": ..., "video_results": ...},
                                     ...]]}, score in 0..1
    results_TIME_full_info.json      [{"prompt_en": ..., "video_list": [...]}, ...]

The mean over dimensions is a plain one: VBench's own total weighs and rescales them. VBench only
warns where a prompt has no video; here that is an error, since the score would be of other prompts.
"""

import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULT, PROMPTS = "_eval_results.json", "_full_info.json"
DEVIATIONS_95 = statistics.NormalDist().inv_cdf(0.975)
"""Half a 95 % interval in standard errors."""


def collect(results: Path, dimensions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return score, prompts and videos of each dimension; the newest evaluation counts.

    Raises:
        ValueError: one is missing or incomplete, or a score is outside 0..1.
    """
    return {dimension: read_dimension(results / dimension, dimension) for dimension in dimensions}


def read_dimension(folder: Path, dimension: str) -> dict[str, Any]:
    """Return what the newest evaluation in a folder says of a dimension.

    Raises:
        ValueError: there is none, a prompt has no video, or the score is outside 0..1.
    """
    paths = sorted(folder.glob(f"*{RESULT}"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise ValueError(f"{folder}: holds no *{RESULT}: evaluate {dimension}")
    path = paths[-1]
    prompts = json.loads(
        path.with_name(path.name.removesuffix(RESULT) + PROMPTS).read_text(encoding="utf-8")
    )
    counts = [len(prompt["video_list"]) for prompt in prompts]
    empty = [prompt["prompt_en"] for prompt in prompts if not prompt["video_list"]]
    if empty:
        raise ValueError(
            f"{path}: {len(empty)} of {len(prompts)} prompts of {dimension} have no video, as in "
            f"{empty[0]!r}: make them, or leave the dimension out"
        )
    mean, videos = json.loads(path.read_text(encoding="utf-8"))[dimension]
    score = float(mean)
    if not 0 <= score <= 1:
        raise ValueError(f"{path}: {dimension} is {score}, but must be in 0..1")
    return {
        "score": score,
        "half_interval_95": half_interval(prompts, videos),
        "num_prompts": len(prompts),
        "num_videos": sum(counts),
    }


def half_interval(
    prompts: Sequence[Mapping[str, Any]], videos: Sequence[Mapping[str, Any]]
) -> float | None:
    """Return half the 95 % interval of a score over prompts, each with the mean of its videos.

    None: fewer than two prompts, or the dimension has no number per video.
    """
    values = {Path(video["video_path"]).name: video.get("video_results") for video in videos}
    means: list[float] = []
    for prompt in prompts:
        own = [values.get(Path(path).name) for path in prompt["video_list"]]
        numbers = [float(value) for value in own if isinstance(value, bool | int | float)]
        if len(numbers) != len(own):
            return None
        means.append(statistics.fmean(numbers))
    if len(means) < 2:
        return None
    return DEVIATIONS_95 * statistics.stdev(means) / math.sqrt(len(means))


def main() -> int:
    """Run the command line; return the exit code."""
    if len(sys.argv) < 4:
        sys.stderr.write("usage: python collect.py RESULTS OUT.json DIMENSION...\n")
        return 2
    results, out, dimensions = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    try:
        found = collect(results, dimensions)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        sys.stderr.write(f"error: {type(error).__name__}: {error}\n")
        return 2
    halves = [each["half_interval_95"] for each in found.values()]
    known = None not in halves
    content = {
        "schema_version": 3,
        "mean_percent": 100 * sum(each["score"] for each in found.values()) / len(found),
        # dimensions taken as independent
        "half_interval_95_percent": 100 * math.hypot(*halves) / len(found) if known else None,
        "dimensions": dict(sorted(found.items())),
    }
    part = out.with_name(f".{out.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, out)
    for dimension, each in found.items():
        half = each["half_interval_95"]
        spread = "" if half is None else f" +- {100 * half:.2f}"
        print(f"{dimension}: {100 * each['score']:.2f}{spread} % ({each['num_prompts']} prompts)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
