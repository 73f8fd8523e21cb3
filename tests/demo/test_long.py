"""The table of long videos: drift, flicker and growth by hand; equal memory; rows that are kept."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flowcache.bench.long import drift, flicker, growth, long_methods
from flowcache.bench.methods import comparison_of
from flowcache.demo.clips import Attributes, Motion, render
from flowcache.errors import UserError

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import bench_demo

Bench = Callable[..., int]
RED = Attributes("red", "circle", "right", "black")


@pytest.fixture(name="bench")
def _bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, self_forcing_demo: Path) -> Bench:
    """Return the command line; results go to `tmp_path / "out"`."""

    def run(*arguments: str, model: str = "self_forcing") -> int:
        line = ["bench_demo.py", "--architecture", model, "--table", "long", "--prompts", "1"]
        line += ["--out", str(tmp_path / "out"), *arguments]
        if model == "self_forcing":
            line += ["--model", str(self_forcing_demo)]
        monkeypatch.setattr(sys, "argv", line)
        return bench_demo.main()

    return run


def drawn(num_frames: int) -> np.ndarray:
    return render(RED, Motion(20, 30, 12, 0.5), num_frames=num_frames)


# Figures by hand


def test_a_clip_that_goes_on_as_it_began_does_not_drift():
    found = drift(drawn(80), RED)
    assert found["drift_kept"] == 0
    assert found["drift_levels"] < 0.2
    assert found["judge_end"]


def test_a_clip_whose_end_is_gray_has_drifted():
    frames = drawn(80)
    frames[-12:] = 100
    found = drift(frames, RED)
    first = frames[:12].mean(axis=(0, 1, 2))
    assert found["drift_kept"] == 1
    assert found["drift_levels"] == pytest.approx(np.abs(first - 100).mean())
    assert not found["judge_end"]
    frames[-13:] = 100
    assert drift(frames, RED)["drift_levels"] == found["drift_levels"]


def test_flicker_is_the_change_at_borders_over_that_at_other_latents():
    # 5 latents: frame 0, then 1..4, 5..8, 9..12, 13..16, each of one level
    levels = np.repeat([0, 2, 4, 14, 16], [1, 4, 4, 4, 4]).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (17, 2, 2, 3))
    assert flicker(frames, [3], [1, 2, 4]) == 5
    assert flicker(frames, [1, 2], [4]) == 1
    assert flicker(frames, [], [1]) is None
    assert flicker(frames, [3], []) is None
    assert flicker(np.zeros_like(frames), [3], [1]) is None


def test_growth_compares_the_end_with_the_time_when_the_cache_is_full():
    values = [1.0] * 5 + [2.0] * 3 + [7.0] * 9 + [3.0] * 3
    assert growth(values) == 1.5
    assert growth(values[:16]) is None


def test_every_way_is_a_row_at_every_length():
    comparison = comparison_of("self_forcing")
    rows = long_methods(comparison, (21, 120), key="num_frames")
    assert len(rows) == 2 * len(comparison.long)
    assert len({row.name for row in rows}) == len(rows)
    assert {row.overrides[-1] for row in rows} == {"num_frames=81", "num_frames=477"}
    for lengths in ((21, 21), (1,)):
        with pytest.raises(UserError, match="different numbers of 2 or more"):
            long_methods(comparison, lengths, key="num_frames")


# The command


def test_the_table_is_made_and_its_rows_are_kept(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    names = ["all frames", "sink 3 + window 12, relative", "importance"]
    methods = [f"{name}, {length}" for name in names for length in (6, 18)]
    line = ["--lengths", "6", "18", "--methods", *methods]
    assert bench(*line) == 0
    table = json.loads((tmp_path / "out/table.json").read_text())["table"]
    rows = {row["method"]: row for row in table}
    assert {*rows} == {*methods}
    assert [row["num_latents"] for row in table] == [6] * 3 + [18] * 3
    sizes = {name: rows[f"{name}, 18"]["kv_bytes"] for name in names}
    assert sizes["importance"] == sizes["sink 3 + window 12, relative"]
    # keys and values in float32, of 16 tokens a frame, 128 wide, in 6 layers
    assert sizes["all frames"] == 2 * 18 * 16 * 128 * 6 * 4
    assert sizes["all frames"] / sizes["importance"] == 18 / 12
    assert rows["all frames, 18"]["gflops"] > rows["importance, 18"]["gflops"]
    assert rows["all frames, 6"]["flicker_windows"] is None
    assert rows["all frames, 18"]["flicker_chunks"] > 0
    made = (tmp_path / "out/rows-1.jsonl").read_text()
    capsys.readouterr()
    assert bench(*line) == 0
    assert (tmp_path / "out/rows-1.jsonl").read_text() == made
    assert "- judge: the caption is shown" in capsys.readouterr().out
    assert bench(*line[:-1], "all frames, 7") == 2
    assert "'all frames, 7' is no row of the table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "model", "said"),
    [
        (["--lengths", "20"], "self_forcing", "num_frames is 77, which does not fill chunks of 3"),
        (["--lengths", "1"], "self_forcing", "--lengths must be different numbers of 2 or more"),
        ([], "magi1", "--table long: this model has no video without an end"),
    ],
)
def test_what_is_given_wrong_is_one_line(
    bench: Bench, arguments: list[str], model: str, said: str, capsys: pytest.CaptureFixture[str]
):
    assert bench(*arguments, model=model) == 2
    message = capsys.readouterr().err.strip()
    assert said in message
    assert len(message.splitlines()) == 1
