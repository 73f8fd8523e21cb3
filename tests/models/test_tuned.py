"""Runs that follow a profile."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache.runtime.ending import EXIT_USER_ERROR
from flowcache.runtime.model import Job, Loaded
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

pytestmark = pytest.mark.numeric

NUM_STEPS = 6
CHECKPOINTS = {"small": "skyreels_v2", "distilled": "magi1", "base": "magi1"}
HELD = ("reuse.guidance_steps=null", "reuse.guidance_every=2")
NUM_CHUNKS = {"skyreels_v2": 3, "magi1": 2}

Write = Callable[..., Path]
Render = Callable[..., tuple[Tensor, set[tuple[int, int]]]]


@dataclass(frozen=True)
class Ready:
    """A checkpoint, ready to run."""

    job: Job
    models: Loaded
    inputs: Any

    @property
    def name(self) -> str:
        return self.job.model.name

    @property
    def content(self) -> tuple[str, ...]:
        """What the guard of the model compares, where there is a choice."""
        return ("reuse.signal=content",) if self.name == "skyreels_v2" else ()

    def all_of(self, *steps: int) -> set[tuple[int, int]]:
        """Return these steps of every chunk."""
        return {(chunk, step) for chunk in range(NUM_CHUNKS[self.name]) for step in steps}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def ready(
    request: pytest.FixtureRequest, tiny_of: Callable[..., Any], tmp_path_factory: Any
) -> Ready:
    tiny = tiny_of(CHECKPOINTS[request.param], request.getfixturevalue(request.param))
    out = str(tmp_path_factory.mktemp("ready"))
    steps = tiny.setting("num_steps", NUM_STEPS)
    job = prepare(tiny.model, tiny.request(steps, preset=tiny.short.causal, out=out))
    stats = RunStats(job.device)
    return Ready(job, load_networks(job, stats=stats), encode_inputs(job, stats=stats))


@pytest.fixture
def write(ready: Ready, tmp_path: Path) -> Write:
    """Return what writes a profile for the checkpoint."""

    def write_plans(
        *plans: list[int], band: tuple[float, float] = (0.0, 1e9), **changes: Any
    ) -> Path:
        model, job = ready.job.model, ready.job
        profile = Profile(
            version=1,
            fingerprint=model.fingerprint(job.source),
            setting=model.setting(job.config),
            reuse=Reuse(list(plans), predict="velocity", order=1, factor=0.5),
            predicted=Prediction(error=0.1, psnr=30.0, flops=0.5, pixel_scale=1.0),
            observed=Observed([0.9] * NUM_STEPS, [band[0]] * NUM_STEPS, [band[1]] * NUM_STEPS),
            source=Source("small", job.preset, "2026-01-31", ["a red circle"], [7]),
        )
        path = tmp_path / "profile.yaml"
        write_profile(replace(profile, **changes), path)
        return path

    return write_plans


@pytest.fixture
def render(ready: Ready) -> Render:
    """Return what gives the frames of a run, and the (chunk, own step) that it computed."""

    def run(*settings: str, preset: str | None = None) -> tuple[Tensor, set[tuple[int, int]]]:
        job, models = ready.job, ready.models
        overrides = [*job.request.overrides, *settings]
        request = replace(job.request, preset=preset or job.preset, overrides=overrides)
        config = read_settings(job.model, request, job.source)
        stats = RunStats(job.device)
        shown = job.model.generate(models.dit, models.vae, config, ready.inputs, stats=stats)
        frames = torch.cat([each.frames for each in shown if each.frames is not None], dim=1)
        return frames, {(row.chunk, row.step) for row in stats.passes if row.is_computed}

    return run


def test_a_plan_of_all_steps_is_vanilla(ready: Ready, render: Render, write: Write):
    path = write(list(range(NUM_STEPS)))
    for preset in dict.fromkeys(("vanilla", ready.job.preset)):
        want, _ = render(preset=preset)
        for policy in ("planned", "guarded"):
            given = (f"reuse.policy={policy}", f"reuse.profile={path}", *ready.content)
            found, _ = render(*given, preset=preset)
            assert torch.equal(found, want)


def test_a_plan_is_the_same_as_its_list_of_steps_with_its_predictor(
    ready: Ready, render: Render, write: Write
):
    steps = (0, 1, 3, NUM_STEPS - 1)
    path = write(list(steps))
    found, computed = render("reuse.policy=planned", f"reuse.profile={path}")
    assert computed == ready.all_of(*steps)
    listed = ("reuse.policy=stride", f"reuse.steps={list(steps)}")
    want, _ = render(*listed, "reuse.predict=velocity", "reuse.extrapolate=0.5")
    assert torch.equal(found, want)
    held, _ = render(*listed, "reuse.predict=velocity")
    assert not torch.equal(found, held)
    asked = (f"reuse.profile={path}", "reuse.extrapolate=0")
    assert torch.equal(render("reuse.policy=planned", *asked)[0], held)


@pytest.mark.parametrize("ready", ["small", "base"], indirect=True)
def test_the_predictor_of_a_plan_goes_with_held_guidance(
    ready: Ready, render: Render, write: Write
):
    given = ("reuse.policy=planned", f"reuse.profile={write([0, 1, 3, NUM_STEPS - 1])}")
    found, computed = render(*given, *HELD)
    assert computed == ready.all_of(0, 1, 3, NUM_STEPS - 1)
    assert not torch.equal(found, render(*given)[0])


def test_chunks_have_plans_of_their_own(ready: Ready, render: Render, write: Write):
    path = write([0, 2, NUM_STEPS - 1], [0, NUM_STEPS - 1])
    _, computed = render("reuse.policy=planned", f"reuse.profile={path}")
    assert computed == ready.all_of(0, NUM_STEPS - 1) | {(0, 2)}


def test_a_guard_computes_where_no_distance_is_as_calibrated(
    ready: Ready, render: Render, write: Write
):
    given = ("reuse.policy=guarded", *ready.content)
    path = write([0, NUM_STEPS - 1])
    _, computed = render(*given, f"reuse.profile={path}")
    assert computed == ready.all_of(0, NUM_STEPS - 1)
    path = write([0, NUM_STEPS - 1], band=(1e8, 1e9))
    _, computed = render(*given, f"reuse.profile={path}")
    assert computed == ready.all_of(*range(NUM_STEPS))


def test_magcache_reuses_up_to_its_threshold(ready: Ready, render: Render, write: Write):
    given = ("reuse.policy=magcache", f"reuse.profile={write([0, NUM_STEPS - 1])}")
    assert render(*given, "reuse.threshold=0")[1] == ready.all_of(*range(NUM_STEPS))
    # each skipped step: 0.1, then 0.1 + 0.19
    one = render(*given, "reuse.threshold=0.25", "reuse.warmup_steps=1")[1]
    assert one == ready.all_of(0, 2, 4, 5)


def with_risks(*ages: float) -> dict[str, Any]:
    """Return what makes a profile have these risks of results that are one step old, two, ..."""
    risks = [list(ages[:step]) for step in range(NUM_STEPS)]
    ones, high = [0.9] * NUM_STEPS, [1e9] * NUM_STEPS
    return {"observed": Observed(ones, [0.0] * NUM_STEPS, high, guidance_risks=risks)}


def test_guidance_risk_computes_all_passes_when_its_sum_reaches_the_threshold(
    ready: Ready, render: Render, write: Write
):
    path = write([0, NUM_STEPS - 1], **with_risks(1, 3, 5))
    given = ("reuse.policy=racfg", f"reuse.profile={path}", "reuse.warmup_steps=1")
    zero, computed = render(*given, "reuse.threshold=0")
    assert computed == ready.all_of(*range(NUM_STEPS))
    assert torch.equal(zero, render("reuse.policy=vanilla")[0])
    # sums of 1 and of 1 + 3; a fourth step would have no risk
    assert render(*given, "reuse.threshold=3.5")[1] == ready.all_of(0, 2, 4, 5)
    listed = ("reuse.policy=stride", "reuse.steps=[0,3,5]", "reuse.predict=velocity")
    found, computed = render(*given, "reuse.threshold=4.5")
    assert computed == ready.all_of(0, 3, 5)
    assert torch.equal(found, render(*listed)[0])


def test_forecasts_decide_when_a_chunk_is_computed(ready: Ready, render: Render):
    given = ("reuse.policy=racer", "reuse.warmup_steps=1")
    for predictor in ("velocity", "latent_update"):
        same = (*given, f"reuse.predict={predictor}")
        zero, computed = render(*same, "reuse.threshold=0")
        assert computed == ready.all_of(*range(NUM_STEPS))
        assert torch.equal(zero, render("reuse.policy=vanilla")[0])
        most, computed = render(*same, "reuse.threshold=1e9")
        assert computed == ready.all_of(0, 1, 2, NUM_STEPS - 1), "three results are needed"
        listed = ("reuse.policy=stride", f"reuse.steps=[0,1,2,{NUM_STEPS - 1}]", *same[2:])
        assert torch.equal(most, render(*listed)[0])


REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...], str]] = [
    *(
        (checkpoint, changes, settings, message)
        for checkpoint in CHECKPOINTS
        for changes, settings, message in (
            ({"fingerprint": "other"}, (), "was tuned for another model (small): tune this one"),
            ({}, ("reuse.profile=no.yaml",), "no.yaml: no such profile, nor "),
            ({}, ("reuse.profile=null",), "reuse.policy=planned needs a profile"),
            (
                {},
                ("reuse.policy=racfg",),
                "has no guidance risks, which reuse.policy=racfg adds up",
            ),
        )
    ),
    *(
        (checkpoint, {}, settings, message)
        for checkpoint in ("distilled", "base")
        for settings, message in (
            (
                ("runtime_config.num_steps=8",),
                "with num_steps 6, lag 3, but this run has 8, 4: use ",
            ),
            (("runtime_config.window_size=1",), "with lag 3, but this run has 6"),
        )
    ),
    *(
        (checkpoint, with_risks(1), ("reuse.policy=racfg", HELD[1]), "all guidance passes together")
        for checkpoint in ("small", "base")
    ),
    *(
        ("small", {}, settings, message)
        for settings, message in (
            (("shift=3",), "was tuned with shift 8.0, but this run has 3.0"),
            (("num_steps=5",), "was tuned with num_steps 6, but this run has 5"),
            (
                ("num_steps=5", "shift=3"),
                "made for small, was tuned with num_steps 6, shift 8.0, but this run has 5, 3.0: "
                "use",
            ),
            (("ar_step=2",), "was tuned with lag 1, but this run has 2"),
            (("guidance=1",), "was tuned with guidance [6.0], but this run has []"),
            (("reuse.policy=guarded",), "set reuse.signal=content, not timestep"),
            (
                ("reuse.policy=racer", "attention=full"),
                "reuse.policy=racer compares forecasts chunk by chunk: set attention=causal",
            ),
            (
                (*HELD, "reuse.predict=residual"),
                "set reuse.predict to velocity, clean or latent_update, not residual",
            ),
        )
    ),
]
"""Checkpoint, changes of the profile, settings, message."""


@pytest.fixture
def refused(
    ready: Ready, tiny_of: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return what plans a run that follows a profile, and gives its one line of error."""

    def run(path: Path, *settings: str) -> str:
        job = ready.job
        given = ["--preset", job.preset, "--model", str(job.request.model)]
        given += ["--out", str(tmp_path / "a.mp4"), *job.request.overrides]
        policy = ["reuse.policy=planned", f"reuse.profile={path}"]
        code = tiny_of(ready.name).main(*given, *policy, *settings, "--dry-run")
        captured = capsys.readouterr()
        assert (code, captured.out) == (EXIT_USER_ERROR, "")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


@pytest.mark.parametrize(("ready", "changes", "settings", "message"), REFUSED, indirect=["ready"])
def test_a_profile_that_does_not_fit_is_refused_in_one_line_before_anything_is_loaded(
    write: Write,
    refused: Callable[..., str],
    changes: dict[str, Any],
    settings: tuple[str, ...],
    message: str,
):
    assert message in refused(write([0, NUM_STEPS - 1], **changes), *settings)


def test_a_damaged_profile_is_one_line(write: Write, refused: Callable[..., str]):
    path = write([0, NUM_STEPS - 1])
    path.write_text(path.read_text()[:200])
    line = refused(path)
    assert "is no profile, or damaged (" in line
    assert "VALUE" not in line


def test_a_run_says_what_it_follows(
    ready: Ready,
    write: Write,
    tiny_of: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    path, job = write([0, 2, NUM_STEPS - 1]), ready.job
    given = ["--model", str(job.request.model), "--out", str(tmp_path / "a.mp4"), "--dry-run"]
    policy = ["--preset", job.preset, "reuse.policy=planned", f"reuse.profile={path}"]
    assert tiny_of(ready.name).main(*policy, *given, *job.request.overrides) == 0
    said = capsys.readouterr().out
    assert f"profile      {path}: 3 of 6 steps planned, 30.0 dB expected\n" in said


def test_the_profile_holds_the_scales_of_the_guidance(ready: Ready):
    scales = {
        "small": [6.0],
        "distilled": [],
        "base": [0.0, 0.3, 1.5, 1.0, 7.5, 0.0],
    }
    assert ready.job.model.setting(ready.job.config).guidance == scales[ready.job.source.name]
