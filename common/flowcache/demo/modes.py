"""Make a demo's clips by mode and preset, judge them, and say what share of them is right.

Modes: from text (`t2v`), from a drawn first picture and text (`i2v`), from the drawn beginning of a
clip and text (`v2v`), and from text about two shapes (`pair`). Captions are of shapes that the
training left out. Where a clip is given, only what follows it is judged.

Axes: T frames, H rows, W columns.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowcache.api import Pipeline
from flowcache.demo.clips import (
    Attributes,
    Motion,
    caption_of,
    draw,
    random_motion,
    render_scene,
    split_attributes,
)
from flowcache.demo.judge import ATTRIBUTE_NAMES, judge_scene, judge_steadiness, only
from flowcache.runtime.files import read_json_lines

MODES = ("t2v", "i2v", "v2v", "pair")
STEADY_NAMES = ("kept", "smooth", "whole")
GIVEN_FRAMES = 33
"""Of the beginning in mode `v2v`: one whole chunk or more of every model."""
DRAWN, DRAWN_FRAMES = "drawn", 97
"""Preset and length of the clips that the captions mean."""
SHEET_FRAMES = 12
SHEET_GAP = 2
_SEED = 5000


@dataclass(frozen=True)
class Case:
    """A clip to make.

    Attributes:
        moving: the shapes of its caption, and how they move in a clip that is given or drawn.
        seed: of its noise.
    """

    mode: str
    index: int
    moving: tuple[tuple[Attributes, Motion], ...]
    seed: int

    @property
    def scene(self) -> tuple[Attributes, ...]:
        """The shapes of its caption."""
        return tuple(attributes for attributes, _ in self.moving)

    @property
    def num_given(self) -> int:
        """Frames that it begins with; none for a clip from text."""
        return {"i2v": 1, "v2v": GIVEN_FRAMES}.get(self.mode, 0)

    def drawn(self, num_frames: int) -> NDArray[np.uint8]:
        """Draw what the caption means, `[T, H, W, 3]`."""
        return render_scene(self.moving, num_frames=num_frames)

    @property
    def settings(self) -> dict[str, Any]:
        """What the pipeline is given."""
        settings: dict[str, Any] = {"prompt": caption_of(self.scene), "seed": self.seed}
        if self.mode == "i2v":
            settings["image"] = self.drawn(1)[0]
        if self.mode == "v2v":
            settings["video"] = self.drawn(self.num_given)
        return settings


def case_of(mode: str, index: int) -> Case:
    """Return the clip of a number; all modes of one shape go through the same captions."""
    _, unseen = split_attributes()
    rng = np.random.default_rng((_SEED, index))
    scene = (unseen[index % len(unseen)],)
    if mode == "pair":
        scene = draw(rng, unseen, num_frames=1, pair_share=1.0).scene
    moving = tuple((attributes, random_motion(rng, attributes)) for attributes in scene)
    return Case(mode, index, moving, _SEED + index)


def judge_case(case: Case, frames_THW3: NDArray[np.uint8]) -> dict[str, Any]:
    """Judge a clip; of one that was given a beginning, what follows it."""
    is_later = case.mode == "v2v"
    shown = frames_THW3[case.num_given if is_later else 0 :]
    return judge_clip(shown, case.scene, either_way=is_later)


def judge_clip(
    frames_THW3: NDArray[np.uint8], scene: Sequence[Attributes], *, either_way: bool = False
) -> dict[str, Any]:
    """Return what a clip shows of a scene; of two shapes, the one in front says how steadily.

    Args:
        either_way: whether a shape may also move against the direction of its caption.

    Returns:
        agrees: by attribute, of all shapes together; passes: of a steady clip; rhythm: see
        `Steadiness`; changes: mean absolute change from frame to frame, in grey levels.
    """
    agrees = [
        verdict.agrees(attributes, either_way=either_way)
        for verdict, attributes in zip(judge_scene(frames_THW3, scene), scene, strict=True)
    ]
    steady = judge_steadiness(only(frames_THW3, scene[0], scene))
    changes_T = np.abs(np.diff(frames_THW3.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))
    return {
        "agrees": {name: all(each[name] for each in agrees) for name in ATTRIBUTE_NAMES},
        "passes": steady.passes,
        "kept_share": round(steady.kept_share, 4),
        "rhythm": round(steady.rhythm, 4),
        "changes": [round(float(change), 3) for change in changes_T],
    }


def make_rows(
    pipeline: Pipeline, *, presets: Sequence[str], modes: Sequence[str], count: int, folder: Path
) -> Iterator[dict[str, Any]]:
    """Make and judge the clips that a folder lacks, with a few frames of each in a picture.

    Args:
        count: clips of each mode and preset.
        folder: keeps a row per clip; a second start goes on where the first one stopped.

    Yields:
        all rows, by preset, mode and number.
    """
    log = folder / "rows.jsonl"
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    kept = read_json_lines(log, advice="delete the line", repairs=True)
    rows = {(row["preset"], row["mode"], row["index"]): row for row in kept}
    for key in itertools.product(presets, modes, range(count)):
        if key not in rows:
            preset, mode, index = key
            case = case_of(mode, index)
            frames = np.asarray(pipeline(preset=preset, **case.settings).frames)
            strip(frames).save(strip_path(folder, *key))
            rows[key] = row_of(case, frames, preset=preset)
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(rows[key]) + "\n")
        yield rows[key]


def drawn_rows(modes: Sequence[str], *, count: int) -> list[dict[str, Any]]:
    """Judge the clips that the captions mean: what is wrong there is the judge's own mistake."""
    cases = [case_of(mode, index) for mode in modes for index in range(count)]
    return [row_of(case, case.drawn(DRAWN_FRAMES), preset=DRAWN) for case in cases]


def row_of(case: Case, frames_THW3: NDArray[np.uint8], *, preset: str) -> dict[str, Any]:
    """Return what is kept of a clip."""
    return {
        "preset": preset,
        "mode": case.mode,
        "index": case.index,
        "caption": caption_of(case.scene),
        **judge_case(case, frames_THW3),
    }


def strip_path(folder: Path, preset: str, mode: str, index: int) -> Path:
    """Return where the picture of a clip lies."""
    return folder / "frames" / f"{preset}-{mode}-{index}.png"


def strip(frames_THW3: NDArray[np.uint8]) -> Image.Image:
    """Draw a few frames of a clip side by side."""
    times = np.linspace(0, len(frames_THW3) - 1, SHEET_FRAMES).round().astype(int)
    gap = ((0, 0), (0, SHEET_GAP), (0, SHEET_GAP), (0, 0))
    padded = np.pad(frames_THW3[times], gap, constant_values=255)
    return Image.fromarray(np.concatenate(padded, axis=1))


def stacked(strips: Sequence[Image.Image]) -> Image.Image:
    """Put strips of equal size one below the other."""
    return Image.fromarray(np.concatenate([np.asarray(each) for each in strips]))


def summarized(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the shares of what is right, by preset and mode, and how the picture changes.

    Returns:
        for each group `preset`, `mode`, `clips`, the share of each attribute and of what holds of
        a steady clip, `all` of the attributes, and `changes`: the mean over the clips by frame.
    """
    groups = dict[tuple[str, str], list[Mapping[str, Any]]]()
    for row in rows:
        groups.setdefault((row["preset"], row["mode"]), []).append(row)
    return [
        {
            "preset": preset,
            "mode": mode,
            "clips": len(group),
            **{name: _share([row["agrees"][name] for row in group]) for name in ATTRIBUTE_NAMES},
            "all": _share([all(row["agrees"].values()) for row in group]),
            **{name: _share([row["passes"][name] for row in group]) for name in STEADY_NAMES},
            "changes": np.mean([row["changes"] for row in group], axis=0).round(3).tolist(),
        }
        for (preset, mode), group in groups.items()
    ]


def _share(holds: Sequence[bool]) -> float:
    return sum(holds) / len(holds)
