"""The command line: what it takes, and one clear line for everything it can't take."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowcache.runtime.video import VideoWriter
from magi1.__main__ import main

Refused = Callable[..., str]
Arguments = list[str]


@pytest.fixture
def arguments(distilled: Path, tmp_path: Path) -> Arguments:
    """Arguments that are in order."""
    out = str(tmp_path / "videos")
    return ["--model", str(distilled), "--prompt", "a red circle", "--out", out]


@pytest.fixture
def refused(arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return what runs the command line and gives its one line of error.

    Nothing may be printed or made before: the plan is printed before any weights are loaded.
    """

    def run(*more: str) -> str:
        assert main([*arguments, *more]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        line = captured.err.removesuffix("\n")
        assert line.startswith("error: ")
        assert "\n" not in line
        assert not list(tmp_path.rglob("videos/*"))
        return line

    return run


@pytest.fixture
def edited(distilled: Path, tmp_path: Path) -> Callable[..., str]:
    """Return what writes the checkpoint's JSON config with one field changed or left out."""

    def edit(section: str, **changes: Any) -> str:
        document = json.loads((distilled / "config.json").read_text())
        for name in ("load", "t5_pretrained", "vae_pretrained"):
            document["runtime_config"][name] = str(distilled / document["runtime_config"][name])
        for name, value in changes.items():
            document[section].pop(name, None)
            if value is not None:
                document[section][name] = value
        path = tmp_path / "edited.json"
        path.write_text(json.dumps(document))
        return str(path)

    return edit


# Mistakes in the JSON config ----------------------------------------------------------------


def test_a_missing_or_unknown_field_is_named(refused: Refused, edited: Callable[..., str]):
    line = refused("--model", edited("runtime_config", num_steps=None))
    assert "runtime_config.num_steps has no value" in line
    line = refused("--model", edited("engine_config", distil=True))
    assert "edited.json: unknown key 'engine_config.distil'" in line
    assert "did you mean engine_config.distill?" in line
    line = refused("--model", edited("model_config", num_layers="many"))
    assert "model_config.num_layers is 'many', but must be int" in line


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("runtime_config.num_steps=5", "num_steps is 5, but must divide by 2"),
        ("runtime_config.noise2clean_kvrange=[3,2,1]", "must divide by the 3 entries"),
        ("runtime_config.video_size_w=40", "video_size_w is 40, but must be a positive multiple"),
        ("runtime_config.num_frames=3", "num_frames is 3, but must make a latent of 4 frames"),
        ("runtime_config.cfg_number=3", "must be 1 for a distilled model"),
        ("kv.total_chunks=2", "kv.total_chunks must be above runtime_config.window_size 2"),
        ("reuse.polcy=vanilla", "did you mean reuse.policy?"),
        ("reuse.policy=magic", "must be one of vanilla, teacache, flowcache, stride"),
        ("seed=3", "unknown key 'seed', did you mean runtime_config.seed?"),
        ("num_frames=24", "unknown key 'num_frames', did you mean runtime_config.num_frames?"),
        ("num_steps", "is not an override"),
        ("device=gpu", "device=gpu"),
    ],
)
def test_a_wrong_setting_is_one_line(refused: Refused, setting: str, message: str):
    assert message in refused("--preset", "flowcache_fast", setting)


def test_an_unknown_preset_or_model_is_named(refused: Refused):
    assert "did you mean flowcache_fast?" in refused("--preset", "flowcach_fast")
    line = refused("--model", "4.5B")
    assert "4.5B: no such file or folder" in line
    assert "4.5B_distill" in line


def test_arguments_that_no_flag_takes_are_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["--frobnicate"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# Mistakes in files --------------------------------------------------------------------------


def test_a_missing_part_of_the_checkpoint_is_named(
    refused: Refused, edited: Callable[..., str], tmp_path: Path
):
    for name in ("load", "t5_pretrained", "vae_pretrained"):
        missing = str(tmp_path / "missing")
        line = refused("--model", edited("runtime_config", **{name: missing}))
        assert missing in line
        assert f"the config's {name} asks for it" in line


def test_weights_of_another_size_are_refused(refused: Refused, edited: Callable[..., str]):
    line = refused("--model", edited("model_config", ffn_hidden_size=64))
    assert "mlp.linear_fc1.weight" in line


@pytest.mark.parametrize("flag", ["--image", "--video"])
def test_a_given_file_that_is_none_is_named(refused: Refused, tmp_path: Path, flag: str):
    text = tmp_path / "text.png"
    text.write_text("no picture at all\n" * 20)
    kind = "not a video" if flag == "--video" else "not an image"
    for path, message in ((tmp_path / "missing.png", "no such file"), (text, kind)):
        line = refused(flag, str(path))
        assert str(path) in line
        assert message in line


def test_a_video_that_is_too_short_is_refused(refused: Refused, tmp_path: Path):
    path = tmp_path / "short.mp4"
    with VideoWriter(path, fps=24, size=(32, 48)) as writer:
        writer.append(np.zeros((6, 32, 48, 3), np.uint8))
    assert "has 6 frames at 24 fps, fewer than prefix_frames 32" in refused("--video", str(path))


def test_special_tokens_that_do_not_fit_are_refused(refused: Refused, tmp_path: Path):
    missing = tmp_path / "missing.npz"
    assert f"{missing}: no such file" in refused(f"special_tokens={missing}")
    path = tmp_path / "tokens.npz"
    np.savez(
        path,
        caption_token=np.zeros((1, 12)),
        logo_token=np.zeros((1, 12)),
        other_tokens=np.zeros((100, 16)),
    )
    line = refused(f"special_tokens={path}")
    assert "other_tokens has shape [100, 16], expected [100, 12]" in line


def test_existing_results_are_kept(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    video, report = tmp_path / "mine.mp4", tmp_path / "other.json"
    for path in (video, report):
        path.write_text("mine")
    for out, kept in ((video, video), (tmp_path / "other.mp4", report)):
        assert main([*arguments, "--out", str(out), "--dry-run"]) == 2
        assert f"{kept} exists and is kept" in capsys.readouterr().err
        assert kept.read_text() == "mine"
        assert main([*arguments, "--out", str(out), "--dry-run", "--overwrite"]) == 0
        capsys.readouterr()


# What works ---------------------------------------------------------------------------------


def test_a_run_from_the_command_line(arguments: Arguments, tmp_path: Path):
    assert main([*arguments, "--preset", "flowcache_slow", "--seed", "9"]) == 0
    assert (tmp_path / "videos/flowcache_slow-9.mp4").is_file()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*arguments, "--dry-run", "runtime_config.num_frames=30"]) == 0
    out = capsys.readouterr().out
    assert "distilled (distilled), float32 on" in out
    assert "36 frames of 48x32 at 24 fps (30 asked, 36 made: whole chunks), seed 3" in out
    assert "flowcache reuse, importance KV compression, extra passes: none" in out
    # "a", "red", "circle" and the end token, after the tokens of quality and duration
    assert "text 6" in out
    assert not list(tmp_path.rglob("videos/*"))


def test_released_models_are_planned_without_files(capsys: pytest.CaptureFixture[str]):
    asked = ["--prompt", "a cat", "--dry-run", "--preset", "vanilla"]
    assert main(["--model", "4.5B_distill", *asked]) == 0
    out = capsys.readouterr().out
    assert "240 frames of 720x720" in out
    assert "310.1 PFLOPs" in out
    assert main(["--model", "24B_base", *asked]) == 0
    assert "1280x720" in capsys.readouterr().out


def test_help_and_the_list_of_settings_name_everything(capsys: pytest.CaptureFixture[str]):
    assert main(["--list-settings"]) == 0
    listed = capsys.readouterr().out
    for key in (
        "runtime_config.num_frames",
        "reuse.threshold",
        "kv.total_chunks",
        "tokens.quality",
    ):
        assert f"\n{key}: " in listed
    lines = listed.splitlines()
    assert all("  # " in line for line in lines)
    assert len({line.partition(":")[0] for line in lines}) == len(lines)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("--dry-run", "--download", "--model", "demo-base", "key=value", "examples"):
        assert word in text
