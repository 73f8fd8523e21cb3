"""Make tiny videos in one of several processes: `python parallel_runs.py MODEL FOLDER LAYOUT...`.

A layout is "2x1", branch groups by sequence ranks. What came out is written to FOLDER/RANK.pt, and
a video of each layout with its record is made there.
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
from skyreels_v2.model import MODEL
from skyreels_v2.pipeline import generate

COMMON = ["prompt=a red circle moving right", "height=16", "width=80", "num_steps=4"]
FLOWCACHE = ["attention=causal", "reuse.policy=flowcache", "reuse.warmup_steps=1"]
CASES = {
    "vanilla": [],
    "teacache": ["reuse.policy=teacache", "reuse.threshold=0.3", "reuse.warmup_steps=1"],
    "flowcache": [*FLOWCACHE, "reuse.threshold=0.3"],
    "content": [
        *FLOWCACHE,
        "reuse.threshold=0.4",
        "reuse.signal=content",
        "reuse.predict=velocity",
    ],
    "compression": [*FLOWCACHE, "reuse.threshold=0.3", "kv.compress=importance", "kv.kernel=3"],
    "frames": [*FLOWCACHE, "kv.compress=importance", "kv.granularity=frame", "kv.queries=frame"],
    "stride": [
        *("attention=causal", "reuse.policy=stride", "reuse.warmup_steps=1", "clean_pass=true"),
        *("reuse.predict=latent_update", "kv.compress=recent", "addnoise_condition=20"),
    ],
    "held": [
        *("attention=causal", "reuse.policy=stride", "reuse.warmup_steps=3"),
        *("reuse.predict=velocity", "reuse.guidance_every=2"),
    ],
    "segments": [
        *(*FLOWCACHE, "reuse.threshold=0.3", "reuse.extrapolate=0.5", "batch_branches=true"),
        *("num_frames=29", "base_num_frames=17", "overlap_history=5"),
    ],
    "wide": ["num_frames=9", "base_num_frames=9", "width=528", "num_steps=2"],
}
"""Name -> settings; each with 5 tokens per frame, which no number of processes divides.

The picture "wide" has 66 columns of latents, so that the VAE's strips are narrower at every level.
"""
RECORDED = "compression"


def main() -> None:
    model, folder, *layouts = sys.argv[1:]
    with torch.no_grad(), process_group(Place.of(os.environ), timeout=PATIENCE) as ranks:
        made = {}
        for layout in layouts:
            branch, sequence = map(int, layout.split("x"))
            layout_ranks = replace(ranks, layout=Layout(branch, sequence))
            divided = layout_ranks.divided(torch.device("cpu"))
            made[layout] = make_videos(model, divided)
            recorded = request_of(model, f"{folder}/{layout}.mp4", layout_ranks.layout)
            run(prepare(MODEL, recorded, ranks))
            made[layout][RECORDED]["request"] = recorded
        torch.save(made, Path(folder) / f"{ranks.place.rank}.pt")


def request_of(model: str, out: str, layout: Layout) -> Request:
    """Return the request for a run with a record."""
    parallel = [f"parallel.branch={layout.branch}", f"parallel.sequence={layout.sequence}"]
    overrides = [*COMMON, *CASES[RECORDED], *parallel]
    return Request(preset="vanilla", model=model, overrides=overrides, out=out, record=True)


def make_videos(model: str, ranks: Ranks) -> dict[str, dict[str, object]]:
    request = Request(preset="vanilla", model=model, overrides=COMMON, out="unused.mp4")
    job = prepare(MODEL, request)
    stats = RunStats(job.device)
    conditioning, models = encode_inputs(job, stats=stats), load_networks(job, stats=stats)
    results = {}
    for name, settings in CASES.items():
        config = read_settings(
            MODEL,
            Request(preset="vanilla", model=model, overrides=[*COMMON, *settings]),
            job.source,
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
