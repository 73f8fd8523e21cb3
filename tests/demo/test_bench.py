"""The comparison of methods: fair references, kept rows, and averages, budgets, claims by hand."""

import csv
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowcache.bench.methods import (
    Method,
    comparison_of,
    csv_text,
    markdown,
    measure,
    reuse_markdown,
    summarize,
)
from flowcache.bench.quantized import quantized_methods
from flowcache.bench.reuse import (
    LEVELS,
    Adaptive,
    Budgets,
    Level,
    claims,
    find_threshold,
    read_budgets,
    reuse_methods,
    write_budgets,
)
from flowcache.demo.clips import Attributes
from flowcache.demo.latents import Statistics
from flowcache.errors import UserError
from flowcache.policies import Decision
from flowcache.runtime import profile as profiles
from flowcache.runtime.config import find_preset, load_config, to_dict
from flowcache.runtime.model import Request, models_with
from flowcache.runtime.run import Clip, config_layers, prepare
from flowcache.runtime.stats import RunStats
from flowcache.schedule import Tick
from flowcache.tuning.methods import even_steps
from magi1 import demo
from magi1.checkpoint import find_model
from magi1.config import RunConfig
from magi1.released import PRESETS
from skyreels_v2.model import MODEL

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import bench_demo
import tune_budgets

MAGI_SETTINGS = (
    *("runtime_config.num_frames=72", "runtime_config.num_steps=4"),
    *("runtime_config.window_size=1", "kv.total_chunks=2"),
    *("reuse.warmup_steps=1", "reuse.every=3"),
)
"""Three chunks, one at a time; a cache of two must drop something."""
SHORT = (
    *("num_frames=17", "base_num_frames=17", "overlap_history=null"),
    *("ar_step=1", "causal_block_size=2", "reuse.warmup_steps=1"),
)
NUM_STEPS = 8
TINY = (*SHORT, f"num_steps={NUM_STEPS}")
Bench = Callable[..., int]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A MAGI-1 demo with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint") / "demo"
    models = demo.new_models()
    generator = torch.Generator().manual_seed(0)
    for param in models.dit.parameters():
        param.data += 0.02 * torch.randn(param.shape, generator=generator)
    statistics = Statistics(mean=[0.5] * 16, std=[2.0] * 16)
    demo.write_checkpoint(demo.new_vae(), models, models.dit, statistics=statistics, folder=folder)
    return str(folder / "distill_config.json")


@pytest.fixture(name="bench")
def _bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """Return the command line; results go to `tmp_path / "out"`."""

    def run(*arguments: str) -> int:
        line = ["bench_demo.py", "--out", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", line)
        return bench_demo.main()

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    logs = sorted((folder / "out").glob("rows-*.jsonl"))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def budgets_of(model: str) -> Budgets:
    """Return budgets as the search would find them."""
    level = Level(0.5, "plan.yaml", [0, 2, 5, NUM_STEPS - 1], 0.4, 0.2)
    rules = [("flowcache", name) for name in LEVELS]
    rules += [(name, "mid") for name in ("content", "teacache", "magcache")]
    return Budgets(
        command="python scripts/tune_budgets.py",
        model=model,
        checkpoint="demo",
        settings=[],
        levels=dict.fromkeys(LEVELS, level),
        adaptive=[
            Adaptive(rule, name, None if (rule, name) == ("flowcache", "mid") else 0.25, 0.5, 0.3)
            for rule, name in rules
        ],
    )


def methods_of(model: str, table: str) -> tuple[Method, ...]:
    comparison = comparison_of(model)
    if table == "methods":
        return comparison.methods
    if table == "quantized":
        return quantized_methods(comparison)
    return reuse_methods(comparison, budgets_of(model), Path("profiles"))


# Rows


@pytest.mark.parametrize("table", ["methods", "reuse", "quantized"])
@pytest.mark.parametrize("model", models_with("bench"))
def test_methods_have_own_names_and_stand_below_what_they_are_compared_with(model: str, table: str):
    methods = methods_of(model, table)
    names = [method.name for method in methods]
    assert names[0] == "vanilla"
    assert len(set(names)) == len(names)
    for place, method in enumerate(methods):
        assert method.base is None or method.base in names[:place]


@functools.cache
def magi_settings(preset: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return all settings of a method on the released model."""
    source = find_model("4.5B_distill")
    path, base = find_preset(PRESETS, preset), PRESETS / "base.yaml"
    layers = config_layers(base, path, checkpoint=source.folder, model=source.layers)
    return to_dict(load_config(RunConfig, layers, overrides=["prompt=-", *overrides]))


@pytest.mark.parametrize(("table", "num_pairs"), [("methods", 24), ("reuse", 17)])
def test_a_magi1_method_differs_from_its_base_in_reuse_alone(table: str, num_pairs: int):
    methods = {method.name: method for method in methods_of("magi1", table)}
    pairs = [(m, methods[m.base]) for m in methods.values() if m.base is not None]
    assert len(pairs) == num_pairs
    for method, base in pairs:
        own = dict(magi_settings(method.preset, method.overrides))
        other = dict(magi_settings(base.preset, base.overrides))
        assert own.pop("reuse") != other["reuse"]
        assert other.pop("reuse")["policy"] == "vanilla"
        assert own == other, method.name


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("FlowCache-slow, latent update + KV compression", "flowcache_slow"),
        ("FlowCache-fast, latent update + KV compression", "flowcache_fast"),
        ("stride (FlowCache-fast's FLOPs), latent update + KV compression", "stride_compress"),
    ],
)
def test_compressed_magi1_methods_are_the_presets(name: str, preset: str):
    (method,) = (m for m in comparison_of("magi1").methods if m.name == name)
    assert magi_settings(method.preset, method.overrides) == magi_settings(preset)


@pytest.mark.parametrize("model", models_with("bench"))
def test_the_reuse_table_has_every_policy_at_the_middle_budget_in_less_than_30_rows(model: str):
    rows = methods_of(model, "reuse")
    assert len(rows) < 30
    groups = [row.group for row in rows if row.group is not None]
    wanted = {"FlowCache", "TeaCache", "MagCache", "stride", "planned", "guarded"}
    wanted |= {"FlowCache, content signal"} if model != "magi1" else set()
    assert {group.policy for group in groups if group.level == "mid"} == wanted
    for policy in ("FlowCache", "stride", "planned"):
        assert {group.level for group in groups if group.policy == policy} == set(LEVELS)


def test_the_published_rule_at_its_own_budget_is_the_preset():
    rows = {row.name: row for row in methods_of("skyreels_v2", "reuse")}
    fast = rows["FlowCache-fast, residual"]
    assert fast.preset == "flowcache_fast"
    assert fast.overrides == ("reuse.predict=residual", "reuse.extrapolate=0")


# Clips


def test_magi1_is_compared_and_the_rows_are_kept(
    bench: Bench, untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    method = "stride (FlowCache-fast's FLOPs), velocity + KV compression"
    base = "vanilla, neither pass + KV compression"
    line = ["--architecture", "magi1", "--model", untrained, "--prompts", "1"]
    line += ["--methods", method, "--", *MAGI_SETTINGS]
    assert bench(*line) == 0
    rows = {row["method"]: row for row in rows_of(tmp_path)}
    assert list(rows) == ["vanilla", base, method]
    assert [row["computed_share"] for row in rows.values()] == [1, 1, 0.75]
    assert rows["vanilla"]["num_compressions"] == 0
    assert rows[method]["num_compressions"] == 1
    assert rows[method]["flops"] < rows[base]["flops"] < rows["vanilla"]["flops"]
    assert "psnr" not in rows["vanilla"]
    assert "psnr_base" not in rows[base]
    assert rows[method]["psnr_base"] > rows[method]["psnr"]
    table = json.loads((tmp_path / "out/table.json").read_text())["table"]
    assert [row["method"] for row in table] == list(rows)
    assert table[2]["base"] == base
    assert "PSNR (no reuse)" in capsys.readouterr().out
    before = rows_of(tmp_path)
    assert bench(*line) == 0
    assert rows_of(tmp_path) == before, "a second start found all rows"
    log = tmp_path / "out/rows-1.jsonl"
    log.write_bytes(log.read_bytes()[:-20])  # an interrupted write
    assert bench(*line) == 0
    assert [row["flops"] for row in rows_of(tmp_path)] == [row["flops"] for row in before]
    assert bench(*line, "reuse.every=2") == 2
    assert "other settings" in capsys.readouterr().err


def test_quantised_caches_are_compared_with_the_caches_of_the_model(
    bench: Bench, untrained: str, tmp_path: Path
):
    methods = ["noise + 0.001", "int8", "int2, rounding", "int2, k-means, bias corrected"]
    line = ["--architecture", "magi1", "--model", untrained, "--prompts", "1"]
    line += ["--table", "quantized", "--methods", *methods, "--", *MAGI_SETTINGS]
    assert bench(*line) == 0
    rows = {row["method"]: row for row in rows_of(tmp_path)}
    assert list(rows) == ["vanilla", "16 bits", *methods]
    assert rows["int8"]["psnr_base"] > rows["int2, rounding"]["psnr_base"]
    assert rows["noise + 0.001"]["psnr_base"] > 20, "the same run, little disturbed"
    report = json.loads((tmp_path / "out/table.json").read_text())
    sizes = report["kv_bytes"]
    assert sizes["16 bits"] > sizes["int8"] > sizes["int2, rounding"]
    assert sizes["noise + 0.001"] == sizes["16 bits"]
    table = (tmp_path / "out/table.md").read_text().splitlines()
    assert len(table) == 2 + len(rows)


def test_skyreels_v2_is_compared_by_several_processes(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = (*SHORT, "num_steps=4", "reuse.every=3")
    line = ["--architecture", "skyreels_v2", "--prompts", "2", "--methods"]
    line += ["stride (FlowCache-fast's FLOPs), residual", "--part"]
    assert bench(*line, "2/2", *settings) == 0
    assert "3 of 6 clips" in capsys.readouterr().out
    assert not (tmp_path / "out/table.json").exists()
    assert bench(*line, "1/2", *settings) == 0
    assert "PSNR (causal)" in capsys.readouterr().out
    rows = rows_of(tmp_path)
    assert sorted((row["index"], row["seed"]) for row in rows) == [(0, 5000)] * 3 + [(1, 5001)] * 3
    assert {row["computed_share"] for row in rows[2::3]} == {0.75}


def write_profiles(folder: Path, *, model: str = "skyreels_v2") -> str:
    """Write budgets and a profile of the demo by hand, and return their folder."""
    folder.mkdir()
    write_budgets(budgets_of(model), folder)
    job = prepare(MODEL, Request("vanilla_causal", "demo", [*TINY, "prompt=-"], str(folder)))
    ones = [1.0] * NUM_STEPS
    profile = profiles.Profile(
        version=profiles.VERSION,
        fingerprint=MODEL.fingerprint(job.source),
        setting=MODEL.setting(job.config),
        reuse=profiles.Reuse([[0, 1, 4, NUM_STEPS - 1]], "velocity", 1, 0.5),
        predicted=profiles.Prediction(1.0, 30.0, 0.5, 1.0),
        observed=profiles.Observed(ones, [0.0] * NUM_STEPS, ones),
        source=profiles.Source("skyreels_v2 demo", "flowcache_fast", "2026-01-01", ["a"], [1]),
    )
    profiles.write_profile(profile, folder / "plan.yaml")
    return str(folder)


def test_plan_and_stride_are_compared_at_the_same_cost(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = ["--table", "reuse", "--architecture", "skyreels_v2", "--prompts", "1"]
    line += ["--profiles", write_profiles(tmp_path / "profiles"), "--methods"]
    line += ["FlowCache-fast, residual", "planned (mid), as tuned"]
    assert bench(*line, "stride (mid), velocity + trend", "--", *TINY) == 0
    report = json.loads((tmp_path / "out/table.json").read_text())
    vanilla, causal, _, stride, planned = report["table"]
    assert [vanilla["method"], causal["method"]] == ["vanilla", "vanilla-causal"]
    assert planned["computed_share"] == stride["computed_share"] == 0.5
    assert planned["gflops"] == stride["gflops"]
    assert planned["flops_share"] == planned["gflops"] / causal["gflops"]
    assert planned["speedup_base"] == causal["dit_seconds"] / planned["dit_seconds"]
    assert planned["group"] == {"policy": "planned", "predictor": "as tuned", "level": "mid"}
    assert len(report["claims"]) == 3
    assert report["claims"][0] in capsys.readouterr().out


def damaged_row(folder: Path) -> list[str]:
    (folder / "out").mkdir()
    (folder / "out/rows-1.jsonl").write_text('{"method": "vani\n{}\n')
    return ["--architecture", "skyreels_v2", "--methods", "vanilla"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "magic"], "'magic' is no row of the table: use some of vanilla"),
        (["--prompts", "0"], "--prompts must be in 1..99999, not 0"),
        (["--prompts", "9" * 40], "--prompts must be in 1..99999, not a number of over 30 digits"),
        (["--part", "3/2"], "--part is '3/2', but must be I/N"),
        (["--model", "nowhere"], "nowhere"),
        (
            ["--methods", "vanilla + KV compression", "--", "runtime_config.num_frames=96"],
            "nothing would be dropped, since the clip has 4 chunks and the KV cache holds 5: raise",
        ),
        (["--table", "reuse"], "this table needs --profiles"),
        (["--lengths", "21"], "--lengths is of --table long, not methods: leave it out"),
        (["--profiles", "a"], "--profiles is of --table reuse and rivals, not methods: leave it"),
        (["--table", "reuse", "--lengths", "9"], "--lengths is of --table long, not reuse"),
        (["--table", "long", "--profiles", "a"], "--profiles is of --table reuse and rivals"),
        (["--table", "reuse", "--profiles", "none"], "none/budgets.yaml: no such file"),
        (
            lambda folder: [
                *("--architecture", "skyreels_v2", "--table", "reuse"),
                *("--profiles", write_profiles(folder / "a", model="magi1")),
            ],
            "was made for magi1 demo, not for skyreels_v2 demo",
        ),
        (damaged_row, "rows-1.jsonl: line 1 is damaged"),
    ],
)
def test_what_is_given_wrong_is_one_line(
    bench: Bench,
    untrained: str,
    tmp_path: Path,
    arguments: list[str] | Callable[[Path], list[str]],
    said: str,
    capsys: pytest.CaptureFixture[str],
):
    if callable(arguments):
        given = arguments(tmp_path)
    else:
        given = ["--architecture", "magi1", "--model", untrained, *arguments]
    assert bench(*given) == 2
    message = capsys.readouterr().err.strip()
    assert said in message
    assert len(message.splitlines()) == 1
    assert arguments is damaged_row or not (tmp_path / "out").exists()


def test_budgets_that_cannot_be_made_leave_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for given, said in (
        ("--clips=0", "--clips must be 1"),
        ("attention=full", "attention=full"),
        ("reuse.policy=teacache", "reuse.policy is set for each rule and budget: leave it out"),
        ("reuse.profile=a.yaml", "reuse.profile is set for each rule and budget: leave it out"),
    ):
        line = ["--architecture", "skyreels_v2", "--out", str(tmp_path / "new"), given]
        assert tune_budgets.main(line) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


# Figures by hand


def clip(level: int, *, is_computed: bool) -> Clip:
    stats = RunStats(torch.device("cpu"))
    for computed in (True, is_computed):
        decision = Decision(computed, None, None)
        stats.record(Tick(0, 1, 1, {0: 0}), 0, "all", decision)
    with stats.stage("dit"), stats.stage("vae"):
        stats.add_flops(computed=2 * 10**9, without_reuse=4 * 10**9)
    return Clip(torch.full((9, 64, 64, 3), level, dtype=torch.uint8), stats)


def test_figures_and_averages_are_those_worked_by_hand():
    attributes = Attributes("red", "circle", "right", "black")
    reference = clip(100, is_computed=True)
    rows = [{"method": "vanilla", **measure(reference, attributes, reference=None, base=None)}]
    for level in (100, 110):
        made, frames = clip(level, is_computed=False), reference.frames
        figures = measure(made, attributes, reference=frames, base=frames)
        rows.append({"method": "other", **figures})
    for row, seconds in zip(rows, (3.0, 1.0, 2.0), strict=True):
        row["dit_seconds"] = seconds
    methods = [Method("vanilla", "v"), Method("other", "o", (), "vanilla")]
    vanilla, other = summarize(rows, methods)
    assert vanilla["computed_share"] == 1
    assert other["computed_share"] == 0.5
    assert other["gflops"] == 2
    assert other["speedup"] == 2
    assert other["judge_accuracy"] == 0, "a plain surface shows no circle"
    # a clip that is equal has no PSNR: the mean is 20 log10(255 / 10) of the other one
    assert other["num_equal"] == 1
    assert other["psnr"] == other["psnr_base"] == pytest.approx(28.131, abs=1e-3)
    lines = markdown([vanilla, other], base_label="causal").splitlines()
    assert lines[2] == "| vanilla | 2 | 100 % | 3.00 | 1.00x | 0 % | - | - | - | - |"
    assert lines[3].startswith("| other | 2 | 50 % | 1.50 | 2.00x | 0 % | 28.13 |")


def table_row(method: str, policy: str | None, **changes: Any) -> dict[str, Any]:
    predictor = "as tuned" if policy == "planned" else "residual"
    row = {
        "method": method,
        "overrides": ["reuse.every=2"],
        "group": policy and {"policy": policy, "predictor": predictor, "level": "mid"},
        "num_clips": 2,
        "num_equal_base": 0,
        "gflops": 20.0,
        "flops_share": 0.4,
        "dit_seconds": 2.0,
        "speedup_base": 2.5,
        "judge_accuracy": 0.5,
        "judge": {"color": 1.0, "shape": 0.5},
        "psnr": 21.0,
        "psnr_base": 25.0,
        "psnr_error_base": 0.5,
        "ssim_base": 0.9,
    }
    return {**row, **changes}


def test_the_csv_has_what_the_table_for_people_leaves_out():
    (row,) = csv.DictReader(csv_text([table_row("plan", "planned")]).splitlines())
    assert (row["method"], row["judge_shape"], row["psnr_error_base"]) == ("plan", "0.5", "0.5")


def test_the_table_for_the_readme_has_the_error_of_the_mean():
    rows = [
        table_row("every step", None, num_equal_base=2, psnr_base=None, psnr_error_base=None),
        table_row("plan", "planned"),
    ]
    head, _, whole, plan = reuse_markdown(rows).splitlines()
    assert head.startswith("| method | FLOPs | GFLOP | DiT s | DiT speed-up | judge | PSNR, dB |")
    assert head.count("|") <= 11
    assert "| equal |" in whole
    assert plan == ("| plan | 40.0 % | 20.0 | 2.00 | 2.50x | 50 % | 25.00 ± 0.50 | 0.900 | 21.00 |")


@pytest.mark.parametrize(
    ("decibel", "accuracy", "cheap", "said"),
    [
        (31.0, 0.5, 25.5, ("holds", "holds")),
        (30.9, 0.5, 24.5, ("DOES NOT HOLD", "DOES NOT HOLD")),
        (31.0, 0.4, 25.0, ("DOES NOT HOLD", "holds")),
    ],
)
def test_claims_are_decided_by_hand(
    decibel: float, accuracy: float, cheap: float, said: tuple[str, str]
):
    table = [
        table_row("vanilla", None),
        table_row("FlowCache-fast, residual", "FlowCache"),
        table_row("plan", "planned", psnr_base=decibel, judge_accuracy=accuracy),
        table_row("cheap plan", "planned", gflops=12.0, psnr_base=cheap),
        table_row("dear plan", "planned", gflops=30.0, psnr_base=50.0),
    ]
    first, second, third = claims(table)
    judged = f"judge {100 * accuracy:.0f} % against 50 %, 100 % of the FLOPs)"
    assert first.endswith(f"no lower: {said[0]} (plan: {decibel - 25:+.2f} dB, {judged}")
    gain = f"(cheap plan: {cheap - 25:+.2f} dB at 60 % of the FLOPs)"
    assert second.endswith(f"FlowCache-fast's FLOPs: {said[1]} {gain}")
    assert third == "DiT seconds: plan 2.00, FlowCache-fast 2.00, every step 5.00"
    assert claims(table[:2]) == [], "without a plan nothing is claimed"
    assert "not decided, no plan has so few FLOPs" in claims([*table[:2], table[4]])[0]


# Budgets


def falling(threshold: float) -> float:
    return 1 / (1 + 10 * threshold)


@pytest.mark.parametrize("start", [0.001, 0.1, 30.0])
def test_a_threshold_is_found_from_either_side(start: float):
    found = find_threshold(falling, 0.4, start=start, tolerance=0.02)
    assert falling(found) == pytest.approx(0.4, abs=0.02)


def test_no_threshold_is_made_up_where_none_comes_near():
    with pytest.raises(UserError, match="no threshold between"):
        find_threshold(lambda _: 0.9, 0.4, start=0.1, tolerance=0.02)


def test_even_steps_run_from_the_first_to_the_last():
    assert even_steps(4, num_steps=10) == [0, 3, 6, 9]
    assert even_steps(2, num_steps=10) == [0, 9]


@pytest.mark.slow
def test_budgets_are_made_on_the_demo_and_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = ["--architecture", "skyreels_v2", "--clips", "1", "--out", str(tmp_path), *TINY]
    line.append("reuse.warmup_steps=2")
    assert tune_budgets.main(line) == 0
    found = read_budgets(tmp_path, model="skyreels_v2", checkpoint="demo")
    assert found.rule("flowcache", "mid").threshold is None
    low, middle, high = (found.levels[name] for name in LEVELS)
    assert len(low.even_steps) < len(middle.even_steps) < len(high.even_steps)
    for rule in found.adaptive:
        wanted = found.rule("flowcache", "mid").flops * LEVELS[rule.level]
        assert rule.flops == pytest.approx(wanted, abs=1.5 / NUM_STEPS)
    capsys.readouterr()
    assert tune_budgets.main(line) == 0
    assert "calibrated" not in capsys.readouterr().err, "nothing was measured twice"
