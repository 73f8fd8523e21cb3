"""A table from a protocol: its figures, its evidence, and what --verify finds."""

import csv
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from flowcache.metrics import psnr
from flowcache.video import VideoWriter, read_video

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts"
PROTOCOLS = sorted((SCRIPTS / "protocols").glob("*.yaml"))
SIZES = {"skyreels_v2": "df-1.3b-540p", "magi1": "4.5B_distill"}
"""Family -> a released model whose sizes are known without its files."""

PROTOCOL: dict[str, Any] = {
    "title": "A small table",
    "family": "skyreels_v2",
    "model": "demo",
    "codec_quality": 8,
    "reference": "vanilla",
    "published_setting": "another model",
    "seeds": [3],
    "prompts": ["a red circle moving right on a black background", "a blue square moving up"],
    "settings": [
        *("num_frames=9", "base_num_frames=9", "overlap_history=null", "num_steps=6"),
        *("reuse.warmup_steps=1", "causal_block_size=3", "ar_step=1"),
    ],
    "methods": [
        {
            "name": "Vanilla",
            "folder": "vanilla",
            "preset": "vanilla",
            "published": {"pflops": 113, "vbench": 83.84},
        },
        {
            "name": "every 2nd",
            "folder": "half",
            "preset": "stride",
            "settings": ["reuse.every=2"],
            "published": {"pflops": 28, "psnr": 22.95},
        },
        {
            "name": "the same | again",
            "folder": "vanilla",
            "preset": "vanilla",
            "part": "ingredient",
        },
    ],
}


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(SCRIPTS)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(name="sample")
def _sample() -> ModuleType:
    return importlib.import_module("sample")


@pytest.fixture(name="reproduce")
def _reproduce() -> ModuleType:
    return importlib.import_module("reproduce")


def write_protocol(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(PROTOCOL | changes))
    return path


def make(protocol: Path, out: Path) -> tuple[int, int]:
    """Make videos and table; return both exit codes."""
    arguments = ["--protocol", str(protocol), "--out", str(out)]
    made = importlib.import_module("sample").main(arguments)
    return made, importlib.import_module("reproduce").main(arguments)


@pytest.fixture(name="made", scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A result folder, made once and left alone, without weights for LPIPS."""
    folder = tmp_path_factory.mktemp("table")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        assert make(write_protocol(folder / "small.yaml"), folder / "out") == (0, 0)
        yield folder


@pytest.fixture(name="copy")
def _copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage."""
    monkeypatch.setenv("TORCH_HOME", str(made / "torch"))
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "table.json").read_text())


def timeless(folder: Path) -> list[dict[str, Any]]:
    return importlib.import_module("sampling.table").without_times(report_of(folder)["rows"])


def verify(
    reproduce: ModuleType, folder: Path, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    code = reproduce.main(["--verify", str(folder / "out")])
    return code, capfd.readouterr().err


# the table


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
    middle = importlib.import_module("sampling.figures").middle
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
    tasks = importlib.import_module("sampling.tasks")
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
    assert make(copy / "small.yaml", copy / "out") == (0, 0)
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


# --verify


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
    assert make(copy / "small.yaml", copy / "out") == (0, 0)
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
        table = importlib.import_module("sampling.table")
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
    table = importlib.import_module("sampling.table")
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
    table = importlib.import_module("sampling.table")
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
    assert make(copy / "small.yaml", copy / "out") == (0, 0)
    capfd.readouterr()
    assert verify(reproduce, copy, capfd) == (0, "")


def test_a_receipt_that_lacks_what_the_table_reads_is_a_contradiction(
    copy: Path, reproduce: ModuleType, capfd: pytest.CaptureFixture[str]
):
    receipt = copy / "out" / "videos" / "half" / "000-3.json"
    content = json.loads(receipt.read_text())
    del content["stats"]
    receipt.write_text(json.dumps(content))
    report = report_of(copy)
    tasks = importlib.import_module("sampling.tasks")
    report["receipts"]["half/000-3"]["receipt"] = tasks.sha256_of(receipt)
    (copy / "out" / "table.json").write_text(json.dumps(report))
    code, said = verify(reproduce, copy, capfd)
    assert code == 1
    assert "is damaged (KeyError: 'stats')" in said


# what can't be made


def shorten(folder: Path) -> None:
    """Replace a video by a shorter one, with a receipt that fits it."""
    tasks = importlib.import_module("sampling.tasks")
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec_quality": 7}, "codec_quality is 7, but this version writes videos with 8"),
        ({"prompts": []}, "prompts is empty"),
        ({"reference": "x"}, "reference is 'x', but must be one of vanilla, half"),
        ({"famly": "magi1"}, "unknown key 'famly', did you mean family"),
        ({"family": "wan"}, "family is 'wan', but must be one of skyreels_v2, magi1"),
        (
            {"methods": [{"name": "A", "folder": "a/b", "preset": "vanilla"}]},
            "needs name, preset, and a folder of letters",
        ),
        (
            {
                "methods": [
                    {"name": "A", "folder": "vanilla", "preset": "vanilla"},
                    {"name": "B", "folder": "vanilla", "preset": "stride"},
                ]
            },
            "two methods have the folder vanilla, but differ",
        ),
    ],
)
def test_a_protocol_out_of_order_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    read = importlib.import_module("sampling.protocol").read_protocol
    with pytest.raises(ValueError, match=re.escape(message)):
        read(write_protocol(tmp_path / "p.yaml", **changes))


def test_verify_refuses_what_is_no_result(
    tmp_path: Path, reproduce: ModuleType, capfd: pytest.CaptureFixture[str]
):
    assert reproduce.main(["--verify", str(tmp_path)]) == 2
    assert "is not the result folder of a table" in capfd.readouterr().err
    assert reproduce.main([]) == 2
    assert "give --protocol and --out, or --verify" in capfd.readouterr().err


# the shipped protocols and commands


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_every_method_of_a_shipped_protocol_can_be_planned(path: Path):
    protocol = importlib.import_module("sampling.protocol").read_protocol(path)
    run = importlib.import_module(f"{protocol.family}.run")
    assert path.stem.startswith(protocol.family)
    for task in {task.folder: task for task in protocol.tasks(None)}.values():
        settings = [*task.settings, f"prompt={task.prompt}"]
        request = run.Request(task.preset, SIZES[protocol.family], settings)
        assert "PFLOPs if every step is computed" in run.plan_released(request)
    parts = [method.part for method in protocol.methods]
    assert parts.count("paper") == 5
    assert parts.count("ingredient") >= 4


@pytest.mark.parametrize("family", SIZES)
def test_both_protocols_of_a_model_hold_the_same_rows(family: str):
    read = importlib.import_module("sampling.protocol").read_protocol
    demo, paper = (read(SCRIPTS / "protocols" / f"{family}_{k}.yaml") for k in ("demo", "paper"))
    assert demo.methods == paper.methods
    published = {method.name: method.published for method in paper.methods}
    for method in ("TeaCache-slow", "TeaCache-fast", "FlowCache-slow", "FlowCache-fast"):
        figures = published[method]
        # a speed-up is published as the ratio of the latencies beside it
        ratio = published["Vanilla"].latency_seconds / figures.latency_seconds
        assert math.isclose(ratio, figures.speedup, rel_tol=0.02)


@pytest.mark.parametrize("family", SIZES)
def test_the_command_of_a_table_makes_videos_then_the_table(family: str, tmp_path: Path):
    copy, tools = tmp_path / "a copy", tmp_path / "tools"
    tools.mkdir()
    (copy / "sampling").mkdir(parents=True)
    shutil.copy(SCRIPTS / "sampling" / "launch.sh", copy / "sampling")
    shutil.copy(SCRIPTS / f"reproduce_{family}.sh", copy)
    (copy / "setup.sh").write_text(f'export PATH="{tools}:$PATH"\n')
    for tool in ("python", "accelerate"):
        path = tools / tool
        path.write_text(
            f'#!/usr/bin/env bash\nprintf "%s " {tool} "$@" >> "{tmp_path}/said"\n'
            f'echo >> "{tmp_path}/said"\n'
        )
        path.chmod(0o755)
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    variables = {"GPUS": "2", "OUT": str(tmp_path / "out"), "MODEL": "m"}
    command = ["bash", str(copy / f"reproduce_{family}.sh")]
    subprocess.run(command, env=clean | variables, cwd=tmp_path, check=True)
    first, second = (tmp_path / "said").read_text().splitlines()
    assert first.startswith("accelerate launch --multi_gpu --num_processes 2 ")
    protocol = f"{copy}/protocols/{family}_demo.yaml"
    given = f"--protocol {protocol} --out {tmp_path}/out --model m"
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
    lines = [shlex.split(line) for line in shown.splitlines()]
    assert [line[1] for line in lines[:2]] == [
        *("scripts/reproduce_skyreels_v2.sh", "scripts/reproduce_magi1.sh")
    ]
    assert all((REPOSITORY / line[1]).is_file() for line in lines)
    monkeypatch.chdir(copy)
    (copy / "result").mkdir()
    shutil.move(copy / "out", copy / "result" / "table")
    (copy / "scripts" / "protocols").mkdir(parents=True)
    shutil.copy(copy / "small.yaml", copy / "scripts/protocols/skyreels_v2_demo.yaml")
    for line in lines[2:]:
        assert reproduce.main(line[2:]) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_the_table_of_a_demo_is_made_and_verified(
    family: str, tmp_path: Path, reproduce: ModuleType
):
    if (
        family == "magi1"
        and not (REPOSITORY / "FlowCache4MAGI-1/demo/distill_config.json").is_file()
    ):
        pytest.skip("the demo checkpoint is not there")
    command = ["bash", str(SCRIPTS / f"reproduce_{family}.sh")]
    variables = {"OUT": str(tmp_path / "out"), "GPUS": "2", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=os.environ | variables, check=True)
    assert reproduce.main(["--verify", str(tmp_path / "out")]) == 0
    rows = {row["method"]: row["figures"] for row in report_of(tmp_path)["rows"]}
    assert rows["FlowCache-fast"]["pflops"] < rows["Vanilla"]["pflops"]
    assert rows["FlowCache-fast"]["reused_share"] > rows["FlowCache-slow"]["reused_share"] > 0
