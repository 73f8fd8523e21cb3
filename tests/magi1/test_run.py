"""Whole runs, from settings to the mp4 and its JSON, on tiny checkpoints."""

import json
from collections.abc import Callable
from typing import Any

from flowcache.video import probe

Make = Callable[..., Any]


def test_a_run_writes_a_video_that_plays_and_its_json(make: Make):
    made = make(preset="flowcache_fast")
    found = probe(made.path)
    assert (found.num_frames, found.fps, found.height, found.width) == (24, 24, 32, 48)
    report = json.loads(made.path.with_suffix(".json").read_text())
    assert report["num_frames"] == 24
    assert report["preset"] == "flowcache_fast"
    assert report["model"] == "distilled"
    assert report["config"]["runtime_config"]["seed"] == 3
    assert report["config"]["prompt"] == "a red circle moving right"
    assert {"text", "load", "dit", "vae", "write"} <= set(report["stats"]["stages"])
    # 2 chunks, 4 steps each
    assert len(report["stats"]["decisions"]["rows"]) == 2 * 4
    names = sorted(path.name for path in made.path.parent.iterdir())
    assert names == ["flowcache_fast-3.json", "flowcache_fast-3.mp4"]
