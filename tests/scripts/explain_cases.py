"""What the tests of explain.py share: records of small runs, a strict reader of the page."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from flowcache.runtime.video import VideoWriter

SCRIPTS = Path(__file__).parents[2] / "scripts"
MAX_PAGE_BYTES = 5_000_000
NUM_FRAMES = 177
VOID = {"meta", "link", "img", "input", "br"}
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")

Main = Callable[[list[str]], int]


def distance_at(step: int, chunk: int) -> float:
    return 0.3 / (1 + step) + 0.01 * chunk + 0.02


def make_record(
    *,
    threshold: float | None = 0.2,
    num_segments: int = 2,
    num_chunks: int = 3,
    num_steps: int = 8,
    lag: int = 2,
    branches: tuple[str, ...] = ("cond", "uncond"),
    num_frames: int = NUM_FRAMES,
    distance: Callable[[int, int], Any] = distance_at,
) -> dict[str, Any]:
    """Make a record as a run writes it: by the threshold, with a cache that is compressed."""
    decisions: list[dict[str, Any]] = []
    ticks: list[dict[str, Any]] = []
    kv: list[dict[str, Any]] = []
    for segment in range(num_segments):
        sums: dict[tuple[str, int], float] = {}
        for tick in range(num_steps + lag * (num_chunks - 1)):
            ticks.append({"segment": segment, "tick": tick, "seconds": 0.1 + 0.01 * tick})
            for branch in branches:
                for chunk in range(num_chunks):
                    step = tick - lag * chunk
                    if not 0 <= step < num_steps:
                        continue
                    measured = distance(step, chunk) if threshold is not None and step else None
                    amount = measured if isinstance(measured, float) else 0.0
                    total = sums.get((branch, chunk), 0.0) + amount
                    computed = threshold is None or step in (0, num_steps - 1)
                    computed = computed or total >= threshold
                    sums[branch, chunk] = 0.0 if computed else total
                    decisions.append(
                        {
                            "segment": segment,
                            "tick": tick,
                            "chunk": chunk,
                            "step": step,
                            "branch": branch,
                            "computed": computed,
                            "distance": measured,
                            "accumulated": None if measured is None else total,
                            "flops": 5_000_000 if computed else 1_000_000,
                            "flops_saved": 0 if computed else 4_000_000,
                            "seconds": 0.0125 if computed else None,
                        }
                    )
                clean = [c for c in range(num_chunks) if tick - lag * c >= num_steps - 1]
                tokens = {str(c): 80.0 * 0.5 ** (clean[-1] - c) for c in clean}
                kv.append({"segment": segment, "tick": tick, "branch": branch, "tokens": tokens})
    width = num_frames // max(1, num_segments * num_chunks)
    starts = [width * index for index in range(num_segments * num_chunks)]
    shown = [[start, start + width] for start in starts]
    return {
        "schema_version": 1,
        "video": "clip.mp4",
        "model": "demo",
        "preset": "flowcache_fast",
        "policy": "vanilla" if threshold is None else "flowcache",
        "threshold": threshold,
        "num_steps": num_steps,
        "config": {"prompt": "<b>a cat</b> & a dog", "reuse": {"threshold": threshold}},
        "chunk_frames": {
            str(segment): shown[segment * num_chunks : (segment + 1) * num_chunks]
            for segment in range(num_segments)
        },
        "ticks": ticks,
        "decisions": decisions,
        "kv": kv,
        "stages": {
            "text": {"seconds": 0.5, "num_uses": 1, "within": None},
            "kv_compression": {"seconds": 0.25, "num_uses": 3, "within": "dit"},
            "dit": {"seconds": 2.0, "num_uses": 24, "within": None},
        },
        "environment": {"commit": "0123456789abcdef", "device": "cpu", "packages": {}},
    }


def write_run(
    folder: Path,
    name: str = "clip",
    *,
    size: tuple[int, int] | None = (32, 48),
    num_frames: int = NUM_FRAMES,
    shade: int = 0,
    timeline: object = None,
    **settings: Any,
) -> Path:
    """Write a record, and a video of moving noise unless `size` is None; return the video.

    Args:
        timeline: of the report, which is not written without one.
    """
    record = make_record(**settings) | {"video": f"{name}.mp4"}
    (folder / f"{name}.record.json").write_text(json.dumps(record))
    if timeline is not None:
        (folder / f"{name}.json").write_text(json.dumps({"stats": {"timeline": timeline}}))
    if size is not None:
        noise = np.random.default_rng(0).integers(0, 200, (*size, 3), dtype=np.uint8)
        frames = np.stack([np.roll(noise, at, axis=1) + shade for at in range(num_frames)])
        with VideoWriter(folder / f"{name}.mp4", fps=24, size=size) as writer:
            writer.append(frames.astype(np.uint8))
    return folder / f"{name}.mp4"


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order; keeps elements and their text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def count(self, tag: str, **wanted: str) -> int:
        wanted = {name.rstrip("_"): value for name, value in wanted.items()}
        return sum(
            found == tag and wanted.items() <= attributes.items()
            for found, attributes in self.elements
        )

    def says(self, part: str) -> bool:
        return any(part in text for tag, text in self.texts if tag not in ("style", "script"))

    def tips(self) -> list[str]:
        return [text for tag, text in self.texts if tag == "title"]


def explain(main: Main, *arguments: object, code: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == code
