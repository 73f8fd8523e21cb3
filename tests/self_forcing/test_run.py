"""Whole runs on a random checkpoint: videos, JSON, processes, upstream's command line."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowcache.runtime.ending import EXIT_USER_ERROR
from flowcache.runtime.video import read_video
from self_forcing.__main__ import main
from self_forcing.released import FOLDER, PRESETS

pytestmark = pytest.mark.numeric

Make = Callable[..., Any]
TINY = ("checkpoint=checkpoints/tiny.pt", "num_frames=33")
RUNS = {
    "self_forcing": (),
    "causal_forcing_2step": ("num_frames=17",),
    "ar_chunkwise": ("num_steps=3",),
    "long": (),
}


@pytest.mark.parametrize("preset", RUNS)
def test_a_run_makes_a_video_that_costs_what_was_planned(make: Make, preset: str):
    made = make(*TINY, *RUNS[preset], preset=preset)
    made.check_costs()
    assert len(made.frames) == made.job.config.num_frames
    assert made.report["config"]["precision"] == "float32"


def test_the_same_seed_makes_the_same_video_whatever_ran_before(make: Make):
    first = make(*TINY, "seed=1", preset="self_forcing").frames
    other = make(*TINY, "seed=2", preset="self_forcing").frames
    again = make(*TINY, "seed=1", preset="self_forcing").frames
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_what_is_kept_on_the_host_changes_nothing(make: Make):
    settings = (*TINY, "window=6", "sink=1")
    plain = make(*settings, preset="self_forcing").frames
    moved = ("offload=true", "kv_on_host=true", "text_on_host=true", "overlap=true")
    assert np.array_equal(make(*settings, *moved, preset="self_forcing").frames, plain)


def test_a_video_starts_from_an_image_or_goes_on_from_a_video(make: Make, picture: Path):
    started = make(*TINY, f"image={picture}", preset="causal_forcing_framewise")
    assert len(started.frames) == 33
    going_on = make(
        *TINY, f"video={started.path}", "overlap_history=9", preset="self_forcing"
    ).frames
    assert len(going_on) == 33 + 33 - 9
    change = np.abs(going_on[:33].astype(int) - started.frames.astype(int)).mean()
    assert change < 8  # the same frames, encoded as mp4 twice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "settings"),
    [("ar_chunkwise", ("num_steps=3",)), ("self_forcing", ("window=6",)), ("long", ())],
)
def test_two_processes_make_the_video_of_one(
    replica: Path, tmp_path: Path, preset: str, settings: tuple[str, ...]
):
    videos = []
    for number in (1, 2):
        out = tmp_path / f"{number}.mp4"
        command = [sys.executable, "-m", "flowcache.launch", str(number), "-m", "self_forcing"]
        command += ["--preset", preset, "--prompt", "a cat", "--model", str(replica)]
        subprocess.run([*command, "--out", str(out), *TINY, *settings], check=True, timeout=300)
        videos.append(read_video(out)[0].astype(int))
    assert np.abs(videos[0] - videos[1]).max() <= 2


def test_the_command_line_makes_a_video_and_refuses_in_one_line(
    replica: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = ["--model", str(replica), "--prompt", "a cat", "--out", str(tmp_path / "a.mp4"), *TINY]
    assert main([*given, "--record"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json", "a.record.json"}
    capsys.readouterr()
    assert main([*given, "--image", "none.png"]) == EXIT_USER_ERROR
    assert capsys.readouterr().err.count("\n") == 1


# Upstream's command line ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def inference() -> Any:
    """The module of upstream's script."""
    spec = importlib.util.spec_from_file_location("inference", FOLDER / "inference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FEW_YAML = """
denoising_step_list:
- 1000
- 500
denoising_step_list_first_chunk: [1000, 750, 500, 250]
warp_denoising_step: true
guidance_scale: 3.0
num_frame_per_block: 1
model_kwargs:
  timestep_shift: 5.0
  local_attn_size: 6
  sink_size: 1
lr: 2.0e-06
"""
MANY_YAML = """
num_train_timestep: 1000
timestep_shift: 5.0
guidance_scale: 4.0
negative_prompt: ugly
num_frame_per_block: 3
"""


def settings_of(inference: Any, folder: Path, text: str, *flags: str) -> set[str]:
    path = folder / "config.yaml"
    path.write_text(text)
    paths = ("config_path", "checkpoint_path", "data_path", "output_folder")
    given = [part for name in paths for part in (f"--{name}", "x")]
    options = inference.parser_of().parse_args([*given, *flags])
    return set(inference.settings_of(inference.read_config(path), options))


def test_upstreams_yaml_files_are_translated(inference: Any, tmp_path: Path):
    few = settings_of(inference, tmp_path, FEW_YAML, "--use_ema", "--num_output_frames", "21")
    assert few >= {
        *("step_list=[1000, 500]", "first_chunk_step_list=[1000, 750, 500, 250]", "shift=5.0"),
        *("warp_steps=true", "chunk_frames=1", "window=6", "sink=1", "use_ema=true"),
        *("num_frames=81", "context_noise=0", "first_frame_alone=false", "rolling=false"),
    }
    many = settings_of(inference, tmp_path, MANY_YAML)
    assert many >= {
        *("step_list=null", "guidance=4.0", "negative_prompt=ugly", "shift=5.0"),
        *("chunk_frames=3", "window=null", "use_ema=false"),
    }
    assert "shift=8.0" in settings_of(inference, tmp_path, "denoising_step_list: [1000]\n")


def test_upstreams_command_makes_a_video_for_every_prompt_and_leaves_those_that_are_there(
    inference: Any, replica: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "few.yaml").write_text(FEW_YAML)
    (tmp_path / "prompts.txt").write_text("a cat\na dog / in the rain\n")
    out = tmp_path / "videos"
    given = ["--config_path", str(tmp_path / "few.yaml"), "--output_folder", str(out), "--use_ema"]
    given += ["--checkpoint_path", "checkpoints/tiny.pt", "--data_path"]
    given += [str(tmp_path / "prompts.txt"), "--num_output_frames", "5", "--model", str(replica)]
    sizes = ["height=16", "width=32"]
    assert inference.main([*given, *sizes]) == 0
    names = {"a cat-0.mp4", "a dog  in the rain-0.mp4"}
    assert {path.name for path in out.glob("*.mp4")} == names
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert inference.main([*given, *sizes]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    report = json.loads((out / "a cat-0.json").read_text())
    assert report["num_frames"] == 17
    capsys.readouterr()
    elsewhere = ["--output_folder", str(tmp_path / "new"), "--model", "nowhere"]
    assert inference.main([*given, *elsewhere, *sizes]) == EXIT_USER_ERROR
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_an_image_folder_of_upstream_is_read(inference: Any, tmp_path: Path):
    folder = tmp_path / "26-15"
    folder.mkdir()
    rows = [{"file_name": "a.jpg", "caption": "a cat", "target_crop": {}}]
    (tmp_path / "target_crop_info_26-15.json").write_text(json.dumps(rows))
    paths = ("config_path", "checkpoint_path", "output_folder")
    given = [part for name in paths for part in (f"--{name}", "x")]
    options = inference.parser_of().parse_args([*given, "--data_path", str(tmp_path), "--i2v"])
    assert inference.prompts_of(options) == [("a cat", "a cat", str(folder / "a.jpg"))]


def test_every_launcher_names_its_preset(copy_launchers: Callable[..., Any]):
    variables = ("MODEL", "CHECKPOINT", "PROMPT", "IMAGE", "HEIGHT", "WIDTH", "NUM_FRAMES")
    scripts = sorted(path.name for path in FOLDER.glob("run_*.sh"))
    launchers = copy_launchers(
        FOLDER,
        ["scripts/common.sh", *scripts],
        pattern="run_{}.sh",
        package="self_forcing",
        variables=(*variables, "SEED", "GPUS", "OUT"),
    )
    presets = set()
    for script in scripts:
        handed = launchers.handed_on(script[4:-3], "window=9", SEED="7")
        presets.add(handed[handed.index("--preset") + 1])
        assert handed[-1] == "window=9"
        assert "seed=7" in handed
    assert presets <= {path.stem for path in PRESETS.glob("*.yaml")}
    assert len(presets) == len(scripts)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("self_forcing", ()),
        ("self_forcing", ("positions=relative", "window=6", "sink=1")),
        ("long", ()),
    ],
)
def test_keys_in_eight_bits_are_nearer_than_in_two(
    make: Make, preset: str, settings: tuple[str, ...]
):
    """Rotated when they are put, or when they are read; with frames that leave."""
    plain = make(*TINY, *settings, preset=preset)
    quantized = ("kv.quantizer=kmeans", "kv.bias_correction=true", "kv.keep_last=true")
    eight, two = (
        make(*TINY, *settings, *quantized, f"kv.dtype={dtype}", preset=preset)
        for dtype in ("int8", "int2")
    )
    near, far = (np.abs(made.frames.astype(float) - plain.frames).mean() for made in (eight, two))
    # the video's compression adds to both
    assert 0 < near < 0.9 * far
