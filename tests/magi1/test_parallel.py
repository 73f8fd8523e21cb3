"""Several processes make the clip that one makes: divided by passes, by tokens, and by both."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import num_ulps

from flowcache.runtime.record import read_record
from flowcache.runtime.run import prepare
from magi1.model import MODEL

pytestmark = [pytest.mark.numeric, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("parallel_runs.py")
LAYOUTS = {2: ("1x2", "2x1"), 3: ("3x1",), 4: ("2x2",)}
ULPS = 256
"""Pixels of several processes may differ by this: they add up in another order in every step."""

Results = dict[tuple[str, str], dict[str, dict[str, Any]]]
"""Kind of model and layout -> case -> what came out"""


@pytest.fixture(scope="module")
def made(
    distilled: Path,
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
    run_in_ranks: Callable[..., None],
) -> Callable[[int], list[Results]]:
    """Return what makes the clips of all cases in so many processes, once."""
    known: dict[int, list[Results]] = {}
    models = tmp_path_factory.mktemp("models")
    (models / "distilled").symlink_to(distilled)
    (models / "base").symlink_to(base)

    def make(num: int) -> list[Results]:
        if num not in known:
            folder = tmp_path_factory.mktemp("ranks")
            layouts = LAYOUTS.get(num, ("1x1",))
            run_in_ranks(SCRIPT, str(models), str(folder), *layouts, num=num)
            known[num] = [
                torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num)
            ]
        return known[num]

    return make


@pytest.mark.parametrize("num", LAYOUTS)
def test_processes_make_the_clip_of_one(made: Callable[[int], list[Results]], num: int):
    [alone] = made(1)
    for of_rank in made(num):
        for (kind, layout), cases in of_rank.items():
            assert cases.keys() == alone[kind, "1x1"].keys()
            for name, case in cases.items():
                expected = alone[kind, "1x1"][name]["frames"]
                difference = num_ulps(case["frames"], expected)
                assert difference < ULPS, f"{name}, {kind}, {layout}: {difference} ulps"


@pytest.mark.parametrize("num", LAYOUTS)
def test_processes_decide_and_count_as_one(made: Callable[[int], list[Results]], num: int):
    [alone] = made(1)
    for of_rank in made(num):
        for (kind, _), cases in of_rank.items():
            for name, case in cases.items():
                expected = alone[kind, "1x1"][name]
                assert case["computed"] == expected["computed"], name
                assert case["flops"] == expected["flops"], name


@pytest.mark.parametrize("num", LAYOUTS)
def test_processes_record_what_one_records(
    made: Callable[[int], list[Results]], num: int, same_record: Callable[[Path, Path], None]
):
    [alone], [first, *_] = made(1), made(num)
    expected = alone["base", "1x1"]["held_flowcache"]["request"]
    for cases in (cases for (kind, _), cases in first.items() if kind == "base"):
        request = cases["held_flowcache"]["request"]
        same_record(Path(request.out), Path(expected.out))
        # one process makes the decisions again
        again = [*request.overrides, "parallel.branch=null", "parallel.sequence=null"]
        path = str(Path(request.out).with_suffix(".record.json"))
        job = prepare(MODEL, replace(request, overrides=again, replay=path, overwrite=True))
        assert job.replay == read_record(Path(path))


def test_the_cases_reuse_and_compress(made: Callable[[int], list[Results]]):
    [alone] = made(1)
    for kind in ("distilled", "base"):
        cases = alone[kind, "1x1"]
        for name in ("teacache", "flowcache", "compression"):
            computed, without_reuse = cases[name]["flops"]
            assert computed < without_reuse, f"{name}, {kind}"
        assert cases["flowcache"]["flops"][1] > cases["compression"]["flops"][1]
