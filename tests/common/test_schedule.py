import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from flowcache.errors import UserError
from flowcache.schedule import staggered

GOLDEN = Path(__file__).parents[1] / "golden" / "skyreels_v2" / "step_matrix.safetensors"


def golden_sets() -> list[dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["case"])["sets"]


def upstream_rows(num_chunks: int, num_steps: int, *, lag: int, given: int) -> list[list[int]]:
    """Return the active chunks of upstream's step matrix as its specification words it.

    Level 0 is waiting, k the k-th step, num_steps + 1 done.
    """
    before = [num_steps + 1] * given + [0] * (num_chunks - given)
    rows: list[list[int]] = []
    while any(level < num_steps for level in before):
        now: list[int] = []
        for i in range(num_chunks):
            if i == 0 or before[i - 1] >= num_steps:
                now.append(before[i] + 1)
            else:
                now.append(now[i - 1] - lag)
        now = [min(max(level, 0), num_steps + 1) for level in now]
        moved = [i for i in range(num_chunks) if now[i] != before[i]]
        rows.append([i for i in moved if now[i] != num_steps + 1])
        before = now
    return rows


def test_three_chunks_run_two_steps_apart_as_in_the_worked_example():
    ticks = staggered(range(3), num_steps=4, lag=2)
    assert [dict(tick.steps) for tick in ticks] == [
        {0: 0},
        {0: 1},
        {0: 2, 1: 0},
        {0: 3, 1: 1},
        {1: 2, 2: 0},
        {1: 3, 2: 1},
        {2: 2},
        {2: 3},
    ]
    assert [tick.entering for tick in ticks if tick.entering] == [(0,), (1,), (2,)]
    assert [(tick.index, tick.finishing) for tick in ticks if tick.finishing] == [
        (3, (0,)),
        (5, (1,)),
        (7, (2,)),
    ]
    assert [tick.is_last for tick in ticks] == [False] * 7 + [True]


@pytest.mark.parametrize("entry", golden_sets(), ids=lambda entry: str(entry["i"]))
def test_reference_step_matrices_are_reproduced(entry: dict[str, Any]):
    size, lag = entry["causal_block_size"], entry["ar_step"]
    num_chunks, given = entry["num_latent_frames"] // size, entry["num_pre_ready"] // size
    ticks = staggered(range(given, num_chunks), num_steps=entry["N"], lag=lag)
    if entry["raises"]:  # a window of upstream that is too short; scripts/check_golden.py
        return
    with safe_open(GOLDEN, "pt") as file:
        index, update = (file.get_tensor(f"{entry['i']}.{part}") for part in ("index", "update"))
    for row, tick in enumerate(ticks):
        active = update[row, ::size].nonzero().flatten().tolist()
        assert list(tick.steps) == active
        assert [level - 1 for level in index[row, ::size][active].tolist()] == list(
            tick.steps.values()
        )
    assert len(ticks) == len(update)


def test_any_schedule_equals_upstreams_algorithm_run_literally():
    draw = random.Random(0)
    for _ in range(400):
        num_chunks, num_steps = draw.randint(1, 7), draw.randint(1, 9)
        lag, given = draw.randint(0, num_steps + 2), draw.randint(0, num_chunks - 1)
        expected = upstream_rows(num_chunks, num_steps, lag=lag, given=given)
        ticks = staggered(range(given, num_chunks), num_steps=num_steps, lag=lag)
        assert [list(tick.steps) for tick in ticks] == expected, (num_chunks, num_steps, lag, given)


def test_lag_zero_denoises_all_chunks_at_once():
    ticks = staggered([2, 3, 4], num_steps=2, lag=0)
    assert [dict(tick.steps) for tick in ticks] == [{2: 0, 3: 0, 4: 0}, {2: 1, 3: 1, 4: 1}]


def test_a_lag_above_the_steps_means_one_chunk_after_another():
    one_by_one = [{0: 0}, {0: 1}, {1: 0}, {1: 1}]
    for lag in (2, 3, 50):
        ticks = staggered(range(2), num_steps=2, lag=lag)
        assert [dict(tick.steps) for tick in ticks] == one_by_one


def test_the_published_run_takes_70_and_65_ticks():
    assert len(staggered(range(5), num_steps=50, lag=5)) == 70
    assert len(staggered(range(1, 5), num_steps=50, lag=5)) == 65


def test_no_chunks_take_no_ticks():
    assert staggered([], num_steps=3, lag=1) == []


@pytest.mark.parametrize(
    ("num_steps", "lag", "message"),
    [
        (0, 1, "the number of denoising steps must be at least 1, not 0"),
        (4, -1, "the lag between chunks must be 0 or more steps, not -1"),
    ],
)
def test_impossible_schedules_are_named_in_one_line(num_steps: int, lag: int, message: str):
    with pytest.raises(UserError) as error:
        staggered(range(2), num_steps=num_steps, lag=lag)
    assert str(error.value) == message
