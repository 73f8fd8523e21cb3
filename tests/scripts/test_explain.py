"""The page that shows what the cache did: what it holds, what it says, what it refuses."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowcache.video import VideoWriter

SCRIPTS = Path(__file__).parents[2] / "scripts"
MAX_PAGE_BYTES = 5_000_000
NUM_FRAMES = 177
VOID = {"meta", "link", "img", "input", "br"}
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")

Main = Callable[[list[str]], int]


@pytest.fixture(name="main")
def _main(monkeypatch: pytest.MonkeyPatch) -> Main:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("explain").main


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
    **settings: Any,
) -> Path:
    """Write a record, and a video of moving noise unless `size` is None; return the video."""
    record = make_record(**settings) | {"video": f"{name}.mp4"}
    (folder / f"{name}.record.json").write_text(json.dumps(record))
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


# One run -------------------------------------------------------------------------------------


def test_the_page_holds_every_decision_with_its_figures(main: Main, tmp_path: Path):
    video = write_run(tmp_path)
    explain(main, video)
    page = Page(tmp_path / "clip.html")
    rows = make_record()["decisions"]
    assert len(rows) == 2 * 2 * 3 * 8
    assert page.count("rect", class_="computed") == sum(row["computed"] for row in rows)
    assert page.count("rect", class_="reused") == sum(not row["computed"] for row in rows)
    first = "chunk 0, step 1, tick 1: reused\ndistance 0.17\naccumulated 0.17\n"
    assert page.tips().count(first + "1 MFLOP spent, 4 MFLOP saved") == 4
    assert any("12.5 ms" in tip for tip in page.tips())


def test_the_page_has_every_part_for_each_segment_and_branch(main: Main, tmp_path: Path):
    explain(main, write_run(tmp_path))
    page = Page(tmp_path / "clip.html")
    for part in ("Decisions", "Distances", "KV cache", "Time", "Key frames", "Settings"):
        assert ("h2", part) in page.texts
    for branch in ("cond", "uncond"):
        assert page.count("figure", **{"data-branch": branch}) == 2 * 4
        assert page.count("input", value=branch) == 1
        for segment in (0, 1):
            assert page.says(f"segment {segment}, branch {branch}")
    assert page.count("img") == 2 * 3 * 3
    assert page.says("threshold 0.2")
    assert page.says("kv compression")
    assert page.says("<b>a cat</b> & a dog")
    assert page.says("frames 29 to 57")


def test_the_summary_counts_what_the_record_holds(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    explain(main, write_run(tmp_path))
    lines = dict(
        line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line
    )
    figures = {name: value.strip() for name, value in lines.items()}
    rows = make_record()["decisions"]
    num_computed = sum(row["computed"] for row in rows)
    assert figures["chunk passes"] == "96"
    assert figures["computed"] == f"{num_computed} ({100 * num_computed / 96:.1f} %)"
    assert figures["seconds of all stages"] == "2.50 s"
    assert figures["most clean tokens in the cache"] == "140.0"


def test_a_page_needs_nothing_from_outside(main: Main, tmp_path: Path):
    explain(main, write_run(tmp_path))
    page = Page(tmp_path / "clip.html")
    assert not re.search(r"https?:|[\"'(]//|url\(|@import|fetch\(|XMLHttp", page.html)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_a_long_video_makes_a_page_below_five_megabytes(main: Main, tmp_path: Path):
    size = {"num_segments": 3, "num_chunks": 8, "num_steps": 50, "lag": 5}
    video = write_run(tmp_path, size=(272, 480), **size)
    explain(main, video)
    page = tmp_path / "clip.html"
    assert 1_000_000 < page.stat().st_size < MAX_PAGE_BYTES
    assert Page(page).count("img") == 3 * 8 * 3


def test_a_missing_video_is_said_and_the_rest_is_shown(main: Main, tmp_path: Path):
    write_run(tmp_path, size=None)
    explain(main, tmp_path / "clip.record.json")
    page = Page(tmp_path / "clip.html")
    assert page.says("clip.mp4: no such file")
    assert page.count("img") == 0
    assert page.count("rect", class_="reused")


def test_a_record_that_knows_no_frames_shows_those_of_the_whole_video(main: Main, tmp_path: Path):
    video = write_run(tmp_path)
    path = tmp_path / "clip.record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunk_frames": {}}))
    explain(main, video)
    page = Page(tmp_path / "clip.html")
    assert page.count("img") == 3
    assert page.says("does not say which frames")


@pytest.mark.parametrize("spelled", ["nan", "inf"])
def test_a_distance_that_is_no_number_is_marked(main: Main, tmp_path: Path, spelled: str):
    def distance(step: int, chunk: int) -> Any:
        return spelled if (step, chunk) == (3, 1) else distance_at(step, chunk)

    video = write_run(tmp_path, size=None, distance=distance)
    explain(main, video)
    page = Page(tmp_path / "clip.html")
    assert page.count("path", class_="cross") == 2 * 2
    assert any(f"distance is {spelled}" in tip for tip in page.tips())
    assert "nan" not in "".join(
        attributes.get("d") or "" for tag, attributes in page.elements if tag == "path"
    )


def test_a_run_without_distances_says_so(main: Main, tmp_path: Path):
    explain(main, write_run(tmp_path, size=None, threshold=None))
    page = Page(tmp_path / "clip.html")
    assert page.says("The policy vanilla measured none.")
    assert page.count("line", class_="threshold") == 0


ALARMS: dict[str, dict[str, Any]] = {
    "never hit": {"threshold": 0.0},
    "always hit": {"threshold": 9.0},
    "distance is not a number": {"distance": lambda step, _: "nan" if step == 3 else 0.1},
    "distance is constant": {"distance": lambda *_: 0.125},
    "threshold never reached": {"threshold": 9.0},
}


@pytest.mark.parametrize("said", ALARMS)
def test_an_alarm_is_printed_and_shown_and_fails_where_that_is_asked_for(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], said: str
):
    video = write_run(tmp_path, size=None, **ALARMS[said])
    explain(main, video)
    assert f"ALARM clip: {said}" in capsys.readouterr().out
    page = Page(tmp_path / "clip.html")
    assert any(tag == "li" and text.startswith(said) for tag, text in page.texts)
    explain(main, video, "--strict", code=1)


def test_without_an_alarm_strict_changes_nothing(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    explain(main, write_run(tmp_path, size=None), "--strict")
    assert "no alarm\n" in capsys.readouterr().out
    assert Page(tmp_path / "clip.html").says("No alarm.")


# Two runs ------------------------------------------------------------------------------------


def test_two_runs_stand_side_by_side_with_what_differs(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = write_run(tmp_path, "full", threshold=None)
    second = write_run(tmp_path, "fast", shade=10)
    explain(main, first, second)
    page = Page(tmp_path / "full-and-fast.html")
    assert page.count("figure", **{"data-branch": "cond"}) == 2 * 2 * 4
    assert page.count("img") == 2 * 2 * 3 * 3
    for cell in ("config.reuse.threshold", "PSNR of B against A", "computed"):
        assert page.says(cell)
    assert not page.says("config.prompt") or page.count("details") == 2
    assert page.count("svg", **{"aria-label": "PSNR in dB over frames"}) == 1
    out = capsys.readouterr().out
    assert re.search(r"PSNR of B against A +– +2\d\.\d\d dB", out)  # 10 levels are 28.1 dB
    spent = {name: sum(row["flops"] for row in make_record(threshold=value)["decisions"])
             for name, value in (("full", None), ("fast", 0.2))}  # fmt: skip
    assert re.search(rf"FLOPs spent .* {spent['fast'] / spent['full']:.3f}\n", out)


def test_equal_videos_are_said_to_be_equal(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    video = write_run(tmp_path)
    explain(main, video, video)
    page = Page(tmp_path / "clip-and-clip.html")
    assert page.says("177 of 177 frames are equal")
    assert page.says("All settings are equal.")
    assert "∞ (equal pixels)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "other", [{"size": (32, 64)}, {"num_frames": 100}, {"size": None}], ids=["size", "length", "no"]
)
def test_videos_that_cannot_be_compared_are_named_not_measured(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any]
):
    first, second = write_run(tmp_path, "a"), write_run(tmp_path, "b", **other)
    explain(main, first, second)
    said = "b.mp4: no such file" if other.get("size", 0) is None else "clips of one shape"
    assert Page(tmp_path / "a-and-b.html").says(said)
    out = capsys.readouterr().out
    assert f"No metrics: {said}" in out
    assert "PSNR" not in out


# What may go wrong ---------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.record.json", "clip.json", "clip.txt", "clip"])
def test_a_run_without_a_record_is_an_error(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    explain(main, tmp_path / name, code=2)
    assert "record" in one_line(capsys)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 99}']
)
def test_a_broken_record_is_an_error(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
):
    (tmp_path / "clip.record.json").write_text(content)
    explain(main, tmp_path / "clip.mp4", code=2)
    assert "clip.record.json" in one_line(capsys)


def test_a_record_without_a_decision_is_an_error(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_run(tmp_path, size=None, num_segments=0, num_frames=0)
    explain(main, tmp_path / "clip.mp4", code=2)
    assert "no decision" in one_line(capsys)


def test_an_existing_page_is_kept_unless_it_may_be_replaced(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    video = write_run(tmp_path, size=None)
    page = tmp_path / "page.html"
    page.write_text("mine")
    explain(main, video, "--out", page, code=2)
    assert "--overwrite" in one_line(capsys)
    assert page.read_text() == "mine"
    explain(main, video, "--out", page, "--overwrite")
    assert Page(page).says("What the cache did")
    explain(main, video)
    explain(main, video)
    assert {path.name for path in tmp_path.glob("*.html")} == {
        "page.html",
        "clip.html",
        "clip-001.html",
    }


def test_three_runs_or_another_suffix_are_errors(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    video = write_run(tmp_path, size=None)
    explain(main, video, video, video, code=2)
    assert "3 were given" in one_line(capsys)
    explain(main, video, "--out", tmp_path / "page.pdf", code=2)
    assert ".html" in one_line(capsys)


# The documented commands, and a browser -------------------------------------------------------


def test_the_examples_of_the_help_run(
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    examples = re.findall(r"^  python scripts/explain\.py (.*)$", shown, flags=re.MULTILINE)
    assert len(examples) == 3
    folder = tmp_path / "result"
    folder.mkdir()
    write_run(folder)
    write_run(folder, "flowcache")
    write_run(folder, "vanilla", threshold=None)
    monkeypatch.chdir(tmp_path)
    for example in examples:
        explain(main, *shlex.split(example))
        assert "wrote " in capsys.readouterr().out
    assert {page.name for page in tmp_path.glob("*.html")} == {"clip.html", "both.html"}
    assert (folder / "clip.html").is_file()


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="needs a headless browser")
def test_a_browser_runs_the_page_without_an_error(main: Main, tmp_path: Path):
    explain(main, write_run(tmp_path))
    browser = next(path for name in BROWSERS if (path := shutil.which(name)))
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}",
            (tmp_path / "clip.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "CONSOLE" not in done.stderr
    hidden = re.findall(r'<figure data-branch="(\w+)" hidden', done.stdout)
    assert hidden == ["uncond"] * 8
    assert done.stdout.count("<title>") == 1  # the script took over the texts of the marks
