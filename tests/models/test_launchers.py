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

SKYREELS = ("flowcache_fast", "flowcache_slow", "flowcache_kvcompress", "teacache_slow")
SKYREELS += ("teacache_fast", "vanilla")
MAGI = tuple(
    f"{m}_{mode}" for m in ("vanilla", "teacache", "flowcache") for mode in ("t2v", "i2v", "v2v")
)
NAMES = {"skyreels_v2": SKYREELS, "magi1": MAGI}
TUNED = {"skyreels_v2": "flowcache_tuned", "magi1": "flowcache_tuned_t2v"}
"""Its profile comes with the checkpoint."""
FILES = {
    "skyreels_v2": (
        "run_{}.sh",
        ("scripts/common.sh", *(f"run_{name}.sh" for name in (*SKYREELS, "flowcache_tuned"))),
    ),
    "magi1": ("scripts/single_run/{}.sh", ("scripts", "assets")),
}
VARIABLES = (
    *("MODEL", "PRESET", "PROMPT", "IMAGE", "END_IMAGE", "VIDEO", "HEIGHT", "WIDTH", "NUM_FRAMES"),
    *("PREFIX_FRAMES", "NUM_STEPS", "WINDOW", "THRESHOLD", "PROFILE", "TOTAL_CHUNKS", "SEED"),
    *("SPECIAL_TOKENS", "GPUS", "OUT"),
)
TRIANGLE = "a blue triangle moving up on a black background"
CIRCLE = "a blue circle moving right on a black background"

each = pytest.mark.parametrize(
    ("tiny", "name"),
    [(model, name) for model, names in NAMES.items() for name in names],
    indirect=["tiny"],
)
magi_only = pytest.mark.parametrize("tiny", ["magi1"], indirect=True)

Launch = Callable[..., list[str]]


@pytest.fixture
def launchers(copy_launchers: Callable[..., Any], tiny: Any) -> Any:
    """A copy of the launchers, see `Launchers`."""
    name = tiny.model.name
    pattern, files = FILES[name]
    source = tiny.model.presets.parent
    return copy_launchers(source, files, pattern=pattern, package=name, variables=VARIABLES)


@pytest.fixture
def launch(launchers: Any) -> Launch:
    """Return what runs a launcher from elsewhere and gives what it hands to Python."""
    return launchers.handed_on


def mode_of(name: str) -> str:
    return name.rpartition("_")[2]


def preset_of(name: str, speed: str = "fast") -> str:
    """Return the preset of a launcher of either model."""
    if name in SKYREELS:
        return name
    method = name.partition("_")[0]
    return method if method == "vanilla" else f"{method}_{speed}"


def put_video(folder: Path, name: str, *, age: int) -> Path:
    """Make a file that looks like a finished text-to-video run, so many seconds old."""
    path = folder / "result" / "t2v" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


# What is handed on --------------------------------------------------------------------------


def test_there_is_a_launcher_per_published_way(tiny: Any):
    model = tiny.model.name
    found = {path.stem for path in tiny.model.presets.parent.glob(FILES[model][0].format("*"))}
    names = {*NAMES[model], TUNED[model]}
    assert found == (
        {f"run_{name}" for name in names} if model == "skyreels_v2" else {*names, "common"}
    )


@each
def test_a_launcher_uses_its_preset_and_hands_on_no_empty_variable(
    launch: Launch, launchers: Any, name: str
):
    copy, common = launchers.folder, ["--model", "auto", "--prompt"]
    if name in SKYREELS:
        assert launch(name) == [*common, TRIANGLE, "--out", f"{copy}/result", "--preset", name]
        return
    mode, newest = mode_of(name), put_video(copy, "newest.mp4", age=0)
    given = {"i2v": ["--image", f"{copy}/assets/blue_circle.png"], "v2v": ["--video", str(newest)]}
    prompt = CIRCLE if mode == "i2v" else TRIANGLE
    out = ["--out", f"{copy}/result/{mode}", "--preset", preset_of(name)]
    assert launch(name) == [*common, prompt, *out, *given.get(mode, [])]


HANDED = {
    "MODEL": "my models/one",
    "PRESET": "slow",
    "PROMPT": 'two "words" and $more',
    "IMAGE": "a b.png",
    "END_IMAGE": "c.png",
    "VIDEO": "d e.mp4",
    "PREFIX_FRAMES": "null",
    "HEIGHT": "64",
    "WIDTH": "32",
    "NUM_FRAMES": "48",
    "NUM_STEPS": "8",
    "WINDOW": "2",
    "THRESHOLD": "0.3",
    "TOTAL_CHUNKS": "6",
    "SEED": "8",
    "SPECIAL_TOKENS": "my tokens.npz",
    "OUT": "my out/x.mp4",
}


@each
def test_a_launcher_hands_on_its_variables_and_arguments(launch: Launch, name: str):
    method, mode = name.partition("_")[0], mode_of(name)
    threshold = [] if method == "vanilla" else ["reuse.threshold=0.3"]
    image, video = ["--image", "a b.png"], ["--video", "d e.mp4"]
    expected = ["--model", "my models/one", "--prompt", 'two "words" and $more']
    expected += ["--out", "my out/x.mp4"]
    if name in SKYREELS:
        expected += [*image, "--end-image", "c.png", *video]
        expected += ["height=64", "width=32", "num_frames=48", "num_steps=8", "seed=8"]
        expected += ["--preset", name, *threshold]
    else:
        sizes = ("video_size_h=64", "video_size_w=32", "num_frames=48", "num_steps=8")
        expected += [f"runtime_config.{setting}" for setting in (*sizes, "window_size=2", "seed=8")]
        expected += ["special_tokens=my tokens.npz", "--preset", preset_of(name, "slow")]
        expected += {"t2v": [], "i2v": image, "v2v": [*video, "prefix_frames=null"]}[mode]
        expected += [*threshold, *(["kv.total_chunks=6"] if method == "flowcache" else [])]
    assert launch(name, "kv.mix=0.1", "--dry-run", **HANDED) == [
        *expected,
        *("kv.mix=0.1", "--dry-run"),
    ]


def test_the_tuned_launcher_hands_on_its_profile_and_a_missing_one_is_told(
    launch: Launch, tiny: Any, capsys: pytest.CaptureFixture[str]
):
    name = TUNED[tiny.model.name]
    handed = launch(name, MODEL="a", PROFILE="my profile.yaml", OUT="a.mp4", TOTAL_CHUNKS="6")
    assert handed == [
        *("--model", "a", "--prompt", TRIANGLE, "--out", "a.mp4", "--preset", "flowcache_tuned"),
        "reuse.profile=my profile.yaml",
        *(["kv.total_chunks=6"] if tiny.model.name == "magi1" else []),
    ]
    assert tiny.main(*launch(name, "--dry-run", MODEL=str(tiny.folder))) == 2
    path = tiny.folder / "profiles/flowcache_tuned.yaml"
    here = Path("profiles/flowcache_tuned.yaml").absolute()
    said = f"no such profile, nor {here}: make one with scripts/tune.py --out {path}"
    assert capsys.readouterr().err == f"error: {path}: {said}\n"


def test_the_demo_has_a_profile_for_the_tuned_launcher(
    launch: Launch, tiny: Any, capsys: pytest.CaptureFixture[str]
):
    assert tiny.main(*launch(TUNED[tiny.model.name], "--dry-run", MODEL="demo")) == 0
    steps = {"skyreels_v2": 30, "magi1": 64}[tiny.model.name]
    planned = rf"demo/profiles/flowcache_tuned.yaml: \d+ of {steps} steps planned"
    assert re.search(planned, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("tiny", "name"),
    [
        *(("skyreels_v2", name) for name in (*SKYREELS, TUNED["skyreels_v2"])),
        *(("magi1", name) for name in ("flowcache_t2v", "teacache_i2v", "vanilla_t2v")),
    ],
    indirect=["tiny"],
)
def test_several_gpus_get_a_process_each(launchers: Any, tiny: Any, tmp_path: Path, name: str):
    launchers.use_python(f'printf "%s\\0" "$@" > "{tmp_path}/handed"')
    done = launchers.run(name, "--dry-run", cwd=tmp_path, GPUS="4")
    assert done.returncode == 0, done.stderr
    handed = (tmp_path / "handed").read_text().split("\0")
    assert handed[:6] == ["-m", "flowcache.launch", "4", "-m", tiny.model.name, "--model"]


@magi_only
def test_the_newest_finished_text_to_video_clip_is_continued(launch: Launch, launchers: Any):
    put_video(launchers.folder, "a.mp4", age=300)
    newest = put_video(launchers.folder, "b c.mp4", age=100)
    put_video(launchers.folder, "d.mp4", age=200)
    put_video(launchers.folder, "e.part.mp4", age=0)
    handed = launch("flowcache_v2v")
    assert handed[handed.index("--video") + 1] == str(newest)


@magi_only
@pytest.mark.parametrize("method", ["vanilla", "teacache", "flowcache"])
def test_without_a_clip_to_continue_a_launcher_says_how_to_make_one(
    launchers: Any, tmp_path: Path, method: str
):
    refused = launchers.run(f"{method}_v2v", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "error: no video to continue: set VIDEO=clip.mp4, or make one first: "
        "bash scripts/single_run/flowcache_t2v.sh\n"
    )


@magi_only
def test_the_shipped_picture_is_a_frame_of_the_demos_clips(tiny: Any):
    attributes = Attributes("blue", "circle", "right", "black")
    motion = Motion(x=24, y=32, radius=12.5, speed=0.5)
    drawn = render(attributes, motion, num_frames=1)[0]
    with Image.open(tiny.model.presets.parent / "assets" / "blue_circle.png") as image:
        assert np.array_equal(np.array(image), drawn)


# What comes of it ---------------------------------------------------------------------------


@each
def test_what_a_launcher_hands_on_is_in_order(
    launch: Launch, tiny: Any, clip: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    for speed in ("slow", "fast") if name in MAGI else ("",):
        given = {"VIDEO": str(clip), "PREFIX_FRAMES": "20"} if mode_of(name) == "v2v" else {}
        given |= {"PRESET": speed} if speed else {}
        handed = launch(name, "--dry-run", MODEL=str(tiny.folder), SEED="8", **given)
        assert tiny.main(*handed) == 0
        out, preset = capsys.readouterr().out, preset_of(name, speed)
        assert f"preset       {preset}: " in out
        assert f"{preset}-8.mp4" in out
        if name in MAGI:
            latents = {"t2v": "", "i2v": ", 1 latents given", "v2v": ", 5 latents given"}
            chunks = next(line for line in out.splitlines() if line.startswith("chunks "))
            assert latents[mode_of(name)] in chunks
            assert ("given" in chunks) == (mode_of(name) != "t2v")


@each
def test_every_launcher_plans_on_the_demo_checkpoint(
    launch: Launch, tiny: Any, clip: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    given = {"VIDEO": str(clip), "PREFIX_FRAMES": "20"} if mode_of(name) == "v2v" else {}
    assert tiny.main(*launch(name, "--dry-run", MODEL="demo", **given)) == 0
    out = capsys.readouterr().out
    assert re.search(r"model        demo(,| \(distilled\))", out)
    assert f"preset       {preset_of(name)}: " in out


REFUSED = [
    ("skyreels_v2", "vanilla", {"PROMPT": ""}, "prompt is empty"),
    ("magi1", "vanilla_t2v", {"PROMPT": ""}, "prompt is empty"),
    ("magi1", "flowcache_t2v", {"PRESET": "faster"}, "preset 'flowcache_faster' is unknown"),
    ("skyreels_v2", "flowcache_fast", {"IMAGE": "missing.png"}, "missing.png: no such file\n"),
    ("magi1", "flowcache_i2v", {"IMAGE": "missing.png"}, "missing.png: no such file\n"),
]


@pytest.mark.parametrize(("tiny", "name", "variables", "message"), REFUSED, indirect=["tiny"])
def test_what_is_wrong_is_one_line(
    launch: Launch,
    tiny: Any,
    name: str,
    variables: dict[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    assert tiny.main(*launch(name, MODEL=str(tiny.folder), **variables)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"error: {message}")
    assert told.err.count("\n") == 1


def test_launchers_make_videos_next_to_themselves_and_one_continues_the_other(
    launchers: Any, tiny: Any, tmp_path: Path
):
    launchers.use_python(f'exec "{sys.executable}" "$@"')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    short, result = {"MODEL": str(tiny.folder), "SEED": "3"}, launchers.folder / "result"
    runs = {"flowcache_kvcompress": ("num_steps=1", result / "flowcache_kvcompress-3.mp4", 17)}
    if tiny.model.name == "magi1":
        short |= {"NUM_FRAMES": "36", "NUM_STEPS": "2"}
        runs = {
            "flowcache_t2v": ("offload=false", result / "t2v/flowcache_fast-3.mp4", 36),
            "vanilla_v2v": ("offload=false", result / "v2v/vanilla-3.mp4", 40),
        }
    for name, (setting, path, num_frames) in runs.items():
        done = launchers.run(name, setting, cwd=elsewhere, **short)
        assert done.returncode == 0, done.stderr
        assert "wrote " in done.stderr
        assert probe(path).num_frames == num_frames
        assert path.with_suffix(".json").is_file()
    assert not list(elsewhere.iterdir())
