"""The comparison of methods: fair references, rows that are kept, averages worked by hand."""

import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flowcache.demo.clips import Attributes
from flowcache.demo.latents import Statistics
from flowcache.policies import Decision
from flowcache.runtime.config import find_preset, load_config, to_dict
from flowcache.runtime.run import Clip, config_layers
from flowcache.runtime.stats import RunStats
from magi1 import demo
from magi1.checkpoint import find_model
from magi1.config import RunConfig
from magi1.released import PRESETS

SCRIPTS = Path(__file__).parents[2] / "scripts"
MAGI_SETTINGS = (
    *("runtime_config.num_frames=72", "runtime_config.num_steps=4"),
    *("runtime_config.window_size=1", "kv.total_chunks=2"),
    *("reuse.warmup_steps=1", "reuse.every=3"),
)
"""Three chunks, one at a time; a cache of two must drop something."""
SKYREELS_SETTINGS = (
    *("num_frames=17", "base_num_frames=17", "overlap_history=null"),
    *("num_steps=4", "ar_step=1", "causal_block_size=2", "reuse.warmup_steps=1", "reuse.every=3"),
)


@pytest.fixture(name="script")
def _script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bench_demo")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MAGI-1 demo with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint") / "demo"
    models = demo.new_models()
    generator = torch.Generator().manual_seed(0)
    for param in models.dit.parameters():
        param.data += 0.02 * torch.randn(param.shape, generator=generator)
    statistics = Statistics(mean=[0.5] * 16, std=[2.0] * 16)
    demo.write_checkpoint(demo.new_vae(), models, models.dit, statistics=statistics, folder=folder)
    return folder


@pytest.fixture(name="bench")
def _bench(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., int]:
    """Return the command line; results go to `tmp_path / "out"`."""

    def run(*arguments: str) -> int:
        line = ["bench_demo.py", "--out", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", line)
        return script.main()

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for log in sorted((folder / "out").glob("rows-*.jsonl"))
        for line in log.read_text().splitlines()
    ]


@pytest.mark.parametrize("model", ["magi1", "skyreels_v2"])
def test_methods_have_own_names_and_stand_below_what_they_are_compared_with(
    script: ModuleType, model: str
):
    methods = script.comparison_of(model).methods
    names = [method.name for method in methods]
    assert names[0] == "vanilla"
    assert len(set(names)) == len(names)
    for place, method in enumerate(methods):
        assert method.base is None or method.base in names[:place]


@functools.cache
def magi_settings(preset: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings of a method on the released model, without what may differ freely."""
    source = find_model("4.5B_distill")
    layers = config_layers(
        PRESETS / "base.yaml",
        find_preset(PRESETS, preset),
        checkpoint=source.folder,
        model=source.layers,
    )
    return to_dict(load_config(RunConfig, layers, overrides=["prompt=-", *overrides]))


def test_a_magi1_method_differs_from_its_base_in_reuse_alone(script: ModuleType):
    family = script.comparison_of("magi1")
    methods = {method.name: method for method in family.methods}
    pairs = [(m, methods[m.base]) for m in family.methods if m.base is not None]
    assert len(pairs) == 24
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
def test_compressed_magi1_methods_are_the_presets(script: ModuleType, name: str, preset: str):
    (method,) = (m for m in script.comparison_of("magi1").methods if m.name == name)
    assert magi_settings(method.preset, method.overrides) == magi_settings(preset)


def test_magi1_is_compared_and_the_rows_are_kept(
    bench: Callable[..., int],
    untrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    method = "stride (FlowCache-fast's FLOPs), velocity + KV compression"
    base = "vanilla, neither pass + KV compression"
    checkpoint = str(untrained / "distill_config.json")
    line = ["--model", "magi1", "--checkpoint", checkpoint, "--prompts", "1"]
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
    assert bench(*line, "reuse.every=2") == 2
    assert "other settings" in capsys.readouterr().err


def test_a_clip_too_short_for_compression_is_refused(
    bench: Callable[..., int], untrained: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint = str(untrained / "distill_config.json")
    line = ["--model", "magi1", "--checkpoint", checkpoint, "--methods"]
    assert bench(*line, "vanilla + KV compression", "--", "runtime_config.num_frames=96") == 2
    message = capsys.readouterr().err
    assert "nothing would be dropped" in message
    assert "4 chunks" in message


def test_skyreels_v2_is_compared_by_several_processes(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = ["--model", "skyreels_v2", "--prompts", "2", "--methods"]
    line += ["stride (FlowCache-fast's FLOPs), residual", "--part"]
    assert bench(*line, "2/2", *SKYREELS_SETTINGS) == 0
    assert "3 of 6 clips" in capsys.readouterr().out
    assert not (tmp_path / "out/table.json").exists()
    assert bench(*line, "1/2", *SKYREELS_SETTINGS) == 0
    assert "PSNR (causal)" in capsys.readouterr().out
    rows = rows_of(tmp_path)
    assert sorted((row["index"], row["seed"]) for row in rows) == [(0, 5000)] * 3 + [(1, 5001)] * 3
    assert {row["computed_share"] for row in rows[2::3]} == {0.75}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "magic"], "--list-methods"),
        (["--prompts", "0"], "--prompts"),
        (["--part", "3/2"], "--part"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_option_is_one_line(
    bench: Callable[..., int],
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
):
    assert bench("--model", "magi1", *arguments) == 2
    message = capsys.readouterr().err.strip()
    assert said in message
    assert len(message.splitlines()) == 1


@pytest.mark.usefixtures("script")
def test_figures_and_averages_are_those_worked_by_hand():
    figures, family = map(
        importlib.import_module, ("flowcache.bench.methods", "flowcache.bench.methods")
    )
    methods = [family.Method("vanilla", "v"), family.Method("other", "o", (), "vanilla")]
    attributes = Attributes("red", "circle", "right", "black")

    def clip(level: int, *, is_computed: bool) -> Any:
        stats = RunStats(torch.device("cpu"))
        for computed in (True, is_computed):
            decision = Decision(computed, None, None)
            stats.record(segment=0, tick=0, chunk=0, step=0, branch="all", decision=decision)
        with stats.stage("dit"), stats.stage("vae"):
            stats.add_flops(computed=2 * 10**9, without_reuse=4 * 10**9)
        return Clip(torch.full((9, 64, 64, 3), level, dtype=torch.uint8), stats)

    reference = clip(100, is_computed=True)
    rows = [
        {"method": "vanilla", **family.measure(reference, attributes, reference=None, base=None)}
    ]
    for level in (100, 110):
        other = clip(level, is_computed=False)
        measured = family.measure(
            other, attributes, reference=reference.frames, base=reference.frames
        )
        rows.append({"method": "other", **measured})
    for row, seconds in zip(rows, (3.0, 1.0, 2.0), strict=True):
        row["dit_seconds"] = seconds
    vanilla, other = figures.summarize(rows, methods)
    assert vanilla["computed_share"] == 1
    assert other["computed_share"] == 0.5
    assert other["gflops"] == 2
    assert other["speedup"] == 2
    assert other["judge_accuracy"] == 0, "a plain surface shows no circle"
    # a clip that is equal has no PSNR: the mean is 20 log10(255 / 10) of the other one
    assert other["num_equal"] == 1
    assert other["psnr"] == other["psnr_base"] == pytest.approx(28.131, abs=1e-3)
    lines = figures.markdown([vanilla, other], base_label="causal").splitlines()
    assert lines[2] == "| vanilla | 2 | 100 % | 3.00 | 1.00x | 0 % | - | - | - | - |"
    assert lines[3].startswith("| other | 2 | 50 % | 1.50 | 2.00x | 0 % | 28.13 |")


def test_a_damaged_row_is_named(
    bench: Callable[..., int],
    untrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/rows-1.jsonl").write_text('{"method": "vani')
    checkpoint = str(untrained / "distill_config.json")
    assert bench("--model", "magi1", "--checkpoint", checkpoint, "--methods", "vanilla") == 2
    assert "rows-1.jsonl: line 1 is damaged" in capsys.readouterr().err
