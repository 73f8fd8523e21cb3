import json
import time

import pytest
import torch

from flowcache.policies import Decision
from flowcache.runtime.stats import Period, RunStats, environment, merged_periods, scaled
from flowcache.schedule import Tick

CPU = torch.device("cpu")


class Clock:
    """A clock of the host that a test moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.seconds)

    def move(self, seconds: float) -> None:
        self.seconds += seconds


def record(stats: RunStats, *, chunk: int, is_computed: bool, branch: str = "cond") -> None:
    decision = Decision(is_computed, distance=0.25, accumulated=float("inf"))
    stats.record(Tick(3, 4, 3, {chunk: 2}), chunk, branch, decision)


def test_decisions_are_counted_in_all_and_per_branch():
    stats = RunStats(CPU)
    for chunk in range(3):
        record(stats, chunk=chunk, is_computed=chunk == 0)
    record(stats, chunk=0, is_computed=True, branch="uncond")
    passes = stats.to_dict()["passes"]
    assert passes["computed"] == 2
    assert passes["reused"] == 2
    assert passes["computed_share"] == 0.5
    assert passes["per_branch"] == {
        "cond": {"computed": 1, "reused": 2},
        "uncond": {"computed": 1, "reused": 0},
    }


def test_every_decision_is_a_row_and_infinity_is_null():
    stats = RunStats(CPU)
    record(stats, chunk=1, is_computed=False)
    decisions = stats.to_dict()["decisions"]
    row = dict(zip(decisions["columns"], decisions["rows"][0], strict=True))
    assert row == {
        "segment": 0,
        "tick": 3,
        "chunk": 1,
        "step": 2,
        "branch": "cond",
        "is_computed": False,
        "distance": 0.25,
        "accumulated": None,
    }


def test_the_dictionary_of_an_empty_and_of_a_used_run_is_strict_json():
    stats = RunStats(CPU)
    empty = stats.to_dict()
    assert empty["passes"]["computed_share"] is None
    assert empty["flops"]["saving_factor"] is None
    record(stats, chunk=0, is_computed=True)
    stats.add_flops(computed=10, without_reuse=30)
    with stats.stage("dit"):
        pass
    for content in (empty, stats.to_dict()):
        assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_a_nested_stage_is_part_of_the_outer_one():
    stats = RunStats(CPU)
    for _ in range(2):
        with stats.stage("dit"):
            time.sleep(0.02)
            with stats.stage("kv_compression"):
                time.sleep(0.03)
    times = stats.stage_times()
    assert times["dit"].parent is None
    assert times["kv_compression"].parent == "dit"
    assert times["dit"].num_uses == times["kv_compression"].num_uses == 2
    assert times["kv_compression"].seconds >= 0.06
    assert times["dit"].seconds >= times["kv_compression"].seconds + 0.04


def test_the_time_line_tells_when_the_outer_stages_and_those_beside_were_at_work(
    monkeypatch: pytest.MonkeyPatch,
):
    clock = Clock(monkeypatch)
    stats = RunStats(CPU)
    clock.move(1)
    with stats.stage("load", is_on_host=True):
        clock.move(2)
    with stats.stage("dit"):  # 3 to 5
        clock.move(0.5)
        with stats.stage("kv_compression"):
            clock.move(1.5)
    with stats.stage("vae", is_concurrent=True):  # 5 to 12
        with stats.stage("dit"):  # 5 to 9, at once after the one before
            clock.move(4)
        clock.move(1)
        with stats.stage("dit"):  # 10 to 11
            clock.move(1)
        clock.move(1)
    assert stats.to_dict()["timeline"] == [
        ["load", 1.0, 3.0, False],
        ["dit", 3.0, 9.0, False],
        ["vae", 5.0, 12.0, True],
        ["dit", 10.0, 11.0, False],
    ]


def test_a_stage_that_raises_is_still_counted_and_closed():
    stats = RunStats(CPU)
    with pytest.raises(KeyboardInterrupt), stats.stage("vae"):
        raise KeyboardInterrupt
    with stats.stage("write"):
        pass
    assert [(name, each.parent) for name, each in stats.stage_times().items()] == [
        *(("vae", None), ("write", None))
    ]


def test_the_summary_says_passes_flops_times_and_memory():
    stats = RunStats(CPU)
    for chunk in range(8):
        record(stats, chunk=chunk, is_computed=chunk < 3)
    stats.add_flops(computed=113_600 * 10**12, without_reuse=306_000 * 10**12)
    with stats.stage("dit"), stats.stage("kv_compression"):
        pass
    lines = stats.summary().splitlines()
    assert lines[0] == "chunk passes  3 of 8 computed (37.5 %)"
    assert lines[1] == "FLOPs         114 PFLOP, 2.69x fewer than without reuse (306 PFLOP)"
    assert lines[2].startswith("time          0.")
    assert lines[2].endswith("s: dit 0.0 s (with kv_compression 0.0 s)")
    assert lines[3].startswith("peak memory   ")


def test_a_run_that_saves_nothing_is_not_compared_with_one_without_reuse():
    stats = RunStats(CPU)
    record(stats, chunk=0, is_computed=True)
    stats.add_flops(computed=102 * 10**9, without_reuse=101 * 10**9)
    assert stats.summary().splitlines()[1] == "FLOPs         102 GFLOP"


def test_peak_memory_of_the_process_grows_with_what_it_touches():
    stats = RunStats(CPU)
    before = stats.peak_memory_bytes()
    block = torch.ones(before // 4 + 50_000_000)  # 4 bytes each: more than all before
    assert stats.peak_memory_bytes() >= block.numel() * 4


def test_recording_a_step_of_the_real_model_costs_below_a_millisecond():
    stats = RunStats(CPU)
    start = time.perf_counter()
    for _ in range(20):
        with stats.stage("dit"):
            for chunk in range(25):
                record(stats, chunk=chunk, is_computed=True)
            stats.add_flops(computed=1, without_reuse=1)
    # A tick of the 1.3B model takes more than a second: 1 % is 10 ms.
    assert (time.perf_counter() - start) / 20 < 0.01


def test_the_environment_is_json_and_names_no_machine():
    facts = environment(CPU)
    text = json.dumps(facts)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["device"] == "cpu"
    assert "/" not in text
    assert facts["commit"] is None or len(facts["commit"].rstrip("+")) == 40


@pytest.mark.gpu
def test_cuda_stages_measure_the_work_queued_in_them():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    matrix @ matrix  # the library's own start-up is not part of the measure
    torch.cuda.synchronize()
    stats = RunStats(device)
    with stats.stage("dit"):
        for _ in range(50):
            matrix @ matrix
    queued = time.perf_counter()
    times = stats.stage_times()
    waited = time.perf_counter() - queued
    assert times["dit"].seconds >= waited / 2
    with stats.stage("write", is_on_host=True):
        time.sleep(0.05)
    assert stats.stage_times()["write"].seconds >= 0.05
    (_, *dit, _), (_, *write, _) = stats.timeline()
    assert -0.001 < dit[0] < dit[1] < write[0] + 0.001  # the work was waited for
    assert write[1] < stats.elapsed_seconds()
    assert dit[1] - dit[0] == pytest.approx(times["dit"].seconds, abs=0.001)
    assert stats.peak_memory_bytes() >= matrix.numel() * 4
    reserved = stats.peak_reserved_bytes()
    assert reserved is not None
    assert reserved >= stats.peak_memory_bytes()


def test_memory_is_told_as_tensors_and_as_what_was_reserved_for_them(
    monkeypatch: pytest.MonkeyPatch,
):
    stats = RunStats(CPU)
    assert stats.to_dict()["peak_memory"]["reserved_bytes"] is None
    monkeypatch.setattr(stats, "device", torch.device("cuda"))
    for name, value in (("allocated", 16e9), ("reserved", 21e9)):
        monkeypatch.setattr(f"torch.cuda.max_memory_{name}", lambda _, value=value: int(value))
    monkeypatch.setattr("torch.cuda.synchronize", lambda _: None)
    assert "16 GB (tensors on the GPU; 21 GB reserved for them)" in stats.summary()


# Timeline -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "merged"),
    [
        pytest.param("", "", id="none"),
        pytest.param(
            "text 0 1, dit 1 2, dit 2 4, vae* 3 6, dit 5 6",
            "text 0 1, dit 1 4, vae* 3 6, dit 5 6",
            id="the worked example",
        ),
        pytest.param("dit 0 1, vae 1 1.1, dit 1.1 2", None, id="another stage between"),
        pytest.param("vae 0 1, vae* 1 2", None, id="a concurrent stage is a row of its own"),
        pytest.param("vae* 1 2, vae* 2 3, write* 2 2.5", "vae* 1 3, write* 2 2.5", id="each one"),
        # a stage is noted when it ends
        pytest.param(
            "dit 1 2, dit 0 1, vae* 0.5 2.5, dit 2 3", "dit 0 3, vae* 0.5 2.5", id="order"
        ),
    ],
)
def test_periods_that_follow_each_other_at_once_are_merged(given: str, merged: str | None):
    def periods(text: str) -> list[Period]:
        rows = [row.split() for row in text.split(", ") if row]
        return [Period(n.strip("*"), float(a), float(b), n.endswith("*")) for n, a, b in rows]

    assert merged_periods(periods(given)) == periods(given if merged is None else merged)


def test_a_row_of_the_report_tells_microseconds():
    assert Period("dit", 0.12345678, 2.0, True).to_row() == ["dit", 0.123457, 2.0, True]


# Units --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1234, "1.23 kB"),
        (-5_600_000, "-5.6 MB"),
        (113e15, "113 PB"),
        (2e21, "2e+03 EB"),
    ],
)
def test_a_count_has_three_digits_and_a_decimal_prefix(value: float, text: str):
    assert scaled(value, "B") == text
