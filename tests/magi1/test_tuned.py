"""Runs that follow a profile, and tuning."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.runtime.ending import EXIT_USER_ERROR
from flowcache.runtime.model import Job, Loaded, Request
from flowcache.runtime.profile import (
    Observed,
    Prediction,
    Profile,
    Reuse,
    Source,
    read_profile,
    write_profile,
)
from flowcache.runtime.run import encode_inputs, load_networks, prepare, read_settings
from flowcache.runtime.stats import RunStats
from flowcache.tune.gram import Calibration
from magi1 import checkpoint as checkpoints
from magi1.__main__ import main
from magi1.model import MODEL
from magi1.pipeline import Conditioning, generate
from magi1.schedule import Clock

pytestmark = pytest.mark.numeric

SCRIPTS = Path(__file__).parents[2] / "scripts"
NUM_STEPS, NUM_CHUNKS = 6, 2
SETTINGS = (f"runtime_config.num_steps={NUM_STEPS}", "prompt=a red circle")

Write = Callable[..., Path]
Render = Callable[..., tuple[Tensor, set[tuple[int, int]]]]


@dataclass(frozen=True)
class Setup:
    """A checkpoint, ready to run."""

    job: Job
    models: Loaded
    inputs: Conditioning
    fingerprint: str


@pytest.fixture(name="loaded", scope="module", params=["distilled", "base"])
def _loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("loaded")
    model: Path = request.getfixturevalue(request.param)
    job = prepare(MODEL, Request("vanilla", str(model), SETTINGS, str(folder)))
    stats = RunStats(job.device)
    inputs = encode_inputs(job, stats=stats)
    models = load_networks(job, stats=stats)
    return Setup(job, models, inputs, checkpoints.fingerprint(job.source.files))


@pytest.fixture(name="write")
def _write(loaded: Setup, tmp_path: Path) -> Write:
    """Return what writes a profile for the checkpoint."""

    def write(plan: list[int], **changes: Any) -> Path:
        profile = Profile(
            version=1,
            fingerprint=loaded.fingerprint,
            setting=MODEL.setting(loaded.job.config),
            reuse=Reuse([plan], predict="velocity", order=1, factor=0.5),
            predicted=Prediction(error=0.1, psnr=30.0, flops=0.5, pixel_scale=1.0),
            observed=Observed([0.9] * NUM_STEPS, [0.0] * NUM_STEPS, [1e9] * NUM_STEPS),
            source=Source("small", "vanilla", "2026-01-31", ["a red circle"], [7]),
        )
        path = tmp_path / "profile.yaml"
        write_profile(replace(profile, **changes), path)
        return path

    return write


@pytest.fixture(name="render")
def _render(loaded: Setup) -> Render:
    """Return what gives the frames of a run, and the (chunk, own step) that it computed."""

    def render(*settings: str) -> tuple[Tensor, set[tuple[int, int]]]:
        model = str(loaded.job.source.layers[0])
        config = read_settings(MODEL, Request("vanilla", model, [*SETTINGS, *settings]))
        stats = RunStats(loaded.job.device)
        shown = generate(loaded.models.dit, loaded.models.vae, config, loaded.inputs, stats=stats)
        frames = torch.cat([each.frames for each in shown if each.frames is not None], dim=1)
        return frames, {(row.chunk, row.step) for row in stats.passes if row.is_computed}

    return render


def test_a_plan_of_all_steps_is_vanilla(render: Render, write: Write):
    path = write(list(range(NUM_STEPS)))
    want, _ = render()
    for policy in ("planned", "guarded"):
        found, _ = render(f"reuse.policy={policy}", f"reuse.profile={path}")
        assert torch.equal(found, want)


def test_a_plan_is_the_same_as_its_list_of_steps_with_its_predictor(render: Render, write: Write):
    steps = (0, 1, 3, NUM_STEPS - 1)
    path = write(list(steps))
    found, computed = render("reuse.policy=planned", f"reuse.profile={path}")
    assert computed == {(chunk, step) for chunk in range(NUM_CHUNKS) for step in steps}
    listed = ("reuse.policy=stride", f"reuse.steps={list(steps)}")
    want, _ = render(*listed, "reuse.predict=velocity", "reuse.extrapolate=0.5")
    assert torch.equal(found, want)
    held, _ = render(*listed, "reuse.predict=velocity")
    assert not torch.equal(found, held)


def test_magcache_reuses_up_to_its_threshold(render: Render, write: Write):
    given = ("reuse.policy=magcache", f"reuse.profile={write([0, NUM_STEPS - 1])}")
    assert len(render(*given, "reuse.threshold=0")[1]) == NUM_CHUNKS * NUM_STEPS
    # each skipped step: 0.1, then 0.1 + 0.19
    one = render(*given, "reuse.threshold=0.25", "reuse.warmup_steps=1")[1]
    assert one == {(chunk, step) for chunk in range(NUM_CHUNKS) for step in (0, 2, 4, 5)}


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"fingerprint": "other"}, (), "was tuned for another model (small): tune this one"),
        (
            {},
            ("runtime_config.num_steps=8",),
            "with num_steps 6, lag 3, but this run has 8, 4: use ",
        ),
        ({}, ("runtime_config.window_size=1",), "with lag 3, but this run has 6"),
        ({}, ("reuse.profile=no.yaml",), "no.yaml: no such profile: make one with"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_in_one_line_before_anything_is_loaded(
    loaded: Setup,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    settings: tuple[str, ...],
    message: str,
):
    path = write([0, NUM_STEPS - 1], **changes)
    model = str(loaded.job.source.layers[0])
    given = ["--preset", "vanilla", "--model", model, "--out", str(tmp_path / "a.mp4")]
    policy = ["reuse.policy=planned", f"reuse.profile={path}"]
    code = main([*given, *SETTINGS, *policy, *settings, "--dry-run"])
    told = capsys.readouterr()
    assert (code, told.out) == (EXIT_USER_ERROR, "")
    assert message in told.err
    assert told.err.count("\n") == 1


def test_a_profile_holds_all_scales_of_the_guidance(loaded: Setup):
    scales = [0.0, 0.3, 1.5, 1.0, 7.5, 0.0] if len(loaded.job.work.passes) == 3 else []
    assert MODEL.setting(loaded.job.config).guidance == scales


# Tuning -------------------------------------------------------------------------------------


@pytest.fixture(name="tune")
def _tune(distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return what runs the tuning command on the distilled checkpoint."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("tune")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving right\na green square\na blue cat\n")

    def run(*arguments: str) -> int:
        model = ["--model", "magi1", "--checkpoint", str(distilled)]
        given = ["--prompts", str(prompts), "--work", str(tmp_path / "work"), "--clips", "2"]
        return script.main([*model, *given, *arguments])

    return run


@pytest.mark.slow
def test_a_tuned_profile_serves_a_run(
    tune: Callable[..., int], distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    steps = "runtime_config.num_steps=4"
    assert tune("--target", "flops=0.8", "--clips", "1", "--check-prompts", "1", steps) == 0
    printed = capsys.readouterr().out
    for name in ("planned", "even", "FlowCache", "TeaCache, latent update"):
        assert f"| {name}" in printed
    assert "KV cache     with compression clips are " in printed
    assert "gentlest     3 of 4 steps" in printed
    path = tmp_path / "work/profile.yaml"
    calibration = Calibration.load(tmp_path / "work/calibration-000.npz")
    job = prepare(
        MODEL,
        Request(
            "flowcache_fast",
            str(distilled),
            [steps, "prompt=a cat", "reuse.policy=planned", f"reuse.profile={path}"],
            str(tmp_path / "videos"),
        ),
    )
    # noise levels are those of the model's clock, 1 noise to 0 clean
    timesteps = Clock.of(job.config).timesteps().double()
    assert_close(1 - torch.tensor(calibration.sigmas), timesteps, ulps=8, dtype=torch.float32)
    assert list(calibration.gram) == [0, 1]
    (plan,) = read_profile(path).reuse.plans
    table = json.loads((tmp_path / "work/table.json").read_text())["table"]
    assert job.config.reuse.predict == "velocity"
    assert {row["num_clips"] for row in table} == {1}
    assert len(plan) < 4


@pytest.mark.parametrize("rest", [("--dry-run",), ()])
def test_a_schedule_that_leaves_nothing_to_reuse_is_told_before_anything_is_made(
    tune: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rest: tuple[str, ...],
):
    assert tune("runtime_config.num_steps=2", *rest) == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert told.startswith("error: nothing can be reused in 2 steps: the first and the last one")
    assert told.count("\n") == 1
    assert not list((tmp_path / "work").glob("*"))


def test_the_dry_run_needs_no_weights_and_under_a_gigabyte_more(
    tune: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert tune("--checkpoint", "24B_base", "--dry-run") == 0
    line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("memory"))
    assert 0 < float(line.split()[1]) < 1
