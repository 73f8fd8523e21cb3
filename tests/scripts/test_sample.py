"""Many videos with a model: two processes, kills, failures, examples."""

import importlib
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sampling_cases import (
    PROMPTS,
    SCRIPTS,
    SHORT,
    demo,
    launch_two,
    receipts,
    videos,
    write_physics_iq,
)
from torch import Tensor

from flowcache.runtime.video import probe
from flowcache.wan.text import TextEncoder


@pytest.mark.usefixtures("one_thread")
def test_two_processes_with_a_model_make_bitwise_what_one_makes(
    sample: ModuleType, prompts: Path, tmp_path: Path
):
    assert sample.main(demo(prompts, tmp_path / "one")) == 0
    run = launch_two(demo(prompts, tmp_path / "two"))
    assert run.returncode == 0, run.stderr
    assert "2 of 2 videos are complete" in run.stdout
    one, two = videos(tmp_path / "one"), videos(tmp_path / "two")
    assert one == two
    assert len(one) == 2
    for receipt in receipts(tmp_path / "one").values():
        assert receipt["task"]["preset"] == "flowcache_fast"
        assert receipt["kv_cache_bytes"] > 0
        assert receipt["first_frames_seconds"] > 0
        assert "load" not in receipt["stats"]["stages"]


def test_a_broken_clip_fails_alone_and_is_listed(
    sample: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    data = write_physics_iq(tmp_path / "data")
    broken = next(data.rglob("0002_conditioning*.mp4"))
    broken.write_text("no video")
    settings = [*SHORT[:1], "base_num_frames=9", "overlap_history=5", *SHORT[3:]]
    arguments = ["skyreels_v2", "--model", "demo", "--physics-iq", str(data)]
    assert sample.main([*arguments, "--out", str(tmp_path / "out"), *settings]) == 1
    captured = capfd.readouterr()
    assert "1 of 2 videos are complete" in captured.out
    last = captured.err.splitlines()[-1]
    assert last.startswith("failed: 0002_perspective-right_trimmed-ball: ")
    assert "not a video that can be read" in last
    made = tmp_path / "out" / "0001_perspective-left_trimmed-ball.mp4"
    assert list(videos(tmp_path / "out")) == [made.name]
    assert probe(made).num_frames == 9 - 5  # the given ones are left out
    # two steps after black frames show nothing, and that is said, too
    assert f"ALARM {made.stem}: constant: all 4 frames are of one colour" in captured.err


def test_a_video_that_is_not_finite_is_an_error_entry_and_the_others_go_on(
    sample: ModuleType,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    encode = TextEncoder.encode

    def spoil(encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
        made = encode(encoder, texts)
        return made * math.nan if PROMPTS[0] in texts else made

    monkeypatch.setattr(TextEncoder, "encode", spoil)
    assert sample.main(demo(prompts, tmp_path / "out")) == 1
    captured = capfd.readouterr()
    assert "1 of 2 videos are complete" in captured.out
    said = "the embeddings of the prompts hold values that are not finite, though all weights"
    assert f"failed: 0000-0: {said}" in captured.err
    assert said in json.loads((tmp_path / "out" / "0000-0.error.json").read_text())["error"]
    assert [path.name for path in (tmp_path / "out").glob("*.mp4")] == ["0001-0.mp4"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_kills_while_a_model_works_leave_no_trace(
    sample: ModuleType, prompts: Path, tmp_path: Path
):
    assert sample.main(demo(prompts, tmp_path / "one")) == 0
    dice = random.Random(3)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "sample.py"), *demo(prompts, tmp_path / "killed")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        time.sleep(dice.uniform(4, 16))
        process.send_signal(dice.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        process.wait()
    assert sample.main(demo(prompts, tmp_path / "killed")) == 0
    assert videos(tmp_path / "killed") == videos(tmp_path / "one")


def test_only_the_main_process_ends_with_the_code_of_failures(
    sample: ModuleType,
    fake: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    del fake

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(importlib.import_module("flowcache.bench.render").Renderer, "render", fail)
    arguments = ["magi1", "--prompts", "prompts.txt", "--out", "out"]
    for rank, code in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert sample.main(arguments) == code
        assert ("0 of 1 videos are complete" in capfd.readouterr().out) == (rank == 0)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (["--seed", "-1"], "--seed must be 0 to 9223372036854775807"),
        (["--seed", str(2**63)], "--seed must be 0 to 9223372036854775807"),
        (["--seed", str(2**63 - 1), "--per-prompt", "2"], "--seed must be 0 to 922"),
        (["--per-prompt", "1000000000"], "--per-prompt must be 1 to 10000, not 1000000000"),
        (["--stale-after", "nan"], "--stale-after must be above 0 seconds, not nan"),
        (["--stale-after", "-1"], "--stale-after must be above 0 seconds, not -1"),
    ],
)
def test_numbers_are_refused_before_any_work(
    sample: ModuleType,
    numbers: list[str],
    said: str,
    fake: list[Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    out = tmp_path / "numbers"
    assert sample.main(["magi1", "--prompts", "prompts.txt", "--out", str(out), *numbers]) == 2
    assert capfd.readouterr().err.startswith(f"error: {said}")
    assert fake == []
    assert not out.exists()


def examples(sample: ModuleType) -> list[list[str]]:
    text = sample.EXAMPLES.partition("examples:\n")[2].partition("\n\n")[0]
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def test_help_shows_examples(sample: ModuleType, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        sample.main(["--help"])
    assert ended.value.code == 0
    assert "python -m flowcache.launch 8" in capfd.readouterr().out


def test_every_example_runs(sample: ModuleType, fake: list[Any], tmp_path: Path):
    for words in examples(sample):
        start = words.index("scripts/sample.py") + 1
        arguments = [word.replace("/shared/", f"{tmp_path}/shared/") for word in words[start:]]
        before = len(fake)
        assert sample.main(arguments) == 0, words
        assert len(fake) > before, words
