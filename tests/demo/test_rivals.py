"""The table of rivals: its rows, figures worked out by hand, and one short run of the command."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refuses

from flowcache.bench.continuity import borders_of, drift, seams
from flowcache.bench.methods import Group, Method, comparison_of
from flowcache.bench.reuse import (
    NAMES,
    OWN_PROFILES,
    Adaptive,
    Budgets,
    Level,
    find_threshold,
    profile_next_to,
    read_budgets,
)
from flowcache.bench.rivals import (
    PUBLISHED,
    RIVAL_LEVELS,
    frontier,
    rival_claims,
    rival_markdown,
    rival_methods,
    rival_rules,
    rival_table,
)
from flowcache.runtime.model import SegmentWork, load_model

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import bench_demo
import tune_budgets

SCRIPT = Path(__file__).parents[2] / "scripts" / "rivals.sh"


def clip(*levels: float) -> torch.Tensor:
    """Return frames of one level each."""
    return torch.stack([torch.full((64, 64, 3), level) for level in levels]).to(torch.uint8)


# Figures ------------------------------------------------------------------------------------------


def test_drift_compares_the_first_and_the_last_fifteen_per_cent():
    """Of 20 frames 3 and 3: differences of 1 and of 2 levels are 6.02 dB apart."""
    other, more = clip(*[100] * 20), 20 * math.log10(2)
    for first, last, wanted in ((101, 102, more), (102, 101, -more)):
        own = clip(*[first] * 3, *[150] * 14, *[last] * 3)
        assert drift(own, other) == pytest.approx(wanted)
    assert drift(clip(*[100] * 3, *[150] * 17), other) is None


def test_a_seam_is_a_change_at_a_border_that_the_other_clip_has_not():
    """Steps of 2 elsewhere; at the border 6 against 3: twice as much shows."""
    own, other = clip(0, 2, 4, 10, 12, 14), clip(0, 2, 4, 7, 9, 11)
    assert seams(own, other, borders=[3]) == pytest.approx(2)
    assert seams(own, own, borders=[3]) == 1
    assert seams(own, clip(*[5] * 6), borders=[3]) is None
    assert seams(own, other, borders=[]) is None


def test_borders_are_where_chunks_begin_in_the_video():
    def part(*frames: list[int]) -> SegmentWork:
        return SegmentWork(
            ticks=[], tokens={}, given=range(0), frames=list(frames), kv_tokens=0, cut=None
        )

    # the second segment begins with a chunk that the first one has shown
    assert borders_of([part([0, 5], [5, 9]), part([9, 9], [9, 13], [13, 17])]) == [5, 9, 13]


# Rows ---------------------------------------------------------------------------------------------


def budgets(model: str, rules: list[str]) -> Budgets:
    return Budgets(
        command="-",
        model=model,
        checkpoint="demo",
        settings=[],
        levels={name: Level(0.3, f"{name}.yaml", [0, 3, 9], 0.4, 0.6) for name in RIVAL_LEVELS},
        adaptive=[
            Adaptive(rule, level, None if (rule, level) == ("flowcache", "fast") else 0.2, 0.3, 0.5)
            for rule in rules
            for level in RIVAL_LEVELS
        ],
    )


@pytest.mark.parametrize("model", ["skyreels_v2", "magi1"])
def test_every_rule_has_a_row_at_each_budget(model: str, tmp_path: Path):
    comparison = comparison_of(model)
    rules = rival_rules(comparison, load_model(model).presets)
    assert "motioncache" in rules
    made = rival_methods(comparison, budgets(model, rules), tmp_path, rules=rules)
    names = [method.name for method in made]
    assert len(set(names)) == len(names)
    groups = [method.group for method in made if method.group is not None]
    for policy in (*NAMES.values(), "stride", "planned"):
        if policy == NAMES["content"] and not comparison.words.content:
            continue
        levels = {group.level for group in groups if group.policy == policy}
        assert levels == set(RIVAL_LEVELS), policy
    assert not any(group.policy == "searched" for group in groups)
    noise = next(method for method in made if method.noise)
    assert (noise.noise, noise.base) == (1e-3, comparison.computed[-1].name)
    motion = next(m for m in made if m.group and m.group.policy == "MotionCache")
    assert motion.preset == "motioncache"
    for policy in OWN_PROFILES:
        place = profile_next_to(tmp_path / "half.yaml", policy)
        place.touch()
        more = rival_methods(comparison, budgets(model, rules), tmp_path, rules=rules)
        (own,) = set(more) - set(made)
        assert own.group == Group(policy, "as tuned", "half")
        assert f"reuse.profile={tmp_path / policy.lower()}_half.yaml" in own.overrides
        assert "reuse.policy=planned" in own.overrides
        place.unlink()


def test_flowcache_slow_has_the_preset_of_flowcache_fast():
    assert comparison_of("magi1").slow_preset == "flowcache_slow_nocompress"
    assert comparison_of("skyreels_v2").slow_preset == "flowcache_slow"


def row(method: str, index: int, psnr: float, **changes: Any) -> dict[str, Any]:
    plain = {"flops": 4e9, "dit_seconds": 1.0, "computed_share": 0.5, "num_compressions": 0}
    figures = {"judge": {"color": True}, "judge_all": True, "psnr": psnr, "ssim": 0.5}
    own = {"psnr_base": psnr, "ssim_base": 0.9, "drift": 1.0, "seams": 1.5}
    return {"method": method, "index": index, **plain, **figures, **own, **changes}


def table(**plan: Any) -> list[dict[str, Any]]:
    methods = [
        Method("vanilla", "v"),
        Method("fast", "f", (), "vanilla", Group("FlowCache", "residual", "fast")),
        Method("motion", "m", (), "vanilla", Group("MotionCache", "residual", "fast")),
        Method("plan", "p", (), "vanilla", Group("planned", "as tuned", "fast")),
        Method("cheap", "p", (), "vanilla", Group("planned", "as tuned", "half")),
    ]
    psnrs = {"fast": 25.0, "motion": 30.0, "plan": 35.0, "cheap": 26.0}
    rows = [row("vanilla", i, 0.0, flops=10e9) for i in (0, 1)]
    for name, psnr in psnrs.items():
        own = {"flops": 2e9 if name == "cheap" else 4e9, **(plan if name == "plan" else {})}
        rows += [row(name, i, psnr + i, **own) for i in (0, 1)]
    return rival_table(rows, methods)


def test_intervals_are_those_of_student_and_the_frontier_leaves_out_what_a_cheaper_rule_beats():
    entries = {entry["method"]: entry for entry in table()}
    # two values one apart: the deviation is 0.707, t is 12.706
    assert entries["fast"]["psnr_base"] == 25.5
    assert entries["fast"]["psnr_base_half_width"] == pytest.approx(12.706 * 0.5, abs=1e-3)
    assert [name for name, entry in entries.items() if entry["is_best"]] == ["plan", "cheap"]
    assert frontier(table()) == [(0.4, 35.5), (0.2, 26.5)]
    lines = rival_markdown(table(), PUBLISHED["magi1"]).splitlines()
    assert lines[0].count("|") == 11
    cells = ["fast", "40.0 %", "4.0", "1.00", "25.50 ± 6.35", "0.9000 ± 0.0000", "100 %"]
    assert lines[3] == f"| {' | '.join([*cells, '+1.00', '1.500', '-'])} |"
    assert lines[5].startswith("| plan * |")
    assert any(line.startswith("| MotionCache-fast, 168 frames |") for line in lines)


@pytest.mark.parametrize(
    ("plan", "verdicts"),
    [
        ({}, ("holds", "holds", "holds")),
        ({"judge_all": False}, ("DOES NOT HOLD", "DOES NOT HOLD", "holds")),
        ({"psnr_base": 32.0}, ("DOES NOT HOLD", "DOES NOT HOLD", "holds")),
        ({"psnr_base": 34.0}, ("DOES NOT HOLD", "holds", "holds")),
    ],
)
def test_claims_are_decided_by_hand(plan: dict[str, Any], verdicts: tuple[str, ...]):
    lines = rival_claims(table(**plan))
    assert len(lines) == 3
    for line, verdict in zip(lines, verdicts, strict=True):
        assert f": {verdict} (" in line, line
    assert rival_claims(table()[2:]) == [], "without FlowCache-fast nothing is claimed"


# The command --------------------------------------------------------------------------------------


def test_the_nearest_threshold_is_taken_where_none_reaches_a_budget():
    def flops(threshold: float) -> float:
        return max(0.5, 1 - threshold)

    given: dict[str, Any] = {"start": 0.1, "tolerance": 0.01}
    assert flops(find_threshold(flops, 0.2, takes_nearest=True, **given)) == 0.5
    refuses(lambda: find_threshold(flops, 0.2, **given), "no threshold between")


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for line, said in (
        (["--search", "-1"], "--search must be 0 or more trials, not -1"),
        (["--search", "2"], "--levels rivals: give that, too"),
    ):
        assert tune_budgets.main([*line, "--out", str(tmp_path)]) == 2
        (message,) = capsys.readouterr().err.strip().splitlines()
        assert said in message


@pytest.mark.parametrize(
    ("prompts", "part", "said"),
    [
        ("0", "1/1", "the number of prompts must be in 1..99999, not 0"),
        ("100000", "1/1", "the number of prompts must be in 1..99999, not 100000"),
        ("many", "1/1", "the number of prompts must be in 1..99999, not many"),
        ("2", "3/2", "PART must be I/N with I in 1..N, as in 1/2, not 3/2"),
        ("2", "0/2", "PART must be I/N with I in 1..N, as in 1/2, not 0/2"),
        ("2", "2", "PART must be I/N with I in 1..N, as in 1/2, not 2"),
    ],
)
def test_the_script_refuses_what_its_table_would_before_it_begins(
    prompts: str, part: str, said: str, tmp_path: Path
):
    ended = subprocess.run(
        ["bash", str(SCRIPT), "skyreels_v2", prompts],
        env=os.environ | {"PART": part, "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"error: {said}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_table_is_made_from_nothing_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tiny = ["num_frames=9", "base_num_frames=9", "num_steps=8", "causal_block_size=1"]
    tiny += ["ar_step=2", "reuse.warmup_steps=1"]
    line = ["--architecture", "skyreels_v2", "--levels", "rivals", "--search", "1", "--clips", "1"]
    assert tune_budgets.main([*line, "--out", str(tmp_path / "budgets"), *tiny]) == 0
    found = read_budgets(
        tmp_path / "budgets", model="skyreels_v2", checkpoint="demo", levels=RIVAL_LEVELS
    )
    assert found.levels["half"].flops < found.levels["fast"].flops
    command = ["bench_demo.py", "--table", "rivals", "--profiles", str(tmp_path / "budgets")]
    command += ["--prompts", "1", "--out", str(tmp_path / "out"), *tiny]
    tables: list[list[dict[str, Any]]] = []
    for _ in range(2):
        monkeypatch.setattr("sys.argv", command)
        assert bench_demo.main() == 0
        tables.append(json.loads((tmp_path / "out" / "table.json").read_text())["table"])
    assert tables[0] == tables[1]
    policies = {entry["group"]["policy"] for entry in tables[0] if entry["group"]}
    assert {*OWN_PROFILES, "planned", "RA-CFG", "RACER", "MotionCache"} <= policies
    (rows,) = [list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))]
    assert len(rows) == len(tables[0])
    assert "frontier of all rules" in (tmp_path / "out" / "rivals.svg").read_text()
    assert "noise + 0.001" in capsys.readouterr().out
