"""The measurement of speed: made-up decisions, tables, targets, and all of it at tiny sizes."""

import csv
import importlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowcache.gpu import bench, demos, measure, report
from flowcache.gpu.benchmark import (
    Growth,
    Line,
    load_benchmark,
    load_benchmarks,
    random_weights,
)
from flowcache.gpu.traces import (
    CACHING,
    Curve,
    Pattern,
    fit_pattern,
    make_trace,
    pattern_at,
    policies_at,
)
from flowcache.report.figures import draw_growth
from flowcache.runtime.checks import Decoded
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats
from flowcache.schedule import staggered

MODELS = ("skyreels_v2", "magi1")
CPU = torch.device("cpu")
TINY = ("--device", "cpu", "--size", "tiny", "--name", "test")


def row(seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "factor": 1,
        "measured_ticks": 4,
        "num_ticks": 4,
        "seconds_per_tick": 0.1,
        "seconds_per_forward": 0.05,
        "flops": 1e15,
        "rate": 4e14,
        "rate_share": 0.6,
        "total_seconds": seconds,
        "vae_seconds": 1.0,
        "exposed_share": 0.05,
        "caching_share": None,
        "compression_share": 0.0,
        "peak_bytes": 20e9,
        "reserved_bytes": None,
        "attention_kernel": "a kernel",
        "cross_attention_kernel": "another",
        "compilation": None,
        "warm_up_seconds": 30.0,
        "kinds": {"attention": 0.5, "linears": 0.25, "other": 0.25},
    } | changes


# Decisions ----------------------------------------------------------------------------------------


def test_a_curve_is_straight_in_the_logarithm_between_and_beyond_its_points():
    curve = Curve(64, ((1, 0.001), (10, 0.01), (20, 0.04)))
    found = [curve.at(step) for step in (1, 10, 15, 20, 30)]
    assert found == pytest.approx([0.001, 0.01, 0.02, 0.04, 0.16])


def test_a_longer_step_changes_by_as_much_as_those_that_it_replaces():
    curve = load_benchmark("magi1").curve
    short, long = (curve.distances(num_steps) for num_steps in (64, 16))
    assert (len(short), len(long)) == (63, 15)
    assert long[0] == pytest.approx(sum(short[:4]))
    assert sum(long) == pytest.approx(sum(short[:60]))
    with pytest.raises(ValueError, match="must divide the published 64, not 10"):
        curve.distances(10)


def test_the_published_curve_and_thresholds_give_about_the_published_flops():
    benchmark = load_benchmark("magi1")
    costs = benchmark.costs(benchmark.plan_method(benchmark.methods[0], "paper", 1))
    for speed, threshold in (("slow", 0.01), ("fast", 0.015)):
        pattern = pattern_at(benchmark.curve.distances(64), threshold, 5)
        # the curve was read off a figure
        assert pattern.share(costs) == pytest.approx(benchmark.shares[speed], abs=0.06)
        assert all(pattern.is_computed[:5])
        assert pattern.is_computed[-1]


def test_a_threshold_is_found_for_any_share():
    costs, distances = [1.0] * 50, load_benchmark("skyreels_v2").curve.distances(50)
    for share in (0.3, 0.5, 0.8, 1.0):
        pattern = fit_pattern(distances, warmup_steps=5, costs=costs, share=share)
        assert pattern.share(costs) == pytest.approx(share, abs=0.02)


def test_a_costly_step_counts_for_more():
    pattern = Pattern((True, False, True), 0.1, 1)
    assert pattern.share([1.0, 1.0, 1.0]) == pytest.approx(2 / 3)
    assert pattern.share([1.0, 6.0, 1.0]) == pytest.approx(0.25)


def test_decisions_are_those_of_the_trace_whatever_the_signals_say():
    pattern, stats = Pattern((True, False, True), 0.1, 1), RunStats(CPU)
    segments = [staggered(chunks, num_steps=3, lag=1) for chunks in ([0, 1], [1])]
    work: Any = SimpleNamespace(
        segments=[SimpleNamespace(ticks=ticks) for ticks in segments], branches=("a", "b")
    )
    decisions = make_trace(pattern, work)["decisions"]
    assert len(decisions) == 2 * 3 * 3
    assert all(one["computed"] == (one["step"] != 1) for one in decisions)
    policy, signal = policies_at(pattern, work, stats)(segment=1, branch="b"), torch.ones(4)
    assert policy.needs_signals
    computed = [
        policy.plan(tick, {1: signal * 10**tick.index}, stored={1} if tick.index else ())
        for tick in segments[1]
    ]
    assert [plan[1].is_computed for plan in computed] == [True, False, True]
    assert stats.stage_times()[CACHING].num_uses == 3


@pytest.mark.parametrize("model", MODELS)
def test_decisions_at_the_papers_sizes_cost_what_was_published(model: str):
    benchmark = load_benchmark(model)
    for method in benchmark.methods:
        if method.speed is not None:
            job = benchmark.plan_method(method, "paper", 1)
            share = benchmark.pattern(job, method.speed).share(benchmark.costs(job))
            assert share == pytest.approx(benchmark.shares[method.speed], abs=0.01)


def test_the_papers_runs_are_planned_with_the_published_flops():
    # 306 as published; clean passes, cross-attention and embeddings come on top
    for model, flops in (("skyreels_v2", 165e15), ("magi1", 306e15)):
        benchmark = load_benchmark(model)
        full = benchmark.plan_method(benchmark.methods[0], "paper", 1)
        assert full.work.flops == pytest.approx(flops, rel=0.02)
    benchmark = load_benchmark("magi1")
    short, whole = (benchmark.plan_method(benchmark.methods[2], "paper", n).work for n in (4, 1))
    assert whole.flops / short.flops == pytest.approx(4, rel=0.01)
    assert whole.num_ticks == 4 * short.num_ticks


# Kinds of kernels, targets and tables -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>(...)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNN", "linears"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "linears"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "linears"),
        ("aten::addmm", "linears"),
        ("triton_poi_fused_add_mul_native_layer_norm_3", "other"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "other"),
    ],
)
def test_a_kernel_is_of_the_kind_that_its_name_says(kernel: str, kind: str):
    assert measure.kind_of(kernel) == kind


def test_targets_are_judged_by_the_worst_method_or_the_one_they_name():
    rows = {
        "vanilla": row(100.0, rate_share=0.5),
        "FlowCache-fast": row(20.0, caching_share=0.004),
        "FlowCache-fast, keys on the host": row(40.0, rate_share=0.3, peak_bytes=25e9),
        "FlowCache-slow": {"error": "out of memory"},
    }
    judged = report.judged(load_benchmark("skyreels_v2"), rows)
    verdicts = {one["figure"]: one for one in judged}
    assert verdicts["rate_share"]["method"] == "vanilla"
    assert verdicts["speedup"]["value"] == pytest.approx(5.0)
    met = {figure: one["is_met"] for figure, one in verdicts.items()}
    assert met["caching_share"] is True
    assert not any(met[figure] for figure in ("rate_share", "speedup", "peak_bytes"))
    said = report.said(verdicts["peak_bytes"], is_judged=True)
    assert said.startswith("NOT met: ")
    assert "<= 24.0 GB: 25.0 GB (FlowCache-fast, keys on the host)" in said
    assert report.said(verdicts["peak_bytes"], is_judged=False).startswith("not judged: ")


def test_a_target_without_a_figure_is_not_measured():
    rows = {"FlowCache-fast + KV compression": row(9.0)}
    verdicts = report.judged(load_benchmark("magi1"), rows)
    speedup = next(one for one in verdicts if one["figure"] == "speedup")
    assert speedup["value"] is None
    assert report.said(speedup, is_judged=True).startswith("not measured: ")


def test_a_profiler_that_sees_nothing_leaves_a_dash():
    document = {
        "name": "x",
        "note": "",
        "command": "",
        "is_judged": False,
        "environment": defaultdict(str, packages={"torch": "2"}),
        "models": {"magi1": {"vanilla": row(9.0, kinds=None)}},
    }
    text = report.markdown(document)
    assert "| 60 % | - | - |" in text
    assert max(line.count("|") for line in text.splitlines()) <= 11
    (written,) = csv.DictReader(report.csv_text(document).splitlines())
    assert (written["method"], float(written["total_seconds"])) == ("vanilla", 9.0)


# Time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_profiled_tick_has_a_full_window_and_no_concurrent_decoding(model: str):
    benchmark = load_benchmark(model)
    job = benchmark.plan_method(benchmark.methods[0], "paper", benchmark.thin["paper"][-1])
    ticks = job.work.segments[0].ticks
    looked_at = measure.looked_at(ticks)
    assert len(ticks[looked_at].steps) == max(len(tick.steps) for tick in ticks)
    assert not any(tick.finishing for tick in ticks[: looked_at + 1])


def test_the_next_tick_goes_on_while_frames_are_decoded():
    goes_on = threading.Event()

    def decode() -> Decoded:
        assert goes_on.wait(timeout=20), "the next tick waited for the frames"
        return Decoded(torch.zeros(3, 5, 2, 2), torch.tensor(True))

    def shown() -> Iterator[Any]:
        with ThreadPoolExecutor(1) as decoder:
            yield SimpleNamespace(later=decoder.submit(decode))
            goes_on.set()
            yield SimpleNamespace(later=None)

    assert measure.take_frames(shown(), device=CPU, is_concurrent=True) == 5


def test_grey_frames_are_as_many_and_as_large_as_decoded_ones(monkeypatch: pytest.MonkeyPatch):
    gpu = importlib.import_module("skyreels_v2.gpu")
    job = SimpleNamespace(residence=SimpleNamespace(vae_strips=None))
    real = gpu.wan_vae(job, "tiny", random_weights(CPU))
    monkeypatch.setattr(gpu, "is_installed", lambda _: False)
    grey = gpu.wan_vae(job, "tiny", random_weights(CPU))
    streams = [vae.stream(Ranks()) for vae in (real, grey)]
    for num_latents in (2, 1, 3):
        latents = torch.zeros(1, 16, num_latents, 2, 3)
        wanted, found = (stream.decode(latents) for stream in streams)
        assert found.shape == wanted.shape
    pixels = torch.zeros(1, 3, 9, 16, 24)
    assert grey.encode(pixels).shape == real.encode(pixels).shape


# The whole of it ----------------------------------------------------------------------------------


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert bench.main([*TINY, "--out", str(out), *arguments]) == 0
    return json.loads((out / "gpu_test.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_blocks_are_compiled_where_a_run_compiles_them(model: str, monkeypatch: pytest.MonkeyPatch):
    benchmark, compiled = load_benchmark(model), list[Any]()
    compiler = importlib.import_module("flowcache.gpu.benchmark")
    monkeypatch.setattr(compiler, "should_compile", lambda wanted, _device: wanted is True)
    monkeypatch.setattr(
        type(benchmark.model), "compile", lambda _self, _job, dit: compiled.append(dit)
    )
    for setting in ("true", "null"):
        settings = (f"compile={setting}",)
        job = benchmark.plan_method(benchmark.methods[0], "tiny", 1, settings, device=CPU)
        dit = benchmark.build(job, "tiny", random_weights(CPU)).dit
        assert (dit in compiled) == (setting == "true")


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("skyreels_v2", "FlowCache-slow + KV compression"),
        ("magi1", "FlowCache-fast + KV compression"),
    ],
)
def test_a_tiny_model_is_measured_and_a_second_start_measures_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, method: str
):
    first = run(tmp_path, "--architecture", model, "--methods", "vanilla")["models"][model]
    assert list(first) == ["vanilla"]
    measured: list[str] = []
    row_of = bench.row_of

    def watch(benchmark: Any, models: Any, method: Any, trial: Any) -> Any:
        measured.append(method.name)
        return row_of(benchmark, models, method, trial)

    monkeypatch.setattr(bench, "row_of", watch)
    rows = run(tmp_path, "--architecture", model, "--methods", method)["models"][model]
    assert measured == [method]
    assert rows["vanilla"] == first["vanilla"]
    for found in rows.values():
        assert found["seconds_per_tick"] > 0
        assert found["rate_share"] > 0
        assert sum(found["kinds"].values()) == pytest.approx(1)
        assert found["kinds"]["attention"] > 0
        assert found["kinds"]["linears"] > 0
        assert 0 < found["exposed_share"] < 1
        assert 0 < found["outside_share"] < 1
    assert rows[method]["flops"] < rows["vanilla"]["flops"]
    assert rows[method]["caching_share"] > 0
    assert rows[method]["compression_share"] > 0
    page = (tmp_path / "gpu_test.md").read_text()
    assert "Figures of a CPU" in page
    assert page.count("not judged: ") + page.count("not measured: ") == 6
    assert "NOT met" not in page


@pytest.mark.parametrize(
    ("error", "said", "shown"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB"),
            "out of memory: CUDA out of memory",
            "out of memory: CUDA out of memory",
        ),
        (RuntimeError("no kernel for a|b\nat line 3"), "no kernel for a|b", "no kernel for a\\|b"),
    ],
)
def test_a_method_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, said: str, shown: str
):
    def fail(_benchmark: Any, _models: Any, trial: Any, **_: Any) -> dict[str, Any]:
        if trial.speed is None:
            return row(10.0)
        raise error

    monkeypatch.setattr(bench, "measure", fail)
    methods = ("FlowCache-slow", "vanilla causal")
    found = run(tmp_path, "--architecture", "skyreels_v2", "--methods", *methods)["models"][
        "skyreels_v2"
    ]
    assert found["FlowCache-slow"]["error"] == said
    assert found["vanilla causal"]["total_seconds"] == 10.0
    assert f"| {shown} |" in (tmp_path / "gpu_test.md").read_text()


def test_a_file_of_another_machine_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bench, "measure", lambda *_, **__: row(10.0))
    document = run(tmp_path, "--architecture", "magi1", "--methods", "vanilla")
    document["same"]["device"] = "another"
    path = tmp_path / "gpu_test.json"
    path.write_text(json.dumps(document))
    assert bench.main([*TINY, "--out", str(tmp_path), "--architecture", "magi1"]) == 2
    error = capsys.readouterr().err.strip()
    assert "was measured with another device and is kept" in error
    assert "\n" not in error
    assert json.loads(path.read_text()) == document


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "would take days"),
        (["--quick", "--whole"], "contradict"),
        (["--methods", "FlowCash"], "'FlowCash' is no row"),
        (["--trace", "a.record.json"], "--trace is of one model"),
        ([*TINY, "num_step=3"], "unknown key 'num_step'"),
        pytest.param(
            [],
            "no CUDA device here: run this on a machine with a GPU, or try the code with "
            "--device cpu --size tiny",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="is about no CUDA"),
        ),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    assert bench.main(["--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


# Growth -------------------------------------------------------------------------------------------


def test_planned_memory_is_flat_with_compression_and_grows_without():
    for benchmark in load_benchmarks().values():
        for line in benchmark.growth.lines:
            before, last = (
                demos.plan_video(benchmark, line, number)
                for number in benchmark.growth.planned[-2:]
            )
            grows = line.name == "all keys and values"
            assert (last["kv_bytes"] > 1.1 * before["kv_bytes"]) == grows, line.name
            assert (last["flops_per_chunk"] > 1.05 * before["flops_per_chunk"]) == grows, line.name


def made_row(line: Line, num_frames: int) -> dict[str, Any]:
    """Make nothing: FlowCache-fast has 1/4 of the FLOPs and 1/3.2 of the time."""
    flops = {"FlowCache-slow": 200, "FlowCache-fast": 100}.get(line.name, 400)
    seconds = {"FlowCache-slow": 2.5, "FlowCache-fast": 1.25}.get(line.name, 4.0)
    kept = {"frames": num_frames, "chunks": 2, "kv_bytes": 10**6}
    return kept | {"flops": flops, "seconds_per_chunk": seconds}


def start(out: Path, option: str) -> int:
    return bench.main([option, "--architecture", "magi1", "--out", str(out)])


def test_growth_is_written_once_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    line = Line("KV compression", "flowcache_fast", lambda _: ())
    growth = Growth("Model A", (line,), ("num_steps=2",), (97, 177), (97, 177))
    benchmark = replace(load_benchmark("magi1"), growth=growth)
    monkeypatch.setattr(bench, "load_benchmarks", lambda: {"a": benchmark})
    planned = {"frames": 97, "chunks": 2, "flops_per_chunk": 1e12, "kv_bytes": 10**9}
    monkeypatch.setattr(demos, "plan_video", lambda *_: planned)
    monkeypatch.setattr(demos, "open_demo", lambda _: made_row)
    assert start(tmp_path, "--growth") == 0
    drawn = draw_growth(tmp_path / demos.GROWTH)
    assert drawn.count('class="curve"') == 3 + 1
    assert start(tmp_path, "--growth") == 2
    assert "exists and is kept" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="no result of python scripts"):
        draw_growth(tmp_path / "broken.json")
