"""Whole runs, from settings to the mp4 and its JSON, on tiny checkpoints."""

import functools
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowcache.runtime.video import probe, read_video

Make = Callable[..., Any]


# What it makes ------------------------------------------------------------------------------


def test_a_run_writes_a_video_that_plays_and_its_json(make: Make, tiny: Any):
    short = tiny.short
    made = make(preset="flowcache_fast")
    found = probe(made.path)
    assert (found.num_frames, found.fps) == (short.num_frames, 24)
    assert (found.height, found.width) == (short.height, short.width)
    report = json.loads(made.path.with_suffix(".json").read_text())
    assert set(report) == {
        *("video", "num_frames", "alarms", "first_frames_seconds", "preset", "model"),
        *("attention_kernel", "attention_probe", "cross_attention_kernel"),
        *("cross_attention_probe", "compilation", "config", "memory", "processes"),
        *("replay", "environment", "stats"),
    }
    assert report["num_frames"] == short.num_frames
    assert report["preset"] == "flowcache_fast"
    assert report["model"] == tiny.folder.name
    assert functools.reduce(getitem, tiny.model.keys["seed"].split("."), report["config"]) == 3
    assert report["config"]["prompt"] == "a red circle moving right"
    assert {"text", "load", "dit", "vae", "write"} <= set(report["stats"]["stages"])
    assert report["stats"]["peak_memory"]["bytes"] > 0
    decisions = report["stats"]["decisions"]
    assert decisions["columns"][:5] == ["segment", "tick", "chunk", "step", "branch"]
    num_steps = made.job.value("num_steps")
    assert len(decisions["rows"]) == short.num_chunks * num_steps * short.chunk_rows
    names = sorted(path.name for path in made.path.parent.iterdir())
    assert names == ["flowcache_fast-3.json", "flowcache_fast-3.mp4"]


def test_the_summary_names_the_video(make: Make, tiny: Any, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    made = make()
    short = tiny.short
    assert str(made.path) in caplog.text
    assert f"{short.num_frames} frames of {short.width}x{short.height} at 24 fps" in caplog.text


def test_known_prompts_are_not_encoded_again(
    make: Make, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = f"embedding_cache={tmp_path / 'texts'}"
    plain, first = make(), make(cache)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the text encoder is not needed")

    monkeypatch.setattr(tiny.short.encoder, never)
    assert plain.path.read_bytes() == first.path.read_bytes() == make(cache).path.read_bytes()
    with pytest.raises(AssertionError, match="not needed"):
        make(cache, "prompt=another one")


# Laws ---------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_video_and_another_seed_another(make: Make, tiny: Any):
    first, second, other = (make(tiny.setting("seed", seed)) for seed in (5, 5, 6))
    assert first.path != second.path
    assert np.array_equal(first.frames, second.frames)
    assert not np.array_equal(first.frames, other.frames)


@pytest.mark.usefixtures("one_thread")
def test_two_prompts_in_one_process_equal_two_processes(make: Make, tiny: Any, tmp_path: Path):
    prompts = ("a blue square moving left", "a green circle moving right")
    together = [make(f"prompt={prompt}", preset="flowcache_fast") for prompt in prompts]
    # the first needs no process of its own: nothing came before it
    alone = tmp_path / "alone.mp4"
    code = (
        "import sys, torch; torch.set_num_threads(1); "
        f"from {tiny.model.name}.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    rest = ["--model", str(tiny.folder), "--prompt", prompts[1], "--out", str(alone)]
    subprocess.run(
        [sys.executable, "-c", code, "--preset", "flowcache_fast", *rest],
        check=True,
        capture_output=True,
    )
    assert np.array_equal(together[1].frames, read_video(alone)[0])
    assert not np.array_equal(together[0].frames, read_video(alone)[0])


def test_what_is_kept_on_the_host_changes_nothing(make: Make, tiny: Any):
    short = tiny.short
    plain = make(*short.long)
    for given in (["offload=true"], [short.kv_on_host], ["offload=true", short.kv_on_host]):
        assert np.array_equal(make(*short.long, *given).frames, plain.frames)


def test_a_threshold_of_zero_equals_vanilla(make: Make, tiny: Any):
    steps = tiny.setting("num_steps", 4)
    vanilla = make(steps, *tiny.short.passes)
    flowcache = make(steps, "reuse.threshold=0", preset=tiny.short.uncompressed)
    assert flowcache.report["stats"]["passes"]["reused"] == 0
    assert np.array_equal(vanilla.frames, flowcache.frames)


COMPUTED = {"skyreels_v2": 3 * 2 * 2, "magi1": 2 + 1}
"""Passes of 4 steps: the first and the last one of 3 chunks in 2 branches; the first one of 2
chunks, and of the last chunk the last, which ends the run."""


def test_a_high_threshold_reuses_all_steps_between_warmup_and_last(make: Make, tiny: Any):
    given = ("reuse.threshold=1e9", "reuse.warmup_steps=1", tiny.setting("num_steps", 4))
    made = make(*given, preset="flowcache_fast")
    short, passes = tiny.short, made.report["stats"]["passes"]
    assert passes["computed"] == COMPUTED[tiny.model.name]
    assert passes["computed"] + passes["reused"] == short.num_chunks * 4 * short.chunk_rows
    flops = made.report["stats"]["flops"]
    assert flops["computed"] < flops["without_reuse"] == made.job.work.flops
