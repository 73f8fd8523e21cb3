"""The pages' figures: what they are drawn from, and that they are the ones in the repository."""

import importlib
import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from flowcache.errors import UserError
from flowcache.report import clips, figures
from flowcache.report.decisions import draw_decisions
from flowcache.report.drawing import DASH, interleaved
from flowcache.report.figures import draw_distances, widest_spread
from flowcache.report.run import load_run
from flowcache.runtime.run import Clip
from flowcache.runtime.stats import RunStats

REPOSITORY = Path(__file__).parents[2]
ASSETS = REPOSITORY / "assets"
MAX_FIGURE_BYTES = 500_000
SVG = "{http://www.w3.org/2000/svg}"
MAX_MOVING_BYTES = 3_000_000
README_WIDTH, MIN_TEXT = 830, 11.0
"""CSS pixels: of a README on GitHub, and of the smallest text at that width."""
DRAWN = (
    *("mark", "framework", "growth"),
    *("distances_skyreels_v2", "decisions_skyreels_v2", "decisions_magi1"),
    *("tradeoff_skyreels_v2", "reuse_magi1"),
)
"""Figures without a model's run."""


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("make_figures")


def figures_of_the_pages() -> set[str]:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    return set(re.findall(r"!\[[^\]]+\]\((?:\.\./)?assets/([^)]+)\)", text))


def write_record(path: Path, distances: dict[tuple[int, int], float | None]) -> Path:
    """Write a record of the distances of (tick, chunk): chunk 1 starts one tick after chunk 0."""
    decisions = [
        {
            "segment": 0,
            "tick": tick,
            "chunk": chunk,
            "step": tick - chunk,
            "branch": "cond",
            "computed": True,
            "distance": distance,
            "accumulated": distance,
            "flops": 1,
            "flops_saved": 0,
            "seconds": None,
        }
        for (tick, chunk), distance in distances.items()
    ]
    names = ("config", "chunk_frames", "stages", "environment")
    record = {"schema_version": 1, "video": "a.mp4", "model": "demo", "preset": "flowcache_fast"}
    record |= {"policy": "flowcache", "threshold": 0.0, "num_steps": 3, "ticks": [], "kv": []}
    record |= {"decisions": decisions, **{name: {} for name in names}}
    path.write_text(json.dumps(record))
    return path


def write_table(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"table": rows}))
    return path


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawing_in_the_repository_is_what_the_code_draws_now(
    script: ModuleType, tmp_path: Path, name: str
):
    assert script.main([name, "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.svg").read_bytes() == (ASSETS / f"{name}.svg").read_bytes()


def test_every_figure_is_shown_on_a_page_and_small(script: ModuleType):
    shown = figures_of_the_pages()
    # the pictures of the page are taken by its browser test, sheets of clips by judge_demo.py
    others = [*ASSETS.glob("page_*.jpg"), *ASSETS.glob("*_sheet-*.png")]
    assert shown == {*script.FIGURES, *(path.name for path in others)}
    for name in shown:
        most = MAX_MOVING_BYTES if name.endswith(".webp") else MAX_FIGURE_BYTES
        assert (ASSETS / name).stat().st_size < most


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.svg")), ids=lambda path: path.name)
def test_the_text_of_a_drawing_is_legible_where_pages_show_it(path: Path):
    drawing = path.read_text(encoding="utf-8")
    width = float(ElementTree.fromstring(drawing).get("width", ""))
    sizes = [float(size) for size in re.findall(r"font(?:-size)?:(?:\d+ )?([\d.]+)px", drawing)]
    assert min(sizes) * min(1.0, README_WIDTH / width) >= MIN_TEXT


def test_the_moving_picture_in_the_repository_moves_and_fits_a_page():
    for path in ASSETS.glob("*.webp"):
        with Image.open(path) as moving:
            assert getattr(moving, "n_frames", 1) > 24
            assert moving.width <= README_WIDTH


def check_colours(drawing: str) -> None:
    """Check that every colour is defined for light and for dark pages."""
    dark = re.compile(r"@media\(prefers-color-scheme:dark\)\{:root\{[^}]*\}\}")
    used = set(re.findall(r"var\(--([\w-]+)\)", drawing)) - {"c"}
    for part in (dark.sub("", drawing), "".join(dark.findall(drawing))):
        assert used <= set(re.findall(r"--([\w-]+):", part))


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.svg")), ids=lambda path: path.name)
def test_a_drawing_stands_alone_and_has_colours_for_light_and_dark_pages(path: Path):
    drawing = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(drawing)
    assert root.tag == f"{SVG}svg"
    assert root.get("aria-label")
    check_colours(drawing)
    assert "http" not in drawing.replace(SVG[1:-1], "")


def test_the_widest_spread_is_that_of_the_tick_with_the_largest_ratio(tmp_path: Path):
    distances = {(0, 0): None, (1, 0): 0.02, (2, 0): 0.06, (2, 1): 0.006, (3, 0): 0.4, (3, 1): 0.05}
    spread = widest_spread(load_run(write_record(tmp_path / "r.json", distances), "A"))
    assert (spread.tick, spread.smallest, spread.largest) == (2, 0.006, 0.06)
    assert spread.ratio == pytest.approx(10.0)


def test_a_curve_per_chunk_goes_through_its_measured_distances(tmp_path: Path):
    distances = {(tick, 0): 0.1 * tick if tick else None for tick in range(4)}
    distances |= {(tick, 1): 0.1 * (tick - 1) for tick in range(2, 4)}
    root = ElementTree.fromstring(
        draw_distances(write_record(tmp_path / "r.json", distances), model="A")
    )
    paths = [path.get("d") for path in root.iter(f"{SVG}path") if path.get("class") == "curve"]
    assert [str(path).count("L") + 1 for path in paths] == [3, 2, 3, 2]


VANILLA = {"method": "vanilla", "gflops": 200.0, "psnr_base": None}


def test_a_table_gives_a_point_for_every_method_that_reuses(tmp_path: Path):
    rows = [
        ("vanilla, KV window", 150.0, 30.0),
        ("TeaCache, neither pass (x), velocity", 50.0, 31.0),
        ("FlowCache-fast, latent update + KV compression", 20.0, 25.0),
        ("stride (x), latent update", 60.0, None),
    ]
    own = [dict(zip(("method", "gflops", "psnr_base"), row, strict=True)) for row in rows]
    assert figures.read_methods(write_table(tmp_path / "t.json", VANILLA, *own)) == [
        figures.Point("TeaCache", 25.0, 31.0, "neither pass", True),
        figures.Point("FlowCache", 10.0, 25.0, "fast", False, is_compressed=True),
    ]


def test_methods_of_full_attention_are_measured_against_full_attention(tmp_path: Path):
    of = {"gflops": 50.0, "psnr_vanilla": 30.0, "psnr_vanilla-causal": 20.0}
    names = ("TeaCache-slow, residual", "TeaCache, causal (x), residual", "FlowCache-slow, x")
    path = write_table(tmp_path / "t.json", VANILLA, *({"method": name, **of} for name in names))
    assert [point.decibel for point in figures.read_methods(path)] == [30.0, 20.0, 20.0]


def test_the_drawing_knows_the_names_of_the_tables():
    reuse = importlib.import_module("flowcache.bench.reuse")
    methods = importlib.import_module("flowcache.tuning.methods")
    ours = {reuse.TUNED, "guarded", "stride"}
    assert set(figures.RULES.looks) == ours | {reuse.NAMES[rule] for rule in reuse.RULES}
    assert set(figures.RIVALS.looks) == ours | {*reuse.NAMES.values(), *reuse.OWN_PROFILES}
    moved = [name for name, settings in methods.TRENDS.items() if settings != methods.VELOCITY]
    assert set(figures.EXTRAPOLATED) == {methods.AS_TUNED, reuse.TREND, *moved}


def reuse_row(policy: str, predictor: str, *, share: float, decibel: float) -> dict[str, Any]:
    return {
        "method": f"{policy}, {predictor}",
        "group": {"policy": policy, "predictor": predictor, "level": "mid"},
        "flops_share": share,
        "psnr_base": decibel,
        "psnr_error_base": 0.5,
    }


def test_reuse_rules_are_marked_where_the_table_says_in_both_colours(tmp_path: Path):
    rows = [
        {"method": "vanilla", "group": None, "psnr_base": 20.0},
        reuse_row("FlowCache", "residual", share=0.2, decibel=20.0),
        reuse_row("FlowCache", "residual", share=0.4, decibel=24.0),
        reuse_row("planned", "as tuned", share=0.4, decibel=33.0),
        reuse_row("planned", "velocity", share=0.4, decibel=32.9),
        reuse_row("planned", "clean estimate", share=0.4, decibel=32.8),
    ]
    path = write_table(tmp_path / "t.json", *rows)
    points = figures.read_rules(path)
    assert [point.share for point in points] == [20, 40, 40, 40, 40]
    assert [point.is_filled for point in points] == [False, False, True, False, False]
    drawing = figures.draw_reuse(path, model="A")
    root = ElementTree.fromstring(drawing)
    tips = {
        mark.findtext(f"{SVG}title"): mark
        for mark in root.iter()
        if mark.find(f"{SVG}title") is not None
    }
    assert len(tips) == len(points)
    cheap, dear = (
        tips[f"FlowCache, residual: {at} dB"]
        for at in ("20.0 % of the FLOPs, 20.00 ± 0.50", "40.0 % of the FLOPs, 24.00 ± 0.50")
    )
    assert float(cheap.get("cx", "")) < float(dear.get("cx", ""))
    assert float(cheap.get("cy", "")) > float(dear.get("cy", ""))
    labels = {text.text: float(text.get("y", "")) for text in root.iter(f"{SVG}text")}
    assert labels["clean estimate"] - labels["velocity"] >= 15, "labels do not overlap"
    check_colours(drawing)


def test_strips_show_first_and_last_frame_of_every_clip():
    stats = RunStats(torch.device("cpu"))
    ramp = torch.linspace(0, 240, 9).to(torch.uint8)
    stats.num_computed = 1
    shades = [ramp[:, None, None, None].expand(9, 8, 8, 3), 255 - ramp[:, None, None, None]]
    rows = [
        clips.Strip(str(index), Clip(frames.expand(9, 8, 8, 3), stats), 1.0, None)
        for index, frames in enumerate(shades)
    ]
    page = np.asarray(Image.open(io.BytesIO(clips.draw_strips(rows, title="a"))))
    first = clips.EDGE + clips.LABEL_WIDTH + clips.FRAME // 2
    last = page.shape[1] - clips.EDGE - clips.FRAME // 2
    below = clips.FRAME + clips.GAP
    top = clips.TITLE_HEIGHT + clips.FRAME // 2
    assert [page[top, first, 0], page[top, last, 0]] == [0, 240]
    assert [page[top + below, first, 0], page[top + below, last, 0]] == [255, 15]


def test_the_moving_picture_shows_all_clips_at_once_frame_by_frame():
    ramp = torch.linspace(0, 240, 5).to(torch.uint8)[:, None, None, None].expand(5, 8, 8, 3)
    stats = RunStats(torch.device("cpu"))
    stats.num_computed, stats.num_reused = 3, 1
    strips = [
        clips.strip_of("a", first := Clip(ramp, stats), first, seconds=2.0),
        clips.strip_of("b", Clip(255 - ramp, stats), first, seconds=1.0),
    ]
    assert strips[0].notes == ["DiT 2.0 s", "75 % computed"]
    assert len(strips[1].notes) == 3
    moving = Image.open(io.BytesIO(clips.draw_moving(strips, title="t", fps=10)))
    assert getattr(moving, "n_frames", 1) == 5
    for index in (0, 4):
        moving.seek(index)
        page = np.asarray(moving.convert("RGB")).astype(int)
        row = clips.MOVING_HEAD + clips.MOVING_FRAME // 2
        left = clips.MOVING_EDGE + clips.MOVING_FRAME // 2
        right = left + clips.MOVING_FRAME + clips.MOVING_GAP
        expected = int(ramp[index, 0, 0, 0])
        assert page[row, left, 0] == pytest.approx(expected, abs=6)
        assert page[row, right, 0] == pytest.approx(255 - expected, abs=6)
        bar = clips.MOVING_HEAD + clips.MOVING_FRAME + 9
        assert page[bar, left + 80, 2] > 150, "the whole width for the longest time"
        assert page[bar, right + 80, 2] < 60, "half of it for half the time"


def test_a_label_keeps_clear_of_marks_lines_and_other_labels():
    inside = figures.Box(0, 0, 400, 400)
    at = (200.0, 200.0)
    taken = [figures.around(*at, 8), *figures.along([(0, 150), (200, 200), (400, 250)])]
    for name in ("slow", "fast", "neither pass"):
        left, base, box = figures.label_place(name, at, taken, inside=inside)
        assert box.left == left
        assert box.top < base < box.bottom
        assert not any(box.overlaps(other) for other in taken)
        taken.append(box)
    *_, box = figures.label_place("at the edge", (395.0, 5.0), [], inside=inside)
    assert box.right <= 400
    assert box.top >= 0


def test_curves_on_one_another_share_their_dashes():
    styles = [interleaved(index, 3) for index in range(3)]
    assert len(set(styles)) == 3
    assert all(f"stroke-dasharray:{DASH} {2 * DASH}" in style for style in styles)
    assert interleaved(0, 1) == ""


def test_the_decisions_are_drawn_as_the_record_has_them():
    record = ASSETS / "records" / "skyreels_v2_decisions.record.json"
    run = load_run(record, "A")
    root = ElementTree.fromstring(draw_decisions(record, model="A"))
    cells = [cell.get("class") for cell in root.iter(f"{SVG}rect")]
    rows = run.of(run.panels[0])
    in_legend = 1
    assert cells.count("computed") == sum(row.computed for row in rows) + in_legend
    assert cells.count("reused") == sum(not row.computed for row in rows) + in_legend
    assert root.find(f".//{SVG}title") is None


@pytest.mark.parametrize(
    ("table", "content", "words"),
    [
        ("methods", None, "cannot be read"),
        ("methods", "{", "not a readable JSON file"),
        ("methods", '{"table": [{"method": "vanilla", "gflops": 1}]}', "no method reuses anything"),
        ("rules", None, "cannot be read"),
        ("rules", '{"table": [{"method": "vanilla"}]}', "no table"),
        ("rules", '{"table": [{"method": "vanilla", "group": null}]}', "no rule reuses anything"),
    ],
)
def test_a_broken_table_is_one_line(tmp_path: Path, table: str, content: str | None, words: str):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        getattr(figures, f"read_{table}")(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_figure_is_refused_with_the_known_ones(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
):
    assert script.choose([]) == [*script.RECORDS, *script.FIGURES]
    assert script.main(["frame"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "mark, framework, architecture, distances_skyreels_v2" in error


def test_a_figure_that_is_too_large_is_not_written(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(script, "MAX_FIGURE_BYTES", 1000)
    assert script.main(["framework", "--out", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []
