"""The bash launchers: what they hand to the command line, and that it makes videos."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowcache.runtime.video import probe
from skyreels_v2.__main__ import main
from skyreels_v2.released import FOLDER

NAMES = (
    "flowcache_fast",
    "flowcache_slow",
    "flowcache_kvcompress",
    "teacache_slow",
    "teacache_fast",
    "vanilla",
)
TUNED = "flowcache_tuned"
"""Its profile comes with the checkpoint."""
VARIABLES = ("MODEL", "PROMPT", "IMAGE", "END_IMAGE", "VIDEO", "HEIGHT", "WIDTH", "NUM_FRAMES")
VARIABLES += ("NUM_STEPS", "THRESHOLD", "PROFILE", "SEED", "GPUS", "OUT")

Launch = Callable[..., list[str]]


@pytest.fixture
def launchers(copy_launchers: Callable[..., Any]) -> Any:
    """A copy of the launchers, see `Launchers`."""
    return copy_launchers(
        FOLDER,
        ["scripts/common.sh", *(f"run_{name}.sh" for name in (*NAMES, TUNED))],
        pattern="run_{}.sh",
        package="skyreels_v2",
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


def test_there_is_a_launcher_per_published_preset():
    found = {path.name for path in FOLDER.glob("run_*.sh")}
    assert found == {f"run_{name}.sh" for name in (*NAMES, TUNED)}


def test_the_tuned_launcher_hands_on_its_profile(launch: Launch):
    prompt = "a blue triangle moving up on a black background"
    handed = launch(TUNED, "--dry-run", MODEL="demo", PROFILE="my profile.yaml", OUT="a.mp4")
    assert handed == [
        *("--model", "demo", "--prompt", prompt, "--out", "a.mp4"),
        *("--preset", TUNED, "reuse.profile=my profile.yaml", "--dry-run"),
    ]


def test_the_tuned_launcher_says_how_a_missing_profile_is_made(
    launch: Launch, small: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(launch(TUNED, "--dry-run", MODEL=str(small))) == 2
    path = small / "profiles/flowcache_tuned.yaml"
    told = f"error: {path}: no such profile: make one with scripts/tune.py --out {path}\n"
    assert capsys.readouterr().err == told


def test_the_demo_has_a_profile_for_the_tuned_launcher(
    launch: Launch, capsys: pytest.CaptureFixture[str]
):
    assert main(launch(TUNED, "--dry-run", MODEL="demo")) == 0
    said = capsys.readouterr().out
    assert re.search(r"demo/profiles/flowcache_tuned.yaml: \d+ of 30 steps planned", said)


@pytest.mark.parametrize("name", NAMES)
def test_a_launcher_uses_its_preset_and_hands_on_no_empty_variable(
    launch: Launch, copy: Path, name: str
):
    prompt = "a blue triangle moving up on a black background"
    expected = ["--model", "auto", "--prompt", prompt, "--out", f"{copy}/result"]
    assert launch(name) == [*expected, "--preset", name]


@pytest.mark.parametrize("name", NAMES)
def test_a_launcher_hands_on_its_variables_and_arguments(launch: Launch, name: str):
    handed = launch(
        name,
        "guidance=5",
        "--dry-run",
        MODEL="my models/one",
        PROMPT='two "words" and $more',
        IMAGE="a b.png",
        END_IMAGE="c.png",
        VIDEO="d.mp4",
        HEIGHT="64",
        WIDTH="32",
        NUM_FRAMES="49",
        NUM_STEPS="7",
        THRESHOLD="0.3",
        SEED="8",
        OUT="my out/x.mp4",
    )
    threshold = [] if name == "vanilla" else ["reuse.threshold=0.3"]
    assert handed == [
        *("--model", "my models/one", "--prompt", 'two "words" and $more'),
        *("--out", "my out/x.mp4", "--image", "a b.png", "--end-image", "c.png"),
        *("--video", "d.mp4", "height=64", "width=32", "num_frames=49", "num_steps=7"),
        *("seed=8", "--preset", name, *threshold, "guidance=5", "--dry-run"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_launcher_hands_on_is_in_order(
    launch: Launch, small: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    handed = launch(name, "--dry-run", MODEL=str(small), SEED="8")
    assert main(handed) == 0
    out = capsys.readouterr().out
    assert f"preset       {name}: " in out
    assert f"{name}-8.mp4" in out


@pytest.mark.parametrize("name", [*NAMES, TUNED])
def test_several_gpus_get_a_process_each(launchers: Any, tmp_path: Path, name: str):
    launchers.use_python(f'printf "%s\\0" "$@" > "{tmp_path}/handed"')
    done = launchers.run(name, "--dry-run", cwd=tmp_path, GPUS="4")
    assert done.returncode == 0, done.stderr
    handed = (tmp_path / "handed").read_text().split("\0")
    assert handed[:5] == ["-m", "flowcache.launch", "4", "-m", "skyreels_v2"]


def test_an_empty_prompt_is_handed_on_and_refused(
    launch: Launch, small: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(launch("vanilla", MODEL=str(small), PROMPT="")) == 2
    assert "prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*NAMES, TUNED])
def test_every_launcher_plans_on_the_demo_checkpoint(
    launch: Launch, name: str, capsys: pytest.CaptureFixture[str]
):
    assert main(launch(name, "--dry-run", MODEL="demo")) == 0
    assert "model        demo, diffusers layout" in capsys.readouterr().out


def test_a_missing_picture_is_told_in_one_line(
    launch: Launch, small: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(launch("flowcache_fast", MODEL=str(small), IMAGE="missing.png")) == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "error: missing.png: no such file\n")


def test_a_launcher_makes_a_video_beside_itself(launchers: Any, small: Path, tmp_path: Path):
    launchers.use_python(f'exec "{sys.executable}" "$@"')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = launchers.run("flowcache_kvcompress", "num_steps=1", cwd=elsewhere, MODEL=str(small))
    assert done.returncode == 0, done.stderr
    assert "wrote " in done.stderr
    assert probe(launchers.folder / "result" / "flowcache_kvcompress-3.mp4").num_frames == 17
    assert not list(elsewhere.iterdir())
