"""Make tiny clips in one of several processes: `python parallel_runs.py MODEL FOLDER LAYOUT...`.

MODEL is a folder that holds the checkpoints "distilled" and "base". A layout is "2x1", branch
groups by sequence ranks; those with branches are for "base" alone. What came out is written to
FOLDER/RANK.pt, and a clip of "base" in each layout with its record is made there.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from flowcache.launch import Place
from flowcache.runtime.model import Request
from flowcache.runtime.parallel import PATIENCE, Layout, Ranks, process_group
from flowcache.runtime.run import encode_inputs, load_networks, prepare, read_settings, run
from flowcache.runtime.stats import RunStats
from magi1.model import MODEL
from magi1.pipeline import generate

COMMON = [
    *("prompt=a red circle moving right", "runtime_config.num_frames=60"),
    *("runtime_config.video_size_h=16", "runtime_config.video_size_w=48"),
]
FLOWCACHE = ["reuse.policy=flowcache", "reuse.warmup_steps=1", "reuse.threshold=0.3"]
COMPRESSED = ["kv.compress=importance", "kv.total_chunks=3", "kv.kernel=3"]
CASES = {
    "vanilla": ["runtime_config.noise2clean_kvrange=[3,2]"],
    "flowcache": [*FLOWCACHE, "reuse.predict=velocity", "passes.clean_pass=false"],
    "teacache": [*FLOWCACHE, "reuse.policy=teacache", *COMPRESSED],
    "compression": [*FLOWCACHE, *COMPRESSED, "kv.queries=frame", "passes.clean_pass=false"],
    "frames": [*COMPRESSED, "kv.granularity=frame", "reuse.policy=stride"],
    "wide": ["runtime_config.num_frames=36", "runtime_config.video_size_w=448"],
}
"""Name -> settings; each with 9 tokens per chunk of 3 latents, "wide" with 84.

The VAE decodes each chunk in one tile, those of "wide" in three.
"""
RECORDED = "held_flowcache"
HELD = {
    "held": ["reuse.guidance_every=2"],
    RECORDED: [*FLOWCACHE, *COMPRESSED, "reuse.guidance_every=2"],
}
"""The same, for models with guidance."""


def main() -> None:
    models, folder, *layouts = sys.argv[1:]
    with torch.no_grad(), process_group(Place.of(os.environ), timeout=PATIENCE) as ranks:
        made = {}
        for layout in layouts:
            branch, sequence = map(int, layout.split("x"))
            layout_ranks = replace(ranks, layout=Layout(branch, sequence))
            divided = layout_ranks.divided(torch.device("cpu"))
            for kind in ("distilled", "base") if branch == 1 else ("base",):
                made[kind, layout] = make_videos(f"{models}/{kind}", divided)
            recorded = request_of(f"{models}/base", f"{folder}/{layout}.mp4", layout_ranks.layout)
            run(prepare(MODEL, recorded, ranks))
            made["base", layout][RECORDED]["request"] = recorded
        torch.save(made, Path(folder) / f"{ranks.place.rank}.pt")


def request_of(model: str, out: str, layout: Layout) -> Request:
    """Return the request for a run with a record."""
    parallel = [f"parallel.branch={layout.branch}", f"parallel.sequence={layout.sequence}"]
    overrides = [*COMMON, *HELD[RECORDED], *parallel]
    return Request(preset="vanilla", model=model, overrides=overrides, out=out, record=True)


def make_videos(model: str, ranks: Ranks) -> dict[str, dict[str, object]]:
    job = prepare(MODEL, Request(preset="vanilla", model=model, overrides=COMMON, out="unused.mp4"))
    stats = RunStats(job.device)
    conditioning, models = encode_inputs(job, stats=stats), load_networks(job, stats=stats)
    results = {}
    cases = CASES if job.config.engine_config.distill else CASES | HELD
    for name, settings in cases.items():
        config = read_settings(
            MODEL, Request(preset="vanilla", model=model, overrides=[*COMMON, *settings])
        )
        stats = RunStats(job.device)
        shown = generate(models.dit, models.vae, config, conditioning, stats=stats, ranks=ranks)
        frames = [progress.frames for progress in shown if progress.frames is not None]
        results[name] = {
            "frames": torch.cat(frames, dim=1),
            "flops": (stats.computed_flops, stats.flops_without_reuse),
            "computed": [p[:6] for p in stats.passes],
        }
    return results


if __name__ == "__main__":
    main()
