"""Whole runs, from settings to the mp4 and its JSON, on tiny checkpoints."""

import functools
import json
import logging
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowcache.errors import UserError
from flowcache.runtime.cli import EXIT_INTERRUPTED, run_command
from flowcache.runtime.model import load_model
from flowcache.runtime.record import read_record
from flowcache.runtime.run import prepare, run
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


LONG = ("num_frames=41", "base_num_frames=25", "overlap_history=9")
"""11 latent frames in two windows, 7 and 7 with 3 shared."""
SHORT_END = ("num_frames=33", "base_num_frames=25", "overlap_history=9", "attention=causal")
"""9 latent frames: a window of 7 and a shorter one of 5 with 3 shared."""
COMPRESSED = ("kv.compress=importance", "kv.total_chunks=3", "runtime_config.num_frames=60")
"""Five chunks, two at once, one clean one kept."""
WINDOWS = "runtime_config.noise2clean_kvrange=[3,2]"
GIVEN = ("prefix_frames=20", "video={clip}")
"""5 latents, one chunk of 3 and two more, which are not shown."""
SKYREELS = {
    "synchronous": (("ar_step=0",), 17),
    "asynchronous frame by frame": (("ar_step=2", "causal_block_size=1"), 17),
    "without guidance": (("guidance=1",), 17),
    "causal": (("attention=causal",), 17),
    "causal with clean pass": (("attention=causal", "clean_pass=true"), 17),
    "chunks of 3 and 2": (("attention=causal", "causal_block_size=3"), 17),
    "one step": (("num_steps=1", "ar_step=0"), 17),
    "one frame": (("num_frames=1", "base_num_frames=1"), 1),
    "two segments": (LONG, 41),
    "a shorter last segment": (SHORT_END, 33),
    "compressed": ((*LONG, "kv.compress=importance", "attention=causal"), 41),
    "portrait": (("height=32", "width=16"), 17),
    **{
        f"{attention}, given {' and '.join(given)}": (
            (f"attention={attention}", *(f"{name}={{picture}}" for name in given)),
            17,
        )
        for attention in ("full", "causal")
        for given in (("image",), ("end_image",), ("image", "end_image"))
    },
    "extended in segments": (
        ("video={clip}", "overlap_history=9", "num_frames=29", "base_num_frames=17"),
        20 + 29 - 9,
    ),
}
MAGI = {
    "no whole latent more": (("runtime_config.num_frames=25",), 24),
    "rounded up to whole chunks": (("runtime_config.num_frames=28",), 36),
    "one chunk at a time": (("runtime_config.window_size=1",), 24),
    "windows": (("runtime_config.noise2clean_kvrange=[2,1]",), 24),
    "no clean pass": (("passes.clean_pass=false",), 24),
    "no nearly-clean pass": (("passes.nearly_clean_pass=false",), 24),
    "no special tokens": (("special_tokens=null",), 24),
    "compressed, with nearly-clean pass": (COMPRESSED, 60),
    "compressed windows": ((*COMPRESSED, WINDOWS), 60),
    "whole frames kept": ((*COMPRESSED, "kv.granularity=frame"), 60),
    # 2 latents given and 6 asked: 3 chunks of 3 latents
    "extended within the first chunk": (("prefix_frames=8", "video={clip}"), 28),
    # 5 given and 6 asked: 4 chunks
    "extended after a chunk and two latents": (GIVEN, 28),
    "extended, compressed windows": ((*GIVEN, *COMPRESSED, WINDOWS), 64),
    # a given image is shown and counts as a latent more: 7 latents are 3 chunks of 3
    "given image": (("image={picture}",), 36),
}
MODES = [
    pytest.param(kind, *row, id=f"{kind}: {name}")
    for kind, rows in (("small", SKYREELS), ("distilled", MAGI), ("base", MAGI))
    for name, row in rows.items()
]


@pytest.mark.parametrize(("kind", "settings", "num_frames"), MODES)
def test_every_mode_makes_a_video_and_the_plan_counts_its_flops(
    request: pytest.FixtureRequest,
    maker: Callable[..., Any],
    picture: Path,
    noise: Callable[..., Path],
    kind: str,
    settings: tuple[str, ...],
    num_frames: int,
):
    model = load_model("skyreels_v2" if kind == "small" else "magi1")
    places: dict[str, Any] = {"picture": picture}
    if any("{clip}" in setting for setting in settings):
        size = (16, 32) if kind == "small" else (32, 48)
        places["clip"] = noise(picture.with_name("clip.mp4"), size)
    made = maker(model, request.getfixturevalue(kind))(*(s.format(**places) for s in settings))
    found = probe(made.path)
    assert found.num_frames == made.report["num_frames"] == num_frames
    assert (found.height, found.width) == (made.job.value("height"), made.job.value("width"))
    made.check_costs()
    assert np.ptp(made.frames) > 0


def test_a_record_names_the_frames_that_show_each_chunk(
    tiny_of: Callable[..., Any], noise: Callable[..., Path], tmp_path: Path
):
    tiny = tiny_of("magi1")
    clip = noise(tmp_path / "clip.mp4", (32, 48))
    out = tmp_path / "made.mp4"
    settings = [setting.format(clip=clip) for setting in GIVEN]
    asked = tiny.request(*settings, preset="flowcache_fast", out=str(out), record=True)
    report = run(prepare(tiny.model, asked))
    record = read_record(tmp_path / "made.record.json")
    # 5 latents given and 6 asked, 3 per chunk: one chunk given whole, of the second two latents
    assert record["chunk_frames"] == {"0": [[0, 0], [0, 4], [4, 16], [16, 28]]}
    assert (record["policy"], record["threshold"], record["num_steps"]) == ("flowcache", 0.015, 4)
    assert len(record["decisions"]) == len(report["stats"]["decisions"]["rows"])
    out.unlink()
    out.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"made\.record\.json exists and is kept"):
        prepare(tiny.model, asked)


def test_an_interrupted_run_keeps_what_it_made_under_another_name(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    decode, calls = pkgutil.resolve_name(tiny.short.decoder), list[None]()

    def interrupted(*given: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*given, **options)

    monkeypatch.setattr(tiny.short.decoder, interrupted)
    request = tiny.request("overlap=false", preset="flowcache_fast", out=str(tmp_path / "videos"))
    job = prepare(tiny.model, request)
    assert run_command(lambda: run(job) and None) == EXIT_INTERRUPTED
    (kept,) = (tmp_path / "videos").iterdir()
    assert kept.name == "flowcache_fast-3.partial.mp4"
    # the first chunk: 2 latent frames, or 3 latents of 4 frames
    assert probe(kept).num_frames == {"skyreels_v2": 5, "magi1": 12}[tiny.model.name]
    assert "Traceback" not in capsys.readouterr().err


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
