"""A table from a protocol: its figures and its evidence."""

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sampling_cases import (
    REPOSITORY,
    SCRIPTS,
    SIZES,
    make_table,
    report_of,
    timeless,
    write_protocol,
)

from flowcache.runtime.metrics import psnr
from flowcache.runtime.video import VideoWriter, read_video


def test_the_table_shows_published_figures_beside_ours(made: Path):
    lines = (made / "out" / "table.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("|")
    ]
    heads = rows[0]
    assert all(len(row) == len(heads) for row in rows)
    by_name = {row[0]: row for row in rows}
    place = heads.index("PFLOPs")
    assert heads[place + 1] == "published"
    assert by_name["Vanilla"][place + 1] == "113"
    assert float(by_name["Vanilla"][place]) < 1
    place = heads.index("PSNR dB")
    assert by_name["every 2nd"][place + 1] == "22.95"
    assert float(by_name["every 2nd"][place]) > 5
    assert by_name["Vanilla"][place] == "-"
    assert by_name["every 2nd"][heads.index("LPIPS")] == "-"
    assert any("LPIPS is empty" in line for line in lines)
    assert r"the same \| again" in by_name
    assert "*One ingredient after the other*" in by_name


def test_the_figures_are_those_of_videos_and_receipts(made: Path):
    videos = made / "out" / "videos"
    rows = {row["method"]: row for row in report_of(made)["rows"]}
    ours, base = rows["every 2nd"]["figures"], rows["Vanilla"]["figures"]
    names = ["000-3", "001-3"]
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
    assert ours["reused_share"] == pytest.approx(2 / 6)
    assert base["reused_share"] == 0
    latency = statistics.fmean(each["total_seconds"] for each in stats)
    assert ours["latency_seconds"] == pytest.approx(latency)
    assert ours["speedup"] == pytest.approx(base["latency_seconds"] / latency)
    assert base["speedup"] == 1
    assert ours["kv_cache_bytes"] > 0
    assert base["kv_cache_bytes"] == 0
    assert 0 < ours["first_frames_seconds"] <= latency
    assert ours["peak_memory_bytes"] is None or torch.cuda.is_available()


def test_times_are_medians_so_that_a_slow_first_video_does_not_count():
    middle = importlib.import_module("flowcache.bench.figures").middle
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
    tasks = importlib.import_module("flowcache.bench.tasks")
    assert report["protocol_sha256"] == tasks.sha256_of(made / "small.yaml")
    assert report["environment"]["packages"]["torch"] == torch.__version__
    assert "commit" in report["environment"]
    assert sum(each["num_videos"] for each in report["made_by"]) == 4  # commits may differ
    assert set(report["receipts"]) == {
        *("vanilla/000-3", "vanilla/001-3", "half/000-3", "half/001-3")
    }
    video = made / "out" / "videos" / "half" / "001-3.mp4"
    assert report["receipts"]["half/001-3"]["video"] == tasks.sha256_of(video)


def test_a_second_run_gives_the_same_figures_bitwise(made: Path, copy: Path):
    shutil.rmtree(copy / "out")
    assert make_table(copy / "small.yaml", copy / "out") == (0, 0)
    assert timeless(copy) == timeless(made)
    for path in (made / "out" / "videos").rglob("*.mp4"):
        again = copy / path.relative_to(made)
        assert again.read_bytes() == path.read_bytes()


def test_a_score_of_vbench_is_read_into_the_table(copy: Path, reproduce: ModuleType):
    path = copy / "out" / "videos" / "half" / "vbench.json"
    path.write_text(json.dumps({"mean_percent": 71.25}))
    arguments = ["--protocol", str(copy / "small.yaml"), "--out", str(copy / "out")]
    assert reproduce.main(arguments) == 0
    assert {row["method"]: row["figures"]["vbench"] for row in report_of(copy)["rows"]} == {
        "Vanilla": None,
        "every 2nd": 71.25,
        "the same | again": None,
    }


def test_a_table_of_the_first_prompts_says_so_and_grows_to_the_whole_one(
    made: Path, copy: Path, sample: ModuleType, reproduce: ModuleType
):
    out = copy / "out"
    shutil.rmtree(out)
    given = ["--protocol", str(copy / "small.yaml"), "--out", str(out)]
    for script in (sample, reproduce):
        assert script.main([*given, "--num-prompts", "1"]) == 0
    assert {row["num_videos"] for row in report_of(copy)["rows"]} == {1}
    assert "- made of the first 1 of 2 prompts only" in (out / "table.md").read_text()
    assert reproduce.main(["--verify", str(out)]) == 0
    assert make_table(copy / "small.yaml", out) == (0, 0)
    assert timeless(copy) == timeless(made)


def shorten(folder: Path) -> None:
    """Replace a video by a shorter one, with a receipt that fits it."""
    tasks = importlib.import_module("flowcache.bench.tasks")
    video = folder / "out" / "videos" / "half" / "000-3.mp4"
    frames, _ = read_video(video)
    video.unlink()
    with VideoWriter(video, fps=24, size=(64, 64)) as writer:
        writer.append(frames[:5])
    receipt = video.with_suffix(".json")
    content = json.loads(receipt.read_text()) | {"sha256": tasks.sha256_of(video)}
    receipt.write_text(json.dumps(content))


def test_videos_of_unequal_length_are_an_error_that_names_both(
    copy: Path, reproduce: ModuleType, capfd: pytest.CaptureFixture[str]
):
    shorten(copy)
    arguments = ["--protocol", str(copy / "small.yaml"), "--out", str(copy / "out")]
    assert reproduce.main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "000-3.mp4 has 5 frames and" in lines[0]
    assert "compare clips of one length" in lines[0]


def test_a_missing_video_is_an_error_that_says_how_to_go_on(
    copy: Path, reproduce: ModuleType, capfd: pytest.CaptureFixture[str]
):
    (copy / "out" / "videos" / "half" / "000-3.json").unlink()
    arguments = ["--protocol", str(copy / "small.yaml"), "--out", str(copy / "out")]
    assert reproduce.main(arguments) == 2
    said = capfd.readouterr().err
    assert "1 of 4 videos are not complete (half/000-3: missing)" in said
    assert "start the command again" in said


def test_results_of_another_protocol_are_kept(
    copy: Path, sample: ModuleType, capfd: pytest.CaptureFixture[str]
):
    other = write_protocol(copy / "other.yaml", seeds=[4])
    assert sample.main(["--protocol", str(other), "--out", str(copy / "out")]) == 2
    assert "holds results of another protocol" in capfd.readouterr().err


def test_verify_refuses_what_is_no_result(
    tmp_path: Path, reproduce: ModuleType, capfd: pytest.CaptureFixture[str]
):
    assert reproduce.main(["--verify", str(tmp_path)]) == 2
    assert "is not the result folder of a table" in capfd.readouterr().err
    assert reproduce.main([]) == 2
    assert "give --protocol and --out, or --verify" in capfd.readouterr().err


@pytest.mark.parametrize("family", SIZES)
def test_the_command_of_a_table_makes_videos_then_the_table(family: str, tmp_path: Path):
    copy, tools = tmp_path / "a copy", tmp_path / "tools"
    tools.mkdir()
    (copy / "sampling").mkdir(parents=True)
    shutil.copy(SCRIPTS / "sampling" / "launch.sh", copy / "sampling")
    shutil.copy(SCRIPTS / f"reproduce_{family}.sh", copy)
    (copy / "setup.sh").write_text(f'export PATH="{tools}:$PATH"\n')
    path = tools / "python"
    path.write_text(
        f'#!/usr/bin/env bash\nprintf "%s " python "$@" >> "{tmp_path}/said"\n'
        f'echo >> "{tmp_path}/said"\n'
    )
    path.chmod(0o755)
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    variables = {"GPUS": "2", "OUT": str(tmp_path / "out"), "MODEL": "m", "NUM_PROMPTS": "2"}
    command = ["bash", str(copy / f"reproduce_{family}.sh")]
    subprocess.run(command, env=clean | variables, cwd=tmp_path, check=True)
    first, second = (tmp_path / "said").read_text().splitlines()
    assert first.startswith("python -m flowcache.launch 2 ")
    protocol = f"{copy}/protocols/{family}_demo.yaml"
    given = f"--protocol {protocol} --out {tmp_path}/out --model m --num-prompts 2"
    assert first.rstrip().endswith(f"sample.py {given}")
    assert second.rstrip() == f"python {copy}/reproduce.py {given} --device auto"


def test_every_example_runs(
    copy: Path,
    reproduce: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit):
        reproduce.main(["--help"])
    shown = capfd.readouterr().out.partition("examples:\n")[2].partition("\n\n")[0]
    lines = [
        [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
        for line in shown.splitlines()
    ]
    scripts = [line for line in lines if line[0] == "bash"]
    assert {line[1] for line in scripts} == {
        *("scripts/reproduce_skyreels_v2.sh", "scripts/reproduce_magi1.sh")
    }
    assert all((REPOSITORY / line[1]).is_file() for line in lines)
    monkeypatch.chdir(copy)
    (copy / "result").mkdir()
    shutil.move(copy / "out", copy / "result" / "table")
    (copy / "scripts" / "protocols").mkdir(parents=True)
    shutil.copy(copy / "small.yaml", copy / "scripts/protocols/skyreels_v2_demo.yaml")
    for line in lines[len(scripts) :]:
        assert reproduce.main(line[2:]) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_the_table_of_a_demo_is_made_and_verified(
    family: str, tmp_path: Path, reproduce: ModuleType
):
    """Of one prompt: all of them take four times as long, and nothing else runs."""
    if (
        family == "magi1"
        and not (REPOSITORY / "FlowCache4MAGI-1/demo/distill_config.json").is_file()
    ):
        pytest.skip("the demo checkpoint is not there")
    command = ["bash", str(SCRIPTS / f"reproduce_{family}.sh")]
    variables = {"OUT": str(tmp_path / "out"), "GPUS": "2", "NUM_PROMPTS": "1"}
    subprocess.run(command, env=os.environ | variables | {"OMP_NUM_THREADS": "1"}, check=True)
    assert reproduce.main(["--verify", str(tmp_path / "out")]) == 0
    rows = {row["method"]: row["figures"] for row in report_of(tmp_path)["rows"]}
    assert rows["FlowCache-fast"]["pflops"] < rows["Vanilla"]["pflops"]
    assert rows["FlowCache-fast"]["reused_share"] > rows["FlowCache-slow"]["reused_share"] > 0
