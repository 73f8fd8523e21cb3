"""The command that compares reference cases with our code: it passes, and it can fail."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "skyreels_v2"
MAGI1 = ROOT / "tests" / "golden" / "magi1"
SELF_FORCING = ROOT / "tests" / "golden" / "self_forcing"

Main = Callable[[list[str]], int]
Contents = tuple[dict[str, Any], dict[str, Tensor]]
"""Settings and tensors of a case file."""
Damage = Callable[[dict[str, Any], dict[str, Tensor]], object]

SMALL: dict[str, tuple[str, str]] = {
    "dit_t2v": ("", "out.ar.fps1"),
    "dit_i2v": ("", "out.frames"),
    "schedule": ("5", "5.trajectory"),
    "step_matrix": ("2", "2.update"),
    "df_loop": ("drop_tail", "drop_tail.final"),
    "teacache_upstream": ("sync_noret", "sync_noret.final"),
    "fork_segment0": ("compress_ret_a", "compress_ret_a.final"),
    "fork_long_2seg": ("kvrange_ret_a", "kvrange_ret_a.seg1"),
    "kv_compress": ("mha0", "mha0.score"),
    "vae": ("", "out.video"),
    "umt5": ("", "out.masked"),
    "clip_vision": ("", "out.features"),
}
"""Case file -> the one entry of its list that is kept, and a tensor that our code must meet."""


@pytest.fixture(name="main")
def _main(monkeypatch: pytest.MonkeyPatch) -> Main:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("check_golden").main


def read(name: str) -> Contents:
    """Return a case file, cut down to one entry of its list."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    kept = SMALL[name][0]
    for key in {"runs", "sets", "cases"} & set(case):
        named = {str(entry.get("name", entry.get("i"))): entry for entry in case[key]}
        case[key] = [named.pop(kept)]
        tensors = {k: v for k, v in tensors.items() if k.split(".")[0] not in named}
    if name == "kv_compress":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("gqa")}
    return case, tensors


def write(folder: Path, name: str, contents: Contents) -> str:
    case, tensors = contents
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, metadata={"case": json.dumps(case), "about": ""})
    return str(folder)


def failures(text: str) -> list[str]:
    """Return the printed rows of failed checks."""
    *rows, _total = text.splitlines()
    return [row for row in rows if "  fail" in row]


def test_all_reference_cases_pass_but_for_listed_defects_of_the_reference(
    main: Main, capsys: pytest.CaptureFixture[str]
):
    assert main([str(GOLDEN)]) == 0
    *rows, _total = capsys.readouterr().out.splitlines()
    assert {row.split()[0] for row in rows} == set(SMALL)
    reasons = {row.split("  known  ")[1]: row.split()[0] for row in rows if "  known  " in row}
    for words, name in (
        ("still its noise", "df_loop"),
        ("counter wraps", "teacache_upstream"),
        ("hides the prefix", "fork_long_2seg"),
    ):
        assert {found for reason, found in reasons.items() if words in reason} == {name}
    assert len([row for row in rows if "  pass" in row]) > 10 * len(reasons)


@pytest.mark.parametrize("folder", [MAGI1, SELF_FORCING], ids=lambda folder: folder.name)
def test_all_reference_cases_pass(main: Main, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(folder)]) == 0
    *rows, total = capsys.readouterr().out.splitlines()
    assert {row.split()[0] for row in rows} == {path.stem for path in folder.iterdir()}
    assert total.endswith("0 known, 0 fail")


@pytest.mark.parametrize("name", SMALL)
def test_one_wrong_number_fails_one_check_in_every_kind_of_case(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    case, tensors = read(name)
    wrong = tensors[SMALL[name][1]].flatten().clone()
    wrong[len(wrong) // 3] += 1 if wrong.dtype == torch.int64 else 0.01
    wrong = wrong.view_as(tensors[SMALL[name][1]])
    assert main([write(tmp_path, name, (case, tensors | {SMALL[name][1]: wrong}))]) == 1
    (failed,) = failures(capsys.readouterr().out)
    assert SMALL[name][1] in failed


def other_kept_token(_case: Any, tensors: dict[str, Tensor]) -> None:
    kept = tensors["mha0.indices"]
    kept[0, 0] = next(i for i in range(90) if i not in kept[:, 0])


def put(name: str, place: Any, value: float) -> Damage:
    """Return what puts a wrong number into a tensor."""
    return lambda _case, tensors: tensors[name].__setitem__(place, value)


def drop(*names: str) -> Damage:
    return lambda _case, tensors: [tensors.pop(name) for name in names]


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("teacache_upstream", put("sync_noret.computed", 2, 1), "computed up to the wrap"),
        ("teacache_upstream", put("sync_noret.computed", -1, 1), "computed after the wrap"),
        (
            "fork_segment0",
            lambda case, _: case["runs"][0]["skipped_own_steps"][1].pop(),
            "skipped_own_steps",
        ),
        ("step_matrix", lambda case, _: case["sets"][0].update(raises=True), "raises"),
        ("kv_compress", other_kept_token, "indices"),
        ("df_loop", put("drop_tail.final", (0, -1, 0, 0), 9.0), "tail"),
        ("clip_vision", put("out.features", (0, 0, 0), float("nan")), "nan"),
        (
            "clip_vision",
            lambda _, tensors: tensors.update(
                {"out.features": tensors["out.features"][:, :-1].contiguous()}
            ),
            "ours is",
        ),
        ("clip_vision", drop("out.features", "out.pixels"), "none that is known"),
        ("clip_vision", drop("weights.visual.head"), "visual.head"),
        (
            "clip_vision",
            lambda _, tensors: tensors.update({"out.more": torch.zeros(1)}),
            "not compared: out.more",
        ),
    ],
)
def test_damage_other_than_a_wrong_output_fails_too(
    main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Damage,
    reason: str,
):
    case, tensors = read(name)
    damage(case, tensors)
    assert main([write(tmp_path, name, (case, tensors))]) == 1
    assert any(reason in row for row in failures(capsys.readouterr().out))


def test_the_kind_is_read_from_the_contents_and_not_from_the_name(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path, "vae", read("clip_vision"))
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper", "any name", read("kv_compress"))
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "deeper/any name" in out
    assert "out.pixels" in out


@pytest.mark.parametrize(
    ("file_name", "content", "reason"),
    [
        ("a.safetensors", b"no tensors", "can't be read"),
        ("b.json", b'{"prompts": []}', "none that is known"),
        ("c.json", b"[]", "holds no settings"),
        ("d.json", b"{", "no JSON"),
        ("e.json", b'{"pairs": []}', "nothing was compared"),
        ("f.json", b'{"pairs": [1]}', "TypeError"),
        ("g.json", b'{"settings": [1]}', "TypeError"),
        ("h.json", b'{"ddconfig": 1, "tile": "x"}', "  run  "),
        ("i.json", b"[" * 100_000, "RecursionError"),
    ],
)
def test_a_file_that_is_no_known_case_fails_and_the_others_are_checked(
    main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file_name: str,
    content: bytes,
    reason: str,
):
    (tmp_path / file_name).write_bytes(content)
    write(tmp_path, "last", read("kv_compress"))
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert [reason in row for row in failures(out)] == [True]
    assert any("mha0.score" in row and row.endswith("pass") for row in out.splitlines())


def test_files_that_are_no_cases_are_named(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path, "case", read("kv_compress"))
    (tmp_path / "README.md").touch()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "more.npz").touch()
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no case files, not compared: README.md, deeper/more.npz" in out.splitlines()


def test_a_wrong_argument_is_one_line_and_exit_code_2(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "file"
    file.touch()
    for arguments in ([], [str(tmp_path / "none")], [str(tmp_path)], [str(file)], ["a", "b"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
