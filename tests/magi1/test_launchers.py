"""The bash launchers: what they hand to the command line, and that it makes videos."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowcache.demo.clips import Attributes, Motion, render
from flowcache.runtime.video import probe
from magi1.__main__ import main
from magi1.released import DEMOS, PRESETS

METHODS = ("vanilla", "teacache", "flowcache")
MODES = ("t2v", "i2v", "v2v")
TUNED = "flowcache_tuned_t2v"
NAMES = tuple(f"{method}_{mode}" for method in METHODS for mode in MODES)
VARIABLES = ("MODEL", "PRESET", "PROMPT", "IMAGE", "VIDEO", "HEIGHT", "WIDTH", "NUM_FRAMES")
VARIABLES += (
    "PREFIX_FRAMES",
    "NUM_STEPS",
    "WINDOW",
    "THRESHOLD",
    "PROFILE",
    "TOTAL_CHUNKS",
    "SEED",
    "SPECIAL_TOKENS",
)
VARIABLES += ("GPUS", "OUT")
PROMPTS = {
    "t2v": "a blue triangle moving up on a black background",
    "i2v": "a blue circle moving right on a black background",
    "v2v": "a blue triangle moving up on a black background",
}

needs_demo = pytest.mark.skipif(
    not DEMOS["demo"].is_file(), reason="needs the trained demo checkpoint"
)

Launch = Callable[..., list[str]]


@pytest.fixture
def launchers(copy_launchers: Callable[..., Any]) -> Any:
    """A copy of the launchers, see `Launchers`."""
    return copy_launchers(
        PRESETS.parent,
        ("scripts", "assets"),
        pattern="scripts/single_run/{}.sh",
        package="magi1",
        variables=VARIABLES,
    )


@pytest.fixture
def copy(launchers: Any) -> Path:
    """The model's folder with the copied launchers."""
    return launchers.folder


@pytest.fixture
def launch(launchers: Any) -> Launch:
    """Return what runs a launcher from elsewhere and gives what it hands to Python."""
    return launchers.handed_on


@pytest.mark.parametrize("name", ["flowcache_t2v", "teacache_i2v", "vanilla_t2v"])
def test_several_gpus_get_a_process_each(launchers: Any, tmp_path: Path, name: str):
    launchers.use_python(f'printf "%s\\0" "$@" > "{tmp_path}/handed"')
    done = launchers.run(name, "--dry-run", cwd=tmp_path, GPUS="4")
    assert done.returncode == 0, done.stderr
    handed = (tmp_path / "handed").read_text().split("\0")
    assert handed[:6] == ["-m", "flowcache.launch", "4", "-m", "magi1", "--model"]


@pytest.mark.slow
def test_gpus_that_do_not_fit_are_told_in_one_line(launchers: Any, distilled: Path, tmp_path: Path):
    launchers.use_python(f'exec "{sys.executable}" "$@"')
    done = launchers.run("flowcache_t2v", cwd=tmp_path, MODEL=str(distilled), GPUS="3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: parallel.sequence=3 does not divide the 2 key/value heads of the model: "
        "start 1 or 2 processes instead of 3 (a launcher: GPUS=1 or 2)\n"
    )


def put_video(copy: Path, name: str, *, age: int) -> Path:
    """Make a file that looks like a finished text-to-video run, so many seconds old."""
    path = copy / "result" / "t2v" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


def preset_of(name: str, speed: str = "fast") -> str:
    method = name.partition("_")[0]
    return method if method == "vanilla" else f"{method}_{speed}"


# What is handed on ------------------------------------------------------------------------------


def test_there_is_a_launcher_per_method_and_mode():
    found = {path.stem for path in (PRESETS.parent / "scripts" / "single_run").glob("*.sh")}
    assert found == {*NAMES, TUNED, "common"}


def test_the_tuned_launcher_hands_on_its_profile(
    launch: Launch, copy: Path, distilled: Path, capsys: pytest.CaptureFixture[str]
):
    prompt = ["--prompt", PROMPTS["t2v"], "--out", f"{copy}/result/t2v"]
    handed = launch(TUNED, MODEL="a", PROFILE="my profile.yaml", TOTAL_CHUNKS="6")
    assert handed == [
        *("--model", "a", *prompt, "--preset", "flowcache_tuned"),
        *("reuse.profile=my profile.yaml", "kv.total_chunks=6"),
    ]
    assert main(launch(TUNED, "--dry-run", MODEL=str(distilled))) == 2
    path = distilled / "profiles/flowcache_tuned.yaml"
    told = f"error: {path}: no such profile: make one with scripts/tune.py --out {path}\n"
    assert capsys.readouterr().err == told


def test_the_demo_has_a_profile_for_the_tuned_launcher(
    launch: Launch, capsys: pytest.CaptureFixture[str]
):
    assert main(launch(TUNED, "--dry-run", MODEL="demo")) == 0
    said = capsys.readouterr().out
    assert re.search(r"demo/profiles/flowcache_tuned.yaml: \d+ of 64 steps planned", said)


@pytest.mark.parametrize("name", NAMES)
def test_a_launcher_uses_its_preset_and_mode_and_hands_on_no_empty_variable(
    launch: Launch, copy: Path, name: str
):
    mode = name.partition("_")[2]
    newest = put_video(copy, "newest.mp4", age=0)
    given = {
        "t2v": [],
        "i2v": ["--image", f"{copy}/assets/blue_circle.png"],
        "v2v": ["--video", str(newest)],
    }
    assert launch(name) == [
        *("--model", "auto", "--prompt", PROMPTS[mode], "--out", f"{copy}/result/{mode}"),
        *("--preset", preset_of(name), *given[mode]),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_launcher_hands_on_its_variables_and_arguments(launch: Launch, name: str):
    method, _, mode = name.partition("_")
    handed = launch(
        name,
        "kv.mix=0.1",
        "--dry-run",
        MODEL="my models/one",
        PRESET="slow",
        PROMPT='two "words" and $more',
        IMAGE="a b.png",
        VIDEO="c d.mp4",
        PREFIX_FRAMES="null",
        HEIGHT="64",
        WIDTH="32",
        NUM_FRAMES="48",
        NUM_STEPS="8",
        WINDOW="2",
        THRESHOLD="0.3",
        TOTAL_CHUNKS="6",
        SEED="8",
        SPECIAL_TOKENS="my tokens.npz",
        OUT="my out/x.mp4",
    )
    given = {"t2v": [], "i2v": ["--image", "a b.png"], "v2v": ["--video", "c d.mp4"]}
    assert handed == [
        *("--model", "my models/one", "--prompt", 'two "words" and $more'),
        *("--out", "my out/x.mp4"),
        *("runtime_config.video_size_h=64", "runtime_config.video_size_w=32"),
        *("runtime_config.num_frames=48", "runtime_config.num_steps=8"),
        *("runtime_config.window_size=2", "runtime_config.seed=8"),
        *("special_tokens=my tokens.npz", "--preset", preset_of(name, "slow"), *given[mode]),
        *(["prefix_frames=null"] if mode == "v2v" else []),
        *(["reuse.threshold=0.3"] if method != "vanilla" else []),
        *(["kv.total_chunks=6"] if method == "flowcache" else []),
        *("kv.mix=0.1", "--dry-run"),
    ]


def test_the_newest_finished_text_to_video_clip_is_continued(launch: Launch, copy: Path):
    put_video(copy, "a.mp4", age=300)
    newest = put_video(copy, "b c.mp4", age=100)
    put_video(copy, "d.mp4", age=200)
    put_video(copy, "e.part.mp4", age=0)
    handed = launch("flowcache_v2v")
    assert handed[handed.index("--video") + 1] == str(newest)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_clip_to_continue_a_launcher_says_how_to_make_one(
    launchers: Any, tmp_path: Path, method: str
):
    refused = launchers.run(f"{method}_v2v", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: no video to continue: set VIDEO=clip.mp4, or make one first: "
        "bash scripts/single_run/flowcache_t2v.sh\n"
    )
    assert refused.stdout == ""


def test_the_shipped_picture_is_a_frame_of_the_demos_clips():
    attributes = Attributes("blue", "circle", "right", "black")
    motion = Motion(x=24, y=32, radius=12.5, speed=0.5)
    drawn = render(attributes, motion, num_frames=1)[0]
    with Image.open(PRESETS.parent / "assets" / "blue_circle.png") as image:
        assert np.array_equal(np.array(image), drawn)


# What comes of it -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("speed", ["slow", "fast"])
def test_what_a_launcher_hands_on_is_in_order(
    launch: Launch,
    distilled: Path,
    clip: Path,
    name: str,
    speed: str,
    capsys: pytest.CaptureFixture[str],
):
    handed = launch(
        name, "--dry-run", MODEL=str(distilled), PRESET=speed, SEED="8", VIDEO=str(clip)
    )
    assert main(handed) == 0
    out = capsys.readouterr().out
    preset = preset_of(name, speed)
    assert f"preset       {preset}: " in out
    assert f"{preset}-8.mp4" in out
    given = {"t2v": "", "i2v": ", 1 latents given", "v2v": ", 8 latents given"}
    chunks = next(line for line in out.splitlines() if line.startswith("chunks "))
    assert given[name.partition("_")[2]] in chunks
    assert ("given" in chunks) == (not name.endswith("t2v"))


@needs_demo
@pytest.mark.parametrize("name", NAMES)
def test_every_launcher_plans_on_the_demo_checkpoint(
    launch: Launch, clip: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    assert main(launch(name, "--dry-run", MODEL="demo", VIDEO=str(clip))) == 0
    out = capsys.readouterr().out
    assert "model        demo (distilled)" in out
    assert f"preset       {preset_of(name)}: " in out


def test_an_unknown_preset_and_an_empty_prompt_are_refused(
    launch: Launch, distilled: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(launch("flowcache_t2v", MODEL=str(distilled), PRESET="faster")) == 2
    assert "preset 'flowcache_faster' is unknown" in capsys.readouterr().err
    assert main(launch("vanilla_t2v", MODEL=str(distilled), PROMPT="")) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_a_missing_picture_is_told_in_one_line(
    launch: Launch, distilled: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(launch("flowcache_i2v", MODEL=str(distilled), IMAGE="missing.png")) == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "error: missing.png: no such file\n")


def test_launchers_make_videos_and_one_continues_the_other(
    launchers: Any, distilled: Path, tmp_path: Path
):
    launchers.use_python(f'exec "{sys.executable}" "$@"')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    short = {"MODEL": str(distilled), "NUM_FRAMES": "36", "NUM_STEPS": "2", "SEED": "3"}
    num_frames = {"t2v": 36, "v2v": 40}
    for name in ("flowcache_t2v", "vanilla_v2v"):
        done = launchers.run(name, cwd=elsewhere, **short)
        assert done.returncode == 0, done.stderr
        assert "wrote " in done.stderr
        mode = name.partition("_")[2]
        path = launchers.folder / "result" / mode / f"{preset_of(name)}-3.mp4"
        assert probe(path).num_frames == num_frames[mode]
        assert path.with_suffix(".json").is_file()
    assert not list(elsewhere.iterdir())
