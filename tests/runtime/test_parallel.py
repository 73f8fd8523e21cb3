"""How processes divide a run, meet, and lose each other."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta

import pytest
import torch

from flowcache.bounds import check_values
from flowcache.errors import UserError
from flowcache.policies import Vanilla
from flowcache.runtime.config import ParallelRule
from flowcache.runtime.ending import EXIT_USER_ERROR, LAUNCHER, Place, Starter, Stopped, starter_of
from flowcache.runtime.parallel import (
    Group,
    Layout,
    LostProcessError,
    Ranks,
    TokenSplit,
    bytes_per_process,
    process_layout,
    run_in_ranks,
)


def divide(num: int, rule: ParallelRule | None = None, **sizes: int) -> Layout:
    run = {"num_branches": 2, "num_heads": 12, "num_tokens": 100} | sizes
    return process_layout(rule or ParallelRule(), num, **run)


@pytest.mark.parametrize(
    ("num", "num_branches", "expected"),
    [
        (1, 2, (1, 1)),
        (2, 2, (2, 1)),
        (3, 2, (1, 3)),
        (4, 2, (2, 2)),
        (4, 1, (1, 4)),
        (8, 2, (2, 4)),
        (2, 3, (2, 1)),
        (3, 3, (3, 1)),
        (6, 3, (3, 2)),
    ],
)
def test_branches_are_divided_first(num: int, num_branches: int, expected: tuple[int, int]):
    assert divide(num, num_branches=num_branches) == Layout(*expected)


def test_a_given_number_is_used_and_the_other_one_follows():
    assert divide(4, ParallelRule(sequence=4)) == Layout(1, 4)
    assert divide(4, ParallelRule(branch=1)) == Layout(1, 4)
    assert divide(6, ParallelRule(branch=2, sequence=3)) == Layout(2, 3)


@pytest.mark.parametrize(
    ("num", "rule", "sizes", "said"),
    [
        (3, ParallelRule(branch=2), {}, "needs 2 processes, but 3 run"),
        (1, ParallelRule(sequence=2), {}, "needs 2 processes, but 1 run"),
        (2, ParallelRule(branch=2), {"num_branches": 1}, "above the 1 guidance passes"),
        (8, ParallelRule(), {"num_branches": 1}, "does not divide the 12 key/value heads"),
        (8, ParallelRule(), {"num_tokens": 3}, "above the 3 tokens"),
        (4, ParallelRule(), {"num_heads": 2, "num_branches": 1}, "start 1 or 2 processes instead"),
        (6, ParallelRule(), {"num_heads": 8, "num_branches": 1}, r"GPUS=1, 2 or 4\)"),
        (9, ParallelRule(), {"num_heads": 2, "num_branches": 3}, r"GPUS=1, 2, 3, 4 or 6\)"),
        (8, ParallelRule(branch=2), {"num_heads": 2}, r"GPUS=2 or 4\)"),
        (3, ParallelRule(branch=1), {"num_heads": 1}, r"start 1 process instead of 3 .*GPUS=1\)"),
        (3, ParallelRule(sequence=3), {"num_heads": 4}, r"use parallel.sequence=1, 2 or 4$"),
    ],
)
def test_what_can_not_be_divided_is_refused_and_the_numbers_that_fit_are_named(
    num: int, rule: ParallelRule, sizes: Mapping[str, int], said: str
):
    with pytest.raises(UserError, match=said) as caught:
        divide(num, rule, **sizes)
    assert "\n" not in str(caught.value)


def test_a_number_of_processes_below_one_is_refused():
    with pytest.raises(UserError, match=r"parallel\.sequence must be in 1\.\.4096, not 0"):
        check_values(ParallelRule(sequence=0), prefix="parallel.")


def test_a_process_holds_its_branches_and_heads():
    assert bytes_per_process(1200, Layout(1, 1), num_branches=2) == 1200
    assert bytes_per_process(1200, Layout(2, 3), num_branches=2) == 200
    assert bytes_per_process(1200, Layout(3, 1), num_branches=2) == 600


def test_without_torchrun_there_is_one_process():
    assert Place.of({}) == Place(0, 1, 0)
    assert Place.of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(5, 8, 1)
    assert Place.of({}).shared_rank is None


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is in the environment, but no RANK"),
        ({"RANK": "abc"}, "RANK=abc in the environment must be a whole number, 0 or more"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 in the environment must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "1.5"}, "WORLD_SIZE=1.5 in the environment must be a whole"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, "RANK=9999"),
        ({"RANK": "٣", "WORLD_SIZE": "4"}, "RANK=٣ in the environment must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 in the environment must be below WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1 in the environment must be below WORLD_SIZE=1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 in the environment must be below WORLD_SIZE=0"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "2"},
            "LOCAL_RANK=2 in the environment must be below WORLD_SIZE=2",
        ),
    ],
)
def test_variables_that_contradict_each_other_are_refused_in_one_line(
    variables: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_in_ranks(lambda _: pytest.fail("it ran")) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1
    assert "unset RANK, WORLD_SIZE and LOCAL_RANK" in err


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "1"}, {"RANK": "0"}, {"RANK": ""}])
def test_what_clusters_set_for_one_process_is_one_process(variables: dict[str, str]):
    assert Place.of(variables) == Place(0, 1, 0)


@pytest.mark.parametrize("place", [{}, {"MASTER_ADDR": "here"}, {"MASTER_PORT": "x"}])
def test_processes_that_do_not_know_where_to_meet_are_refused(
    place: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in ({"RANK": "0", "WORLD_SIZE": "2"} | place).items():
        monkeypatch.setenv(name, value)
    assert run_in_ranks(lambda _: pytest.fail("it ran")) == EXIT_USER_ERROR
    assert "name no place to meet" in capsys.readouterr().err


def test_a_process_whose_launcher_has_ended_does_not_begin():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    agent |= {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for variables in ({LAUNCHER: "1,5,6"}, agent):
        with pytest.raises(Stopped, match="the process that started this one has ended"):
            starter_of(variables, Place(0, 2, 0))
        with pytest.raises(Stopped, match=r"^$"):
            starter_of(variables, Place(1, 2, 1))
    assert starter_of({}, Place()) is None
    assert starter_of({}, Place(0, 2)) == Starter(os.getppid())
    own = {LAUNCHER: f"{os.getppid()},5,6"}
    assert starter_of(own, Place(0, 2)) == Starter(os.getppid(), says_why=True, notes=5)
    assert starter_of(own, Place(1, 2)) == Starter(os.getppid(), says_why=True, notes=None)


def test_every_branch_has_one_group():
    names = ["cond", "prev", "alone"]
    for size in (1, 2, 3):
        owned = [Ranks(branches=Group(rank, size)).local_branches(names) for rank in range(size)]
        assert sorted(name for own in owned for name in own) == sorted(names)
        for name in names:
            assert name in owned[Ranks(branches=Group(0, size)).rank_of(names, name)]


def test_every_process_of_a_layout_has_a_share():
    assert (Ranks().share, Ranks().num_shares) == (0, 1)
    made = [
        Ranks(branches=Group(branch, 2), sequence=Group(token, 3))
        for branch in range(2)
        for token in range(3)
    ]
    assert [ranks.share for ranks in made] == list(range(6))
    assert {ranks.num_shares for ranks in made} == {6}


def test_one_process_exchanges_nothing():
    ranks, policy = Ranks(), Vanilla()
    x = torch.ones(3)
    assert ranks.gather_branches({"cond": x}, names=["cond"], like=x)["cond"] is x
    assert ranks.decided_by(policy, branch=1) is policy
    assert ranks.together(lambda: 5) == 5
    assert ranks.from_first(lambda: 6) == 6
    assert ranks.all_reduce(x) is x
    assert ranks.divided(torch.device("cpu")) is ranks
    split = TokenSplit(Group(), 2, 3)
    assert split.scatter(x, axis=0) is x


@pytest.mark.parametrize("given", [None, "1"])
def test_a_lost_process_of_nccl_is_an_error_that_can_be_told_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, given: str | None
):
    name, seen = "TORCH_NCCL_ASYNC_ERROR_HANDLING", list[tuple[object, ...]]()
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)

    def new_groups(groups: list[list[int]], *, timeout: object, backend: str) -> object:
        seen.append((groups, timeout, backend, os.environ[name]))
        return object(), []

    monkeypatch.setattr("torch.distributed.new_subgroups_by_enumeration", new_groups)
    monkeypatch.setattr("torch.distributed.get_rank", lambda _: 0)
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    ranks = Ranks(Place(0, 2), Layout(sequence=2), timeout=timedelta(seconds=7))
    ranks.divided(torch.device("cuda"))
    # 2: abort the exchange; the constructor of the group reads it
    assert seen == [([[0, 1]], timedelta(seconds=7), "nccl", given or "2")]
    monkeypatch.delenv(name, raising=False)


def test_the_end_of_a_run_confirms_what_was_exchanged(monkeypatch: pytest.MonkeyPatch):
    def fail(*, group: object) -> None:
        raise RuntimeError(f"{group} was aborted\nlong story")

    monkeypatch.setattr("torch.distributed.barrier", fail)
    Ranks().confirm()
    ranks = Ranks(Place(0, 2), Layout(sequence=2), sequence=Group(0, 2))
    with pytest.raises(LostProcessError, match=r"lost contact .*\(None was aborted\)"):
        ranks.confirm()


def test_every_frame_is_divided_and_all_tokens_have_one_owner():
    x = torch.arange(2 * 7)
    shares = [TokenSplit(Group(rank, 3), 2, 7).scatter(x, axis=0) for rank in range(3)]
    assert [share.tolist() for share in shares] == [
        [0, 1, 2, 7, 8, 9],
        [3, 4, 10, 11],
        [5, 6, 12, 13],
    ]


MEET = """
import os, sys
from datetime import timedelta
from flowcache.runtime.parallel import process_group
from flowcache.runtime.parallel import LostProcessError, Place
try:
    with process_group(Place.of(os.environ), timeout=timedelta(seconds=2)):
        pass
except LostProcessError as error:
    sys.exit(str(error))
"""


def test_a_process_that_never_comes_is_told_in_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-c", MEET],
        env=os.environ | place,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "lost contact with another process" in done.stderr.splitlines()[-1]
