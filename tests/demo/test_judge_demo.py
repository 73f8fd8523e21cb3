"""The judging command reads videos through the codec and says which attribute is wrong."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from flowcache.demo.clips import (
    Attributes,
    parse_scene,
    random_motion,
    render,
    split_attributes,
)
from flowcache.demo.judge import judge
from flowcache.runtime.video import VideoWriter, read_video

FRAMES = 33


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("judge_demo")


def _write(
    path: Path, attributes: Attributes, *, said: str, preset: str = "", image: str | None = None
) -> None:
    path.parent.mkdir(exist_ok=True)
    frames = render(
        attributes, random_motion(np.random.default_rng(0), attributes), num_frames=FRAMES
    )
    with VideoWriter(path, fps=24, size=(64, 64)) as writer:
        writer.append(frames)
    path.with_suffix(".json").write_text(
        json.dumps({"preset": preset, "config": {"prompt": said, "image": image}})
    )


def test_clips_are_readable_after_the_codec(tmp_path: Path):
    for index, attributes in enumerate(split_attributes()[1][::3]):
        path = tmp_path / f"{index}.mp4"
        _write(path, attributes, said="")
        frames, _ = read_video(path)
        assert len(frames) == FRAMES
        assert all(judge(frames).agrees(attributes).values()), attributes


def test_the_command_counts_agreement(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    drawn = Attributes("red", "circle", "right", "black")
    _write(tmp_path / "a.mp4", drawn, said=drawn.caption)
    _write(tmp_path / "b.mp4", drawn, said="a red square moving right on a black background")
    monkeypatch.setattr(sys, "argv", ["judge_demo.py", str(tmp_path)])
    assert script.main() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-1] == "agrees"
    assert lines[1][-2:] == ["wrong:", "shape"]
    assert ["color", "2", "of", "2"] in lines
    assert ["shape", "1", "of", "2"] in lines
    assert ["all", "1", "of", "2"] in lines
    assert ["kept", "2", "of", "2"] in lines
    assert ["smooth", "2", "of", "2"] in lines
    assert ["whole", "2", "of", "2"] in lines


def test_modes_and_presets_have_rows_of_their_own_and_a_sheet_shows_the_frames(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    drawn = Attributes("red", "circle", "right", "black")
    _write(tmp_path / "a/0.mp4", drawn, said=drawn.caption, preset="vanilla")
    _write(tmp_path / "b/0.mp4", drawn, said=drawn.caption, preset="vanilla", image="x.png")
    _write(tmp_path / "b/1.mp4", drawn, said="a blue circle moving right on a black background")
    sheet = tmp_path / "sheet.png"
    words = ["judge_demo.py", str(tmp_path), "--by-mode", "--sheet", str(sheet)]
    monkeypatch.setattr(sys, "argv", words)
    assert script.main() == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:4] == ["mode", "preset", "clips", "color"]
    assert [row[:4] for row in rows[2:]] == [
        ["i2v", "vanilla", "1", "100%"],
        ["t2v", "", "1", "0%"],
        ["t2v", "vanilla", "1", "100%"],
    ]
    assert Image.open(sheet).size == (12 * 66, 3 * 66)


def test_clips_are_made_by_mode_and_their_table_and_sheets_written(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def load(model: str, **given: object) -> object:
        assert (model, given["architecture"]) == ("demo", "magi1")
        assert given["num_frames"] == 40

        def make(*, prompt: str, **_: object) -> SimpleNamespace:
            (attributes,) = parse_scene(prompt)
            motion = random_motion(np.random.default_rng(0), attributes)
            return SimpleNamespace(frames=render(attributes, motion, num_frames=40))

        return make

    monkeypatch.setattr(script.api, "load", load)
    words = ["judge_demo.py", str(tmp_path), "--architecture", "magi1", "--make", "2"]
    words += ["--presets", "vanilla", "flowcache_fast", "--modes", "t2v", "--num-frames", "40"]
    monkeypatch.setattr(sys, "argv", words)
    assert script.main() == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[:4] for row in rows[2:]] == [
        ["t2v", "drawn", "2", "100%"],
        ["t2v", "vanilla", "2", "100%"],
        ["t2v", "flowcache_fast", "2", "100%"],
    ]
    written = json.loads((tmp_path / "judge.json").read_text())
    assert written["architecture"] == "magi1"
    assert [group["preset"] for group in written["groups"]] == [
        "drawn",
        "vanilla",
        "flowcache_fast",
    ]
    for preset in ("vanilla", "flowcache_fast"):
        assert Image.open(tmp_path / f"sheet-{preset}-t2v.png").size == (12 * 66, 2 * 66)


def test_no_clips_to_make_is_an_error(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["judge_demo.py", str(tmp_path / "new"), "--make", "0"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert not (tmp_path / "new").exists()


def test_a_folder_without_videos_is_an_error(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["judge_demo.py", str(tmp_path)])
    assert script.main() == 2


def test_a_prompt_that_is_no_caption_is_an_error(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _write(tmp_path / "a.mp4", Attributes("red", "circle", "up", "gray"), said="a cat")
    monkeypatch.setattr(sys, "argv", ["judge_demo.py", str(tmp_path)])
    assert script.main() == 2
