"""Clips by mode and preset: what is asked for, what is judged, and what a second start makes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowcache.demo.clips import OPENING_FRAMES, caption_of, parse_scene, split_attributes
from flowcache.demo.modes import (
    DRAWN,
    GIVEN_FRAMES,
    MODES,
    case_of,
    drawn_rows,
    judge_case,
    make_rows,
    strip_path,
    summarized,
)

FRAMES = 65


class DrawingPipeline:
    """Answers with the clip that the caption means; what it was asked for is kept."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **settings: Any) -> SimpleNamespace:
        self.calls.append(settings)
        mode = next((m for m in ("image", "video") if m in settings), "t2v")
        mode = {"image": "i2v", "video": "v2v"}.get(mode, mode)
        if len(parse_scene(settings["prompt"])) == 2:
            mode = "pair"
        case = case_of(mode, settings["seed"] - case_of(mode, 0).seed)
        assert caption_of(case.scene) == settings["prompt"]
        return SimpleNamespace(frames=case.drawn(FRAMES))


def test_captions_are_unseen_and_the_same_in_all_modes_of_one_shape():
    _, unseen = split_attributes()
    for index in (0, 5, 30):
        cases = [case_of(mode, index) for mode in MODES]
        assert {attributes for case in cases for attributes in case.scene} <= {*unseen}
        assert len({case.scene for case in cases[:3]}) == 1
        assert len(cases[3].scene) == 2
        assert case_of("v2v", index) == cases[2]


def test_a_picture_or_the_beginning_of_a_clip_is_given():
    image = case_of("i2v", 3).settings["image"]
    video = case_of("v2v", 3).settings["video"]
    assert np.array_equal(image, video[0])
    assert video.shape == (GIVEN_FRAMES, 64, 64, 3)
    assert {*case_of("t2v", 3).settings} == {*case_of("pair", 3).settings} == {"prompt", "seed"}


def test_of_a_continued_clip_only_what_follows_is_judged_in_either_direction():
    case = case_of("v2v", 1)
    frames = case.drawn(FRAMES)
    frames[:GIVEN_FRAMES] = 0
    assert all(judge_case(case, frames)["agrees"].values())
    back = case.drawn(2 * FRAMES)[::-1][: FRAMES + OPENING_FRAMES]
    assert judge_case(case, np.concatenate([frames[:GIVEN_FRAMES], back]))["agrees"]["direction"]
    other = case_of("t2v", 1)
    assert not judge_case(other, frames)["agrees"]["shape"]


def test_what_is_missing_is_made_and_a_second_start_makes_nothing(tmp_path: Path):
    pipeline: Any = DrawingPipeline()

    def rows() -> list[dict[str, Any]]:
        given = {"presets": ["a", "b"], "modes": MODES, "count": 2, "folder": tmp_path}
        return [*make_rows(pipeline, **given)]

    first = rows()
    assert len(pipeline.calls) == len(first) == 16
    assert [call["preset"] for call in pipeline.calls] == ["a"] * 8 + ["b"] * 8
    assert rows() == first
    assert len(pipeline.calls) == 16
    log = tmp_path / "rows.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:10]) + "\n" + lines[10][:20])
    assert rows() == first
    assert len(pipeline.calls) == 22
    with Image.open(strip_path(tmp_path, "b", "pair", 1)) as strip:
        assert strip.size == (12 * 66, 66)
    for group in summarized(first):
        if group["mode"] != "pair":
            assert group["all"] == group["kept"] == group["smooth"] == group["whole"] == 1


def test_shares_and_changes_are_means_over_the_clips_of_a_mode_and_preset():
    def row(*, right: bool, changes: list[float]) -> dict[str, Any]:
        names = ("color", "shape", "direction", "background")
        return {
            "preset": "p",
            "mode": "t2v",
            "agrees": dict.fromkeys(names, True) | {"shape": right},
            "passes": {"kept": right, "smooth": True, "whole": True},
            "changes": changes,
        }

    rows = [row(right=True, changes=[1, 3]), row(right=False, changes=[2, 5])]
    (group,) = summarized(json.loads(json.dumps(rows)))
    assert group == {
        "preset": "p",
        "mode": "t2v",
        "clips": 2,
        "color": 1,
        "shape": 0.5,
        "direction": 1,
        "background": 1,
        "all": 0.5,
        "kept": 0.5,
        "smooth": 1,
        "whole": 1,
        "changes": [1.5, 4],
    }


def test_the_judge_is_judged_by_the_drawn_clips():
    rows = drawn_rows(["t2v", "v2v"], count=2)
    assert {row["preset"] for row in rows} == {DRAWN}
    assert all(all(row["agrees"].values()) and all(row["passes"].values()) for row in rows)


@pytest.mark.parametrize("mode", MODES)
def test_a_grey_clip_is_wrong_in_every_mode(mode: str):
    case = case_of(mode, 0)
    judged = judge_case(case, np.full((FRAMES, 64, 64, 3), 128, np.uint8))
    assert not any(judged["agrees"][name] for name in ("color", "shape", "direction"))
    assert not judged["passes"]["kept"]
