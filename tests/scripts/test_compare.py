"""The command that compares videos: figures, files, and inputs that can't be compared."""

import csv
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from sampling_cases import SCRIPTS

from flowcache.runtime.lpips import BACKBONE_FILE, LAYERS, LPIPS
from flowcache.runtime.metrics import average, psnr, ssim_per_frame
from flowcache.runtime.video import VideoWriter, read_video

Pixels = npt.NDArray[np.uint8]


class Ended(NamedTuple):
    """How the command ended, and what it printed."""

    code: int
    out: str
    err: str


Compare = Callable[..., Ended]


@pytest.fixture(name="compare")
def _compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Compare:
    """Run the command in an empty folder, without the weights of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    main = importlib.import_module("compare").main
    return lambda *arguments: Ended(main(arguments), *capsys.readouterr())


def clip(seed: int = 0, *, num_frames: int = 6, height: int = 32, width: int = 48) -> Pixels:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (num_frames, height // 8, width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def noisy(frames: Pixels, level: float) -> Pixels:
    noise = np.random.default_rng(9).normal(0, level, frames.shape)
    return (frames + noise).clip(0, 255).astype(np.uint8)


def write(path: str, frames: Pixels) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if path.endswith(".npy"):
        np.save(path, frames)
        return
    with VideoWriter(Path(path), fps=24, size=(frames.shape[1], frames.shape[2])) as writer:
        writer.append(frames)


def write_weights() -> None:
    Path("weights").mkdir()
    torch.manual_seed(0)
    tensors = {
        f"{layer.name}.{part}": getattr(convolution, part).detach()
        for layer, convolution in zip(LAYERS, LPIPS().convolutions, strict=True)
        for part in ("weight", "bias")
    }
    torch.save(tensors, Path("weights", BACKBONE_FILE))


def test_a_clip_that_shows_nothing_is_named_below_its_figures(compare: Compare):
    write("black | white.npy", np.zeros_like(clip()))
    write("vanilla.npy", clip())
    ended = compare("black | white.npy", "vanilla.npy", "--metrics", "psnr", "--out", "out")
    assert ended.code == 0
    alarm = "black | white.npy: constant: all 6 frames are of one colour (black)"
    assert f"ALARM {alarm}\n" in ended.out
    result = json.loads(Path("out/compare.json").read_text())
    assert result["clips"]["black | white"]["alarms"] == [alarm]
    lines = Path("out/compare.md").read_text().splitlines()
    assert lines[2].startswith("| black \\| white | 6 |")
    assert "- ALARM " + alarm.replace("|", "\\|") in lines


def write_run(name: str, frames: Pixels, **changes: object) -> None:
    """Write a clip and its report; `reuse__policy=...` changes a nested setting."""
    write(f"{name}.mp4", frames)
    config: dict[str, object] = {"attention": "causal", "num_steps": 30, "seed": 7, "height": 32}
    config |= {"guidance": 4.0, "prompt": "a swan", "device": "auto", "compile": None}
    config |= {
        "reuse": {"policy": "vanilla"},
        "kv": {"compress": "none"},
        "parallel": {"branch": 1},
    }
    model = changes.pop("model", "demo")
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        config[section] = {inner: value} if inner else value
    Path(f"{name}.json").write_text(json.dumps({"model": model, "config": config}))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"attention": "full"}, "attention causal, not full"),
        ({"num_steps": 50}, "num_steps 30, not 50"),
        ({"seed": 8}, "seed 7, not 8"),
        ({"guidance": 6.0}, "guidance 4.0, not 6.0"),
        ({"height": 64}, "height 32, not 64"),
        ({"model": "another"}, "model demo, not another"),
        ({"passes__clean_pass": True}, "passes.clean_pass –, not True"),
        ({"prompt": "a" * 50}, f"prompt a swan, not {'a' * 40}..."),
    ],
)
def test_runs_that_differ_in_more_than_the_cache_are_named_with_what_to_compare(
    compare: Compare, changes: dict[str, object], difference: str
):
    write_run("fast", noisy(clip(), 20), reuse__policy="flowcache")
    write_run("vanilla", clip(), **changes)
    ended = compare("fast.mp4", "vanilla.mp4", "--metrics", "psnr", "--out", "out")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert f"WARNING the runs differ in more than the cache: {difference}" in lines
    (advice,) = (line for line in lines if "its own command" in line)
    assert "compare fast with" in advice
    assert "reuse.policy=vanilla kv.compress=none" in advice
    assert json.loads(Path("out/compare.json").read_text())["unlike"] == {difference: ["fast"]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reuse__policy": "teacache"},
        {"kv__compress": "importance"},
        {"device": "cuda", "compile": True, "parallel__branch": 2, "engine_config__kv_offload": 1},
    ],
)
def test_runs_that_differ_in_the_cache_or_in_where_they_ran_are_alike(
    compare: Compare, changes: dict[str, object]
):
    write_run("fast", noisy(clip(), 20), reuse__policy="flowcache")
    write_run("vanilla", clip(), **changes)
    assert "WARNING" not in compare("fast.mp4", "vanilla.mp4", "--metrics", "psnr").out


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model": 1}', '{"config": 3, "model": ""}'])
def test_without_readable_reports_nothing_is_said_of_settings(
    compare: Compare, content: str | None
):
    write_run("fast", clip())
    write_run("vanilla", clip(), attention="full")
    Path("vanilla.json").unlink()
    if content is not None:
        Path("vanilla.json").write_text(content)
    ended = compare("fast.mp4", "vanilla.mp4", "--metrics", "psnr")
    assert (ended.code, "WARNING" in ended.out) == (0, False)


def test_of_folders_the_warning_counts_the_clips(compare: Compare):
    for folder, attention in (("a", "causal"), ("b", "full")):
        for name in ("one", "two"):
            own = attention if name == "one" else "causal"
            write_run(f"{folder}/{name}", clip(), attention=own)
    out = compare("a", "b", "--metrics", "psnr").out
    assert "cache: attention causal, not full (in 1 of 2 clips)" in out


def test_a_pair_of_videos_has_the_figures_of_their_decoded_frames(compare: Compare):
    write("ours.mp4", noisy(clip(), 20))
    write("vanilla.mp4", clip())
    write_weights()
    ended = compare("ours.mp4", "vanilla.mp4", "--lpips-weights", "weights", "--out", "out")
    assert ended.code == 0
    ours, vanilla = (torch.from_numpy(read_video(Path(f"{n}.mp4"))[0]) for n in ("ours", "vanilla"))
    result = json.loads(Path("out/compare.json").read_text())
    figures = result["clips"]["ours"]
    assert figures["num_frames"] == 6
    assert figures["clip"]["psnr"] == pytest.approx(psnr(ours, vanilla))
    expected = ssim_per_frame(ours, vanilla)
    assert figures["frames"]["ssim"] == pytest.approx(expected.tolist())
    assert figures["clip"]["ssim"] == pytest.approx(expected.mean().item())
    assert 0 < figures["clip"]["lpips"] == pytest.approx(np.mean(figures["frames"]["lpips"]))
    assert result["worst"]["ssim"][0] == ["ours", int(expected.argmin()), expected.min().item()]
    worst = int(np.argmax(figures["frames"]["lpips"]))
    assert result["worst"]["lpips"][0][:2] == ["ours", worst]
    assert "not the released AlexNet" in result["lpips"]["note"]
    assert f"{psnr(ours, vanilla):.2f}" in ended.out
    assert f"worst SSIM: ours #{int(expected.argmin())}" in ended.out
    with Path("out/compare.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["frame"] for row in rows] == [*"012345", "all"]
    assert float(rows[-1]["psnr"]) == figures["clip"]["psnr"]
    assert "| ours | 6 |" in Path("out/compare.md").read_text()


def test_results_are_replaced_only_if_that_is_asked_for(compare: Compare):
    write("a.npy", clip())
    arguments = ["a.npy", "a.npy", "--metrics", "psnr", "--out", "out"]
    assert compare(*arguments).code == 0
    assert "exists and is kept" in compare(*arguments).err
    again = compare(*arguments, "--overwrite")
    assert again.code == 0
    assert sorted(os.listdir("out")) == ["compare.csv", "compare.json", "compare.md"]
    result = json.loads(Path("out/compare.json").read_text())
    assert result["clips"]["a"]["clip"] == {"psnr": "inf"}
    assert "1 of 1 clips equal their references" in again.out


def test_arrays_and_png_files_are_compared_without_a_codec(compare: Compare):
    frames = clip(num_frames=11)
    write("frames.npy", frames)
    np.savez_compressed("frames.npz", noisy(frames, 5))
    Path("png").mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(f"png/frame_{index}.png")  # frame_10 comes after frame_9
    assert "inf" in compare("png", "frames.npy", "--metrics", "psnr,ssim").out
    assert compare("frames.npz", "png", "--metrics", "psnr", "--out", "out").code == 0
    result = json.loads(Path("out/compare.json").read_text())
    expected = psnr(torch.from_numpy(noisy(frames, 5)), torch.from_numpy(frames))
    assert result["clips"]["frames"]["clip"]["psnr"] == pytest.approx(expected)


def test_a_folder_is_compared_as_far_as_it_can_be_and_the_rest_is_named(compare: Compare):
    for name, level in (("one", 4.0), ("two", 8.0), ("three", 16.0)):
        write(f"a/{name}.npy", noisy(clip(), level))
        write(f"b/{name}.npy", clip())
    write("a/short.npy", clip(num_frames=4))
    write("b/short.npy", clip(num_frames=5))
    write("a/small.npy", clip(width=40))
    write("b/small.npy", clip())
    write("a/lonely.npy", clip())
    write("b/extra.npy", clip())
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    rolled = np.concatenate([np.roll(noise, shift, axis=2) for shift in range(49)])
    for folder in "ab":
        write(f"{folder}/corrupt.mp4", rolled)
    data = bytearray(Path("a/corrupt.mp4").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = np.random.default_rng(0).bytes(400)
    Path("a/corrupt.mp4").write_bytes(data)
    Path("b/corrupt.mp4").rename("b/corrupt.mkv")
    Path("a/.hidden.mp4").touch()
    ended = compare("a", "b", "--metrics", "psnr", "--out", "out")
    assert ended.code == 1
    for words in (
        "a/short.npy has 4 frames and b/short.npy 5",
        "a/small.npy is 40x32 pixels and b/small.npy 48x32",
        "lonely: not in b",
        "extra: not in a",
        "a/corrupt.mp4: broken after frame",
    ):
        assert words in ended.err
    assert len(ended.err.splitlines()) == 5
    result = json.loads(Path("out/compare.json").read_text())
    assert set(result["failures"]) == {"short", "small", "lonely", "extra", "corrupt"}
    values = [result["clips"][name]["clip"]["psnr"] for name in ("one", "two", "three")]
    assert values == sorted(values, reverse=True)
    over = result["averages"]["psnr"]
    assert over["mean"] == pytest.approx(np.mean(values))
    assert over["half_width"] == pytest.approx(4.302653 * np.std(values, ddof=1) / math.sqrt(3))
    assert over["num_clips"] == 3
    assert result["worst"]["psnr"][0][0] == "three"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("short.npy full.npy", "short.npy has 4 frames and full.npy 6"),
        ("full.npy short.npy", "full.npy has 6 frames and short.npy 4"),
        ("wide.npy full.npy", "wide.npy is 56x32 pixels and full.npy 48x32"),
        ("text.mp4 full.npy", "text.mp4: not a video"),
        ("full.npy gone.mp4", "gone.mp4: no such file"),
        ("float.npy full.npy", "must hold uint8 pixels"),
        ("text.npy full.npy", "text.npy: not an array file"),
        ("full.npy .", "two clips or two folders"),
        ("full.npy full.npy --metrics mse", "--metrics is 'mse'"),
        ("full.npy full.npy --metrics lpips", "download https://"),
        ("full.npy full.npy --lpips-weights gone", "gone/alexnet"),
        ("full.npy full.npy --device tpu", "device=tpu"),
    ],
)
def test_a_pair_that_cannot_be_compared_is_one_line_and_exit_code_2(
    compare: Compare, arguments: str, words: str
):
    write("full.npy", clip())
    write("short.npy", clip()[:4])
    write("wide.npy", clip(width=56))
    np.save("float.npy", clip().astype(np.float32))
    Path("text.mp4").write_text("no video")
    Path("text.npy").write_text("no array")
    code, out, err = compare(*arguments.split(), "--out", "made/here")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not Path("made").exists()


def test_without_weights_the_column_is_empty_and_one_line_says_why(compare: Compare):
    write("a.npy", clip())
    write("b.npy", noisy(clip(), 5))
    code, out, _ = compare("a.npy", "b.npy")
    assert code == 0
    assert out.splitlines()[1].split()[-1] == "-"
    (note,) = [line for line in out.splitlines() if line.startswith("note:")]
    for words in (
        "LPIPS is empty",
        "torch/hub/checkpoints/alexnet-owt-7be5be79.pth",
        "download https://",
    ):
        assert words in note


def test_the_interval_is_that_of_student():
    assert average([1.0, 2.0, 3.0]).half_width == pytest.approx(2.484, abs=1e-3)
    assert average([1.0, 3.0]).half_width == pytest.approx(12.706, abs=1e-3)
    assert average([1.0]).half_width is None
    over = average([math.inf, 2.0, 4.0])
    assert (over.mean, over.num_clips, over.num_infinite) == (3, 2, 1)


def test_every_example_of_the_help_runs(compare: Compare):
    for name, frames in (("flowcache", noisy(clip(), 9)), ("vanilla", clip())):
        for path in (f"{name}.npy", f"{name}.mp4", f"result/{name}/swan.mp4"):
            write(path, frames)
    write_weights()
    text = importlib.import_module("compare").EXAMPLES
    lines = [line.strip() for line in text.splitlines() if "scripts/compare" in line]
    assert len(lines) >= 4
    assert all(compare(*shlex.split(line)[2:]).code == 0 for line in lines)


@pytest.mark.slow
def test_97_frames_of_540p_need_less_than_4_gigabytes(compare: Compare):
    assert compare  # for its folder
    # bytes throughout: what this process holds when it forks counts as memory of the child
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        rng = np.random.default_rng(seed)
        small = rng.integers(0, 256, (97, 17, 30, 3), dtype=np.uint8)
        write(name, small.repeat(32, axis=1).repeat(32, axis=2))
    write_weights()
    command = [sys.executable, str(SCRIPTS / "compare.py"), "a.mp4", "b.mp4", "--device", "cpu"]
    process = subprocess.Popen([*command, "--lpips-weights", "weights"])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss * 1024 < 4e9
