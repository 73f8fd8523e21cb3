"""Many videos by many processes: shared by a folder, resumable, never half a result."""

import importlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flowcache.video import VideoWriter, probe

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts"
FOLDERS = {
    "skyreels_v2": REPOSITORY / "FlowCache4SkyReels-V2",
    "magi1": REPOSITORY / "FlowCache4MAGI-1",
}
LAUNCHERS = [
    (family, f"{method}_{benchmark}")
    for family in FOLDERS
    for method in ("vanilla", "teacache", "flowcache")
    for benchmark in ("vbench", "physicsiq")
]
SHORT = (
    *("num_frames=9", "base_num_frames=9", "overlap_history=null", "num_steps=2"),
    *("reuse.warmup_steps=1", "causal_block_size=3"),
)
"""Settings of a video that the demo makes in a second."""
PROMPTS = ("a red circle moving right on a black background", "a blue square moving up")

# Makes small files slowly, with nothing but the sampler itself: no model, no PyTorch.
DRIVER = """
import resource, sys, time
from pathlib import Path
sys.path.insert(0, {scripts!r})
from flowcache.errors import UserError
from sampling.tasks import Task
from sampling.worker import Worker

def render(task, folder):
    path = folder / f"{{task.name}}.mp4"
    with path.open("wb", buffering=0) as stream:
        for part in range(10):
            stream.write(f"{{task.name}} {{part}} ".encode() * {repeat})
            time.sleep({pause})
    return {{"video": path.name, "maker": str(time.time_ns())}}

limit = {limit}
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
family = ("skyreels_v2", "demo", "vanilla", "-")
tasks = [Task(f"{{n:02d}}", *family, n, folder="a") for n in range(12)]
worker = Worker(tasks, Path(sys.argv[1]), render, poll_seconds=0.01)
try:
    failures = worker.run(first=int(sys.argv[2]))
except UserError as error:
    sys.stderr.write(f"error: {{error}}\\n")
    sys.exit(2)
sys.exit(1 if failures else 0)
"""


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Find the scripts' own packages, and leave the signals as they were."""
    monkeypatch.syspath_prepend(SCRIPTS)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(name="sample")
def _sample() -> ModuleType:
    return importlib.import_module("sample")


def drive(out: Path, *, first: int = 0, pause: float = 0.0, repeat: int = 20, limit: int = 0):
    """Start a process that makes twelve files."""
    code = DRIVER.format(scripts=str(SCRIPTS), pause=pause, repeat=repeat, limit=limit)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out), str(first)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "common")},
    )


def videos(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.mp4"))}


def receipts(out: Path) -> dict[str, Any]:
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted(out.rglob("*.json"))
        if not path.name.endswith(".error.json")
    }


def make_task(name: str, **changes: Any) -> Any:
    tasks = importlib.import_module("sampling.tasks")
    return tasks.Task(name, "skyreels_v2", "demo", "vanilla", "-", 0, **changes)


def make_file(task: Any, folder: Path) -> dict[str, Any]:
    (folder / f"{task.name}.mp4").write_bytes(task.name.encode())
    return {"video": f"{task.name}.mp4"}


def make_worker(tasks: list[Any], out: Path, render: Any = make_file, **changes: Any) -> Any:
    worker = importlib.import_module("sampling.worker")
    return worker.Worker(tasks, out, render, poll_seconds=0.01, **changes)


# sharing, resuming


def test_two_processes_share_the_work_and_make_the_same_files(tmp_path: Path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert drive(alone).wait() == 0
    processes = [drive(together, first=first, pause=0.002) for first in (0, 6)]
    assert [process.wait() for process in processes] == [0, 0]
    assert videos(alone) == videos(together)
    assert len(videos(alone)) == 12
    assert not (together / ".claims").exists()


def test_after_kills_at_random_moments_the_set_is_that_of_an_undisturbed_run(tmp_path: Path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert drive(alone).wait() == 0
    dice = random.Random(7)
    interrupted = 0
    for _ in range(12):
        processes = [drive(killed, first=first, pause=0.004) for first in (0, 5)]
        time.sleep(dice.uniform(0.05, 0.5))
        for process in processes:
            process.kill()
        interrupted += sum(process.wait() == -signal.SIGKILL for process in processes)
        for name, receipt in receipts(killed).items():
            made = killed / "a" / f"{name}.mp4"
            assert made.read_bytes() == (alone / "a" / f"{name}.mp4").read_bytes()
            assert receipt["num_bytes"] == made.stat().st_size
    assert interrupted > 0
    assert drive(killed).wait() == 0
    assert videos(killed) == videos(alone)
    leftovers = [
        path for path in killed.rglob("*") if ".claims" in path.parts or path.name[0] == "."
    ]
    assert leftovers == []


def test_a_second_start_makes_nothing_again(tmp_path: Path):
    assert drive(tmp_path).wait() == 0
    before = receipts(tmp_path)
    assert drive(tmp_path).wait() == 0
    assert receipts(tmp_path) == before


def test_a_termination_gives_the_claim_back(sample: ModuleType):
    with pytest.raises(KeyboardInterrupt):
        sample.stop(signal.SIGTERM, None)


def test_an_interruption_leaves_no_claim_and_no_half_file(tmp_path: Path):
    def interrupt(task: Any, folder: Path) -> dict[str, Any]:
        (folder / f"{task.name}.mp4").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_worker([make_task("a")], tmp_path, interrupt).run()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert make_worker([make_task("a")], tmp_path).run() == {}


def test_a_damaged_video_is_made_again_and_no_other(tmp_path: Path):
    tasks = [make_task("a"), make_task("b")]
    make_worker(tasks, tmp_path).run()
    (tmp_path / "b.mp4").write_bytes(b"x")
    made: list[str] = []

    def render(task: Any, folder: Path) -> dict[str, Any]:
        made.append(task.name)
        return make_file(task, folder)

    assert make_worker(tasks, tmp_path, render).run() == {}
    assert made == ["b"]
    assert (tmp_path / "b.mp4").read_bytes() == b"b"


def test_a_video_without_its_receipt_does_not_count(tmp_path: Path):
    make_worker([make_task("a")], tmp_path).run()
    (tmp_path / "a.json").unlink()
    (tmp_path / "a.mp4").write_bytes(b"half")
    make_worker([make_task("a")], tmp_path).run()
    assert (tmp_path / "a.mp4").read_bytes() == b"a"


def test_results_of_other_settings_are_kept_and_refused(tmp_path: Path):
    make_worker([make_task("a")], tmp_path).run()
    with pytest.raises(ValueError, match=r"a\.json is of another run \(seed differ\)"):
        make_worker([make_task("a", settings=())], tmp_path)._is_over(
            importlib.import_module("dataclasses").replace(make_task("a"), seed=5), {}
        )
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match=r"b\.json is no receipt .* choose another output folder"):
        make_worker([make_task("b")], tmp_path).run()


@pytest.mark.parametrize("text", ["", '{"task": {', "\x00\x00"])
def test_a_receipt_that_a_power_cut_left_does_not_count(tmp_path: Path, text: str):
    make_worker([make_task("a")], tmp_path).run()
    whole = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text)
    assert make_worker([make_task("a")], tmp_path).run() == {}
    assert (tmp_path / "a.json").read_text() == whole


def test_results_of_an_edited_preset_or_another_checkpoint_are_kept_and_refused(tmp_path: Path):
    task = make_task("a")
    origin = {"resolved_settings": "1", "checkpoint": "2"}
    make_worker([task], tmp_path, origins={task.kind: origin}).run()
    make_worker([task], tmp_path, origins={task.kind: origin}).run()
    for changes, names in (
        ({"resolved_settings": "3"}, "resolved_settings"),
        ({"resolved_settings": "3", "checkpoint": "4"}, "resolved_settings, checkpoint"),
    ):
        worker = make_worker([task], tmp_path, origins={task.kind: origin | changes})
        with pytest.raises(ValueError, match=rf"is of another run \({names} differ\) and is kept"):
            worker.run()
    assert videos(tmp_path) == {"a.mp4": b"a"}


# claims


def test_of_many_threads_exactly_one_gets_a_claim(tmp_path: Path):
    claims = importlib.import_module("sampling.claims")
    for round_ in range(20):
        found: list[Any] = []
        barrier = threading.Barrier(8)

        def take(label: str = f"task {round_}", barrier: Any = barrier, found: Any = found) -> None:
            barrier.wait()
            found.append(claims.Claims(tmp_path).take(label))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(claim is not None for claim in found) == 1


def test_a_claim_whose_process_is_gone_is_taken_over_at_once(tmp_path: Path):
    claims = importlib.import_module("sampling.claims")
    first = claims.Claims(tmp_path).take("a")
    ended = subprocess.Popen(["true"])
    ended.wait()
    owner = json.loads(first.path.read_text())
    first.path.write_text(json.dumps({**owner, "pid": ended.pid}))
    second = claims.Claims(tmp_path).take("a")
    assert second.generation == 1
    assert second.is_valid()
    assert not first.is_valid()


def test_a_claim_of_another_machine_is_stale_only_without_a_heartbeat(tmp_path: Path):
    claims = importlib.import_module("sampling.claims")
    first = claims.Claims(tmp_path).take("a")
    owner = json.loads(first.path.read_text())
    first.path.write_text(json.dumps({**owner, "host": "elsewhere", "pid": 1}))
    waiting = claims.Claims(tmp_path, stale_seconds=0.2)
    assert waiting.take("a") is None
    time.sleep(0.15)
    os.utime(first.path)
    assert waiting.take("a") is None
    time.sleep(0.15)
    assert waiting.take("a") is None  # the heartbeat began the count anew
    time.sleep(0.15)
    assert waiting.take("a").generation == 1


def test_who_lost_its_claim_drops_what_it_made(tmp_path: Path):
    def slow(task: Any, folder: Path) -> dict[str, Any]:
        (folder.parent / "7").write_text("{}")  # somebody took over
        return make_file(task, folder)

    worker = make_worker([make_task("a")], tmp_path, slow)
    claim = worker.claims.take("a")
    with claim.held():
        worker._make(make_task("a"), claim)
    assert not (tmp_path / "a.mp4").exists()


def test_who_lost_its_claim_and_its_folder_goes_on_without_a_failure(tmp_path: Path):
    first, second = (make_worker([make_task("a")], tmp_path) for _ in range(2))
    later = []

    def suspended(task: Any, folder: Path) -> dict[str, Any]:
        owner = json.loads((folder.parent / "0").read_text())
        (folder.parent / "0").write_text(json.dumps({**owner, "host": "elsewhere"}))
        second.claims.stale_seconds = -1.0  # as if the process had been suspended for long
        assert second.run() == {}
        later.append(second.claims.take("a"))  # a claim of the same generation
        return make_file(task, folder)  # the folder is gone

    first.render = suspended
    assert first.run() == {}
    assert videos(tmp_path) == {"a.mp4": b"a"}
    assert not (tmp_path / "a.error.json").exists()
    assert later[0].generation == 0
    assert later[0].is_valid()  # the claim of somebody else was left alone


# failures


def test_a_failing_video_is_recorded_and_the_others_go_on(tmp_path: Path):
    def render(task: Any, folder: Path) -> dict[str, Any]:
        if task.name == "b":
            raise RuntimeError("out of\nmemory")
        return make_file(task, folder)

    tasks = [make_task(name) for name in "abc"]
    assert make_worker(tasks, tmp_path, render).run() == {"b": "RuntimeError: out of memory"}
    assert sorted(videos(tmp_path)) == ["a.mp4", "c.mp4"]
    record = json.loads((tmp_path / "b.error.json").read_text())
    assert record["task"]["name"] == "b"
    assert "Traceback" in record["traceback"][0]
    assert make_worker(tasks, tmp_path).run() == {}
    assert not (tmp_path / "b.error.json").exists()


def test_a_full_disk_ends_with_one_line_and_a_later_start_goes_on(tmp_path: Path):
    process = drive(tmp_path / "out", repeat=2000, limit=50_000)
    _, said = process.communicate()
    assert process.returncode == 2
    assert len(said.splitlines()) == 1
    assert "nothing more can be written (File too large)" in said
    assert "make room and start again" in said
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    assert drive(tmp_path / "out", repeat=2000).wait() == 0
    assert drive(tmp_path / "alone", repeat=2000).wait() == 0
    assert videos(tmp_path / "out") == videos(tmp_path / "alone")


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_what_is_complete(small_disk: Path, tmp_path: Path):
    out = small_disk / "out"
    process = drive(out, repeat=1000)  # some 50 kB each, twelve of them
    _, said = process.communicate()
    assert process.returncode == 2
    assert "nothing more can be written (No space left on device)" in said
    done = receipts(out)
    assert 0 < len(done) < 12
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert drive(out, repeat=1000).wait() == 0
    assert drive(tmp_path / "alone", repeat=1000).wait() == 0
    assert videos(out) == videos(tmp_path / "alone")
    assert {name: receipts(out)[name] for name in done} == done


# where prompts come from


def write_vbench(folder: Path) -> Path:
    place = folder / "prompts_per_dimension"
    place.mkdir(parents=True)
    (place / "color.txt").write_text("a red bird\na white cat\n")
    (place / "scene.txt").write_text("a white cat\nan alley\n\n")
    return folder


def write_physics_iq(folder: Path, *, num_frames: int = 12) -> Path:
    clips = folder / "split-videos" / "conditioning" / "24FPS"
    clips.mkdir(parents=True)
    rows = ["scenario,description,category,generated_video_name"]
    for number, view in ((1, "left"), (2, "right")):
        name = f"{number:04d}_perspective-{view}_trimmed-ball.mp4"
        rows.append(f'{number:04d}_take-1,"A ball, {view}.",Solid Mechanics,{name}')
        path = clips / f"{number:04d}_conditioning-videos_24FPS_perspective-{view}.mp4"
        with VideoWriter(path, fps=24, size=(64, 64)) as writer:
            writer.append(importlib.import_module("numpy").zeros((num_frames, 64, 64, 3), "uint8"))
    (folder / "descriptions.csv").write_text("\n".join(rows) + "\n")
    return folder


def list_tasks(sample: ModuleType, *arguments: str) -> list[Any]:
    return sample.list_tasks(sample.make_parser().parse_intermixed_args([*arguments, "--out", "o"]))


def test_videos_of_vbench_have_its_names_and_a_prompt_of_two_dimensions_once(
    sample: ModuleType, tmp_path: Path
):
    folder = str(write_vbench(tmp_path / "VBench" / "prompts"))
    arguments = ["magi1", "--vbench", folder, "--dimensions", "color,scene", "--seed", "3"]
    tasks = list_tasks(sample, *arguments, "--per-prompt", "2")
    assert [(task.name, task.prompt, task.seed) for task in tasks] == [
        ("a red bird-0", "a red bird", 3),
        ("a red bird-1", "a red bird", 4),
        ("a white cat-0", "a white cat", 3),
        ("a white cat-1", "a white cat", 4),
        ("an alley-0", "an alley", 3),
        ("an alley-1", "an alley", 4),
    ]
    checkout = [*arguments[:1], "--vbench", str(tmp_path / "VBench"), *arguments[3:]]
    assert [task.name for task in list_tasks(sample, *checkout)] == [
        *("a red bird-0", "a white cat-0", "an alley-0")
    ]


def test_clips_of_physics_iq_are_continued_under_the_names_of_its_evaluation(
    sample: ModuleType, tmp_path: Path
):
    tasks = list_tasks(sample, "magi1", "--physics-iq", str(write_physics_iq(tmp_path)))
    assert [(task.name, task.prompt) for task in tasks] == [
        ("0001_perspective-left_trimmed-ball", "A ball, left."),
        ("0002_perspective-right_trimmed-ball", "A ball, right."),
    ]
    assert [Path(task.video).name[:4] for task in tasks] == ["0001", "0002"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["magi1", "--vbench", "nowhere"], "nowhere: holds no prompts_per_dimension folder: down"),
        (
            ["magi1", "--vbench", "v", "--dimensions", "taste"],
            "'taste' is no dimension .* color, s",
        ),
        (["magi1", "--physics-iq", "nowhere"], "nowhere: holds no descriptions.csv: download"),
        (["wan", "--prompts", "p.txt"], "the first argument must be skyreels_v2 or magi1, not wan"),
        (["magi1", "--prompts", "nowhere"], "nowhere: can't be read as text"),
        (["magi1", "--prompts", "p.txt", "--per-prompt", "0"], "--per-prompt must be 1 or more"),
        (["magi1", "--protocol", "x.yaml"], "--protocol says family and settings"),
        (["--protocol", "x.yaml"], "x.yaml: no such file"),
        (["--protocol", "x.yaml", "--seed", "3"], "--protocol says the seed: leave out --seed"),
        (["skyreels_v2", "--prompts", "p.txt", "--preset", "x"], "preset 'x' is unknown"),
        (["skyreels_v2", "--prompts", "p.txt", "num_step=3"], "unknown key 'num_step', did you"),
    ],
)
def test_what_is_given_wrong_is_said_in_one_line(
    sample: ModuleType,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    write_vbench(tmp_path / "v")
    Path("p.txt").write_text("a cat\n")
    assert sample.main([*arguments, "--out", "out"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert importlib.import_module("re").search(message, lines[0]), lines[0]


def test_names_that_no_file_can_have_are_refused():
    tasks = importlib.import_module("sampling.tasks")
    for name in ("a/b", ".a", "", "x" * 300):
        with pytest.raises(ValueError, match="can't be the name of a video"):
            tasks.check_names([make_task(name)])
    with pytest.raises(ValueError, match="two videos would be named a"):
        tasks.check_names([make_task("a"), make_task("a")])


# with the demo model


@pytest.fixture(name="prompts")
def _prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def demo(prompts: Path, out: Path) -> list[str]:
    return [
        *("skyreels_v2", "--model", "demo", "--preset", "flowcache_fast"),
        *("--prompts", str(prompts), "--out", str(out), *SHORT),
    ]


def launch_two(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_processes", "2", "--num_machines", "1", "--main_process_port", "29533"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *(str(SCRIPTS / "sample.py"), *arguments),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_processes_with_a_model_make_bitwise_what_one_makes(
    sample: ModuleType, prompts: Path, tmp_path: Path
):
    assert sample.main(demo(prompts, tmp_path / "one")) == 0
    run = launch_two(demo(prompts, tmp_path / "two"))
    assert run.returncode == 0, run.stderr
    assert "2 of 2 videos are complete" in run.stdout
    one, two = videos(tmp_path / "one"), videos(tmp_path / "two")
    assert one == two
    assert len(one) == 2
    for receipt in receipts(tmp_path / "one").values():
        assert receipt["task"]["preset"] == "flowcache_fast"
        assert receipt["kv_cache_bytes"] > 0
        assert receipt["first_frames_seconds"] > 0
        assert "load" not in receipt["stats"]["stages"]


def test_a_broken_clip_fails_alone_and_is_listed(
    sample: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    data = write_physics_iq(tmp_path / "data")
    broken = next(data.rglob("0002_conditioning*.mp4"))
    broken.write_text("no video")
    settings = [*SHORT[:1], "base_num_frames=9", "overlap_history=5", *SHORT[3:]]
    arguments = ["skyreels_v2", "--model", "demo", "--physics-iq", str(data)]
    assert sample.main([*arguments, "--out", str(tmp_path / "out"), *settings]) == 1
    captured = capfd.readouterr()
    assert "1 of 2 videos are complete" in captured.out
    last = captured.err.splitlines()[-1]
    assert last.startswith("failed: 0002_perspective-right_trimmed-ball: ")
    assert "not a video that can be read" in last
    made = tmp_path / "out" / "0001_perspective-left_trimmed-ball.mp4"
    assert list(videos(tmp_path / "out")) == [made.name]
    assert probe(made).num_frames == 9 - 5  # the given ones are left out


def test_a_model_is_loaded_once_for_all_prompts_seeds_and_methods(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    run = importlib.import_module("magi1.run")
    checkpoint = importlib.import_module("magi1.checkpoint").Checkpoint
    loads: list[str] = []

    def prepare(request: Any) -> SimpleNamespace:
        _, _, config = run.read_settings(request)
        return SimpleNamespace(
            config=config,
            checkpoint=checkpoint(config, (Path("dit"),), Path("vae"), Path("t5")),
            device=torch.device("cpu"),
            dtype=torch.float32,
            plan=SimpleNamespace(kv_bytes=1),
        )

    def load(job: Any, **_: Any) -> None:
        loads.append(job.config.runtime_config.scale_factor)

    monkeypatch.setattr(run, "prepare", prepare)
    monkeypatch.setattr(run, "load_models", load)
    monkeypatch.setattr(run, "load_text", lambda _job: None)
    monkeypatch.setattr(run, "encode_inputs", lambda *_, **__: None)
    monkeypatch.setattr(run, "render", lambda *_, **__: {})
    renderer = importlib.import_module("sampling.renderer").Renderer("cpu")
    task = replace(make_task("a"), family="magi1", model="4.5B_distill")
    others = {"preset": "flowcache_fast"}, {"prompt": "other"}, {"seed": 5}
    for changes in ({}, *others):
        renderer.render(replace(task, **changes), tmp_path)
    assert len(loads) == 1
    renderer.render(replace(task, settings=("runtime_config.scale_factor=0.5",)), tmp_path)
    assert len(loads) == 2


def test_what_a_video_is_made_from_is_told_by_contents_not_by_names(tmp_path: Path):
    renderer = importlib.import_module("sampling.renderer")
    presets = importlib.import_module("skyreels_v2.run").PRESETS
    model = tmp_path / "model"
    shutil.copytree(FOLDERS["skyreels_v2"] / "demo", model)
    preset = tmp_path / "own.yaml"
    preset.write_text((presets / "flowcache_fast.yaml").read_text())

    def origin(**changes: Any) -> dict[str, str]:
        task = replace(make_task("a", settings=SHORT), model=str(model), preset=str(preset))
        return renderer.Renderer("cpu").check(replace(task, **changes))

    first = origin()
    assert origin(prompt="other", seed=5) == first
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    assert origin(model=str(moved)) == first
    preset.write_text(preset.read_text() + "guidance: 3.5\n")
    edited = origin()
    assert edited["resolved_settings"] != first["resolved_settings"]
    assert edited["checkpoint"] == first["checkpoint"]
    spoil_weights(moved)
    assert origin(model=str(moved))["checkpoint"] != first["checkpoint"]


def spoil_weights(model: Path) -> None:
    """Change a weight of a transformer, as training does."""
    storage = importlib.import_module("safetensors.torch")
    path = importlib.import_module("skyreels_v2.checkpoint").find(str(model)).dit_files[0]
    weights = storage.load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1
    storage.save_file(weights, path)


def test_a_preset_that_is_edited_meanwhile_is_refused(tmp_path: Path):
    preset = tmp_path / "own.yaml"
    presets = importlib.import_module("skyreels_v2.run").PRESETS
    preset.write_text((presets / "vanilla.yaml").read_text())
    renderer = importlib.import_module("sampling.renderer").Renderer("cpu")
    task = replace(make_task("a", settings=SHORT), preset=str(preset))
    renderer.check(task)
    preset.write_text(preset.read_text() + "guidance: 3.5\n")
    with pytest.raises(ValueError, match="has changed since the start"):
        renderer.render(task, tmp_path)


@pytest.mark.slow
def test_kills_while_a_model_works_leave_no_trace(
    sample: ModuleType, prompts: Path, tmp_path: Path
):
    assert sample.main(demo(prompts, tmp_path / "one")) == 0
    dice = random.Random(3)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "sample.py"), *demo(prompts, tmp_path / "killed")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        time.sleep(dice.uniform(4, 16))
        process.send_signal(dice.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        process.wait()
    assert sample.main(demo(prompts, tmp_path / "killed")) == 0
    assert videos(tmp_path / "killed") == videos(tmp_path / "one")


def test_only_the_main_process_ends_with_the_code_of_failures(
    sample: ModuleType,
    fake: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    del fake

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(importlib.import_module("sampling.renderer").Renderer, "render", fail)
    arguments = ["magi1", "--prompts", "prompts.txt", "--out", "out"]
    for is_main, code in ((True, 1), (False, 0)):
        state = SimpleNamespace(
            device="cpu",
            process_index=0,
            num_processes=1,
            is_main_process=is_main,
            destroy_process_group=lambda: None,
        )
        monkeypatch.setattr(sample, "PartialState", lambda state=state, **_: state)
        assert sample.main(arguments) == code
        assert ("0 of 1 videos are complete" in capfd.readouterr().out) == is_main


# documentation


def examples(sample: ModuleType) -> list[list[str]]:
    text = sample.EXAMPLES.partition("examples:\n")[2].partition("\n\n")[0]
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def test_help_shows_examples(sample: ModuleType, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        sample.main(["--help"])
    assert ended.value.code == 0
    assert "accelerate launch --multi_gpu" in capfd.readouterr().out


@pytest.fixture(name="fake")
def _fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Make files instead of videos in a folder with all data sets; returns the tasks made."""
    renderer = importlib.import_module("sampling.renderer").Renderer
    made: list[Any] = []

    def render(_self: Any, task: Any, folder: Path) -> dict[str, Any]:
        made.append(task)
        return make_file(task, folder)

    monkeypatch.setattr(renderer, "render", render)
    monkeypatch.setattr(renderer, "check", lambda _self, _task: {})
    monkeypatch.chdir(tmp_path)
    write_vbench(Path("VBench/prompts"))
    for dimension in importlib.import_module("sampling.sources").VBENCH_DIMENSIONS:
        path = Path(f"VBench/prompts/prompts_per_dimension/{dimension}.txt")
        if not path.exists():
            path.write_text("a dog\n")
    write_physics_iq(Path("physics-IQ"))
    Path("prompts.txt").write_text("a cat\n")
    shutil.copytree(SCRIPTS / "protocols", "scripts/protocols")
    return made


def test_every_example_runs(sample: ModuleType, fake: list[Any], tmp_path: Path):
    for words in examples(sample):
        start = words.index("scripts/sample.py") + 1
        arguments = [word.replace("/shared/", f"{tmp_path}/shared/") for word in words[start:]]
        before = len(fake)
        assert sample.main(arguments) == 0, words
        assert len(fake) > before, words


Launch = Callable[..., list[str]]


@pytest.fixture(name="launch")
def _launch(tmp_path: Path) -> Launch:
    """Return what runs a launcher and gives what it hands to Python or accelerate."""
    copy, tools = tmp_path / "a copy", tmp_path / "tools"
    tools.mkdir()
    (copy / "scripts" / "sampling").mkdir(parents=True)
    shutil.copy(SCRIPTS / "sampling" / "launch.sh", copy / "scripts" / "sampling")
    (copy / "scripts" / "setup.sh").write_text(f'export PATH="{tools}:$PATH"\n')
    for folder in FOLDERS.values():
        shutil.copytree(folder / "scripts" / "sample", copy / folder.name / "scripts" / "sample")
    for tool in ("python", "accelerate"):
        path = tools / tool
        path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" {tool} "$@" > "{tmp_path}/said"\n')
        path.chmod(0o755)

    def run(family: str, name: str, **variables: str) -> list[str]:
        path = copy / FOLDERS[family].name / "scripts" / "sample" / f"{name}.sh"
        clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        subprocess.run(["bash", str(path)], env=clean | variables, cwd=tmp_path, check=True)
        return (tmp_path / "said").read_text().split("\0")[:-1]

    return run


@pytest.mark.parametrize(("family", "name"), LAUNCHERS)
def test_a_launcher_makes_its_videos(
    sample: ModuleType, fake: list[Any], launch: Launch, family: str, name: str
):
    words = launch(family, name, GPUS="1")
    assert words[0] == "python"
    assert sample.main(words[2:]) == 0
    method, benchmark = name.split("_")
    assert {task.family for task in fake} == {family}
    assert all(task.preset.startswith(method) for task in fake)
    assert all((task.video is not None) == (benchmark == "physicsiq") for task in fake)
    run = importlib.import_module(f"{family}.run")
    config = importlib.import_module("flowcache.config")
    for task in fake:  # the settings exist and fit
        preset = config.find_preset(run.PRESETS, task.preset)
        assert preset.is_file()


def test_a_launcher_starts_as_many_processes_as_it_is_told(launch: Launch):
    words = launch("skyreels_v2", "flowcache_vbench", GPUS="4", PER_PROMPT="5", DIMENSIONS="color")
    assert words[:2] == ["accelerate", "launch"]
    assert words[words.index("--num_processes") + 1] == "4"
    assert words[words.index("--per-prompt") + 1] == "5"
    assert words[words.index("--dimensions") + 1] == "color"


def test_the_results_of_vbench_become_one_small_file(tmp_path: Path):
    for dimension, score in (("color", 0.9), ("scene", 0.5)):
        folder = tmp_path / "vbench" / dimension
        folder.mkdir(parents=True)
        result = {dimension: [score, [{"video_path": "a.mp4", "video_results": score}]]}
        (folder / "results_eval_results.json").write_text(json.dumps(result))
    command = [sys.executable, str(SCRIPTS / "vbench" / "collect.py"), str(tmp_path / "vbench")]
    subprocess.run([*command, str(tmp_path / "vbench.json")], check=True)
    content = json.loads((tmp_path / "vbench.json").read_text())
    assert content["mean_percent"] == pytest.approx(70)
    assert content["dimensions"] == {"color": 0.9, "scene": 0.5}
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / "vbench" / "collect.py"), str(tmp_path / "no"), "x.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "holds no */*_eval_results.json" in run.stderr


def test_the_evaluation_says_what_is_missing(tmp_path: Path):
    script = str(SCRIPTS / "vbench" / "evaluate.sh")
    for arguments, message in (
        ([], "give the folder of the videos"),
        ([str(tmp_path)], "holds no VBench: run bash scripts/vbench/setup.sh first"),
    ):
        run = subprocess.run(
            ["bash", script, *arguments],
            env=os.environ | {"VBENCH_VENV": str(tmp_path / "none")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 2
        assert message in run.stderr
