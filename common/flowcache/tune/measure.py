"""Calibrate on clips of a model and measure methods on it, row by row."""

import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowcache.runtime.metrics import PIXEL_MAX
from flowcache.runtime.stats import RunStats
from flowcache.tune.gap import ErrorModel, Predictor
from flowcache.tune.gram import Calibration, GramCollector, Sketch, merge
from flowcache.tune.methods import OWN_SIGNAL, REFERENCE, Method
from flowcache.tune.plan import Constraints, Plan
from flowcache.tune.rows import Rows
from flowcache.tune.runs import Runs

SKETCH_SEED = 0


@dataclass(frozen=True)
class Prompt:
    """What one clip shows, with its noise."""

    index: int
    text: str
    seed: int


def calibrate(
    runs: Runs, rows: Rows, prompts: Sequence[Prompt]
) -> tuple[Calibration, list[tuple[int, float]]]:
    """Record the clips that were not recorded yet.

    Returns:
        the mean inner products of the guided velocities, and the distances of the chunks' content
        as (own step, distance).
    """
    width = runs.size().sketch_width
    sketch = None if width is None else Sketch(width, seed=SKETCH_SEED)
    for prompt in prompts:
        if not rows.find(kind="calibration", index=prompt.index):
            _record(runs, rows, prompt, sketch)
    found = [rows.find(kind="calibration", index=prompt.index)[0] for prompt in prompts]
    parts = [Calibration.load(rows.folder / row["file"]) for row in found]
    return merge(parts), [(step, value) for row in found for step, value in row["distances"]]


def _record(runs: Runs, rows: Rows, prompt: Prompt, sketch: Sketch | None) -> None:
    collector = GramCollector(runs.size().num_steps, runs.size().branches, sketch=sketch)
    clip = runs.render(
        (*OWN_SIGNAL, *runs.words.content),
        prompt=prompt.text,
        seed=prompt.seed,
        observe=collector.observe,
    )
    path = rows.folder / f"calibration-{prompt.index:03d}.npz"
    part = path.with_name(f".{path.stem}.part.npz")
    collector.finish().save(part)
    os.replace(part, path)
    rows.add(
        {
            "kind": "calibration",
            "index": prompt.index,
            "file": path.name,
            "distances": [
                (row.step, row.distance) for row in clip.stats.passes if row.distance is not None
            ],
        }
    )
    sys.stderr.write(f"calibrated on clip {prompt.index + 1}: {prompt.text}\n")


def measure(
    runs: Runs, rows: Rows, prompts: Sequence[Prompt], methods: Sequence[Method], *, kind: str
) -> dict[str, list[dict[str, Any]]]:
    """Make the clips that were not made yet, each method against the reference of its clip.

    Returns:
        method -> its rows, one per prompt; the reference among them.
    """
    names = [REFERENCE, *(method.name for method in methods)]
    for prompt in prompts:
        done = {row["method"] for row in rows.find(kind=kind, index=prompt.index)}
        missing = [method for method in methods if method.name not in done]
        if not missing and REFERENCE in done:
            continue
        reference = runs.render(OWN_SIGNAL, prompt=prompt.text, seed=prompt.seed)
        if REFERENCE not in done:
            row = _costs(reference.stats, reference.stats)
            row["increments"] = _increments(reference.stats)
            rows.add({"kind": kind, "index": prompt.index, "method": REFERENCE, **row})
        for method in missing:
            clip = runs.render(
                method.settings, prompt=prompt.text, seed=prompt.seed, preset=method.preset
            )
            mse = squared_error(clip.frames, reference.frames)
            rows.add(
                {
                    "kind": kind,
                    "index": prompt.index,
                    "method": method.name,
                    "mse": mse,
                    "psnr": 10 * math.log10(PIXEL_MAX**2 / mse) if mse else None,
                    **_costs(clip.stats, reference.stats),
                }
            )
        sys.stderr.write(f"{kind}: {len(missing)} methods on clip {prompt.index + 1}\n")
    wanted = {prompt.index for prompt in prompts}
    return {
        name: [row for row in rows.find(kind=kind, method=name) if row["index"] in wanted]
        for name in names
    }


def squared_error(frames_THW3: Tensor, reference_THW3: Tensor) -> float:
    """Return the mean squared error of two clips, in pixel levels."""
    return (frames_THW3.double() - reference_THW3.double()).square().mean().item()


def random_plans(
    model: ErrorModel, *, count: int, constraints: Constraints, seed: int
) -> list[Plan]:
    """Return random plans that compute a quarter to 60 % of the steps, half of them with trend."""
    draw, num_steps, plans = random.Random(seed), model.num_steps, list[Plan]()
    while len(plans) < count:
        size = draw.randint(max(num_steps // 4, 2), max(num_steps * 6 // 10, 3))
        inner = sorted(draw.sample(range(1, num_steps - 1), size - 2))
        steps = (0, *inner, num_steps - 1)
        if constraints.allow(steps, num_steps=num_steps):
            predictor = Predictor(1, 0.5) if len(plans) % 2 else Predictor(0)
            plans.append(Plan(steps, predictor, model.plan(steps, predictor)))
    return plans


def _costs(stats: RunStats, reference: RunStats) -> dict[str, Any]:
    return {
        "flops": stats.computed_flops / reference.computed_flops,
        "seconds": stats.stage_times()["dit"].seconds,
        "computed": stats.num_computed / (stats.num_computed + stats.num_reused),
    }


def _increments(stats: RunStats) -> list[list[float]]:
    """Return what each own step of each chunk adds to an accumulator, from the second step on."""
    branch = stats.passes[0].branch
    chunks: dict[tuple[int, int], list[float]] = {}
    for row in stats.passes:
        if row.branch == branch and row.accumulated is not None:
            chunks.setdefault((row.segment, row.chunk), []).append(row.accumulated)
    return list(chunks.values())
