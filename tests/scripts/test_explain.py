"""The page that shows what the cache did: what it holds and what it says."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explain_cases import (
    BROWSERS,
    MAX_PAGE_BYTES,
    Main,
    Page,
    distance_at,
    explain,
    make_record,
    write_run,
)

from flowcache.runtime.video import VideoWriter


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


def test_a_cache_whose_branch_decides_nothing_is_drawn(main: Main, tmp_path: Path):
    video = write_run(tmp_path, branches=("all",))
    record = tmp_path / "clip.record.json"
    content = json.loads(record.read_text())
    for entry in content["kv"]:
        entry["branch"] = "cond"
    record.write_text(json.dumps(content))
    explain(main, video)
    page = Page(tmp_path / "clip.html")
    assert page.count("figure", **{"data-branch": "cond"}) == 2
    assert not page.says("Nothing was recorded here.")
    assert page.count("fieldset") == 0


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


def test_the_time_line_has_a_lane_per_stage_and_a_bar_per_period(main: Main, tmp_path: Path):
    timeline = [
        ["text", 0.0, 1.0, False],
        ["dit", 1.0, 6.0, False],
        ["vae", 5.0, 8.0, True],
        ["dit", 6.5, 10.0, False],
    ]
    explain(main, write_run(tmp_path, size=None, timeline=timeline))
    page = Page(tmp_path / "clip.html")
    assert page.says("seconds since the start")
    assert page.says("beside the denoising")
    tips = page.tips()
    assert "vae: 3.00 s\nfrom 5.000 s to 8.000 s\nbeside the denoising" in tips
    assert "dit: 3.50 s\nfrom 6.500 s to 10.000 s" in tips
    (beside,) = (
        attributes for _, attributes in page.elements if attributes.get("class") == "bar beside"
    )
    pixels_per_second = (1120 - 90 - 14) / 10  # the chart less the names and its right margin
    assert float(beside["x"] or 0) == pytest.approx(90 + 5 * pixels_per_second, abs=0.01)
    assert float(beside["width"] or 0) == pytest.approx(3 * pixels_per_second, abs=0.01)
    lanes = [text for tag, text in page.texts if tag == "text" and text in ("text", "dit", "vae")]
    assert lanes[-3:] == ["text", "dit", "vae"]


def test_without_a_time_line_the_page_has_no_chart_of_it(main: Main, tmp_path: Path):
    video = write_run(tmp_path, size=None)
    explain(main, video)
    (tmp_path / "clip.json").write_text('{"stats": {"total_seconds": 2.5}}')
    explain(main, video, "--out", tmp_path / "older.html")
    for name in ("clip.html", "older.html"):
        page = Page(tmp_path / name)
        assert not page.says("seconds since the start")
        assert page.count("i", class_="swatch beside") == 0


@pytest.mark.parametrize(
    "timeline", ["text", [1], [["dit", 0.0, 1.0]], [["dit", 2.0, 1.0, True]], [[0, 0.0, 1.0, True]]]
)
def test_a_broken_time_line_is_said_in_one_line(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], timeline: object
):
    explain(main, write_run(tmp_path, size=None, timeline=timeline), code=2)
    assert "clip.json: not the report of a run: stats.timeline" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (
            np.zeros((177, 32, 48, 3), np.uint8),
            "constant: all 177 frames are of one colour (black)",
        ),
        (np.full((177, 32, 48, 3), (9, 200, 9), np.uint8), "constant: all 177 frames are of one"),
        (
            np.repeat(np.random.default_rng(0).integers(0, 255, (1, 32, 48, 3), np.uint8), 177, 0),
            "frozen: all 177 frames are equal",
        ),
    ],
)
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_a_video_that_shows_nothing_is_an_alarm_whatever_the_cache_did(
    main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    frames: Any,
    said: str,
    threshold: float | None,
):
    video = write_run(tmp_path, size=None, threshold=threshold)
    with VideoWriter(video, fps=24, size=(32, 48)) as writer:
        writer.append(frames)
    explain(main, video, "--strict", code=1)
    assert f"ALARM clip: {said}" in capsys.readouterr().out
    assert any(
        tag == "li" and text.startswith(said) for tag, text in Page(tmp_path / "clip.html").texts
    )


def test_given_frames_do_not_hide_that_the_new_ones_are_black(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    video = write_run(tmp_path, size=None)
    path = tmp_path / "clip.record.json"
    record = json.loads(path.read_text())
    record["chunk_frames"] = {"0": [[20, 30]], "1": [[30, 40]]}
    path.write_text(json.dumps(record))
    given = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), np.uint8)
    with VideoWriter(video, fps=24, size=(32, 48)) as writer:
        writer.append(np.concatenate([given, np.zeros_like(given)]))
    explain(main, video, "--strict", code=1)
    assert "ALARM clip: constant: all 20 frames" in capsys.readouterr().out


def test_without_an_alarm_strict_changes_nothing(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    explain(main, write_run(tmp_path), "--strict")
    assert "no alarm\n" in capsys.readouterr().out
    assert Page(tmp_path / "clip.html").says("No alarm.")


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
