"""Two runs side by side, and what may go wrong with pages."""

import re
from pathlib import Path
from typing import Any

import pytest
from explain_cases import Main, Page, explain, make_record, write_run


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
