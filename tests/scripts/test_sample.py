"""Many videos with a model: two processes, failures, launchers, examples."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import sample
from sampling_cases import FOLDERS, PROMPTS, SCRIPTS, SHORT, receipts, videos, write_physics_iq
from torch import Tensor

from flowcache.bench.tasks import Task
from flowcache.runtime.config import find_preset
from flowcache.runtime.model import load_model
from flowcache.runtime.video import probe
from flowcache.wan.text import TextEncoder


def demo(prompts: Path, out: Path) -> list[str]:
    given = ["--prompts", str(prompts), "--out", str(out), *SHORT]
    return ["skyreels_v2", "--model", "demo", "--preset", "flowcache_fast", *given]


def launch_two(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_processes", "2", "--num_machines", "1", "--main_process_port", "29533"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *(str(SCRIPTS / "sample.py"), *arguments),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "family", ["skyreels_v2", pytest.param("magi1", marks=pytest.mark.slow)], ids=str
)
def test_two_processes_with_a_model_make_bitwise_what_one_makes(
    family: str, prompts: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    one, two = tmp_path / "one", tmp_path / "two"
    arguments, last = demo(prompts, one)[: -len(SHORT) - 2], list(SHORT)
    parts = {"resolved_settings", "checkpoint", "vae", "text_encoder", "tokenizer"}
    if family == "magi1":
        checkpoint = str(request.getfixturevalue("distilled"))
        arguments = ["magi1", "--model", checkpoint, "--preset", "flowcache_fast_nocompress"]
        arguments, last = [*arguments, "--prompts", str(prompts)], ["reuse.warmup_steps=1"]
        parts = {*parts, "special_tokens"} - {"tokenizer"}
    assert sample.main([*arguments, "--out", str(one), *last]) == 0
    run = launch_two([*arguments, "--out", str(two), *last])
    assert run.returncode == 0, run.stderr
    assert "2 of 2 videos are complete" in run.stdout
    assert videos(one) == videos(two)
    assert len(set(videos(one).values())) == 2
    assert not (two / ".unfinished").exists()
    assert ".unfinished" not in run.stderr, "no path that is gone"
    for receipt in (*receipts(one).values(), *receipts(two).values()):
        assert receipt["task"]["preset"].startswith("flowcache_fast")
        assert receipt["kv_cache_bytes"] > 0
        assert receipt["first_frames_seconds"] > 0
        assert "load" not in receipt["stats"]["stages"]
        assert set(receipt["made_from"]) == parts


def test_a_broken_clip_fails_alone_and_is_listed(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
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
    assert list(videos(tmp_path / "out")) == ["0001-0.mp4"]


def test_every_process_makes_its_share_and_the_main_one_lists_all_failures(
    prompts: Path, tmp_path: Path
):
    """One video of each process fails: a folder is where its file should be."""
    out = tmp_path / "out"
    for name in ("0000-0", "0001-0"):
        (out / f"{name}.mp4" / "in the way").mkdir(parents=True)
    run = launch_two(demo(prompts, out))
    assert run.returncode == 1
    assert "0 of 2 videos are complete" in run.stdout
    lines = [line for line in run.stderr.splitlines() if line.startswith("failed: ")]
    for name in ("0000-0", "0001-0"):
        said = f"failed: {name}: IsADirectoryError: "
        assert sum(line.startswith(said) for line in lines) == 2  # when it failed, and at the end


def test_of_two_processes_one_says_what_is_wrong(prompts: Path, tmp_path: Path):
    script = [str(SCRIPTS / "sample.py"), *demo(prompts, tmp_path / "out")]
    for given, said in (("num_step=3", "unknown key 'num_step'"), ("--ray", "--ray starts its")):
        command = [sys.executable, "-m", "flowcache.launch", "2", *script, given]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 2
        (line,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
        assert said in line
        assert not (tmp_path / "out").exists()


def test_every_example_runs(fake: list[Task], tmp_path: Path):
    text = sample.EXAMPLES.partition("examples:\n")[2].partition("\n\n")[0]
    for line in text.replace("\\\n", " ").splitlines():
        words = [word.replace("/shared/", f"{tmp_path}/shared/") for word in shlex.split(line)]
        before = len(fake)
        assert sample.main(words[words.index("scripts/sample.py") + 1 :]) == 0, line
        assert len(fake) > before, line


# Launchers of the model folders


def hand_on(family: str, name: str, folder: Path, **variables: str) -> list[str]:
    """Run a launcher in a copy of the repository and return what it hands to Python."""
    copy, tools, said = folder / "a copy", folder / "tools", folder / "said"
    tools.mkdir()
    (copy / "scripts" / "sampling").mkdir(parents=True)
    shutil.copy(SCRIPTS / "sampling" / "launch.sh", copy / "scripts" / "sampling")
    (copy / "scripts" / "setup.sh").write_text(f'export PATH="{tools}:$PATH"\n')
    launchers = copy / FOLDERS[family].name / "scripts" / "sample"
    shutil.copytree(FOLDERS[family] / "scripts" / "sample", launchers)
    (tools / "python").write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" python "$@" > "{said}"\n')
    (tools / "python").chmod(0o755)
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    command = ["bash", str(launchers / f"{name}.sh")]
    subprocess.run(command, env=clean | variables, cwd=folder, check=True)
    return said.read_text().split("\0")[:-1]


@pytest.mark.parametrize("family", FOLDERS)
@pytest.mark.parametrize("method", ["vanilla", "teacache", "flowcache"])
@pytest.mark.parametrize("benchmark", ["vbench", "physicsiq"])
def test_a_launcher_makes_its_videos(
    fake: list[Task], tmp_path: Path, family: str, method: str, benchmark: str
):
    words = hand_on(family, f"{method}_{benchmark}", tmp_path, GPUS="1")
    assert words[0] == "python"
    assert sample.main(words[2:]) == 0
    assert {task.family for task in fake} == {family}
    assert all((task.video is not None) == (benchmark == "physicsiq") for task in fake)
    for preset in {task.preset for task in fake}:
        assert preset.startswith(method)
        assert find_preset(load_model(family).presets, preset).is_file()


def test_a_launcher_starts_as_many_processes_as_it_is_given(tmp_path: Path):
    variables = {"GPUS": "4", "PER_PROMPT": "5", "DIMENSIONS": "color"}
    words = hand_on("skyreels_v2", "flowcache_vbench", tmp_path, **variables)
    assert words[:4] == ["python", "-m", "flowcache.launch", "4"]
    assert Path(words[4]).name == "sample.py"
    assert words[words.index("--per-prompt") + 1] == "5"
    assert words[words.index("--dimensions") + 1] == "color"
