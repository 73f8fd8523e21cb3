"""Tuning with a tiny MAGI-1 checkpoint."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close

from flowcache.runtime.ending import EXIT_USER_ERROR
from flowcache.runtime.model import Request
from flowcache.runtime.profile import read_profile
from flowcache.runtime.run import prepare
from flowcache.tuning.gram import Calibration
from magi1.model import MODEL
from magi1.schedule import Clock

pytestmark = pytest.mark.numeric

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(name="tune")
def _tune(distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return what runs the tuning command on the distilled checkpoint."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("tune")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving right\na green square\na blue cat\n")

    def run(*arguments: str) -> int:
        model = ["--architecture", "magi1", "--model", str(distilled)]
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
def test_a_schedule_that_leaves_nothing_to_reuse_is_refused_before_anything_is_made(
    tune: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rest: tuple[str, ...],
):
    assert tune("runtime_config.num_steps=2", *rest) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: nothing can be reused in 2 steps, of which the first")
    assert error.count("\n") == 1
    assert not list((tmp_path / "work").glob("*"))
