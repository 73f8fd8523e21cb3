"""Runs that follow a profile."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache.runtime.ending import EXIT_USER_ERROR
from flowcache.runtime.model import Job, Loaded, Request
from flowcache.runtime.profile import (
    Observed,
    Prediction,
    Profile,
    Reuse,
    Source,
    write_profile,
)
from flowcache.runtime.run import encode_inputs, load_networks, prepare, read_settings
from flowcache.runtime.stats import RunStats
from skyreels_v2 import checkpoint as checkpoints
from skyreels_v2.__main__ import main
from skyreels_v2.model import MODEL
from skyreels_v2.pipeline import Conditioning, generate

pytestmark = pytest.mark.numeric

NUM_STEPS = 6
SETTINGS = (f"num_steps={NUM_STEPS}", "prompt=a red circle")

Write = Callable[..., Path]
Render = Callable[..., tuple[Tensor, set[tuple[int, int]]]]


@dataclass(frozen=True)
class Setup:
    """The small checkpoint, ready to run."""

    job: Job
    models: Loaded
    inputs: Conditioning
    fingerprint: str


@pytest.fixture(name="loaded", scope="module")
def _loaded(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("loaded")
    job = prepare(MODEL, Request("vanilla_causal", str(small), SETTINGS, str(folder)))
    stats = RunStats(job.device)
    inputs = encode_inputs(job, stats=stats)
    models = load_networks(job, stats=stats)
    return Setup(job, models, inputs, checkpoints.fingerprint(job.source.files))


@pytest.fixture(name="write")
def _write(loaded: Setup, tmp_path: Path) -> Write:
    """Return what writes a profile for the small checkpoint."""

    def write(*plans: list[int], band: tuple[float, float] = (0.0, 1e9), **changes: Any) -> Path:
        profile = Profile(
            version=1,
            fingerprint=loaded.fingerprint,
            setting=MODEL.setting(loaded.job.config),
            reuse=Reuse(list(plans), predict="velocity", order=1, factor=0.5),
            predicted=Prediction(error=0.1, psnr=30.0, flops=0.5, pixel_scale=1.0),
            observed=Observed([0.9] * NUM_STEPS, [band[0]] * NUM_STEPS, [band[1]] * NUM_STEPS),
            source=Source("small", "vanilla_causal", "2026-01-31", ["a red circle"], [7]),
        )
        path = tmp_path / "profile.yaml"
        write_profile(replace(profile, **changes), path)
        return path

    return write


@pytest.fixture(name="render")
def _render(loaded: Setup) -> Render:
    """Return what gives the frames of a run, and the (chunk, own step) that it computed."""

    def render(
        *settings: str, preset: str = "vanilla_causal"
    ) -> tuple[Tensor, set[tuple[int, int]]]:
        request = Request(preset, overrides=[*SETTINGS, *settings])
        config = read_settings(MODEL, request, loaded.job.source)
        stats = RunStats(loaded.job.device)
        shown = generate(loaded.models.dit, loaded.models.vae, config, loaded.inputs, stats=stats)
        frames = torch.cat([each.frames for each in shown if each.frames is not None], dim=1)
        return frames, {(row.chunk, row.step) for row in stats.passes if row.is_computed}

    return render


@pytest.mark.parametrize("preset", ["vanilla", "vanilla_causal"])
def test_a_plan_of_all_steps_is_vanilla(render: Render, write: Write, preset: str):
    path = write(list(range(NUM_STEPS)))
    want, _ = render(preset=preset)
    for policy in ("planned", "guarded"):
        given = (f"reuse.policy={policy}", "reuse.signal=content", f"reuse.profile={path}")
        found, _ = render(*given, preset=preset)
        assert torch.equal(found, want)


def test_a_plan_is_the_same_as_its_list_of_steps_with_its_predictor(render: Render, write: Write):
    path = write([0, 1, 3, NUM_STEPS - 1])
    found, computed = render("reuse.policy=planned", f"reuse.profile={path}")
    assert computed == {(chunk, step) for chunk in range(3) for step in (0, 1, 3, NUM_STEPS - 1)}
    listed = ("reuse.policy=stride", f"reuse.steps=[0,1,3,{NUM_STEPS - 1}]")
    want, _ = render(*listed, "reuse.predict=velocity", "reuse.extrapolate=0.5")
    assert torch.equal(found, want)
    held, _ = render(*listed, "reuse.predict=velocity")
    assert not torch.equal(found, held)
    asked = (f"reuse.profile={path}", "reuse.extrapolate=0")
    assert torch.equal(render("reuse.policy=planned", *asked)[0], held)


def test_the_predictor_of_a_plan_goes_with_held_guidance(render: Render, write: Write):
    path = write([0, 1, 3, NUM_STEPS - 1])
    held = ("reuse.guidance_steps=null", "reuse.guidance_every=2")
    found, computed = render("reuse.policy=planned", f"reuse.profile={path}", *held)
    assert computed == {(chunk, step) for chunk in range(3) for step in (0, 1, 3, NUM_STEPS - 1)}
    assert not torch.equal(found, render("reuse.policy=planned", f"reuse.profile={path}")[0])


def test_chunks_have_plans_of_their_own(render: Render, write: Write):
    path = write([0, 2, NUM_STEPS - 1], [0, NUM_STEPS - 1])
    _, computed = render("reuse.policy=planned", f"reuse.profile={path}")
    assert computed == {(c, s) for c in range(3) for s in (0, NUM_STEPS - 1)} | {(0, 2)}


def test_a_guard_computes_where_no_distance_is_as_calibrated(render: Render, write: Write):
    given = ("reuse.policy=guarded", "reuse.signal=content")
    plan = [0, NUM_STEPS - 1]
    path = write(plan)
    _, computed = render(*given, f"reuse.profile={path}")
    assert computed == {(chunk, step) for chunk in range(3) for step in plan}
    path = write(plan, band=(1e8, 1e9))
    _, computed = render(*given, f"reuse.profile={path}")
    assert len(computed) == 3 * NUM_STEPS


def test_magcache_reuses_up_to_its_threshold(render: Render, write: Write):
    given = ("reuse.policy=magcache", f"reuse.profile={write([0, NUM_STEPS - 1])}")
    assert len(render(*given, "reuse.threshold=0")[1]) == 3 * NUM_STEPS
    # each skipped step: 0.1, then 0.1 + 0.19
    one = render(*given, "reuse.threshold=0.25", "reuse.warmup_steps=1")[1]
    assert one == {(chunk, step) for chunk in range(3) for step in (0, 2, 4, 5)}


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"fingerprint": "other"}, (), "was tuned for another model (small): tune this one"),
        ({}, ("shift=3",), "was tuned with shift 8.0, but this run has 3.0"),
        ({}, ("num_steps=5",), "was tuned with num_steps 6, but this run has 5"),
        (
            {},
            ("num_steps=5", "shift=3"),
            "made for small, was tuned with num_steps 6, shift 8.0, but this run has 5, 3.0: use",
        ),
        ({}, ("ar_step=2",), "was tuned with lag 1, but this run has 2"),
        ({}, ("guidance=1",), "was tuned with guidance [6.0], but this run has []"),
        ({}, ("reuse.profile=no.yaml",), "no.yaml: no such profile: make one with"),
        ({}, ("reuse.profile=null",), "reuse.policy=planned needs a profile"),
        ({}, ("reuse.policy=guarded",), "set reuse.signal=content, not timestep"),
        (
            {},
            ("reuse.guidance_every=2", "reuse.guidance_steps=null", "reuse.predict=residual"),
            "set reuse.predict to velocity, clean or latent_update, not residual",
        ),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_in_one_line_before_anything_is_loaded(
    small: Path,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    settings: tuple[str, ...],
    message: str,
):
    path = write([0, NUM_STEPS - 1], **changes)
    given = ["--preset", "vanilla_causal", "--model", str(small), "--out", str(tmp_path / "a.mp4")]
    policy = ["reuse.policy=planned", f"reuse.profile={path}"]
    code = main([*given, *SETTINGS, *policy, *settings, "--dry-run"])
    told = capsys.readouterr()
    assert (code, told.out) == (EXIT_USER_ERROR, "")
    assert message in told.err
    assert told.err.count("\n") == 1


def test_a_damaged_profile_is_one_line(
    small: Path, write: Write, capsys: pytest.CaptureFixture[str]
):
    path = write([0, NUM_STEPS - 1])
    path.write_text(path.read_text()[:200])
    given = [*SETTINGS, "reuse.policy=planned", f"reuse.profile={path}", "--dry-run"]
    assert main(["--preset", "vanilla_causal", "--model", str(small), *given]) == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert "is no profile, or damaged (" in told
    assert "VALUE" not in told


def test_a_run_says_what_it_follows(
    small: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write([0, 2, NUM_STEPS - 1])
    given = ["--model", str(small), "--out", str(tmp_path / "a.mp4"), *SETTINGS, "--dry-run"]
    policy = ["--preset", "vanilla_causal", "reuse.policy=planned", f"reuse.profile={path}"]
    assert main([*policy, *given]) == 0
    said = capsys.readouterr().out
    assert f"profile      {path}: 3 of 6 steps planned, 30.0 dB expected\n" in said
