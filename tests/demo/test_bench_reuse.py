"""The table of reuse rules: its rows, budgets and thresholds, its claims, worked by hand."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flowcache.errors import UserError
from flowcache.runtime import profile as profiles
from flowcache.runtime.config import find_preset, load_config, to_dict
from flowcache.runtime.model import Request
from flowcache.runtime.run import config_layers, prepare
from magi1.checkpoint import find_model
from magi1.config import RunConfig
from magi1.released import PRESETS
from skyreels_v2 import checkpoint as checkpoints
from skyreels_v2.model import MODEL

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODELS = ("magi1", "skyreels_v2")
NUM_STEPS = 8
MIDDLE_FLOWCACHE = 1
"""Place of FlowCache-fast among the adaptive rules: its threshold is the preset's."""
TINY = (
    *("num_frames=17", "base_num_frames=17", "overlap_history=null"),
    *(f"num_steps={NUM_STEPS}", "ar_step=1", "causal_block_size=2", "reuse.warmup_steps=1"),
)


@pytest.fixture(name="script")
def _script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bench_demo")


@pytest.fixture(name="bench")
def _bench(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., int]:
    """Return the command line; results go to `tmp_path / "out"`."""

    def run(*arguments: str) -> int:
        line = ["bench_demo.py", "--table", "reuse", "--out", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", line)
        return script.main()

    return run


def budgets_of(model: str, **changes: Any) -> Any:
    """Return budgets as the search would find them."""
    budgets = importlib.import_module("flowcache.bench.reuse")
    level = budgets.Level(0.5, "plan.yaml", [0, 2, 5, NUM_STEPS - 1], 0.4, 0.2)
    rules = [
        *(("flowcache", name) for name in budgets.LEVELS),
        *((name, "mid") for name in ("content", "teacache", "magcache")),
    ]
    found = budgets.Budgets(
        command="python scripts/tune_budgets.py",
        model=model,
        checkpoint="demo",
        settings=[],
        levels=dict.fromkeys(budgets.LEVELS, level),
        adaptive=[
            budgets.Adaptive(
                rule, name, None if (rule, name) == ("flowcache", "mid") else 0.25, 0.5, 0.3
            )
            for rule, name in rules
        ],
    )
    return dataclasses.replace(found, **changes)


def rows_of(script: ModuleType, model: str) -> tuple[Any, ...]:
    reuse = importlib.import_module("flowcache.bench.reuse")
    return reuse.reuse_methods(script.comparison_of(model), budgets_of(model), Path("profiles"))


@pytest.mark.parametrize("model", MODELS)
def test_a_table_has_every_policy_at_the_middle_budget_in_less_than_30_rows(
    script: ModuleType, model: str
):
    rows = rows_of(script, model)
    names = [row.name for row in rows]
    assert names[0] == "vanilla"
    assert len(set(names)) == len(names) < 30
    middle = {
        row.group.policy for row in rows if row.group is not None and row.group.level == "mid"
    }
    wanted = {"FlowCache", "TeaCache", "MagCache", "stride", "planned", "guarded"}
    assert middle == wanted | ({"FlowCache, content signal"} if model == "skyreels_v2" else set())
    for policy in ("FlowCache", "stride", "planned"):
        levels = {row.group.level for row in rows if row.group and row.group.policy == policy}
        assert levels == {"low", "mid", "high"}


def test_a_magi1_row_differs_from_every_step_in_reuse_alone(script: ModuleType):
    def settings(row: Any) -> dict[str, Any]:
        source = find_model("4.5B_distill")
        layers = config_layers(
            PRESETS / "base.yaml",
            find_preset(PRESETS, row.preset),
            checkpoint=source.folder,
            model=source.layers,
        )
        overrides = ["prompt=-", *row.overrides]
        return to_dict(load_config(RunConfig, layers, overrides=overrides))

    rows = rows_of(script, "magi1")
    _, base, *reusing = rows
    whole = settings(base)
    assert whole.pop("reuse")["policy"] == "vanilla"
    for row in reusing:
        own = settings(row)
        assert own.pop("reuse")["policy"] != "vanilla"
        assert own == whole, row.name
        assert row.base == base.name


def test_the_published_rule_at_its_own_budget_is_the_preset(script: ModuleType):
    rows = {row.name: row for row in rows_of(script, "skyreels_v2")}
    fast = rows["FlowCache-fast, residual"]
    assert fast.preset == "flowcache_fast"
    assert fast.overrides == ("reuse.predict=residual", "reuse.extrapolate=0")


def falling(threshold: float) -> float:
    return 1 / (1 + 10 * threshold)


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize("start", [0.001, 0.1, 30.0])
def test_a_threshold_is_found_from_either_side(start: float):
    search = importlib.import_module("flowcache.bench.reuse")
    found = search.find_threshold(falling, 0.4, start=start, tolerance=0.02)
    assert falling(found) == pytest.approx(0.4, abs=0.02)


@pytest.mark.usefixtures("script")
def test_no_threshold_is_made_up_where_none_comes_near():
    search = importlib.import_module("flowcache.bench.reuse")
    with pytest.raises(UserError, match="no threshold between"):
        search.find_threshold(lambda _: 0.9, 0.4, start=0.1, tolerance=0.02)


@pytest.mark.usefixtures("script")
def test_even_steps_run_from_the_first_to_the_last():
    methods = importlib.import_module("flowcache.tune.methods")
    assert methods.even_steps(4, num_steps=10) == [0, 3, 6, 9]
    assert methods.even_steps(2, num_steps=10) == [0, 9]


def table_row(method: str, policy: str | None, **changes: Any) -> dict[str, Any]:
    predictor = "as tuned" if policy == "planned" else "residual"
    row = {
        "method": method,
        "group": policy and {"policy": policy, "predictor": predictor, "level": "mid"},
        "num_clips": 2,
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
        "num_equal_base": 0,
    }
    return {**row, **changes}


@pytest.mark.usefixtures("script")
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
    module = importlib.import_module("flowcache.bench.reuse")
    table = [
        table_row("vanilla", None),
        table_row("FlowCache-fast, residual", "FlowCache"),
        table_row("plan", "planned", psnr_base=decibel, judge_accuracy=accuracy),
        table_row("cheap plan", "planned", gflops=12.0, psnr_base=cheap),
        table_row("dear plan", "planned", gflops=30.0, psnr_base=50.0),
    ]
    first, second, third = module.claims(table)
    assert f": {said[0]} (plan: {decibel - 25:+.2f} dB" in first
    assert f": {said[1]} (cheap plan: {cheap - 25:+.2f} dB at 60 % of the FLOPs)" in second
    assert "plan 2.00, FlowCache-fast 2.00, every step 5.00" in third
    assert module.claims(table[:2]) == [], "without a plan nothing is claimed"
    assert "not decided" in module.claims([*table[:2], table[4]])[0]


@pytest.mark.usefixtures("script")
def test_the_table_for_the_readme_has_the_error_of_the_mean():
    figures = importlib.import_module("flowcache.bench.methods")
    rows = [
        table_row("every step", None, num_equal_base=2, psnr_base=None, psnr_error_base=None),
        table_row("plan", "planned"),
    ]
    head, _, whole, plan = figures.reuse_markdown(rows).splitlines()
    assert head.startswith("| method | FLOPs | GFLOPs | DiT s | speed-up | judge | color | shape |")
    assert "| equal |" in whole
    assert plan == (
        "| plan | 40.0 % | 20.0 | 2.00 | 2.50x | 50 % | 100 % | 50 % | 25.00 ± 0.50 | 0.900 "
        "| 21.00 |"
    )


def write_budgets(folder: Path, *, model: str = "skyreels_v2") -> str:
    """Write budgets and a profile of the demo by hand, and return their folder."""
    budgets = importlib.import_module("flowcache.bench.reuse")
    folder.mkdir()
    budgets.write_budgets(budgets_of(model), folder)
    job = prepare(MODEL, Request("vanilla_causal", "demo", [*TINY, "prompt=-"], str(folder)))
    ones = [1.0] * NUM_STEPS
    profile = profiles.Profile(
        version=profiles.VERSION,
        fingerprint=checkpoints.fingerprint(job.source.files),
        setting=MODEL.setting(job.config),
        reuse=profiles.Reuse([[0, 1, 4, NUM_STEPS - 1]], "velocity", 1, 0.5),
        predicted=profiles.Prediction(1.0, 30.0, 0.5, 1.0),
        observed=profiles.Observed(ones, [0.0] * NUM_STEPS, ones),
        source=profiles.Source("skyreels_v2 demo", "flowcache_fast", "2026-01-01", ["a"], [1]),
    )
    profiles.write_profile(profile, folder / "plan.yaml")
    return str(folder)


def test_plan_and_stride_are_compared_at_the_same_cost(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = ["--model", "skyreels_v2", "--profiles", write_budgets(tmp_path / "profiles")]
    names = [
        "FlowCache-fast, residual",
        "planned (mid), as tuned",
        "stride (mid), velocity + trend",
    ]
    assert bench(*line, "--prompts", "1", "--methods", *names, "--", *TINY) == 0
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


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _: [], "--table reuse needs --profiles"),
        (lambda folder: ["--profiles", str(folder / "none")], "no such file"),
        (
            lambda folder: ["--profiles", write_budgets(folder / "a", model="magi1")],
            "was made for magi1 demo",
        ),
    ],
)
def test_wrong_budgets_are_one_line(
    bench: Callable[..., int],
    tmp_path: Path,
    make: Callable[[Path], list[str]],
    said: str,
    capsys: pytest.CaptureFixture[str],
):
    assert bench("--model", "skyreels_v2", *make(tmp_path)) == 2
    message = capsys.readouterr().err.strip()
    assert said in message
    assert len(message.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("script")
def test_budgets_are_made_on_the_demo_and_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tune_budgets = importlib.import_module("tune_budgets")
    line = ["--model", "skyreels_v2", "--clips", "1", "--out", str(tmp_path), *TINY[:-1]]
    line.append("reuse.warmup_steps=2")
    assert tune_budgets.main(line) == 0
    budgets = importlib.import_module("flowcache.bench.reuse")
    found = budgets.read_budgets(tmp_path, model="skyreels_v2", checkpoint="demo")
    assert found.rule("flowcache", "mid").threshold is None
    low, middle, high = (found.levels[name] for name in budgets.LEVELS)
    assert len(low.even_steps) < len(middle.even_steps) < len(high.even_steps)
    for rule in found.adaptive:
        wanted = found.rule("flowcache", "mid").flops * budgets.LEVELS[rule.level]
        assert rule.flops == pytest.approx(wanted, abs=1.5 / NUM_STEPS)
    capsys.readouterr()
    assert tune_budgets.main(line) == 0
    assert "calibrated" not in capsys.readouterr().err, "nothing was measured twice"
