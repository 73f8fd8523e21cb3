"""Make tiny videos in one of several processes: `python parallel_runs.py CASES FOLDER LAYOUT...`.

CASES is a JSON file: `model`, and `kinds` of `checkpoint`, `preset`, `common` settings, `cases`
(name -> settings), the `recorded` case, and whether `has_branches`; kinds without them are not made
in layouts with several branch groups. A layout is "2x1", branch groups by sequence ranks. What came
out is written to FOLDER/RANK.pt, and a video of each recorded case with its record is made there.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowcache.runtime.ending import Place
from flowcache.runtime.model import Request, VideoModel, load_model
from flowcache.runtime.parallel import PATIENCE, Layout, Ranks, process_group
from flowcache.runtime.run import encode_inputs, load_networks, prepare, read_settings, run
from flowcache.runtime.stats import RunStats


def main() -> None:
    path, folder, *layouts = sys.argv[1:]
    given = json.loads(Path(path).read_text())
    model = load_model(given["model"])
    with torch.no_grad(), process_group(Place.of(os.environ), timeout=PATIENCE) as ranks:
        made: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for shown in layouts:
            layout = Layout(*map(int, shown.split("x")))
            layout_ranks = replace(ranks, layout=layout)
            divided = layout_ranks.divided(torch.device("cpu"))
            for name, kind in given["kinds"].items():
                if layout.branch > 1 and not kind["has_branches"]:
                    continue
                made[name, shown] = make_videos(model, kind, divided)
                if recorded := kind["recorded"]:
                    request = request_of(kind, f"{folder}/{shown}.mp4", layout)
                    run(prepare(model, request, ranks))
                    made[name, shown][recorded]["request"] = request
        torch.save(made, Path(folder) / f"{ranks.place.rank}.pt")


def request_of(kind: dict[str, Any], out: str, layout: Layout) -> Request:
    """Return the request for a run with a record."""
    parallel = [f"parallel.branch={layout.branch}", f"parallel.sequence={layout.sequence}"]
    overrides = [*kind["common"], *kind["cases"][kind["recorded"]], *parallel]
    return Request(kind["preset"], kind["checkpoint"], overrides, out, record=True)


def make_videos(model: VideoModel, kind: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    request = Request(kind["preset"], kind["checkpoint"], kind["common"], "unused.mp4")
    job = prepare(model, request)
    stats = RunStats(job.device)
    inputs, models = encode_inputs(job, stats=stats), load_networks(job, stats=stats)
    results: dict[str, Any] = {}
    for name, settings in kind["cases"].items():
        asked = replace(request, overrides=[*kind["common"], *settings])
        config = read_settings(model, asked, job.source)
        stats = RunStats(job.device)
        shown = model.generate(models.dit, models.vae, config, inputs, stats=stats, ranks=ranks)
        frames = [progress.frames for progress in shown if progress.frames is not None]
        results[name] = {
            "frames": torch.cat(frames, dim=1),
            "flops": (stats.computed_flops, stats.flops_without_reuse),
            "computed": [p[:6] for p in stats.passes],
        }
    return results


if __name__ == "__main__":
    main()
