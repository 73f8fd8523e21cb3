"""A table from a protocol: its figures, its evidence, and what --verify finds."""

import csv
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reproduce
import sample
import torch
from sampling_cases import FOLDERS, REPOSITORY, SCRIPTS, write_protocol

from flowcache.bench.table import csv_text, gaps, markdown, middle, without_times
from flowcache.bench.tasks import sha256_of
from flowcache.runtime.metrics import psnr
from flowcache.runtime.video import VideoWriter, read_video

HALF = "videos/half/000-3"


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "table.json").read_text())


def timeless(folder: Path) -> list[dict[str, Any]]:
    return without_times(report_of(folder)["rows"])


def arguments(folder: Path) -> list[str]:
    return ["--protocol", str(folder / "small.yaml"), "--out", str(folder / "out")]


def make_again(folder: Path) -> tuple[int, int]:
    """Make videos and table; return both exit codes."""
    return sample.main(arguments(folder)), reproduce.main(arguments(folder))


Verify = Callable[..., tuple[int, str]]


@pytest.fixture(name="verify")
def _verify(capfd: pytest.CaptureFixture[str]) -> Verify:
    """Return what gives the exit code of --verify and what it says."""

    def verify(folder: Path, *more: str) -> tuple[int, str]:
        capfd.readouterr()
        code = reproduce.main(["--verify", str(folder / "out"), *more])
        return code, capfd.readouterr().err

    return verify


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write all three forms of a table alike, as one who cheats would."""
    (folder / "out" / "table.json").write_text(json.dumps(report))
    if not gaps(report):
        (folder / "out" / "table.csv").write_text(csv_text(report["rows"]))
        (folder / "out" / "table.md").write_text(markdown(report))


# What a table holds


def test_the_table_shows_published_figures_next_to_ours(made: Path):
    text = (made / "out" / "table.md").read_text()
    cost, quality = (part_of(text, heading) for heading in ("Cost", "Quality"))
    names = [row["method"] for row in cost]
    assert names == [row["method"] for row in quality]
    assert {r"the same \| again", "*One ingredient after the other*"} <= set(names)
    vanilla, half = names.index("Vanilla"), names.index("every 2nd")
    assert (cost[vanilla]["FLOPs, published"], quality[half]["PSNR dB, published"]) == (
        "113 PFLOP",
        "22.95",
    )
    assert re.fullmatch(r"[\d.]+ [MG]FLOP", cost[vanilla]["FLOPs"]), "in the unit of its size"
    assert float(quality[half]["PSNR dB"]) > 5
    assert quality[vanilla]["PSNR dB"] == quality[half]["LPIPS"] == "-"
    assert "LPIPS is empty" in text


def part_of(text: str, heading: str) -> list[dict[str, str]]:
    """Return the rows of the table below a heading; no more than people can read."""
    lines = text.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    head, _, *rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("|")
    ]
    assert len(head) <= 10
    names = [
        f"{before}, {name}" if name == "published" else name
        for before, name in zip(["", *head], head, strict=False)
    ]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_the_figures_are_those_of_videos_and_receipts(made: Path):
    videos, names = made / "out" / "videos", ["000-3", "001-3"]
    rows = {row["method"]: row["figures"] for row in report_of(made)["rows"]}
    ours, base = rows["every 2nd"], rows["Vanilla"]
    clips = [
        [torch.from_numpy(read_video(videos / folder / f"{name}.mp4")[0]) for name in names]
        for folder in ("half", "vanilla")
    ]
    expected = statistics.fmean(psnr(*pair) for pair in zip(*clips, strict=True))
    assert ours["psnr"] == pytest.approx(expected, rel=1e-12)
    receipts = [json.loads((videos / "half" / f"{name}.json").read_text()) for name in names]
    stats = [receipt["stats"] for receipt in receipts]
    flops = statistics.fmean(each["flops"]["computed"] for each in stats)
    assert ours["pflops"] == pytest.approx(flops / 1e15)
    # own steps 0, 2, 4 and the last of 6 are computed
    assert (ours["reused_share"], base["reused_share"]) == (pytest.approx(2 / 6), 0)
    latency = statistics.median(each["total_seconds"] for each in stats)
    assert ours["latency_seconds"] == pytest.approx(latency)
    assert ours["speedup"] == pytest.approx(base["latency_seconds"] / latency)
    assert base["speedup"] == 1
    assert ours["kv_cache_bytes"] > base["kv_cache_bytes"] == 0
    assert 0 < ours["first_frames_seconds"] <= latency
    assert ours["peak_memory_bytes"] is None or torch.cuda.is_available()


def test_times_are_medians_so_that_a_slow_first_video_does_not_count():
    assert middle("latency_seconds", [9.0, 2.0, 3.0]) == 3.0
    assert middle("pflops", [9.0, 2.0, 4.0]) == 5.0
    assert middle("latency_seconds", [9.0, None]) is None


def test_the_csv_holds_the_json_s_numbers_in_full(made: Path):
    with (made / "out" / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for row, stored in zip(rows, report_of(made)["rows"], strict=True):
        assert row["method"] == stored["method"]
        for key, value in stored["figures"].items():
            assert row[key] == ("" if value is None else str(value))
        assert row["published_pflops"] == str(stored["published"]["pflops"] or "")


def test_the_evidence_names_protocol_commit_versions_and_every_file(made: Path):
    report = report_of(made)
    assert report["protocol_sha256"] == sha256_of(made / "small.yaml")
    assert report["environment"]["packages"]["torch"] == torch.__version__
    assert "commit" in report["environment"]
    assert sum(each["num_videos"] for each in report["made_by"]) == 4  # commits may differ
    labels = {f"{folder}/{name}" for folder in ("vanilla", "half") for name in ("000-3", "001-3")}
    assert report["receipts"].keys() == labels
    for label, receipt in report["receipts"].items():
        files = [made / "out" / "videos" / f"{label}.{suffix}" for suffix in ("mp4", "json")]
        assert [receipt["video"], receipt["receipt"]] == [sha256_of(file) for file in files]


def test_a_second_run_gives_the_same_files_and_one_of_fewer_prompts_says_so(
    made: Path, copy: Path, verify: Verify
):
    out = copy / "out"
    shutil.rmtree(out)
    for script in (sample, reproduce):
        assert script.main([*arguments(copy), "--num-prompts", "1"]) == 0
    assert {row["num_videos"] for row in report_of(copy)["rows"]} == {1}
    assert "- made of the first 1 of 2 prompts only" in (out / "table.md").read_text()
    assert verify(copy) == (0, "")
    assert make_again(copy) == (0, 0)
    assert timeless(copy) == timeless(made)
    for path in (made / "out" / "videos").rglob("*.mp4"):
        assert (copy / path.relative_to(made)).read_bytes() == path.read_bytes()


# What makes no table


def delete_receipt(folder: Path) -> None:
    (folder / "out" / f"{HALF}.json").unlink()


def shorten(folder: Path) -> None:
    """Replace a video by a shorter one, with a receipt that fits it."""
    video = folder / "out" / f"{HALF}.mp4"
    frames, _ = read_video(video)
    video.unlink()
    with VideoWriter(video, fps=24, size=(64, 64)) as writer:
        writer.append(frames[:5])
    content = json.loads(video.with_suffix(".json").read_text()) | {"sha256": sha256_of(video)}
    video.with_suffix(".json").write_text(json.dumps(content))


def spoil_score(folder: Path) -> None:
    (folder / "out" / "videos" / "half" / "vbench.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (delete_receipt, r"1 of 4 videos are not complete \(half/000-3: missing\): start the comm"),
        (shorten, "000-3.mp4 has 5 frames and .* compare clips of one length"),
        (spoil_score, r"vbench\.json: holds no mean_percent: remove it, or run"),
        (
            lambda folder: write_protocol(folder / "small.yaml", seeds=[4]),
            "holds results of another protocol than",
        ),
    ],
)
def test_videos_that_make_no_table_are_refused_in_one_line(
    copy: Path, damage: Callable[[Path], object], said: str, capfd: pytest.CaptureFixture[str]
):
    damage(copy)
    assert reproduce.main(arguments(copy)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(said, line)


def test_what_is_no_result_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert reproduce.main(["--verify", str(tmp_path)]) == 2
    assert "is not the result folder of a table" in capfd.readouterr().err
    assert reproduce.main([]) == 2
    assert "give --protocol and --out, or --verify" in capfd.readouterr().err


# Verifying


def test_a_corrupt_video_is_found_and_made_again_and_no_other(
    made: Path, copy: Path, verify: Verify
):
    assert verify(copy) == (0, "")
    video = copy / "out" / f"{HALF}.mp4"
    content = bytearray(video.read_bytes())
    content[len(content) // 2] ^= 255
    video.write_bytes(content)
    code, said = verify(copy)
    assert code == 1
    assert "half/000-3: " in said
    assert "not the video of its receipt" in said
    others = {path: path.stat().st_mtime_ns for path in (copy / "out").rglob("*.mp4")}
    assert make_again(copy) == (0, 0)
    assert [path for path, then in others.items() if path.stat().st_mtime_ns != then] == [video]
    assert timeless(copy) == timeless(made)
    assert verify(copy) == (0, "")


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("table.md", "113", "114", "table.md: not what table.json says"),
        ("table.csv", "Vanilla", "vanilla", "table.csv: not what table.json says"),
        ("protocol.yaml", "A small", "A smaller", "not the protocol of the table"),
        (f"{HALF}.json", '"total_seconds": ', '"total_seconds": 1', "not the receipt that the"),
        (f"{HALF}.json", None, "", "000-3.json: damaged"),
        (f"{HALF}.json", None, "[]", "000-3.json is no receipt of this command"),
        ("metrics/half/000-3.json", None, '{"key": {', "000-3.json: damaged: remove it"),
        ("metrics/half/000-3.json", None, '{"key": {}, "clip": 3}', "json: damaged: remove it"),
    ],
)
def test_a_changed_or_damaged_file_is_a_contradiction(
    copy: Path, verify: Verify, file: str, old: str | None, new: str, said: str
):
    path = copy / "out" / file
    text = path.read_text()
    assert old is None or old in text
    path.write_text(new if old is None else text.replace(old, new))
    code, found = verify(copy)
    assert code == 1
    assert said in found
    if "damaged" in said:  # the next start makes it again
        assert make_again(copy) == (0, 0)
        assert verify(copy) == (0, "")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["rows"], None, "table.json: rows is missing"),
        (["metrics"], None, "table.json: metrics is missing"),
        (["metrics"], ["beauty"], "table.json: metrics holds 'beauty'"),
        (["notes"], [3], "table.json: notes holds 3"),
        (["lpips_sha256"], None, "table.json: lpips_sha256 is missing"),
        (["rows", 0], 7, "table.json: rows.0 is 7"),
        (["rows", 0, "figures"], None, "table.json: rows.0.figures is missing"),
        (["rows", 0, "num_videos"], 3, "num_videos of Vanilla is 3, computed anew 2"),
        (["rows", 1, "figures", "psnr"], None, "rows.1.figures.psnr is missing"),
        (["rows", 1, "figures", "psnr"], "much", "rows.1.figures.psnr is 'much'"),
        (["rows", 1, "half_widths"], {}, "half_widths of every 2nd is {}, computed anew {"),
        (["rows", 1, "half_widths", "psnr"], "x", "rows.1.half_widths.psnr is 'x'"),
        (["rows", 2, "published", "pflops"], None, "rows.2.published.pflops is missing"),
        (["rows", 2], None, "its rows are not the protocol's methods"),
        (["receipts", "half/000-3"], None, "000-3.json: not the receipt that the table was made"),
        (["receipts", "half/000-3"], 1, "table.json: receipts.half/000-3 is 1"),
        (["receipts", "other"], {}, "other is no video of the protocol"),
        (["model"], "other", "is of another run (model differ)"),
        (["num_prompts"], 9, "--num-prompts must be in 1..2"),
        (["environment", "commit"], None, "table.json: environment.commit is missing"),
    ],
)
def test_an_edited_table_is_a_contradiction(
    copy: Path, verify: Verify, path: list[Any], value: Any, said: str
):
    report = report_of(copy)
    section = report
    for key in path[:-1]:
        section = section[key]
    if value is None:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    write_report(copy, report)
    code, found = verify(copy)
    assert code == 1
    assert said in found
    assert "contradictions in" in found.splitlines()[-1]


@pytest.mark.parametrize(
    ("machine", "key", "change", "code"),
    [
        ({}, "psnr", 0.001, 1),
        ({"device": "a GPU"}, "psnr", 0.009, 0),
        ({"device": "a GPU"}, "psnr", 0.011, 1),
        ({"cpu": "another CPU, AVX2"}, "ssim", 0.00009, 0),
        ({"cpu": "another CPU, AVX2"}, "ssim", 0.00011, 1),
        ({"packages": {"torch": "1.0"}}, "ssim", 0.00009, 0),
        ({"cpu": "another CPU, AVX2"}, "pflops", 1e-12, 1),
    ],
)
def test_figures_are_exact_on_a_machine_of_one_kind_and_rounded_on_another(
    copy: Path,
    verify: Verify,
    machine: dict[str, Any],
    key: str,
    change: float,
    code: int,
):
    report = report_of(copy)
    report["environment"] |= machine
    report["rows"][1]["figures"][key] += change
    write_report(copy, report)
    found, said = verify(copy, "--device", "cpu")
    assert found == code
    assert ("figures of every 2nd is" in said) == bool(code)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({}, "to the last digit"),
        ({"cpu": "another CPU"}, "PSNR within 0.01 dB, SSIM within 0.0001"),
    ],
)
def test_a_verified_table_says_how_exactly(
    copy: Path, machine: dict[str, Any], words: str, capfd: pytest.CaptureFixture[str]
):
    report = report_of(copy)
    report["environment"] |= machine
    write_report(copy, report)
    assert reproduce.main(["--verify", str(copy / "out"), "--device", "cpu"]) == 0
    assert words in capfd.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.pop("stats"), "is damaged (KeyError: 'stats')"),
        (
            lambda content: content["config"].update(guidance=7.0),
            "000-3.json: guidance is 7.0, but pinned to 4.0 by the protocol",
        ),
    ],
)
def test_a_receipt_that_fits_the_table_but_not_the_protocol_is_a_contradiction(
    copy: Path,
    verify: Verify,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    said: str,
):
    receipt, report = copy / "out" / f"{HALF}.json", report_of(copy)
    content = json.loads(receipt.read_text())
    change(content)
    receipt.write_text(json.dumps(content))
    report["receipts"]["half/000-3"]["receipt"] = sha256_of(receipt)
    write_report(copy, report)
    code, found = verify(copy)
    assert code == 1
    assert said in found
    assert reproduce.main(arguments(copy)) == 2
    assert f"{said}: remove it and" in capfd.readouterr().err


# The commands


@pytest.mark.parametrize("family", FOLDERS)
def test_the_command_of_a_table_makes_videos_then_the_table(family: str, tmp_path: Path):
    copy, tools, said = tmp_path / "a copy", tmp_path / "tools", tmp_path / "said"
    tools.mkdir()
    (copy / "sampling").mkdir(parents=True)
    shutil.copy(SCRIPTS / "sampling" / "launch.sh", copy / "sampling")
    shutil.copy(SCRIPTS / f"reproduce_{family}.sh", copy)
    (copy / "setup.sh").write_text(f'export PATH="{tools}:$PATH"\n')
    path = tools / "python"
    path.write_text(f'#!/usr/bin/env bash\necho python "$@" >> "{said}"\n')
    path.chmod(0o755)
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    variables = {"GPUS": "2", "OUT": str(tmp_path / "out"), "MODEL": "m", "NUM_PROMPTS": "2"}
    command = ["bash", str(copy / f"reproduce_{family}.sh")]
    subprocess.run(command, env=clean | variables, cwd=tmp_path, check=True)
    first, second = said.read_text().splitlines()
    assert first.startswith("python -m flowcache.launch 2 ")
    protocol = f"{copy}/protocols/{family}_demo.yaml"
    given = f"--protocol {protocol} --out {tmp_path}/out --model m --num-prompts 2"
    assert first.endswith(f"sample.py {given}")
    assert second == f"python {copy}/reproduce.py {given} --device auto"


def test_every_example_runs(copy: Path, monkeypatch: pytest.MonkeyPatch):
    shown = reproduce.EXAMPLES.partition("examples:\n")[2].partition("\n\n")[0]
    lines = [
        [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
        for line in shown.splitlines()
    ]
    assert all((REPOSITORY / line[1]).is_file() for line in lines)
    monkeypatch.chdir(copy)
    (copy / "result").mkdir()
    shutil.move(copy / "out", copy / "result" / "table")
    (copy / "scripts" / "protocols").mkdir(parents=True)
    shutil.copy(copy / "small.yaml", copy / "scripts/protocols/skyreels_v2_demo.yaml")
    own = [line for line in lines if line[0] == "python"]
    assert own
    for line in own:
        assert reproduce.main(line[2:]) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize("family", FOLDERS)
def test_the_table_of_a_demo_is_made_and_verified(family: str, tmp_path: Path):
    """Of one prompt: all of them take four times as long, and nothing else runs."""
    command = ["bash", str(SCRIPTS / f"reproduce_{family}.sh")]
    variables = {"OUT": str(tmp_path / "out"), "GPUS": "2", "NUM_PROMPTS": "1"}
    subprocess.run(command, env=os.environ | variables | {"OMP_NUM_THREADS": "1"}, check=True)
    assert reproduce.main(["--verify", str(tmp_path / "out")]) == 0
    rows = {row["method"]: row["figures"] for row in report_of(tmp_path)["rows"]}
    assert rows["FlowCache-fast"]["pflops"] < rows["Vanilla"]["pflops"]
    assert rows["FlowCache-fast"]["reused_share"] > rows["FlowCache-slow"]["reused_share"] > 0
