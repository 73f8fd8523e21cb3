"""Records of runs that need no model: their file, their alarms, their replay."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flowcache.errors import UserError
from flowcache.policies import Decision
from flowcache.runtime.files import write_json
from flowcache.runtime.record import (
    alarms,
    build_record,
    check_replay,
    read_record,
    replay_policies,
)
from flowcache.runtime.stats import KVTokens, PassFlops, PassId, RunStats, TickId, Traced, merged
from flowcache.schedule import Tick, staggered

CPU = torch.device("cpu")
NUM_STEPS = 6


def recorded(*, policy: str = "flowcache", threshold: float | None = 0.25) -> dict[str, Any]:
    """Return the record of a run of two chunks: steps 0, 1, 3 and 5 computed, growing distances."""
    stats = RunStats(CPU, records=True)
    for tick in staggered(range(2), num_steps=NUM_STEPS, lag=2):
        with stats.timed_tick(0, tick.index):
            for chunk, step in tick.steps.items():
                is_computed = step in (0, 1, 3, 5)
                distance = None if step == 0 else 0.1 + 0.01 * step
                decision = Decision(is_computed, distance, None if step == 0 else 0.1 * step)
                stats.record(tick, chunk, "cond", decision)
                each = [PassId(0, tick.index, chunk, "cond")]
                stats.add_flops(computed=10 if is_computed else 3, without_reuse=10, passes=each)
                if is_computed:
                    with stats.timed_pass(each):
                        pass
        assert stats.trace is not None
        stats.trace.keep_tokens(TickId(0, tick.index), "cond", torch.tensor([0.0, 2.5]))
    return build_record(
        stats,
        stats.traced(),
        video="a.mp4",
        model="demo",
        preset="flowcache_fast",
        policy=policy,
        threshold=threshold,
        num_steps=NUM_STEPS,
        config={"seed": 1},
        environment={"device": "cpu"},
        chunk_frames={0: [[0, 9], [9, 17]]},
    )


def test_a_record_holds_every_decision_with_its_cost():
    record = recorded()
    assert len(record["decisions"]) == 2 * NUM_STEPS
    assert [row["tick"] for row in record["ticks"]] == list(range(NUM_STEPS + 2))
    assert all(row["seconds"] >= 0 for row in record["ticks"])
    for row in record["decisions"]:
        assert (row["flops"], row["flops_saved"]) == ((10, 0) if row["computed"] else (3, 7))
        assert (row["seconds"] is None) == (not row["computed"])
    assert record["kv"][0] == {"segment": 0, "tick": 0, "branch": "cond", "tokens": {"1": 2.5}}


def test_flops_and_seconds_of_a_whole_window_are_shared_by_its_chunks():
    stats = RunStats(CPU, records=True)
    passes = [PassId(0, 0, chunk, "cond") for chunk in range(3)]
    stats.add_flops(computed=7, without_reuse=9, passes=passes)
    assert stats.trace is not None
    assert [tuple(stats.trace.flops[each]) for each in passes] == [(3, 1), (2, 1), (2, 0)]
    assert (stats.computed_flops, stats.flops_without_reuse) == (7, 9)


def test_what_processes_traced_is_put_together_as_one_would_have_traced_it():
    every, cond, uncond = (PassId(0, 0, 0, name) for name in ("all", "cond", "uncond"))
    kv = {name: [KVTokens(0, tick, name, {0: 2.5}) for tick in (0, 1)] for name in ("a", "b")}
    first = Traced(
        {every: PassFlops(6, 1), cond: PassFlops(4, 0)},
        {every: 2.0, cond: 2.0},
        {TickId(0, 0): 3.0, TickId(0, 1): 1.0},
        kv["a"],
    )
    second = Traced(
        {every: PassFlops(6, 1), uncond: PassFlops(5, 0)},
        {every: 1.0, uncond: 4.0},
        {TickId(0, 0): 2.0, TickId(0, 1): 2.0},
        kv["b"],
    )
    assert merged([first]) == first
    assert merged([first, second]) == Traced(
        {every: PassFlops(6, 1), cond: PassFlops(4, 0), uncond: PassFlops(5, 0)},
        {every: 3.0, cond: 2.0, uncond: 4.0},
        {TickId(0, 0): 3.0, TickId(0, 1): 2.0},
        [kv["a"][0], kv["b"][0], kv["a"][1], kv["b"][1]],
    )


def test_what_is_written_is_read_back(tmp_path: Path):
    record = recorded()
    for row, value in zip(record["decisions"], ("nan", "inf", "-inf"), strict=False):
        row["distance"] = value
    write_json(tmp_path / "a.record.json", record)
    assert read_record(tmp_path / "a.record.json") == record


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema_version",), 2, "schema_version must be 1, found 2"),
        (("policy",), 3, "policy must be a text, found 3"),
        (("num_steps",), True, "num_steps must be a whole number in 1..1000000, found true"),
        (("threshold",), "0.1", "threshold must be a number or null"),
        (("extra",), 1, "'extra' is unknown"),
        (("ticks",), {}, "ticks must be a list"),
        (("chunk_frames",), {"0": [[9, 3]]}, "chunk_frames must be"),
        (("decisions", 3, "distance"), "big", r"decisions\[3\].distance must be a number, null"),
        (("decisions", 3, "computed"), 1, r"decisions\[3\].computed must be true or false"),
        (("decisions", 0), [], r"decisions\[0\] must be an object"),
        (("kv", 0, "tokens"), {"a": 1}, r"kv\[0\].tokens must be"),
        (("ticks", 1, "seconds"), -1, r"ticks\[1\].seconds must be a time"),
        (("stages", "dit"), {"seconds": "", "num_uses": 1, "within": None}, "dit.seconds must be"),
        (("stages", "dit"), {"seconds": 1.0, "num_uses": 1}, "stages.dit.within is missing"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(
    place: tuple[Any, ...], value: Any, message: str, tmp_path: Path
):
    record: Any = recorded()
    owner = record
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    path = tmp_path / "a.record.json"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=message) as error:
        read_record(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_field_and_files_that_are_no_records_are_refused(tmp_path: Path):
    path = tmp_path / "a.record.json"
    with pytest.raises(UserError, match="cannot be read"):
        read_record(path)
    for text, message in (("{", "not a readable JSON file"), ("[]", "must be a JSON object")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_record(path)
    record = recorded()
    del record["decisions"][2]["flops"]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"decisions\[2\].flops is missing"):
        read_record(path)


# Alarms -------------------------------------------------------------------------------------------


def changed(**fields: Any) -> dict[str, Any]:
    """Return a record with these fields in all decisions; a function of the row makes the value."""
    record = copy.deepcopy(recorded())
    for row in record["decisions"]:
        row.update({name: make(row) for name, make in fields.items()})
    return record


def test_a_healthy_run_and_one_without_a_cache_raise_no_alarm():
    assert alarms(recorded()) == []
    vanilla = changed(computed=lambda _row: True, distance=lambda _row: None)
    assert alarms({**vanilla, "policy": "vanilla", "threshold": None}) == []


@pytest.mark.parametrize(
    ("fields", "given", "said"),
    [
        ({"computed": lambda _row: True}, {}, "never hit"),
        ({"computed": lambda _row: True}, {"policy": "stride"}, "never hit"),
        # after the forced steps
        ({"computed": lambda row: row["step"] in (0, 1, 5)}, {}, "always hit"),
        (
            {"distance": lambda row: "nan" if row["step"] == 4 else row["distance"]},
            {},
            "distance is not a number: 2 times, first in segment 0, tick 4, chunk 0, branch cond",
        ),
        (
            {"distance": lambda row: 0.5 if row["chunk"] == 1 else row["distance"]},
            {},
            "distance is constant: 0.5 in all 6 ticks of chunk 1",
        ),
        (
            {},
            {"threshold": 0.6},
            "threshold never reached: it is 0.6, the largest accumulated distance 0.5",
        ),
    ],
)
def test_a_cache_that_does_not_do_what_it_is_for_raises_an_alarm(
    fields: dict[str, Any], given: dict[str, Any], said: str
):
    (line,) = alarms({**changed(**fields), **given})
    assert line.startswith(said)


# Replay -------------------------------------------------------------------------------------------


def test_a_replay_computes_what_was_recorded():
    record = recorded()
    policy = replay_policies(record, segment=0, branch="cond")
    for tick in staggered(range(2), num_steps=NUM_STEPS, lag=2):
        plan = policy.plan(tick, {}, stored={0, 1})
        assert {chunk: d.is_computed for chunk, d in plan.items()} == {
            chunk: step in (0, 1, 3, 5) for chunk, step in tick.steps.items()
        }


@pytest.mark.parametrize(
    ("num_chunks", "num_steps", "lag", "stored", "reason"),
    [
        (3, 6, 2, {0, 1, 2}, "it has 8 ticks, the run 10"),
        (3, 6, 1, {0, 1, 2}, "in tick 1 it has the chunks and steps"),
        (2, 6, 2, {1}, "it reuses chunk 0 in tick 2, but nothing is stored"),
    ],
)
def test_a_record_of_another_run_is_refused(
    num_chunks: int, num_steps: int, lag: int, stored: set[int], reason: str
):
    policy = replay_policies(recorded(), segment=0, branch="cond")
    ticks = staggered(range(num_chunks), num_steps=num_steps, lag=lag)
    with pytest.raises(UserError, match=f"the record does not fit this run: {reason}"):
        for tick in ticks:
            policy.plan(tick, {}, stored=stored)


@pytest.mark.parametrize(("segment", "branch"), [(1, "cond"), (0, "all")])
def test_a_record_without_the_segment_or_branch_is_refused(segment: int, branch: str):
    with pytest.raises(UserError, match="the record does not fit this run: it has no decisions"):
        replay_policies(recorded(), segment=segment, branch=branch)


def two_chunks() -> list[Tick]:
    return staggered(range(2), num_steps=NUM_STEPS, lag=2)


def test_a_record_that_fits_passes_the_check():
    check_replay(recorded(), ticks={0: two_chunks()}, branches=["cond"])


MORE = {"rows": lambda rows: [*rows, *({**row, "segment": 1} for row in rows)]}
LATE = {"rows": lambda rows: [{**row, "computed": row["step"] > 0} for row in rows]}


@pytest.mark.parametrize(
    ("change", "branches", "said"),
    [
        (MORE, ["cond"], "decisions of segment 1, branch cond, which the run does"),
        ({}, ["cond", "uncond"], "it has no decisions of segment 0, branch uncond"),
        (LATE, ["cond"], "it reuses chunk 0 in tick 0, but nothing is stored"),
    ],
    ids=["more segments", "fewer branches", "reuses before it computes"],
)
def test_a_record_that_does_not_fit_is_refused_before_the_run_starts(
    change: dict[str, Any], branches: list[str], said: str
):
    record = recorded()
    record["decisions"] = change.get("rows", list)(record["decisions"])
    with pytest.raises(UserError, match=said):
        check_replay(record, ticks={0: two_chunks()}, branches=branches)


def test_a_run_that_computes_all_chunks_together_refuses_decisions_of_single_chunks():
    record = recorded()
    with pytest.raises(UserError, match=r"it reuses chunks \[0\] where the run has to compute"):
        check_replay(record, ticks={0: two_chunks()}, branches=["cond"], is_whole_window=True)
    for row in record["decisions"]:
        row["computed"] = row["tick"] in (0, 4)  # chunk 1 enters in tick 2, where all is reused
    check_replay(record, ticks={0: two_chunks()}, branches=["cond"], is_whole_window=True)


def test_a_replay_raises_no_alarm():
    record = recorded(policy="replay", threshold=None)
    for row in record["decisions"]:
        row["computed"], row["distance"], row["accumulated"] = True, None, None
    assert alarms(record) == []
    assert alarms({**record, "policy": "stride"}) != []
