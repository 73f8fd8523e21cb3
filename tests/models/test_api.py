"""The Python interface, on the demos of all models."""

import dataclasses
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flowcache
from flowcache.api import Pipeline
from flowcache.errors import UserError
from flowcache.runtime.model import Request, architecture_of, load_model
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import describe, execute, prepare
from flowcache.runtime.video import read_video, to_uint8

PROMPT = "a red circle moving right on a black background"
NUM_FRAMES = {"skyreels_v2": 33, "magi1": 48}
CONTENT = {"skyreels_v2": {"signal": "content"}, "magi1": {}}
FOR_VIDEO = {"skyreels_v2": {"overlap_history": 9}, "magi1": {"prefix_frames": 24}}


@pytest.fixture(scope="module", params=NUM_FRAMES)
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    """A loaded demo with short videos."""
    return flowcache.load(
        "demo",
        architecture=request.param,
        progress_bar=False,
        device="cpu",
        num_frames=NUM_FRAMES[request.param],
        num_steps=8,
    )


@pytest.fixture(scope="module")
def video(pipe: Pipeline) -> flowcache.Video:
    return pipe(PROMPT, seed=7, record=True)


def as_command(pipe: Pipeline, out: Path | None, **more: Any) -> Request:
    """Return the request of the command line for the same video."""
    keys = pipe.model.keys
    given = {"prompt": PROMPT, "seed": 7, "device": "cpu", "num_steps": 8}
    given["num_frames"] = NUM_FRAMES[pipe.model.name]
    overrides = [f"{keys.get(name, name)}={value}" for name, value in {**given, **more}.items()]
    place = None if out is None else str(out)
    return Request("flowcache_fast", "demo", overrides, place, record=True)


def test_a_saved_video_is_that_of_the_command_line(
    pipe: Pipeline, video: flowcache.Video, tmp_path: Path
):
    saved = video.save(tmp_path / "api.mp4")
    execute(pipe.model, as_command(pipe, tmp_path / "command.mp4"), Ranks())
    assert saved.read_bytes() == (tmp_path / "command.mp4").read_bytes()
    for suffix in (".json", ".record.json"):
        assert saved.with_suffix(suffix).is_file()
    frames, _ = read_video(saved)
    assert frames.shape == video.frames.shape == (NUM_FRAMES[pipe.model.name], 64, 64, 3)
    assert video.record is not None
    assert len(video.record["decisions"]) == sum(
        video.stats["passes"][name] for name in ("computed", "reused")
    )
    with pytest.raises(UserError, match=r"api.mp4 exists and is kept"):
        video.save(tmp_path / "api.mp4")


def test_the_parts_of_a_stream_make_the_video_and_the_first_comes_before_the_last_tick(
    pipe: Pipeline, video: flowcache.Video
):
    ticks: list[flowcache.Tick] = []
    parts: list[flowcache.Part] = []
    seen: list[int] = []
    for part in pipe.stream(PROMPT, seed=7, on_tick=ticks.append):
        parts.append(part)
        seen.append(len(ticks))
    assert np.array_equal(np.concatenate([part.frames for part in parts]), video.frames)
    assert [part.first for part in parts] == [0, *np.cumsum([len(p.frames) for p in parts])[:-1]]
    assert len(ticks) == ticks[0].num_ticks
    assert seen[0] < len(ticks)
    assert [chunk for tick in ticks for chunk in tick.clean] == [0, 1]
    assert sum(len(tick.decisions) for tick in ticks) == sum(
        video.stats["passes"][name] for name in ("computed", "reused")
    )


def test_a_closed_stream_ends_the_run_and_frees_the_pipeline(
    pipe: Pipeline, video: flowcache.Video
):
    ticks: list[flowcache.Tick] = []
    stream = pipe.stream(PROMPT, seed=7, on_tick=ticks.append)
    next(stream)
    stream.close()
    assert len(ticks) < ticks[0].num_ticks
    assert np.array_equal(pipe(PROMPT, seed=7).frames, video.frames)


def test_an_error_of_the_callback_ends_the_run(pipe: Pipeline, video: flowcache.Video):
    def stop(tick: flowcache.Tick) -> None:
        if tick.index == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        pipe(PROMPT, on_tick=stop)
    assert np.array_equal(pipe(PROMPT, seed=7).frames, video.frames)


def test_several_threads_get_what_each_asked_for(pipe: Pipeline):
    serial = [pipe(PROMPT, seed=seed).frames for seed in range(3)]
    made: dict[int, Any] = {}

    def make(seed: int) -> None:
        made[seed] = pipe(PROMPT, seed=seed).frames

    threads = [threading.Thread(target=make, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(made[seed], serial[seed]) for seed in range(3))
    assert not np.array_equal(serial[0], serial[1])


def test_a_second_video_inside_a_stream_is_refused_and_not_waited_for(pipe: Pipeline):
    stream = pipe.stream(PROMPT)
    next(stream)
    with pytest.raises(RuntimeError, match="finish or close its stream"):
        pipe(PROMPT)
    stream.close()


def test_nothing_is_written_unasked(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    pipe(PROMPT, num_steps=4)
    pipe.plan()
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_taken_as_files_and_as_pixels(
    pipe: Pipeline, video: flowcache.Video, tmp_path: Path
):
    picture = Image.fromarray(video.frames[5])
    picture.save(tmp_path / "start.png")
    short = {"num_steps": 4, "seed": 1}
    of_file = pipe(PROMPT, image=tmp_path / "start.png", **short)
    for given in (picture, video.frames[5]):
        assert np.array_equal(pipe(PROMPT, image=given, **short).frames, of_file.frames)
    more: dict[str, Any] = {**short, **FOR_VIDEO[pipe.model.name]}
    continued = pipe(PROMPT, video=video, **more)
    assert np.array_equal(pipe(PROMPT, video=video.frames, **more).frames, continued.frames)
    assert not np.array_equal(pipe(PROMPT, **short).frames[:33], continued.frames[:33])


def test_a_plan_says_what_a_dry_run_prints(pipe: Pipeline):
    plan = pipe.plan(PROMPT, seed=7)
    job = prepare(pipe.model, as_command(pipe, None, seed=7), writes=False)
    assert str(plan) == describe(job)
    assert plan.num_chunks == 2
    assert plan.flops == job.work.flops > 0
    longer = pipe.plan(num_frames=97 if pipe.model.name == "skyreels_v2" else 96)
    assert longer.flops > plan.flops


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"num_framez": 3}, "unknown key 'num_framez', did you mean", id="key"),
        pytest.param({"seed": "x"}, "seed is 'x', but must be a whole number", id="type"),
        pytest.param({"reuse": {"threshold": -1}}, "threshold", id="in a section"),
        pytest.param({"image": np.zeros((4, 4))}, r"image must be a file or uint8", id="pixels"),
        pytest.param({"image": "nowhere.png"}, "nowhere.png", id="file"),
    ],
)
def test_a_wrong_setting_is_one_line(pipe: Pipeline, settings: dict[str, Any], message: str):
    for call in (pipe, pipe.stream, pipe.plan):
        with pytest.raises(UserError, match=message) as error:
            call(PROMPT, **settings)
        assert "\n" not in str(error.value)


def test_an_unknown_key_is_answered_with_the_nearest_and_where_all_are(pipe: Pipeline):
    with pytest.raises(UserError) as error:
        flowcache.load("demo", architecture=pipe.model.name, foo=3)
    line = str(error.value)
    assert line.startswith("unknown key 'foo'; the nearest are ")
    assert line.endswith("; the command line's --list-settings shows all")
    assert len(line) < 200


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"on_tick": 3}, "on_tick must be a function of one argument, not 3"),
        ({"on_part": "x"}, "on_part must be a function of one argument, not 'x'"),
        ({"record": "x"}, "record must be True or False, not 'x'"),
        ({"preset": 3}, "preset must be a name or a YAML file, not 3"),
    ],
)
def test_what_a_call_cannot_use_is_refused_before_any_work(
    pipe: Pipeline, given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipe, "networks", None)  # of which nothing is asked
    with pytest.raises(UserError, match=f"^{said}$"):
        pipe(PROMPT, **given)


def test_arguments_of_other_calls_are_refused_by_their_names(
    pipe: Pipeline, video: flowcache.Video, tmp_path: Path
):
    wrong: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
        (flowcache.load, ("demo",), {"progress_bar": "x"}, "progress_bar must be True or False"),
        (flowcache.tune, (3, [PROMPT]), {}, "pipe must be what flowcache.load returns, not 3"),
        (flowcache.tune, (pipe, 3), {}, "prompts must be a text or a list of texts, not 3"),
        (flowcache.tune, (pipe, [PROMPT]), {"folder": 3}, "folder must be a path, not 3"),
        (video.save, (None,), {}, "path must be a path, not None"),
        (video.save, (tmp_path / "a.mp4",), {"overwrite": "no"}, "overwrite must be True or"),
    ]
    for call, args, named, said in wrong:
        with pytest.raises(UserError, match=said):
            call(*args, **named)


def test_messages_name_arguments_of_python_and_no_flags(
    pipe: Pipeline, video: flowcache.Video, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = video.save(tmp_path / "a.mp4")
    monkeypatch.setattr(pipe, "settings", {**pipe.settings, "profile": "no.yaml"})
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: video.save(path), "or give overwrite=True$"),
        (lambda: video.save(""), "^path is empty"),
        (pipe.plan, r"demo/no.yaml: no such profile, nor /\S+/no.yaml: make one with flowcache.tu"),
        (
            lambda: flowcache.load("4.5B_distill", device="cpu"),
            "use the command line's --download with a released model, or model demo$",
        ),
        (
            lambda: flowcache.load("df-1.3b-540p", device="cpu"),
            "names sizes, for the command line's --dry-run: ",
        ),
    ]
    for call, said in wrong:
        with pytest.raises(UserError, match=said):
            call()


@pytest.mark.parametrize("prompt", [3, ["a cat"], b"a cat", "", " \n"])
def test_a_prompt_is_text(pipe: Pipeline, prompt: Any):
    for call in (pipe, pipe.stream, pipe.plan):
        with pytest.raises(UserError, match=r"prompt (must be text, not|is empty)"):
            call(prompt)


def test_numbers_of_numpy_are_numbers_and_other_objects_are_named(pipe: Pipeline):
    plan = pipe.plan(num_frames=np.int64(NUM_FRAMES[pipe.model.name]), seed=np.uint8(3))
    assert plan.num_frames == NUM_FRAMES[pipe.model.name]
    with pytest.raises(UserError, match=r"reuse.threshold must be a text, a number, a list"):
        pipe.plan(reuse={"threshold": object()})


def test_a_report_names_pixels_by_their_size_and_a_file_by_its_path(
    pipe: Pipeline, video: flowcache.Video, tmp_path: Path
):
    more: dict[str, Any] = {"num_steps": 4, **FOR_VIDEO[pipe.model.name]}
    picture = Image.new("RGB", (80, 48))
    picture.save(tmp_path / "start.png")
    for given, name, shown in (
        ({"image": picture}, "image", "pixels 80x48"),
        ({"video": video}, "video", f"pixels 64x64, {len(video.frames)} frames"),
        ({"image": tmp_path / "start.png"}, "image", str(tmp_path / "start.png")),
    ):
        report = pipe(PROMPT, **given, **more).report
        assert report["config"][name] == shown


def test_a_report_says_when_frames_were_there_and_that_they_are_odd(
    pipe: Pipeline, video: flowcache.Video, monkeypatch: pytest.MonkeyPatch
):
    assert 0 < video.report["first_frames_seconds"] < video.stats["total_seconds"]
    assert video.report["alarms"] == []
    monkeypatch.setattr("flowcache.runtime.run.to_uint8", lambda frames: to_uint8(frames) * 0)
    assert pipe(PROMPT, num_steps=4).report["alarms"]


def test_a_section_is_a_mapping(pipe: Pipeline):
    full = pipe(PROMPT, reuse={"policy": "vanilla"}, num_steps=4)
    assert full.stats["passes"]["reused"] == 0


def test_a_video_is_compared_with_a_reference_or_a_file(
    pipe: Pipeline, video: flowcache.Video, tmp_path: Path
):
    full = pipe(PROMPT, seed=7, preset="vanilla")
    found = flowcache.compare(video, full)
    assert 10 < found.psnr < 60
    assert 0 < found.ssim < 1
    assert found.flops_ratio == pytest.approx(
        full.stats["flops"]["computed"] / video.stats["flops"]["computed"]
    )
    assert flowcache.compare(video, video.frames).psnr == float("inf")
    of_file = flowcache.compare(video, video.save(tmp_path / "a.mp4"))
    assert 25 < of_file.psnr < 80  # the codec's noise
    assert of_file.time_ratio is None
    with pytest.raises(UserError, match="clips of one shape are needed"):
        flowcache.compare(video, video.frames[:-1])


def test_a_notebook_plays_a_video(video: flowcache.Video):
    html = video._repr_html_()
    assert html.startswith("<video controls")
    assert "data:video/mp4;base64," in html
    assert repr(dataclasses.replace(video)).startswith("Video(")


def test_tuning_gives_a_profile_that_meets_the_target_and_is_followed(
    pipe: Pipeline, tmp_path: Path
):
    networks = pipe.networks.load(prepare(pipe.model, as_command(pipe, None), writes=False))
    tuned = flowcache.tune(pipe, PROMPT, target="flops=0.7", folder=tmp_path / "work")
    assert tuned.forecast.flops <= 0.7
    assert pipe.networks.load(prepare(pipe.model, as_command(pipe, None), writes=False)) is networks
    path = tuned.save(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"a.yaml exists and is kept"):
        tuned.save(path)
    (plan,) = tuned.profile.reuse.plans
    planned = pipe(PROMPT, profile=path, record=True)
    assert planned.record is not None
    computed = {row["step"] for row in planned.record["decisions"] if row["computed"]}
    assert computed == set(plan)
    assert planned.stats["passes"]["reused"] > 0
    guarded = pipe.plan(profile=path, reuse={"policy": "guarded", **CONTENT[pipe.model.name]})
    assert "guarded reuse" in str(guarded)
    before = sorted(tmp_path.rglob("work/*"))
    assert flowcache.tune(pipe, PROMPT, target="flops=0.7", folder=tmp_path / "work") == tuned
    assert sorted(tmp_path.rglob("work/*")) == before  # nothing was measured anew
    loaded = flowcache.load(
        "demo",
        architecture=pipe.model.name,
        progress_bar=False,
        profile=path,
        **pipe.settings,
    )
    assert np.array_equal(loaded(PROMPT).frames, planned.frames)


@pytest.mark.parametrize(
    ("prompts", "target", "message"),
    [
        (PROMPT, "quality=3", "must be one of the kinds"),
        (PROMPT, 3, "the target is '3'"),
        (PROMPT, "speedup=1000", "cannot be reached"),
        ([], "speedup=2", "prompts is empty"),
        ([PROMPT, 7], "speedup=2", "prompts must be text, not 7"),
        ([" "], "speedup=2", "prompts is empty"),
    ],
)
def test_what_tuning_cannot_do_is_one_line(pipe: Pipeline, prompts: Any, target: Any, message: str):
    with pytest.raises(UserError, match=message) as error:
        flowcache.tune(pipe, prompts, target=target)
    assert "\n" not in str(error.value)


def test_a_profile_is_a_file_that_was_tuned_for_these_settings(pipe: Pipeline, tmp_path: Path):
    with pytest.raises(UserError, match="profile must be a file"):
        pipe.plan(profile=3)
    with pytest.raises(UserError, match="no such profile"):
        pipe.plan(profile=tmp_path / "none.yaml")
    shipped = pipe.model.find("demo").folder / "profiles" / "flowcache_tuned.yaml"
    with pytest.raises(UserError, match="was tuned with num_steps"):
        pipe.plan(profile=shipped)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("demo", "skyreels_v2"),
        ("df-1.3b-540p", "skyreels_v2"),
        ("Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers", "skyreels_v2"),
        ("demo-base", "magi1"),
        ("24B_base", "magi1"),
    ],
)
def test_the_model_is_known_by_its_name(name: str, package: str):
    assert architecture_of(name) == package


@pytest.mark.parametrize("package", NUM_FRAMES)
def test_the_model_is_known_by_its_folder(package: str):
    folder = load_model(package).find("demo").folder
    assert architecture_of(str(folder)) == package


def test_an_unknown_model_and_an_unknown_architecture_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is none of a released name"):
        flowcache.load(tmp_path)
    with pytest.raises(UserError, match="'wan' is unknown: use skyreels_v2 or magi1"):
        flowcache.load("demo", architecture="wan")


def test_importing_the_package_imports_no_torch():
    code = "import sys, flowcache; assert 'torch' not in sys.modules; flowcache.load"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
README = PAGE.parents[1] / "README.md"
EXAMPLES = [
    example
    for page in (PAGE, README)
    for example in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_of_the_page_run(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    exec(example, {})


def test_the_page_names_everything_public():
    text = PAGE.read_text(encoding="utf-8")
    for name in flowcache.__all__:
        assert f"`{name}`" in text or f"flowcache.{name}(" in text, name


def test_comparing_what_is_no_clip_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"a clip must be a Video, an array .* not int"):
        flowcache.compare(3, 4)  # type: ignore[arg-type]
