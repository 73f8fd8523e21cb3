"""The page that shows what the cache did in one run or in two: what it holds and what it says."""

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
from playwright.sync_api import sync_playwright
from sampling_cases import SCRIPTS

from flowcache.report import charts
from flowcache.report.drawing import vertical
from flowcache.report.page import TERMS
from flowcache.runtime.video import VideoWriter

NUM_FRAMES = 177
VOID = {"meta", "link", "img", "input", "br"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")


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
    sums: dict[tuple[int, str, int], float] = {}
    for segment in range(num_segments):
        for tick in range(num_steps + lag * (num_chunks - 1)):
            at = {"segment": segment, "tick": tick}
            ticks.append({**at, "seconds": 0.1 + 0.01 * tick})
            for branch in branches:
                for chunk in range(num_chunks):
                    step, key = tick - lag * chunk, (segment, branch, chunk)
                    if not 0 <= step < num_steps:
                        continue
                    measured = distance(step, chunk) if threshold is not None and step else None
                    total = sums.get(key, 0.0) + (measured if isinstance(measured, float) else 0.0)
                    computed = threshold is None or step in (0, num_steps - 1)
                    computed = computed or total >= threshold
                    sums[key] = 0.0 if computed else total
                    decisions.append(
                        {
                            **at,
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
                kv.append({**at, "branch": branch, "tokens": tokens})
    width = num_frames // max(1, num_segments * num_chunks)
    frames = [[width * i, width * (i + 1)] for i in range(num_segments * num_chunks)]
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
            str(segment): frames[segment * num_chunks : (segment + 1) * num_chunks]
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
    shade: int = 0,
    timeline: object = None,
    changes: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write a record, and a video of moving noise unless `size` is None; return the video.

    Args:
        timeline: of the report, which is not written without one.
        changes: of the record.
    """
    record = make_record(**settings) | {"video": f"{name}.mp4"} | (changes or {})
    (folder / f"{name}.record.json").write_text(json.dumps(record))
    if timeline is not None:
        (folder / f"{name}.json").write_text(json.dumps({"stats": {"timeline": timeline}}))
    if size is not None:
        noise = np.random.default_rng(0).integers(0, 200, (*size, 3), dtype=np.uint8)
        num_frames = settings.get("num_frames", NUM_FRAMES)
        frames = np.stack([np.roll(noise, at, axis=1) + shade for at in range(num_frames)])
        write_video(folder / f"{name}.mp4", frames.astype(np.uint8))
    return folder / f"{name}.mp4"


def write_video(path: Path, frames: Any) -> None:
    with VideoWriter(path, fps=24, size=frames.shape[1:3]) as writer:
        writer.append(frames)


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


Explain = Callable[..., str]
"""`(*arguments, code=0) -> what is printed`; an error is one line."""


@pytest.fixture(name="explain")
def _explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Explain:
    monkeypatch.syspath_prepend(SCRIPTS)
    main = importlib.import_module("explain").main

    def explain(*arguments: object, code: int = 0) -> str:
        assert main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        assert captured.err.count("\n") == (code == 2)
        return captured.err if code == 2 else captured.out

    return explain


def page_of(explain: Explain, video: Path) -> Page:
    explain(video)
    return Page(video.with_suffix(".html"))


def test_the_page_holds_every_decision_of_every_segment_and_branch(
    explain: Explain, tmp_path: Path
):
    page = page_of(explain, write_run(tmp_path))
    rows = make_record()["decisions"]
    assert len(rows) == 2 * 2 * 3 * 8
    assert page.count("rect", class_="computed") == sum(row["computed"] for row in rows)
    assert page.count("rect", class_="reused") == sum(not row["computed"] for row in rows)
    first = "chunk 0, step 1, tick 1: reused\ndistance 0.17\naccumulated 0.17\n"
    assert page.tips().count(first + "1 MFLOP spent, 4 MFLOP saved") == 4
    assert any("12.5 ms" in tip for tip in page.tips())
    for part in ("Decisions", "Distances", "KV cache", "Time", "Key frames", "Settings"):
        assert ("h2", part) in page.texts
    for branch in ("cond", "uncond"):
        assert page.count("figure", **{"data-branch": branch}) == 2 * 4
        assert page.count("input", value=branch) == 1
        for segment in (0, 1):
            assert page.says(f"segment {segment}, branch {branch}")
    assert page.count("img") == 2 * 3 * 3
    for words in ("threshold 0.2", "kv compression", "<b>a cat</b> & a dog", "frames 29 to 57"):
        assert page.says(words)


def test_a_page_needs_nothing_from_outside(explain: Explain, tmp_path: Path):
    page = page_of(explain, write_run(tmp_path))
    assert not re.search(r"https?:|[\"'(]//|url\(|@import|fetch\(|XMLHttp", page.html)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_the_words_of_the_notes_are_explained_as_in_the_glossary(explain: Explain, tmp_path: Path):
    page = page_of(explain, write_run(tmp_path))
    explained = {
        str(attributes["title"]).partition(": ")[0]: attributes
        for tag, attributes in page.elements
        if tag == "dfn"
    }
    assert {"chunk", "tick", "signal", "threshold", "clean", "stage"} <= explained.keys()
    assert all(attributes["tabindex"] == "0" for attributes in explained.values())
    glossary = (SCRIPTS.parent / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in glossary.splitlines() if line[:1] == "|"]
    for term, meaning in TERMS.items():
        assert any(term in row[0].split(", ") and row[1].startswith(meaning) for row in rows), term


def test_curves_on_one_another_are_dashed_and_others_are_not():
    y = vertical("distance", 1.0, height=250)
    same = [[None, 0.1, 0.5, 0.9], [None, 0.1001, 0.5, 0.9]]
    assert charts.coincide(same, y)
    assert not charts.coincide([[0.1, 0.5, 0.9], [0.2, 0.6, 0.8]], y)
    assert not charts.coincide([[0.1, 0.5]], y), "one curve has nothing to lie on"


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium of the system's packages")
def test_on_a_phone_the_page_fits_and_explains_a_word_that_is_touched_or_focused(
    explain: Explain, tmp_path: Path
):
    video = write_run(tmp_path)
    explain(video)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto(video.with_suffix(".html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        chart = page.locator("figure svg").first
        size = chart.evaluate(
            "svg => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width"
        )
        assert size == pytest.approx(1, abs=0.01), "text keeps its size, the figure is moved"
        tip = page.locator("#tip")
        for act in ("focus", "hover"):
            word = page.locator("dfn", has_text="tick").first
            getattr(word, act)()
            assert tip.inner_text().startswith("tick: one pass over the active chunks")
            box = tip.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
            page.keyboard.press("Escape")
            assert tip.is_hidden()
        browser.close()


def test_a_cache_whose_branch_decides_nothing_is_drawn(explain: Explain, tmp_path: Path):
    kv = [{**entry, "branch": "cond"} for entry in make_record(branches=("all",))["kv"]]
    page = page_of(explain, write_run(tmp_path, branches=("all",), changes={"kv": kv}))
    assert page.count("figure", **{"data-branch": "cond"}) == 2
    assert not page.says("Nothing was recorded here.")
    assert page.count("fieldset") == 0


def test_the_summary_counts_what_the_record_holds(explain: Explain, tmp_path: Path):
    lines = explain(write_run(tmp_path)).splitlines()
    figures = {
        name: value.strip() for name, _, value in (line.partition("  ") for line in lines) if value
    }
    num_computed = sum(row["computed"] for row in make_record()["decisions"])
    assert figures["chunk passes"] == "96"
    assert figures["computed"] == f"{num_computed} ({100 * num_computed / 96:.1f} %)"
    assert figures["seconds of all stages"] == "2.50 s"
    assert figures["most clean tokens in the cache"] == "140.0"


def test_the_time_line_has_a_lane_per_stage_and_a_bar_per_period(explain: Explain, tmp_path: Path):
    timeline = [
        ["text", 0.0, 1.0, False],
        ["dit", 1.0, 6.0, False],
        ["vae", 5.0, 8.0, True],
        ["dit", 6.5, 10.0, False],
    ]
    page = page_of(explain, write_run(tmp_path, size=None, timeline=timeline))
    assert page.says("seconds since the start")
    assert "vae: 3.00 s\nfrom 5.000 s to 8.000 s\nconcurrent with the denoising" in page.tips()
    assert "dit: 3.50 s\nfrom 6.500 s to 10.000 s" in page.tips()
    assert page.count("rect", class_="bar concurrent") == 1
    lanes = [text for tag, text in page.texts if tag == "text" and text in ("text", "dit", "vae")]
    assert lanes[-3:] == ["text", "dit", "vae"]


def test_without_a_time_line_the_page_has_no_chart_of_it(explain: Explain, tmp_path: Path):
    video = write_run(tmp_path, size=None)
    explain(video)
    (tmp_path / "clip.json").write_text('{"stats": {"total_seconds": 2.5}}')
    explain(video, "--out", tmp_path / "older.html")
    for name in ("clip.html", "older.html"):
        assert not Page(tmp_path / name).says("seconds since the start")


@pytest.mark.parametrize(
    "timeline", ["text", [1], [["dit", 0.0, 1.0]], [["dit", 2.0, 1.0, True]], [[0, 0.0, 1.0, True]]]
)
def test_a_broken_time_line_is_one_line(explain: Explain, tmp_path: Path, timeline: object):
    error = explain(write_run(tmp_path, size=None, timeline=timeline), code=2)
    assert "clip.json: not the report of a run: stats.timeline" in error


def test_a_long_video_makes_a_page_below_five_megabytes(explain: Explain, tmp_path: Path):
    size = {"num_segments": 3, "num_chunks": 8, "num_steps": 50, "lag": 5}
    page = page_of(explain, write_run(tmp_path, size=(272, 480), **size))
    assert 1_000_000 < len(page.html.encode()) < 5_000_000
    assert page.count("img") == 3 * 8 * 3


def test_a_missing_video_is_named_and_the_rest_is_shown(explain: Explain, tmp_path: Path):
    write_run(tmp_path, size=None)
    explain(tmp_path / "clip.record.json")
    page = Page(tmp_path / "clip.html")
    assert page.says("clip.mp4: no such file")
    assert page.count("img") == 0
    assert page.count("rect", class_="reused")


@pytest.mark.parametrize(
    ("chunk_frames", "words"),
    [
        ({}, "does not say which frames"),
        ({"0": [[0, 0], [5, 5], [0, 9]]}, "chunk 2: frames 0 to 8"),
    ],
)
def test_a_chunk_without_frames_shows_none_and_without_any_the_whole_video_is_shown(
    explain: Explain, tmp_path: Path, chunk_frames: Any, words: str
):
    page = page_of(explain, write_run(tmp_path, changes={"chunk_frames": chunk_frames}))
    assert page.count("img") == 3
    assert page.says(words)


@pytest.mark.parametrize("spelled", ["nan", "inf"])
def test_a_distance_that_is_no_number_is_marked(explain: Explain, tmp_path: Path, spelled: str):
    def distance(step: int, chunk: int) -> Any:
        return spelled if (step, chunk) == (3, 1) else distance_at(step, chunk)

    page = page_of(explain, write_run(tmp_path, size=None, distance=distance))
    assert page.count("path", class_="cross") == 2 * 2
    assert any(f"distance is {spelled}" in tip for tip in page.tips())
    paths = [attributes.get("d") or "" for tag, attributes in page.elements if tag == "path"]
    assert "nan" not in "".join(paths)


def test_a_run_without_distances_says_so(explain: Explain, tmp_path: Path):
    page = page_of(explain, write_run(tmp_path, size=None, threshold=None))
    assert page.says("The policy vanilla measured none.")
    assert page.count("line", class_="threshold") == 0


NOISE = np.random.default_rng(0).integers(0, 255, (1, 32, 48, 3), np.uint8)
GIVEN = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), np.uint8)
BLACK = np.zeros((NUM_FRAMES, 32, 48, 3), np.uint8)
ALARMS = [
    pytest.param("never hit", {"threshold": 0.0}, None, id="never hit"),
    pytest.param("always hit", {"threshold": 9.0}, None, id="always hit"),
    pytest.param("threshold never reached", {"threshold": 9.0}, None, id="never reached"),
    pytest.param("distance is constant", {"distance": lambda *_: 0.125}, None, id="constant"),
    pytest.param(
        "distance is not a number",
        {"distance": lambda step, _: "nan" if step == 3 else 0.1},
        None,
        id="not a number",
    ),
    pytest.param("constant: all 177 frames are of one colour (black)", {}, BLACK, id="black"),
    pytest.param("constant: all 177 frames are of one", {}, BLACK + 77, id="grey"),
    pytest.param(
        "frozen: all 177 frames are equal", {}, NOISE.repeat(NUM_FRAMES, axis=0), id="frozen"
    ),
    pytest.param(
        "constant: all 177 frames", {"threshold": None}, BLACK, id="black without a threshold"
    ),
    pytest.param(
        "constant: all 20 frames",
        {"changes": {"chunk_frames": {"0": [[20, 30]], "1": [[30, 40]]}}},
        np.concatenate([GIVEN, BLACK[:20]]),
        id="black after given frames",
    ),
]


@pytest.mark.parametrize(("words", "settings", "frames"), ALARMS)
def test_an_alarm_is_printed_and_shown_and_fails_where_that_is_asked_for(
    explain: Explain, tmp_path: Path, words: str, settings: dict[str, Any], frames: Any
):
    video = write_run(tmp_path, size=None, **settings)
    if frames is not None:
        write_video(video, frames)
    assert f"ALARM clip: {words}" in explain(video)
    page = Page(tmp_path / "clip.html")
    assert any(tag == "li" and text.startswith(words) for tag, text in page.texts)
    explain(video, "--strict", code=1)


def test_without_an_alarm_strict_changes_nothing(explain: Explain, tmp_path: Path):
    assert "no alarm\n" in explain(write_run(tmp_path), "--strict")
    assert Page(tmp_path / "clip.html").says("No alarm.")


# Two runs -----------------------------------------------------------------------------------------


def test_two_runs_are_shown_side_by_side_with_what_differs(explain: Explain, tmp_path: Path):
    first = write_run(tmp_path, "full", threshold=None)
    out = explain(first, write_run(tmp_path, "fast", shade=10))
    page = Page(tmp_path / "full-and-fast.html")
    assert page.count("figure", **{"data-branch": "cond"}) == 2 * 2 * 4
    assert page.count("img") == 2 * 2 * 3 * 3
    for cell in ("config.reuse.threshold", "PSNR of B against A", "computed"):
        assert page.says(cell)
    assert page.count("svg", **{"aria-label": "PSNR in dB over frames"}) == 1
    assert re.search(r"PSNR of B against A +– +2\d\.\d\d dB", out)  # 10 levels are 28.1 dB
    full, fast = (
        sum(row["flops"] for row in make_record(threshold=value)["decisions"])
        for value in (None, 0.2)
    )
    assert re.search(rf"FLOPs spent .* {fast / full:.3f}\n", out)


def test_equal_videos_are_said_to_be_equal(explain: Explain, tmp_path: Path):
    video = write_run(tmp_path)
    assert "∞ (equal pixels)" in explain(video, video)
    page = Page(tmp_path / "clip-and-clip.html")
    assert page.says("177 of 177 frames are equal")
    assert page.says("All settings are equal.")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"size": (32, 64)}, "clips of one shape"),
        ({"num_frames": 100}, "clips of one shape"),
        ({"size": None}, "b.mp4: no such file"),
    ],
)
def test_videos_that_cannot_be_compared_are_named_not_measured(
    explain: Explain, tmp_path: Path, other: dict[str, Any], words: str
):
    out = explain(write_run(tmp_path, "a"), write_run(tmp_path, "b", **other))
    assert Page(tmp_path / "a-and-b.html").says(words)
    assert f"No metrics: {words}" in out
    assert "PSNR" not in out


# What is given ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "content", "words"),
    [
        *((name, None, "record") for name in ("a.mp4", "a.record.json", "a.json", "a.txt", "a")),
        *(
            ("clip.mp4", content, "clip.record.json")
            for content in ("", "{", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 99}')
        ),
        ("clip.mp4", make_record(num_segments=0, num_frames=0), "no decision"),
        ("clip.mp4 clip.mp4 clip.mp4", make_record(), "3 were given"),
        ("clip.mp4 --out page.pdf", make_record(), ".html"),
    ],
)
def test_what_cannot_be_explained_is_one_line(
    explain: Explain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    content: Any,
    words: str,
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "clip.record.json").write_text(text)
    assert words in explain(*arguments.split(), code=2)


def test_an_existing_page_is_kept_unless_it_may_be_replaced(explain: Explain, tmp_path: Path):
    video, page = write_run(tmp_path, size=None), tmp_path / "page.html"
    page.write_text("mine")
    assert "--overwrite" in explain(video, "--out", page, code=2)
    assert page.read_text() == "mine"
    explain(video, "--out", page, "--overwrite")
    assert Page(page).says("What the cache did")
    explain(video)
    explain(video)
    names = {path.name for path in tmp_path.glob("*.html")}
    assert names == {"page.html", "clip.html", "clip-001.html"}


def test_the_examples_of_the_help_run(
    explain: Explain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = importlib.import_module("explain").EXAMPLES
    examples = re.findall(r"^  python scripts/explain\.py (.*)$", text, flags=re.MULTILINE)
    assert len(examples) == 3
    folder = tmp_path / "result"
    folder.mkdir()
    for name, threshold in (("clip", 0.2), ("flowcache", 0.2), ("vanilla", None)):
        write_run(folder, name, threshold=threshold)
    monkeypatch.chdir(tmp_path)
    for example in examples:
        assert "wrote " in explain(*shlex.split(example))
    assert {page.name for page in tmp_path.rglob("*.html")} == {"clip.html", "both.html"}


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="needs a headless browser")
def test_a_browser_runs_the_page_without_an_error(explain: Explain, tmp_path: Path):
    explain(write_run(tmp_path))
    browser = next(path for name in BROWSERS if (path := shutil.which(name)))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    place = [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "clip.html").as_uri()]
    done = subprocess.run(
        [browser, *flags, *place], capture_output=True, text=True, check=True, timeout=60
    )
    assert "CONSOLE" not in done.stderr
    assert re.findall(r'<figure data-branch="(\w+)" hidden', done.stdout) == ["uncond"] * 8
    assert done.stdout.count("<title>") == 1  # the script took over the texts of the marks
