#!/usr/bin/env python
"""Collect VBench's results into one small JSON: `collect.py RESULTS OUT`.

Runs in VBench's environment, so it uses the standard library alone. RESULTS holds a folder per
dimension with `*_eval_results.json`, `{dimension: [score, [per video ...]]}`, score in 0..1. The
mean over dimensions is a plain one: VBench's own total weighs and rescales them.
"""

import json
import os
import sys
from pathlib import Path


def collect(results: Path) -> dict[str, float]:
    """Return the score of each dimension; the newest file counts.

    Raises:
        ValueError: there is none, or a score is outside 0..1.
    """
    scores: dict[str, float] = {}
    paths = sorted(results.glob("*/*_eval_results.json"), key=lambda path: path.stat().st_mtime)
    for path in paths:
        for dimension, result in json.loads(path.read_text(encoding="utf-8")).items():
            score = float(result[0])
            if not 0 <= score <= 1:
                raise ValueError(f"{path}: {dimension} is {score}, but must be in 0..1")
            scores[dimension] = score
    if not scores:
        raise ValueError(f"{results}: holds no */*_eval_results.json")
    return scores


def main() -> int:
    """Run the command line; return the exit code."""
    if len(sys.argv) != 3:
        sys.stderr.write("usage: python collect.py RESULTS OUT.json\n")
        return 2
    results, out = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        scores = collect(results)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    content = {
        "schema_version": 1,
        "mean_percent": 100 * sum(scores.values()) / len(scores),
        "dimensions": dict(sorted(scores.items())),
    }
    part = out.with_name(f".{out.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
