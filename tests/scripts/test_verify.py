"""What --verify finds in the result folder of a table."""

import contextlib
import importlib
import json
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sampling_cases import make_table, report_of, timeless, verify


def test_an_untouched_result_is_verified(
    made: Path, reproduce: ModuleType, capfd: pytest.CaptureFixture[str]
):
    assert verify(reproduce, made, capfd) == (0, "")


def test_a_corrupt_video_is_found_and_made_again(
    made: Path, copy: Path, reproduce: ModuleType, capfd: pytest.CaptureFixture[str]
):
    video = copy / "out" / "videos" / "half" / "001-3.mp4"
    content = bytearray(video.read_bytes())
    content[len(content) // 2] ^= 255
    video.write_bytes(content)
    code, said = verify(reproduce, copy, capfd)
    assert code == 1
    assert "half/001-3" in said
    assert "not the video of its receipt" in said
    others = {path: path.stat().st_mtime_ns for path in (copy / "out").rglob("*.mp4")}
    assert make_table(copy / "small.yaml", copy / "out") == (0, 0)
    changed = [path for path, then in others.items() if path.stat().st_mtime_ns != then]
    assert changed == [video]
    assert timeless(copy) == timeless(made)
    capfd.readouterr()
    assert verify(reproduce, copy, capfd) == (0, "")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("table.json", '"num_videos": 2', '"num_videos": 3', "num_videos of Vanilla is 3, comput"),
        ("table.md", "113", "114", "table.md: not what table.json says"),
        ("table.csv", "Vanilla", "vanilla", "table.csv: not what table.json says"),
        ("protocol.yaml", "A small", "A smaller", "not the protocol of the table"),
        ("videos/half/000-3.json", '"total_seconds": ', '"total_seconds": 1', "not the receipt"),
    ],
)
def test_a_changed_file_is_found(
    copy: Path,
    reproduce: ModuleType,
    capfd: pytest.CaptureFixture[str],
    file: str,
    old: str,
    new: str,
    message: str,
):
    path = copy / "out" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    if file == "table.json":  # as one who changes all three forms alike
        table = importlib.import_module("flowcache.bench.table")
        (copy / "out" / "table.csv").write_text(table.csv_text(report_of(copy)["rows"]))
        (copy / "out" / "table.md").write_text(table.markdown(report_of(copy)))
    code, said = verify(reproduce, copy, capfd)
    assert code == 1
    assert message in said


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["rows"], None, "table.json: rows is missing"),
        (["metrics"], None, "table.json: metrics is missing"),
        (["lpips_sha256"], None, "table.json: lpips_sha256 is missing"),
        (["rows", 0, "figures"], None, "table.json: rows.0.figures is missing"),
        (["rows", 1, "figures", "psnr"], None, "rows.1.figures.psnr is missing"),
        (["rows", 1, "figures", "psnr"], "much", "rows.1.figures.psnr is 'much'"),
        (["rows", 1, "half_widths"], {}, "half_widths of every 2nd is {}, computed anew {"),
        (["rows", 2, "published", "pflops"], None, "rows.2.published.pflops is missing"),
        (["rows", 2], None, "its rows are not the protocol's methods"),
        (["receipts", "half/000-3"], None, "000-3.json: not the receipt that the table was made"),
        (["receipts", "other"], {}, "other is no video of the protocol"),
        (["model"], "other", "is of another run (model differ)"),
        (["num_prompts"], 9, "--num-prompts must be in 1..2"),
        (["environment", "commit"], None, "table.json: environment.commit is missing"),
    ],
)
def test_an_edited_table_is_a_contradiction(
    copy: Path,
    reproduce: ModuleType,
    capfd: pytest.CaptureFixture[str],
    path: list[Any],
    value: Any,
    message: str,
):
    report = report_of(copy)
    section = report
    for key in path[:-1]:
        section = section[key]
    if value is None:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    (copy / "out" / "table.json").write_text(json.dumps(report))
    table = importlib.import_module("flowcache.bench.table")
    if not table.gaps(report):
        (copy / "out" / "table.csv").write_text(table.csv_text(report["rows"]))
        (copy / "out" / "table.md").write_text(table.markdown(report))
    code, said = verify(reproduce, copy, capfd)
    assert code == 1
    assert message in said
    assert "contradictions in" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("device", "factor", "code"),
    [("cpu", 1 + 1e-5, 1), ("a GPU", 1 + 1e-5, 0), ("a GPU", 1.01, 1)],
)
def test_only_figures_of_another_device_may_be_rounded_otherwise(
    copy: Path,
    reproduce: ModuleType,
    capfd: pytest.CaptureFixture[str],
    device: str,
    factor: float,
    code: int,
):
    report = report_of(copy)
    report["environment"]["device"] = device
    report["rows"][1]["figures"]["psnr"] *= factor
    (copy / "out" / "table.json").write_text(json.dumps(report))
    table = importlib.import_module("flowcache.bench.table")
    (copy / "out" / "table.csv").write_text(table.csv_text(report["rows"]))
    (copy / "out" / "table.md").write_text(table.markdown(report))
    assert reproduce.main(["--verify", str(copy / "out"), "--device", "cpu"]) == code
    assert ("figures of every 2nd is" in capfd.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("videos/half/000-3.json", "", "000-3.json: damaged"),
        ("videos/half/000-3.json", "[]", "000-3.json is no receipt of this command"),
        ("metrics/half/000-3.json", '{"key": {', "000-3.json: damaged: remove it"),
        ("metrics/half/000-3.json", '{"key": {}, "clip": 3}', "000-3.json: damaged: remove it"),
    ],
)
def test_a_damaged_file_is_a_contradiction_and_the_next_start_mends_it(
    copy: Path,
    reproduce: ModuleType,
    capfd: pytest.CaptureFixture[str],
    file: str,
    text: str,
    message: str,
):
    (copy / "out" / file).write_text(text)
    code, said = verify(reproduce, copy, capfd)
    assert code == 1
    assert message in said
    if text == "[]":
        return
    assert make_table(copy / "small.yaml", copy / "out") == (0, 0)
    capfd.readouterr()
    assert verify(reproduce, copy, capfd) == (0, "")


@contextlib.contextmanager
def changed_receipt(copy: Path) -> Generator[dict[str, Any], None, None]:
    """Give the content of a receipt to change; the table then names the changed file's hash."""
    receipt = copy / "out" / "videos" / "half" / "000-3.json"
    content = json.loads(receipt.read_text())
    yield content
    receipt.write_text(json.dumps(content))
    report = report_of(copy)
    tasks = importlib.import_module("flowcache.bench.tasks")
    report["receipts"]["half/000-3"]["receipt"] = tasks.sha256_of(receipt)
    (copy / "out" / "table.json").write_text(json.dumps(report))


def test_a_receipt_that_lacks_what_the_table_reads_is_a_contradiction(
    copy: Path, reproduce: ModuleType, capfd: pytest.CaptureFixture[str]
):
    with changed_receipt(copy) as content:
        del content["stats"]
    code, said = verify(reproduce, copy, capfd)
    assert code == 1
    assert "is damaged (KeyError: 'stats')" in said


def test_a_receipt_of_other_settings_than_pinned_is_a_contradiction(
    copy: Path, reproduce: ModuleType, capfd: pytest.CaptureFixture[str]
):
    with changed_receipt(copy) as content:
        content["config"]["guidance"] = 7.0
    code, said = verify(reproduce, copy, capfd)
    assert code == 1
    assert "000-3.json: guidance is 7.0, but pinned to 4.0 by the protocol" in said
    arguments = ["--protocol", str(copy / "small.yaml"), "--out", str(copy / "out")]
    assert reproduce.main(arguments) == 2
    assert "but pinned to 4.0 by the protocol: remove it and start" in capfd.readouterr().err
